"""How conversations become text: the chat template, what it is told, and a system message.

A model's `ChatForm` is used wherever it reads a conversation, when steerings are fitted and when
they are used, so that the two are alike; a steering keeps the one that it was fitted with.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.contrasts import Content, Contrast, Conversation, Image, Pair
from trimtab.errors import TrimtabError, TrimtabWarning, shown
from trimtab.steering import Steering


@dataclass(frozen=True)
class ChatForm:
    """What a chat template is told, `options` by their names in it, and the system message of every
    conversation that has none of its own."""

    options: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing is said, so that the template's defaults hold."""
        return not self.options and self.system is None

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """A conversation as templates take it, with the system message."""
        return self.opened(_as_messages(conversation))

    def opened(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with the system message before them, where they have none."""
        own = any(message["role"] == "system" for message in messages)
        before = [] if self.system is None or own else [{"role": "system", "content": self.system}]
        return [*before, *messages]

    def as_json(self) -> dict[str, Any]:
        return {"options": dict(self.options), "system": self.system}

    def __str__(self) -> str:
        said = [f"{name}={json.dumps(value)}" for name, value in sorted(self.options.items())]
        if self.system is not None:
            said.append(f"the system message '{shown(self.system, 60)}'")
        return ", ".join(said) or "the template's defaults"


def _as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": role, "content": _for_template(content)} for role, content in conversation]


def _for_template(content: Content) -> Any:
    """What a message says as templates take it, who see that there is an image and not which."""
    if isinstance(content, str):
        return content
    return [
        {"type": "image"} if isinstance(piece, Image) else {"type": "text", "text": piece}
        for piece in content
    ]


def chat_form(
    tokenizer: Any, name: str, options: Mapping[str, Any] | None = None, system: str | None = None
) -> ChatForm:
    """A checked form for the model `name`; what its template does not mention is warned about."""
    options = {} if options is None else options
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise TrimtabError(
            f"chat_options is {options!r}: write the template's variables by name, as in "
            '{"enable_thinking": False}'
        )
    if system is not None and not (isinstance(system, str) and system.strip()):
        raise TrimtabError(f"the system message is {system!r}: write a text")
    if not options and system is None:
        return ChatForm()
    if not tokenizer.chat_template:
        raise TrimtabError(
            f"{name} has no chat template, so that chat options and a system message do nothing: "
            "leave them out, and write what you want into the prompts"
        )
    # What a template is always handed, and what says in which form the text comes back.
    ours = inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    for key in options:
        if key in (ours | {"messages"}) - {"tools", "documents", "kwargs"}:
            raise TrimtabError(f"the chat option {key} is set by trimtab itself: leave it out")
    try:
        kept = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TrimtabError(f"chat options must be JSON, and {shown(error, 150)}") from error
    template = str(tokenizer.chat_template)  # several by name, for some tokenizers
    foreign = sorted(key for key in kept if not re.search(rf"\b{re.escape(key)}\b", template))
    if foreign:
        warnings.warn(
            f"the chat template of {name} does not mention {', '.join(foreign)}: it does nothing",
            TrimtabWarning,
            stacklevel=4,
        )
    return ChatForm(kept, system)


def render(tokenizer: Any, name: str, conversation: Conversation, form: ChatForm) -> str:
    """A conversation through the chat template, with the header of the assistant's turn; where that
    turn has begun (the last message is the assistant's) the text ends with it, to be continued."""
    return render_messages(tokenizer, name, _as_messages(conversation), form)


def render_messages(
    tokenizer: Any,
    name: str,
    messages: Sequence[dict[str, Any]],
    form: ChatForm,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The same of messages as templates take them, which may have more than a role and a content,
    and of tools."""
    if not tokenizer.chat_template:
        raise TrimtabError(f"{name} has no chat template: give it raw text (--raw), not messages")
    # An empty beginning is none: transformers looks for the message in the text.
    if len(messages) > 1 and _has_begun(messages) and not messages[-1]["content"]:
        messages = messages[:-1]
    begun = _has_begun(messages)
    roles = ", ".join(message["role"] for message in messages)
    try:
        rendered: str = tokenizer.apply_chat_template(
            form.opened(messages),
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            **(form.options if tools is None else {**form.options, "tools": tools}),
        )
    except Exception as error:  # a template is a program: it fails as it likes
        said = shown(" ".join(str(error).split()), 300) or type(error).__name__
        put = "" if form.plain else f" with {form}"
        raise TrimtabError(
            f"the chat template of {name} refuses messages with the roles {roles}{put}: {said}; "
            "write them as it wants them (often without a system message, user and assistant in "
            "turn), or as raw text"
        ) from error
    if not rendered:
        raise TrimtabError(
            f"the chat template of {name} makes an empty text of messages with the roles {roles}: "
            "write them otherwise, or as raw text"
        )
    return rendered


def _has_begun(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether the last turn is the assistant's, to be continued: one that calls tools is whole."""
    return messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


# -- what a steering was fitted with ----------------------------------------------------------


def put_as(contrast: Contrast, form: ChatForm) -> dict[str, Any]:
    """For a steering's record of its texts: how its conversations were put, if it has any."""
    prompts = (row.prompt if isinstance(row, Pair) else row.text for row in contrast.rows)
    return {"chat": form.as_json()} if any(not isinstance(p, str) for p in prompts) else {}


def put_otherwise(steering: Steering, name: str, form: ChatForm) -> str | None:
    """What to say where a steering's conversations were put otherwise than the model's are."""
    kept = steering.contrast.get("chat")
    if not isinstance(kept, dict) or kept == form.as_json():
        return None
    options, system = kept.get("options"), kept.get("system")
    before = ChatForm(options if isinstance(options, dict) else {}, system)
    return (
        f"this {shown(steering.method)} steering was fitted on conversations with "
        f"{shown(before, 200)}, and {name} puts them with {shown(form, 200)}: open the model with "
        "the same chat_options and system (--chat-option, --system), or fit anew"
    )
