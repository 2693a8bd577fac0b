"""What a request's body may be; the ranges of everything are checked here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.serving import Asked, Settings

#: Steerings that act together.
_MOST_STACKED = 8
_Text = Annotated[str, Field(max_length=100_000)]
_Name = Annotated[str, Field(min_length=1, max_length=64)]
_Number = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Turned(_Strict):
    """A steering by its name, turned by one of `dial` and `kl`, on a scope."""

    name: _Name
    dial: _Number | None = None
    kl: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    scope: Annotated[str, Field(max_length=500)] | None = None

    @model_validator(mode="after")
    def _once(self) -> Turned:
        if self.dial is not None and self.kl is not None:
            raise ValueError("give dial or kl, not both")
        return self

    @property
    def asked(self) -> Asked:
        return Asked(self.name, self.dial, self.kl, self.scope or None)


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: _Text


Messages = Annotated[list[Message], Field(min_length=1, max_length=400)]
Stack = Annotated[list[Turned], Field(max_length=_MOST_STACKED)]


class Sampled(_Strict):
    """How tokens are chosen; temperature 0 takes the likeliest."""

    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 128
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0

    @property
    def settings(self) -> Settings:
        return Settings(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


class ChatBody(_Strict):
    """The conversation of each side that is to be answered, and with what one of them is
    steered."""

    plain: Messages | None = None
    steered: Messages | None = None
    steerings: Stack = []
    sampling: Sampled = Sampled()
    evidence: bool = True

    @model_validator(mode="after")
    def _something(self) -> ChatBody:
        if self.plain is None and self.steered is None:
            raise ValueError("name a side to be answered")
        return self


class WrittenBody(_Strict):
    """An answer that was written: what it answers, under what, and its tokens."""

    messages: Messages
    steerings: Stack = []
    new: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=8192)
    ]


class PlaceBody(WrittenBody):
    """One of its tokens, by its place."""

    place: Annotated[int, Field(ge=0, lt=8192)]


class CostBody(_Strict):
    """Steerings whose cost is asked for, each at a dial."""

    steerings: Stack


class CurveBody(_Strict):
    """The next token after a prompt over the dial of a steering; no tokens are chosen."""

    name: _Name
    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]
    tokens: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]],
                      Field(max_length=12)] = []  # fmt: skip
    points: Annotated[int, Field(ge=3, le=257)] = 65


class LinesBody(_Strict):
    """What is to be written down as lines that can be run elsewhere."""

    prompt: Annotated[str, Field(max_length=20_000)] = "Today I feel"
    system: Annotated[str, Field(max_length=20_000)] = ""
    steerings: Stack = []
    sampling: Sampled = Sampled()


class Row(_Strict):
    """A pair of a contrast; `chat` says that its prompt is a user's message, not plain text."""

    prompt: _Text = ""
    chat: bool = False
    positive: Annotated[str, Field(min_length=1, max_length=100_000)]
    negative: Annotated[str, Field(min_length=1, max_length=100_000)]
    part: Literal["train", "validation", "test"] | None = None


class ContrastBody(_Strict):
    """Where a contrast comes from: a wish, the name of one that is built in, or pasted text."""

    wish: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    builtin: _Name | None = None
    pasted: Annotated[str, Field(min_length=1, max_length=2_000_000)] | None = None

    @model_validator(mode="after")
    def _once(self) -> ContrastBody:
        if sum(one is not None for one in (self.wish, self.builtin, self.pasted)) != 1:
            raise ValueError("give one of wish, builtin and pasted")
        return self


class MakeBody(_Strict):
    """Pairs to make a steering of, with what their sides are in words where anybody has said so;
    what it is to be called, what it may cost, and how many minutes making it may take."""

    rows: Annotated[list[Row], Field(min_length=2, max_length=5000)]
    name: _Name
    source: Annotated[str, Field(max_length=500)] = "pairs"
    behaviour: Annotated[str, Field(max_length=500)] = ""
    opposite: Annotated[str, Field(max_length=500)] = ""
    max_cost: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 0.1
    minutes: Annotated[float, Field(gt=0, le=1440, allow_inf_nan=False)] | None = None


class StopBody(_Strict):
    """What is to be stopped, so that no later work is."""

    name: Annotated[str, Field(max_length=500)]


class TextBody(_Strict):
    """A text to look at along a steering's direction."""

    name: _Name
    text: Annotated[str, Field(min_length=1, max_length=20_000)]
    site: Annotated[str, Field(max_length=100)] | None = None


class UnitBody(_Strict):
    """A unit of a site, or with none what a steering adds there."""

    name: _Name
    site: Annotated[str, Field(max_length=100)]
    unit: Annotated[int, Field(ge=0, lt=2**31)] | None = None
