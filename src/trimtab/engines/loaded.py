"""A steering as a worker of an engine holds it: operators by site, of one rank of several.

What an engine carries is decided here: every operator at every site that is a module's input or
output of its own. What it does not carry is refused when it is loaded, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from trimtab.anatomy import parse_site
from trimtab.errors import TrimtabError
from trimtab.steering import Add, Intervention, Operator, Scale, Shift, Steering

#: Kinds of sites that an engine has no place of its own for, and why.
_NOWHERE = {
    "attn_norm_in": "an engine adds the stream and norms it in one step",
    "ffn_norm_in": "an engine adds the stream and norms it in one step",
    "router": "an engine chooses experts in a kernel of its own",
}
#: Sites that tensor parallelism splits: each rank has some of the units.
SPLIT = ("heads", "ffn_in")


@dataclass(frozen=True, eq=False)
class Step:
    """An operator at a site: on the tokens of which of the steering's scopes, and at how many times
    its dial."""

    site: str
    operator: Operator
    scope: int
    weight: float


def why_not(steering: Steering) -> str:
    """Why an engine cannot carry a steering; "" where it can."""
    if steering.gate is not None:
        return f"it has a gate ({steering.gate.kind}), which no engine but transformers decides"
    for intervention in steering.interventions:
        kind = parse_site(intervention.site)[1]
        if kind in _NOWHERE:
            return f"it acts at {intervention.site}, and {_NOWHERE[kind]}"
    return ""


def steps_of(steering: Steering, rank: int = 0, ranks: int = 1) -> tuple[Step, ...]:
    """What a steering does, in order, on one of the ranks that split the model's units."""
    if reason := why_not(steering):
        raise TrimtabError(f"this {steering.method} steering cannot be carried: {reason}")
    scopes = list(steering.scopes)
    return tuple(
        Step(
            each.site,
            _on_rank(each, rank, ranks),
            scopes.index(each.scope),
            each.weight,
        )
        for each in steering.interventions
        if each.acts
    )


def sites_of(steerings: Collection[Steering]) -> list[str]:
    """The sites that steerings change, sorted."""
    return sorted({each.site for one in steerings for each in one.interventions})


def _on_rank(intervention: Intervention, rank: int, ranks: int) -> Operator:
    """What an operator does to the units that one rank has."""
    operator: Any = intervention.operator
    if ranks == 1 or parse_site(intervention.site)[1] not in SPLIT:
        return intervention.operator
    width = operator.width // ranks
    first, stop = rank * width, (rank + 1) * width
    if isinstance(operator, Add) and operator.linear:
        return replace(operator, vector=operator.vector[first:stop].contiguous())
    if isinstance(operator, Scale | Shift):
        own = (operator.units >= first) & (operator.units < stop)
        changed: dict[str, Any] = {"units": operator.units[own] - first, "width": width}
        for name in ("gain", "slope", "shift", "low", "high"):
            if getattr(operator, name, None) is not None:
                changed[name] = getattr(operator, name)[own]
        return replace(operator, **changed)
    raise TrimtabError(
        f"{operator.description} at {intervention.site} needs all units of the site, which "
        f"{ranks} ranks share: steer attn_out or ffn_out, or use one rank"
    )
