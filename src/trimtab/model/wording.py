"""Prompts with words before them, which ask for what a steering is to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.contrasts import Content, Conversation, Prompt, in_words
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.model.language_model import LanguageModel

#: Answers to prompts, which stand before a prompt as examples.
Examples = Sequence[tuple[Prompt, str]]
#: What stands between two pieces of a prompt.
_APART = "\n\n"
#: A system message that no template writes by itself.
_MARK = "trimtab asks whether this is read"


def asked(
    language_model: LanguageModel, prompts: Sequence[Prompt], text: str, examples: Examples = ()
) -> list[Prompt]:
    """Prompts with words before them.

    Of a conversation `text` is the system message, behind one that is there already; where the
    chat template takes none it stands before what the user says first. `examples` are turns of user
    and assistant before the conversation. Of text that is taken as it is all of this stands before
    it, with blank lines between. Where nothing is said the prompts are what they were.
    """
    if not text and not examples:
        return list(prompts)
    chats = any(not isinstance(each, str) for each in prompts)
    system = chats and _reads_system(language_model)
    return [
        _before_text(language_model, prompt, text, examples)
        if isinstance(prompt, str)
        else _in_chat(language_model, prompt, text, examples, system)
        for prompt in prompts
    ]


def _before_text(language_model: LanguageModel, prompt: str, text: str, examples: Examples) -> str:
    bos = language_model.tokenizer.bos_token or ""
    start = bos if bos and prompt.startswith(bos) else ""
    shown = [_as_text(one) + answer for one, answer in examples]
    return start + _APART.join(filter(None, (text, *shown, prompt[len(start) :])))


def _in_chat(
    language_model: LanguageModel,
    conversation: Conversation,
    text: str,
    examples: Examples,
    system: bool,
) -> Conversation:
    own = [content for role, content in conversation if role == "system"]
    turns = tuple(message for message in conversation if message[0] != "system")
    shown = tuple(turn for one, answer in examples for turn in (*_turns(one), _answered(answer)))
    before: Conversation = tuple(("system", content) for content in own)
    if text and system:
        form = language_model.chat_form.system
        known = own or ([form] if form else [])
        before = (("system", _APART.join([*map(in_words, known), text])),)
    elif text:
        return (*before, *_said_first((*shown, *turns), text))
    return (*before, *shown, *turns)


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


def _turns(prompt: Prompt) -> Conversation:
    """The turns of an example's prompt."""
    if isinstance(prompt, str):
        return (("user", prompt.strip()),)
    return tuple(message for message in prompt if message[0] != "system")


def _answered(answer: str) -> tuple[str, str]:
    return ("assistant", answer.strip())


def _as_text(prompt: Prompt) -> str:
    """An example's prompt as text that its answer follows."""
    if isinstance(prompt, str):
        return prompt
    return _APART.join(in_words(content) for _, content in prompt) + "\n"
