"""Contrasting texts: where a steering comes from.

A contrast is either *paired* (one prompt, a positive and a negative continuation, appended to the
prompt exactly as they are) or *unpaired* (texts, each labelled positive or negative). A prompt or
text is a string, taken raw, or a conversation, which goes through the model's chat template.
Rows may name the part they belong to (train, validation, test); methods are fitted on train only.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from trimtab.errors import TrimtabError
from trimtab.files import json_digest, json_object, parse_json

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
#: A conversation: messages as (role, content).
Conversation = tuple[tuple[str, str], ...]
Prompt = str | Conversation
#: How a list of JSON objects begins; JSON's blanks are these four.
_MESSAGES = re.compile(r"\ufeff?[ \t\r\n]*\[[ \t\r\n]*\{")


@dataclass(frozen=True)
class Pair:
    """One prompt with its two continuations."""

    prompt: Prompt
    positive: str
    negative: str
    part: Part | None = None


@dataclass(frozen=True)
class Text:
    """One text of an unpaired contrast."""

    text: Prompt
    label: Literal["positive", "negative"]
    part: Part | None = None


@dataclass(frozen=True)
class Contrast:
    """Contrasting texts, in order, with a name for people and a digest for records."""

    rows: tuple[Pair | Text, ...]
    name: str = "contrast"

    def __post_init__(self) -> None:
        if not self.rows:
            raise TrimtabError(f"{self.name}: the contrast is empty")
        if not self.paired and len({row.label for row in self.texts}) < 2:
            raise TrimtabError(f"{self.name}: an unpaired contrast needs both labels")

    # -- where it comes from ------------------------------------------------------------------

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[Any, str, str]], name: str = "contrast") -> Contrast:
        """From (prompt, positive, negative); a prompt is text or a list of chat messages."""
        rows = []
        for number, pair in enumerate(pairs, 1):
            if isinstance(pair, str) or len(pair) != 3:
                raise TrimtabError(f"{name}, row {number}: must be (prompt, positive, negative)")
            rows.append(dict(zip(("prompt", "positive", "negative"), pair, strict=True)))
        return cls._from_rows(rows, name)

    @classmethod
    def from_texts(
        cls, positive: Iterable[Any], negative: Iterable[Any], name: str = "contrast"
    ) -> Contrast:
        """From two sets of texts that do not belong together in pairs."""
        rows = [{"text": text, "label": "positive"} for text in positive]
        rows += [{"text": text, "label": "negative"} for text in negative]
        return cls._from_rows(rows, name)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Contrast:
        """One JSON object a line: prompt, positive, negative; or text, label."""
        rows = []
        # Iterating over the file, not str.splitlines(): texts may hold U+2028 and the like.
        with _open_text(Path(path)) as lines:
            try:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        rows.append(json_object(line, f"{path}, line {number}"))
            except UnicodeDecodeError as error:
                raise TrimtabError(f"{path} is not UTF-8 text: {error}") from error
        return cls._from_rows(rows, str(path))

    @classmethod
    def from_csv(cls, path: str | Path) -> Contrast:
        """The same columns as in JSONL; a prompt that begins as messages do in JSON, with `[{`
        whatever the blanks, is read as messages."""
        with _open_text(Path(path)) as lines:
            try:
                # Strict, or a quote that nobody closes would swallow the rest of the file.
                rows: list[dict[str, Any]] = [
                    {
                        key: value
                        for key, value in row.items()
                        if value is not None and (key, value) != ("part", "")
                    }
                    for row in csv.DictReader(lines, strict=True)
                ]
            except (UnicodeDecodeError, csv.Error) as error:
                raise TrimtabError(f"{path} cannot be read as CSV: {error}") from error
        for number, row in enumerate(rows, 1):
            for key in ("prompt", "text"):
                if key in row:
                    row[key] = read_cell(row[key], f"{path}, row {number}, {key}")
        return cls._from_rows(rows, str(path))

    @classmethod
    def builtin(cls, name: str) -> Contrast:
        """A contrast that comes with trimtab; `builtins()` lists their names."""
        if name not in builtins():
            raise TrimtabError(f"no builtin contrast {name!r}: there are {', '.join(builtins())}")
        rows = [json.loads(line) for line in _builtin_file(name).open(encoding="utf-8")]
        return cls._from_rows(rows, f"builtin:{name}")

    @classmethod
    def _from_rows(cls, rows: Iterable[Mapping[str, Any]], name: str) -> Contrast:
        read = [_row(row, f"{name}, row {number}") for number, row in enumerate(rows, 1)]
        pairs = [row for row in read if isinstance(row, Pair)]
        texts = [row for row in read if isinstance(row, Text)]
        if pairs and texts:
            raise TrimtabError(f"{name} mixes paired rows (prompt) and unpaired rows (text)")
        return cls(tuple(pairs) or tuple(texts), name)

    # -- what is in it ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def paired(self) -> bool:
        return isinstance(self.rows[0], Pair)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple(row for row in self.rows if isinstance(row, Pair))

    @property
    def texts(self) -> tuple[Text, ...]:
        return tuple(row for row in self.rows if isinstance(row, Text))

    @property
    def digest(self) -> str:
        """SHA-256 of the texts in their order, whatever file they came from."""
        content = [
            [row.prompt, row.positive, row.negative]
            if isinstance(row, Pair)
            else [row.text, row.label]
            for row in self.rows
        ]
        return json_digest(content, ensure_ascii=False, separators=(",", ":"))

    # -- parts --------------------------------------------------------------------------------

    def part(self, part: Part) -> Contrast:
        """The rows of one part."""
        rows = tuple(row for row in self.rows if row.part == part)
        if not rows:
            raise TrimtabError(f"{self.name} has no {part} rows: name parts, or call split()")
        return replace(self, rows=rows)

    @property
    def train(self) -> Contrast:
        """What methods are fitted on: the train part, or everything where no row names a part."""
        return self.part("train") if any(row.part for row in self.rows) else self

    def split(self, validation: float = 0.2, test: float = 0.2, seed: int = 0) -> Contrast:
        """The same rows, each given a part at random.

        Rows with the same prompt go to the same part, so that no test prompt was trained on.
        """
        if not (validation >= 0 and test >= 0 and validation + test < 1):
            raise TrimtabError(
                f"split: validation {validation} and test {test} must leave some rows for train"
            )
        groups: dict[Any, list[int]] = {}
        for index, row in enumerate(self.rows):
            groups.setdefault(row.prompt if isinstance(row, Pair) else row.text, []).append(index)
        order = list(groups.values())
        random.Random(seed).shuffle(order)
        wanted: list[tuple[Part, float]] = [
            ("test", test * len(self)),
            ("validation", validation * len(self)),
        ]
        parts: dict[int, Part] = {}
        for part, size in wanted:
            taken = 0
            # One group stays in train whatever the sizes.
            while len(order) > 1 and taken < round(size):
                group = order.pop()
                parts.update(dict.fromkeys(group, part))
                taken += len(group)
        rows = (replace(row, part=parts.get(i, "train")) for i, row in enumerate(self.rows))
        return replace(self, rows=tuple(rows))

    def resample(self, seed: int = 0) -> Contrast:
        """The train rows drawn anew with replacement (of an unpaired contrast within each label),
        and the other parts as they are: what error bars of a fit are made from."""
        draw = random.Random(seed)
        train = self.train.rows
        groups: dict[Any, list[Pair | Text]] = {}
        for row in train:
            groups.setdefault(row.label if isinstance(row, Text) else None, []).append(row)
        drawn = [row for group in groups.values() for row in draw.choices(group, k=len(group))]
        chosen = {id(row) for row in train}
        return replace(self, rows=(*drawn, *(row for row in self.rows if id(row) not in chosen)))

    def take(self, count: int) -> Contrast:
        """The first rows; of an unpaired contrast the first of each label."""
        if self.paired:
            return replace(self, rows=self.pairs[:count])
        positive = [row for row in self.texts if row.label == "positive"][:count]
        negative = [row for row in self.texts if row.label == "negative"][:count]
        return replace(self, rows=(*positive, *negative))


def builtins() -> list[str]:
    """Names of the contrasts that come with trimtab."""
    folder = files("trimtab") / "data" / "contrasts"
    return sorted(f.name.removesuffix(".jsonl") for f in folder.iterdir() if ".jsonl" in f.name)


def _builtin_file(name: str) -> Any:
    return files("trimtab") / "data" / "contrasts" / f"{name}.jsonl"


def last_message(prompt: Any) -> str:
    """A prompt as text: of a conversation, also as it comes back from JSON, its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1][1])


