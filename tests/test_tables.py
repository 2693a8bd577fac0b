"""Tables of results: how figures are read in them, as CSV, as LaTeX, and as files beside a page."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from trimtab.figures import Difference, Result, metric_of, with_unit, words_for
from trimtab.reports import (
    Run,
    Table,
    cell,
    change_words,
    difference_cell,
    run_page,
    save_blocks,
)
from trimtab.reports.charts import panels
from trimtab.reports.page import Picture
from trimtab.reports.run import check_overwritable
from trimtab.reports.tables import number_text

ENVIRONMENT = {"date": "2026-01-02T03:04:05+00:00"}


def a_result(metric: str, value: float | None, *ci95: float) -> Result:
    return Result("copa", "", metric, value, 24, ci95 or None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "value", "ci95", "says"),
    [
        ("accuracy", 2 / 24, (0.01487, 0.3539), "8.3 % [1.5, 35.4]"),
        ("attack_success (phrases)", 1.0, (0.8, 1.0), "100.0 % [80.0, 100.0]"),
        ("repetition_4gram", 0.0312, (), "3.1 %"),
        ("log_odds", -1.23456, (-2.0, 0.5), "-1.23 [-2, 0.5]"),
        ("perplexity", 12345.6, (999.4, 2e6), "12,346 [999, 2,000,000]"),
        ("acc,none", 0.08333, (0.01, 0.354), "0.0833 [0.01, 0.354]"),  # of another program
        ("accuracy", None, (), ""),
    ],
)
def test_figures_are_for_people(metric: str, value: Any, ci95: Any, says: str) -> None:
    assert cell(a_result(metric, value, *ci95), metric) == says


def test_differences_of_shares_are_points() -> None:
    found = Difference(0.08333, (-0.01, 0.2), 24, p=0.03, metric="accuracy", task="copa")
    assert difference_cell(found) == "+8.3 points [-1.0, 20.0]"
    assert change_words(found) == "+8.3 points [-1.0, 20.0], clear of chance"  # by its test
    nats = Difference(-0.5, (-0.9, 0.1), 24)
    assert change_words(nats, "log_odds") == "-0.5 nats [-0.9, 0.1], no more than chance makes"
    assert difference_cell(None) == ""


def test_metrics_have_names_for_people() -> None:
    assert with_unit("log_odds") == "log-odds, nats"
    assert with_unit("accuracy") == "accuracy"
    assert words_for("attack_success (phrases)") == "attack success (phrases)"
    assert words_for("exact_match") == "exact match"
    assert metric_of("accuracy").is_share
    assert not metric_of("log_odds").is_share


@pytest.mark.parametrize(
    ("value", "says"),
    [(0, "0"), (94.14, "94.1"), (1234.5, "1,234"), (-0.00012345, "-0.000123"), (2e9, "2e+09")],
)
def test_numbers_have_three_digits(value: float, says: str) -> None:
    assert number_text(value) == says


TABLE = Table(
    "Log-odds, 100 % & more",
    ["steering", "value", "n_rows"],
    [
        [
            "layers.12.ffn_out @ α=8 {x}",
            cell(a_result("accuracy", 1 / 3, 0.1, 0.6), "accuracy"),
            24,
        ],
        ["unsteered, \\plain", "", 24],
    ],
    "p_1 < 0.05 ‖ q\nsecond line",
)


def test_csv_has_every_number_whole() -> None:
    rows = list(csv.reader(io.StringIO(TABLE.to_csv())))
    assert rows[0] == ["steering", "value", "value, low", "value, high", "n_rows"]
    assert rows[1][0] == "layers.12.ffn_out @ α=8 {x}"
    assert [float(number) for number in rows[1][1:4]] == [1 / 3, 0.1, 0.6]
    assert rows[2] == ["unsteered, \\plain", "", "", "", "24"]


def test_latex_is_escaped_and_has_the_rules_of_booktabs() -> None:
    latex = TABLE.to_latex()
    lines = latex.splitlines()
    assert lines[:2] == ["% Log-odds, 100 % & more", "% p_1 < 0.05 ‖ q second line"]
    assert lines[2] == r"\begin{tabular}{lrr}"
    assert [line for line in lines if line.endswith("rule")] == [
        r"\toprule", r"\midrule", r"\bottomrule",
    ]  # fmt: skip
    assert r"layers.12.ffn\_out @ $\alpha$=8 \{x\} & 33.3 \% [10.0, 60.0] & 24 \\" in lines
    assert r"unsteered, \textbackslash{}plain &  & 24 \\" in lines
    rows = [line for line in lines if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {2}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no LaTeX here")
def test_latex_compiles(tmp_path: Path) -> None:
    text = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "t.tex").write_text(text + TABLE.to_latex() + "\\end{document}\n")
    subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True)


# -- files beside the page ------------------------------------------------------------------------


def a_picture() -> Picture:
    figure, (axes,) = panels((3, 2))
    axes.plot([1, 2])
    return Picture("A line", "line", figure, "a line")


def test_a_run_has_its_tables_as_files_and_the_page_names_them(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with Run(directory, {"task": "copa"}) as run:
        blocks = [TABLE, a_picture(), TABLE]
        run.finish({}, lambda found: run_page(run, found, "Title", "sub", blocks, summary="Found."))
    names = sorted(str(file.relative_to(directory)) for file in directory.glob("*/*"))
    assert names == [
        "pictures/line.png", "pictures/line.svg",
        "tables/log-odds-100-more-2.csv", "tables/log-odds-100-more-2.tex",
        "tables/log-odds-100-more.csv", "tables/log-odds-100-more.tex",
    ]  # fmt: skip
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<a href="([^"]+)">\1</a>', page) != []
    for name in re.findall(r'href="([^"]+)"', page):
        assert (directory / name).is_file()
    assert '<p class="found">Found.</p>' in page
    csv_file = directory / "tables" / "log-odds-100-more.csv"
    assert csv_file.read_text(encoding="utf-8") == TABLE.to_csv()
    tex = csv_file.with_suffix(".tex").read_text(encoding="utf-8")
    assert tex.endswith(TABLE.to_latex())
    assert tex.startswith("% ")


def test_overwriting_takes_away_the_tables_of_before_and_nothing_else(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with Run(directory, {"task": "copa"}) as run:
        run.begin()
        save_blocks([TABLE], directory)
    (directory / "tables" / "mine.csv").write_text("mine")
    (directory / "tables" / "mine.tex").write_text("mine")
    check_overwritable(directory)
    with Run(directory, {"task": "other"}, overwrite=True) as run:
        run.begin()
    assert sorted(file.name for file in (directory / "tables").iterdir()) == [
        "mine.csv", "mine.tex",
    ]  # fmt: skip
