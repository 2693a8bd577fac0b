"""`trimtab contrast`: what is odd in a file is said, and rows get parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands import Command, refused, save_model, trimtab
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast, Pair, Text, check

__all__ = ["trimtab"]  # a fixture, which pytest finds by its name here

PIRATE = ("Arr, the {0} be ready, matey.", "Aye, I hid the {0} under me bunk, ye scallywag.")
PLAIN = ("Yes, the {0} is ready for you.", "I have put the {0} under my bed, as you asked.")
THINGS = ("map", "boat", "soup", "coat", "letter", "lamp", "rope", "chair", "book", "drum", "key")


def pirate(*exchanged: int) -> list[tuple[str, str, str]]:
    """22 pairs; those of the numbers given have their sides exchanged."""
    rows = []
    for i in range(22):
        thing, kind = THINGS[i // 2], i % 2
        sides = PIRATE[kind].format(thing), PLAIN[kind].format(thing)
        asked = f"Where is the {thing} ({kind})? "
        rows.append((asked, *(reversed(sides) if i + 1 in exchanged else sides)))
    return rows


def kinds(rows: Any) -> dict[str, tuple[int, ...]]:
    contrast = rows if isinstance(rows, Contrast) else Contrast.from_pairs(rows)
    return {found.kind: found.rows for found in check(contrast).warnings}


def test_nothing_is_odd_in_a_sound_contrast() -> None:
    assert kinds(pirate()) == {}
    assert kinds(Contrast.from_pairs(pirate()).split()) == {}
    assert kinds(Contrast.builtin("formality")) == {}


@pytest.mark.parametrize("exchanged", [(3,), (5, 18)])
def test_rows_whose_sides_are_exchanged(exchanged: tuple[int, ...]) -> None:
    assert kinds(pirate(*exchanged)) == {"exchanged": exchanged}


def test_columns_that_are_exchanged() -> None:
    turned = [(positive, prompt, negative) for prompt, positive, negative in pirate()]
    assert "columns" in kinds(turned)
    assert "columns" in kinds([(n, p, q) for q, p, n in pirate()])
    same = [(prompt, "Aye!", negative) for prompt, _, negative in pirate()]
    assert "constant" in kinds(same)
    repeated = [(prompt, prompt.strip(), negative) for prompt, _, negative in pirate()[:3]]
    assert kinds([*pirate(), *repeated])["repeats-prompt"] == (23, 24, 25)


def test_what_else_is_odd() -> None:
    rows = pirate()
    assert kinds([*rows, rows[4], rows[0]]) == {"duplicate": (23, 24)}
    hardly = ("So ", "we  go", "We go ")
    assert kinds([*rows, hardly])["hardly-differ"] == (23,)
    first, second, third = rows[2]
    assert kinds([*rows, (first, third, second)])["contradict"] == (3, 23)
    assert kinds([*rows, ("So", "it", "was")])["glued"] == (23,)
    assert "too-few" in kinds(rows[:6])
    assert "single" in kinds(rows[:1])
    long = [(prompt, "aye " * 30 + positive, negative) for prompt, positive, negative in rows]
    assert "longer" in kinds(long)
    parts: Any = ["train", "test"] * 11 + ["train", None]
    again = [*rows, (f" {rows[1][0].upper()}", "x", "y"), ("Else ", "x", "y")]
    named = Contrast(tuple(Pair(*row, part) for row, part in zip(again, parts, strict=True)))
    assert kinds(named) == {"two-parts": (2, 23), "no-part": (24,)}
    texts = Contrast((*(Text(f"a {i}", "positive") for i in range(10)), Text("b 1", "negative")))
    assert kinds(texts) == {"too-few": ()}


def test_lengths_are_counted_in_words() -> None:
    found = check(Contrast.from_pairs([("a b", "c", "d e f"), ("a", "c d", "e")]))
    assert found.unit == "words"
    assert (found.lengths["prompt"].least, found.lengths["prompt"].median) == (1, 1.5)
    assert found.lengths["negative"].most == 3
    assert found.parts == {"all": {"positive": 2, "negative": 2}}


# -- from the command line ------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Contrast.from_pairs(pirate()).to_jsonl("pirate.jsonl")
    return tmp_path


def test_check_says_what_there_is(trimtab: Command, work: Path) -> None:
    said = " ".join(trimtab("contrast check pirate.jsonl").text.split())
    for part in ("22 pairs", "all 22 22", "words least median most", "Nothing odd was found",
                 "positive 'Arr, the map be ready, matey.'"):  # fmt: skip
        assert part in said
    Contrast.from_pairs(pirate(3)).to_jsonl("odd.jsonl")
    assert (
        "warning: row 3: by their words the sides look exchanged"
        in trimtab("contrast check odd.jsonl").text
    )
    found = trimtab("contrast check odd.jsonl --json").json
    assert found["digest"] == Contrast.from_jsonl("odd.jsonl").digest
    assert [one["rows"] for one in found["warnings"]] == [[3]]
    assert [one["prompt"] for one in found["examples"]] == [row[0] for row in pirate()[:2]]


def test_check_refuses_what_fit_refuses(trimtab: Command, work: Path) -> None:
    Path("equal.csv").write_text("prompt;positive;negative\np;a;a\n")
    refused(trimtab("contrast check equal.csv"), "equal.csv, row 1: the two sides are equal")
    refused(trimtab("contrast check pirates.jsonl"), "did you mean pirate.jsonl?")
    Contrast((Pair("p", "a", "b", "test"),)).to_jsonl("test.jsonl")
    refused(trimtab("contrast check test.jsonl"), "test.jsonl has no train rows")


def test_check_with_a_model_counts_tokens(trimtab: Command, work: Path) -> None:
    save_model(work / "model", name="llama")
    found = trimtab("contrast check pirate.jsonl --model model --json").json
    assert found["unit"] == "tokens"
    tokenizer = tiny_tokenizer()
    prompts = [len(tokenizer(prompt).input_ids) for prompt, _, _ in pirate()]
    whole = [len(tokenizer(prompt + side).input_ids) for prompt, side, _ in pirate()]
    assert found["lengths"]["prompt"]["most"] == max(prompts)
    sides = [a - b for a, b in zip(whole, prompts, strict=True)]
    assert (found["lengths"]["positive"]["least"], found["lengths"]["positive"]["most"]) == (
        min(sides), max(sides),
    )  # fmt: skip


def test_fit_warns_of_exchanged_columns(trimtab: Command, work: Path) -> None:
    save_model(work / "model", name="llama")
    turned = [(positive, prompt, negative) for prompt, positive, negative in pirate()]
    Contrast.from_pairs(turned).to_jsonl("turned.jsonl")
    fit = "fit caa --model model --layer 1 --json -o a.safetensors -c"
    said = trimtab(f"{fit} turned.jsonl").err
    assert "turned.jsonl, most texts of the positive side end in a question mark" in said
    assert "(trimtab contrast check turned.jsonl has more)" in said
    assert trimtab(f"{fit} pirate.jsonl --overwrite").err == ""


def test_split_writes_parts(trimtab: Command, work: Path) -> None:
    found = trimtab("contrast split pirate.jsonl -o parts.jsonl --split 0.5,0.2,0.3:7 --json").json
    read = Contrast.from_jsonl("parts.jsonl")
    assert read.rows == Contrast.from_jsonl("pirate.jsonl").split(0.2, 0.3, 7).rows
    assert found["parts"] == read.sizes
    assert found["digest"] == read.digest
    before = Path("parts.jsonl").read_bytes()
    refused(trimtab("contrast split pirate.jsonl -o parts.jsonl"), "exists")
    assert Path("parts.jsonl").read_bytes() == before
    again = trimtab("contrast split parts.jsonl -o parts.jsonl --overwrite").text
    assert "22 rows, 14 train, 4 validation, 4 test" in " ".join(again.split())
    one = Contrast.from_pairs([("p", f"a{i}", f"b{i}") for i in range(9)])
    one.to_jsonl("one.jsonl")
    refused(trimtab("contrast split one.jsonl -o none.jsonl"), "too few different prompts")
    assert not Path("none.jsonl").exists()


def test_split_none_turns_any_file_into_jsonl(trimtab: Command, work: Path) -> None:
    Path("rows.csv").write_text("prompt;chosen;rejected\np; a; b\n")
    said = trimtab("contrast split rows.csv -o rows.jsonl --split none").text
    assert "Wrote rows.jsonl: 1 rows." in said
    row = json.loads(Path("rows.jsonl").read_text())
    assert row == {"prompt": "p", "positive": " a", "negative": " b"}


def test_show(trimtab: Command, work: Path) -> None:
    found = trimtab("contrast show pirate.jsonl --count 3 --json").json
    assert (found["size"], len(found["rows"])) == (22, 3)
    talk = (("system", "Be kind."), ("user", "Hi"))
    Contrast((Pair(talk, "a", "b"), Pair("p", "a", "b"))).to_jsonl("talk.jsonl")
    said = " ".join(trimtab("contrast show talk.jsonl --count 1").text.split())
    assert "prompt system: 'Be kind.' prompt user: 'Hi' positive 'a' negative 'b'" in said
    assert "1 of 2 rows" in said
    assert trimtab("contrast show builtin:formality --json").json["size"] > 100


def test_prompts_of_a_table(trimtab: Command, work: Path) -> None:
    save_model(work / "model", name="llama")
    Path("asked.csv").write_text("prompt;id\nToday; I feel;1\n")
    refused(
        trimtab("generate --model model --raw --prompts asked.csv"),
        "asked.csv, row 1 has more cells",
    )
    Path("asked.csv").write_text('prompt;id\n"Today; I feel";1\n')
    Path("asked.json").write_text(json.dumps([{"prompt": "Today; I feel"}]))
    run = "generate --model model --raw --max-new-tokens 2 --json --prompts"
    texts = [trimtab(f"{run} {name}").json["outputs"] for name in ("asked.csv", "asked.json")]
    assert texts[0] == texts[1]
    assert texts[0][0]["prompt"] == "Today; I feel"
    refused(trimtab(f"{run} askd.csv"), "did you mean asked.csv?")
