"""Tasks of lm-evaluation-harness on data sets that lie on this disk.

The harness has the prompts; only where its rows come from is changed. For each of its tasks whose
data set is in the data directory, task files are written that include the harness's own and read
local rows. The tiny tasks (tinyBenchmarks) are the anchor items of a whole set, each with its
weight; which items these are counts on the order of the rows, which is that of the hub as far as
we know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.tasks.data import check_row, data_directory, read_jsonl
from trimtab.tasks.task import Row

_ANCHORS = "tinybenchmarks/anchors.jsonl"
_ANCHOR_COLUMNS = {"scenario": str, "item": int, "weight": (int, float)}


@dataclass(frozen=True)
class _Local:
    """One data set: the harness's task file, its splits here, and rows as the hub has them."""

    base: str
    splits: Mapping[str, str]  # split -> file under the data directory
    columns: Mapping[str, Any]
    rename: Callable[[Row], dict[str, Any]]
    tiny: str | None = None  # the scenario's name among the anchors


def _arc(row: Row) -> dict[str, Any]:
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    choices = {"text": list(row["choices"]), "label": letters}
    return {
        "question": row["question"],
        "choices": choices,
        "answerKey": letters[row["answer"]],
    }


def _winogrande(row: Row) -> dict[str, Any]:
    kept = {key: row[key] for key in ("sentence", "option1", "option2")}
    return kept | {"answer": str(row["answer"])}


def _truthfulqa(row: Row) -> dict[str, Any]:
    return {
        "question": row["question"],
        "mc1_targets": {"choices": row["mc1_choices"], "labels": row["mc1_labels"]},
        "mc2_targets": {"choices": row["mc2_choices"], "labels": row["mc2_labels"]},
    }


def _mmlu(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("question", "subject", "choices", "answer")}


_TRUTHFULQA_COLUMNS = {
    "question": str,
    "mc1_choices": list,
    "mc1_labels": list,
    "mc2_choices": list,
    "mc2_labels": list,
}
_TRUTHFULQA = {"validation": "truthfulqa/mc.jsonl"}

_LOCAL = {
    "arc_challenge": _Local(
        "arc/arc_challenge.yaml",
        {"test": "arc_challenge/test.jsonl", "train": "arc_challenge/train.jsonl"},
        {"question": str, "choices": list, "answer": int},
        _arc,
        "arc",
    ),
    "gsm8k": _Local(
        "gsm8k/gsm8k.yaml",
        {"test": "gsm8k/test.jsonl", "train": "gsm8k/train.jsonl"},
        {"question": str, "answer": str},
        lambda row: {"question": row["question"], "answer": row["answer"]},
        "gsm8k",
    ),
    "winogrande": _Local(
        "winogrande/default.yaml",
        {"validation": "winogrande/dev.jsonl", "train": "winogrande/train_m.jsonl"},
        {"sentence": str, "option1": str, "option2": str, "answer": (int, str)},
        _winogrande,
        "winogrande",
    ),
    "truthfulqa_mc1": _Local(
        "truthfulqa/truthfulqa_mc1.yaml",
        _TRUTHFULQA,
        _TRUTHFULQA_COLUMNS,
        _truthfulqa,
        "truthfulqa",
    ),
    "truthfulqa_mc2": _Local(
        "truthfulqa/truthfulqa_mc2.yaml", _TRUTHFULQA, _TRUTHFULQA_COLUMNS, _truthfulqa
    ),
}
_MMLU = _Local(
    "mmlu/default/mmlu_{subject}.yaml",
    {"test": "mmlu/test.jsonl", "dev": "mmlu/dev.jsonl"},
    {"subject": str, "question": str, "choices": list, "answer": int},
    _mmlu,
    "mmlu",
)
_TINY = {
    "tinyArc": "arc_challenge",
    "tinyGSM8k": "gsm8k",
    "tinyWinogrande": "winogrande",
    "tinyTruthfulQA": "truthfulqa_mc1",
    "tinyMMLU": "mmlu",
}


def local_task_files(name: str, data: str | None, into: Path) -> bool:
    """Write what the harness needs to run its task `name` on local rows.

    False where the data directory does not have them, or the task is none of those known here.
    """
    directory = data_directory(data)
    if directory is None:
        return False
    base = _TINY.get(name, name)
    local = _MMLU if base.partition("_")[0] == "mmlu" else _LOCAL.get(base)
    if local is None or not all((directory / file).is_file() for file in local.splits.values()):
        return False
    if name in _TINY and not (directory / _ANCHORS).is_file():
        return False
    splits = {split: _rows(directory / file, local) for split, file in local.splits.items()}
    if name in _TINY:
        tested = next(iter(local.splits))
        splits[tested] = _anchored(splits[tested], directory / _ANCHORS, str(local.tiny))
    if local is not _MMLU:
        _write(into, name, _include(local.base), splits)
    elif name == "tinyMMLU":
        # One task over all subjects: each question names its own.
        _write(into, name, _MMLU_OF_ALL_SUBJECTS, {"test": splits["test"]})
    else:
        _write_subjects(into, base, splits)
    return True


_MMLU_OF_ALL_SUBJECTS = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "The following are multiple choice questions (with answers) about "
    "{{subject | replace('_', ' ')}}.\n\n{{question.strip()}}\nA. {{choices[0]}}\n"
    "B. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def _rows(path: Path, local: _Local) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        check_row(row, local.columns, f"{path}, row {number}")
    return [local.rename(row) for row in rows]


def _anchored(rows: Sequence[dict[str, Any]], anchors: Path, scenario: str) -> list[dict[str, Any]]:
    """The anchor items, each with its weight."""
    found = []
    for number, anchor in enumerate(read_jsonl(anchors), 1):
        where = f"{anchors}, row {number}"
        check_row(anchor, _ANCHOR_COLUMNS, where)
        if anchor["scenario"] == scenario:
            if not 0 <= anchor["item"] < len(rows):
                raise TrimtabError(f"{where}: item {anchor['item']} of {len(rows)} rows")
            found.append(rows[anchor["item"]] | {"trimtab_weight": anchor["weight"]})
    if not found:
        raise TrimtabError(f"{anchors} has no anchors of {scenario}")
    return found


def _write_subjects(into: Path, name: str, splits: Mapping[str, list[dict[str, Any]]]) -> None:
    """A task for each subject of MMLU, of which the harness's group consists; or for one."""
    wanted = name.removeprefix("mmlu").removeprefix("_")
    subjects = sorted({row["subject"] for row in splits["test"]})
    for subject in [wanted] if wanted in subjects else subjects:
        own = {
            split: [row for row in rows if row["subject"] == subject]
            for split, rows in splits.items()
        }
        _write(into, f"mmlu_{subject}", _include(_MMLU.base.format(subject=subject)), own)


def _include(base: str) -> dict[str, Any]:
    import lm_eval.tasks

    return {"include": str(Path(lm_eval.tasks.__file__).parent / base)}


def _write(
    into: Path,
    name: str,
    task: Mapping[str, Any],
    splits: Mapping[str, Sequence[dict[str, Any]]],
) -> None:
    """The rows, and a task file that reads them; JSON is YAML."""
    files = {}
    for split, rows in splits.items():
        file = into / f"{name}.{split}.jsonl"
        with file.open("w", encoding="utf-8") as opened:
            opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files[split] = str(file)
    content = {
        **task,
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    (into / f"{name}.yaml").write_text(json.dumps(content, indent=1), encoding="utf-8")
