"""AcT: carry activations from where the negative texts' lie to where the positive ones' do.

"Controlling Language and Diffusion Models by Transporting Activations" (Rodriguez et al., ICLR
2025, 2410.23054).

    x_i <- (1 - lambda) x_i + lambda (omega_i x_i + beta_i)       at every unit of some sites

A text is its tokens' mean activation. Of each unit the negative side's values and the positive
side's are sorted, a_(j) and b_(j); between such orders the optimal map of one dimension is
increasing, and the straight line that comes closest to it is

    omega = sum (a_(j) - m_a)(b_(j) - m_b) / sum (a_(j) - m_a)^2,      beta = m_b - omega m_a

with m the means (the paper's definition 3.1 has the other side's squares below; least squares, and
the authors' code, have these). `slope="one"` is the paper's Mean-AcT: omega is 1, and what is added
is the difference of means.

`causal` (the paper's definition 3.2) fits the maps in the order in which the model computes them,
each while those below are active, on both sides' texts: a later map sees what the earlier ones
leave. Here all texts advance block by block, so that it takes two passes however many sites there
are, where a pass for each site is about half as many passes as there are blocks.

`support` leaves alone what lies outside of the values that the map was fitted on, which the paper
does where something is to be made less. They are values of texts, means of many tokens: most single
tokens lie outside. `findings["inside"]` says how many do not, of causal maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, Edit, Enough, Point, hooked, parse_site
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import POSITIONS_HELP, Method, Number, Samples, Statistics, Want, new_steering
from trimtab.model import LanguageModel, batches_by_length, with_images
from trimtab.reading import Packed, blocks_before, encode_contrast, run_lower, run_upper
from trimtab.steering import Dial, Intervention, Positions, Scope, Shift, Steering
from trimtab.terminal import progress

#: Kinds of sites that a block has one of.
Kind = Literal[
    "attn_norm", "attn_out", "attn_post_norm", "ffn_norm", "ffn_in", "ffn_out", "ffn_post_norm",
    "heads", "resid",
]  # fmt: skip


@dataclass(frozen=True)
class AcT(Method):
    """AcT: carry activations from where the negative texts' lie to where the positive ones' do.

        x_i <- (1 - strength) x_i + strength (omega_i x_i + beta_i)

    "Controlling Language and Diffusion Models by Transporting Activations" (Rodriguez et al., ICLR
    2025).

        >>> steering = tt.AcT(site="ffn_out").fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(1))
    """

    site: Kind = field(default="attn_out", metadata={"help": "Which activations of each block."})
    layer: tuple[int, ...] | int | None = field(
        default=None, metadata={"help": "Blocks, as in 12 or 10-14 (default: all)."}
    )
    strength: Number | None = field(
        default=None,
        metadata={"help": "lambda: 0 leaves all as it is, 1 carries it; the dial's default."},
    )
    slope: Literal["line", "one"] = field(
        default="line", metadata={"help": "omega: of the line (Linear-AcT), or one (Mean-AcT)."}
    )
    causal: bool = field(
        default=True, metadata={"help": "Fit each map while those before it are active."}
    )
    support: bool = field(
        default=False,
        metadata={"help": "Only between the least and the largest value that a map was fitted on."},
    )
    shrink: bool = field(
        default=False,
        metadata={"help": "Draw slopes towards 1 as far as the number of texts leaves them open."},
    )
    token: Literal["mean", "answer", "last"] = field(
        default="mean", metadata={"help": "What stands for a text: mean, answer or last."}
    )
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "act"
    dial = "strength"
    unmeasured = 1.0

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"site": ("attn_out", "ffn_out"), "strength": (0.25, 0.5, 0.75, 1.0)}

    def sites(self, anatomy: Anatomy) -> list[str]:
        """The sites that are steered, in the order of the computation."""
        layers = (self.layer,) if isinstance(self.layer, int) else self.layer
        found: list[str] = anatomy.sites(self.site, layers)
        return sorted(set(found), key=lambda site: parse_site(site)[0] or 0)

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        if self.token == "answer" and not contrast.paired:
            raise TrimtabError("act: token answer is for pairs, and this contrast has none")
        sites = self.sites(language_model.anatomy)
        # Maps that see those before them are fitted in passes of their own.
        return [] if self.causal else [Want(site, self.token, Samples) for site in sites]

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        sites = self.sites(language_model.anatomy)
        own = ("act", *(getattr(self, name) for name in ("site", "layer", "slope", "causal")))
        own += (self.support, self.shrink, self.token, self.positions)
        findings: dict[str, Any] = {}
        if self.causal:
            interventions, inside = statistics.once(
                own, lambda: self._in_order(language_model, contrast, statistics.max_length)
            )
            if self.support:
                findings["inside"] = inside
        else:
            interventions = [
                self._intervention(site, *_sides(statistics.of(site, self.token, Samples)))
                for site in sites
            ]
        dial = Dial("strength", self.at_default, (0.0, 2.0))
        return new_steering(self, language_model, contrast, interventions, dial, findings=findings)

    def _intervention(self, site: str, source: Tensor, target: Tensor) -> Intervention:
        """The map between two sides' activations at a site, [texts, units] each."""
        slope, shift = line(source, target, self.slope == "one", self.shrink)
        low = high = None
        if self.support:
            low, high = source.amin(0).float(), source.amax(0).float()
        units = torch.arange(source.shape[1])
        operator = Shift(units, slope.float(), shift.float(), source.shape[1], low, high)
        return Intervention(site, operator, Scope.of(self.positions))

    # -- one after the other ----------------------------------------------------------------------

    def _in_order(
        self, language_model: LanguageModel, contrast: Contrast, max_length: int | None
    ) -> tuple[list[Intervention], dict[str, float]]:
        """The maps, each fitted while those before it are active, and of each the share of tokens
        of the negative texts at which a unit is inside of its support."""
        lm, train = language_model, contrast.train
        texts, counted, positive = _texts(lm, train, encode_contrast(lm, train, max_length), self)
        made: list[Intervention] = []
        inside: dict[str, float] = {}
        streams, done = [torch.empty(0)] * len(texts), 0
        sites = self.sites(lm.anatomy)
        with progress("carrying activations", len(sites)) as advance:
            for site in sites:
                layer = parse_site(site)[0]
                assert layer is not None  # all kinds are in blocks
                # What maps in the blocks before have done is in the streams, but for one of a
                # block's own output, which acts where the stream is handed on.
                here = [each for each in made if blocks_before(lm.anatomy, [each.site]) >= done]
                with lm.steered(*self._active(lm, contrast, here)) as sequences:
                    sequences.may_miss_images = True
                    streams, done = run_lower(lm, texts, layer, streams, done), layer
                    read = _read(lm, site, texts, streams, layer)
                means = torch.stack(
                    [x[own].double().mean(0) for x, own in zip(read, counted, strict=True)]
                )
                map_ = self._intervention(site, means[~positive], means[positive])
                away = [x for x, toward in zip(read, positive.tolist(), strict=True) if not toward]
                inside[site] = _inside(map_, away)
                made.append(map_)
                advance(1)
        return made, inside

    def _active(
        self, language_model: LanguageModel, contrast: Contrast, maps: Sequence[Intervention]
    ) -> list[Steering]:
        """Maps as a steering that acts on every token of the texts."""
        acting = [replace(each, scope=Scope.parse("all")) for each in maps if each.acts]
        if not acting:
            return []
        dial = Dial("strength", 1.0, (0.0, 2.0))
        return [new_steering(self, language_model, contrast, acting, dial)]

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        options = steering.hyperparameters
        what = "a line" if options["slope"] == "line" else "a shift"
        lines = [
            f"AcT maps every unit at {steering.where} by {what} of its own, which carries the "
            "negative texts' activations to where the positive texts' lie: "
            f"{steering.dial.name} 0 leaves them as they are, 1 carries them."
        ]
        if options["causal"]:
            lines.append("Each map was fitted while those before it were active.")
        inside = steering.findings.get("inside")
        if inside:
            share = 100 * sum(inside.values()) / len(inside)
            lines.append(
                "A unit is left as it is where it lies outside of the values that its map was "
                f"fitted on: {share:.0f} % of the negative texts' tokens lie inside."
            )
        return lines


