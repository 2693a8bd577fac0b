"""Curves over a dial as pictures: PNG and SVG, labelled, safe for colour-blind readers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from trimtab.figures import Estimate
from trimtab.reports import (
    COLOURS,
    DOWN,
    GREEN,
    NEUTRAL,
    UP,
    Line,
    axes_for,
    banded,
    curve,
    panels,
    styled,
)
from trimtab.strength.concept import ConceptCurve
from trimtab.strength.costs import CostCurve
from trimtab.strength.curves import Curve
from trimtab.strength.reading import Reading, read
from trimtab.strength.samples import Sample

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)))


@dataclass(frozen=True)
class Accuracy:
    """A task's metric at some dials with its 95 % interval, and unsteered."""

    task: str
    metric: str
    dials: tuple[float, ...]
    figures: tuple[Estimate, ...]
    unsteered: float

    def as_json(self) -> dict[str, Any]:
        """For `trimtab strength curve --json`."""
        return {
            "task": self.task,
            "metric": self.metric,
            "dials": list(self.dials),
            "value": [each.value for each in self.figures],
            "ci95": [list(each.ci95) for each in self.figures],
            "n": self.figures[0].n,
            "unsteered": self.unsteered,
        }


@dataclass(frozen=True)
class Curves:
    """All curves of one steering, and what they say; `name` tells it from others in a picture."""

    name: str
    reading: Reading
    tokens: Curve | None = None
    cost: CostCurve | None = None
    concept: ConceptCurve | None = None
    accuracy: Accuracy | None = None
    samples: tuple[Sample, ...] = ()


