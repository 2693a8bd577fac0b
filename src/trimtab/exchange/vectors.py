"""Vectors that are added at sites: what other tools know of steering, on the way out and in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from trimtab.anatomy import KINDS, parse_site
from trimtab.errors import TrimtabError, shown
from trimtab.exchange.containers import Container
from trimtab.exchange.request import Request
from trimtab.model import LanguageModel
from trimtab.steering import Add, Intervention, Operator, Steering

T = TypeVar("T")

#: The way that works for whatever is linear.
_BAKES = "trimtab bake folds it into the weights"
#: Before the first block, where blocks are numbered from 0 by what they put out.
BEFORE = -1


# -- out ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Added:
    """A vector [units], and what it is multiplied by where it is added to a site."""

    site: str
    vector: Tensor
    coefficient: float

    @property
    def folded(self) -> Tensor:
        """What is added."""
        return self.coefficient * self.vector


@dataclass(frozen=True)
class Fitting:
    """What a format carries, and what it does not, each with the reason."""

    added: list[Added]
    left_out: tuple[str, ...] = ()


#: Why a format cannot carry a vector, None where it can.
Refusal = Callable[[Added], str | None]


def everywhere(request: Request, what: str, refusal: Refusal) -> Fitting:
    """The vectors that the steerings add to every token, one for each site. What the format (called
    `what`) cannot carry is refused, or left out where the part that fits is asked for."""
    reasons: list[str] = []
    sites: dict[str, list[Added]] = {}
    for steering in request.steerings:
        for each in steering.interventions:
            coefficient = each.dial_at(steering.setting)
            if not each.acts or each.idle_at(steering.setting):
                continue
            reason = _not_everywhere(steering, each, what)
            if reason is not None:
                reasons.append(f"{each.site}: {reason}")
                continue
            vector = each.operator.added
            assert vector is not None
            sites.setdefault(each.site, []).append(Added(each.site, vector.float(), coefficient))
    together = [_sum(several) for several in sites.values()]
    for one in together:
        if not torch.isfinite(one.folded).all():
            raise TrimtabError(f"{one.site}: what is added at this dial is beyond float32")
    refused = {one.site: refusal(one) for one in together}
    reasons += [f"{site}: {reason}" for site, reason in refused.items() if reason is not None]
    fitting = [one for one in together if refused[one.site] is None]
    if reasons and not request.split:
        more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        remedy = " (--split writes the rest)" if fitting else ""
        raise TrimtabError(f"{reasons[0]}{more}{remedy}")
    if not fitting:
        why = f" ({reasons[0]})" if reasons else ": at this dial the steering does nothing"
        raise TrimtabError(f"nothing is left to write into {what}{why}")
    return Fitting(fitting, tuple(reasons))


def _not_everywhere(steering: Steering, intervention: Intervention, what: str) -> str | None:
    """Why an intervention is no vector that is added to every token of every text."""
    operator = intervention.operator
    if steering.gate is not None:
        return f"it acts under a gate, and {what} acts on every text; take the gate away"
    if operator.added is None:
        return f"{operator.description} adds no vector, and {what} has only those; {_way(operator)}"
    if str(intervention.scope) != "all":
        return (
            f"it acts on '{intervention.scope}', and {what} acts on every token; "
            "steering.scoped('all') acts on all"
        )
    return None


def _way(operator: Operator) -> str:
    """How such an operator gets into another program."""
    if operator.linear:
        return _BAKES
    return "it acts where trimtab attaches it"


def _sum(several: Sequence[Added]) -> Added:
    if len(several) == 1:
        return several[0]
    total = torch.stack([one.folded.double() for one in several]).sum(0)
    return Added(several[0].site, total.float(), 1.0)


def in_stream(
    request: Request, what: str, first: int = 0, last: int | None = None
) -> tuple[dict[int, Added], tuple[str, ...]]:
    """The vectors as they are added to the residual stream, by the block after which they are
    (BEFORE: before the first one), where a format knows blocks `first` to `last`; and what is left
    out. What is added just before a block ends, and read by nothing in it, is added after it."""
    lm = request.language_model
    last = lm.anatomy.layers - 1 if last is None else last

    def refusal(added: Added) -> str | None:
        placed = _in_stream(lm, added)
        if placed is None:
            return f"{what} adds to the outputs of blocks (resid) only; {_BAKES}"
        if first <= placed[0] <= last:
            return None
        where = "before the first block" if placed[0] == BEFORE else f"after block {placed[0]}"
        return f"{what} can add nothing {where}; {_BAKES}"

    fitting = everywhere(request, what, refusal)
    found: dict[int, list[Added]] = {}
    for one in fitting.added:
        placed = _in_stream(lm, one)
        assert placed is not None
        block, factor = placed
        coefficient = one.coefficient * factor
        found.setdefault(block, []).append(Added(one.site, one.vector, coefficient))
    return {block: _sum(found[block]) for block in sorted(found)}, fitting.left_out


def _in_stream(language_model: LanguageModel, added: Added) -> tuple[int, float] | None:
    """After which block a vector reaches the residual stream, and with what factor; None where
    something else reads it before."""
    layer, kind = parse_site(added.site)
    if kind == "embed":
        return BEFORE, 1.0
    if layer is None:
        return None
    if kind == "resid":
        return layer, 1.0
    last = language_model.anatomy.added_to_resid(layer)
    return (layer, last[1]) if last is not None and last[0] == added.site else None


def one_coefficient(added: Mapping[int, Added]) -> tuple[float, dict[int, Tensor]]:
    """A number, and vectors that it multiplies: the vectors as they are where all have one
    coefficient, else with theirs in them and 1."""
    coefficients = {one.coefficient for one in added.values()}
    if len(coefficients) == 1:
        return coefficients.pop(), {block: one.vector for block, one in added.items()}
    return 1.0, {block: one.folded for block, one in added.items()}


# -- in -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a file holds, as a steering has it: where its dial stands, and what the file says of
    itself."""

    interventions: tuple[Intervention, ...]
    default: float = 1.0
    #: Whether the dial is a share, which ends at 1.
    share: bool = False
    says: dict[str, str] = field(default_factory=dict)


