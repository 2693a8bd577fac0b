"""A steering as a worker of an engine holds it: operators by site, of one rank of several.

An engine carries every operator, and gates that decide token by token; other gates are decided
before a steering is asked for. What needs all units of a site that ranks share is refused before it
is loaded, with the reason.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.anatomy import parse_site
from trimtab.engines.asking import Wanted
from trimtab.engines.forms import packed
from trimtab.engines.tokens import Acts
from trimtab.errors import TrimtabError
from trimtab.steering import Add, Gate, Intervention, Operator, Scale, Scope, Shift, Steering

#: What an engine is asked for that does more than is captured in full graphs.
IN_GRAPHS = (
    "that is not carried inside of full CUDA graphs: start vLLM with "
    'compilation_config={"cudagraph_mode": "PIECEWISE"}'
)
#: So many interventions of a steering may be at a site there.
MOST_AT_A_SITE = 2
#: Sites that tensor parallelism splits: each rank has some of the units.
SPLIT = ("heads", "ffn_in")


@dataclass(frozen=True, eq=False)
class Step:
    """An intervention: which of the steering's it is, at how many times its dial, and the gate that
    decides at which tokens."""

    number: int
    site: str
    operator: Operator
    weight: float
    gate: Gate | None = None


def why_not(steering: Steering, ranks: int = 1, stages: int = 1) -> str:
    """Why no engine decides a steering's gate, whose units so many ranks split, and whose blocks
    lie on so many stages; "" where there is no reason."""
    gate = steering.gate
    if gate is None or gate.kind != "token":
        return ""
    if stages > 1:
        return "its gate decides token by token, and may read on another stage than it steers on"
    split = [site for site in gate.sites if parse_site(site)[1] in SPLIT]
    if ranks > 1 and split:
        return f"its gate reads all units of {split[0]} at each token, which {ranks} ranks share"
    return ""


def not_captured(steering: Steering) -> str:
    """Why a steering does not act inside of full CUDA graphs, which hold the bank's kernel and
    nothing of Python; "" where it does."""
    gate, at = steering.gate, Counter(each.site for each in steering.interventions if each.acts)
    odd = [each for each in steering.interventions if packed(each.operator) is None]
    if gate is not None:
        why = f"its {gate.kind} gate"
    elif odd:
        why = f"{odd[0].operator.description} at {odd[0].site}"
    elif len(steering.scopes) > 1:
        why = "interventions with scopes of their own"
    elif at and max(at.values()) > MOST_AT_A_SITE:
        why = f"more than {MOST_AT_A_SITE} interventions at one site"
    else:
        return ""
    return f"{why}: {IN_GRAPHS}"


def steps_of(steering: Steering, rank: int = 0, ranks: int = 1) -> tuple[Step, ...]:
    """What a steering does, in order, on one of the ranks that split the model's units."""
    gate = steering.gate
    if gate is not None and gate.kind != "token":
        raise TrimtabError(f"a {gate.kind} gate is decided before its steering is loaded")
    if reason := why_not(steering, ranks):
        raise TrimtabError(f"this {steering.method} steering cannot be carried: {reason}")
    return tuple(
        Step(number, each.site, _on_rank(each, rank, ranks), each.weight, gate)
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
    """The sites that steerings change, or whose gates read, sorted."""
    return sorted({site for one in steerings for site in one.sites})


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