@styled
def draw(steerings: Sequence[Curves]) -> Figure:
    """One column for each steering, one row for each kind of curve that there is."""
    rows = [
        (kind, panel)
        for kind, panel in _PANELS
        if any(getattr(one, kind) is not None for one in steerings)
    ]
    columns = len(steerings)
    figure, every = panels((1.0 + 5.6 * columns, 0.6 + 3.1 * len(rows)), len(rows), columns)
    for place, axes in enumerate(every):
        (kind, panel), curves = rows[place // columns], steerings[place % columns]
        if getattr(curves, kind) is None:
            axes.set_axis_off()
            continue
        panel(axes, curves)
        if place < columns:
            axes.set_title(curves.name, fontsize=10)
        axes.set_xlabel(dial_label(curves.reading))
    return figure


def plot_tokens(found: Curve, ax: Any) -> Any:
    """The tokens of a curve on axes of their own."""
    return _alone(_tokens, Curves("", read(found), tokens=found), ax)


def plot_cost(found: CostCurve, ax: Any) -> Any:
    """A curve of cost on axes of its own."""
    return _alone(_cost, Curves("", read(cost=found), cost=found), ax)


def plot_concept(found: ConceptCurve, ax: Any) -> Any:
    """A concept's curve on axes of its own."""
    return _alone(_concept, Curves("", read(concept=found), concept=found), ax)


def _alone(panel: Callable[[Any, Curves], None], curves: Curves, ax: Any) -> Any:
    axes = axes_for(ax, (6.6, 3.7))
    panel(axes, curves)
    axes.set_xlabel(dial_label(curves.reading))
    return axes


def dial_label(reading: Reading) -> str:
    return f"{reading.dial} ({reading.unit})" if reading.unit else reading.dial


def token_name(token: str) -> str:
    """A token as it can be read in a picture: quoted, and nothing that matplotlib would take for
    mathematics."""
    shown = token.encode("unicode_escape").decode() if not token.isprintable() else token
    return f"'{shown}'".replace("$", r"\$")


def _tokens(axes: Any, curves: Curves) -> None:
    """Δp of each token, its error bars, its peak, and the sweet spot."""
    tokens = curves.tokens
    assert tokens is not None
    dials = tokens.dials
    peaks = curves.reading.peaks or [None] * len(tokens.tokens)
    for i, (token, peak) in enumerate(zip(tokens.tokens, peaks, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        dash = _DASHES[i // len(COLOURS) % len(_DASHES)]
        axes.plot(dials, token.delta_p, color=colour, linestyle=dash, label=token_name(token.token))
        if token.runs is not None:
            mean, sd = token.runs.mean(0), token.runs.std(0)
            banded(axes, dials, mean - sd, mean + sd, colour)
        if peak is not None and peak.kind == "bump":
            axes.plot(peak.dial, peak.delta_p, marker="v", color=colour, markersize=5)
    _shade(axes, curves)
    axes.axhline(0, color="black", linewidth=0.6)
    fits = [len(token.runs) for token in tokens.tokens if token.runs is not None]
    bands = f"\n(bands: standard deviation of {fits[0]} fits)" if fits else ""
    axes.set_ylabel(f"change in next-token probability{bands}")
    axes.legend(fontsize=7, frameon=False, ncols=2 if len(tokens.tokens) > 4 else 1)


def _kl(axes: Any, curves: Curves) -> None:
    """KL and entropy, and the bounds of the sweet spot."""
    tokens, bounds = curves.tokens, curves.reading.bounds
    assert tokens is not None
    axes.plot(tokens.dials, tokens.kl, color=DOWN, label="KL(unsteered || steered)")
    axes.plot(
        tokens.dials, tokens.entropy, color=UP, linestyle=_DASHES[1], label="entropy, steered"
    )
    if bounds is not None:
        axes.axhline(bounds.max_kl, color=DOWN, linewidth=0.7, linestyle=":")
        for share in (bounds.min_entropy, bounds.max_entropy):
            axes.axhline(share * tokens.base_entropy, color=UP, linewidth=0.7, linestyle=":")
    _shade(axes, curves)
    axes.set_ylabel("nats (dotted: bounds)")
    axes.legend(fontsize=7, frameon=False)


def _cost(axes: Any, curves: Curves) -> None:
    """ΔCE with its interval, the quadratic that it begins with, the foretold plateaus."""
    cost, beginning = curves.cost, curves.reading.cost
    assert cost is not None
    style = {"marker": ".", "markersize": 4, "label": "measured"}
    banded(axes, cost.dials, cost.low, cost.high, UP, middle=cost.delta, **style)
    top = float(cost.high.max())
    if beginning is not None:
        x = torch.linspace(float(cost.dials[0]), float(cost.dials[-1]), 400)
        y = beginning.slope * x + beginning.curvature / 2 * x.square()
        inside = y <= 1.1 * top
        y = torch.where(inside, y, torch.nan)
        axes.plot(x, y, color=NEUTRAL, linestyle=_DASHES[1], label="quadratic at its beginning")
    for plateau in curves.reading.plateaus:
        side = (0.75, 1.0) if plateau.dial > 0 else (0.0, 0.25)
        axes.axhline(plateau.foretold, *side, color=DOWN, linestyle=":", linewidth=1.4)
    if curves.reading.plateaus:
        axes.plot([], [], color=DOWN, linestyle=":", label="plateau of Proposition 4.1")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel("change in cross-entropy, nats per token\n(band: 95 % interval)")
    axes.legend(fontsize=7, frameon=False)


def _concept(axes: Any, curves: Curves) -> None:
    """Probability of the concept with its intervals, and the sigmoid."""
    concept, fit = curves.concept, curves.reading.concept
    assert concept is not None
    each = concept.estimates
    label = f"{concept.judge}, n {each[0].n}"
    curve(axes, [Line(label, concept.dials.tolist(), each, dash="none")])
    if fit is not None:
        x = torch.linspace(float(concept.dials[0]), float(concept.dials[-1]), 400)
        axes.plot(x, fit.at(x), color=NEUTRAL, linestyle=_DASHES[1], label="sigmoid")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share that shows the concept\n(bars: 95 % intervals)")
    axes.legend(fontsize=7, frameon=False)


def _accuracy(axes: Any, curves: Curves) -> None:
    found = curves.accuracy
    assert found is not None
    line = Line(f"n {found.figures[0].n}", found.dials, found.figures)
    curve(axes, [line], ylabel=f"{found.task}: {found.metric}")
    axes.axhline(found.unsteered, color=NEUTRAL, linestyle=_DASHES[1], label="unsteered")
    axes.legend(fontsize=7, frameon=False)


def _shade(axes: Any, curves: Curves) -> None:
    spot = curves.reading.sweet_spot
    if spot is not None:
        axes.axvspan(spot.start, spot.end, color=GREEN, alpha=0.12, linewidth=0, label="sweet spot")


#: What is drawn of each kind of curve, from top to bottom.
_PANELS = (
    ("tokens", _tokens),
    ("tokens", _kl),
    ("cost", _cost),
    ("concept", _concept),
    ("accuracy", _accuracy),
)
