"""What an audit found: the tensors that differ, and how it shows itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trimtab.exchange.edits import Edit
from trimtab.reports import Presented, Table

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


def _percent(share: float) -> str:
    """Never rounded up: what is not all must not read as 100 %."""
    return f"{math.floor(10_000 * share) / 100:g} %"
