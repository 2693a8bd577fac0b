"""What is asked of whoever answers in a chat, and what comes back: an answer with its receipt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from trimtab.errors import TrimtabError
from trimtab.steering import Steering

#: Called with each piece of an answer while it is written.
OnText = Callable[[str], object]
#: The same of two answers that are written at once: which one, and its piece.
OnBoth = Callable[[int, str], object]


@dataclass(frozen=True, eq=False)
class Put:
    """A steering that is put on a chat.

    `source` is its file, or its name on a server. Where `dial`, `kl` (a budget in nats for each
    question) and `scope` are None they are the steering's own. `own` is the steering as it was
    read, `steering` as it stands now; a server keeps its own, and both are None.
    """

    name: str
    source: str
    dial: float | str | None = None
    kl: float | None = None
    scope: str | None = None
    on: bool = True
    own: Steering | None = None
    steering: Steering | None = None

    def turned(self, **changes: Any) -> Put:
        """The same with another dial, budget or scope."""
        put = replace(self, **changes)
        if put.own is None or not {"dial", "scope"} & changes.keys():
            return put
        steering = put.own if put.scope is None else put.own.scoped(put.scope)
        return replace(put, steering=steering if put.dial is None else steering.at(put.dial))

    def __str__(self) -> str:
        """As it is listed: its name, where its dial stands, on which tokens it acts."""
        scope = f" on {self.scope}" if self.scope is not None else ""
        return f"{self.name}{self._standing()}{scope}{'' if self.on else ' (off)'}"

    def _standing(self) -> str:
        if self.kl is not None:
            return f"@kl={self.kl:g}"
        if self.steering is not None:
            return f"@{self.steering.setting:.4g}{self.steering.dial.unit}"
        if self.dial is None:
            return ""
        return f"@{self.dial:g}" if isinstance(self.dial, float) else f"@{self.dial}"

    def as_json(self) -> dict[str, Any]:
        dial = self.dial if self.steering is None else self.steering.setting
        said = {"name": self.name, "source": self.source, "dial": dial, "kl": self.kl}
        return {**said, "scope": self.scope, "on": self.on}


def check_together(stack: Sequence[Put]) -> None:
    """Refuse a budget beside other steerings."""
    acting = [put for put in stack if put.on]
    budgets = [put.name for put in acting if put.kl is not None]
    if budgets and len(acting) > 1:
        raise TrimtabError(
            f"a budget (kl) turns the dial of one steering, and {len(acting)} would act beside "
            f"{budgets[0]}'s: /off NAME leaves one out, /dial {budgets[0]} NUMBER ends the budget"
        )


@dataclass(frozen=True)
class Asked:
    """A conversation to go on with: messages that end with the user's, and a system message."""

    messages: Sequence[Mapping[str, str]]
    system: str | None = None
    stack: tuple[Put, ...] = ()
    #: The number of the answer in its chat, so that a seed gives each another draw.
    number: int = 0

    @property
    def acting(self) -> tuple[Put, ...]:
        return tuple(put for put in self.stack if put.on)


@dataclass(frozen=True)
class Receipt:
    """What an answer was made with: `acted` says of each steering its name, where its dial stood,
    on how many tokens of the prompt and of the answer it acted, and what its gate decided.

    `tokens` were written in `seconds`, of which `first` passed before the first piece; `reused` of
    the prompt's tokens had been read before. What nobody says is None.
    """

    acted: tuple[Mapping[str, Any], ...] = ()
    prompt_tokens: int | None = None
    reused: int | None = None
    tokens: int | None = None
    seconds: float = 0.0
    first: float | None = None
    stopped: bool = False

    @property
    def line(self) -> str:
        """For people."""
        parts = [_shown(each) for each in self.acted] or ["unsteered"]
        if self.tokens is not None:
            writing = self.seconds - (self.first or 0.0)
            # The first token is there when the writing begins.
            rate = f", {(self.tokens - 1) / writing:.1f}/s" if self.tokens > 1 and writing else ""
            parts.append(f"{self.tokens} tokens{rate}")
        if self.first is not None:
            parts.append(f"first after {self.first:.2f} s")
        if self.reused:
            parts.append(f"{self.reused} of {self.prompt_tokens} tokens read before")
        return " · ".join([*parts, *(["stopped"] if self.stopped else [])])

    def as_json(self) -> dict[str, Any]:
        return {
            "acted": [dict(each) for each in self.acted],
            "prompt_tokens": self.prompt_tokens,
            "reused": self.reused,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "first_seconds": None if self.first is None else round(self.first, 3),
            "stopped": self.stopped,
        }


def _shown(acted: Mapping[str, Any]) -> str:
    """One steering of a receipt."""
    text, gate = f"{acted['name']}@{acted['dial']:.4g}", acted.get("gate")
    if "tokens" in acted:
        on = acted["tokens"]
        text += f" on {on['prompt']}+{on['answer']} tokens"
    return text if gate is None else f"{text}, gate {'fired' if gate['fired'] else 'did not fire'}"


@dataclass(frozen=True)
class Answer:
    """A text that was written, its receipt, and where they are known its tokens and the steerings
    as they acted, for whoever looks closer."""

    text: str
    receipt: Receipt
    tokens: tuple[int, ...] = field(default=(), repr=False)
    acting: tuple[Steering, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Cost:
    """What steering changed in an answer: KL(unsteered || steered) of the next token at each of its
    tokens, in nats: the mean, and the largest; `gain` is by how many nats per token the answer is
    more probable to the steered model than to the unsteered one."""

    mean: float
    largest: float
    gain: float
    tokens: int

    @property
    def line(self) -> str:
        return (
            f"{self.mean:.3f} nats per token (KL to the unsteered model, {self.tokens} tokens, at "
            f"most {self.largest:.2f}); these words are {self.gain:+.3f} nats per token more "
            "probable steered"
        )


class Speaker(Protocol):
    """Whoever answers: a model in memory (`Local`), or one behind an address (`Remote`)."""

    @property
    def name(self) -> str: ...

    def put(self, argument: str) -> Put:
        """A steering by FILE@DIAL, or NAME@DIAL; refused where there is none, or it cannot act."""

    def answer(self, asked: Asked, on_text: OnText) -> Answer:
        """The answer; KeyboardInterrupt ends it, and what was written until then is returned."""

    def both(self, asked: Asked, on_both: OnBoth) -> tuple[Answer, Answer]:
        """The answers without and with what steers, written at once; ended as `answer` is."""

    def cost(self, asked: Asked, answer: Answer) -> Cost:
        """What steering changed in an answer."""

    def known(self) -> list[str]:
        """Names of steerings that `put` takes, beside files."""
