"""The direction of a steering at a site, as the condition of a gate: what a probe reads, or the
vector that is added, taken out, held within bounds or turned towards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.errors import TrimtabError, shown
from trimtab.steering.gate_document import GateSide
from trimtab.steering.gates import READS_LAST, Condition
from trimtab.steering.operators import Ablate, Affine, Clamp, Operator

if TYPE_CHECKING:
    from trimtab.steering.artifact import Steering


def condition_of(
    steering: Steering, site: str | None, threshold: float, fires: GateSide
) -> Condition:
    """See `Steering.condition`."""
    readers, written = _readers(steering), _written(steering)
    where = _site(steering, readers or written) if site is None else site
    if where in readers:
        vector, bias = readers[where]
        return Condition(where, vector, threshold, fires, "probe", bias, READS_LAST)
    found = written.get(where, _shared(written))
    if found is None:
        raise TrimtabError(
            f"this {shown(steering.method)} steering has no direction at {shown(where, 60)}: "
            f"{_known(readers or written)}"
        )
    return Condition(where, found, threshold, fires, "projection", reads=READS_LAST)


def _readers(steering: Steering) -> dict[str, tuple[Tensor, float]]:
    """The readers of a probe with their biases, by site."""
    tables, found = steering.tables, {}
    for name, vector in tables.items():
        kind, _, site = name.partition(".")
        if kind == "reader" and f"bias.{site}" in tables:
            found[site] = vector, float(tables[f"bias.{site}"])
    return found


def _written(steering: Steering) -> dict[str, Tensor]:
    """The vectors that it is about, by site."""
    found = ((each.site, _vector(each.operator)) for each in steering.interventions)
    return {site: vector for site, vector in found if vector is not None}


def _vector(operator: Operator) -> Tensor | None:
    """The one vector that an operator is about, [units]; None where it has none, or several."""
    if isinstance(operator, Ablate):
        return operator.direction if operator.direction.dim() == 1 else None
    if isinstance(operator, Clamp):
        return operator.direction
    if isinstance(operator, Affine) and operator.added is None:
        return operator.u[:, 0] if operator.u.shape[1] == 1 else None
    if operator.plane is not None:
        return operator.plane[0]
    return operator.added


def _shared(vectors: Mapping[str, Tensor]) -> Tensor | None:
    """The vector that is the same at all sites, where it is: an ablation's, which it read at yet
    another one."""
    several = list(vectors.values())
    alike = len(several) > 1 and all(each.equal(several[0]) for each in several)
    return several[0] if alike else None


def _site(steering: Steering, vectors: Mapping[str, Any]) -> str:
    """The site that a steering is about: the only one, or that which its method chose or read."""
    if len(vectors) == 1:
        return next(iter(vectors))
    named = steering.findings.get("site", steering.findings.get("source_site"))
    if vectors and isinstance(named, str):
        return named
    raise TrimtabError(
        f"this {shown(steering.method)} steering does not say which direction is meant: "
        f"{_known(vectors)}"
    )


def _known(vectors: Mapping[str, Any]) -> str:
    if not vectors:
        return "it has none, so take one that adds a vector, takes it out or bounds it, or a probe"
    return f"name a site, one of {shown(', '.join(vectors), 300)}"
