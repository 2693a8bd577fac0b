"""What curves say, on curves whose answers are known; and how they are drawn."""

from __future__ import annotations

import json
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import refused_in_one_line
from trimtab.figures import Estimate
from trimtab.options import Bounds
from trimtab.reports.charts import save_figure
from trimtab.steering import ModelIdentity
from trimtab.steering.operators import Add, Rotate, Turn
from trimtab.strength import ConceptCurve, CostCurve, Curve, TokenCurve, read
from trimtab.strength.pictures import Accuracy, Curves, draw, token_name
from trimtab.strength.reading import find_peak, find_sweet_spot, fit_sigmoid, read_beginning

DIALS = (torch.arange(401, dtype=torch.float64) - 200) / 10


def steering(op: Any = None, name: str = "alpha", unit: str = "") -> tt.Steering:
    return tt.Steering(
        "test",
        {},
        (tt.Intervention("layers.1.resid", Add(torch.ones(8)) if op is None else op),),
        tt.Dial(name, 1.0, (-20.0, 20.0), unit),
        ModelIdentity("model", "llama", 3, 8, "0" * 64),
    )


def token(
    p: Tensor, runs: Tensor | None = None, text: str = " word", number: int = 7
) -> TokenCurve:
    """A token with probability `p` [dials], over an unsteered one that is nothing."""
    return TokenCurve(text, number, 0.0, p.double(), runs)


def next_token(
    tokens: Sequence[TokenCurve],
    kl: Tensor | None = None,
    entropy: Tensor | None = None,
    dials: Tensor = DIALS,
    of: tt.Steering | None = None,
) -> Curve:
    zero = torch.zeros(len(dials), dtype=torch.float64)
    return Curve(
        of or steering(),
        1,
        dials,
        torch.ones(len(dials), dtype=torch.bool),
        tuple(tokens),
        torch.stack([one.delta_p + one.base_p for one in tokens]).sum(0),
        zero if kl is None else kl,
        zero + 2.0 if entropy is None else entropy,
        2.0,
        1e-3,
    )


def bump(at: float, width: float = 3.0, height: float = 0.5) -> Tensor:
    return height * torch.exp(-(((DIALS - at) / width) ** 2))


# -- peaks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [7.0, -11.234, 3.05])
def test_a_bump_peaks_where_it_does(at: float) -> None:
    p = bump(at)
    peak = find_peak(next_token([token(p)]), token(p))
    assert peak.kind == "bump"
    assert peak.dial == pytest.approx(at, abs=2e-3)  # between the dials of the grid, 0.1 apart
    assert peak.delta_p == pytest.approx(0.5, abs=1e-3)
    # Within the tolerance of the top: 0.5 (1 - exp(-x^2)) <= 1e-3, x = 3 sqrt(-ln(0.998)).
    reach = 3 * math.sqrt(-math.log(1 - 1e-3 / 0.5))
    assert peak.low == pytest.approx(at - reach, abs=0.1)
    assert peak.high == pytest.approx(at + reach, abs=0.1)
    assert peak.low <= peak.dial <= peak.high


def test_what_rises_falls_or_stays() -> None:
    rising = torch.sigmoid(DIALS)
    found = find_peak(next_token([token(rising)]), token(rising))
    assert (found.kind, found.dial, found.high) == ("rises", 20.0, 20.0)
    # From where sigmoid(x) >= 1 - 1e-3 on, but for the tail.
    assert found.low == pytest.approx(math.log(999), abs=0.11)
    falling = find_peak(next_token([token(rising.flip(0))]), token(rising.flip(0)))
    assert (falling.kind, falling.dial, falling.low) == ("falls", -20.0, -20.0)
    assert falling.high == pytest.approx(-math.log(999), abs=0.11)
    flat = 0.3 + 4e-4 * torch.sin(DIALS)
    assert find_peak(next_token([token(flat)]), token(flat)).kind == "flat"
    nearly = 0.3 + 6e-4 * torch.sin(DIALS / 5)  # more than the tolerance from top to bottom
    assert find_peak(next_token([token(nearly)]), token(nearly)).kind != "flat"
    # Up by more than the tolerance and down again is a bump, whatever comes first.
    back = torch.sigmoid(DIALS) * 0.5 + bump(4.0, 2.0, 0.1)
    assert find_peak(next_token([token(back)]), token(back)).kind == "bump"


