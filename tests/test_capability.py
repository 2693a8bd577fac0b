"""Tasks of lm-evaluation-harness on local rows ask what the harness's own tasks ask of the hub's
rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from lm_eval.tasks import TaskManager

from harness_rows import (
    ANCHORS,
    FILES,
    HARNESS,
    SUBJECTS,
    Row,
    asked,
    data,
    limit_of_the_tokenizer,
    no_survey,
    write,
)
from trimtab.evaluation.harness.local_rows import local_task_files

__all__ = [
    "data",
    "limit_of_the_tokenizer",
    "no_survey",
]  # fixtures, which pytest finds by their names here

# -- rows, as the data directory has them and as the hub has them ------------------------------


def arc_of_hub(row: Row) -> Row:
    labels = list("ABCDE")[: len(row["choices"])]
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": "ABCDE"[row["answer"]],
    }


def winogrande_of_hub(row: Row) -> Row:
    return {k: row[k] for k in ("sentence", "option1", "option2")} | {"answer": str(row["answer"])}


def truthfulqa_of_hub(row: Row) -> Row:
    targets = {
        f"{kind}_targets": {"choices": row[f"{kind}_choices"], "labels": row[f"{kind}_labels"]}
        for kind in ("mc1", "mc2")
    }
    return {"question": row["question"]} | targets


def gsm8k_of_hub(row: Row) -> Row:
    return {"question": row["question"], "answer": row["answer"]}


def mmlu_of_hub(row: Row) -> Row:
    return {key: row[key] for key in ("question", "subject", "choices", "answer")}


# -- what the harness's own tasks ask ----------------------------------------------------------


@contextmanager
def hub(splits: dict[str, list[Row]]) -> Iterator[None]:
    """The hub has one data set."""
    patch = pytest.MonkeyPatch()
    found = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    patch.setattr(datasets, "load_dataset", lambda **o: datasets.DatasetDict(found))
    # The harness's own tiny tasks want a package that is on no index.
    fake = SimpleNamespace(evaluate=lambda items, name: {name: {"gpirt": 0.0}})
    patch.setitem(sys.modules, "tinyBenchmarks", fake)
    try:
        yield
    finally:
        patch.undo()


def locally(name: str, data: Path, room: Path, **options: Any) -> list[tuple[Any, ...]]:
    room.mkdir(exist_ok=True)
    assert local_task_files(name, str(data), room)
    return asked(name, room, **options)


def splits_of_hub(rename: Callable[[Row], Row], **files: str) -> dict[str, list[Row]]:
    splits = {split: [rename(row) for row in FILES[file]] for split, file in files.items()}
    return {"validation": splits.get("train", []), **splits}


ARC = splits_of_hub(arc_of_hub, test="arc_challenge/test.jsonl", train="arc_challenge/train.jsonl")
GSM8K = splits_of_hub(gsm8k_of_hub, test="gsm8k/test.jsonl", train="gsm8k/train.jsonl")
WINOGRANDE = splits_of_hub(
    winogrande_of_hub, validation="winogrande/dev.jsonl", train="winogrande/train_m.jsonl"
)
TRUTHFULQA = splits_of_hub(truthfulqa_of_hub, validation="truthfulqa/mc.jsonl")


@pytest.mark.parametrize(
    ("name", "folder", "splits", "examples"),
    [
        ("arc_challenge", "arc", ARC, None),
        ("arc_challenge", "arc", ARC, 3),
        ("gsm8k", "gsm8k", GSM8K, None),  # five, by its own file
        ("gsm8k", "gsm8k", GSM8K, 2),
        ("winogrande", "winogrande", WINOGRANDE, 2),
        ("truthfulqa_mc1", "truthfulqa", TRUTHFULQA, None),
        ("truthfulqa_mc2", "truthfulqa", TRUTHFULQA, None),
    ],
)
def test_local_rows_are_asked_as_the_hubs_are(
    name: str, folder: str, splits: dict[str, list[Row]], examples: int | None,
    data: Path, tmp_path: Path,
) -> None:  # fmt: skip
    with hub(splits):
        theirs = asked(name, HARNESS / folder, num_fewshot=examples)
    ours = locally(name, data, tmp_path / "room", num_fewshot=examples)
    assert len(ours) == 12
    assert ours == theirs


@pytest.mark.parametrize("examples", [None, 2, 5])
def test_a_subject_of_mmlu_is_asked_as_the_hubs_is(
    examples: int | None, data: Path, tmp_path: Path
) -> None:
    splits = {
        split: [mmlu_of_hub(row) for row in FILES[f"mmlu/{split}.jsonl"] if row["subject"] == one]
        for one in ("high_school_physics",)
        for split in ("test", "dev")
    }
    name = "mmlu_high_school_physics"
    with hub(splits):
        theirs = asked(name, HARNESS / "mmlu/default", num_fewshot=examples)
    ours = locally(name, data, tmp_path / "room", num_fewshot=examples)
    assert len(ours) == 2
    assert ours == theirs
    assert len(list((tmp_path / "room").glob("*.yaml"))) == 1  # and no other subject


def chosen(splits: dict[str, list[Row]], tested: str) -> dict[str, list[Row]]:
    """The hub's tiny data set: the anchors among the rows."""
    return splits | {tested: [splits[tested][anchor["item"]] for anchor in ANCHORS[:3]]}