def read_cell(text: str, where: str) -> Any:
    """A prompt in a CSV file: messages, where it begins as a list of JSON objects does, or text."""
    return parse_json(text.lstrip("\ufeff"), where) if _MESSAGES.match(text) else text


def read_prompt(value: Any, where: str) -> Prompt:
    """Text as it is; a list of {"role", "content"} messages as a conversation."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value:
        return tuple(_message(message, where) for message in value)
    raise TrimtabError(f"{where}: a prompt must be text or a list of messages")


def _message(message: Any, where: str) -> tuple[str, str]:
    if isinstance(message, Mapping):
        message = (message.get("role"), message.get("content"))
    if isinstance(message, list | tuple) and len(message) == 2:
        role, content = message
        if isinstance(role, str) and isinstance(content, str):
            return (role, content)
    raise TrimtabError(f'{where}: a message must be {{"role": TEXT, "content": TEXT}}')


def _row(row: Mapping[str, Any], where: str) -> Pair | Text:
    part = row.get("part")
    if part is not None and part not in PARTS:
        raise TrimtabError(f"{where}: part {part!r} is none of {', '.join(PARTS)}")
    unknown = set(row) - {"prompt", "positive", "negative", "text", "label", "part"}
    if unknown:
        raise TrimtabError(f"{where}: unknown field {sorted(map(str, unknown))[0]!r}")
    if "text" in row or "label" in row:
        if "prompt" in row or "positive" in row or "negative" in row:
            raise TrimtabError(f"{where} mixes the fields of a pair and of a labelled text")
        if row.get("label") not in ("positive", "negative"):
            raise TrimtabError(f'{where}: "label" must be "positive" or "negative"')
        text = read_prompt(row.get("text"), where)
        if isinstance(text, str) and not text.strip():
            raise TrimtabError(f"{where}: the text is empty")
        return Text(text, row["label"], part)
    for key in ("prompt", "positive", "negative"):
        if key not in row:
            raise TrimtabError(
                f"{where}: {key!r} is missing (rows have prompt, positive, negative)"
            )
    positive, negative = row["positive"], row["negative"]
    if not isinstance(positive, str) or not isinstance(negative, str):
        raise TrimtabError(f"{where}: positive and negative must be text")
    if positive == negative:
        raise TrimtabError(f"{where}: the two sides are equal ({positive[:40]!r})")
    prompt = read_prompt(row["prompt"], where)
    if prompt == "" and not (positive.strip() and negative.strip()):
        raise TrimtabError(f"{where}: one of the two texts is empty")
    return Pair(prompt, positive, negative, part)


def _open_text(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise TrimtabError(f"cannot read the contrast {path}: {error.strerror}") from error