def adds(
    vectors: Mapping[str, tuple[Tensor, float]], says: Mapping[str, str] | None = None
) -> Found:
    """Of vectors with their coefficients by site. One coefficient for all is where the dial stands;
    several are weights, and the dial stands on 1."""
    coefficients = {coefficient for _, coefficient in vectors.values()}
    alike = len(coefficients) == 1
    interventions = tuple(
        Intervention(site, Add(vector), weight=1.0 if alike else coefficient)
        for site, (vector, coefficient) in vectors.items()
    )
    default = coefficients.pop() if alike else 1.0
    return Found(interventions, default, says=dict(says or {}))


def after_block(block: int) -> str:
    """The site of what a block puts out; of what the first one receives for BEFORE."""
    return "embed" if block == BEFORE else f"layers.{block}.resid"


def chosen(
    container: Container, there: Mapping[str, T], wanted: Sequence[str], *, together: bool
) -> dict[str, T]:
    """Of what a file has by site, what is to act: the sites and kinds of sites that are wanted;
    where none are, all if the tool that wrote the file uses them `together`, or the only one."""
    if not there:
        raise container.refused("it has no vector but zeros")
    if not wanted:
        if together or len(there) == 1:
            return dict(there)
        raise container.refused(
            f"it has vectors for {len(there)} sites, {_named(there)}, of which its users choose: "
            "name those that are to act, as in --site layers.12.resid, or --site resid for all"
        )
    found: dict[str, T] = {}
    for name in wanted:
        if name in KINDS and name not in there:
            of_kind = {site: one for site, one in there.items() if parse_site(site)[1] == name}
        else:
            parse_site(name)
            of_kind = {name: there[name]} if name in there else {}
        if not of_kind:
            raise container.refused(f"it has nothing for {shown(name, 40)}: {_named(there)}")
        found |= of_kind
    return found


def _named(sites: Mapping[str, object]) -> str:
    names = list(sites)
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"
