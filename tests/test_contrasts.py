"""Contrasting texts: reading them, refusing bad ones, parts, and the builtin contrasts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab import Contrast, TrimtabError
from trimtab.contrasts import PARTS, Pair, Text, builtins
from trimtab.evaluation.tasks import load_contrast

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
PAIRS = [
    {"prompt": "Today I feel", "positive": " happy", "negative": " sad"},
    {"prompt": MESSAGES, "positive": "Hi!", "negative": "What?", "part": "test"},
    {"prompt": "So", "positive": "", "negative": "?", "part": "train"},
    {"prompt": "", "positive": "good", "negative": "bad"},
]
TEXTS = [
    {"text": "What a day!", "label": "positive"},
    {"text": MESSAGES, "label": "negative", "part": "validation"},
]


def _jsonl(path: Path, rows: list[Any], ensure_ascii: bool = False) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


# -- reading ----------------------------------------------------------------------------------


def test_it_shows_itself_in_a_line_and_its_first_rows_in_a_notebook() -> None:
    pairs = Contrast.from_pairs([("a <b>", " x", " y")] * 2 + [("c", " z", " w")] * 30, "mine")
    assert repr(pairs) == "<Contrast mine: 32 pairs>"
    parts = repr(Contrast.builtin("formality"))
    assert parts == "<Contrast builtin:formality: 360 pairs (200 train, 60 validation, 100 test)>"
    html = pairs._repr_html_()
    assert "<td>a &lt;b&gt;</td><td> x</td><td> y</td>" in html
    assert html.count("<tr>") == 4
    assert repr(Contrast.from_texts(["a"], ["b"])) == "<Contrast contrast: 2 texts>"


def test_paired_jsonl(tmp_path: Path) -> None:
    contrast = Contrast.from_jsonl(_jsonl(tmp_path / "pairs.jsonl", PAIRS))
    conversation = (("system", "Be kind."), ("user", "Hello"))
    assert contrast.paired
    assert contrast.rows == (
        Pair("Today I feel", " happy", " sad"),
        Pair(conversation, "Hi!", "What?", "test"),
        Pair("So", "", "?", "train"),
        Pair("", "good", "bad"),
    )
    assert (len(contrast), contrast.pairs, contrast.texts) == (4, contrast.rows, ())
    assert contrast.name == str(tmp_path / "pairs.jsonl")


def test_unpaired_jsonl(tmp_path: Path) -> None:
    contrast = load_contrast(str(_jsonl(tmp_path / "texts.jsonl", TEXTS)))
    assert not contrast.paired
    assert contrast.rows == (
        Text("What a day!", "positive"),
        Text((("system", "Be kind."), ("user", "Hello")), "negative", "validation"),
    )
    assert (contrast.texts, contrast.pairs) == (contrast.rows, ())


def test_csv_says_the_same_as_jsonl(tmp_path: Path) -> None:
    quoted = json.dumps(MESSAGES).replace('"', '""')
    (tmp_path / "pairs.csv").write_text(
        "prompt,positive,negative,part\n"
        "Today I feel, happy, sad,\n"
        f'"{quoted}",Hi!,What?,test\n'
        'So,,?,"train"\n'
        ",good,bad,\n",
        encoding="utf-8",
    )
    (tmp_path / "texts.csv").write_text(
        f'text,part,label\nWhat a day!,,positive\n"{quoted}",validation,negative\n',
        encoding="utf-8",
    )
    for kind, rows in (("pairs", PAIRS), ("texts", TEXTS)):
        by_csv = load_contrast(str(tmp_path / f"{kind}.csv"))
        by_jsonl = load_contrast(str(_jsonl(tmp_path / f"{kind}.jsonl", rows)))
        assert by_csv.rows == by_jsonl.rows
        assert by_csv.digest == by_jsonl.digest


def test_lists() -> None:
    contrast = Contrast.from_pairs(
        [("Today I feel", " happy", " sad"), (MESSAGES, "Hi!", "What?")], name="mine"
    )
    assert contrast.name == "mine"
    assert contrast.pairs[1].prompt == (("system", "Be kind."), ("user", "Hello"))
    unpaired = Contrast.from_texts(["good", MESSAGES], iter(["bad"]))
    assert [row.label for row in unpaired.texts] == ["positive", "positive", "negative"]
    # What was read before may be given again.
    assert Contrast.from_pairs([(contrast.pairs[1].prompt, "a", "b")]).pairs[0].prompt == (
        contrast.pairs[1].prompt
    )


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    # str.splitlines() would cut at each of these.
    text = f"one{separator}two"
    rows = [{"prompt": text, "positive": text, "negative": "x"}]
    (tmp_path / "csv.csv").write_text(f'prompt,positive,negative\n"{text}","{text}",x\n', "utf-8")
    # JSON wants control characters escaped; U+2028 and its like may stand as they are.
    jsonl = _jsonl(tmp_path / "lines.jsonl", rows, ensure_ascii=False)
    for contrast in (Contrast.from_jsonl(jsonl), Contrast.from_csv(tmp_path / "csv.csv")):
        assert contrast.rows == (Pair(text, text, "x"),)


def test_newlines_inside_quoted_csv_cells_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(b'prompt,positive,negative\r\n"a\nb",c,d\r\n\r\ne,f,g\r\n')
    assert Contrast.from_csv(path).rows == (Pair("a\nb", "c", "d"), Pair("e", "f", "g"))
    path = tmp_path / "pairs.jsonl"
    path.write_text('\n{"prompt":"a","positive":"b","negative":"c"}\r\n  \n', "utf-8")
    assert Contrast.from_jsonl(path).rows == (Pair("a", "b", "c"),)


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    # Spreadsheets put one at the beginning of a UTF-8 file.
    for name, text in (
        ("pairs.csv", "prompt,positive,negative\na,b,c\n"),
        ("pairs.jsonl", '{"prompt": "a", "positive": "b", "negative": "c"}\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_contrast(str(tmp_path / name)).rows == (Pair("a", "b", "c"),)


def test_texts_come_back_exactly(tmp_path: Path) -> None:
    text = "  Zoë\t漢字 🙂 \r\n\n end "
    rows = [{"prompt": text, "positive": text, "negative": text + " "}]
    for ensure_ascii in (True, False):
        path = _jsonl(tmp_path / "pairs.jsonl", rows, ensure_ascii)
        assert Contrast.from_jsonl(path).rows == (Pair(text, text, text + " "),)


# -- digest -----------------------------------------------------------------------------------


def test_digest_depends_on_texts_and_order_only(tmp_path: Path) -> None:
    rows = [("a", "b", "c"), ("d", "e", "f")]
    contrast = Contrast.from_pairs(rows, name="one")
    same = [
        Contrast.from_pairs(rows, name="two"),
        contrast.split(seed=3),
        Contrast.from_jsonl(
            _jsonl(
                tmp_path / "pairs.jsonl",
                [
                    {"negative": "c", "positive": "b", "prompt": "a", "part": "train"},
                    {"negative": "f", "positive": "e", "prompt": "d"},
                ],
            )
        ),
    ]
    assert {other.digest for other in same} == {contrast.digest}
    assert re.fullmatch("[0-9a-f]{64}", contrast.digest)
    other = [
        Contrast.from_pairs(rows[::-1]),
        Contrast.from_pairs(rows[:1]),
        Contrast.from_pairs([("a", "c", "b"), rows[1]]),
        Contrast.from_pairs([("ab", "b", "c"), rows[1]]),
        Contrast.from_pairs([([{"role": "user", "content": "a"}], "b", "c"), rows[1]]),
        Contrast.from_pairs([([{"role": "system", "content": "a"}], "b", "c"), rows[1]]),
        Contrast.from_texts(["a"], ["b"]),
        Contrast.from_texts(["b"], ["a"]),
    ]
    digests = {contrast.digest, *(contrast.digest for contrast in other)}
    assert len(digests) == 1 + len(other)


# -- what bad input gets ----------------------------------------------------------------------

GOOD = '{"prompt": "p", "positive": "a", "negative": "b"}\n'
LABELLED = '{"text": "t", "label": "positive"}\n'

#: Name, suffix, content of the file, and what the message must say.
BAD_FILES: list[tuple[str, str, str | bytes, list[str]]] = [
    ("empty", ".jsonl", "", ["empty"]),
    ("only blank lines", ".jsonl", "\n \n", ["empty"]),
    ("only a header", ".csv", "prompt,positive,negative\n", ["empty"]),
    ("not UTF-8", ".jsonl", GOOD.encode() + b'{"prompt": "\xe9"}\n', ["UTF-8"]),
    ("not UTF-8", ".csv", b"prompt,positive,negative\n\xe9,a,b\n", ["UTF-8"]),
    ("UTF-16", ".jsonl", GOOD.encode("utf-16"), ["UTF-8"]),
    ("bad JSON", ".jsonl", GOOD + "\n{oops}\n", ["line 3", "not JSON"]),
    ("two objects on a line", ".jsonl", GOOD.strip() + GOOD, ["line 1", "not JSON"]),
    ("JSON too deep", ".jsonl", "[" * 100_000 + "\n", ["not JSON"]),
    ("JSON number too long", ".jsonl", '{"prompt": ' + "9" * 5000 + "}\n", ["line 1", "not JSON"]),
    ("not an object", ".jsonl", GOOD + "[1, 2]\n", ["line 2", "not a JSON object"]),
    ("a number", ".jsonl", "3\n", ["line 1", "not a JSON object"]),
    ("no prompt", ".jsonl", GOOD + '{"positive": "a", "negative": "b"}', ["row 2", "'prompt'"]),
    ("no positive", ".jsonl", '{"prompt": "p", "negative": "b"}', ["row 1", "'positive'"]),
    ("no negative", ".jsonl", '{"prompt": "p", "positive": "b"}', ["row 1", "'negative'"]),
    ("short row", ".csv", "prompt,positive,negative\np,a\n", ["row 1", "'negative'"]),
    ("long row", ".csv", "prompt,positive,negative\np,a,b,c\n", ["row 1", "more cells"]),
    ("no header", ".csv", "p,a,b\nq,c,d\n", ["row 1", "known are prompt, positive"]),
    ("open quote", ".csv", 'prompt,positive,negative\n"p,a,b\nq,c,d\n', ["CSV"]),
    ("bad messages", ".csv", 'prompt,positive,negative\n"[{oops",a,b\n', ["row 1, prompt", "JSON"]),
    ("no text", ".jsonl", '{"label": "positive"}', ["row 1", "must be text"]),
    ("no label", ".jsonl", LABELLED + '{"text": "t"}\n', ["row 2", '"label"']),
    ("unknown label", ".jsonl", '{"text": "t", "label": "good"}', ["row 1", '"label"']),
    ("equal sides", ".jsonl", GOOD + GOOD.replace('"b"', '"a"'), ["row 2", "equal", "'a'"]),
    ("equal sides", ".csv", "prompt,positive,negative\np,a,b\np,b,b\n", ["row 2", "equal"]),
    ("empty text", ".jsonl", '{"text": " ", "label": "positive"}', ["row 1", "empty"]),
    ("empty side", ".jsonl", '{"prompt": "", "positive": "", "negative": "b"}', ["row 1", "empty"]),
    ("unknown field", ".jsonl", GOOD.replace("}", ', "lable": "x"}'), ["row 1", "'lable'"]),
    ("mixed rows", ".jsonl", GOOD + LABELLED, ["mixes"]),
    ("mixed fields", ".jsonl", GOOD.replace("}", ', "text": "t"}'), ["row 1", "mixes"]),
    ("pair and label", ".jsonl", GOOD.replace("}", ', "label": "positive"}'), ["row 1", "mixes"]),
    ("one label", ".jsonl", LABELLED + LABELLED, ["both labels"]),
    ("bad part", ".jsonl", GOOD.replace("}", ', "part": "dev"}'), ["row 1", "'dev'", "validation"]),
    ("part no text", ".jsonl", GOOD.replace("}", ', "part": ["test"]}'), ["row 1", "part"]),
    ("number as prompt", ".jsonl", GOOD.replace('"p"', "3"), ["row 1", "prompt"]),
    ("no messages", ".jsonl", GOOD.replace('"p"', "[]"), ["row 1", "prompt"]),
    ("messages of numbers", ".jsonl", GOOD.replace('"p"', "[1, 2]"), ["row 1", "message"]),
    # Two letters are two texts, but not a role and a content.
    ("messages of text", ".jsonl", GOOD.replace('"p"', '["hi", "ho"]'), ["row 1", "message"]),
    ("no role", ".jsonl", GOOD.replace('"p"', '[{"content": "hi"}]'), ["row 1", "message"]),
    ("no content", ".jsonl", GOOD.replace('"p"', '[{"role": "user"}]'), ["row 1", "message"]),
    ("null side", ".jsonl", GOOD.replace('"a"', "null"), ["row 1", "must be text"]),
    ("list side", ".jsonl", GOOD.replace('"b"', '["b"]'), ["row 1", "must be text"]),
    # Half a character: JSON can write it, no tokenizer can read it.
    ("half a character", ".jsonl", GOOD.replace('"a"', '"\\ud83d"'), ["line 1", "surrogate"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [bad[1:] for bad in BAD_FILES],
    ids=[f"{bad[0]} {bad[1]}" for bad in BAD_FILES],
)
def test_bad_file(tmp_path: Path, suffix: str, content: str | bytes, says: list[str]) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    _refused(lambda: load_contrast(str(path)), [str(path), *says])


def _refused(action: Callable[[], Any], says: list[str]) -> None:
    with pytest.raises(TrimtabError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for part in says:
        assert part in message, message


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    for name in ("missing.jsonl", "missing.csv"):
        path = str(tmp_path / name)
        _refused(lambda path=path: load_contrast(path), [path, "No such file"])
    _refused(lambda: load_contrast(str(tmp_path)), [str(tmp_path), "directory"])


BAD_LISTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no pairs": (lambda: Contrast.from_pairs([], name="mine"), ["mine", "empty"]),
    "no texts": (lambda: Contrast.from_texts([], []), ["empty"]),
    "no negatives": (lambda: Contrast.from_texts(["a"], []), ["both labels"]),
    "equal": (lambda: Contrast.from_pairs([("p", "a", "b"), ("p", "a", "a")]), ["row 2", "equal"]),
    "two of three": (lambda: Contrast.from_pairs([("p", "a")]), ["row 1", "(prompt, positive"]),
    "four of three": (lambda: Contrast.from_pairs([("p", "a", "b", "c")]), ["row 1"]),
    "text as a pair": (lambda: Contrast.from_pairs(["p"]), ["row 1"]),
    "number": (lambda: Contrast.from_texts([1], ["a"]), ["row 1", "list of messages"]),
    "builtin": (lambda: Contrast.builtin("nope"), ["'nope'", "facts", "formality"]),
    "load builtin": (lambda: load_contrast("builtin:nope"), ["'nope'", "facts"]),
    "take none": (lambda: Contrast.from_pairs([("p", "a", "b")]).take(0), ["empty"]),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists(name: str) -> None:
    action, says = BAD_LISTS[name]
    _refused(action, says)


# -- parts ------------------------------------------------------------------------------------


def _numbered(count: int, per_prompt: int = 1) -> Contrast:
    return Contrast.from_pairs(
        [(f"prompt {i // per_prompt}", f"good {i}", f"bad {i}") for i in range(count)]
    )


def _sizes(contrast: Contrast) -> dict[str, int]:
    counts = Counter(row.part for row in contrast.rows)
    return {part: counts[part] for part in PARTS}


@pytest.mark.parametrize(
    ("count", "validation", "test", "sizes"),
    [
        (100, 0.2, 0.2, {"train": 60, "validation": 20, "test": 20}),
        (10, 0.1, 0.3, {"train": 6, "validation": 1, "test": 3}),
        (7, 0.0, 0.5, {"train": 3, "validation": 0, "test": 4}),
        (5, 0.0, 0.0, {"train": 5, "validation": 0, "test": 0}),
    ],
)
def test_split_sizes(count: int, validation: float, test: float, sizes: dict[str, int]) -> None:
    contrast = _numbered(count)
    split = contrast.split(validation, test)
    assert _sizes(split) == sizes
    # The rows, their order and their texts are the ones that were given.
    assert [(row.prompt, row.positive, row.negative) for row in split.pairs] == [
        (row.prompt, row.positive, row.negative) for row in contrast.pairs
    ]


def test_split_is_random_and_repeatable() -> None:
    contrast = _numbered(60)
    assert contrast.split(seed=1).rows == contrast.split(seed=1).rows
    assert contrast.split(seed=1).rows != contrast.split(seed=2).rows
    # At random: not the first rows here and the last rows there.
    parts = [row.part for row in contrast.split().rows]
    assert len(set(parts[:20])) == len(set(parts[40:])) == 3
    # Splitting again forgets the parts of before.
    assert contrast.split(seed=1).split(seed=2).rows == contrast.split(seed=2).rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_prompt", [2, 3, 7])
def test_a_prompt_is_never_in_two_parts(seed: int, per_prompt: int) -> None:
    split = _numbered(84, per_prompt).split(seed=seed)
    parts: dict[Any, set[str | None]] = {}
    for row in split.pairs:
        parts.setdefault(row.prompt, set()).add(row.part)
    assert all(len(found) == 1 for found in parts.values())
    sizes = _sizes(split)
    assert sum(sizes.values()) == 84
    assert 0 <= sizes["test"] - 17 < per_prompt
    assert 0 <= sizes["validation"] - 17 < per_prompt


def test_split_leaves_something_to_train_on() -> None:
    # One prompt for all rows cannot be divided, and methods need a train part.
    assert _sizes(_numbered(10, per_prompt=10).split()) == {"train": 10, "validation": 0, "test": 0}
    assert _sizes(_numbered(2).split(0.45, 0.45))["train"] == 1
    for validation, test in ((0.5, 0.5), (-0.1, 0.2), (0.2, -0.1), (1.0, 0.0), (float("nan"), 0.1)):
        _refused(lambda v=validation, t=test: _numbered(10).split(v, t), ["split", "train"])


def test_split_of_texts_and_conversations() -> None:
    texts = Contrast.from_texts([f"good {i}" for i in range(20)], [f"bad {i}" for i in range(20)])
    assert _sizes(texts.split()) == {"train": 24, "validation": 8, "test": 8}
    talk = [[{"role": "user", "content": str(i // 2)}] for i in range(20)]
    split = Contrast.from_pairs([(prompt, "a", "b") for prompt in talk]).split()
    parts = {(row.prompt, row.part) for row in split.pairs}
    assert len(parts) == 10


def test_part_and_train() -> None:
    contrast = _numbered(10).split(seed=4)
    for part in PARTS:
        chosen = contrast.part(part)
        assert chosen.rows == tuple(row for row in contrast.rows if row.part == part)
        assert chosen.name == contrast.name
    assert contrast.train.rows == contrast.part("train").rows
    whole = _numbered(3)
    assert whole.train is whole  # no row names a part, so all of them are for training
    _refused(lambda: whole.part("test"), ["no test rows", "split"])
    only_test = Contrast((Pair("p", "a", "b", "test"),))
    _refused(lambda: only_test.train, ["no train rows"])


def test_take() -> None:
    assert _numbered(10).take(3).rows == _numbered(10).rows[:3]
    assert len(_numbered(2).take(5)) == 2
    texts = Contrast.from_texts(["a", "b", "c"], ["d", "e"])
    assert [(row.text, row.label) for row in texts.take(2).texts] == [
        ("a", "positive"),
        ("b", "positive"),
        ("d", "negative"),
        ("e", "negative"),
    ]


# -- the ones that come with trimtab ----------------------------------------------------------


def _words(row: Pair) -> list[str]:
    assert isinstance(row.prompt, str)
    texts = (row.prompt + row.positive, row.prompt + row.negative)
    return [re.sub(r"[^\w\s]|_", "", text.lower()) for text in texts]


def _runs(row: Pair, length: int = 5) -> set[tuple[str, ...]]:
    """Every run of `length` words of a row's two texts."""
    found = set()
    for text in _words(row):
        words = text.split()
        found |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return found


