"""The theory of steering strength in pictures: drawn as computed, the same each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from trimtab.errors import TrimtabError
from trimtab.strength.theory import pictures as ufm_pictures
from ufm_cases import oracle_log_odds, oracle_p, oracle_steered

# Pictures.


def axes_of(name: str) -> Any:
    return ufm_pictures.figure(name).axes[0]


def texts(path: Path) -> str:
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    found = root.iter("{http://www.w3.org/2000/svg}text")
    return "\n".join("".join(element.itertext()) for element in found)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return ufm_pictures.save_pictures(tmp_path_factory.mktemp("theory") / "new")


def test_pictures_are_png_and_svg_with_their_words_as_text(pictures: list[Path]) -> None:
    names = [f"figure-{n}.{kind}" for n in ("3", "4", "5", "b1") for kind in ("png", "svg")]
    assert [path.name for path in pictures] == names
    assert sorted(path.name for path in pictures[0].parent.iterdir()) == sorted(names)
    for path in pictures[::2]:
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
    words = {path.stem: texts(path) for path in pictures[1::2]}
    for text in words.values():
        assert "steering strength α" in text
    for name in ("figure-3", "figure-b1"):
        assert "probability gained, Δp" in words[name]
        assert "c, target: rises with α" in words[name]
        assert "C, off-target: falls with α" in words[name]
        assert "peak α_(j,z)" in words[name]
    peaks = ufm_pictures.example().peaks()[ufm_pictures.CONTEXT]
    assert f"b, target: α = {peaks[1]:.3g}" in words["figure-3"]
    assert f"B, off-target: α = −{-peaks[4]:.3g}" in words["figure-b1"]
    for label in ("lower case, target", "capitals, off-target", "limits for α → ±∞"):
        assert label in words["figure-4"]
    curvature = ufm_pictures.example().curvature()[0]
    assert f"½ · {curvature:.3f} · α², Theorem 3.8" in words["figure-5"]
    assert "nats per token" in words["figure-5"]


def test_pictures_are_the_same_each_time_and_never_overwrite(
    pictures: list[Path], tmp_path: Path
) -> None:
    directory = pictures[0].parent
    with pytest.raises(TrimtabError, match=r"figure-3.png exists: choose another"):
        ufm_pictures.save_pictures(directory)
    (tmp_path / "figure-b1.svg").write_text("mine")
    with pytest.raises(TrimtabError, match="exists"):
        ufm_pictures.save_pictures(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["figure-b1.svg"]  # nothing begun
    for path in ufm_pictures.save_pictures(tmp_path, overwrite=True):
        assert path.read_bytes() == (directory / path.name).read_bytes()


def test_pictures_need_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrimtabError, match="cannot write to .*file"):
        ufm_pictures.save_pictures(tmp_path / "file")


@pytest.mark.parametrize(("name", "low", "high"), [("figure-3", 0, 60), ("figure-b1", -60, 0)])
def test_token_pictures_draw_the_theory_and_mark_each_peak(name: str, low: int, high: int) -> None:
    axes, steered = axes_of(name), ufm_pictures.example()
    assert axes.get_xlim() == (low, high)
    curves = [line for line in axes.lines if len(line.get_xdata()) > 100]
    assert len(curves) == 9
    for z, line in enumerate(curves):
        for place in (10, 300, 1190):
            alpha = line.get_xdata()[place]
            expected = (oracle_steered(steered, alpha) - oracle_p(steered.data))[8, z]
            assert line.get_ydata()[place] == pytest.approx(expected, abs=1e-12)
    dots = sorted(line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o")
    peaks = steered.peaks()[8]
    assert dots == pytest.approx(sorted(peaks[(low < peaks) & (peaks < high)]))


def test_token_pictures_show_what_the_papers_show() -> None:
    steered, context = ufm_pictures.example(), ufm_pictures.CONTEXT
    above = steered.delta_p(np.linspace(0, 60, 301), context)
    below = steered.delta_p(np.linspace(-60, 0, 301), context)
    turns = above.argmax(0)
    assert 0 < turns[0] < turns[1] < 300  # two target tokens peak,
    assert above[turns[1], 1] > 0.3  # visibly,
    assert turns[2] == 300  # one rises,
    assert above[-1, 2] > 0.9
    assert np.all(turns[3:] == 0)  # all others only fall
    turns = below.argmax(0)
    assert np.all(turns[:3] == 300)  # the targets only rise
    assert turns[5] == 0  # one other falls,
    assert 0 < turns[4] < turns[3] < 300  # the rest peak
    assert below[turns[4], 4] > 0.3


def test_the_concept_picture_shows_three_courses_and_their_limits() -> None:
    axes = axes_of("figure-4")
    assert axes.get_xlim() == (-5, 5)
    target, falling, other = (line for line in axes.lines if len(line.get_xdata()) > 100)
    rise, fall, bump = (line.get_ydata() for line in (target, falling, other))
    assert np.all(np.diff(rise) > 0)
    assert np.all(np.diff(fall) < 0)
    # By hand: what the concepts have to begin with is ε/2, ε/2 and 1 - ε.
    assert (rise[0], rise[-1]) == pytest.approx((-0.025 / 3, 0.975 / 3), abs=0.003)
    assert (fall[0], fall[-1]) == pytest.approx((0.975 / 3, -0.025 / 3), abs=0.003)
    assert (bump[0], bump[-1]) == pytest.approx((-0.95 / 3, -0.95 / 3), abs=0.003)
    assert abs(bump[200]) < 1e-12
    marks = [(line.get_marker(), line.get_ydata()[0]) for line in axes.lines]
    ends = [value for marker, value in marks if marker in ("<", ">")]
    expected = [-0.025 / 3, 0.975 / 3, 0.975 / 3, -0.025 / 3, -0.95 / 3, -0.95 / 3]
    assert ends == pytest.approx(expected, abs=1e-12)


def test_the_cross_entropy_picture_has_the_parabola_of_theorem_3_8() -> None:
    axes = axes_of("figure-5")
    assert axes.get_xlim() == (-1, 1)
    curve, parabola = axes.lines
    steered = ufm_pictures.example()
    alphas = curve.get_xdata()
    assert curve.get_ydata() == pytest.approx(steered.delta_cross_entropy(alphas))
    M, p = oracle_log_odds(steered), oracle_p(steered.data)
    variance = np.mean([np.average((M - row @ M) ** 2, weights=row) for row in p])
    assert parabola.get_ydata() == pytest.approx(variance / 2 * alphas**2)


def test_facts_are_the_numbers_of_the_pictures() -> None:
    facts = json.loads(json.dumps(ufm_pictures.facts(), allow_nan=False))
    assert facts["uniform"]["entropy"] == pytest.approx(1.3318, abs=5e-5)
    assert facts["uniform"]["trained_loss"] == pytest.approx(1.3318, abs=5e-5)
    assert facts["trained_loss"] == pytest.approx(facts["entropy"], abs=1e-8)
    assert facts["fitted_curvature"] == pytest.approx(facts["curvature"], rel=1e-5)
    steered = ufm_pictures.example()
    assert facts["curvature"] == pytest.approx(float(steered.curvature()[0]))
    courses = [token["course"] for token in facts["tokens"]]
    assert courses == ["peaks", "peaks", "rises", "peaks", "peaks", "falls", *["peaks"] * 3]
    for z, token in enumerate(facts["tokens"]):
        assert token["log_odds"] == pytest.approx(oracle_log_odds(steered)[z])
        assert (token["peak"] is None) == (token["course"] != "peaks")
        if token["peak"] is not None:
            assert token["peak"] == pytest.approx(steered.peaks()[8, z])
    assert [concept["limits"] for concept in facts["concepts"]] == [
        pytest.approx([0, 1], abs=1e-12),
        pytest.approx([1, 0], abs=1e-12),
        pytest.approx([0, 0], abs=1e-12),
    ]
