"""Singular directions of a weight matrix as units: what lies along one is scaled, for

    x <- x + gamma_j v_j v_j'x,    e_j = sum over tokens of (v_j'x)(v_j'dm/dx)

is the effect of that on m = log p(positive) - log p(negative), as x_i dm/dx_i is that of a single
unit. At `heads` and `ffn_in` the v_j are the right singular vectors of the map that reads the site
(what attention's output projection and the FFN's down projection tell apart), at `attn_out` and
`ffn_out` the left ones of the map that writes it. They are numbered from the largest singular value
down; which way one points does not matter. Several of a site make one affine map of low rank, which
bakes where scaling does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, parse_site
from trimtab.errors import TrimtabError
from trimtab.fitting import Effect, Statistics, Want, unit_costs
from trimtab.methods.effects import Scoring, predicted_cost
from trimtab.methods.first_order import scaled_scores, scaled_wants
from trimtab.methods.ranking import Scores, places
from trimtab.model import LanguageModel
from trimtab.steering import Affine, Intervention, Positions, Scope
from trimtab.terminal import progress


@dataclass(frozen=True)
class Directions:
    """Reads the effects of scaling what lies along each column of `vectors` [units, directions];
    `name` tells them from others."""

    name: str
    vectors: Tensor = field(compare=False, repr=False)

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    def __call__(self, activation: Tensor, gradient: Tensor) -> Tensor:
        vectors = self.vectors.to(activation)
        return (activation @ vectors) * (gradient @ vectors)


def singular_directions(anatomy: Anatomy, sites: Sequence[str]) -> dict[str, Directions]:
    """Those of each site's weight matrix; refused where there is not one."""
    found = {}
    with progress("taking weights apart", len(sites)) as advance:
        for site in sites:
            weight = _weight(anatomy, site)
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            left, _, right = torch.linalg.svd(wide, full_matrices=False)
            vectors = right.T if _is_read(site) else left
            vectors = vectors.cpu().contiguous()
            digest = hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:12]
            found[site] = Directions(f"svd{digest}", vectors)
            advance(1)
    return found


def _is_read(site: str) -> bool:
    """Whether the matrix at a site reads it, or else writes it."""
    return parse_site(site)[1] in ("heads", "ffn_in")


def _weight(anatomy: Anatomy, site: str) -> Tensor:
    """The weight matrix at a site, [out, in]."""
    maps = anatomy.readers(site) if _is_read(site) else anatomy.writers(site)
    weight = maps[0].read() if len(maps) == 1 and not maps[0].joint else None
    if weight is None or weight.dim() != 2:
        raise TrimtabError(
            f"{anatomy.name} has no single weight matrix at {site} (experts have one each): take "
            "basis units there, or another site"
        )
    if not weight.is_floating_point() or weight.is_meta:
        raise TrimtabError(
            f"the weights at {site} of {anatomy.name} are quantised, or are not in memory, and "
            "cannot be taken apart: load it in float, or take basis units"
        )
    return weight


def direction_wants(anatomy: Anatomy, sites: Sequence[str], effect: Effect) -> list[Want]:
    """What a pass gathers for the effects of scaling along singular directions."""
    return scaled_wants(singular_directions(anatomy, sites), effect)


@dataclass(frozen=True)
class Along:
    """What is known of the singular directions of some sites."""

    reads: Mapping[str, Directions]
    found: Scores

    def interventions(self, picked: Tensor, positions: Positions) -> list[Intervention]:
        """What scales along the directions that were picked."""
        made = []
        for site, gains in self._gains(picked).items():
            units = gains.nonzero().flatten()
            v = self.reads[site].vectors[:, units].float()
            operator = Affine((v * gains[units].float()).contiguous(), v.contiguous())
            made.append(Intervention(site, operator, Scope.of(positions)))
        return made

    def tables(self, anatomy: Anatomy, picked: Tensor) -> dict[str, Tensor]:
        """The directions in rank order; `unit` is a direction's number at its site."""
        site_of, unit_of = places(self._widths, picked)
        layers = torch.tensor([anatomy.check(site)[0] for site in self.reads])
        columns = {name: column[picked].float() for name, column in self.found.columns.items()}
        return {"layer": layers[site_of], "unit": unit_of, **columns}

    def predicted(self, picked: Tensor) -> dict[str, float]:
        """What the steering gains at a dial of 1 in nats per pair, and costs there in nats per
        token of plain text."""
        gains = self._gains(picked)
        costs = dict(zip(self.reads, self.found.costs, strict=True))
        gained = self.found.columns["gain"][picked] * self.found.columns["effect"][picked]
        cost = predicted_cost([costs[site] for site in gains], list(gains.values()))
        return {"gain": float(gained.sum()), **cost}

    def _gains(self, picked: Tensor) -> dict[str, Tensor]:
        """gamma of every direction at a dial of 1, 0 of those that were not picked, of the sites
        that have one; [directions] in float64."""
        gain = self.found.columns["gain"]
        every = torch.zeros_like(gain).index_copy(0, picked, gain[picked]).split(self._widths)
        return {site: own for site, own in zip(self.reads, every, strict=True) if own.any()}

    @property
    def _widths(self) -> list[int]:
        return [read.width for read in self.reads.values()]


def along_directions(
    language_model: LanguageModel,
    statistics: Statistics,
    sites: Sequence[str],
    effect: Effect,
    scoring: Scoring,
) -> Along:
    """The singular directions of some sites, scored, from what a pass has gathered."""
    gathered = {
        want.site: want.read
        for want in statistics
        if want.token == effect and isinstance(want.read, Directions)
    }
    reads = {site: gathered[site] for site in sites}
    costs = unit_costs(language_model, sites, reads=reads)
    return Along(reads, scaled_scores(statistics, reads, effect, costs, scoring))