def test_there_are_builtins() -> None:
    assert {"facts", "formality", "warmth"} <= set(builtins())
    assert builtins() == sorted(builtins())


@pytest.mark.parametrize("name", builtins())
def test_builtin_is_whole(name: str) -> None:
    contrast = load_contrast(f"builtin:{name}")
    assert contrast.name == f"builtin:{name}"
    assert contrast.paired
    assert len(contrast) >= 200
    sizes = _sizes(contrast)
    assert sum(sizes.values()) == len(contrast)  # every row names its part
    assert sizes["train"] >= 120
    assert min(sizes["validation"], sizes["test"]) >= 36
    assert len({row.prompt for row in contrast.pairs}) == len(contrast)
    for row in contrast.pairs:
        assert isinstance(row.prompt, str)
        assert all(text.strip() for text in (row.prompt, row.positive, row.negative)), row


@pytest.mark.parametrize("name", builtins())
@pytest.mark.parametrize("part", ["validation", "test"])
def test_builtin_parts_share_no_wording(name: str, part: Any) -> None:
    contrast = Contrast.builtin(name)
    trained = {run: row for row in contrast.train.pairs for run in _runs(row)}
    assert trained
    for row in contrast.part(part).pairs:
        shared = _runs(row) & set(trained)
        assert not shared, f"{row} and {trained[next(iter(shared))]}"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("answers", [("yes", "no"), ("true", "false")])
def test_facts_do_not_favour_yes(part: Any, answers: tuple[str, str]) -> None:
    # Otherwise a method could learn to say yes instead of what is true.
    counts: Counter[str] = Counter()
    for row in Contrast.builtin("facts").part(part).pairs:
        positive, negative = (
            re.findall(r"\w+", side.lower()) for side in (row.positive, row.negative)
        )
        if {positive[0], negative[0]} == set(answers):
            counts[positive[0]] += 1
    assert counts[answers[0]] == counts[answers[1]] > 0
