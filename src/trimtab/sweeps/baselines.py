"""Prompts beside methods: each is measured as a steering is, on the same rows and the same axes.

A prompt has no dial; where it has rungs, one is chosen on the validation rows, under the limit of
cost that methods keep to. The test rows say what it is worth. What it changes is KL per generated
token, as it is of a steering; so methods can be compared with the best prompt once more, each at
the dial at which it changes as much as that prompt does. Where methods are held to a budget of KL,
prompts stand beside them with what they change on the budget's own axis, which is what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from trimtab.contrasts import Part, Prompt
from trimtab.errors import TrimtabError
from trimtab.evaluation import (
    Attached,
    Continuations,
    Prompted,
    TokenKL,
    asked_with,
    neutral,
    together_with,
)
from trimtab.figures import Difference, Record, Result, differences
from trimtab.model import LanguageModel
from trimtab.reports import Run
from trimtab.steering import Steering, together
from trimtab.sweeps.asking import Asking
from trimtab.sweeps.metering import Overhead, overhead
from trimtab.sweeps.rows import TaskRows, choose

#: Prompts on which the time of generation is measured.
_TIMED_PROMPTS = 8


@dataclass(frozen=True)
class Rung:
    """One way to say a prompt: its figure on the validation rows, and its cost on plain text in
    nats per token."""

    name: str
    text: str
    value: float | None
    cost: float
    allowed: bool


@dataclass(frozen=True)
class Row:
    """A prompt, a method, or both together, beside the unsteered model.

    `said` is what stands before prompts, `rungs` what was tried of it and `rung` what was chosen.
    `against` compares it with the unsteered model on the test rows; `cost` is what plain text
    costs, in nats per token, `kl` what changes per generated token; `tokens` are those that a
    prompt grows by, and `overhead` the time of generation beside the unsteered model. `axis_kl` is
    KL on the axis of the budget that methods are held to, where there is one. `why` says what is
    missing.
    """

    name: str
    said: str = ""
    rung: str = ""
    rungs: tuple[Rung, ...] = ()
    dial: float | None = None
    validation: Result | None = None
    test: Result | None = None
    against: Difference | None = None
    cost: float | None = None
    kl: TokenKL | None = None
    tokens: float | None = None
    overhead: Overhead | None = None
    axis_kl: float | None = None
    why: str = ""

    @property
    def asks(self) -> bool:
        """Whether something is said before prompts, alone or with a steering."""
        return bool(self.said)


@dataclass(frozen=True)
class Prompts:
    """What prompts are worth beside methods.

    `rows` has prompts, methods, and the best prompt together with each method; `best` is the name
    of the prompt that does best on the validation rows. `against_best` has each method minus that
    prompt on the test rows, `at_kl` the methods at the dial at which they change as much per
    generated token as it does, and `at_kl_against_best` these minus it.
    """

    behaviour: str
    rows: tuple[Row, ...]
    best: str | None
    against_best: Mapping[str, Difference] = field(default_factory=dict)
    at_kl: tuple[Row, ...] = ()
    at_kl_against_best: Mapping[str, Difference] = field(default_factory=dict)
    #: The methods that clearly do more than the best prompt at what it changes.
    at_kl_beat_best: tuple[str, ...] = ()
    #: The best prompt, by its name.
    best_words: Mapping[str, Prompted] = field(default_factory=dict)
    #: What was answered to the test rows where something was said before them, by the row's name.
    tested: Mapping[str, Sequence[Record]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def kl(self) -> float | None:
        """What the best prompt changes per generated token, in nats."""
        found = next((row.kl for row in self.rows if row.name == self.best), None)
        return None if found is None else found.mean


@dataclass
class Baselines:
    """Measures prompts beside methods on the rows of a task; records are kept in the run."""

    bench: TaskRows
    run: Run
    max_cost: float | None
    timed: bool
    #: KL on the axis of the budget that methods are held to, where there is one.
    axis: Callable[[Attached], float] | None = None
    _records: dict[tuple[str, Part], list[Record]] = field(default_factory=dict)
    _costs: dict[str, float] = field(default_factory=dict)

    def measure(
        self,
        behaviour: str,
        asked: Sequence[Asking],
        chosen: Mapping[str, Steering],
        tested: Mapping[str, Sequence[Record]],
    ) -> Prompts:
        """Prompts beside the steerings that methods have chosen, whose records on the test rows
        are known."""
        found, records, best = self._asked(asked)
        for name, steering in chosen.items():
            if name in tested:
                found[name] = self._figures(Row(name, dial=steering.setting), steering)
                records[name] = tested[name]
        if best is None:
            return Prompts(
                behaviour, self._compared(found, records), None, tested=_where_said(found, records)
            )
        called, words = best
        known = {name: tested[name] for name in chosen if name in tested}
        for name, steering in chosen.items():
            both = together_with(words, steering)
            row = Row(f"{called} + {name}", said=both.label, dial=steering.setting)
            found[row.name] = self._figures(row, both)
            records[row.name] = self._answers(both, "test")
        prompts = Prompts(
            behaviour,
            self._compared(found, records),
            called,
            self._beside(records[called], known),
            best_words={called: words},
            tested=_where_said(found, records),
        )
        return self._at_kl(prompts, chosen, records[called])

    def _asked(
        self, asked: Sequence[Asking]
    ) -> tuple[dict[str, Row], dict[str, Sequence[Record]], tuple[str, Prompted] | None]:
        """The prompts by their names, their records on the test rows, and the best of them on the
        validation rows, of those that ask for what is steered to and keep to the limit of cost."""
        found: dict[str, Row] = {}
        records: dict[str, Sequence[Record]] = {}
        good: list[tuple[Row, Prompted]] = []
        for asking in asked:
            row, prompted = self._row(asking)
            found[row.name] = row
            if prompted is None:
                continue
            records[row.name] = self._answers(prompted, "test")
            if asking.toward and not row.why:
                good.append((row, prompted))
        best = choose(good, lambda one: _on_validation(one[0]), self.bench.maximise)
        return found, records, None if best is None else (best[0].name, best[1])

    def _compared(
        self, rows: Mapping[str, Row], records: Mapping[str, Sequence[Record]]
    ) -> tuple[Row, ...]:
        """With their figures on the test rows, and against the unsteered model."""
        against = self._beside(self.bench.unsteered("test"), records)
        return tuple(
            replace(row, test=self.bench.result(records[name]), against=against.get(name))
            if name in records
            else row
            for name, row in rows.items()
        )

    def _beside(
        self, base: Sequence[Record], records: Mapping[str, Sequence[Record]]
    ) -> dict[str, Difference]:
        """Each minus the same rows of another, corrected for their number."""
        pairs = {name: (base, some) for name, some in records.items()}
        return differences(pairs, self.bench.metric, self.bench.maximise)

    def _row(self, asking: Asking) -> tuple[Row, Prompted | None]:
        """A prompt at the rung that does best on the validation rows within the limit of cost;
        where none keeps to it, at the cheapest, which is said."""
        why = asking.why or self._too_long(asking)
        if why:
            return Row(asking.name, why=why), None
        rungs = [self._rung(name, one) for name, one in asking.rungs.items()]
        best = choose(
            [rung for rung in rungs if rung.allowed], lambda rung: rung.value, self.bench.maximise
        )
        why = "" if best is not None else f"it costs more than {self.max_cost:g} nats per token"
        taken = best or min(rungs, key=lambda rung: rung.cost)
        prompted = asking.rungs[taken.name]
        row = Row(
            asking.name,
            said=taken.text,
            rung=taken.name,
            rungs=tuple(rungs) if len(rungs) > 1 else (),
            validation=self.bench.result(self._answers(prompted, "validation")),
            why=why,
        )
        return self._figures(row, prompted), prompted

    def _too_long(self, asking: Asking) -> str:
        """Why there is no room for a prompt, or nothing."""
        lm = self.bench.language_model
        room = lm.max_length - self.bench.new_tokens
        for prompted in asking.rungs.values():
            asked = asked_with(lm, prompted, self.bench.every_prompt())
            longest = max(map(len, lm.encode(asked)))
            if longest > room:
                return f"with it a prompt has {longest} tokens, and there is room for {room}"
        return ""

    def _rung(self, name: str, prompted: Prompted) -> Rung:
        cost = self._cost(prompted)
        value = self.bench.result(self._answers(prompted, "validation")).value
        allowed = self.max_cost is None or cost <= self.max_cost
        return Rung(name, prompted.label, value, cost, allowed)

    def _figures(self, row: Row, attached: Attached) -> Row:
        """With what it costs and changes."""
        lm = self.bench.language_model
        prompts = self.bench.prompts(_TIMED_PROMPTS)
        kl, own, why = None, None, row.why
        try:
            own = None if self.axis is None else self.axis(attached)
            kl = self._continuations.kl(attached)
        except TrimtabError as error:
            why = why or str(error)
        return replace(
            row,
            cost=self._cost(attached),
            kl=kl,
            tokens=_more_tokens(lm, attached, prompts),
            overhead=overhead(lm, attached, prompts, engine=self.bench.engine)
            if self.timed
            else None,
            axis_kl=own,
            why=why,
        )

    def _cost(self, attached: Attached) -> float:
        if not isinstance(attached, Prompted) or attached.steering is not None:
            return self.bench.plain.cost(attached)
        if attached.digest not in self._costs:  # a rung may say what the ask says
            self._costs[attached.digest] = self.bench.plain.cost(attached)
        return self._costs[attached.digest]

    def _answers(self, prompted: Prompted, part: Part) -> list[Record]:
        """The records of a prompt on a part: of each text once, whatever it is called."""
        name = f"prompt-{prompted.digest[:16]}"
        if prompted.steering is not None:
            steered = together(prompted.steering)
            name += "".join(f"-{one.digest[:8]}@{one.setting:.9g}" for one in steered)
        if (name, part) not in self._records:
            self._records[name, part] = self.bench.recorded(
                self.run, f"{name}-{part}", prompted, part, name
            )
        return self._records[name, part]

    @cached_property
    def _continuations(self) -> Continuations:
        """What KL per generated token is measured on, as the task asks: chats or plain text."""
        lm, prompts = self.bench.language_model, self.bench.prompts(_TIMED_PROMPTS)
        return Continuations(lm, neutral(lm, any(not isinstance(each, str) for each in prompts)))

    def _at_kl(
        self, prompts: Prompts, chosen: Mapping[str, Steering], best: Sequence[Record]
    ) -> Prompts:
        """With the methods at the dial at which they change what the best prompt changes."""
        nats = prompts.kl
        if not nats:
            return prompts
        rows: dict[str, Row] = {}
        records: dict[str, Sequence[Record]] = {}
        for name, steering in chosen.items():
            try:
                turned, kl = self._continuations.at_kl(steering, nats)
            except TrimtabError as error:
                rows[name] = Row(name, why=str(error))
                continue
            rows[name] = Row(name, dial=turned.setting, cost=self.bench.plain.cost(turned), kl=kl)
            records[name] = self.bench.records(turned, "test", name=name)
        against, sign = self._beside(best, records), 1 if self.bench.maximise else -1
        beat = [n for n, one in against.items() if one.is_clear and sign * one.difference > 0]
        return replace(
            prompts,
            at_kl=self._compared(rows, records),
            at_kl_against_best=against,
            at_kl_beat_best=tuple(beat),
        )


def _where_said(
    rows: Mapping[str, Row], records: Mapping[str, Sequence[Record]]
) -> dict[str, Sequence[Record]]:
    """The records of prompts, alone or with a steering."""
    return {name: some for name, some in records.items() if rows[name].asks}


def _on_validation(row: Row) -> float | None:
    return None if row.validation is None else row.validation.value


def _more_tokens(
    language_model: LanguageModel, attached: Attached, prompts: Sequence[Prompt]
) -> float:
    """By how many tokens prompts grow, on average."""
    before = language_model.encode(prompts)
    after = language_model.encode(asked_with(language_model, attached, prompts))
    return sum(map(len, after)) / len(after) - sum(map(len, before)) / len(before)
