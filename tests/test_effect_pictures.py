"""The pictures of what was chosen by effect: they show the numbers of the tables."""

from __future__ import annotations

import io
import warnings
from functools import cache
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

import trimtab as tt
from helpers import language_model
from method_settings import PAIRED
from trimtab.methods import describe
from trimtab.reports.dark import dark

matplotlib.use("agg")

CASES = {
    "units": tt.AUSteer("ffn_in", k=12, locate="effect"),
    "many units": tt.AUSteer("ffn_in", k=60, locate="effect_per_nat"),
    "heads": tt.ITI(k=5, locate="effect"),
    "scaled heads": tt.SADI(k=5, locate="effect"),
}


@cache
def _fitted(case: str) -> tt.Steering:
    return CASES[case].fit(language_model("gpt2"), PAIRED, measure=False)


@cache
def _of_layers() -> tt.Steering:
    return tt.CAA(layer="effect").fit(language_model("gpt2"), PAIRED, measure=False)


def _panels(steering: tt.Steering, **place: Any) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    assert steering.plot(figure.subplots()) is figure.axes[0]
    return figure, figure.axes


def _points(axes: Any) -> dict[float, tuple[float, float]]:
    """Of each place the effect and half of its interval."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        for x, y, bar in zip(*line.get_data(), bars.get_segments(), strict=True):
            assert bar[:, 1].mean() == pytest.approx(y)
            found[round(float(x))] = (float(y), float(bar[1, 1] - bar[0, 1]) / 2)
    return found


@pytest.mark.parametrize("case", CASES)
def test_effects_stand_layer_by_layer_with_their_intervals(case: str) -> None:
    steering = _fitted(case)
    (records,) = (describe(steering)[k] for k in ("units", "heads") if k in describe(steering))
    ordered = sorted(records, key=lambda record: record["layer"])
    _, (axes, cost, first) = _panels(steering)
    points = _points(axes)
    assert len(points) == len(records)
    for place, record in enumerate(ordered):
        effect, reach = points[place]
        assert effect == pytest.approx(record["effect"], rel=1e-6)
        assert reach == pytest.approx(1.96 * record["error"], rel=1e-3)
    for strip, column in ((cost, "cost"), (first, "first")):
        heights = [bar.get_height() for bar in strip.patches]
        assert heights == pytest.approx([record[column] for record in ordered])
    labels = [label.get_text() for label in first.get_xticklabels()]
    if case == "many units":  # only layers have room
        assert labels == [str(layer) for layer in sorted({r["layer"] for r in records})]
    else:
        one = "head" if "heads" in case else "unit"
        assert labels == [f"{record['layer']}.{record[one]}" for record in ordered]


def test_the_chosen_layer_is_marked() -> None:
    steering = _of_layers()
    found = steering.findings
    _, (axes, certain, worth) = _panels(steering)
    points = _points(axes)
    for place, (site, effect) in enumerate(found["effect"].items()):
        assert points[place][0] == pytest.approx(effect)
        assert points[place][1] == pytest.approx(1.96 * found["error"][site])
    sure = [bar.get_height() for bar in certain.patches]
    best = sure.index(max(sure))
    assert list(found["effect"])[best] == found["site"]
    assert sure[best] == pytest.approx(
        abs(found["effect"][found["site"]]) / found["error"][found["site"]]
    )
    heights = [bar.get_height() for bar in worth.patches]
    assert heights[best] == pytest.approx(
        abs(found["effect"][found["site"]]) * (0.2 / found["cost"][found["site"]]) ** 0.5
    )
    colours = {bar.get_facecolor() for i, bar in enumerate(worth.patches) if i != best}
    assert worth.patches[best].get_facecolor() not in colours
    assert len(colours) == 1


@pytest.mark.parametrize("case", [*CASES, "layers"])
def test_it_is_drawn_for_light_and_dark_pages_without_a_warning(case: str) -> None:
    steering = _of_layers() if case == "layers" else _fitted(case)
    figure, _ = _panels(steering)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")
        with dark(figure):
            figure.savefig(io.BytesIO(), format="png")


def test_it_keeps_to_the_room_of_its_axes() -> None:
    """Also of axes that stand in no grid."""
    figure = Figure(figsize=(8, 6))
    axes = figure.add_axes((0.5, 0.2, 0.4, 0.6))
    _fitted("units").plot(axes)
    for each in figure.axes:
        box = each.get_position()
        assert box.x0 == pytest.approx(0.5)
        assert box.x1 == pytest.approx(0.9)
        assert 0.2 - 1e-9 <= box.y0 < box.y1 <= 0.8 + 1e-9


def test_units_by_another_score_are_drawn_as_before() -> None:
    steering = tt.AUSteer("ffn_in", k=5).fit(language_model("gpt2"), PAIRED, measure=False)
    _, panels = _panels(steering)
    assert len(panels) == 1
    assert "units that are steered" in panels[0].get_title()
    assert torch.isfinite(steering.tables["score"]).all()
