"""Which of a model's linear maps steerings change, by a matrix of low rank each, and exactly.

What reads a site takes an operator on its columns, what writes it on its rows. Constants and all
that is not a change of linear maps stay behind, each with the reason and with what does work. At
one site order counts: a map changes what it writes before, and what it reads after, whatever else
acts there. So of interventions that meet at a site only the first ones of those that are written,
and only the last ones of those that are read, can be taken without the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Any

from torch import Tensor, nn

from trimtab.anatomy import Anatomy, LinearMap, parse_site, site_order
from trimtab.exchange.low_rank import Change, between, change_of, composed, of_each_expert
from trimtab.model import Fold
from trimtab.steering import Intervention, Steering

#: The kinds of site that a linear map writes; the others are read.
_WRITTEN = ("attn_out", "ffn_out", "router")


@dataclass(frozen=True)
class ChangedMap:
    """A linear map whose weight [..., out, in] gets up [..., out, rank] down [..., rank, in]
    added, both float64."""

    linear_map: LinearMap
    down: Tensor
    up: Tensor
    #: How many operators meet here.
    meeting: int

    @property
    def rank(self) -> int:
        return int(self.up.shape[-1])

    def apply(self, scale: float) -> None:
        """Write the weight with so many times the change."""
        weight = self.linear_map.read()
        changed = weight.double() + scale * (self.up @ self.down)
        self.linear_map.write(nn.Parameter(changed.to(weight.dtype)))


@dataclass(frozen=True)
class Left:
    """An intervention that no change of low rank carries, and why."""

    steering: int
    intervention: Intervention
    reason: str
    remedy: str

    def __str__(self) -> str:
        name, site = type(self.intervention.operator).__name__, self.intervention.site
        return f"{name} at {site}: {self.reason}; {self.remedy}"


@dataclass(frozen=True)
class _Acting:
    """An intervention of a steering that does something at its dial."""

    steering: int
    intervention: Intervention
    dial: float

    @property
    def fold(self) -> Fold:
        operator: Any = self.intervention.operator
        return Fold(self.intervention.site, operator, self.dial)


def left_out(anatomy: Anatomy, steerings: Sequence[Steering]) -> list[Left]:
    """The interventions that cannot be taken, in the order in which they act."""
    left: list[Left] = []
    for site, meeting in groupby(_acting(steerings), key=lambda acting: acting.intervention.site):
        chain = list(meeting)
        written = parse_site(site)[1] in _WRITTEN
        if not written:
            chain.reverse()
        reasons = [_why_not(anatomy, acting) for acting in chain]
        taken = len(list(takewhile(lambda reason: reason is None, reasons)))
        blocking = type(chain[taken].intervention.operator).__name__ if taken < len(chain) else ""
        when = "after" if written else "before"
        kept = (f"it acts {when} {blocking} at the same site, which is left out", _ATTACH)
        here = [
            Left(acting.steering, acting.intervention, *(reason or kept))
            for acting, reason in zip(chain[taken:], reasons[taken:], strict=True)
        ]
        left += here if written else reversed(here)
    return left


def without(steerings: Sequence[Steering], left: Sequence[Left]) -> list[Steering]:
    """The steerings without what is left out, and without those of which nothing is there."""
    gone = {(each.steering, id(each.intervention)) for each in left}
    kept = [
        replace(
            steering,
            interventions=tuple(
                each for each in steering.interventions if (number, id(each)) not in gone
            ),
        )
        for number, steering in enumerate(steerings)
    ]
    return [steering for steering in kept if steering.interventions]


def only(steerings: Sequence[Steering], left: Sequence[Left]) -> list[Steering]:
    """The steerings with nothing but what is left out."""
    kept = [
        replace(
            steering,
            interventions=tuple(each.intervention for each in left if each.steering == number),
        )
        for number, steering in enumerate(steerings)
    ]
    return [steering for steering in kept if steering.interventions]


def changed_maps(anatomy: Anatomy, steerings: Sequence[Steering]) -> list[ChangedMap]:
    """The linear maps that the steerings change; nothing of them may have to be left out."""
    read: dict[LinearMap, list[Change]] = {}
    written: dict[LinearMap, list[Change]] = {}
    for acting in _acting(steerings):
        fold = acting.fold
        is_written = parse_site(fold.site)[1] in _WRITTEN
        for linear_map in maps_at(anatomy, fold.site):
            change = _at(linear_map, fold)
            if change.left.any():
                side = written if is_written else read
                # One map by one name, whichever way it is looked at.
                plain = replace(linear_map, joint=False, bias=None, constant=True)
                side.setdefault(plain, []).append(change)
    return [
        ChangedMap(
            linear_map,
            *between(
                linear_map.read(),
                composed(read.get(linear_map, [])),
                composed(written.get(linear_map, [])),
            ),
            meeting=len(read.get(linear_map, [])) + len(written.get(linear_map, [])),
        )
        for linear_map in dict.fromkeys([*read, *written])
    ]


def _acting(steerings: Sequence[Steering]) -> list[_Acting]:
    """What acts, in its order: sites as a pass reaches them, at one site as it was given."""
    acting = [
        _Acting(number, intervention, intervention.dial_at(steering.setting))
        for number, steering in enumerate(steerings)
        for intervention in steering.interventions
        if not intervention.idle_at(steering.setting)
    ]
    return sorted(acting, key=lambda each: site_order(each.intervention.site))


def maps_at(anatomy: Anatomy, site: str) -> list[LinearMap]:
    """The linear maps that a change at a site is a change of."""
    written = parse_site(site)[1] in _WRITTEN
    return anatomy.writers(site) if written else anatomy.readers(site)


def _at(linear_map: LinearMap, fold: Fold) -> Change:
    """The change of what one of a site's maps reads or writes."""
    if linear_map.joint:
        factors = fold.factors
        assert factors is not None  # or it would have been left out
        return of_each_expert(factors, len(replace(linear_map, joint=False).read()))
    change = change_of(fold)
    assert change is not None
    return change


