"""Rows of tasks from a user's files, from bad files and from the hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers import refused_in_one_line
from task_rows import BOOLQ, LETTER_BY_LETTER, SVAMP, WINOGRANDE, write
from trimtab.evaluation.tasks import TASKS, find_task
from trimtab.evaluation.tasks.task import Task

# -- files of the user's own prompts -----------------------------------------------------------


def prompts_of(task: Task) -> list[Any]:
    return [
        task.example(row, i, "trimtab").prompt
        for i, row in enumerate(task.rows("test", "trimtab", None))
    ]


PROMPT_FILES: dict[str, tuple[str, str, list[str]]] = {
    "advbench": (
        "advbench.jsonl",
        '{"goal": "Write a poem about bread", "target": "Sure, here is a poem"}\n',
        ["Write a poem about bread"],
    ),
    "jailbreakbench": (
        "jbb.jsonl",
        '{"id": 3, "goal": "Describe a loaf", "target": "Here", "behavior": "Loaf", '
        '"category": "Food", "source": "Original"}\n',
        ["Describe a loaf"],
    ),
    "harmbench": (
        "harmbench.jsonl",
        '{"behavior_id": "bake", "behavior": "Say how to bake it", "context": "A rye loaf.", '
        '"tags": "context"}\n{"behavior_id": "b", "behavior": "Bake bread", "context": ""}\n',
        ["A rye loaf.\n\n---\n\nSay how to bake it", "Bake bread"],
    ),
    "harmbench-csv": (
        "harmbench.csv",
        "Behavior,FunctionalCategory,ContextString,BehaviorID\r\n"
        '"Say how, in verse,\nto bake it",contextual,A rye loaf.,bake\r\n'
        "Bake bread,standard,,b\r\n",
        ["A rye loaf.\n\n---\n\nSay how, in verse,\nto bake it", "Bake bread"],
    ),
    "advbench-csv": (
        "AdvBench.CSV",
        "\ufeffgoal,target\nWrite a poem,Sure\n",
        ["Write a poem"],
    ),
    "instructions": (
        "rows.jsonl",
        '{"instruction": "Bake bread", "category": null}\n',
        ["Bake bread"],
    ),
    "plain": (
        "plain.jsonl",
        '{"prompt": "Bake\u2028bread"}\n\n{"prompt": "Eat it", "goal": "no"}\n',
        ["Bake\u2028bread", "Eat it"],
    ),
}


@pytest.mark.parametrize("kind", ["refusal", "coherence"])
@pytest.mark.parametrize("form", PROMPT_FILES)
def test_prompts_of_every_form(tmp_path: Path, form: str, kind: str) -> None:
    name, content, expected = PROMPT_FILES[form]
    (tmp_path / name).write_bytes(content.encode())
    task = find_task(f"{kind}:{tmp_path / name}")
    assert prompts_of(task) == [(("user", text),) for text in expected]
    assert task.measures == {"refusal": ("refusal", "coherence"), "coherence": ("coherence",)}[kind]
    # A file is also looked for among the data.
    assert prompts_of(find_task(f"{kind}:{name}", str(tmp_path))) == prompts_of(task)


def test_prompts_may_be_conversations(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Bread?"}]
    path = write(tmp_path / "chats.jsonl", [{"prompt": messages}])
    assert prompts_of(find_task(f"coherence:{path}")) == [
        (("system", "Be brief."), ("user", "Bread?"))
    ]


def test_ids_of_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "id": "loaf"}, {"prompt": "b"}])
    task = find_task(f"coherence:{path}")
    rows = task.rows("test", "trimtab", None)
    assert [task.example(row, i, "paper").id for i, row in enumerate(rows)] == ["loaf", "1"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl, row 2 has no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 5}\n', "p.jsonl, row 2: a prompt must be text"),
        ("p.jsonl", '{"prompt": ""}\n', "p.jsonl, row 1 has no prompt"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}\n', "p.jsonl, row 1: a message must be"),
        ("p.jsonl", '{"prompt": "a"}\nbread\n', "p.jsonl, line 2 is not JSON"),
        ("p.jsonl", '["a"]\n', "p.jsonl, row 1 is not a JSON object"),
        ("p.jsonl", "\n\n", "p.jsonl has no rows"),
        ("p.csv", "goal\n", "p.csv has no rows"),
        ("p.csv", 'goal\n"never closed\n', "p.csv cannot be read as CSV"),
        ("p.csv", "text\nbread\n", "p.csv, row 1 has no prompt"),
    ],
)
def test_bad_files_of_prompts(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    refused_in_one_line(lambda: prompts_of(find_task(f"refusal:{tmp_path / name}")), says)


def test_a_missing_file_of_prompts(tmp_path: Path) -> None:
    refused_in_one_line(lambda: find_task("refusal:none.jsonl"), "no such file .* none.jsonl")
    refused_in_one_line(lambda: find_task("refusal:none", str(tmp_path)), "no such file of prompts")
    refused_in_one_line(lambda: find_task("coherence:"), "no such file of prompts")


def test_an_unreadable_file_of_prompts(tmp_path: Path) -> None:
    for suffix in ("jsonl", "csv"):
        path = tmp_path / f"p.{suffix}"
        path.write_bytes(b"goal\n\xff\xfe\n")
        refused_in_one_line(lambda: prompts_of(find_task(f"refusal:{path}")), str(path))


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("copa", {"premise": None}, "'premise' must be text, not None"),
        ("copa", {"label": "0"}, "'label' must be one of 0, 1, not '0'"),
        ("copa", {"label": -1}, "'label' must be one of 0, 1, not -1"),
        ("copa", {"label": True}, "'label' must be one of 0, 1, not True"),
        ("copa", {"label": [0]}, "'label' must be one of 0, 1"),
        ("copa", {"question": "reason"}, "'question' must be one of 'cause', 'effect'"),
        ("boolq", {"answer": "yes"}, "'answer' must be true or false, not 'yes'"),
        ("boolq", {"answer": 1}, "'answer' must be true or false, not 1"),
        ("winogrande", {"answer": ""}, "'answer' must be one of '1', '2', 1, 2, not ''"),
        ("winogrande", {"answer": 3}, "'answer' must be"),
        ("winogrande", {"option1": ["loaf"]}, "'option1' must be text"),
        ("mawps", {"answer": "3.5"}, "'answer' must be a whole number or a number, not '3.5'"),
        ("mawps", {"answer": True}, "'answer' must be a whole number or a number, not True"),
        ("mawps", {"question": "a\nb" * 80, "equation": 1}, "'equation' must be text, not 1"),
        ("bpo", {"prompt": {}}, "'prompt' must be text"),
    ],
)
def test_wrong_values_are_named_with_file_and_row(
    tmp_path: Path, name: str, change: dict[str, Any], says: str
) -> None:
    row = LETTER_BY_LETTER[name][0]
    path = write(tmp_path / TASKS[name].test.file, [row, {**row, **change}])
    rows = lambda: TASKS[name].rows("test", "trimtab", str(tmp_path))  # noqa: E731
    refused_in_one_line(rows, f"^{re.escape(str(path))}, row 2: {re.escape(says)}")


@pytest.mark.parametrize("name", ["boolq", "copa", "winogrande", "svamp", "mawps", "detox", "bpo"])
def test_missing_columns_are_named_with_file_and_row(tmp_path: Path, name: str) -> None:
    task, (whole, _) = TASKS[name], LETTER_BY_LETTER[name]
    for column in task.columns:
        row = {key: value for key, value in whole.items() if key != column}
        path = write(tmp_path / task.test.file, [whole, whole, row])
        says = f"^{re.escape(str(path))}, row 3: '{column}' is missing"
        refused_in_one_line(lambda: task.rows("test", "paper", str(tmp_path)), says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "test.jsonl has no rows"),
        ("\n \n", "test.jsonl has no rows"),
        ('{"id": 1}\n{"id": \n', "test.jsonl, line 2 is not JSON"),
        ("[1, 2]\n", "test.jsonl, line 1 is not a JSON object"),
        ('{"label": NaN}\n', "test.jsonl, line 1 is not JSON"),
        ('{"premise": "\\ud800"}\n', "test.jsonl, line 1 is not JSON"),
        ("[" * 100000 + "\n", "test.jsonl, line 1 is not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa/test.jsonl").write_text(content)
    refused_in_one_line(lambda: TASKS["copa"].rows("test", "trimtab", str(tmp_path)), says)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa/test.jsonl").write_bytes(b'{"premise": "\xff"}\n')
    refused_in_one_line(
        lambda: TASKS["copa"].rows("test", "trimtab", str(tmp_path)), "is not UTF-8 text"
    )


def test_no_such_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "none")
    says = f"{re.escape(missing)} is not a directory of data sets"
    refused_in_one_line(lambda: TASKS["copa"].rows("test", "trimtab", missing), says)
    monkeypatch.setenv("TRIMTAB_DATA", missing)
    refused_in_one_line(lambda: TASKS["copa"].rows("test", "trimtab", None), says)


def test_unknown_names() -> None:
    says = r"unknown task .copaa.: did you mean copa\? known are boolq, copa"
    refused_in_one_line(lambda: find_task("copaa"), says)
    refused_in_one_line(lambda: find_task("rebuttal:x.jsonl"), "unknown task")
    refused_in_one_line(lambda: TASKS["copa"].contrast("ours"), "unknown protocol 'ours'")  # type: ignore[arg-type]
    refused_in_one_line(lambda: TASKS["xstest"].contrast(), "xstest has no contrast")


# -- the hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], Any]:
    """A hub that has what the test puts there: (data set, configuration, split) -> rows."""
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    there: dict[tuple[str, str | None, str], Any] = {}

    def load_dataset(name: str, configuration: str | None = None, *, split: str) -> Any:
        if (name, configuration, split) not in there:
            raise ConnectionError(f"Couldn't reach {name}\non the hub")
        return there[name, configuration, split]

    stand_in = ModuleType("datasets")
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return there


Hub = dict[tuple[str, str | None, str], Any]


def test_rows_of_the_hub_are_renamed(hub: Hub) -> None:
    hub["ChilleD/SVAMP", None, "test"] = [
        {"ID": "x", "Body": SVAMP["body"], "Question": SVAMP["question"], "Answer": "51.0"}
    ]
    [row] = TASKS["svamp"].rows("test", "trimtab", None)
    example = TASKS["svamp"].example(row, 0, "trimtab")
    assert (example.prompt, example.target) == (LETTER_BY_LETTER["svamp"][1], 51.0)
    hub["garrethlee/MAWPS", None, "train"] = [
        {"question": "How many?", "answer": "2 + 4 = 6 #### 6"},
        {"question": "And now?", "answer": "2 * 617 = 1,234 #### 1,234"},
    ]
    rows = TASKS["mawps"].rows("train", "paper", None)
    assert [(row["equation"], row["answer"], row["id"]) for row in rows] == [
        ("2 + 4", 6.0, 0),
        ("2 * 617", 1234.0, 1),
    ]


def test_only_rows_that_belong_are_kept(hub: Hub) -> None:
    def row(name: str, challenging: bool, prompt: float | None, after: float | None) -> Any:
        return {
            "filename": name,
            "challenging": challenging,
            "prompt": {"text": f"The bread {name}", "toxicity": prompt},
            "continuation": {"text": " is good.", "toxicity": after},
        }

    hub["allenai/real-toxicity-prompts", None, "train"] = [
        row("tested", True, 0.05, 0.9),
        row("kept", False, 0.05, 0.9),
        row("high", False, 0.1, 0.9),
        row("low", False, 0.05, 0.8),
        row("unknown", False, None, 0.9),
        row("unknown too", False, 0.05, None),
    ]
    task = TASKS["detox"]
    assert [row["filename"] for row in task.rows("test", "paper", None)] == ["tested"]
    [kept] = task.rows("train", "paper", None)
    assert (kept["filename"], kept["prompt"], kept["continuation"]) == (
        "kept",
        "The bread kept",
        " is good.",
    )


def test_twins_of_the_hub_are_in_one_part_without_ids(hub: Hub) -> None:
    rows = [
        {key: value for key, value in WINOGRANDE.items() if key != "id"}
        | {"option1": f"loaf {i}", "answer": answer}
        for i in range(10)
        for answer in ("1", "2")
    ]
    hub["allenai/winogrande", "winogrande_m", "train"] = rows
    train, held_out = (
        TASKS["winogrande"].rows(part, "trimtab", None) for part in ("train", "validation")
    )
    assert (len(train), len(held_out)) == (16, 4)
    assert not {row["option1"] for row in train} & {row["option1"] for row in held_out}


def test_rows_of_the_hub_are_checked_too(hub: Hub) -> None:
    hub["google/boolq", None, "validation"] = [BOOLQ, {**BOOLQ, "answer": "yes"}]
    refused_in_one_line(
        lambda: TASKS["boolq"].rows("test", "trimtab", None),
        "the data set google/boolq of the hub, row 2: 'answer' must be true or false",
    )
    hub["google/boolq", None, "validation"] = []
    refused_in_one_line(
        lambda: TASKS["boolq"].rows("test", "trimtab", None), "google/boolq of the hub has no rows"
    )


@pytest.mark.usefixtures("hub")
def test_a_hub_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    refused_in_one_line(
        lambda: TASKS["copa"].rows("test", "trimtab", None),
        "^copa needs copa/test.jsonl: name its directory with --data or TRIMTAB_DATA; the hub's "
        "pkavumba/balanced-copa failed: Couldn't reach pkavumba/balanced-copa$",
    )
    refused_in_one_line(
        lambda: TASKS["copa"].rows("test", "trimtab", str(tmp_path)),
        f"^copa needs copa/test.jsonl, which is not in {re.escape(str(tmp_path))}; the hub's",
    )


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused_in_one_line(
        lambda: TASKS["copa"].rows("test", "trimtab", None), r"install trimtab\[eval\]"
    )
