"""A steering as a worker of an engine holds it: operators by site, of one rank of several.

An engine carries every operator. What it does not carry, a gate, and operators that need all units
of a site that ranks share, is refused before it is loaded, with the reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.anatomy import parse_site
from trimtab.engines.asking import Wanted
from trimtab.engines.tokens import Acts
from trimtab.errors import TrimtabError
from trimtab.steering import Add, Intervention, Operator, Scale, Scope, Shift, Steering

#: Sites that tensor parallelism splits: each rank has some of the units.
SPLIT = ("heads", "ffn_in")


@dataclass(frozen=True, eq=False)
class Step:
    """An intervention: which of the steering's it is, and at how many times its dial."""

    number: int
    site: str
    operator: Operator
    weight: float


def why_not(steering: Steering) -> str:
    """Why no engine carries a steering, at whatever sites; "" where there is no reason."""
    if steering.gate is not None:
        return f"it has a gate ({steering.gate.kind}), which no engine but transformers decides"
    return ""


def steps_of(steering: Steering, rank: int = 0, ranks: int = 1) -> tuple[Step, ...]:
    """What a steering does, in order, on one of the ranks that split the model's units."""
    if reason := why_not(steering):
        raise TrimtabError(f"this {steering.method} steering cannot be carried: {reason}")
    return tuple(
        Step(number, each.site, _on_rank(each, rank, ranks), each.weight)
        for number, each in enumerate(steering.interventions)
        if each.acts
    )


def wanted_of(steering: Steering, acts_of: Callable[[Scope], Acts]) -> Wanted:
    """How a request asks for a steering at its dial, on the tokens of its scopes, which `acts_of`
    puts into the model's tokens."""
    scopes = list(steering.scopes)
    of = [scopes.index(each.scope) for each in steering.interventions]
    several = tuple(of) if len(scopes) > 1 else ()
    return Wanted(bare(steering).digest, steering.setting, tuple(map(acts_of, scopes)), several)


def bare(steering: Steering) -> Steering:
    """What an engine holds of a steering: what it does, whatever its tokens, which requests say."""
    return steering.scoped("all")


def content_of(steering: Steering) -> bytes:
    """The file of what an engine holds of a steering."""
    with tempfile.TemporaryDirectory() as folder:
        return bare(steering).save(Path(folder) / "steering.safetensors").read_bytes()


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
