"""What the tests of lm-evaluation-harness share: its own model, a task in files, hard texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import trimtab as tt
from helpers import language_model


@pytest.fixture(autouse=True)
def no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks pip and the operating system what there is, for its own record."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture
def lm() -> tt.LanguageModel:
    return language_model("llama")


def hf(lm: tt.LanguageModel, **options: Any) -> HFLM:
    """The harness's own model on the same weights."""
    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, device="cpu", **options)


def asks(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def likelihoods(model: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = model.loglikelihood(
        asks("loglikelihood", pairs), disable_tqdm=True
    )
    return found


def written(model: Any, contexts: Sequence[str], **options: Any) -> list[str]:
    asked = asks("generate_until", [(context, options) for context in contexts])
    found: list[str] = model.generate_until(asked, disable_tqdm=True)
    return found


def same_likelihoods(
    actual: Sequence[tuple[float, bool]],
    expected: Sequence[tuple[float, bool]],
    tolerance: float = 1e-3,
) -> None:
    assert len(actual) == len(expected)
    for (log_p, greedy), (other, also) in zip(actual, expected, strict=True):
        assert log_p == pytest.approx(other, abs=tolerance)
        assert greedy is also


# -- a task in files ---------------------------------------------------------------------------


def write_task(
    directory: Path, name: str, rows: Sequence[dict[str, Any]], **content: Any
) -> TaskManager:
    """A task file with its rows, and a manager that knows nothing else."""
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}
    (directory / f"{name}.yaml").write_text(json.dumps(task | content), encoding="utf-8")
    return TaskManager(include_path=[str(directory)], include_defaults=False)


def choice_rows(count: int) -> list[dict[str, Any]]:
    """Questions with two to four options, of one word and of several."""
    chance = random.Random(0)
    things = {
        "bread": "flour, water, salt and time",
        "tea": "leaves and hot water",
        "a poem": "words, one after the other",
        "snow": "frozen water",
        "a map": "paper and ink",
        "paper": "wood",
    }
    rows = []
    for _ in range(count):
        if chance.random() < 0.5:
            thing, right = chance.choice(list(things.items()))
            question = f"What is {thing} made of?"
            wrong = [one for one in things.values() if one != right]
        else:
            a, b = chance.randrange(50), chance.randrange(50)
            question, right = f"How much is {a} and {b}?", str(a + b)
            wrong = [str(a + b + step) for step in (1, 7, 10)]
        options = [right, *chance.sample(wrong, chance.randrange(1, 4))]
        chance.shuffle(options)
        rows.append({"question": question, "options": options, "gold": options.index(right)})
    return rows


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "gold",
    "fewshot_split": "test",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}


def evaluated(model: Any, name: str, manager: TaskManager, **options: Any) -> Any:
    return simple_evaluate(
        model=model, tasks=[name], task_manager=manager, bootstrap_iters=0, **options
    )


#: Long enough that two of them, and much of one, leave the 256 tokens of a tiny model.
LONG = "She looked at the map and asked where they were going, and he did not know. " * 12
SHARED = "The answer to the first question is yes.\nThe answer to the second question is no.\n" * 2

PAIRS = [
    ("Today I feel", " happy"),
    ("Today I feel", " sad because of the rain"),
    ("Today I feel ", "happy"),  # the space belongs to the answer
    ("Today I feel \n\n ", "happy"),
    ("", "The ship left the harbour."),
    ("", "yes"),
    ("Is it true?", "\n\nIt is. ☃ 雪"),
    (SHARED + "Is it right?", " yes"),
    (SHARED + "Is it right?", " no"),
    (SHARED + "Is it wrong?", " no, it is not"),
    (SHARED + "Is it wrong?", " no, it is"),
    (SHARED + "Is it wrong?", " no, it is"),  # asked twice
    (LONG, " yes"),
    (LONG, " no, they were not"),
    (LONG + "And so?", " They ruled together."),
    ("x", LONG[: len(LONG) // 2]),
    ("<s>Today I feel", " happy"),  # BOS is there already
]

CONTEXTS = [
    "Today I feel",
    "She looked at the map and asked where they were going",
    "Q: What is the capital of France?\nA:",
    "Two and two is",
    "The king said:",
]
