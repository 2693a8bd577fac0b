"""Chats as token ids, and where in them the answers are.

An answer is what follows the prompt that it was written to: the conversation up to it with the
header of the assistant's turn. Markers of the chat template are no part of it. A chat is one text
where each of its prompts is what the next one begins with; where a template writes earlier turns
otherwise later on (thoughts that are dropped), a turn is a text of its own, as the model saw it
when it answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.contrasts import Prompt, images_in, read_prompt, read_table
from trimtab.errors import TrimtabError
from trimtab.model import Completion, LanguageModel


@dataclass(frozen=True)
class Answered:
    """A prompt, text as it is or a conversation, and the text that was written after it."""

    prompt: Prompt
    answer: str


#: A text, which is read as a whole, a conversation, or one prompt with its answer.
Chat = Prompt | Answered


@dataclass(frozen=True)
class Place:
    """An answer: of which chat, the how manieth turn of it, and its tokens in a text, from `start`
    up to `stop`. A text that is no chat has no prompt."""

    chat: int
    number: int
    start: int
    stop: int
    prompted: bool = True


@dataclass(frozen=True)
class Read:
    """A text (token ids) and the answers in it."""

    tokens: Sequence[int]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Asked:
    """A turn before it is token ids."""

    chat: int
    number: int
    prompt: Prompt
    answer: str


def as_chat(given: Any, where: str) -> Chat:
    """What the user gives as a chat."""
    if isinstance(given, Answered):
        return given
    if isinstance(given, Completion):
        return Answered(given.prompt, given.text)
    return read_prompt(given, where)


def read_chats(path: str | Path) -> list[Chat]:
    """The chats in a file: rows with `messages`, with `prompt` and `text` (an answer), or with
    `text`; or a .txt with a text a line."""
    place = Path(path)
    if place.suffix.lower() == ".txt":
        try:
            lines = place.expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise TrimtabError(f"cannot read chats from {path}: {reason}") from error
        found: list[Chat] = [line for line in lines if line.strip()]
    else:
        rows = read_table(place, "chats from", ("messages", "prompt", "text"))
        found = [_chat_of(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    if not found:
        raise TrimtabError(f"{path} has no chat: write one row for each")
    return found


def _chat_of(row: dict[str, Any], where: str) -> Chat:
    if "messages" in row:
        messages = row["messages"]
        if isinstance(messages, str):
            raise TrimtabError(f"{where}: messages must be a list of messages")
        return read_prompt(messages, where)
    text = row.get("text")
    if not isinstance(text, str):
        raise TrimtabError(
            f'{where}: write {{"messages": [...]}}, {{"prompt": ..., "text": ANSWER}} or '
            '{"text": TEXT}'
        )
    if "prompt" in row:
        return Answered(read_prompt(row["prompt"], where), text)
    return text


def read_turns(language_model: LanguageModel, chats: Sequence[Chat]) -> list[Read]:
    """The texts of chats, with the answers in them, in their order.

    Errors: a TrimtabError of one line that names the chat (no turn, too long, an image).
    """
    asked: list[_Asked] = []
    found: list[Read] = []
    for number, chat in enumerate(chats):
        where = f"chat {number + 1}"
        if isinstance(chat, str):
            found.append(_whole(language_model, chat, number))
        elif isinstance(chat, Answered):
            asked.append(_Asked(number, 0, chat.prompt, chat.answer))
        else:
            asked += _turns_of(chat, number, where)
    found += _together(asked, *_encoded(language_model, asked))
    for read in found:
        if len(read.tokens) > language_model.max_length:
            raise TrimtabError(
                f"chat {read.places[0].chat + 1} has {len(read.tokens)} tokens, and "
                f"{language_model.name} takes {language_model.max_length}: leave turns out"
            )
    return found


def _whole(language_model: LanguageModel, text: str, number: int) -> Read:
    """A text that is no chat: all its tokens but the first, whose activation is far longer than the
    others' in most models and says nothing of the text."""
    (tokens,) = language_model.encode([text])
    if not tokens:
        raise TrimtabError(f"chat {number + 1} is an empty text")
    first = min(1, len(tokens) - 1)
    return Read(tokens, (Place(number, 0, first, len(tokens), prompted=False),))


def _turns_of(messages: Iterable[tuple[str, Any]], number: int, where: str) -> list[_Asked]:
    """The assistant's turns; a chat that ends with somebody else's has one that is not answered."""
    conversation = tuple(messages)
    if images_in(conversation):
        raise TrimtabError(f"{where} has an image, and monitors read text alone")
    found: list[_Asked] = []
    ends = [place for place, (role, _) in enumerate(conversation) if role == "assistant"]
    if conversation[-1][0] != "assistant":
        ends.append(len(conversation))
    for place in ends:
        if place == 0:
            raise TrimtabError(
                f"{where} begins with the assistant: put the message before it that it answers"
            )
        answer = conversation[place][1] if place < len(conversation) else ""
        found.append(_Asked(number, len(found), conversation[:place], str(answer)))
    return found


def _encoded(
    language_model: LanguageModel, asked: Sequence[_Asked]
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Of each turn its prompt, and its prompt with its answer."""
    if not asked:
        return [], []
    prompts = [each.prompt for each in asked]
    return (
        language_model.encode(prompts),
        language_model.encode(prompts, [each.answer for each in asked]),
    )


def _together(
    asked: Sequence[_Asked], prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[Read]:
    """Turns of one chat in one text as far as that begins with what they are."""
    found: list[Read] = []
    # From the last turn of a chat back, whose text may hold those before it.
    for turn, prompt, text in reversed(list(zip(asked, prompts, texts, strict=True))):
        start = _common_length(prompt, text)
        if not text:
            raise TrimtabError(f"chat {turn.chat + 1} is an empty text")
        place = Place(turn.chat, turn.number, start, len(text))
        held = found[-1] if found and found[-1].places[0].chat == turn.chat else None
        if held is not None and list(held.tokens[: len(text)]) == list(text):
            found[-1] = Read(held.tokens, (place, *held.places))
        else:
            found.append(Read(text, (place,)))
    return found[::-1]


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many equal tokens two texts begin."""
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return length
    return min(len(one), len(other))
