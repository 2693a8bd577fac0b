"""Tasks of lm-evaluation-harness on data sets that lie on this disk.

The harness has the prompts; only where its rows come from is changed. For each of its tasks whose
data set is in the data directory, task files are written that include the harness's own and read
local rows. The tiny tasks (tinyBenchmarks) are the anchor items of a whole set, each with its
weight, and with as many examples in their prompts as the harness gives them; which items these are
counts on the order of the rows, which is that of the hub as far as we know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluation.tasks.data import Row, check_row, data_directory
from trimtab.files import read_jsonl

_ANCHORS = "tinybenchmarks/anchors.jsonl"
_ANCHOR_COLUMNS = {"scenario": str, "item": int, "weight": (int, float)}


@dataclass(frozen=True)
class _Local:
    """One data set: the harness's task file, its splits here (the first one is tested on), and
    rows as the hub has them.

    `fault` says what is wrong with a row that has the right columns.
    """

    base: str
    splits: Mapping[str, str]  # split -> file under the data directory
    columns: Mapping[str, Any]
    rename: Callable[[Row], dict[str, Any]]
    fault: Callable[[Row], str | None] = lambda row: None


def _arc(row: Row) -> dict[str, Any]:
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    choices = {"text": list(row["choices"]), "label": letters}
    return {
        "question": row["question"],
        "choices": choices,
        "answerKey": letters[row["answer"]],
    }


def _choice_fault(row: Row) -> str | None:
    if not all(isinstance(choice, str) for choice in row["choices"]):
        return "every one of 'choices' must be text"
    if not 0 <= row["answer"] < len(row["choices"]):
        return f"'answer' is {row['answer']}, one of {len(row['choices'])} choices, from 0 on"
    return None


def _winogrande(row: Row) -> dict[str, Any]:
    kept = {key: row[key] for key in ("sentence", "option1", "option2")}
    return kept | {"answer": str(row["answer"])}


def _winogrande_fault(row: Row) -> str | None:
    if "_" not in row["sentence"]:
        return "'sentence' has no _ to fill in"
    if str(row["answer"]) not in ("1", "2"):
        return f"'answer' must be 1 or 2, not {row['answer']!r:.60}"
    return None


def _truthfulqa(row: Row) -> dict[str, Any]:
    return {
        "question": row["question"],
        "mc1_targets": {"choices": row["mc1_choices"], "labels": row["mc1_labels"]},
        "mc2_targets": {"choices": row["mc2_choices"], "labels": row["mc2_labels"]},
    }


def _truthfulqa_fault(row: Row) -> str | None:
    for kind in ("mc1", "mc2"):
        choices, labels = row[f"{kind}_choices"], row[f"{kind}_labels"]
        if not all(isinstance(choice, str) for choice in choices):
            return f"every one of '{kind}_choices' must be text"
        if len(labels) != len(choices) or not all(label in (0, 1) for label in labels):
            return f"'{kind}_labels' must be 0 or 1 for each of '{kind}_choices'"
    # The harness's task takes the first answer for the right one.
    if row["mc1_labels"][:1] != [1] or sum(row["mc1_labels"]) != 1:
        return "the first of 'mc1_choices', and no other, must be the right one"
    return None


def _mmlu(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("question", "subject", "choices", "answer")}


def _mmlu_fault(row: Row) -> str | None:
    if len(row["choices"]) != 4:
        return f"'choices' must be 4 answers, not {len(row['choices'])}"
    return _choice_fault(row)


_ARC = _Local(
    "arc/arc_challenge.yaml",
    {"test": "arc_challenge/test.jsonl", "train": "arc_challenge/train.jsonl"},
    {"question": str, "choices": list, "answer": int},
    _arc,
    _choice_fault,
)
_GSM8K = _Local(
    "gsm8k/gsm8k.yaml",
    {"test": "gsm8k/test.jsonl", "train": "gsm8k/train.jsonl"},
    {"question": str, "answer": str},
    lambda row: {"question": row["question"], "answer": row["answer"]},
)
_WINOGRANDE = _Local(
    "winogrande/default.yaml",
    {"validation": "winogrande/dev.jsonl", "train": "winogrande/train_m.jsonl"},
    {"sentence": str, "option1": str, "option2": str, "answer": (int, str)},
    _winogrande,
    _winogrande_fault,
)
_TRUTHFULQA_MC1 = _Local(
    "truthfulqa/truthfulqa_mc1.yaml",
    {"validation": "truthfulqa/mc.jsonl"},
    {
        "question": str,
        "mc1_choices": list,
        "mc1_labels": list,
        "mc2_choices": list,
        "mc2_labels": list,
    },
    _truthfulqa,
    _truthfulqa_fault,
)
_TRUTHFULQA_MC2 = replace(_TRUTHFULQA_MC1, base="truthfulqa/truthfulqa_mc2.yaml")
_MMLU = _Local(
    "mmlu/default/mmlu_{subject}.yaml",
    {"test": "mmlu/test.jsonl", "dev": "mmlu/dev.jsonl"},
    {"subject": str, "question": str, "choices": list, "answer": int},
    _mmlu,
    _mmlu_fault,
)

_LOCAL = {
    "arc_challenge": _ARC,
    "gsm8k": _GSM8K,
    "winogrande": _WINOGRANDE,
    "truthfulqa_mc1": _TRUTHFULQA_MC1,
    "truthfulqa_mc2": _TRUTHFULQA_MC2,
}
#: (data set, scenario among the anchors, examples in the prompts) of each tiny task.
_TINY = {
    "tinyArc": (_ARC, "arc", 25),
    "tinyGSM8k": (_GSM8K, "gsm8k", 5),
    "tinyWinogrande": (_WINOGRANDE, "winogrande", 5),
    "tinyTruthfulQA": (_TRUTHFULQA_MC2, "truthfulqa", 0),
    "tinyTruthfulQA_mc1": (_TRUTHFULQA_MC1, "truthfulqa", 0),
    "tinyMMLU": (_MMLU, "mmlu", 5),
}


def local_task_files(name: str, data: str | None, into: Path) -> bool:
    """Write what the harness needs to run its task `name` on local rows.

    False where the data directory does not have them, or the task is none of those known here.
    """
    directory = data_directory(data)
    if directory is None:
        return False
    local, scenario, examples = _TINY.get(name, (_LOCAL.get(name), "", 0))
    if local is None and _mmlu_files(name):
        local = _MMLU
    files = [] if local is None else [*local.splits.values(), *([_ANCHORS] if scenario else [])]
    if local is None or not all((directory / file).is_file() for file in files):
        return False
    splits = {split: _rows(directory / file, local) for split, file in local.splits.items()}
    if not scenario and local is _MMLU:
        _write_mmlu(into, _mmlu_files(name), splits)
        return True
    task = {} if local is _MMLU else _include(local.base)
    if scenario:
        tested = next(iter(local.splits))
        splits[tested] = _anchored(splits[tested], directory / _ANCHORS, scenario)
        if local is _MMLU:
            task, splits = _MMLU_OF_ALL_SUBJECTS, {"test": _with_examples(splits, examples)}
        else:
            task["num_fewshot"] = examples
    _write(into, name, task, splits)
    return True


#: One task over all subjects; every row brings the examples of its own subject.
_MMLU_OF_ALL_SUBJECTS: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "num_fewshot": 0,
    "doc_to_text": "The following are multiple choice questions (with answers) about "
    "{{subject | replace('_', ' ')}}.\n\n{{examples}}{{question.strip()}}\nA. {{choices[0]}}\n"
    "B. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def _with_examples(splits: Mapping[str, list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """The rows of all subjects, each with the first development rows of its subject, as text."""
    examples: dict[str, list[str]] = {}
    for row in splits["dev"]:
        options = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True)]
        lines = [row["question"].strip(), *options, f"Answer: {'ABCD'[row['answer']]}"]
        examples.setdefault(row["subject"], []).append("\n".join(lines) + "\n\n")
    return [
        row | {"examples": "".join(examples.get(row["subject"], [])[:count])}
        for row in splits["test"]
    ]


def _rows(path: Path, local: _Local) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        check_row(row, local.columns, f"{path}, row {number}")
        fault = local.fault(row)
        if fault is not None:
            raise TrimtabError(f"{path}, row {number}: {fault}")
    if not rows:
        raise TrimtabError(f"{path} has no rows")
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


def _harness() -> Path:
    """Where the harness has its task files."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _include(base: str) -> dict[str, Any]:
    return {"include": str(_harness() / base)}


