"""Tasks of lm-evaluation-harness as records: one for every example, and figures that are the
harness's."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

import trimtab as tt
import trimtab.evaluation.harness.run
from harness_models import (
    CHOICE,
    CONTEXTS,
    LONG,
    choice_rows,
    evaluated,
    hf,
    likelihoods,
    lm,
    no_survey,
    same_likelihoods,
    write_task,
)
from helpers import refused_in_one_line
from trimtab.evaluation.harness.model import TrimtabLM
from trimtab.evaluation.harness.run import run_task

__all__ = ["lm", "no_survey"]  # fixtures, which pytest finds by their names here

# -- tasks as records --------------------------------------------------------------------------


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness without task files of its own, which take long to read."""
    monkeypatch.setattr(
        trimtab.evaluation.harness.run,
        "TaskManager",
        lambda include_path=None, include_defaults=True: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    trimtab.evaluation.harness.run._own_manager.cache_clear()


def test_every_example_leaves_a_record(lm: tt.LanguageModel, tmp_path: Path) -> None:
    rows = choice_rows(5)
    manager = write_task(tmp_path, "toy", rows, **CHOICE)
    theirs = evaluated(hf(lm), "toy", manager)["samples"]["toy"]
    records = run_task("toy", TrimtabLM(lm), task_files=[tmp_path])
    assert [record["id"] for record in records] == [f"toy-{i}" for i in range(5)]
    assert [record["index"] for record in records] == [*range(5)]
    for row, record, sample in zip(rows, records, theirs, strict=True):
        assert record["prompt"] == f"Question: {row['question']}\nAnswer:"
        assert record["target"] == row["gold"]
        pairs = [tuple(response[0]) for response in sample["resps"]]
        same_likelihoods([tuple(one) for one in record["output"]], pairs)
        assert record["prediction"] == max(range(len(pairs)), key=lambda i: pairs[i][0])
        assert record["values"] == {name: float(sample[name]) for name in ("acc", "acc_norm")}
        assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert len(run_task("toy", TrimtabLM(lm), task_files=[tmp_path], limit=2)) == 2


def test_numbers_that_json_lacks_leave_a_record_too(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As logits beyond float16 give them."""
    model = TrimtabLM(lm)
    monkeypatch.setattr(model, "loglikelihood", lambda asked: [(-math.inf, False) for _ in asked])
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE)
    for record in run_task("toy", model, task_files=[tmp_path]):
        assert record["output"][0] == ["-Infinity", False]
        assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_examples_in_prompts_are_those_of_the_harness(lm: tt.LanguageModel, tmp_path: Path) -> None:
    manager = write_task(tmp_path, "toy", choice_rows(12), **CHOICE)
    theirs = evaluated(hf(lm, batch_size=12), "toy", manager, num_fewshot=2)["samples"]["toy"]
    records = run_task("toy", TrimtabLM(lm), task_files=[tmp_path], few_shot=2)
    assert [r["prompt"] for r in records] == [s["arguments"][0][0] for s in theirs]
    assert all(record["prompt"].count("Question:") == 3 for record in records)
    other = run_task("toy", TrimtabLM(lm), task_files=[tmp_path], few_shot=2, seed=1)
    assert [r["prompt"] for r in other] != [r["prompt"] for r in records]


def test_examples_that_a_task_never_takes_are_warned_of(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE, num_fewshot=0)
    with pytest.warns(tt.TrimtabWarning, match="toy always has 0 examples in its prompts, not 3"):
        run_task("toy", TrimtabLM(lm), task_files=[tmp_path], few_shot=3)


def test_a_figure_that_is_no_mean_is_the_harnesss(lm: tt.LanguageModel, tmp_path: Path) -> None:
    """Perplexity is exp of a mean; the examples have its logarithm under the same name."""
    metrics = [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ]
    rows = [{"text": context, "end": " yes"} for context in CONTEXTS]
    options = {"output_type": "loglikelihood", "doc_to_text": "text", "doc_to_target": "end"}
    manager = write_task(tmp_path, "likely", rows, **options, metric_list=metrics)
    theirs = evaluated(hf(lm), "likely", manager)
    *examples, last = run_task("likely", TrimtabLM(lm), task_files=[tmp_path])
    assert len(examples) == 5
    assert all(set(record["values"]) == {"acc"} for record in examples)
    assert set(last["figures"]) == {"perplexity"}
    logs = [pair[0] for pair in likelihoods(hf(lm), [(row["text"], " yes") for row in rows])]
    assert last["figures"]["perplexity"] == pytest.approx(math.exp(-sum(logs) / 5), rel=1e-3)
    reported = theirs["results"]["likely"]["perplexity,none"]
    assert last["figures"]["perplexity"] == pytest.approx(reported, rel=1e-3)
    assert last["n"] == 5
    assert last["values"] == {}


def test_word_perplexity_is_the_harnesss(lm: tt.LanguageModel, tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("The ship left the harbour.", LONG, "Yes.")]
    options = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    manager = write_task(tmp_path, "pages", rows, **options)
    theirs = evaluated(hf(lm), "pages", manager)["results"]["pages"]
    last = run_task("pages", TrimtabLM(lm), task_files=[tmp_path])[-1]
    assert set(last["figures"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    for name, value in last["figures"].items():
        assert value == pytest.approx(theirs[f"{name},none"], rel=1e-4)


def test_a_text_that_is_read_in_two_ways_is_one_record(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    def first(pattern: str) -> list[dict[str, str]]:
        return [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]

    filters = [
        {"name": "word", "filter": first(r"([a-z]+)")},
        {"name": "digit", "filter": first(r"([0-9])")},
    ]
    rows = [{"text": context, "end": "7"} for context in CONTEXTS]
    manager = write_task(
        tmp_path,
        "texts",
        rows,
        output_type="generate_until",
        doc_to_text="text",
        doc_to_target="end",
        filter_list=filters,
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    theirs = evaluated(hf(lm, batch_size=5), "texts", manager)
    records = run_task("texts", TrimtabLM(lm), task_files=[tmp_path])
    assert len(records) == 5
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in theirs["samples"]["texts"]}
    assert [record["output"] for record in records] == [texts[i] for i in range(5)]
    for i, record in enumerate(records):
        own = {s["filter"]: s for s in theirs["samples"]["texts"] if s["doc_id"] == i}
        assert record["prediction"] == {name: s["filtered_resps"][0] for name, s in own.items()}
        assert record["values"] == {
            f"exact_match ({name})": float(s["exact_match"]) for name, s in own.items()
        }


def test_tasks_that_cannot_be_run_are_refused_in_one_line(
    lm: tt.LanguageModel, tmp_path: Path, few_tasks: None
) -> None:
    model = TrimtabLM(lm)
    refused_in_one_line(lambda: run_task("no_task", model), "lm-eval has no task 'no_task'")
    missing = tmp_path / "missing"
    refused_in_one_line(lambda: run_task("toy", model, task_files=[missing]), "not a directory")
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE | {"doc_to_choice": "{{no_column}}"})
    refused_in_one_line(lambda: run_task("toy", model, task_files=[tmp_path]), "task toy cannot be")
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE)
    (tmp_path / "toy.jsonl").unlink()
    refused_in_one_line(lambda: run_task("toy", model, task_files=[tmp_path]), "task toy cannot be")
    (tmp_path / "toy.yaml").write_text("task: toy\ntest_split: [test\n")
    refused_in_one_line(
        lambda: run_task("toy", model, task_files=[tmp_path]), r"toy.yaml is not YAML: .*line 3"
    )


def test_warnings_are_seen_where_bars_are_not(
    lm: tt.LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": LONG, "options": ["yes", "no"], "gold": 0}]
    write_task(tmp_path, "toy", rows, **CHOICE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_task("toy", TrimtabLM(lm), task_files=[tmp_path])
    assert ["2 of 2 prompts are longer" in str(one.message) for one in caught] == [True]
    assert "it/s" not in capsys.readouterr().err


def test_the_harnesss_own_files_are_read_only_where_they_are_needed(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def manager(include_path: Any = None, include_defaults: bool = True) -> TaskManager:
        wanted.append(include_defaults)
        return TaskManager(include_path=include_path, include_defaults=False)

    wanted: list[bool] = []
    monkeypatch.setattr(trimtab.evaluation.harness.run, "TaskManager", manager)
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE)
    write_task(tmp_path, "more", choice_rows(1), **CHOICE)
    for name, parts in {"both": ["toy", "more"], "mixed": ["toy", "arc_easy"]}.items():
        content = json.dumps({"group": name, "task": parts})
        (tmp_path / f"{name}.yaml").write_text(content)
    assert len(run_task("toy", TrimtabLM(lm), task_files=[tmp_path])) == 2
    records = run_task("both", TrimtabLM(lm), task_files=[tmp_path])
    assert [record["id"] for record in records] == ["toy-0", "toy-1", "more-0"]
    assert wanted == [False, False]
    with pytest.raises(tt.TrimtabError):
        run_task("mixed", TrimtabLM(lm), task_files=[tmp_path])
    assert wanted == [False, False, False, True]
