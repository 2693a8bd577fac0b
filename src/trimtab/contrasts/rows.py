"""The rows of a contrast, and how one is read from the columns of a file: ours, and those of
preference data (chosen, rejected) and of CAA's and Anthropic's questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from trimtab.contrasts.images import Image, read_image
from trimtab.errors import TrimtabError, shown

T = TypeVar("T")
Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
#: What a message says: text, or pieces of text and images in their order.
Content = str | tuple[str | Image, ...]
#: A conversation: messages as (role, content).
Conversation = tuple[tuple[str, Content], ...]
Prompt = str | Conversation

#: What the prompt and the sides of a pair are called, ours first.
_NAMES = {
    "prompt": ("prompt", "question"),
    "positive": ("positive", "chosen", "correct", "answer_matching_behavior"),
    "negative": ("negative", "rejected", "incorrect", "answer_not_matching_behavior"),
}
_OURS = ("prompt", "positive", "negative", "text", "label", "part")
#: In these files a row has more columns (scores, categories), which say nothing of the texts.
_OTHERS = tuple(name for names in _NAMES.values() for name in names[1:])
#: Every column that is known.
COLUMNS = (*_OURS, *_OTHERS)
_KNOWN = (
    "known are prompt, positive, negative; text, label; chosen, rejected; correct, incorrect; and "
    "question, answer_matching_behavior, answer_not_matching_behavior"
)
#: Where the answer begins in preference data that has conversations as plain text.
_TURN = "\n\nAssistant:"


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


def read_rows(
    rows: Iterable[Mapping[str, Any]], name: str, others: bool = False
) -> tuple[Pair | Text, ...]:
    """The rows of a contrast; `others` allows the columns of other tools, and pairs without a
    prompt where no row has one."""
    given = list(rows)
    if others:
        promptless = not any(set(row) & {*_NAMES["prompt"], "text", "label"} for row in given)
        given = [
            _in_our_columns(row, f"{name}, row {number}", promptless)
            for number, row in enumerate(given, 1)
        ]
    read = [_row(row, f"{name}, row {number}") for number, row in enumerate(given, 1)]
    if len({type(row) for row in read}) > 1:
        raise TrimtabError(f"{name} mixes paired rows (prompt) and unpaired rows (text)")
    return tuple(read)


def last_message(prompt: Any) -> str:
    """A prompt as text: of a conversation, also as it comes back from JSON or as it was given, its
    last message."""
    if isinstance(prompt, str):
        return prompt
    message = prompt[-1]
    return in_words(message.get("content") if isinstance(message, Mapping) else message[1])


def in_words(content: Any) -> str:
    """What a message says as text, its images by their names."""
    if not isinstance(content, list | tuple):
        return str(content)
    return " ".join(map(_piece_in_words, content))


def _piece_in_words(piece: Any) -> str:
    if isinstance(piece, Mapping):
        if piece.get("type") == "text":
            return str(piece.get("text"))
        piece = (piece.get("image") or piece.get("path"), "")
    if isinstance(piece, list | tuple) and len(piece) == 2:  # an image, as JSON has it too
        piece = Image(*piece)
    return str(piece)


def images_in(prompt: Prompt) -> tuple[Image, ...]:
    """The images of a prompt, in their order."""
    if isinstance(prompt, str):
        return ()
    return tuple(
        piece
        for _, content in prompt
        if not isinstance(content, str)
        for piece in content
        if isinstance(piece, Image)
    )


def as_messages(prompt: Prompt, folder: Path | None = None) -> Any:
    """A prompt as `read_prompt` takes it: text, or messages as chat templates have them; the paths
    of images as a file in `folder` has them."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": role, "content": _as_parts(content, folder)} for role, content in prompt]


def _as_parts(content: Content, folder: Path | None) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "image", "image": piece.path if folder is None else piece.seen_from(folder)}
        if isinstance(piece, Image)
        else {"type": "text", "text": piece}
        for piece in content
    ]


def spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, or all, from the whole list."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def read_prompt(value: Any, where: str) -> Prompt:
    """Text as it is; a list of {"role", "content"} messages as a conversation.

    A content is text, or a list of parts as chat templates have them: {"type": "text", "text": ...}
    and {"type": "image", "image": FILE}.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value:
        return tuple(_message(message, where) for message in value)
    raise TrimtabError(f"{where}: a prompt must be text or a list of messages")


def _message(message: Any, where: str) -> tuple[str, Content]:
    if isinstance(message, Mapping):
        message = (message.get("role"), message.get("content"))
    if isinstance(message, list | tuple) and len(message) == 2:
        role, content = message
        if isinstance(role, str) and isinstance(content, str):
            return (role, content)
        if isinstance(role, str) and isinstance(content, list | tuple) and content:
            return (role, _content(content, where))
    raise TrimtabError(
        f'{where}: a message must be {{"role": TEXT, "content": TEXT}}, or have a list of texts '
        "and images as its content"
    )


def _content(parts: Sequence[Any], where: str) -> Content:
    """What a message says in parts; text alone is one text, which every template takes."""
    pieces = tuple(_piece(part, where) for part in parts)
    if any(isinstance(piece, Image) for piece in pieces):
        return pieces
    return "".join(map(str, pieces))


def _piece(part: Any, where: str) -> str | Image:
    if isinstance(part, str | Image):
        return part
    if isinstance(part, Mapping):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        named = [part[name] for name in ("image", "path", "url") if part.get(name) is not None]
        if part.get("type") == "image" and len(named) == 1:
            return read_image(named[0], where)
    raise TrimtabError(
        f'{where}: a part of a message must be {{"type": "text", "text": TEXT}} or '
        '{"type": "image", "image": FILE}'
    )


def _row(row: Mapping[str, Any], where: str) -> Pair | Text:
    part = row.get("part")
    if part is not None and part not in PARTS:
        raise TrimtabError(f"{where}: part {part!r} is none of {', '.join(PARTS)}")
    unknown = set(row) - set(_OURS)
    if unknown:
        name = shown(sorted(map(str, unknown))[0], 60)
        raise TrimtabError(f"{where}: unknown field {name!r}: take it out, or rename it; {_KNOWN}")
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


# -- columns of other tools -----------------------------------------------------------------------


def _in_our_columns(row: Mapping[str, Any], where: str, promptless: bool) -> Mapping[str, Any]:
    """A row with prompt, positive and negative, whatever its file calls them; one with a text and
    a label as it is."""
    found = {role: [name for name in names if name in row] for role, names in _NAMES.items()}
    for role, names in found.items():
        if len(names) > 1:
            raise TrimtabError(
                f"{where}: {' and '.join(names)} both stand for the {role}: keep one; {_KNOWN}"
            )
    if row and not set(map(str, row)) & set(COLUMNS):
        there = shown(", ".join(sorted(map(str, row))), 100)
        raise TrimtabError(f"{where}: no column of a contrast among {there}: {_KNOWN}")
    named = {role: names[0] for role, names in found.items() if names}
    if not set(named.values()) & set(_OTHERS):
        return {"prompt": "", **row} if promptless and len(named) == 2 else row
    ours = {role: row[name] for role, name in named.items()}
    if "part" in row:
        ours["part"] = row["part"]
    if "chosen" in row and "rejected" in row:
        return ours | _preference(row, where)
    if named.get("positive") in ("answer_matching_behavior", "correct"):
        return ours | _with_blanks(ours)
    return ours


def _with_blanks(row: Mapping[str, Any]) -> dict[str, Any]:
    """Answers with the blank that Anthropic's begin with, which those in CAA's files lack."""
    return {
        side: f" {row[side]}"
        for side in ("positive", "negative")
        if isinstance(row.get(side), str) and row[side][:1].strip()
    }


def _preference(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A chosen and a rejected answer: text behind a prompt, or conversations that differ in their
    last message, whose shared beginning is the prompt."""
    sides = row["chosen"], row["rejected"]
    prompt = row.get("prompt", row.get("question"))
    if all(isinstance(side, str) for side in sides):
        if prompt is not None:
            return {"prompt": prompt, "positive": sides[0], "negative": sides[1]}
        shared = sides[0].rfind(_TURN) + len(_TURN)
        if shared < len(_TURN) or sides[0][:shared] != sides[1][:shared]:
            shared = 0
        return {
            "prompt": sides[0][:shared],
            "positive": sides[0][shared:],
            "negative": sides[1][shared:],
        }
    if any(isinstance(side, str) for side in sides):
        raise TrimtabError(f"{where}: chosen is text and rejected is not, or the other way round")
    chosen, rejected = (_conversation(side, where) for side in sides)
    if chosen[:-1] != rejected[:-1] or "assistant" not in (chosen[-1][0], rejected[-1][0]):
        raise TrimtabError(
            f"{where}: chosen and rejected must be the same messages but for the assistant's last"
        )
    return {
        "prompt": _beginning(prompt, chosen[:-1], where),
        "positive": chosen[-1][1],
        "negative": rejected[-1][1],
    }


def _conversation(value: Any, where: str) -> Conversation:
    found = read_prompt(value, where)
    return found if not isinstance(found, str) else (("assistant", found),)


def _beginning(prompt: Any, shared: Conversation, where: str) -> Prompt:
    """The prompt of conversations that begin with `shared`, where a column may say it too."""
    if prompt is None:
        return shared or ""
    own = read_prompt(prompt, where)
    if isinstance(own, str):
        own = (("user", own),)
    if not shared or own == shared[-len(own) :] or own == shared[: len(own)]:
        return shared or own
    if shared[0][0] == "assistant":
        return own + shared
    raise TrimtabError(f"{where}: the prompt is not how chosen and rejected begin")