@pytest.mark.parametrize(
    ("name", "splits", "shots"),
    [
        ("tinyArc", chosen(ARC, "test"), "\nAnswer: "),
        ("tinyGSM8k", chosen(GSM8K, "test"), "#### "),
        ("tinyWinogrande", chosen(WINOGRANDE, "validation"), "in training"),
        ("tinyTruthfulQA", chosen(TRUTHFULQA, "validation"), ""),
        ("tinyTruthfulQA_mc1", chosen(TRUTHFULQA, "validation"), ""),
    ],
)
def test_tiny_tasks_are_asked_as_the_hubs_are(
    name: str, splits: dict[str, list[Row]], shots: str, data: Path, tmp_path: Path
) -> None:
    with hub(splits):
        theirs = asked(name, HARNESS / "tinyBenchmarks")
    ours = locally(name, data, tmp_path / "room")
    assert len(ours) == 3
    assert ours == theirs
    if shots:
        wanted = {"tinyArc": 25}.get(name, 5)
        assert ours[0][0][0][0].count(shots) == wanted


def test_tiny_mmlu_has_the_five_examples_of_each_subject(data: Path, tmp_path: Path) -> None:
    """Its prompts are those of the subject's own task with five examples."""
    ours = locally("tinyMMLU", data, tmp_path / "room")
    theirs = []
    for anchor in ANCHORS[:3]:
        row = FILES["mmlu/test.jsonl"][anchor["item"]]
        name = f"mmlu_{row['subject']}"
        every = locally(name, data, tmp_path / name, num_fewshot=5)
        theirs.append(every[anchor["item"] % 2])
    assert ours == theirs
    assert ours[0][0][0][0].count("\nAnswer: ") == 5


def test_every_subject_is_called_what_the_harness_calls_it(data: Path, tmp_path: Path) -> None:
    """The harness's own words are in 57 files, those of tinyMMLU in one."""
    anchors = [{"scenario": "mmlu", "item": 2 * i, "weight": 1 / 57} for i in range(57)]
    write(data / "tinybenchmarks/anchors.jsonl", anchors)
    found = locally("tinyMMLU", data, tmp_path / "room")
    assert len(found) == len(SUBJECTS) == 57
    own = TaskManager(include_path=[str(HARNESS / "mmlu/default")], include_defaults=False)
    for subject, (requests, _) in zip(SUBJECTS, found, strict=True):
        described = own.task_index[f"mmlu_{subject}"].cfg["description"]
        assert requests[0][0].startswith(described)


# -- the real sets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("arc_challenge", 1172), ("gsm8k", 1319), ("winogrande", 1267), ("truthfulqa_mc1", 817),
        ("truthfulqa_mc2", 817), ("mmlu_anatomy", 135), ("tinyArc", 100), ("tinyGSM8k", 100),
        ("tinyWinogrande", 100), ("tinyTruthfulQA", 100), ("tinyMMLU", 100),
    ],
)  # fmt: skip
def test_the_real_sets_make_tasks(name: str, count: int, data_dir: Path, tmp_path: Path) -> None:
    assert local_task_files(name, str(data_dir), tmp_path)
    manager = TaskManager(include_path=[str(tmp_path)], include_defaults=False)
    task = manager.load([name])["tasks"][name]
    assert len(task.eval_docs) == count
    task.build_all_requests(limit=2)
    assert all(request.args[0].strip() for request in task.instances)


def test_the_real_anchors_of_mmlu_are_those_of_the_set(data_dir: Path, tmp_path: Path) -> None:
    assert local_task_files("tinyMMLU", str(data_dir), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "tinyMMLU.test.jsonl").open(encoding="utf-8")]
    candidate = data_dir / "tinybenchmarks/tiny_mmlu_candidate.jsonl"
    expected = [json.loads(line) for line in candidate.open(encoding="utf-8")]
    assert [(row["question"], row["trimtab_weight"]) for row in rows] == [
        (row["question"], row["weight"]) for row in expected
    ]
    total = torch.tensor([row["trimtab_weight"] for row in rows], dtype=torch.float64).sum()
    assert float(total) == pytest.approx(1.0)
