"""Files of prompts: each row gets what `generate` writes of it alone under its steerings, whatever
is interrupted; what is wrong with a row is said with its line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from commands import Command, home, listing, refused, trimtab, work, write_rows
from trimtab.batches import generating
from trimtab.files import Journal

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "I"},
            {"role": "user", "content": "And then"}]  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"prompt": "Today I feel", "id": "first"},
    {"messages": MESSAGES, "steer": "caa.safetensors@8"},
    {"prompt": "She looked at the map and then at the sea", "steer": []},
    {"prompt": "The ship", "steer": ["au.safetensors", "caa.safetensors@2"], "dial": [30, -6]},
    {
        "prompt": "Today I feel",
        "steer": "caa.safetensors",
        "dial": 9,
        "scope": "generated",
        "id": 4,
    },
    {"prompt": MESSAGES, "dial": 5},
    {"prompt": "A"},
]
GIVEN = "generate --model model --max-new-tokens 6 --steer au.safetensors@40 --batch-size 2"
COMMAND = f"{GIVEN} --input rows.jsonl --output out.jsonl"


@pytest.fixture(autouse=True)
def _rows(work: Path) -> None:
    write_rows("rows.jsonl", ROWS)


def read(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def alone() -> list[tuple[tt.Completion, list[str]]]:
    """What each row comes to by itself, by hand."""
    lm = tt.load("model", device="cpu")
    au, caa = (tt.Steering.load(f"{name}.safetensors") for name in ("au", "caa"))
    acting = [
        [au.at(40)], [caa.at(8)], [], [au.at(30), caa.at(-6)], [caa.at(9).scoped("generated")],
        [au.at(5)], [au.at(40)],
    ]  # fmt: skip
    found = []
    for row, steerings in zip(ROWS, acting, strict=True):
        prompt = row.get("prompt", row.get("messages"))
        (done,) = lm.generate([prompt], max_new_tokens=6, steering=[steerings])
        found.append((done, [one.label for one in steerings]))
    return found


def test_rows_get_what_they_get_alone(trimtab: Command) -> None:
    assert "7 rows in out.jsonl" in trimtab(COMMAND).text
    made = read()
    assert [one["line"] for one in made] == [1, 2, 3, 4, 5, 6, 7]
    for one, row, (done, labels) in zip(made, ROWS, alone(), strict=True):
        assert one["text"] == done.text
        assert one["tokens"] == list(done.tokens)
        assert one["steering"] == labels
        assert one["prompt"] == row.get("prompt", row.get("messages"))
        assert one.get("id") == row.get("id")
    assert len({one["text"] for one in made}) > 4  # steerings show
    assert not list(Path().glob(".*"))  # no lock is left


def test_the_same_again_has_nothing_to_do(trimtab: Command, monkeypatch: Any) -> None:
    first = trimtab(f"{COMMAND} --json").json
    assert (first["rows"], first["written"], first["failed"]) == (7, 7, [])
    before = listing(Path())
    monkeypatch.setattr(tt.LanguageModel, "generate", None)
    again = trimtab(f"{COMMAND} --json").json
    assert (again["rows"], again["written"]) == (7, 0)
    assert listing(Path()) == before


@pytest.mark.parametrize("count", [1, 3, 6])
def test_it_goes_on_where_it_was_interrupted(
    count: int, trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--temperature 0.9 --seed 3"
    assert trimtab(f"{COMMAND} {options}").status == 0
    whole = Path("out.jsonl").read_bytes()
    left = 0

    def append(self: Journal, rows: Any, original: Any = Journal.append) -> None:
        nonlocal left
        if left == count:
            raise KeyboardInterrupt
        left += 1
        original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        stopped = trimtab(f"{GIVEN} {options} --input rows.jsonl --output other.jsonl")
    assert stopped.status == 130
    assert stopped.err.splitlines() == ["trimtab: interrupted"]
    assert len(read("other.jsonl")) == count
    with Path("other.jsonl").open("ab") as file:
        file.write(b'{"line": 9, "prom')  # as a process that is killed leaves it
    assert trimtab(f"{GIVEN} {options} --input rows.jsonl --output other.jsonl").status == 0
    assert Path("other.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--max-new-tokens 5", "options"),
        ("--steer caa.safetensors", "steerings"),
        ("--model other", "model"),
        ("--raw", "chat"),
    ],
)
def test_other_settings_are_refused(options: str, said: str, trimtab: Command) -> None:
    assert trimtab(COMMAND).status == 0
    before = listing(Path())
    words = shlex.split(COMMAND)
    name = options.split()[0]
    if name in words:
        place = words.index(name)
        del words[place : place + 2]
    changed = shlex.join([*words, *options.split()])
    refused(trimtab(f"{changed} --force"), "out.jsonl comes of other settings", said, "--overwrite")
    assert listing(Path()) == before
    assert trimtab(f"{changed} --force --overwrite").status == 0


def test_another_input_is_refused(trimtab: Command) -> None:
    assert trimtab(COMMAND).status == 0
    write_rows("rows.jsonl", ROWS[:-1])
    refused(trimtab(COMMAND), "other settings", "input")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: [*rows, rows[0]], "has a row already"),
        (lambda rows: [{**rows[0], "prompt": "Else"}, *rows[1:]], "no row of the input"),
        (lambda rows: [{**rows[0], "line": 70}, *rows[1:]], "no row of the input"),
        (lambda rows: [{**rows[0], "text": 7}, *rows[1:]], "neither a text nor an error"),
    ],
)
def test_a_damaged_output_is_refused(damage: Any, said: str, trimtab: Command) -> None:
    assert trimtab(COMMAND).status == 0
    write_rows("out.jsonl", damage(read()))
    refused(trimtab(COMMAND), "out.jsonl, line", said)


def test_a_file_of_something_else_is_refused(trimtab: Command) -> None:
    Path("out.jsonl").write_text("mine\n")
    refused(trimtab(COMMAND), "out.jsonl exists", "out.jsonl.settings.json")
    assert Path("out.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "steers": "caa.safetensors"}, "'steers' is nothing that a row has"),
        ({"text": "a"}, "'text' is nothing that a row has"),
        ({"id": 1}, "a row has a prompt, or messages"),
        ({"prompt": "a", "messages": MESSAGES}, "a row has a prompt, or messages"),
        ({"prompt": " "}, "empty"),
        ({"messages": "Why?"}, "messages are a list"),
        ({"prompt": [{"role": "user"}]}, "a message must be"),
        ({"prompt": "a", "id": 1.5}, "an id is"),
        ({"prompt": "a", "steer": "nobody.safetensors"}, "nobody.safetensors"),
        ({"prompt": "a", "steer": 7}, "steer is FILE"),
        ({"prompt": "a", "steer": [], "dial": 2}, "1 times dial for 0 steerings"),
        ({"prompt": "a", "dial": True}, "dial is a number"),
        ({"prompt": "a", "dial": "much"}, "much"),
        ({"prompt": "a", "scope": "nowhere"}, "nowhere"),
        ({"prompt": "a", "scope": 3}, "scope is text"),
        ({"prompt": "word " * 3000}, "do not go into"),
        ({"prompt": "a", "steer": "thin.safetensors"}, "thin"),
    ],
)
def test_what_is_wrong_with_a_row_has_its_line(
    row: dict[str, Any], said: str, trimtab: Command
) -> None:
    made = trimtab("fit caa --model small --contrast pairs.jsonl --layer 1 -o thin.safetensors")
    assert made.status == 0, made.err
    write_rows("rows.jsonl", [ROWS[0], row])
    line = refused(trimtab(COMMAND), "rows.jsonl, line 2: ")
    assert said in line or said == "thin"
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("generate --model model --input rows.jsonl", "both"),
        ("generate --model model --output out.jsonl", "both"),
        ("generate --model model --overwrite Hello", "--overwrite"),
        (f"{COMMAND} Hello", "prompts on the command line"),
        (f"{COMMAND} --prompts rows.jsonl", "--prompts"),
        (f"{COMMAND} --compare", "--compare"),
        (f"{COMMAND} --kl 0.1", "--kl"),
        (f"{COMMAND} --vllm max_model_len=9", "--vllm is for --engine vllm"),
        (f"{COMMAND} --temperature -1", "temperature"),
    ],
)
def test_what_does_not_go_together_is_refused(options: str, said: str, trimtab: Command) -> None:
    refused(trimtab(options), said)
    assert not Path("out.jsonl").exists()


def test_a_row_that_overflows_has_an_error_and_harms_no_other(trimtab: Command) -> None:
    write_rows("rows.jsonl", [*ROWS, {"prompt": "The sea", "steer": "caa.safetensors@1e38"}])
    line = refused_after_text(trimtab(COMMAND), "1 of 8 rows", "line 8 of rows.jsonl", "dial")
    assert "not finite" in line
    made = read()
    assert "not finite" in made[7]["error"]
    assert "text" not in made[7]
    assert [one["text"] for one in made[:7]] == [done.text for done, _ in alone()]
    refused_after_text(trimtab(COMMAND), "1 of 8 rows")  # nothing is tried again


def refused_after_text(ran: Any, *words: str) -> str:
    """A refusal after what was done is said."""
    assert ran.status == 2
    (line,) = [one for one in ran.err.splitlines() if "warning" not in one]
    assert all(word in line for word in words), line
    return str(line)


def test_python_has_the_same(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trimtab(COMMAND).status == 0
    lm, au = tt.load("model", device="cpu"), tt.Steering.read("au.safetensors@40")
    options = {"steering": au, "max_new_tokens": 6, "batch_size": 2}
    found = tt.generate_file(lm, "rows.jsonl", "two.jsonl", **options)
    assert (found.rows, found.written, found.failed) == (7, 7, ())
    assert Path("two.jsonl").read_bytes() == Path("out.jsonl").read_bytes()
    with generating.Output(Path("two.jsonl"), [], {}, True), pytest.raises(
        tt.TrimtabError, match="another process"
    ):  # fmt: skip
        tt.generate_file(lm, "rows.jsonl", "two.jsonl", **options)
