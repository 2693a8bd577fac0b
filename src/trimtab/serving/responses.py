"""OpenAI's responses: their bodies as chats, and what was answered in their form.

Nothing is kept on the server: a conversation is sent whole, and what would need a stored one, or a
tool that the server itself runs, is refused.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trimtab.serving.answering import Answer, Desk, Request, said
from trimtab.serving.bodies import (
    ChatBody,
    Message,
    Number,
    Part,
    Stacked,
    Strict,
    Text,
    at_most,
)
from trimtab.serving.jobs import Ended, Piece


class InputText(Strict):
    """A part of what was said; the answers of earlier responses can be sent back as they came."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """A turn of the conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputText], Field(max_length=1000, fail_fast=True)]
    id: Annotated[str, Field(max_length=200)] | None = None
    status: Annotated[str, Field(max_length=50)] | None = None
    phase: Annotated[str, Field(max_length=50)] | None = None

    @property
    def message(self) -> Message:
        """The same of a chat completion."""
        if isinstance(self.content, str):
            return Message(role=self.role, content=self.content)
        parts = [Part(type="text", text=part.text) for part in self.content]
        return Message(role=self.role, content=parts)


class _Format(Strict):
    type: Literal["text"] = "text"


class _TextOptions(Strict):
    format: _Format = _Format()
    verbosity: None = None


class ResponseBody(Strict):
    """A response that is asked for."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    input: (
        Text | Annotated[list[InputMessage], Field(min_length=1, max_length=1999, fail_fast=True)]
    )
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: (
        Annotated[list[Literal["message.output_text.logprobs"]], Field(fail_fast=True)] | None
    ) = None
    stream: bool | None = None
    #: Ours: what is stacked, in order.
    steering: Stacked | None = None
    # What nothing but its default does here.
    text: _TextOptions | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    # Who asks, and how the answer is kept elsewhere: taken, and without any effect here, but that
    # metadata is told again with the answer, and so must be what OpenAI takes.
    user: Annotated[str, Field(max_length=1000)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
            at_most(16),
        ]
        | None
    ) = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _told(self) -> ResponseBody:
        if self.top_logprobs is not None and not self.include:
            raise ValueError("top_logprobs asks for include: ['message.output_text.logprobs']")
        return self

    def chat(self) -> ChatBody:
        """The same as a chat completion."""
        turns = []
        if self.instructions is not None:
            turns.append(Message(role="system", content=self.instructions))
        if isinstance(self.input, str):
            turns.append(Message(role="user", content=self.input))
        else:
            turns += [one.message for one in self.input]
        return ChatBody(
            model=self.model,
            messages=turns,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=bool(self.include),
            top_logprobs=self.top_logprobs,
            stream=self.stream,
            steering=self.steering,
        )


class Form:
    """What was answered, as a response to one body."""

    def __init__(self, body: ResponseBody) -> None:
        self._body = body

    def whole(self, desk: Desk, begun: Request) -> dict[str, Any]:
        """The answer, when all of it is there."""
        (answer,) = begun.answers
        cut = answer.reason != "stop"
        return {
            **self._head(begun, "incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(desk, begun, answer)],
            "usage": _usage(begun),
            "steering": desk.acted(begun, 0),
        }

    async def events(
        self, desk: Desk, begun: Request, told: AsyncIterator[tuple[int, Piece | Ended]]
    ) -> AsyncIterator[str]:
        """The answer in pieces, as server-sent events with names and numbers."""
        number = 0
        place = {"item_id": f"msg_{begun.key}", "output_index": 0, "content_index": 0}
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"id": place["item_id"], "type": "message", "role": "assistant"}

        def event(kind: str, **content: Any) -> str:
            nonlocal number
            number += 1
            said = {"type": f"response.{kind}", "sequence_number": number - 1, **content}
            return f"event: response.{kind}\ndata: {json.dumps(said, ensure_ascii=False)}\n\n"

        head = self._head(begun, "in_progress")
        async for _, piece in told:
            if number == 0:  # only once it is sure that there is an answer
                yield event("created", response=head)
                yield event("in_progress", response=head)
                added = {**item, "status": "in_progress", "content": []}
                yield event("output_item.added", output_index=0, item=added)
                yield event("content_part.added", **place, part=empty)
            if isinstance(piece, Piece) and (piece.text or piece.tokens):
                logprobs = said(desk, "chat", piece.tokens) or {"content": []}
                yield event(
                    "output_text.delta", **place, delta=piece.text, logprobs=logprobs["content"]
                )
        whole = self.whole(desk, begun)
        (done,) = whole["output"]
        (part,) = done["content"]
        yield event("output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
        yield event("content_part.done", **place, part=part)
        yield event("output_item.done", output_index=0, item=done)
        yield event(whole["status"], response=whole)

    def _item(self, desk: Desk, begun: Request, answer: Answer) -> dict[str, Any]:
        logprobs = said(desk, "chat", answer.tokens) or {"content": []}
        part = {"type": "output_text", "text": answer.text, "annotations": []}
        return {
            "id": f"msg_{begun.key}",
            "type": "message",
            "role": "assistant",
            "status": "completed" if answer.reason == "stop" else "incomplete",
            "content": [{**part, "logprobs": logprobs["content"]}],
        }

    def _head(self, begun: Request, status: str) -> dict[str, Any]:
        body = self._body
        return {
            "id": f"resp_{begun.key}",
            "object": "response",
            "created_at": begun.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": begun.model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p or 1.0,
            "truncation": "disabled",
            "usage": None,
        }


def _usage(begun: Request) -> dict[str, Any]:
    written = sum(len(answer.job.new) for answer in begun.answers)
    return {
        "input_tokens": begun.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": begun.prompt_tokens + written,
    }
