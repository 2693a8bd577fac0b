"""Evaluations on local rows of lm-evaluation-harness: tiny tasks are weighted by their anchors, no
row is ever a stale one, and an interruption changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks import TaskManager

import trimtab as tt
import trimtab.evaluation.harness.run
from harness_rows import (
    FILES,
    HARNESS,
    SUBJECTS,
    Row,
    asked,
    data,
    gsm8k_rows,
    limit_of_the_tokenizer,
    mmlu_rows,
    no_survey,
    truthfulqa_rows,
    write,
)
from helpers import language_model, operator, plain_logits, refused_in_one_line, steer, token_ids
from trimtab.evaluation.harness.local_rows import local_task_files

__all__ = [
    "data",
    "limit_of_the_tokenizer",
    "no_survey",
]  # fixtures, which pytest finds by their names here


@pytest.fixture
def lm() -> tt.LanguageModel:
    """A tiny model that takes prompts with many examples."""
    lm = language_model("llama", max_position_embeddings=8192)
    lm.tokenizer.model_max_length = 8192
    return lm


# -- figures -----------------------------------------------------------------------------------


def is_right(lm: tt.LanguageModel, row: Row) -> float:
    """Whether the right letter is the most probable of four, on a prompt written by hand."""
    subject = row["subject"]
    prompt = "The following are multiple choice questions (with answers) about "
    prompt += subject.replace("_", " ") + ".\n\n"
    own = [one for one in FILES["mmlu/dev.jsonl"] if one["subject"] == subject][:5]
    for one in [*own, row]:
        a, b, c, d = one["choices"]
        prompt += f"{one['question'].strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
        if one is not row:
            prompt += f" {'ABCD'[one['answer']]}\n\n"
    scores = []
    for letter in "ABCD":
        ids, start = token_ids(f"{prompt} {letter}"), len(token_ids(prompt))
        log_p = plain_logits(lm.model, ids).double().log_softmax(-1)
        scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
    return float(max(range(4), key=scores.__getitem__) == row["answer"])


def test_the_estimate_of_a_tiny_task_is_weighted_by_its_anchors(
    lm: tt.LanguageModel, data: Path
) -> None:
    anchors = [
        {"scenario": "mmlu", "item": item, "weight": weight}
        for item, weight in ((3, 0.3), (50, 0.05), (17, 0.25), (71, 0.1), (30, 0.2), (113, 0.1))
    ]
    other = {"scenario": "arc", "item": 0, "weight": 1.0}
    write(data / "tinybenchmarks/anchors.jsonl", [other, *anchors])
    right = [is_right(lm, FILES["mmlu/test.jsonl"][anchor["item"]]) for anchor in anchors]
    weights = [anchor["weight"] for anchor in anchors]
    expected = sum(w * r for w, r in zip(weights, right, strict=True)) / sum(weights)
    assert expected not in (0.0, 1.0, sum(right) / 6)  # or weights would not show
    evaluation = tt.evaluate(lm, "lm-eval:tinyMMLU", data=data)
    result = evaluation.value("lm-eval:tinyMMLU", "acc")
    assert result.value == pytest.approx(expected, abs=1e-9)
    assert result.n == 6
    assert [record["weight"] for record in evaluation.records] == weights
    assert [record["values"]["acc"] for record in evaluation.records] == right


def test_a_steered_tiny_task_is_compared_by_weight(lm: tt.LanguageModel, data: Path) -> None:
    steering = steer(lm, ("layers.1.resid", operator("Add", lm.anatomy.hidden_size))).at(8)
    found = tt.evaluate(lm, "lm-eval:tinyTruthfulQA", data=data, steering={"a lot": steering})
    plain, steered = (
        [r["values"]["acc"] for r in found.records if r["steering"] == name]
        for name in (None, "a lot")
    )
    weights = [0.5, 0.125, 0.375]
    moved = sum(w * (b - a) for w, a, b in zip(weights, plain, steered, strict=True))
    assert moved != pytest.approx(0.0, abs=1e-6)
    (comparison,) = found.comparisons
    assert comparison.difference == pytest.approx(moved, abs=1e-9)


@pytest.mark.slow
def test_mmlu_is_all_of_its_subjects(lm: tt.LanguageModel, data: Path, tmp_path: Path) -> None:
    found = tt.evaluate(lm, "lm-eval:mmlu", data=data)
    assert len(found.records) == 114
    ids = {record["id"] for record in found.records}
    assert ids == {f"mmlu_{subject}-{i}" for subject in SUBJECTS for i in range(2)}
    assert sorted(record["index"] for record in found.records) == [*range(114)]
    golds = {f"mmlu_{row['id']}": row["answer"] for row in FILES["mmlu/test.jsonl"]}
    assert {record["id"]: record["target"] for record in found.records} == golds
    right = [record["values"]["acc"] for record in found.records]
    result = found.value("lm-eval:mmlu", "acc")
    assert (result.value, result.n) == (pytest.approx(sum(right) / 114), 114)


def test_a_group_of_mmlu_needs_no_other(lm: tt.LanguageModel, data: Path) -> None:
    stem = [one for one in SUBJECTS if "physics" in one or one in _REST_OF_STEM]
    write(data / "mmlu/test.jsonl", mmlu_rows("the test", 1, stem))
    write(data / "mmlu/dev.jsonl", mmlu_rows("development", 1, stem))
    found = tt.evaluate(lm, "lm-eval:mmlu_stem", data=data)
    assert {record["id"] for record in found.records} == {f"mmlu_{one}-0" for one in stem}
    refused_in_one_line(
        lambda: tt.evaluate(lm, "lm-eval:mmlu", data=data), "rows of MMLU lack the subject"
    )


#: What the harness counts to science beside physics.
_REST_OF_STEM = (
    "abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry",
    "college_computer_science", "college_mathematics", "computer_security",
    "electrical_engineering", "elementary_mathematics", "high_school_biology",
    "high_school_chemistry", "high_school_computer_science", "high_school_mathematics",
    "high_school_statistics", "machine_learning",
)  # fmt: skip


def test_records_have_what_a_reader_wants(lm: tt.LanguageModel, data: Path) -> None:
    tasks = ["lm-eval:truthfulqa_mc1", "lm-eval:winogrande"]
    found = tt.evaluate(lm, tasks, data=data, limit=2)
    truth, grande = found.records[:2], found.records[2:]
    assert [record["target"] for record in truth] == [0, 0]
    assert truth[0]["prompt"].endswith("Q: Does bread sing on day 0?\nA:")
    assert len(truth[0]["output"]) == 3  # a likelihood of each option
    assert set(truth[0]["values"]) == {"acc"}
    assert grande[1]["prompt"] == "Ann thanked Mary in the test 1, because Ann"
    assert grande[1]["target"] == "had baked the bread."
    assert all(record["prediction"] in (0, 1, 2) for record in found.records)


# -- whose task files --------------------------------------------------------------------------


def test_the_users_own_task_files_come_first(
    lm: tt.LanguageModel, data: Path, tmp_path: Path
) -> None:
    rows = write(tmp_path / "own/rows.jsonl", [{"text": "Is bread made of flour?", "end": "yes"}])
    task = {
        "task": "arc_challenge",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "c")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_target": "end",
        "doc_to_choice": ["no", "yes"],
    }
    (tmp_path / "own/mine.yaml").write_text(json.dumps(task))
    found = tt.evaluate(lm, "lm-eval:arc_challenge", data=data, task_files=[tmp_path / "own"])
    assert [record["prompt"] for record in found.records] == ["Is bread made of flour?"]


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("arc_challenge", "arc_challenge/train.jsonl"),
        ("gsm8k", "gsm8k/test.jsonl"),
        ("winogrande", "winogrande/dev.jsonl"),
        ("truthfulqa_mc2", "truthfulqa/mc.jsonl"),
        ("mmlu", "mmlu/dev.jsonl"),
        ("mmlu_anatomy", "mmlu/test.jsonl"),
        ("tinyArc", "tinybenchmarks/anchors.jsonl"),
        ("tinyMMLU", "tinybenchmarks/anchors.jsonl"),
    ],
)
def test_without_the_rows_nothing_is_written(
    name: str, lacking: str, data: Path, tmp_path: Path
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    (data / lacking).unlink()
    assert not local_task_files(name, str(data), room)
    assert not local_task_files(name, None, room)  # no directory is named
    assert not list(room.iterdir())


@pytest.mark.parametrize(
    "name", ["hellaswag", "arc_easy", "mmlu_pro", "mmlu_generative", "mmlu_anatomy_generative", "m"]
)
def test_other_tasks_are_left_to_the_harness(name: str, data: Path, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    assert not local_task_files(name, str(data), room)
    assert not list(room.iterdir())


def test_without_rows_and_network_it_is_one_line(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**options: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\n(and a long story)")

    own = TaskManager(include_path=[str(HARNESS / "arc")], include_defaults=False)
    monkeypatch.setattr(
        trimtab.evaluation.harness.run, "_own_manager", lambda: own
    )  # all of them take long
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    output = tmp_path / "run"
    refused_in_one_line(
        lambda: tt.evaluate(lm, "lm-eval:arc_challenge", output=output),
        "arc_challenge cannot be run: ConnectionError: Couldn't reach",
    )


@pytest.mark.parametrize(
    ("name", "file", "changed", "says"),
    [
        ("arc_challenge", "arc_challenge/test.jsonl", {"answer": 3}, "'answer' is 3, one of 3"),
        ("arc_challenge", "arc_challenge/train.jsonl", {"answer": -1}, "'answer' is -1"),
        ("arc_challenge", "arc_challenge/test.jsonl", {"answer": "B"}, "must be a whole number"),
        ("arc_challenge", "arc_challenge/test.jsonl", {"choices": ["a", 2]}, "must be text"),
        ("tinyArc", "arc_challenge/test.jsonl", {"choices": []}, "one of 0 choices"),
        ("gsm8k", "gsm8k/train.jsonl", {"answer": 7}, "'answer' must be text"),
        ("winogrande", "winogrande/dev.jsonl", {"sentence": "No blank."}, "has no _ to fill in"),
        ("winogrande", "winogrande/dev.jsonl", {"answer": 0}, "'answer' must be 1 or 2, not 0"),
        ("truthfulqa_mc1", "truthfulqa/mc.jsonl", {"mc1_labels": [0, 1, 0]}, "the first of 'mc1"),
        ("truthfulqa_mc1", "truthfulqa/mc.jsonl", {"mc1_labels": [1, 1, 0]}, "and no other"),
        ("truthfulqa_mc2", "truthfulqa/mc.jsonl", {"mc2_labels": [1]}, "0 or 1 for each"),
        ("truthfulqa_mc2", "truthfulqa/mc.jsonl", {"mc2_labels": [1, 0, "x"]}, "0 or 1 for each"),
        ("mmlu_anatomy", "mmlu/test.jsonl", {"choices": ["a", "b"]}, "must be 4 answers, not 2"),
        ("mmlu", "mmlu/dev.jsonl", {"answer": 4}, "'answer' is 4, one of 4 choices"),
        ("tinyMMLU", "mmlu/test.jsonl", {"subject": None}, "'subject' must be text"),
    ],
)
def test_a_bad_row_is_one_line(
    name: str, file: str, changed: Row, says: str, data: Path, tmp_path: Path
) -> None:
    rows = [dict(row) for row in FILES[file]]
    rows[3] = FILES[file][3] | changed if "choices" in changed else FILES[file][0] | changed
    write(data / file, rows)
    where = f"{Path(file).name}, row 4: .*{says}"
    refused_in_one_line(lambda: local_task_files(name, str(data), tmp_path), where)


def test_bad_files_are_one_line(data: Path, tmp_path: Path) -> None:
    def run(name: str) -> Callable[[], Any]:
        return lambda: local_task_files(name, str(data), tmp_path)

    anchors = data / "tinybenchmarks/anchors.jsonl"
    write(anchors, [{"scenario": "arc", "item": 12, "weight": 1.0}])
    refused_in_one_line(run("tinyArc"), "row 1: item 12 of 12 rows")
    refused_in_one_line(run("tinyGSM8k"), "has no anchors of gsm8k")
    write(anchors, [{"scenario": "arc", "item": 1}])
    refused_in_one_line(run("tinyArc"), "row 1: 'weight' is missing")
    (data / "gsm8k/test.jsonl").write_text('{"question": "How')
    refused_in_one_line(run("gsm8k"), "line 1 is not JSON")
    (data / "winogrande/dev.jsonl").write_text("")
    refused_in_one_line(run("winogrande"), "dev.jsonl has no rows")


# -- rows are never stale ----------------------------------------------------------------------


def test_rows_that_change_in_place_are_read_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same path, same time: what a cache by name and time takes for the same file."""
    shared = tmp_path / "hf"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(shared))
    room, found = tmp_path / "room", []
    for number in (1, 2):
        write(data / "gsm8k/test.jsonl", gsm8k_rows(f"year {number}", 2))
        room.mkdir()
        assert local_task_files("gsm8k", str(data), room)
        for file in room.glob("*.jsonl"):
            os.utime(file, (10**9, 10**9))
        found.append(asked("gsm8k", room, num_fewshot=0)[0][0][0][0])
        for file in sorted(room.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        room.rmdir()
    assert ["year 1" in found[0], "year 2" in found[1]] == [True, True]
    assert not shared.exists()  # and nothing of it stays on the disk


def test_rows_that_change_between_evaluations_are_read_anew(
    lm: tt.LanguageModel, data: Path
) -> None:
    prompts = []
    for number in (1, 2):
        write(data / "truthfulqa/mc.jsonl", truthfulqa_rows("", 3)[number:])
        found = tt.evaluate(lm, "lm-eval:truthfulqa_mc1", data=data, limit=1)
        prompts.append(found.records[0]["prompt"])
    assert prompts[0].endswith("day 1?\nA:")
    assert prompts[1].endswith("day 2?\nA:")


# -- an interrupted evaluation -----------------------------------------------------------------


def table(evaluation: tt.Evaluation) -> list[Any]:
    return [*evaluation.results, *evaluation.comparisons]


@pytest.mark.parametrize("kept", [1, 14])
def test_an_interrupted_evaluation_gives_the_same_table(
    kept: int, lm: tt.LanguageModel, data: Path, tmp_path: Path
) -> None:
    steering = steer(lm, ("layers.1.resid", operator("Add", lm.anatomy.hidden_size))).at(3)
    options: dict[str, Any] = {"data": data, "limit": 6, "steering": {"some": steering}}
    tasks = ["lm-eval:truthfulqa_mc2", "lm-eval:tinyArc"]
    whole = tt.evaluate(lm, tasks, output=tmp_path / "run", **options)
    file = tmp_path / "run/records.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 * (6 + 3)
    file.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    passes = []
    handle = lm.anatomy.body.register_forward_hook(lambda *args: passes.append(1))
    again = tt.evaluate(lm, tasks, output=tmp_path / "run", **options)
    handle.remove()
    assert table(again) == table(whole)
    assert not passes  # the model has answered all of it
    found = {(r["task"], r["steering"], r["index"]) for r in again.records}
    assert len(found) == len(again.records) == len(lines)
