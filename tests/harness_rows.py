"""Rows of lm-evaluation-harness's tasks, as the data directory has them and as the hub has them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from helpers import language_model

Row = dict[str, Any]

HARNESS = Path(lm_eval.tasks.__file__).parent


@pytest.fixture(autouse=True)
def no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks pip and the operating system what there is, for its own record."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)


@pytest.fixture(autouse=True)
def limit_of_the_tokenizer() -> Iterator[None]:
    """There is one tiny tokenizer for all tests."""
    tokenizer = language_model("llama").tokenizer
    before = tokenizer.model_max_length
    yield
    tokenizer.model_max_length = before


# -- rows, as the data directory has them and as the hub has them ------------------------------

SUBJECTS = sorted(file.stem[5:] for file in (HARNESS / "mmlu/default").glob("mmlu_*.yaml"))
THINGS = ["bread", "tea", "a poem", "snow", "a map", "paper", "a song", "honey", "rain", "wool"]


def arc_rows(part: str, count: int) -> list[Row]:
    return [
        {
            "id": f"{part}-{i}",
            "question": f"What is {THINGS[i % 10]} made of, in {part} {i}?",
            "choices": ["flour", "hot water", f"{i} words", "ink", "wool"][: 3 + i % 3],
            "answer": i % 3,
        }
        for i in range(count)
    ]


def gsm8k_rows(part: str, count: int) -> list[Row]:
    return [
        {
            "id": i,
            "question": f"Ann bakes {i} loaves and Ben bakes {i + 1} in {part}. How many?",
            "answer": f"{i} and {i + 1} are <<{i}+{i + 1}={2 * i + 1}>>\n#### {2 * i + 1}",
        }
        for i in range(count)
    ]


def winogrande_rows(part: str, count: int) -> list[Row]:
    return [
        {
            "id": f"{part}-{i}",
            "sentence": f"Ann thanked Mary in {part} {i}, because _ had baked the bread.",
            "option1": "Ann",
            "option2": "Mary",
            "answer": 1 + i % 2,
        }
        for i in range(count)
    ]


def truthfulqa_rows(part: str, count: int) -> list[Row]:
    return [
        {
            "id": i,
            "question": f"Does {THINGS[i % 10]} sing on day {i}?",
            "mc1_choices": ["No.", "Yes, it does.", f"On day {i + 1}."],
            "mc1_labels": [1, 0, 0],
            "mc2_choices": ["No.", "It cannot.", "Yes.", "At night."][: 3 + i % 2],
            "mc2_labels": [1, 1, 0, 0][: 3 + i % 2],
        }
        for i in range(count)
    ]


def mmlu_rows(part: str, count: int, subjects: Sequence[str] = SUBJECTS) -> list[Row]:
    return [
        {
            "id": f"{subject}-{i}",
            "subject": subject,
            "question": f" In {part}, what is number {i} of {subject}? ",  # as there are some
            "choices": ["one", f"{i}", "none of them", "all"],
            "answer": (i + len(subject)) % 4,
        }
        for subject in subjects
        for i in range(count)
    ]


def write(file: Path, rows: Sequence[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


#: File under the data directory -> its rows.
FILES: dict[str, list[Row]] = {
    "arc_challenge/test.jsonl": arc_rows("the test", 12),
    "arc_challenge/train.jsonl": arc_rows("training", 30),
    "gsm8k/test.jsonl": gsm8k_rows("the test", 12),
    "gsm8k/train.jsonl": gsm8k_rows("training", 9),
    "winogrande/dev.jsonl": winogrande_rows("the test", 12),
    "winogrande/train_m.jsonl": winogrande_rows("training", 9),
    "truthfulqa/mc.jsonl": truthfulqa_rows("the test", 12),
    "mmlu/test.jsonl": mmlu_rows("the test", 2),
    "mmlu/dev.jsonl": mmlu_rows("development", 6),
}
ANCHORS = [
    {"scenario": scenario, "item": item, "weight": weight}
    for scenario in ("arc", "gsm8k", "winogrande", "truthfulqa", "mmlu")
    for item, weight in ((7, 0.5), (2, 0.125), (11, 0.375))
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory."""
    for name, rows in FILES.items():
        write(tmp_path / "data" / name, rows)
    write(tmp_path / "data/tinybenchmarks/anchors.jsonl", ANCHORS)
    return tmp_path / "data"


class Listener(LM):  # type: ignore[misc]
    """A model that is asked, and knows nothing."""

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        return [-1.0 for _ in requests]

    def generate_until(self, requests: Any) -> list[str]:
        return ["" for _ in requests]


def asked(name: str, directory: Path, **options: Any) -> list[tuple[Any, ...]]:
    """(requests, gold) of each example, by task files of this directory."""
    manager = TaskManager(include_path=[str(directory)], include_defaults=False)
    found = simple_evaluate(
        model=Listener(), tasks=[name], task_manager=manager, bootstrap_iters=0, **options
    )
    # A task that reads texts in two ways has each of them twice.
    examples = {sample["doc_id"]: sample for sample in found["samples"][name]}
    return [(sample["arguments"], sample["target"]) for sample in examples.values()]