def test_runs_give_a_peak_its_uncertainty() -> None:
    runs = torch.stack([bump(at) for at in (6.0, 7.5, 8.25)])
    one = token(bump(7.0), runs)
    found = find_peak(next_token([one]), one)
    assert found.dial == pytest.approx(7.0, abs=2e-3)
    assert found.low == pytest.approx(6.0, abs=2e-3)
    assert found.high == pytest.approx(8.25, abs=2e-3)


def test_a_peak_on_uneven_dials() -> None:
    dials = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.5, 4.0], dtype=torch.float64)
    p = 0.6 - 0.1 * (dials - 0.8) ** 2  # a parabola, so that its top is found exactly
    one = token(p)
    assert find_peak(next_token([one], dials=dials), one).dial == pytest.approx(0.8)


def test_a_peak_lies_in_its_own_interval_whatever_the_grid() -> None:
    coarse = torch.linspace(-200, 200, 65, dtype=torch.float64)  # 6.25 apart
    for place in range(60):
        at, width = -150 + 5.1 * place, 2 + place / 4
        p = 0.5 * torch.exp(-(((coarse - at) / width) ** 2))
        peak = find_peak(next_token([token(p)], dials=coarse), token(p))
        assert peak.low <= peak.dial <= peak.high, (at, width, peak)
        if width > 10:  # where the grid is fine enough to see the bump
            reach = width * math.sqrt(-math.log(1 - 1e-3 / 0.5))
            assert peak.dial == pytest.approx(at, abs=0.4)
            assert peak.high - peak.low == pytest.approx(2 * reach, rel=0.25)
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = torch.rand(33, generator=draw, dtype=torch.float64).cumsum(0)
        p = (p - p.mean() * torch.rand((), generator=draw)).abs() / 40
        dials = torch.linspace(-1, 1, 33, dtype=torch.float64)
        peak = find_peak(next_token([token(p)], dials=dials), token(p))
        assert peak.low <= peak.dial <= peak.high
        assert peak.interval == "within 0.001 of its probability there"


def test_an_interval_says_what_it_is() -> None:
    runs = torch.stack([bump(at) for at in (6.0, 7.5, 8.25)])
    one = token(bump(7.0), runs)
    assert find_peak(next_token([one]), one).interval == "peaks of 3 fits on resampled rows"
    lines = read(next_token([one])).lines()
    assert any("(6 to 8.25: peaks of 3 fits on resampled rows)" in line for line in lines)
    plain = read(next_token([token(bump(7.0))])).lines()
    assert any("within 0.001 of its probability there" in line for line in plain)


# -- the sweet spot -------------------------------------------------------------------------------


def spot(p: Tensor, bounds: Bounds | None = None, **parts: Any) -> Any:
    return find_sweet_spot(next_token([token(p)], **parts), bounds or Bounds())


def test_the_sweet_spot_ends_at_the_peak() -> None:
    found = spot(bump(7.0))
    assert found.why == "peak"
    assert found.end == found.best == pytest.approx(7.0)
    assert found.start == pytest.approx(0.1)  # the first dial at which there is a gain
    assert found.gain == pytest.approx(0.5 - 0.5 * math.exp(-((7 / 3) ** 2)))


def test_the_sweet_spot_ends_at_a_bound_or_with_the_range() -> None:
    rising = torch.sigmoid(DIALS / 4)
    kl = 0.02 * DIALS**2  # 1 nat at 7.07
    found = spot(rising, kl=kl)
    assert (found.why, found.end) == ("kl", pytest.approx(7.0))
    assert found.kl == pytest.approx(0.98)
    assert found.gain == pytest.approx(1 / (1 + math.exp(-7 / 4)) - 0.5)
    assert spot(rising, Bounds(max_kl=0.1), kl=kl).end == pytest.approx(2.2)
    lower = 2.0 - 0.1 * DIALS.clamp(min=0)  # half of it at 10
    found = spot(rising, entropy=lower)
    assert (found.why, found.end, found.entropy) == (
        "entropy",
        pytest.approx(10.0),
        pytest.approx(1.0),
    )
    higher = 2.0 + 0.2 * DIALS.clamp(min=0)  # one and a half times at 5
    assert spot(rising, entropy=higher).end == pytest.approx(5.0)
    assert spot(rising, Bounds(max_entropy=3.0), entropy=higher).end == pytest.approx(20.0)
    found = spot(rising)
    assert (found.why, found.end) == ("range", 20.0)


