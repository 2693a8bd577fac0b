"""What the page of an evaluation shows: the metric over the dial, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from commands import write_rows
from helpers import add, language_model, steer
from trimtab.evaluation.shown_page import pictures_of
from trimtab.reports import charts

PAIRS = [
    {"prompt": f"Day {i} was", "positive": f" good {i}", "negative": f" bad {i}", "part": "test"}
    for i in range(8)
]


@pytest.fixture
def contrast(tmp_path: Path) -> str:
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return f"contrast:{tmp_path / 'pairs.jsonl'}"


def steering(lm: tt.LanguageModel, seed: int = 1) -> tt.Steering:
    return steer(lm, ("layers.1.resid", add(lm.anatomy.hidden_size, seed, 0.5)))


def test_a_metric_over_the_dial_with_its_intervals(
    tmp_path: Path, contrast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model("llama")
    dials = {f"one.safetensors@{i}": steering(lm).at(i) for i in (2, 0, 1, 3)}
    drawn: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        "trimtab.evaluation.shown_page.curve",
        lambda axes, lines, base, **labels: (
            drawn.append((lines, base)) or charts.curve(axes, lines, base, **labels)
        ),
    )
    done = tt.evaluate(lm, contrast, steering=dials, output=tmp_path / "run")
    metrics = list(dict.fromkeys(result.metric for result in done.results))[:4]
    assert len(drawn) == len(metrics)
    for metric, (lines, base) in zip(metrics, drawn, strict=True):
        (line,) = lines
        assert list(line.at) == [0, 1, 2, 3]
        task = done.results[0].task
        for dial, figure in zip(line.at, line.figures, strict=True):
            expected = done.value(task, metric, f"one.safetensors@{dial:g}")
            assert (figure.value, (figure.low, figure.high)) == (expected.value, expected.ci95)
        assert base.value == done.value(task, metric).value
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 1
    assert "over the dial" in page
    assert {file.suffix for file in (tmp_path / "run" / "pictures").iterdir()} == {".png", ".svg"}
    tt.evaluate(lm, contrast, output=tmp_path / "run", overwrite=True)
    assert not list((tmp_path / "run" / "pictures").iterdir())
    assert "<img" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_one_dial_or_different_steerings_are_no_curve(contrast: str) -> None:
    lm = language_model("llama")
    subjects: dict[str | None, Any] = {None: None, "a": steering(lm), "b": steering(lm, 2)}
    named = {name: one for name, one in subjects.items() if name}
    done = tt.evaluate(lm, contrast, steering=named)
    assert pictures_of(done, subjects) == []
    two = {None: None, "a": steering(lm).at(1), "b": steering(lm).at(2), "c": steering(lm, 2)}
    again = tt.evaluate(lm, contrast, steering={name: one for name, one in two.items() if name})
    assert len(pictures_of(again, two)) == 1


def test_what_is_written_stands_in_the_page_and_the_results(tmp_path: Path) -> None:
    lm = language_model("llama", max_position_embeddings=1024)
    write_rows(tmp_path / "asked.jsonl", [{"prompt": f"Tell me of day {i}"} for i in range(5)])
    task = f"coherence:{tmp_path / 'asked.jsonl'}"
    dials = {f"one@{i}": steering(lm).at(i) for i in range(1, 6)}
    done = tt.evaluate(lm, task, steering=dials, max_new_tokens=4, output=tmp_path / "run")
    samples = done.as_json()["samples"]
    assert [len(sample["outputs"]) for sample in samples] == [3, 3, 3]
    written = {(r["index"], r["steering"]): r["output"] for r in done.records}
    for index, sample in enumerate(samples):
        names = [output["steering"] for output in sample["outputs"]]
        assert names == [None, "one@3", "one@5"]  # unsteered, in the middle, the last
        for output in sample["outputs"]:
            assert output["text"] == written[index, output["steering"]]
    saved = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert saved["samples"] == json.loads(json.dumps(samples))
    assert "What is written" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    few = tt.evaluate(lm, task, steering={"one": steering(lm)}, max_new_tokens=4, limit=2)
    assert [len(sample["outputs"]) for sample in few.samples()] == [2, 2]
