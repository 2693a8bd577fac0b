"""Puts a monitor to work: what each turn of chats is along a direction, and which are alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError, check_list, shown
from trimtab.model import LanguageModel, check_model
from trimtab.monitoring.alarms import At, Monitor, direction_of
from trimtab.monitoring.chats import Chat, as_chat, read_turns
from trimtab.monitoring.projecting import projections
from trimtab.reports import Presented, Table
from trimtab.steering import Condition, Steering


@dataclass(frozen=True)
class Turn:
    """One answer of a chat: the projection of each of its tokens, and at the last token of its
    prompt (None of a text that is no chat). An answer that is not there has no tokens."""

    chat: int
    number: int
    prompt: float | None
    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    projections: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Over the answer's tokens."""
        if not self.projections:
            return None
        return sum(self.projections) / len(self.projections)

    def value(self, at: At) -> float | None:
        """What is compared with a threshold."""
        return self.mean if at == "answer" else self.prompt


@dataclass(frozen=True, repr=False)
class Monitoring(Presented):
    """The turns of some chats along a direction. With a monitor some of them are `alarms`."""

    turns: tuple[Turn, ...]
    site: str
    source: dict[str, Any]
    monitor: Monitor | None = None

    def alarms(self, turn: Turn) -> bool:
        """Whether a turn is an alarm; without a monitor none is."""
        return self.monitor is not None and self.monitor.alarms(turn.value(self.monitor.at))

    @property
    def alarming(self) -> tuple[Turn, ...]:
        """The turns that are alarms."""
        return tuple(turn for turn in self.turns if self.alarms(turn))

    @property
    def summary(self) -> str:
        chats = len({turn.chat for turn in self.turns})
        read = f"{len(self.turns)} turns of {chats} chats"
        if self.monitor is None:
            what = self.source.get("what", "direction")
            return f"{read} along the {what} of {shown(self.source['method'])} at {self.site}."
        return f"{len(self.alarming)} of {read} are alarms ({self.monitor})."

    def score(self, turn: Turn) -> float | None:
        """How many standard deviations a turn is above what is usual."""
        if self.monitor is None:
            return None
        value = turn.value(self.monitor.at)
        return None if value is None else self.monitor.baseline.score(value)

    def tables(self) -> list[Table]:
        """A line for each turn."""
        rows = [
            [
                str(turn.chat + 1),
                str(turn.number + 1),
                _number(turn.prompt),
                _number(turn.mean),
                _number(self.score(turn), "+.1f"),
                "alarm" if self.alarms(turn) else "",
                shown(" ".join(turn.text.split()), 60),
            ]
            for turn in self.turns
        ]
        heads = [
            "chat",
            "turn",
            "at the prompt's end",
            "answer's mean",
            "sd from usual",
            "",
            "answer",
        ]
        return [Table("Turns", heads, rows).without_empty_columns(2)]

    def as_json(self) -> dict[str, Any]:
        """For `trimtab monitor check --json`."""
        return {
            "site": self.site,
            "source": self.source,
            "monitor": None if self.monitor is None else self.monitor.as_json(),
            "alarms": len(self.alarming),
            "turns": [
                {
                    "chat": turn.chat,
                    "turn": turn.number,
                    "prompt": turn.prompt,
                    "mean": turn.mean,
                    "z": self.score(turn),
                    "alarm": self.alarms(turn),
                    "text": turn.text,
                    "tokens": [
                        {"id": token, "text": text, "projection": value}
                        for token, text, value in zip(
                            turn.ids, turn.tokens, turn.projections, strict=True
                        )
                    ],
                }
                for turn in self.turns
            ],
        }

    def plot(self, ax: Any = None) -> Any:
        """The turns of each chat, with what is usual and the threshold.

        On the matplotlib axes `ax`, or on those of a new figure; they are returned.
        """
        from trimtab.monitoring.monitoring_page import draw
        from trimtab.reports import axes_for

        axes = axes_for(ax, (7.0, 3.6))
        draw(axes, self)
        return axes


def monitor(
    language_model: LanguageModel,
    watch: Monitor | Steering,
    chats: Sequence[Any],
    *,
    site: str | None = None,
) -> Monitoring:
    """What the turns of chats are along a direction, token by token and turn by turn.

    `watch` is a monitor, or a steering whose direction is read (at `site`, where it has several)
    without an alarm. A chat is a list of messages, an `Answered` prompt, a completion of
    `generate`, or plain text, which is read as a whole. Each is read by the model as it is, not
    steered.

    Errors: a TrimtabError of one line that names the chat.
    """
    check_model(language_model)
    check_list("chat", chats)
    read = [as_chat(chat, f"chat {number}") for number, chat in enumerate(chats, 1)]
    if not read:
        raise TrimtabError("there is no chat to read")
    if isinstance(watch, Monitor):
        watch.check_fits(language_model.anatomy, language_model.identity)
        if site is not None:
            raise TrimtabError("a monitor has its site: name one where a steering is read")
        condition, source, own = watch.condition, watch.source, watch
    else:
        condition, source = direction_of(language_model, watch, site)
        own = None
    return Monitoring(turns_along(language_model, condition, read), condition.site, source, own)


def turns_along(
    language_model: LanguageModel, condition: Condition, chats: Sequence[Chat]
) -> tuple[Turn, ...]:
    """Every turn of chats in order, with its projections."""
    reads = read_turns(language_model, chats)
    along = projections(language_model, condition, [read.tokens for read in reads])
    found = []
    decode = language_model.tokenizer.decode
    for read, values in zip(reads, along, strict=True):
        for place in read.places:
            ids = tuple(read.tokens[place.start : place.stop])
            found.append(
                Turn(
                    place.chat,
                    place.number,
                    float(values[place.start - 1]) if place.prompted and place.start else None,
                    decode(ids),
                    ids,
                    tuple(decode([token]) for token in ids),
                    tuple(values[place.start : place.stop].tolist()),
                )
            )
    return tuple(sorted(found, key=lambda turn: (turn.chat, turn.number)))


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)