def test_the_sweet_spot_says_why_it_goes_no_further() -> None:
    dials = torch.linspace(-40, 40, 9, dtype=torch.float64)  # 10 apart
    kl = 0.00447 * dials**2  # 0.447 at 10, 1.788 at 20
    one = token(torch.sigmoid(dials / 8))
    found = find_sweet_spot(next_token([one], kl=kl, dials=dials), Bounds())
    assert found is not None
    assert (found.best, found.why, found.beyond) == (10.0, "kl", 20.0)
    assert found.left == pytest.approx(1.788)
    line = read(next_token([one], kl=kl, dials=dials)).lines()[0]
    assert "KL is 0.447" in line
    assert "at the next dial of the curve, 20, KL is 1.79" in line
    assert "leaves" not in line
    lower = 2.0 - 0.11 * dials.clamp(min=0)  # 0.9 at 10, less than half
    line = read(next_token([one], entropy=lower, dials=dials)).lines()[0]
    assert line.startswith("no sweet spot")
    ends = read(next_token([one], dials=dials)).lines()[0]
    assert "the curve ends there" in ends


def test_the_sweet_spot_of_a_negative_dial() -> None:
    found = spot(bump(-5.0), kl=0.01 * DIALS**2)
    assert (found.start, found.end) == (pytest.approx(-5.0), pytest.approx(-0.1))
    assert found.best == found.start
    assert found.why == "peak"
    assert found.kl == pytest.approx(0.25)
    # Of two sides the one that gains more.
    both = spot(bump(-5.0, height=0.3) + bump(6.0, height=0.4))
    assert both.best == pytest.approx(6.0)


def test_the_sweet_spot_begins_where_there_is_a_gain() -> None:
    dip = bump(8.0) - bump(2.0, 1.5, 0.3)  # falls at first
    found = spot(dip)
    values = dip.numpy()
    place = int(np.argmax(values >= values.max()))
    while values[place - 1] > values[200]:
        place -= 1
    assert found.start == pytest.approx(float(DIALS[place]))
    assert found.start > 3


def test_no_sweet_spot() -> None:
    assert spot(torch.full_like(DIALS, 0.2)) is None
    assert spot(bump(0.0)) is None  # both sides fall
    assert spot(0.2 + 5e-6 * DIALS) is None  # no more than the tolerance explains
    # A gap in what is allowed is not crossed.
    assert spot(bump(10.0, 2.0), kl=torch.where((DIALS - 4).abs() < 1, 5.0, 0.0)) is None


def test_a_curve_without_a_dial_that_does_nothing_has_none_and_says_so() -> None:
    turn = steering(Turn(torch.eye(8)[:2]), "theta", "°")
    curve = next_token([token(bump(5.0))], of=turn)
    assert find_sweet_spot(curve, Bounds()) is None
    reading = read(curve)
    assert reading.sweet_spot is None
    assert reading.bounds is None
    assert any("no sweet spot" in line and "at no dial" in line for line in reading.lines())
    far = next_token([token(bump(5.0)[300:])], dials=DIALS[300:])  # from 10 on
    assert any("0, which is not in this range" in line for line in read(far).lines())


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_kl": 0.0},
        {"max_kl": math.nan},
        {"max_kl": math.inf},
        {"min_entropy": -0.1},
        {"min_entropy": 1.0},
        {"max_entropy": 0.9},
        {"max_entropy": math.inf},
        {"max_entropy": math.nan},
    ],
)
def test_bad_bounds(bounds: Any) -> None:
    refused_in_one_line(lambda: Bounds(**bounds), "bound")


# -- the concept's sigmoid ------------------------------------------------------------------------


def concept(p: Any, dials: Any, n: int = 200, drawn: Any = None) -> ConceptCurve:
    p = torch.as_tensor(p, dtype=torch.float64)
    dials = torch.as_tensor(dials, dtype=torch.float64)
    y = p if drawn is None else torch.from_numpy(drawn.binomial(n, p.numpy()) / n)
    return ConceptCurve(steering(), "a judge", dials, y, y, y, torch.full((len(y),), n), 0, False)