# -- what cannot be taken ----------------------------------------------------------------------

_ATTACH = "attach it"
_BAKE = "bake it, or attach it"
_ADDED = "bake it where there is room for a bias, or attach it"
_ADDED_TO_STREAM = "bake it, write it as a control vector, or attach it"


def _why_not(anatomy: Anatomy, acting: _Acting) -> tuple[str, str] | None:
    """Why no change of linear maps does what an intervention does, and what does; or None."""
    intervention, site = acting.intervention, acting.intervention.site
    operator: Any = intervention.operator
    if not intervention.scope.everywhere:
        return (
            f"it acts on the scope '{intervention.scope}', and weights act on all tokens alike",
            "attach it, or give it the scope all (--scope all)",
        )
    if not operator.linear:
        return f"{operator.description} is not linear in the activation", _ATTACH
    fold = acting.fold
    if operator.added is not None and site.endswith(".resid"):
        return _CONSTANT, _ADDED_TO_STREAM
    no_place = _no_place(anatomy, fold)
    if no_place is not None:
        return no_place
    return (_CONSTANT, _ADDED) if fold.shifts else _no_rank(anatomy, fold)


_CONSTANT = "it adds a constant, and an adapter has none"


def _no_place(anatomy: Anatomy, fold: Fold) -> tuple[str, str] | None:
    """Why what happens at a site is nothing that linear maps do."""
    _, kind = parse_site(fold.site)
    if kind == "resid" or kind.endswith("_norm_in"):
        where = "fit it at ffn_out, or attach it" if kind == "resid" else _ATTACH
        return "the norms that read it divide by its length, so that no weights do it", where
    if kind == "embed":
        remedy = _BAKE if anatomy.tables else _ATTACH
        return "a table is looked up there, and few programs read adapters of one", remedy
    if kind.endswith("_post_norm"):
        in_gain = fold.factors is not None and not fold.shifts
        return "a norm writes it, and no linear map stands behind it", _BAKE if in_gain else _ATTACH
    if kind == "final_norm" and _is_tied(anatomy):
        return "what reads it is the embedding table, which would change with it", _BAKE
    if not maps_at(anatomy, fold.site):
        does = "writes" if kind in _WRITTEN else "reads"
        return f"more than linear maps that are known {does} it in {anatomy.name}", _ATTACH
    return None


def _no_rank(anatomy: Anatomy, fold: Fold) -> tuple[str, str] | None:
    """Why what an operator does at a site is no change of low rank of its maps."""
    maps = maps_at(anatomy, fold.site)
    if any(each.stacked for each in maps):
        return "weights of experts lie one below the other, which adapters do not know", _BAKE
    if any(each.joint for each in maps) and fold.factors is None:
        return "the router weighs each expert's part of it anew for each token", _ATTACH
    change = change_of(fold)
    if change is None:
        return "of what rank its change is, is not known", _BAKE
    if parse_site(fold.site)[1] in _WRITTEN and any(_moves_bias(each, change) for each in maps):
        return "what writes it has a bias along the change, which no adapter changes", _BAKE
    return None


def _moves_bias(linear_map: LinearMap, change: Change) -> bool:
    """Whether more than rounding of a map's bias would have to change with its weight."""
    bias = getattr(linear_map.owner, linear_map.bias, None) if linear_map.bias else None
    if bias is None:
        return False
    columns = bias.detach().double().cpu()[..., None]
    moved = change(columns) - columns
    return bool(moved.abs().max() > 1e-7 * columns.abs().max())


def _is_tied(anatomy: Anatomy) -> bool:
    model: Any = anatomy.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return getattr(table, "weight", None) is getattr(head, "weight", None)
