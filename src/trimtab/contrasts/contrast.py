"""Contrasting texts: where a steering comes from.

A contrast is either *paired* (one prompt, a positive and a negative continuation, appended to the
prompt exactly as they are) or *unpaired* (texts, each labelled positive or negative). A prompt or
text is a string, taken raw, or a conversation, which goes through the model's chat template and may
hold images.

Rows may name the part they belong to (train, validation, test); methods are fitted on train only.
Where no row does, `fit` of a method takes all rows, and what measures on rows that are held out
(`evaluate`, `sweep`, `compare`, analyses of a task) draws them as `with_parts` says. So does the
command line everywhere, `trimtab fit` too, so that what it fits can be evaluated.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from trimtab.contrasts.files import read_csv, read_json, read_table
from trimtab.contrasts.held_out import Row, drawn_parts, too_few
from trimtab.contrasts.images import Image
from trimtab.contrasts.rows import (
    PARTS,
    Pair,
    Part,
    Prompt,
    Text,
    as_messages,
    images_in,
    last_message,
    read_rows,
)
from trimtab.errors import TrimtabError
from trimtab.files import exists, json_digest, json_object, user_path, write_whole
from trimtab.options import SPLIT, Split

#: Rows that a notebook shows.
_SHOWN = 3


@dataclass(frozen=True, repr=False)
class Contrast:
    """Contrasting texts, in order, with a name for people and a digest for records.

    `drawn` is the split that gave the rows their parts; None where they name them, or have none.
    `made` says how a model wrote the rows, and who kept which of them; None of other rows. A file
    has it in another one beside it (`made_beside`), and where its rows were changed since, `made`
    has "edited".

    `behaviour` says in words what the positive side does, as after "Please" ("write formally"), and
    `opposite` what the negative side does; nothing where nobody has said.
    """

    rows: tuple[Pair | Text, ...]
    name: str = "contrast"
    drawn: Split | None = None
    made: Mapping[str, Any] | None = field(default=None, compare=False)
    behaviour: str = field(default="", compare=False)
    opposite: str = field(default="", compare=False)

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
    def from_file(cls, path: str | Path) -> Contrast:
        """From .csv or .tsv as `from_csv`, from any other file as `from_jsonl`."""
        if user_path(path).suffix.lower() == ".txt":
            raise TrimtabError(
                f"{path} is plain text, and a contrast has two sides: write JSONL or CSV with "
                "prompt, positive and negative, or with text and label"
            )
        return cls(read_rows(read_table(path), str(path), others=True), str(path))._with_made(path)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Contrast:
        """One JSON object a line, or an array of them: prompt, positive, negative; or text, label.

        Also read are pairs without a prompt (as repeng has them), preference data (prompt, chosen,
        rejected, as text or as messages whose shared beginning is the prompt), and CAA's and
        Anthropic's questions (question, answer_matching_behavior, answer_not_matching_behavior; or
        prompt, correct, incorrect). Of those more columns than the texts' are left out.
        """
        rows = read_rows(read_json(user_path(path)), str(path), others=True)
        return cls(rows, str(path))._with_made(path)

    @classmethod
    def from_csv(cls, path: str | Path) -> Contrast:
        """The same columns as in JSONL, between them commas, semicolons or tabs; a prompt that
        begins as messages do in JSON, with `[{` whatever the blanks, is read as messages."""
        return cls(read_rows(read_csv(user_path(path)), str(path), others=True), str(path))

    @classmethod
    def builtin(cls, name: str) -> Contrast:
        """A contrast that comes with trimtab; `builtins()` lists their names."""
        if name not in builtins():
            raise TrimtabError(f"no builtin contrast {name!r}: there are {', '.join(builtins())}")
        rows = [json.loads(line) for line in _builtin_file(f"{name}.jsonl").open(encoding="utf-8")]
        said = json.loads(_builtin_file("behaviours.json").read_text(encoding="utf-8"))
        behaviour, opposite = said[name]
        found = cls._from_rows(rows, f"builtin:{name}")
        return replace(found, behaviour=behaviour, opposite=opposite)

    @classmethod
    def _from_rows(cls, rows: Iterable[Mapping[str, Any]], name: str) -> Contrast:
        return cls(read_rows(rows, name), name)

    def to_jsonl(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write one JSON object a line, parts and messages too; the file is there whole or not at
        all, and `from_jsonl` reads the same rows from it. `made` goes into a file beside it."""
        place = user_path(path)
        rows = [_as_json(row, place.parent) for row in self.rows]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if self.made is not None:
            said = json.dumps({**self.made, "digest": self.digest}, ensure_ascii=False, indent=1)
            write_whole(made_beside(place), (said + "\n").encode(), overwrite)
        written = write_whole(place, "".join(lines).encode(), overwrite)
        if self.made is None and overwrite:
            made_beside(place).unlink(missing_ok=True)  # it was about the rows of before
        return written

    def _with_made(self, path: str | Path) -> Contrast:
        """With what the file beside its own says of how it was made, if there is one."""
        place = made_beside(user_path(path))
        if not exists(place):
            return self
        try:
            said = json_object(place.read_text(encoding="utf-8"), str(place))
        except (OSError, UnicodeDecodeError) as error:
            raise TrimtabError(f"{place} cannot be read: mend it, or delete it") from error
        edited = {} if said.get("digest") == self.digest else {"edited": True}
        behaviour, opposite = (str(said.get(name, "")) for name in ("behaviour", "opposite"))
        made = {**said, **edited}
        return replace(self, made=made, behaviour=behaviour, opposite=opposite)

    # -- what is in it ------------------------------------------------------------------------

    def __repr__(self) -> str:
        rows = "pairs" if self.paired else "texts"
        parts = ", ".join(f"{count} {part}" for part, count in self.sizes.items())
        return f"<Contrast {self.name}: {len(self)} {rows}{f' ({parts})' if parts else ''}>"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, and its first rows."""
        heads = ("prompt", "positive", "negative") if self.paired else ("text", "label")
        first = [
            (last_message(row.prompt), row.positive, row.negative)
            if isinstance(row, Pair)
            else (last_message(row.text), row.label)
            for row in self.rows[:_SHOWN]
        ]
        lines = [f"<td>{'</td><td>'.join(map(escape, row))}</td>" for row in first]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        head = "".join(f"<th>{name}</th>" for name in heads)
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{body}</table>"

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
        """SHA-256 of the texts in their order, and of what their images hold, whatever files they
        came from."""
        content = [
            [_unplaced(row.prompt), row.positive, row.negative]
            if isinstance(row, Pair)
            else [_unplaced(row.text), row.label]
            for row in self.rows
        ]
        return json_digest(content, ensure_ascii=False, separators=(",", ":"))

    @property
    def made_in_short(self) -> dict[str, Any]:
        """How it was made, without the questions, which its rows have."""
        return {name: said for name, said in (self.made or {}).items() if name != "questions"}

    # -- parts --------------------------------------------------------------------------------

    def part(self, part: Part) -> Contrast:
        """The rows of one part."""
        rows = tuple(row for row in self.rows if row.part == part)
        if not rows:
            raise TrimtabError(
                f"{self.name} has no {part} rows: name parts in its rows, or call split() "
                "(`trimtab contrast split` writes a file with parts)"
            )
        return replace(self, rows=rows)

    @property
    def has_parts(self) -> bool:
        """Whether a row names a part."""
        return any(row.part for row in self.rows)

    @property
    def sizes(self) -> dict[str, int]:
        """How many rows each part has that there is."""
        counts = Counter(row.part for row in self.rows)
        return {part: counts[part] for part in PARTS if counts[part]}

    @property
    def train(self) -> Contrast:
        """What methods are fitted on: the train part, or everything where no row names a part."""
        return self.part("train") if self.has_parts else self

    def split(self, validation: float = 0.2, test: float = 0.2, seed: int = 0) -> Contrast:
        """The same rows, each given a part at random.

        Rows whose prompts are equal but for blanks and capitals go to the same part, so that no
        test prompt was trained on; of an unpaired contrast each label is dealt out by itself.
        """
        split = Split(validation, test, seed)
        parts = drawn_parts(self.rows, split)
        rows = (replace(row, part=part) for row, part in zip(self.rows, parts, strict=True))
        return replace(self, rows=tuple(rows), drawn=split)

    def with_parts(self, split: Split | str | None = SPLIT) -> Contrast:
        """The rows with the parts that they name, or else with those that the split draws.

        Where nothing is held out they are as they were: without a split, or with too few prompts
        (below 20; of an unpaired contrast below 10 texts of a label), which `too_few` says.
        """
        chosen = Split.read(split)
        if chosen is None or self.has_parts or self.too_few:
            return self
        return self.split(chosen.validation, chosen.test, chosen.seed)

    @property
    def drawn_in_words(self) -> str:
        """Which parts were drawn for rows that name none; nothing where they name them."""
        if self.drawn is None:
            return ""
        sizes = ", ".join(f"{count} {part}" for part, count in self.sizes.items())
        rows = "pairs" if self.paired else "texts"
        return f"{self.name} names no parts: {sizes} {rows} were drawn (split {self.drawn})"

    @property
    def too_few(self) -> str:
        """Why its prompts are too few to hold some out, in words; nothing where they are not."""
        return too_few(self.rows)

    def fitted_rows(self, fitted: Mapping[str, Any]) -> tuple[Row, ...]:
        """Its rows that a steering was fitted on whose `contrast` says what that was; none where
        it was another contrast, as far as digests can tell."""
        whole = replace(self, rows=tuple(replace(row, part=None) for row in self.rows))
        known = [whole]
        if self.has_parts and self.sizes.get("train"):
            known.append(self.train)
        with suppress(TrimtabError):  # a file may say anything
            drawn = Split.read(fitted.get("split"))
            if drawn is not None:
                known.append(whole.split(drawn.validation, drawn.test, drawn.seed).train)
        found = (one.rows for one in known if one.digest == fitted.get("digest"))
        return next(found, ())

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


def check_contrast(given: object) -> None:
    """Refuse what stands where a contrast is to be, with what to write instead."""
    if isinstance(given, Contrast):
        return
    if isinstance(given, str | Path):
        raise TrimtabError(
            f"{str(given)!r} is a name, not a contrast: load it with load_contrast(...)"
        )
    raise TrimtabError(
        f"{type(given).__name__} stands where the contrast is to be: give a Contrast, as "
        "load_contrast or Contrast.from_pairs returns it"
    )


def made_beside(path: Path) -> Path:
    """The file that says how the contrast in a file was made: pairs.made.json of pairs.jsonl."""
    return path.with_name(f"{path.stem}.made.json")


def builtins() -> list[str]:
    """Names of the contrasts that come with trimtab."""
    folder = files("trimtab") / "data" / "contrasts"
    return sorted(f.name.removesuffix(".jsonl") for f in folder.iterdir() if ".jsonl" in f.name)


def _builtin_file(file: str) -> Any:
    return files("trimtab") / "data" / "contrasts" / file


def _as_json(row: Row, folder: Path) -> dict[str, Any]:
    """A row as a line of a file in a folder says it."""
    part = {} if row.part is None else {"part": row.part}
    if isinstance(row, Text):
        return {"text": as_messages(row.text, folder), "label": row.label, **part}
    sides = {"positive": row.positive, "negative": row.negative}
    return {"prompt": as_messages(row.prompt, folder), **sides, **part}


def _unplaced(prompt: Prompt) -> Any:
    """A prompt whose images are what they hold, and not where they lie."""
    if isinstance(prompt, str) or not images_in(prompt):
        return prompt
    return [
        [role, content if isinstance(content, str) else [_held(piece) for piece in content]]
        for role, content in prompt
    ]


def _held(piece: str | Image) -> Any:
    return {"image": piece.digest} if isinstance(piece, Image) else piece