def line(source: Tensor, target: Tensor, one: bool, shrink: bool) -> tuple[Tensor, Tensor]:
    """Slope and shift of each unit's map, [units] in float64, from activations [texts, units].

    Slopes are of texts in order of size, side by side: of sides of different sizes the first texts
    of the larger one count for them. A unit that is the same at every text has slope 1. `shrink`
    draws ln omega towards 0 by what it varies by chance, which is about 1 / sqrt(n): a James-Stein
    factor max(0, 1 - 1 / (n ln^2 omega)).
    """
    source, target = source.double(), target.double()
    n = min(len(source), len(target))
    if one or n < 2:
        shift = target.mean(0) - source.mean(0)
        return torch.ones_like(shift), shift
    source, target = source[:n], target[:n]
    a, b = source.mean(0), target.mean(0)
    ordered = (source - a).sort(0).values, (target - b).sort(0).values
    below, across = ordered[0].square().sum(0), (ordered[0] * ordered[1]).sum(0)
    known = below > 1e-12 * source.square().sum(0)
    slope = torch.where(known, across / torch.where(known, below, 1.0), 1.0)
    if shrink:
        log = slope.clamp(min=1e-6).log()
        kept = (1 - 1 / (n * log.square()).clamp(min=1e-12)).clamp(min=0)
        slope = torch.where(slope > 0, (kept * log).exp(), slope)
    return slope, b - slope * a


