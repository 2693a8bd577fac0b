"""What came of a wish, as a page: gain against cost, steering beside asking, what is written."""

from __future__ import annotations

from typing import Any

from trimtab.figures import Estimate
from trimtab.reports import (
    DOWN,
    GREEN,
    NEUTRAL,
    UP,
    Line,
    Picture,
    Run,
    curve,
    model_line,
    panels,
    run_page,
    styled,
)
from trimtab.reports import bars as draw_bars
from trimtab.wishes.made import Made, Tested

_GAIN = "gain: nats by which the wished-for side gets ahead"
_COST = "cost on plain text, nats per token"


def made_page(found: Made, run: Run, environment: dict[str, Any]) -> str:
    """The page; its tables and pictures are also saved beside it."""
    return run_page(
        run,
        environment,
        f"A steering for: {found.called}",
        f"{found.model['name']}; {model_line(run.config['model'])}; {found.seconds:g} seconds",
        [*pictures(found), *found.tables()],
        summary=found.summary,
        notes=notes(found),
    )


def notes(found: Made) -> list[str]:
    """What a reader must know."""
    written = found.contrast is not None and (found.contrast.made or {}).get("wish")
    about = [
        "The pairs were written under instructions that ask for the wish, which speaks for "
        "asking wherever log-odds of these pairs are compared."
    ]
    return [*(about if written else []), *found.notes()]


@styled
def pictures(found: Made) -> list[Picture]:
    """Gain against cost on the validation pairs, and on the test pairs what was chosen."""
    drawn = [_plane(found)] if found.tried else []
    return [*drawn, *([_tested(found)] if found.chosen is not None else [])]


def _plane(found: Made) -> Picture:
    figure, (axes,) = panels((7.2, 4.2))
    kinds = list(dict.fromkeys(one.arm for one in found.tried))
    points = [(one.cost, one.gain.value) for one in found.tried]
    axes.plot(*zip(*points, strict=True), "o", color=NEUTRAL, markersize=4, label="tried")
    front = [(one.cost, one.gain.value) for one in found.front]
    axes.plot(*zip(*front, strict=True), "-o", color=UP, markersize=5, label="front")
    if found.asked:
        asked = [(one.cost, one.gain.value) for one in found.asked]
        axes.plot(*zip(*asked, strict=True), "*", color=GREEN, markersize=10, label="asked")
    if found.chosen is not None:
        best = found.chosen.row.best
        assert best is not None
        line = Line("chosen", [best.cost], [best.gain], DOWN, "D", "none")
        curve(axes, [line])
    axes.axvline(found.max_cost, color=NEUTRAL, linestyle=":", linewidth=1, label="limit of cost")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel=_COST, ylabel=f"{_GAIN}\n(validation pairs)")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=5)
    return Picture(
        "Gain against cost",
        "gain-and-cost",
        figure,
        f"gain of {', '.join(kinds)} and of prompts over their cost on plain text; the Pareto "
        "front is a line, what was chosen a diamond",
        "On the validation pairs, on which the choice was made.",
    )


def _tested(found: Made) -> Picture:
    assert found.chosen is not None
    named: dict[str, Tested | None] = {"steered": found.chosen.tested}
    named["asked"] = None if found.baseline is None else found.baseline.tested
    named["both"] = found.together
    gains = {
        name: Estimate(one.gain.difference, *one.gain.ci95, one.gain.n)
        for name, one in named.items()
        if one is not None
    }
    figure, (axes,) = panels((7.2, 1.3 + 0.42 * len(gains)))
    n = found.chosen.tested.gain.n
    label = f"{_GAIN} (n = {n} test pairs, 95 % intervals)"
    draw_bars(axes, gains, label, [name for name, one in gains.items() if one.low > 0])
    return Picture(
        "On pairs that nothing was chosen on",
        "differences",
        figure,
        f"gain on the test pairs of {', '.join(gains)}, with 95 % intervals",
        "Coloured where the interval is above zero.",
    )
