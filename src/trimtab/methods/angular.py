"""Angular steering: SAS, AAS and Selective Steering turn activations in one plane.

SAS and AAS: "Angular Steering: Behavior Control via Rotation in Activation Space"
(arXiv 2510.26243). SS: "Selective Steering" (arXiv 2601.19375).

At the norms before attention and FFN, at the last token, each site k has a candidate direction d_k,
from the negative side to the positive one. One plane serves all of them:

    b1 = d_k with the largest mean cosine to all candidates (or the longest, `selection="norm"`)
    b2 = first principal component of all unit candidates, centred, made orthogonal to b1; its sign
         is free, so its largest entry is made positive

    SAS    h <- h - Ph + |Ph| (cos t b1 + sin t b2)      everywhere; t is the angle that results
    AAS    the same where <h, b1> > 0
    SS     h <- h - Ph + U R_t U'h                       t is added to the angle; only at
           discriminative sites, where the mean of <h / |h|, b1> has opposite signs on the two
           sides (with `whole_blocks` only where all norms of the block are)

So at 0 degrees SS does nothing, while SAS and AAS lay the plane's part on the positive side, b1.
All three keep the length of h. The authors say that SAS does not; that is rounding, of a basis kept
in bfloat16. Here it is kept in float32 and made orthonormal whenever it is used.

`candidates="output"` is SS's way: means of the norms' outputs. "input" is Angular Steering's: means
of the norms' inputs, each text's divided by its length. `ss_compat` steers all norms of a block, as
SS's code does: also those on the branches (Gemma), or those alone where there are no others, while
otherwise what attention and FFN read is steered (OLMo 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, parse_site
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Means,
    Method,
    Number,
    Statistics,
    UnitLength,
    Want,
    new_steering,
)
from trimtab.methods.norms import norm_inputs, norm_sites, read_sites
from trimtab.methods.words import ranges
from trimtab.model import LanguageModel
from trimtab.steering import (
    Dial,
    Intervention,
    Operator,
    Positions,
    Rotate,
    Scope,
    Steering,
    Turn,
    orthonormal,
    steered_blocks,
)

#: The angles that a sweep tries.
DEGREES = tuple(float(angle) for angle in range(0, 360, 10))
#: Two sides that differ by less than this share of their length differ by rounding: where all texts
#: end with the same token, the first norm reads the same on both.
_ROUNDING = 1e-5

_SELECTION_HELP = "b1: the candidate with the largest mean cosine, or the longest (norm)."
_CANDIDATES_HELP = "Directions from norms' outputs, or from their inputs at unit length."
_COMPAT_HELP = "Steer all norms of a block, also those on the branches."


@dataclass(frozen=True)
class SAS(Method):
    """Standard Angular Steering: lay activations at an angle in one plane, at every norm.

        h <- h - P h + |P h| (cos(theta) b1 + sin(theta) b2),    P = b1 b1' + b2 b2'

    with b1 the direction from the negative side to the positive one. "Angular Steering: Behavior
    Control via Rotation in Activation Space" (arXiv 2510.26243).

        >>> steering = tt.SAS(theta=30).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(180))
    """

    theta: Number = field(
        default=0.0, metadata={"help": "Angle in degrees, the dial's default; 0 is positive."}
    )
    candidates: Literal["output", "input"] = field(
        default="input", metadata={"help": _CANDIDATES_HELP}
    )
    selection: Literal["cosine", "norm"] = field(
        default="cosine", metadata={"help": _SELECTION_HELP}
    )
    ss_compat: bool = field(default=False, metadata={"help": _COMPAT_HELP})
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "sas"
    dial = "theta"

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"theta": DEGREES}

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        return list(candidate_wants(self, language_model.anatomy).values())

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        plane = plane_of(self, candidates(self, language_model.anatomy, statistics))
        turn = Turn(plane.basis.float(), adaptive=self.name == "aas")
        return _steering(
            self, language_model, contrast, plane, sites_of(self, language_model.anatomy), turn
        )

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        does = (
            "turns the part of every activation that lies in the plane to the dial's angle, "
            "wherever it pointed before: 0 is the positive side, 180 the opposite"
        )
        return _in_words(steering, "Standard Angular Steering", does)


@dataclass(frozen=True)
class AAS(SAS):
    """Adaptive Angular Steering: as SAS, but only where an activation points to the positive side.

        h <- h - P h + |P h| (cos(theta) b1 + sin(theta) b2)  where <h, b1> > 0

    "Angular Steering: Behavior Control via Rotation in Activation Space" (arXiv 2510.26243).

        >>> steering = tt.AAS(theta=30).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(180))
    """

    name = "aas"

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        does = (
            "turns the part of an activation that lies in the plane to the dial's angle, but only "
            "where it points to the positive side, which is 0; the opposite is 180"
        )
        return _in_words(steering, "Adaptive Angular Steering", does)


@dataclass(frozen=True)
class SS(Method):
    """Selective Steering: turn activations by an angle, where the two sides are opposite.

        h <- h - P h + U R(theta) U' h    at norms where the mean of <h / |h|, b1> has opposite
                                          signs on the two sides; U = [b1 b2], P = U U'

    "Selective Steering" (arXiv 2601.19375).

        >>> steering = tt.SS(theta=30, whole_blocks=False).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(90))
    """

    theta: Number | None = field(
        default=None,
        metadata={
            "help": "Angle in degrees, the dial's default (default: what takes the negative side's "
            "mean to the positive side's)."
        },
    )
    candidates: Literal["output", "input"] = field(
        default="output", metadata={"help": _CANDIDATES_HELP}
    )
    selection: Literal["cosine", "norm"] = field(
        default="cosine", metadata={"help": _SELECTION_HELP}
    )
    whole_blocks: bool = field(
        default=True, metadata={"help": "Steer a block only if all of its norms discriminate."}
    )
    ss_compat: bool = field(default=False, metadata={"help": _COMPAT_HELP})
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "ss"
    dial = "theta"

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"theta": DEGREES}

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        wants = list(candidate_wants(self, language_model.anatomy).values())
        return wants + [unit_means(site) for site in sites_of(self, language_model.anatomy)]

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        plane = plane_of(self, candidates(self, language_model.anatomy, statistics))
        sides = {
            site: (statistics[unit_means(site)].positive, statistics[unit_means(site)].negative)
            for site in sites_of(self, language_model.anatomy)
        }
        sites = discriminative(plane.basis[0], sides, self.whole_blocks)
        if not sites:
            flag = "; try it without whole_blocks (--no-whole-blocks)" if self.whole_blocks else ""
            raise TrimtabError(
                "ss: no site tells the two sides apart by the sign of their projection, so there "
                f"is none to steer{flag}"
            )
        theta = self.theta
        if theta is None:
            theta = _angle_between(plane.basis, [sides[site] for site in sites])
        rotate = Rotate(plane.basis.float())
        return _steering(self, language_model, contrast, plane, sites, rotate, theta)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        does = (
            "turns the part of every activation that lies in the plane by the dial's angle, so "
            "that at 0 nothing happens"
        )
        lines = _in_words(steering, "Selective Steering", does)
        whole = steering.hyperparameters["whole_blocks"]
        which = "blocks all of whose norms see" if whole else "norms that see"
        lines.append(
            f"It steers only {which} the positive texts on one side of zero along the first axis, "
            "on average, and the negative ones on the other."
        )
        return lines


@dataclass(frozen=True)
class Candidates:
    """The direction of each site from the negative side to the positive one.

    `unit` [sites, units] in float64 has length 1, or 0 where the sides do not differ; `lengths`
    [sites] are those of the differences themselves.
    """

    sites: tuple[str, ...]
    unit: Tensor
    lengths: Tensor

    @property
    def cosines(self) -> Tensor:
        """Of each candidate to each, [sites, sites]."""
        return self.unit @ self.unit.T


@dataclass(frozen=True)
class Plane:
    """The plane of rotation, [2, units] in float64, and where b1 comes from."""

    basis: Tensor
    source: str
    mean_cosine: float


def sites_of(method: Any, anatomy: Anatomy) -> list[str]:
    """The norms to steer, in the order of the computation: what attention and FFN read, or all
    norms, of which OLMo 2 has none there."""
    return norm_sites(anatomy) if method.ss_compat else read_sites(anatomy)


def unit_means(site: str) -> Want:
    """What L_disc is read from: each side's mean of activations at unit length."""
    return Want(site, "last", Means, read=UnitLength())


