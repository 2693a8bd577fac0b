"""Two checkpoints compared: which tensors differ, by how much, which kind of edit each difference
looks like, and how much of it known steerings explain.

What a steering explains is found by baking it into BASE: what then differs from OTHER is left over,
a number, or nothing to the bit.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.edits import Edit, edit_of, rounding
from trimtab.exchange.weights import Source, Weights, both, config_changes, of_model, side_by_side
from trimtab.model import bake
from trimtab.reports import Presented, Table
from trimtab.steering import Steering, Steerings, together
from trimtab.terminal import progress, status

#: Where the number of a block stands in the name of a tensor.
_BLOCK = re.compile(r"\.(?:layers|layer|blocks|block|h)\.(\d+)\.")
#: Sites that maps of these names write and read, as most architectures call them.
_SITES = (
    (r"attn\.|attention\.|mixer\.", r"(o_proj|c_proj|out_proj|dense|wo)$", "attn_out", "heads"),
    (r"attn\.|attention\.", r"(q_proj|k_proj|v_proj|qkv_proj|c_attn|query_key_value)$", "",
     "attn_norm"),
    (r"mlp\.|feed_forward\.|moe\.|ffn\.",
     r"(down_proj|c_proj|fc2|dense_4h_to_h|w2|fc_out|fc_2)$", "ffn_out", "ffn_in"),
    (r"mlp\.|feed_forward\.|moe\.|ffn\.",
     r"(gate_proj|up_proj|gate_up_proj|c_fc|fc1|fc_1|dense_h_to_4h|w1|w3|fc_in)$", "", "ffn_norm"),
    (r"mlp\.|moe\.", r"gate$", "router", "ffn_norm"),
    (r"", r"(embed_tokens|wte|embed_in|word_embeddings)$", "embed", ""),
    (r"", r"(lm_head|embed_out)$", "", "final_norm"),
)  # fmt: skip
#: Tables, and the layers of GPT-2 and its kind, are stored [in, out].
_TABLES = re.compile(r"(embed_tokens|wte|wpe|embed_in|word_embeddings)\.weight$")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
_CONV1D_KINDS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
#: Directions of two ablations are one above this cosine.
_ALIKE = 0.999
#: What of a difference is told as explained: nothing is left to the bit, or no more than rounding.
EXACT, ROUNDING = "exact", "to rounding"


@dataclass(frozen=True)
class Change:
    """One tensor that differs, or that a given steering would have changed.

    `norm` is the Frobenius norm of the difference, `relative` that as a share of the tensor's own
    in BASE (None where that is zero, or has none). `explained` is the share of the squared
    difference that the steerings explain, below 0 where they lead away from OTHER; `left` the norm
    of what is left over; `how` says "exact", "to rounding", or nothing.
    """

    name: str
    layer: int | None
    site: str
    shape: tuple[int, ...]
    norm: float
    relative: float | None
    edit: Edit | None
    explained: float | None = None
    left: float | None = None
    how: str = ""

    @property
    def looks_like(self) -> str:
        """The kind of edit in words."""
        if self.edit is None:
            return "not changed, though a steering would change it"
        return self.edit.words

    def as_json(self) -> dict[str, Any]:
        edit = None if self.edit is None else self.edit.as_json()
        about = {"shape": list(self.shape), "looks_like": self.looks_like, "edit": edit}
        return {**vars(self), **about}


@dataclass(frozen=True)
class Shared:
    """A direction, [units] of length 1 in float64, that is ablated in several tensors."""

    direction: Tensor
    tensors: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Audit(Presented):
    """What differs between two checkpoints: `changes` has the tensors that do, of `tensors`.

    With `steerings`, `explained` is the share of the squared difference of all tensors that they
    explain together, and `unexplained` the norm of what is left over, as a share of the norm of
    the difference.
    """

    base: str
    other: str
    tensors: int
    changes: tuple[Change, ...]
    config: dict[str, tuple[Any, Any]]
    steerings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def differing(self) -> tuple[Change, ...]:
        """The tensors that differ between the two."""
        return tuple(change for change in self.changes if change.edit is not None)

    @property
    def directions(self) -> tuple[Shared, ...]:
        """The directions of single ablations, those first that are ablated in the most tensors."""
        found: list[Shared] = []
        for change in self.differing:
            basis = change.edit.directions if change.edit is not None else None
            if basis is None or basis.shape[1] != 1:
                continue
            one = basis[:, 0]
            for place, known in enumerate(found):
                if len(known.direction) == len(one) and abs(float(known.direction @ one)) > _ALIKE:
                    found[place] = replace(known, tensors=(*known.tensors, change.name))
                    break
            else:
                # The sign says nothing: its largest number is positive.
                found.append(Shared(one * one[one.abs().argmax()].sign(), (change.name,)))
        return tuple(sorted(found, key=lambda each: -len(each.tensors)))

    @property
    def unexplained(self) -> float | None:
        """The norm of what the steerings leave over, as a share of that of the difference; 0 where
        nothing is left, infinite where nothing differs and the steerings would change something."""
        if not self.steerings:
            return None
        left = math.hypot(*(change.left or 0.0 for change in self.changes))
        whole = math.hypot(*(change.norm for change in self.changes))
        return left / whole if whole else (math.inf if left else 0.0)

    @property
    def explained(self) -> float | None:
        """The share of the squared difference that they explain."""
        left = self.unexplained
        return None if left is None or left == math.inf else 1 - left * left

    @property
    def fully_explained(self) -> bool:
        """Whether the steerings leave nothing over but rounding, in any tensor."""
        return bool(self.steerings) and all(change.how for change in self.changes)

    @property
    def exact(self) -> bool:
        """Whether they leave nothing over, to the bit."""
        return bool(self.steerings) and all(change.how == EXACT for change in self.changes)

    @property
    def summary(self) -> str:
        """What was found, in a sentence."""
        count = len(self.differing)
        if not count:
            said = f"all {self.tensors} tensors are the same"
            absent = len(self.changes)
            return said + (f"; the steerings would change {absent} of them" if absent else "")
        kinds = Counter(change.edit.kind for change in self.differing if change.edit is not None)
        counted = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        said = f"{count} of {self.tensors} tensors differ ({counted})"
        if not self.steerings:
            return said
        if self.exact:
            return f"{said}, and the steerings explain all of it, bit for bit"
        if self.fully_explained:
            return f"{said}, and the steerings explain all of it but rounding"
        left = self.unexplained
        assert left is not None
        return (
            f"{said}; the steerings explain {_percent(1 - left * left)} of the squared "
            f"difference, and {100 * left:.3g} % of its norm is unexplained"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is to be known beside the tables: the notes, and directions that tensors share."""
        shared = (each for each in self.directions if len(each.tensors) > 1)
        said = (f"{len(each.tensors)} of the ablations are of one direction" for each in shared)
        return (*said, *self.notes)

    def tables(self) -> list[Table]:
        """Block by block, then tensor by tensor, the largest difference first."""
        if not self.changes:
            return []
        return [self._by_block(), self._by_tensor()]

    def _by_block(self) -> Table:
        rows = []
        blocks = sorted({change.layer for change in self.changes}, key=lambda b: (b is None, b))
        for block in blocks:
            these = [change for change in self.changes if change.layer == block]
            relative = [change.relative for change in these if change.relative is not None]
            kinds = dict.fromkeys(change.edit.kind for change in these if change.edit is not None)
            rows.append(
                ["outside" if block is None else block, len(these),
                 f"{100 * max(relative):.3g} %" if relative else "", ", ".join(kinds),
                 self._left_of(these)]
            )  # fmt: skip
        heads = ["block", "tensors", "largest change", "kinds", "unexplained"]
        return Table("Blocks that differ", heads, rows).without_empty_columns(4)

    def _by_tensor(self) -> Table:
        rows = [
            [
                change.name,
                change.site,
                "" if change.relative is None else f"{100 * change.relative:.3g} %",
                "" if change.edit is None or change.edit.rank is None
                else f"{change.edit.rank} of {change.edit.full}",
                change.looks_like,
                self._left_of([change]),
            ]
            for change in sorted(self.changes, key=lambda one: -(one.relative or 0.0))
        ]  # fmt: skip
        heads = ["tensor", "site", "change", "rank", "looks like", "unexplained"]
        note = (
            "Change: the difference's Frobenius norm as a share of BASE's. Rank: singular values "
            "of the difference above what rounding to OTHER's precision can make."
        )
        return Table("Tensors that differ", heads, rows, note).without_empty_columns(5)

    def _left_of(self, changes: Sequence[Change]) -> str:
        if not self.steerings:
            return ""
        if all(change.how == EXACT for change in changes):
            return "nothing"
        if all(change.how for change in changes):
            return "rounding"
        left = math.hypot(*(change.left or 0.0 for change in changes))
        whole = math.hypot(*(change.norm for change in changes))
        return f"{100 * left / whole:.3g} %" if whole else "all"

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs; a share that is infinite is None."""
        left = self.unexplained
        return {
            "base": self.base,
            "other": self.other,
            "tensors": self.tensors,
            "differing": len(self.differing),
            "steerings": list(self.steerings),
            "explained": self.explained,
            "unexplained": None if left == math.inf else left,
            "fully_explained": self.fully_explained if self.steerings else None,
            "exact": self.exact if self.steerings else None,
            "changes": [change.as_json() for change in self.changes],
            "directions": [
                {"tensors": list(each.tensors), "direction": each.direction.tolist()}
                for each in self.directions
            ],
            "config": {name: list(pair) for name, pair in self.config.items()},
            "notes": list(self.notes),
        }


def audit(
    base: Source,
    other: Source,
    *steerings: Steering | Steerings,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Audit:
    """Compare two checkpoints of one architecture, tensor by tensor, and with `steerings` say how
    much of what differs they explain, baked into BASE in the order given.

    Each is a pack, a directory, a .gguf file, a hub id, or a model that is loaded. Without
    steerings directories are read from their files, one tensor at a time. BASE's numbers are taken
    in the type of OTHER's. `force` allows steerings that were made for another model; Python code
    that comes with a model runs only if `trust_remote_code` says so. Raises TrimtabError in one
    line where the two are no checkpoints of one architecture, or where a steering cannot be baked.
    """
    given = flattened(steerings)
    first, second = both(base, other, bool(given), trust_remote_code)
    expected = baked_into(first, given, force) if given else None
    names = names_of(first, second, *([] if expected is None else [expected]))
    changes = []
    with progress("comparing tensors", len(names)) as advance:
        for name in names:
            change = _compared(name, first, second, expected)
            changes += [] if change is None else [change]
            advance(1)
    return Audit(
        shown(first.name, 200),
        shown(second.name, 200),
        len(names),
        tuple(changes),
        config_changes(first, second),
        tuple(steering.label for steering in given),
        tuple(_notes(first, second)),
    )


def flattened(steerings: Sequence[Steering | Steerings]) -> tuple[Steering, ...]:
    """Single steerings in their order."""
    return tuple(one for each in steerings for one in together(each))


def baked_into(base: Weights, steerings: Sequence[Steering], force: bool) -> Weights:
    """The tensors of BASE with steerings baked in."""
    assert base.model is not None
    with status("baking the steerings into BASE"):
        return of_model(bake(base.model, *steerings, force=force))


def _percent(share: float) -> str:
    """Never rounded up: what is not all must not read as 100 %."""
    return f"{math.floor(10_000 * share) / 100:g} %"


# -- tensor by tensor -----------------------------------------------------------------------------


def names_of(*weights: Weights) -> list[str]:
    """The tensors of some checkpoints, each once, blocks in their order."""
    twice = frozenset.intersection(*(each.tied for each in weights))
    names = {name for each in weights for name in each.shapes} - twice
    return sorted(names, key=lambda name: [_numbered(part) for part in re.split(r"(\d+)", name)])


def _numbered(part: str) -> int | str:
    return int(part) if part.isdigit() else part


def _compared(name: str, base: Weights, other: Weights, expected: Weights | None) -> Change | None:
    if expected is None:
        (was, now), awaited = side_by_side(name, base, other), None
    else:
        was, awaited, now = side_by_side(name, base, expected, other)
    _refuse_nan(name, was, base)
    _refuse_nan(name, now, other)
    differs = not torch.equal(was, now)
    if not differs and (awaited is None or torch.equal(awaited, now)):
        return None
    norm = distance(was, now)
    size = float(was.double().norm())
    edit = None
    if differs:
        turned = _is_turned(name, base) and was.dim() == 2
        pair = (was.T, now.T) if turned else (was, now)
        edit = edit_of(*pair, added=name not in base.shapes)
    change = Change(
        name,
        int(found[1]) if (found := _BLOCK.search(f".{name}")) else None,
        _site_of(name, edit),
        tuple(now.shape),
        norm,
        norm / size if size else None,
        edit,
    )
    return change if awaited is None else _explained(change, now, awaited)


def _refuse_nan(name: str, tensor: Tensor, whose: Weights) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise TrimtabError(f"{shown(name)} of {shown(whose.name, 150)} holds NaN or infinity")


def distance(one: Tensor, two: Tensor) -> float:
    """The Frobenius norm of the difference."""
    return float((two.double() - one.double()).norm())


def _explained(change: Change, now: Tensor, awaited: Tensor) -> Change:
    """The same with what the steerings leave over."""
    left = distance(awaited, now)
    share = None if change.norm == 0 else 1 - (left / change.norm) ** 2
    return Change(
        **{
            **vars(change),
            "explained": share,
            "left": left,
            "how": agreement(change.norm, now, left),
        }
    )


def agreement(norm: float, now: Tensor, left: float) -> str:
    """Whether what is left over of a change of this norm is nothing, or no more than rounding:
    where that is clearly less than the change itself."""
    if left == 0:
        return EXACT
    bound = rounding(now) * float(now.double().norm())
    return ROUNDING if left <= bound and left < norm / 4 else ""


# -- what the names say ---------------------------------------------------------------------------


def _is_turned(name: str, base: Weights) -> bool:
    """Whether a matrix is stored [in, out]."""
    conv1d = base.kind in _CONV1D_KINDS and _CONV1D.search(name)
    return bool(conv1d or _TABLES.search(name))


def _site_of(name: str, edit: Edit | None) -> str:
    """The site at which such an edit acts, as far as the names of modules say it: what a map writes
    for an edit of its output, what it reads for one of its input."""
    if edit is None or edit.kind in ("rounding", "slight"):
        return ""
    module = name.removesuffix(".weight").removesuffix(".bias")
    reads = edit.kind == "scaled columns" or edit.numbers.get("side") == "input"
    writes = edit.kind in ("scaled rows", "constant") or edit.numbers.get("side") == "output"
    block = _BLOCK.search(f".{name}")
    for inside, last, written, read in _SITES:
        if re.search(inside, module) and re.search(last, module):
            kind = written if writes else read if reads else ""
            if not kind:
                return ""
            return f"layers.{block[1]}.{kind}" if block else kind
    return ""


def _notes(base: Weights, other: Weights) -> Iterator[str]:
    if base.kind != other.kind:
        yield f"BASE is a {shown(base.kind)} model, OTHER a {shown(other.kind)} model"
    added = len(other.shapes.keys() - base.shapes.keys())
    if added:
        yield f"OTHER has {added} biases that BASE does not have: they are compared with zeros"
    for name, (one, two) in config_changes(base, other).items():
        yield f"config.json: {shown(name)} is {shown(one, 60)} in BASE, {shown(two, 60)} in OTHER"