def test_the_sigmoid_that_was_drawn_from_is_found() -> None:
    dials = np.linspace(-40, 40, 41)
    draw = np.random.default_rng(0)
    inside = {"middle": 0, "slope": 0}
    for _ in range(40):
        p = 0.05 + 0.85 / (1 + np.exp(-0.3 * (dials - 6)))
        found = fit_sigmoid(concept(p, dials, drawn=draw))
        assert found.low == pytest.approx(0.05, abs=0.03)
        assert found.high == pytest.approx(0.9, abs=0.03)
        assert found.middle == pytest.approx(6, abs=1)
        assert found.slope == pytest.approx(0.3, rel=0.25)
        assert found.r2 > 0.98
        inside["middle"] += found.middle_ci95[0] < 6 < found.middle_ci95[1]
        inside["slope"] += found.slope_ci95[0] < 0.3 < found.slope_ci95[1]
        assert found.middle_ci95[1] - found.middle_ci95[0] < 2
    assert min(inside.values()) >= 34  # of 40, 38 are expected


def test_a_sigmoid_that_falls() -> None:
    dials = np.linspace(-10, 10, 21)
    p = 0.1 + 0.6 / (1 + np.exp(1.2 * (dials + 2)))
    found = fit_sigmoid(concept(p, dials))
    assert (found.low, found.high) == (pytest.approx(0.1, abs=1e-4), pytest.approx(0.7, abs=1e-4))
    assert found.slope == pytest.approx(-1.2, rel=1e-3)
    assert found.middle == pytest.approx(-2, abs=1e-3)
    assert found.r2 == pytest.approx(1)
    torch.testing.assert_close(
        found.at(torch.from_numpy(dials)), torch.from_numpy(p), atol=1e-4, rtol=0
    )
    lines = read(concept=concept(p, dials)).lines()
    assert any("from 70% to 10%" in line for line in lines)