def candidate_wants(method: Any, anatomy: Anatomy) -> dict[str, Want]:
    """What each site's candidate is computed from, by the site's name."""
    sites = sites_of(method, anatomy)
    if method.candidates == "output":
        return {site: Want(site, "last", Means) for site in sites}
    # What a norm on a branch reads is the branch's output.
    read = {site: site.replace("_post_norm", "_out") for site in sites} | {
        site: place for site, place in norm_inputs(anatomy).items() if site in sites
    }
    return {site: unit_means(read[site]) for site in sites}


def candidates(method: Any, anatomy: Anatomy, statistics: Statistics) -> Candidates:
    """The candidate directions of all norms, from what `candidate_wants` asked for."""
    wants = candidate_wants(method, anatomy)
    differences = []
    for want in wants.values():
        positive, negative = statistics[want].positive, statistics[want].negative
        if method.candidates == "input":
            positive, negative = positive / positive.norm(), negative / negative.norm()
        difference = positive - negative
        same = difference.norm() <= _ROUNDING * (positive.norm() + negative.norm())
        differences.append(torch.zeros_like(difference) if same else difference)
    raw = torch.stack(differences)  # [sites, units]
    lengths = raw.norm(dim=-1)
    if not lengths.any():
        raise TrimtabError(f"{method.name}: the two sides do not differ at any norm's last token")
    # A site at which the sides do not differ has no direction: it stays zero and is never chosen.
    unit = raw / lengths.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return Candidates(tuple(wants), unit, lengths)