def _sides(samples: Samples) -> tuple[Tensor, Tensor]:
    """The negative side's activations, and the positive side's."""
    texts, positive, _ = samples.texts()
    return texts[~positive], texts[positive]


# -- the texts, and one site of them --------------------------------------------------------------


def _texts(
    language_model: LanguageModel, contrast: Contrast, rows: Sequence[Packed], method: AcT
) -> tuple[list[Sequence[int]], list[Tensor], Tensor]:
    """Every side of every row (token ids), which of its tokens count, [tokens], and which texts are
    positive, [texts]."""
    texts: list[Sequence[int]] = []
    counted: list[Tensor] = []
    positive: list[bool] = []
    for row in rows:
        for side, text in enumerate(row.texts()):
            first = {"mean": 0, "answer": row.answers[side] if row.answers else 0}.get(
                method.token, len(text) - 1
            )
            texts.append(text)
            counted.append(torch.arange(len(text)) >= first)
            one = contrast.rows[row.index]
            positive.append(side == 0 if contrast.paired else one.label == "positive")  # type: ignore[union-attr]
    return texts, counted, torch.tensor(positive)


def _read(
    language_model: LanguageModel,
    site: str,
    texts: Sequence[Sequence[int]],
    streams: Sequence[Tensor],
    blocks: int,
) -> list[Tensor]:
    """The activations of texts at a site, [tokens, units] each in float32; `streams` are those
    after the first `blocks` blocks."""
    lm = language_model
    found = [torch.empty(0)] * len(texts)
    seen: list[Tensor] = []

    def see(x: Tensor) -> None:
        seen.append(x.detach())
        raise Enough

    edits: dict[Point, Edit] = {lm.anatomy.point(site): see}
    for rows in batches_by_length(list(map(len, texts)), lm.batch_tokens, apart=with_images(texts)):
        some = [streams[i] for i in rows] if blocks else []
        with torch.no_grad(), hooked(lm.anatomy.body, edits), suppress(Enough):
            run_upper(lm, [texts[i] for i in rows], some, blocks)
        for row, i in enumerate(rows):
            found[i] = seen[-1][row, : len(texts[i])].float().cpu()
    return found


def _inside(intervention: Intervention, texts: Sequence[Tensor]) -> float:
    """The share of units and tokens, [tokens, units] each, at which a map acts."""
    operator = intervention.operator
    assert isinstance(operator, Shift)
    if operator.low is None or operator.high is None:
        return 1.0
    inside = sum(int(((x > operator.low) & (x < operator.high)).sum()) for x in texts)
    return inside / sum(x.numel() for x in texts)
