"""Gates: under which condition a steering acts, for each row of a batch on its own.

A condition scores an activation at one site against a direction and compares the score with a
threshold; a gate puts conditions together with and, or, not, and says when it decides:

    token      at each token of its own, from that token's activation
    latched    once, at the prompt's last token, from that token or the mean of the prompt's tokens;
               it can steer only that token and later ones
    two-pass   once, from a pass over the prompt that is not steered, before the model begins to
               read: it can steer any token, at any site, for a second reading of the prompt

A gate looks at tokens up to its own and at sites below those that it steers, so that a steering
never feeds its own gate. docs/gates.md has examples and measurements.

Source: conditional activation steering (arXiv:2409.05907), whose score is `compat` here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, parse_site, site_order
from trimtab.errors import TrimtabError, check_choice, shown
from trimtab.steering.document import read_gate, write_gate
from trimtab.steering.gate_document import (
    MOST_CONDITIONS,
    GateDocument,
    GateKind,
    GateScore,
    GateSide,
)
from trimtab.steering.parts import Intervention, ModelIdentity
from trimtab.steering.scope import Scope
from trimtab.steering.scope_tree import Situation, Window, Word, parts_of

#: How conditions, which are numbered, are put together: a number, or a word and what it is about:
#: ("and", 0, ("not", 1)).
Logic = int | tuple[Any, ...]

#: Whose mean a condition reads unless told otherwise: all tokens of the prompt but the first, whose
#: activation is far longer than the others' in most models and says nothing of the text.
READS_ALL_BUT_FIRST = Scope.parse("all[1:]")
#: The prompt's last token alone.
READS_LAST = Scope.parse("last")
_DEEPEST = 32


@dataclass(frozen=True, eq=False)
class Condition:
    """A score at a site, and on which side of a threshold it holds.

    `direction` is [units] at `site`. The score of an activation x is, with v = direction / its
    length:

        cosine      <x, v> / |x|
        projection  <x, v>
        probe       <x, direction> + bias, a logit
        compat      cos(x, tanh(v <v, x>)), as the authors of conditional activation steering have
                    it: without a sign, and no cosine where an entry saturates

    It holds where the score is `above` or `below` the threshold, and never where the score is no
    number. `reads` is a scope of the tokens whose mean activation is scored ("last": the prompt's
    last one alone); a token gate scores each token by itself.
    """

    site: str
    direction: Tensor
    threshold: float
    fires: GateSide = "above"
    score: GateScore = "cosine"
    bias: float = 0.0
    reads: Scope = READS_ALL_BUT_FIRST
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", Scope.of(self.reads))  # it is frozen
        parse_site(self.site)
        check_choice("score", self.score, GateScore)
        check_choice("fires", self.fires, GateSide)
        direction = self.direction
        if not isinstance(direction, Tensor):
            raise TrimtabError(
                f"the condition at {self.site} needs a direction that is a tensor [units], not "
                f"{shown(direction, 60)}"
            )
        if direction.dim() != 1 or not bool(direction.isfinite().all()) or not direction.any():
            raise TrimtabError(
                f"the condition at {self.site} needs a direction [units] of finite numbers, not "
                f"all of them 0; it has shape {list(direction.shape)}"
            )
        if math.isnan(self.threshold) or not math.isfinite(self.bias):
            raise TrimtabError(
                f"the condition at {self.site} needs a threshold and a bias that are numbers, not "
                f"{self.threshold} and {self.bias}"
            )
        if self.bias and self.score != "probe":
            raise TrimtabError(f"a bias is for the score probe, not for {self.score}")
        _check_reads(self.reads)

    @property
    def width(self) -> int:
        """The number of units of the site that it fits."""
        return len(self.direction)

    def scores(self, x: Tensor) -> Tensor:
        """The score of activations [..., units], [...] in float32 or wider.

        A sum over each activation by itself, which is the same in every batch.
        """
        x = x if x.dtype == torch.float64 else x.float()
        if self.score == "probe":
            found: Tensor = (x * self._direction(x)).sum(-1) + self.bias
            return found
        unit = self._unit(x)
        along: Tensor = (x * unit).sum(-1)
        if self.score == "projection":
            return along
        if self.score == "compat":
            projected = (along[..., None] * unit).tanh()
            return (x * projected).sum(-1) / (_length(x) * _length(projected))
        return along / _length(x)

    def holds(self, scores: Tensor) -> Tensor:
        """Where scores are on the side on which it fires."""
        return scores > self.threshold if self.fires == "above" else scores < self.threshold

    def _direction(self, like: Tensor) -> Tensor:
        """The direction where and how the scores are worked out; kept, because every pass asks."""
        known: dict[Any, Tensor] = self.__dict__.setdefault("_known", {})
        key = (like.device, like.dtype)
        if key not in known:
            with torch.inference_mode(False):
                known[key] = self.direction.to(like.device, like.dtype)
        return known[key]

    def _unit(self, like: Tensor) -> Tensor:
        known: dict[Any, Tensor] = self.__dict__.setdefault("_known", {})
        key = (like.device, like.dtype, "unit")
        if key not in known:
            with torch.inference_mode(False):
                wide = self.direction.double()
                known[key] = (wide / wide.norm()).to(like.device, like.dtype)
        return known[key]

    def __str__(self) -> str:
        sign = ">" if self.fires == "above" else "<"
        label = f"{shown(self.name, 40)}: " if self.name else ""
        return f"{label}{self.score} at {self.site} {sign} {self.threshold:.4g}"


@dataclass(frozen=True, eq=False)
class Gate:
    """Conditions, how they are put together, and when they decide.

    `a & b`, `a | b` and `~a` make gates of gates of one kind. `model` is that whose activations it
    was fitted on, `contrast` names the texts, and `findings` says how well it tells them apart.
    """

    conditions: tuple[Condition, ...]
    kind: GateKind = "token"
    rule: Logic = 0
    model: ModelIdentity | None = None
    contrast: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, GateKind)
        if not 1 <= len(self.conditions) <= MOST_CONDITIONS:
            raise TrimtabError(
                f"a gate has 1 to {MOST_CONDITIONS} conditions, not {len(self.conditions)}"
            )
        object.__setattr__(self, "rule", _checked(self.rule, len(self.conditions)))

    def __and__(self, other: Gate) -> Gate:
        return self._with("and", other)

    def __or__(self, other: Gate) -> Gate:
        return self._with("or", other)

    def __invert__(self) -> Gate:
        return replace(self, rule=("not", self.rule), findings={})

    def _with(self, word: str, other: Gate) -> Gate:
        if not isinstance(other, Gate):
            return NotImplemented
        if self.kind != other.kind:
            raise TrimtabError(
                f"a gate of kind {self.kind} and one of kind {other.kind} decide at different "
                "times: make them of one kind (gate.of_kind('two-pass'))"
            )
        if self.model and other.model and self.model.digest != other.model.digest:
            raise TrimtabError(f"one gate was made for {self.model}, the other for {other.model}")
        rule = (word, self.rule, _moved(other.rule, len(self.conditions)))
        return Gate(
            (*self.conditions, *other.conditions), self.kind, rule, self.model or other.model
        )

    def of_kind(self, kind: GateKind) -> Gate:
        """The same conditions, decided at another time."""
        return replace(self, kind=kind)

    def check_fits(self, anatomy: Anatomy, identity: ModelIdentity) -> None:
        """Refuse a model other than its own, as far as it is known which that is."""
        if self.model is not None and self.model.digest != identity.digest:
            raise TrimtabError(
                f"this gate was made for {self.model}, the model is {identity}: fit one for this "
                "model"
            )
        self.check_sizes(anatomy, identity.name)

    def check_sizes(self, anatomy: Anatomy, name: str) -> None:
        """Refuse a model that lacks a site of its conditions, or has it in another width."""
        for condition in self.conditions:
            width = anatomy.width(condition.site)
            if condition.width != width:
                raise TrimtabError(
                    f"the sizes do not fit: {condition.site} has {width} units in {shown(name)}, "
                    f"the gate has {condition.width}"
                )

    def decide(self, scores: Sequence[Tensor]) -> Tensor:
        """Where it fires, from the scores of its conditions, all of one shape. It does not fire
        where a score is no number, as that of a text without a token to read."""
        known = torch.stack([~each.isnan() for each in scores]).all(0)
        holds = [c.holds(each) for c, each in zip(self.conditions, scores, strict=True)]
        return _together(self.rule, holds) & known

    @property
    def sites(self) -> tuple[str, ...]:
        """Where its conditions read, each once."""
        return tuple(dict.fromkeys(each.site for each in self.conditions))

    def __str__(self) -> str:
        return f"{self.kind} gate: {_in_words(self.rule, list(map(str, self.conditions)))}"

    def __repr__(self) -> str:
        return f"<Gate: {self}>"

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write one .safetensors file, whole or not at all."""
        model = None if self.model is None else asdict(self.model)
        about = {"gate": self.as_json(), "model": model, "contrast": self.contrast}
        return write_gate(about, self.tensors, Path(path), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Gate:
        """Read and check a file that `save` wrote."""
        document, tensors = read_gate(Path(path))
        found = cls.of_file(document.gate, tensors, shown(path, 200))
        return replace(found, model=document.model, contrast=document.contrast)

    @classmethod
    def of_file(cls, document: GateDocument, tensors: Mapping[str, Tensor], source: str) -> Gate:
        """From what a file says of it and its `tensors`, after every check."""
        wanted = set(map(str, range(len(document.conditions))))
        if wanted != set(tensors):
            odd = min(wanted ^ set(tensors))
            raise TrimtabError(
                f"{source}: its gate has {len(wanted)} conditions, and tensor '{shown(odd, 40)}' "
                f"is {'missing' if odd in wanted else 'none of them'}"
            )
        try:
            conditions = tuple(
                Condition(
                    each.site,
                    tensors[str(i)],
                    each.threshold,
                    each.fires,
                    each.score,
                    each.bias,
                    Scope.parse(each.reads),
                    each.name,
                )
                for i, each in enumerate(document.conditions)
            )
            return cls(conditions, document.kind, document.rule, findings=document.findings)
        except TrimtabError as error:
            raise TrimtabError(f"{source}, its gate: {error}") from error

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The directions of its conditions, by number, for files."""
        return {str(i): each.direction.float() for i, each in enumerate(self.conditions)}

    @property
    def digest(self) -> str:
        """SHA-256 of what it decides: its rule, its conditions and their directions."""
        about = {**self.as_json(), "findings": {}}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name in sorted(self.tensors):
            digest.update(self.tensors[name].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def as_json(self) -> dict[str, Any]:
        """All that it is but its directions, for files and for `inspect --json`."""
        return {
            "kind": self.kind,
            "rule": self.rule,
            "conditions": [
                {
                    "site": each.site,
                    "score": each.score,
                    "fires": each.fires,
                    "threshold": each.threshold,
                    "bias": each.bias,
                    "reads": str(each.reads),
                    "name": each.name,
                }
                for each in self.conditions
            ],
            "findings": self.findings,
        }


def _length(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()


def reads_below(site: str, interventions: Sequence[Intervention]) -> bool:
    """Whether what is read at a site is read before anything is steered, or where it is."""
    return all(site_order(site) <= site_order(each.site) for each in interventions)


def check_gate(gate: Gate, interventions: Sequence[Intervention]) -> None:
    """Refuse a gate that could not decide before what it steers, or that would see what it did."""
    if gate.kind == "two-pass":
        return
    for condition in gate.conditions:
        if not reads_below(condition.site, interventions):
            lowest = min((each.site for each in interventions), key=site_order)
            raise TrimtabError(
                f"a {gate.kind} gate reads below what it steers: its condition at "
                f"{condition.site} is above {lowest}; make it two-pass, or fit it at a lower site"
            )
    for intervention in interventions if gate.kind == "latched" else ():
        scope = intervention.scope
        if scope.holds(Situation("prompt"), Situation("prompt", "image")) is not False:
            raise TrimtabError(
                "a latched gate decides at the prompt's last token, and this steering acts on "
                f"earlier ones (scope '{scope}'): scope it to 'last' or 'generated', or make the "
                "gate two-pass"
            )


def _check_reads(reads: Scope) -> None:
    """Refuse scopes whose tokens are others once the text goes on."""
    if reads == READS_LAST:
        return
    moving = ("prompt", "generated", "last", "last_user", "answer")
    for part in parts_of(reads.part):
        if isinstance(part, Word) and part.name in moving:
            raise TrimtabError(
                f"a condition cannot read '{reads}': it reads tokens of the prompt in any case, "
                "and which of them must not depend on where the prompt ends; take 'last' alone, "
                "'all[1:]', 'user', token(...), between(...)"
            )
        if isinstance(part, Window) and min(part.first or 0, part.stop or 0) < 0:
            raise TrimtabError(f"a condition cannot read '{reads}', which counts from the end")
    if reads.decay is not None or reads.holds(Situation("prompt"), Situation("end")) is False:
        raise TrimtabError(f"a condition cannot read '{reads}': it is no plain scope of a prompt")


def _checked(rule: Any, conditions: int, depth: int = 0) -> Logic:
    """A rule in its own form, after every check."""
    if isinstance(rule, int) and not isinstance(rule, bool) and 0 <= rule < conditions:
        return rule
    if isinstance(rule, list | tuple) and depth < _DEEPEST and rule:
        word, *parts = rule
        if (word == "not" and len(parts) == 1) or (word in ("and", "or") and len(parts) > 1):
            return (word, *(_checked(part, conditions, depth + 1) for part in parts))
    raise TrimtabError(
        f"{shown(rule, 60)} is no rule of a gate of {conditions} conditions: write a number, "
        "('and', a, b), ('or', a, b) or ('not', a)"
    )


def _moved(rule: Logic, by: int) -> Logic:
    """The rule of conditions that come after some others."""
    if isinstance(rule, int):
        return rule + by
    return (rule[0], *(_moved(part, by) for part in rule[1:]))


def _together(rule: Logic, holds: Sequence[Tensor]) -> Tensor:
    if isinstance(rule, int):
        return holds[rule]
    parts = [_together(part, holds) for part in rule[1:]]
    if rule[0] == "not":
        return ~parts[0]
    found = parts[0]
    for part in parts[1:]:
        found = found & part if rule[0] == "and" else found | part
    return found


def _in_words(rule: Logic, conditions: Sequence[str], inside: bool = False) -> str:
    if isinstance(rule, int):
        return conditions[rule] if len(conditions) == 1 else f"({conditions[rule]})"
    parts = [_in_words(part, conditions, True) for part in rule[1:]]
    if rule[0] == "not":
        return f"not {parts[0]}"
    said = f" {rule[0]} ".join(parts)
    return f"({said})" if inside else said
