"""Prompts with a request before them: what a steering is to do, asked for in words."""

from __future__ import annotations

from trimtab.contrasts import Content, Conversation, Prompt, in_words
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel

#: What stands between a request and what it is about.
_APART = "\n\n"
#: A system message that no template writes by itself.
_MARK = "trimtab asks whether this is read"


def asked(language_model: LanguageModel, prompt: Prompt, request: str) -> Prompt:
    """The prompt with a request before it: of a conversation in the system message, behind what is
    said there already, or, where the chat template takes none, before what the user says first; of
    text before the text, and a blank line between."""
    if isinstance(prompt, str):
        bos = language_model.tokenizer.bos_token or ""
        start = bos if bos and prompt.startswith(bos) else ""
        return start + request + _APART + prompt[len(start) :]
    if not _reads_system(language_model):
        return _before_user(prompt, request)
    own = [in_words(content) for role, content in prompt if role == "system"]
    form = language_model.chat_form.system
    system = _APART.join([*(own or ([form] if form else [])), request])
    return (("system", system), *(turn for turn in prompt if turn[0] != "system"))


def _reads_system(language_model: LanguageModel) -> bool:
    """Whether the chat template writes a system message."""
    try:
        return _MARK in language_model.render((("system", _MARK), ("user", "?")))
    except TrimtabError:
        return False


def _before_user(conversation: Conversation, request: str) -> Conversation:
    place = next((i for i, (role, _) in enumerate(conversation) if role == "user"), 0)
    role, content = conversation[place]
    said: Content = (
        request + _APART + content if isinstance(content, str) else (request + _APART, *content)
    )
    return (*conversation[:place], (role, said), *conversation[place + 1 :])
