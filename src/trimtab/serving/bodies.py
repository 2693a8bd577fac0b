"""What requests may say: the bodies of OpenAI's API, and of ours beside them.

A field that would change the answer and is not carried out is refused, not passed over; those of
OpenAI's that only say who asks are taken and left alone.

Of a wrong body the first mistake of a list is enough, and so is one field too many: a body has room
for a million of them, and each would be kept while all other requests wait.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from trimtab.serving.choosing import Settings
from trimtab.serving.names import MOST_STACKED, Asked

Text = Annotated[str, Field(max_length=1_000_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, le=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
#: Answers of one request: prompts times n.
MOST_ANSWERS = 64


def at_most(entries: int) -> BeforeValidator:
    """Refuses a mapping that is too large before any entry is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise ValueError(f"there may be {entries} entries, and there are {len(value)}")
        return value

    return BeforeValidator(check)


class Strict(BaseModel):
    """A body, or a part of one, that has no other fields."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            raise ValueError(
                f"there are {len(cls.model_fields)} fields, and {len(value)} are given"
            )
        return value


class SteeringBody(Strict):
    """A steering by its name, turned by one of dial (a number, or a strength's name) and kl."""

    name: Annotated[str, Field(max_length=64)]
    dial: Number | Annotated[str, Field(max_length=32)] | None = None
    kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    scope: Annotated[str, Field(max_length=500)] | None = None

    @model_validator(mode="after")
    def _once(self) -> SteeringBody:
        if self.dial is not None and self.kl is not None:
            raise ValueError("give dial or kl, not both")
        return self

    @property
    def asked(self) -> Asked:
        return Asked(self.name, self.dial, self.kl, self.scope)


#: What a request stacks, in order.
Stacked = Annotated[list[SteeringBody], Field(max_length=MOST_STACKED, fail_fast=True)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Sampled(Strict):
    """What chat completions and completions share."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=200)]],
            Field(max_length=16, fail_fast=True),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^\d{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=300),
            at_most(300),
        ]
        | None
    ) = None
    # Beside OpenAI's, as vLLM calls them.
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    #: Ours: what is stacked, in order.
    steering: Stacked | None = None
    # Who asks, and how the answer is kept elsewhere: taken, and without any effect here.
    user: Annotated[str, Field(max_length=1000)] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def settings(self, max_tokens: int, logprobs: int | None, answer: int) -> Settings:
        """How the tokens of the request's `answer`-th answer are chosen."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Settings(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            bias={int(token): more for token, more in (self.logit_bias or {}).items()},
            seed=None if self.seed is None else self.seed + answer,
            stop=stop,
            logprobs=logprobs,
        )


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message. What only other servers need of it (a name, tool calls) goes to the template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(max_length=1000, fail_fast=True)] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def told(self) -> dict[str, Any]:
        """As templates take it. A developer is their system, and what is null is not said: clients
        send answers back as they came, with `refusal: null`."""
        more = {key: value for key, value in (self.model_extra or {}).items() if value is not None}
        role = "system" if self.role == "developer" else self.role
        return {**more, "role": role, "content": self.text}


class ChatBody(_Sampled):
    """A chat completion."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _told(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs asks for logprobs: true")
        return self


class CompletionBody(_Sampled):
    """A completion of plain text or of token ids; several prompts have answers of their own."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_ANSWERS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_ANSWERS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
