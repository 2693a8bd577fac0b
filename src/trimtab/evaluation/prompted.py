"""Asking instead of steering, or beside it: words before every prompt, which go where a steering
goes, so that nothing else differs between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.contrasts import Content, Conversation, Prompt, in_words
from trimtab.errors import TrimtabError, shown
from trimtab.files import json_digest
from trimtab.model import LanguageModel
from trimtab.reading import Reading
from trimtab.steering import Steering, Steerings

#: What stands between two pieces of a prompt.
_APART = "\n\n"
#: A system message that no template writes by itself.
_MARK = "trimtab asks whether this is read"


@dataclass(frozen=True)
class Prompted:
    """Words that are put before every prompt, with or without a steering beside them.

    Of a conversation `text` is the system message, behind one that is there already; where the
    chat template takes none it stands before what the user says first. `examples`, each a prompt
    and its answer, are turns of user and assistant before the conversation. Of text that is taken
    as it is all of this stands before it, with blank lines between. Where nothing is said the
    prompts are what they were.

    It goes where a steering goes in `evaluate`, alone or as an alternative:

        >>> import trimtab as tt
        >>> asked = tt.Prompted("Please write formally.")
        >>> found = tt.evaluate(lm, contrast, steering={"ask": asked, "nothing": tt.Prompted("")})
    """

    text: str = ""
    examples: tuple[tuple[Prompt, str], ...] = ()
    steering: Steering | Steerings | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TrimtabError(f"a prompt is text, not {self.text!r:.60}")

    @property
    def label(self) -> str:
        """What it is called where it has no name."""
        examples = f"{len(self.examples)} examples" if self.examples else ""
        said = shown(self.text, 60) if self.text else ""
        steered = "" if self.steering is None else self.steering.label
        return " + ".join(filter(None, (said, examples, steered))) or "no words"

    @property
    def words(self) -> tuple[str, tuple[tuple[Prompt, str], ...]]:
        """What is put before prompts, whatever is steered."""
        return self.text, self.examples

    @property
    def digest(self) -> str:
        """SHA-256 of the words."""
        return json_digest(self.words, ensure_ascii=False, separators=(",", ":"))

    def put(self, language_model: LanguageModel, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with the words before them."""
        if not self.text and not self.examples:
            return list(prompts)
        system = any(not isinstance(each, str) for each in prompts) and _reads_system(
            language_model
        )
        return [
            self._before_text(language_model, prompt)
            if isinstance(prompt, str)
            else self._in_chat(language_model, prompt, system)
            for prompt in prompts
        ]

    def _before_text(self, language_model: LanguageModel, prompt: str) -> str:
        bos = language_model.tokenizer.bos_token or ""
        start = bos if bos and prompt.startswith(bos) else ""
        examples = [_as_text(asked) + answer for asked, answer in self.examples]
        return start + _APART.join(filter(None, (self.text, *examples, prompt[len(start) :])))

    def _in_chat(
        self, language_model: LanguageModel, conversation: Conversation, system: bool
    ) -> Conversation:
        own = [content for role, content in conversation if role == "system"]
        turns = tuple(message for message in conversation if message[0] != "system")
        examples = tuple(
            turn for asked, answer in self.examples for turn in (*_turns(asked), _answered(answer))
        )
        before: Conversation = tuple(("system", content) for content in own)
        if self.text and system:
            form = language_model.chat_form.system
            known = own or ([form] if form else [])
            before = (("system", _APART.join([*map(in_words, known), self.text])),)
        elif self.text:
            return (*before, *_said_first((*examples, *turns), self.text))
        return (*before, *examples, *turns)


#: Under what a model is evaluated: nothing, steerings, or words with or without some.
Attached = Steering | Steerings | Prompted | None


def steering_of(attached: Attached) -> Steering | Steerings | None:
    """What is steered."""
    return attached.steering if isinstance(attached, Prompted) else attached


def words_of(attached: Attached) -> Any:
    """What is put before prompts, to tell apart what is asked; None where nothing is."""
    if not isinstance(attached, Prompted) or not any(attached.words):
        return None
    return attached.words


def asked_with(
    language_model: LanguageModel, attached: Attached, prompts: Sequence[Prompt]
) -> list[Prompt]:
    """The prompts as they are asked."""
    if isinstance(attached, Prompted):
        return attached.put(language_model, prompts)
    return list(prompts)


def with_words(
    language_model: LanguageModel, attached: Attached, readings: Sequence[Reading]
) -> list[Reading]:
    """Plain texts that are read, with the words before them; the same tokens are scored."""
    if not isinstance(attached, Prompted) or words_of(attached) is None:
        return list(readings)
    said = str(attached.put(language_model, ["."])[0])
    (before,) = language_model.encode([said.removesuffix(".")])
    return [_behind(tuple(before), reading, language_model.bos) for reading in readings]


def _behind(before: tuple[int, ...], reading: Reading, bos: int | None) -> Reading:
    """A reading after some tokens, with the BOS that it began with before both."""
    own = 0 if bos is None or reading.tokens[0] != bos else 1
    begun = (reading.tokens[0], *before) if own and before[0] != bos else before
    moved = len(begun) - own
    return Reading(
        (*begun, *reading.tokens[own:]),
        tuple(position + moved for position in reading.positions),
        reading.prompt + moved,
        reading.targets,
    )


def together_with(prompted: Prompted, steering: Steering | Steerings) -> Prompted:
    """The same words beside a steering."""
    return replace(prompted, steering=steering)


def _reads_system(language_model: LanguageModel) -> bool:
    """Whether the chat template writes a system message."""
    try:
        return _MARK in language_model.render((("system", _MARK), ("user", "?")))
    except TrimtabError:
        return False


def _said_first(conversation: Conversation, text: str) -> Conversation:
    """A conversation in which the text stands before what the user says first."""
    place = next((i for i, (role, _) in enumerate(conversation) if role == "user"), 0)
    role, content = conversation[place]
    said: Content = (
        text + _APART + content if isinstance(content, str) else (text + _APART, *content)
    )
    return (*conversation[:place], (role, said), *conversation[place + 1 :])


def _turns(asked: Prompt) -> Conversation:
    """The turns of an example's prompt."""
    if isinstance(asked, str):
        return (("user", asked.strip()),)
    return tuple(message for message in asked if message[0] != "system")


def _answered(answer: str) -> tuple[str, str]:
    return ("assistant", answer.strip())


def _as_text(asked: Prompt) -> str:
    """An example's prompt as text that its answer follows."""
    if isinstance(asked, str):
        return asked
    return _APART.join(in_words(content) for _, content in asked) + "\n"