def plane_of(method: Any, found: Candidates) -> Plane:
    """b1 and b2 from the candidates of all sites."""
    from sklearn.decomposition import PCA

    unit, lengths = found.unit, found.lengths
    cosines = found.cosines.mean(-1).masked_fill(lengths == 0, -torch.inf)
    best = int((cosines if method.selection == "cosine" else lengths).argmax())
    # "full", because sklearn's choice for wide models is a randomised one: another b2 every time.
    pca = PCA(n_components=1, svd_solver="full").fit(unit.numpy())
    component = torch.from_numpy(pca.components_[0])
    basis = torch.stack((unit[best], component.double()))
    if (component - (component @ unit[best]) * unit[best]).norm() < 1e-6:
        raise TrimtabError(f"{method.name}: all candidates lie on one line, which is no plane")
    basis = orthonormal(basis)
    if basis[1][basis[1].abs().argmax()] < 0:
        basis[1] = -basis[1]
    return Plane(basis, found.sites[best], float(cosines[best]))


def discriminative(
    b1: Tensor, sides: Mapping[str, tuple[Tensor, Tensor]], whole_blocks: bool
) -> list[str]:
    """L_disc: the sites at which the two sides lie on opposite sides of b1's origin.

    `sides` has each site's means over the positives and the negatives, of activations at unit
    length. With `whole_blocks` only the sites of blocks that all of their sites qualify in.
    """
    found = {site for site, (pos, neg) in sides.items() if float(pos @ b1) * float(neg @ b1) < 0}
    if whole_blocks:
        failing = {parse_site(site)[0] for site in sides if site not in found}
        found = {site for site in found if parse_site(site)[0] not in failing}
    return [site for site in sides if site in found]


def _angle_between(basis: Tensor, sides: list[tuple[Tensor, Tensor]]) -> float:
    """The mean angle, in degrees within the plane, from the negatives' mean to the positives'."""
    sine = cosine = 0.0
    for positive, negative in sides:
        (a, b), (c, d) = (basis @ positive).tolist(), (basis @ negative).tolist()
        turn = math.atan2(b, a) - math.atan2(d, c)
        sine, cosine = sine + math.sin(turn), cosine + math.cos(turn)
    return round(math.degrees(math.atan2(sine, cosine)), 1)


def _steering(
    method: Any,
    language_model: LanguageModel,
    contrast: Contrast,
    plane: Plane,
    sites: list[str],
    operator: Operator,
    theta: float | None = None,
) -> Steering:
    interventions = [Intervention(site, operator, Scope.of(method.positions)) for site in sites]
    default = method.theta if theta is None else theta
    dial = Dial("theta", default, (-360.0, 360.0), "°")
    findings = {"source_site": plane.source, "mean_cosine": plane.mean_cosine}
    return new_steering(method, language_model, contrast, interventions, dial, findings=findings)


def _in_words(steering: Steering, name: str, does: str) -> list[str]:
    """Where a method acts, what it does there, and which plane it works in."""
    sites, blocks = len(steering.interventions), ranges(steered_blocks(steering))
    read = "in what enters" if steering.hyperparameters["candidates"] == "input" else "at"
    return [
        f"{name} works in one plane, the same at {sites} norms in blocks {blocks}. It {does}. No "
        "activation changes its length.",
        "The plane's first axis leads from the negative texts to the positive ones, as read "
        f"{read} {steering.findings['source_site']}; the second is where such directions vary "
        "most.",
    ]