def test_where_no_sigmoid_can_be_fitted() -> None:
    dials = np.linspace(-10, 10, 21)
    for p, x, says in (
        ([0.1, 0.2, 0.5, 0.9], [0.0, 1.0, 2.0, 3.0], "5 dials or more"),
        (np.full(21, 0.4), dials, "as probable at every dial"),
        (np.zeros(21), dials, "as probable at every dial"),
    ):
        curve = concept(p, x)
        refused_in_one_line(lambda curve=curve: fit_sigmoid(curve), says)
        reading = read(concept=curve)
        assert reading.concept is None
        assert "no sigmoid" in reading.lines()[-1]
    # All or nothing, one step: the slope has no end. Either it says so, or its numbers are finite.
    step = concept((dials > 0.5).astype(float), dials, n=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        json.dumps(read(concept=step).as_json(), allow_nan=False)
    noise = np.random.default_rng(1)
    for _ in range(20):
        wild = concept(noise.integers(0, 3, 9) / 2, np.linspace(-1, 1, 9), n=2)
        json.dumps(read(concept=wild).as_json(), allow_nan=False)


# -- cost -----------------------------------------------------------------------------------------


def costs(
    per_block: Tensor, dials: Tensor, weights: Tensor | None = None, **more: Any
) -> CostCurve:
    weights = torch.full((per_block.shape[1],), 10.0) if weights is None else weights
    weights = weights.double()
    delta = (per_block * weights).sum(1) / weights.sum()
    values = {"plateaus": None, "why": "for no reason"} | more
    return CostCurve(steering(), dials, delta, delta, delta, per_block, weights, 3.0, **values)


def test_the_beginning_of_a_quadratic_is_exact() -> None:
    dials = torch.linspace(-3, 3, 25, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    slopes = 0.02 + 0.01 * torch.randn(60, generator=draw, dtype=torch.float64)
    curvatures = 0.1 + 0.03 * torch.randn(60, generator=draw, dtype=torch.float64)
    per_block = dials[:, None] * slopes + dials[:, None] ** 2 / 2 * curvatures
    found = read_beginning(costs(per_block, dials))
    assert found.slope == pytest.approx(float(slopes.mean()))
    assert found.curvature == pytest.approx(float(curvatures.mean()))
    # The interval is that of a mean over 60 blocks.
    for (low, high), values in (
        (found.slope_ci95, slopes),
        (found.curvature_ci95, curvatures),
    ):
        half = 1.96 * float(values.std()) / math.sqrt(60)
        assert low == pytest.approx(float(values.mean()) - half, abs=0.15 * half)
        assert high == pytest.approx(float(values.mean()) + half, abs=0.15 * half)
    # Blocks weigh as many tokens as they have.
    weights = torch.arange(1, 61)
    weighed = read_beginning(costs(per_block, dials, weights))
    expected = float((curvatures * weights).sum() / weights.sum())
    assert weighed.curvature == pytest.approx(expected)


def test_the_beginning_is_read_where_the_cost_is_small_and_no_further() -> None:
    dials = torch.linspace(-10, 10, 81, dtype=torch.float64)
    cost = 0.1 * dials**2
    cost = torch.where(dials.abs() > 4, 0.3 * torch.ones_like(dials), cost)  # small again, far out
    found = read_beginning(costs(cost[:, None].repeat(1, 3), dials))
    assert found.curvature == pytest.approx(0.2)
    assert found.slope == pytest.approx(0, abs=1e-12)
    assert found.until == pytest.approx(math.sqrt(5), abs=0.25)


def test_where_the_beginning_cannot_be_read() -> None:
    few = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    one_side = torch.linspace(0, 3, 20, dtype=torch.float64)
    steep = torch.linspace(-20, 20, 9, dtype=torch.float64)
    for dials in (few, one_side, steep):
        curve = costs((dials**2)[:, None] * 0.04, dials)
        refused_in_one_line(lambda curve=curve: read_beginning(curve), "no curvature: 5 dials")
        assert any("no curvature" in line for line in read(cost=curve).lines())
    turned = replace(costs(few[:, None] ** 2, few), steering=steering(Turn(torch.eye(8)[:2])))
    refused_in_one_line(lambda: read_beginning(turned), "does nothing at no dial")


def test_plateaus_stand_beside_what_was_measured() -> None:
    dials = torch.linspace(-4, 8, 13, dtype=torch.float64)
    curve = costs((dials**2)[:, None] * 0.01, dials, plateaus=(1.5, 2.5), why="")
    low, high = read(cost=curve).plateaus
    assert (low.dial, low.measured, low.foretold) == (-4.0, pytest.approx(0.16), 1.5)
    assert (high.dial, high.measured, high.foretold) == (8.0, pytest.approx(0.64), 2.5)
    upward = costs((dials[4:] ** 2)[:, None], dials[4:], plateaus=(1.5, 2.5), why="")
    assert [one.dial for one in read(cost=upward).plateaus] == [8.0]
    none = read(cost=costs(dials[:, None] ** 2, dials))
    assert none.plateaus == ()
    assert "no foretold plateau: for no reason" in none.lines()


# -- all together ---------------------------------------------------------------------------------


def everything() -> tuple[Curve, CostCurve, ConceptCurve]:
    tokens = [
        token(bump(7.0), torch.stack([bump(6.5, 3.2), bump(7.5, 2.8, 0.45)]), " kind", 1),
        token(torch.sigmoid(DIALS / 3) * 0.4, None, "a\n$x_1$<b>&", 2),
        token(torch.sigmoid(-DIALS / 3) * 0.3, None, "😀", 3),
        token(torch.full_like(DIALS, 0.01), None, "_under", 4),
    ]
    curve = next_token(tokens, kl=0.01 * DIALS**2, entropy=2 + 0.02 * DIALS)
    dials = torch.linspace(-20, 20, 33, dtype=torch.float64)
    per_block = dials[:, None] ** 2 * torch.tensor([0.01, 0.012, 0.009], dtype=torch.float64)
    cost = costs(per_block, dials, plateaus=(9.0, 7.0), why="")
    spread = 0.1 + 0.01 * dials.abs()
    cost = replace(cost, low=cost.delta - spread, high=cost.delta + spread)
    x = np.linspace(-20, 20, 21)
    shown = concept(0.1 + 0.8 / (1 + np.exp(-0.4 * x)), x, n=32)
    y = shown.probability
    return curve, cost, replace(shown, low=(y - 0.1).clamp(0), high=(y + 0.1).clamp(max=1))


def test_a_reading_in_words_and_in_json() -> None:
    reading = read(*everything())
    said = reading.lines()
    assert len(said) == 1 + 4 + 1 + 1 + 2
    assert said[0].startswith("sweet spot: 0.1 to 7; at 7 the tokens have +0.539 in probability")
    assert "the tokens gain no more beyond it" in said[0]
    runs = "peaks of 2 fits on resampled rows"
    assert said[1].startswith(f"' kind' peaks at 7 (6.5 to 7.5: {runs}), +0.500 in probability")
    assert "is highest where the dial ends, 20 (no lower from " in said[2]
    assert "is highest where the dial begins, -20 (no lower from " in said[3]
    assert said[4] == "'_under' stays as probable as it is"
    assert all("\n" not in line for line in said)
    document = json.loads(json.dumps(reading.as_json(), allow_nan=False))
    assert [peak["kind"] for peak in document["peaks"]] == ["bump", "rises", "falls", "flat"]
    assert document["sweet_spot"]["best"] == pytest.approx(7.0)
    assert document["cost"]["curvature"] == pytest.approx(0.02 * 0.031 / 3 / 0.01)
    assert document["concept"]["middle"] == pytest.approx(0, abs=1e-3)
    assert document["plateaus"][1]["foretold"] == 7.0
    assert document["dial"] == "alpha"


def test_nothing_to_read() -> None:
    refused_in_one_line(lambda: read(), "no curve to read")


# -- pictures -------------------------------------------------------------------------------------

FIGURES = Estimate(0.5, 0.4, 0.6, 50), Estimate(0.7, 0.6, 0.8, 50), Estimate(0.6, 0.5, 0.7, 50)
TASK = Accuracy("copa", "accuracy", (-20.0, 0.0, 20.0), FIGURES, 0.7)


def texts_of(svg: Path) -> list[str]:
    root = ET.parse(svg).getroot()
    return ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]


def test_every_kind_of_curve_is_drawn(tmp_path: Path) -> None:
    curve, cost, shown = everything()
    reading = read(curve, cost, shown)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that a font lacks is no reason for a warning
        paths = save_figure(
            draw([Curves("test", reading, curve, cost, shown, TASK)]), tmp_path, "all"
        )
    assert [path.name for path in paths] == ["all.png", "all.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert len(paths[0].read_bytes()) > 50_000
    texts = texts_of(paths[1])
    for label in (
        "change in next-token probability",
        "nats (dotted: bounds)",
        "change in cross-entropy, nats per token",
        "share that shows the concept",
        "copa: accuracy",
        "KL(unsteered || steered)",
        "plateau of Proposition 4.1",
        "' kind'",
        r"'a\n$x_1$<b>&'",
        "'😀'",
        "'_under'",
    ):
        assert label in texts, (label, texts)
    assert texts.count("alpha") == 5
    for only in ({"cost": cost}, {"concept": shown}, {"tokens": curve}, {"accuracy": TASK}):
        parts: dict[str, Any] = {"tokens": None, "cost": None, "concept": None} | only
        one = (
            read(*(parts[name] or None for name in ("tokens", "cost", "concept")))
            if ("accuracy" not in only)
            else reading
        )
        made = draw([Curves("one", one, **{key: value for key, value in parts.items() if value})])
        assert len(made.axes) == (2 if "tokens" in only else 1)


def test_pictures_of_several_steerings_and_of_rotations(tmp_path: Path) -> None:
    curve, cost, _ = everything()
    plane = steering(Rotate(torch.eye(8)[:2]), "theta", "°")
    turned = replace(curve, steering=plane)
    both = [
        Curves("caa at layers.1.resid", read(curve, cost), curve, cost),
        Curves("ss at layers.1.resid", read(turned), turned, accuracy=TASK),
    ]
    _, svg = save_figure(draw(both), tmp_path, "two")
    texts = texts_of(svg)
    assert "caa at layers.1.resid" in texts
    assert "ss at layers.1.resid" in texts
    assert texts.count("theta (°)") == 3  # the task's too
    assert texts.count("alpha") == 3


def test_peaks_and_bars_are_where_they_belong() -> None:
    curve, cost, shown = everything()
    reading = read(curve, cost, shown)
    figure = draw([Curves("test", reading, curve, cost, shown, TASK)])
    tokens = figure.axes[0]
    (marker,) = [line for line in tokens.lines if line.get_marker() == "v"]
    assert marker.get_xdata()[0] == pytest.approx(7.0, abs=2e-3)
    line = next(one for one in tokens.lines if one.get_label() == "' kind'")
    assert np.allclose(line.get_ydata(), curve.tokens[0].delta_p)
    band = tokens.collections[0].get_paths()[0].vertices
    runs = curve.tokens[0].runs
    assert runs is not None
    assert band[:, 1].max() == pytest.approx(float((runs.mean(0) + runs.std(0)).max()))
    dotted = [one for one in figure.axes[2].lines if one.get_linestyle() == ":"]
    assert [one.get_ydata()[0] for one in dotted if len(one.get_ydata())] == [9.0, 7.0]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" happy", "' happy'"),
        ("\n\n", r"'\n\n'"),
        ("$x$", r"'\$x\$'"),
        ("\x00", r"'\x00'"),
        ("é", "'é'"),
    ],
)
def test_names_of_tokens(text: str, name: str) -> None:
    assert token_name(text) == name
    assert not re.search(r"[\n\x00]", token_name(text))