def _mmlu_files(name: str) -> list[Path]:
    """The harness's files of MMLU that `name` needs: one subject's, or those of its groups and
    their subjects; none where `name` is no part of MMLU."""
    directory = _harness() / _MMLU.base.rpartition("/")[0]
    subject, group = directory / f"{name}.yaml", directory / f"_{name}.yaml"
    if name.startswith("mmlu_") and subject.is_file():
        return [subject]
    if not group.is_file():
        return []
    subjects = sorted(directory.glob("mmlu_*.yaml"))
    if name == "mmlu":
        return [*sorted(directory.glob("_mmlu*.yaml")), *subjects]
    tag = f"{name}_tasks"
    return [group, *(file for file in subjects if tag in file.read_text(encoding="utf-8"))]


def _write_mmlu(
    into: Path, bases: Sequence[Path], splits: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Groups as the harness has them, and a task for each subject."""
    for base in bases:
        subject = base.stem.removeprefix("mmlu_")
        if base.name.startswith("_"):
            content = json.dumps({"include": str(base)})
            (into / base.name).write_text(content, encoding="utf-8")
            continue
        own = {
            split: [row for row in rows if row["subject"] == subject]
            for split, rows in splits.items()
        }
        if not all(own.values()):
            raise TrimtabError(f"the rows of MMLU lack the subject {subject}, or its dev rows")
        _write(into, base.stem, {"include": str(base)}, own)


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
        # The cache of `datasets` goes by the file's name and time, and would stay for ever.
        "dataset_kwargs": {"data_files": files, "cache_dir": str(into / "cache")},
    }
    (into / f"{name}.yaml").write_text(json.dumps(content, indent=1), encoding="utf-8")
