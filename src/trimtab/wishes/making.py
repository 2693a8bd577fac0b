"""From a wish to a steering: contrast, many methods, the best setting within a limit of cost,
beside just asking; measured at the end on pairs that nothing was chosen on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.contrasts import Contrast, Part, spread
from trimtab.dials import measured
from trimtab.errors import TrimtabError
from trimtab.evaluation import Attached, Prompted, together_with
from trimtab.figures import Difference, paired_difference, rate_interval
from trimtab.files import json_digest
from trimtab.model import LanguageModel, check_model
from trimtab.options import Answering, Choosing, Keep, Making, Rows, WishTexts, flat, record
from trimtab.reports import Run
from trimtab.steering import Steering
from trimtab.sweeps import Measured, TaskRows
from trimtab.wishes.asking import (
    NEW_TOKENS,
    PROMPTS,
    UNSAID,
    Asked,
    Written,
    asked_key,
    asked_on_validation,
    best_asked,
    kl_per_token,
    prompts_for,
    prompts_of,
    texts_of,
    written,
)
from trimtab.wishes.choosing import Choice, Chooser, Tried, tried_key
from trimtab.wishes.failing import advice_for, nothing_gains, of_asking, of_contrast
from trimtab.wishes.holding import Held, held_together
from trimtab.wishes.left import STEERING, TRAINED, check_free, clear, leave
from trimtab.wishes.made import Baseline, Chosen, Made, Tested
from trimtab.wishes.measuring import Measures
from trimtab.wishes.pace import Pace, Speed
from trimtab.wishes.plan import (
    RANGE,
    Plan,
    about,
    asked_tokens,
    cut_to_time,
    less_text,
    pair_tokens,
    plan_for,
    speed_of,
    words_tokens,
)
from trimtab.wishes.portfolio import Fits, portfolio
from trimtab.wishes.texts import (
    FILE,
    MOST,
    Given,
    begin_anew,
    contrast_of,
    given_contrast,
    say_contrast,
)
from trimtab.wishes.work import Work
from trimtab.writing import TooFewKeptError, read_wish, roles_for

#: The share of the minutes that writing a contrast may take, and of what is then left what has to
#: be done on its pairs.
_WRITING, _NEEDED = 0.4, 0.5


def _silent(text: str) -> None:
    """Says nothing."""


@flat
def make(
    language_model: LanguageModel,
    wish: str | None = None,
    *,
    contrast: Any = None,
    data: str | None = None,
    making: Making = Making(),
    texts: WishTexts = WishTexts(),
    keep: Keep = Keep(),
    review: bool = False,
    say: Callable[[str], object] = _silent,
) -> Made:
    """A steering for a wish in a few words, or for a contrast that is there already.

        >>> made = tt.make(lm, contrast="builtin:formality", output="formal/")  # doctest: +SKIP
        >>> lm.generate(["Today I feel"], steering=made.steering)  # doctest: +SKIP

    `contrast` is a file, `builtin:NAME`, `task:NAME` or a `Contrast` of pairs; without one the
    model writes one for the `wish` (see `persona_contrast`, whose arguments `texts` has). One pass
    fits many methods at many places; each is turned as far as `max_cost` allows (nats per token of
    plain text); successive halving on the validation pairs leaves a few, whose dials are then
    tried; what gains most within the limit is chosen. The gain is by how many nats the positive
    side of a pair gets further ahead of the negative one. Prompts that ask for the same are
    measured on the same axes. Only what is chosen is measured on the test pairs. `train` tries
    trained methods too.

    With `output` everything is in a directory, which has the steering, a card, the contrast, a
    report, samples and what to do next; what was interrupted goes on there and ends as it would
    have. `review` stops when the contrast is there, for you to edit contrast.jsonl; the next call
    without it goes on from the edited file. `minutes` bounds the time, and the result says what was
    left out. `say` is told what goes on, line by line.

    Where nothing works `chosen` and `steering` of the result are None, and `why` and `advice` say
    more: that is a result and no error. Errors (TrimtabError): neither a wish nor a contrast, or
    both; a contrast that is unpaired or too small to hold pairs out; a model without a chat
    template and no writer; a directory that holds something else.
    """
    check_model(language_model)
    if (wish is None) is (contrast is None) or not isinstance(wish, str | None):
        raise TrimtabError(
            'say what is wished for, as in "answers in one short sentence", or give a contrast'
        )
    given = Given() if contrast is None else given_contrast(contrast, data)
    if wish is not None:
        wish = read_wish(wish, texts.opposite).text
        roles_for(language_model, texts.writer, texts.judge)  # refuses who cannot write or judge
    directory = None if keep.output is None else Path(keep.output)
    config = _config(language_model, wish or "", given.contrast, making, texts)
    if directory is not None and not keep.overwrite:
        check_free(directory)
    with Run(directory, config, keep.overwrite, alone=True) as run:
        run.begin()
        if directory is not None and keep.overwrite:
            clear(directory)
            begin_anew(directory, given.contrast)
        work = Work(directory, json_digest(run.config, sort_keys=True)[:16])
        return _Maker(language_model, wish or "", given, making, texts, run, work, say).make(review)


def _config(
    language_model: LanguageModel,
    wish: str,
    given: Contrast | None,
    making: Making,
    texts: WishTexts,
) -> dict[str, Any]:
    """What decides what comes of it."""
    source = None if given is None else {"name": given.name, "digest": given.digest}
    return {
        "wish": wish,
        "contrast": source,
        **record(making),
        **(record(texts) if given is None else {}),
        "model": language_model.described,
    }


@dataclass
class _Maker:
    """The work on one wish in one directory."""

    language_model: LanguageModel
    wish: str
    given: Given
    making: Making
    texts: WishTexts
    run: Run
    work: Work
    say: Callable[[str], object]
    left_out: list[str] = field(default_factory=list)

    def make(self, review: bool) -> Made:
        """All of it, or with `review` the contrast only."""
        self.pace = Pace(self.making.minutes, self.work)
        self.arms = portfolio(self.language_model, self.making.seed, self.making.train)
        self.pace.begin(Speed(*self.work.recall("speed", self._speed)))
        plan = self._planned(self.given.contrast)
        for line in plan.lines():
            self.say(line)
        self._fit_in(plan)
        fresh, began = self._unwritten, self.pace.seconds
        try:
            contrast = self._contrast()
        except TooFewKeptError as error:
            return self._finish(self._blank(None, plan), [str(error)])
        if fresh:  # reading and writing as if it were writing alone: what is wrong with one is
            step = self._planned(None).step("contrast")  # likely wrong with both
            tokens = step.seconds(self.pace.speed) * self.pace.speed.writes
            self.pace.learn("written", tokens, self.pace.seconds - began)
        say_contrast(contrast, self.given.taken, self.say)
        blank = self._blank(contrast, plan)
        if review:
            return replace(blank, reviewed=False, files=self._files())
        missing = [part for part in MOST if part not in contrast.sizes]
        if missing:
            none = " and no ".join(missing)
            return self._finish(blank, [f"{contrast.name} has no {none} pairs: it is too small"])
        self.work.recall("contrast", lambda: contrast.digest)
        return self._chosen(blank, self._cut(contrast))

    # -- plan and contrast ------------------------------------------------------------------------

    def _speed(self) -> list[float]:
        found = speed_of(self.language_model)
        return [found.reads, found.writes]

    def _planned(self, contrast: Contrast | None) -> Plan:
        return plan_for(self.pace.speed, self.arms, self.making, self.texts, contrast)

    def _fit_in(self, plan: Plan) -> None:
        """Write fewer texts where the minutes allow no more."""
        minutes = self.making.minutes
        if minutes is None:
            return
        if plan.seconds > self.pace.left:
            self.say(
                f"{minutes:g} minutes are less than that: what there is no time for is left out"
            )
        if self.given.contrast is not None:
            return

        def fewer() -> list[int]:
            seconds = _WRITING * self.pace.left
            found = less_text(self.texts, self.pace.speed, seconds)
            return [found.pairs, found.questions, found.max_new_tokens]

        asked = self.texts
        pairs, questions, tokens = self.work.recall("texts", fewer)
        self.texts = replace(asked, pairs=pairs, questions=questions, max_new_tokens=tokens)
        shorter = {
            "pairs of instructions": (asked.pairs - pairs, asked.pairs),
            "questions of the contrast": (asked.questions - questions, asked.questions),
            "tokens of an answer of it": (asked.max_new_tokens - tokens, asked.max_new_tokens),
        }
        self.left_out += [f"{less} of {most} {of}" for of, (less, most) in shorter.items() if less]

    @property
    def _unwritten(self) -> bool:
        """Whether a contrast is to be written, and nothing of it is there."""
        if self.given.contrast is not None:
            return False
        file = None if self.run.path is None else self.run.path / FILE
        part = None if file is None else file.with_name(FILE + ".part")
        return file is None or part is None or not (file.exists() or part.exists())

    def _cut(self, contrast: Contrast) -> Contrast:
        """So much of the contrast as there is time to measure on."""
        if self.making.minutes is None:
            return contrast
        plan, sizes = self._planned(contrast), contrast.sizes
        found: dict[Part, int] = self.work.recall(
            "pairs", lambda: cut_to_time(plan, contrast, _NEEDED * self.pace.left)
        )
        fewer = [f"{sizes[part] - found[part]} of {sizes[part]} {part}"
                 for part in MOST if found[part] < sizes[part]]  # fmt: skip
        if not fewer:
            return contrast
        self.left_out.append(f"{', '.join(fewer)} pairs")
        parts = [spread(contrast.part(part).rows, found[part]) for part in MOST]
        return replace(contrast, rows=tuple(row for part in parts for row in part))

    def _contrast(self) -> Contrast:
        return contrast_of(
            self.language_model, self.wish, self.given.contrast, self.texts, self.making.seed,
            self.run.path, self.work,
        )  # fmt: skip

    def _blank(self, contrast: Contrast | None, plan: Plan) -> Made:
        """The result before anything is known."""
        return Made(
            self.wish,
            contrast,
            dict(vars(self.language_model.identity)),
            self.making.max_cost,
            round(self.pace.seconds, 2),
            plan=tuple(plan.as_json()),
            taken=self.given.taken,
        )

    # -- choosing ---------------------------------------------------------------------------------

    def _chosen(self, blank: Made, contrast: Contrast) -> Made:
        bench = TaskRows(
            self.language_model,
            contrast,
            Rows(limit=None, test_limit=None),
            Measured(choosing=Choosing(), answering=Answering(seed=self.making.seed)),
            shuffle=self.making.seed,
        )
        measures = Measures(bench, self.work)
        directory = None if self.run.path is None else self.run.path / TRAINED
        self.fits = Fits(self.language_model, contrast, self.arms, self.work, directory)
        self.plan = self._planned(contrast)
        self.say(f"fitting {len(self.arms)} settings of methods, each turned to the limit of cost")
        with self.pace.reading(self.plan.step("fit").read):
            self.fits.why_not(self.arms[0].name)  # which is the pass that fits them all
        self._say_left(contrast)
        chooser = Chooser(
            self.arms, self.fits, measures, self.work, self.pace, self.making.max_cost,
            pair_tokens(contrast), lambda: self._after("choose"), self.say,
        )  # fmt: skip
        choice = chooser.choose(lambda name, find: self._held(contrast, name, find))
        self.left_out += chooser.left_out
        asked = self._asked(measures, contrast)
        unsteered = measures.unsteered("validation")
        found = replace(
            blank,
            rows=choice.rows,
            tried=choice.tried,
            front=choice.front,
            asked=tuple(asked),
            held=choice.held,
            unsteered={
                "log_odds": float(unsteered.mean()),
                "prefers": float((unsteered > 0).double().mean()),
                "n": float(len(unsteered)),
            },
        )
        prompt = best_asked(asked, self.making.max_cost)
        if prompt is not None:
            found = replace(found, baseline=Baseline(prompt))
        why = nothing_gains(choice, contrast, prompt)
        if why:
            return self._finish(found, why)
        return self._tested(found, choice, contrast, measures)

    def _after(self, step: str) -> float:
        """Seconds for what has to come after a step, at the speed that is known by now."""
        return self.plan.least_after(step, self.pace.speed)

    def _say_left(self, contrast: Contrast) -> None:
        """How long the rest takes, by what was learned so far."""
        plan = self._planned(contrast)
        rest = sum(step.seconds(plan.speed) for step in plan.steps if step.name != "fit")
        self.say(f"the rest takes {about(min(rest, self.pace.left))}")

    def _held(self, contrast: Contrast, name: str, find: Callable[[], Steering]) -> Held | None:
        """Whether answers to some validation prompts hold together under a steering; None where
        there is no prompt, or no time."""
        prompts = prompts_of(contrast, "validation")
        if not prompts:
            return None
        lm, tokens = self.language_model, len(prompts) * NEW_TOKENS
        began = self.work.knows("texts, validation, unsteered")
        needed = self.pace.speed.seconds(0, tokens * (1 if began else 2)) + self._after("choose")
        if not self.pace.allows(f"answers under {name}", needed):
            self.left_out.append("whether its answers hold together")
            return None
        with self.pace.writing(tokens * (1 if began else 2)):
            base = texts_of(lm, prompts, lambda: None, "validation, unsteered", self.work)
            texts = texts_of(lm, prompts, find, f"validation, {name}", self.work)
        return held_together(texts, base)

    def _asked(self, measures: Measures, contrast: Contrast) -> list[Asked]:
        """The prompts for which there is time, on the validation rows."""
        found, skipped = [], []
        prompts = prompts_for(contrast)
        if prompts:
            self.say("asking for the same in prompts")
        rows, pair = measures.bench.rows("validation"), pair_tokens(contrast)
        for name, words in prompts:
            tokens = asked_tokens(rows, pair, words_tokens(self.language_model, words))
            needed = self.pace.speed.seconds(tokens) + self._after("ask")
            if not self.pace.allows(f"asking, {name}", needed):
                skipped.append(name)
                continue
            with self.pace.reading(tokens):
                one = asked_on_validation(measures, name, words, self.say)
            found += [] if one is None else [one]
        if skipped:
            self.left_out.append(f"{len(skipped)} of {len(prompts)} prompts: {', '.join(skipped)}")
        return found

    # -- the test part ----------------------------------------------------------------------------

    def _tested(self, found: Made, choice: Choice, contrast: Contrast, measures: Measures) -> Made:
        """The choice on the pairs that nothing was chosen on, beside the prompt and both."""
        assert choice.best is not None
        best, row = choice.best, next(row for row in choice.rows if row.state == "chosen")
        self.say(f"the chosen one on {measures.bench.rows('test')} test pairs: {best.arm}")
        attached = self._with_time(self._attached(best, found.baseline), contrast)
        kl: dict[str, Any] = dict.fromkeys(attached)
        if self._time_for("KL per generated token", (1 + len(attached)) * PROMPTS * 60, 400):
            kl = kl_per_token(self.language_model, contrast, attached, self.work)
        keys = {"steered": tried_key(best.arm, best.dial)}
        if found.baseline is not None:
            keys["asked"] = asked_key(found.baseline.asked.words)
        tested = {
            name: _tested(measures, attached[name], name, keys.get(name, name), kl[name])
            for name in attached
        }
        own = tested["steered"]
        if own.gain.ci95[0] <= 0 or own.cost.value > self.making.max_cost:
            name, (low, high) = best.arm, own.gain.ci95
            why = (
                f"what {name} gains on the validation pairs does not hold on the {own.gain.n} test "
                f"pairs: {own.gain.difference:+.3g} nats [{low:.3g}, {high:.3g}]"
            )
            if found.baseline is not None and "asked" in tested:
                found = replace(found, baseline=replace(found.baseline, tested=tested["asked"]))
            return self._finish(found, [why, *of_asking(found), *of_contrast(contrast)])
        shown = Written((), {})
        samples = (1 + len(attached)) * PROMPTS * NEW_TOKENS
        if self._time_for("samples", samples * 2, samples):
            self.say("writing samples")
            shown = written(self.language_model, contrast, attached, self.work)
        steering = self._final(best, row.method, own, contrast)
        baseline = found.baseline
        if baseline is not None and "asked" in tested:
            against = _more(measures, attached)
            baseline = replace(baseline, tested=tested["asked"], against=against)
        return self._finish(
            replace(
                found,
                chosen=Chosen(row, best.dial, steering, own, best.gain),
                baseline=baseline,
                together=tested.get("both"),
                written=shown,
            ),
            [],
        )

    def _time_for(self, what: str, read: float, written: float = 0.0) -> bool:
        """Whether there is time for something that may be left out, before the dial's range is
        measured; that it is left out is said."""
        seconds = self.pace.speed.seconds(read + RANGE, written)
        if self.pace.allows(what, seconds):
            return True
        self.left_out.append(what)
        return False

    def _with_time(
        self, attached: dict[str, Callable[[], Attached]], contrast: Contrast
    ) -> dict[str, Callable[[], Attached]]:
        """What there is time for on the test pairs: the steering in any case."""
        rows, pair = contrast.sizes["test"], pair_tokens(contrast)
        needed, found = 2 * rows * pair, {"steered": attached["steered"]}
        for name, each in attached.items():
            if name == "steered":
                continue
            needed += asked_tokens(rows, pair, 30)
            if self._time_for(f"{name} on the test pairs", needed):
                found[name] = each
        return found

    def _attached(
        self, best: Tried, baseline: Baseline | None
    ) -> dict[str, Callable[[], Attached]]:
        """What is measured on the test pairs, by name."""

        def steered() -> Steering:
            return replace(self.fits.steering(best.arm), value=best.dial)

        if baseline is None:
            return {"steered": steered}
        words: Prompted = baseline.asked.words
        return {
            "steered": steered,
            "asked": lambda: words,
            "both": lambda: together_with(words, steered()),
        }

    def _final(self, best: Tried, method: str, own: Tested, contrast: Contrast) -> Steering:
        """The steering as an artifact of its own: its dial's default is what was chosen, its range
        and its strengths by name are measured, and it says what it gains and costs."""
        file = None if self.run.path is None else self.run.path / STEERING
        if file is not None and file.exists():
            return Steering.load(file)
        arm = self.fits.arms[best.arm]
        fitted = self.fits.steering(best.arm)
        fitted = replace(
            fitted,
            dial=replace(fitted.dial, default=best.dial),
            hyperparameters={**fitted.hyperparameters, arm.method.dial: best.dial},
            value=None,
            findings={**fitted.findings, "made": _findings(own, self.wish, self.making)},
        )
        made = fitted
        if self._time_for("the range of its dial", 0):
            self.say("measuring the range of its dial")
            made = measured(
                self.language_model,
                fitted,
                contrast.train,
                default=False,
                beyond=arm.method.looks_beyond,
            )
        low, high = made.dial.range
        if not low <= best.dial <= high:  # what was chosen is sensible by what it was chosen by
            ends = (min(low, best.dial), max(high, best.dial))
            made = replace(made, dial=replace(made.dial, range=ends))
        if file is None:
            return made
        made.save(file)
        return Steering.load(file)

    # -- the end ----------------------------------------------------------------------------------

    def _finish(self, found: Made, why: Sequence[str]) -> Made:
        """The result, with its files."""
        advice = advice_for(found, self.making) if why else []
        if found.contrast is not None and not found.contrast.behaviour:
            advice = [*advice, UNSAID]
        found = replace(
            found,
            why=tuple(why),
            advice=tuple(advice),
            left_out=tuple(self.left_out),
            seconds=round(self.pace.seconds, 2),
        )
        if self.run.path is None:
            return found
        from trimtab.wishes.making_page import made_page  # loads matplotlib

        leave(found, self.run.path, self.language_model.name)
        found = replace(found, files=self._files("results.json", "report.html"))
        self.run.finish(
            found.as_json(), lambda environment: made_page(found, self.run, environment)
        )
        return found

    def _files(self, *coming: str) -> tuple[str, ...]:
        """What is in the directory for people, and what is still to come there."""
        if self.run.path is None:
            return ()
        shown = ("steering.safetensors", "README.md", "contrast.jsonl", "samples.md", "next.md")
        there = [name for name in shown if (self.run.path / name).exists()]
        return tuple(str(self.run.path / name) for name in (*there, *coming))


def _findings(own: Tested, wish: str, making: Making) -> dict[str, Any]:
    """What the steering's file says of how it was chosen; its card shows it."""
    figures = {key: value for key, value in own.as_json().items() if key != "kl"}
    return {**figures, "wish": wish, "max_cost": making.max_cost}


def _tested(
    measures: Measures, attached: Callable[[], Attached], name: str, key: str, kl: Any
) -> Tested:
    """On the test rows; what plain text costs is known by a `key`."""
    gains = measures.gains(attached, name, "test")
    odds = gains + measures.unsteered("test")
    return Tested(
        paired_difference(gains, flips=False),
        measures.cost_interval(attached, key),
        rate_interval(odds > 0),
        kl,
    )


def _more(measures: Measures, attached: dict[str, Callable[[], Attached]]) -> Difference:
    """What asking gains more than steering, pair by pair."""
    asked, steered = (measures.gains(attached[name], name, "test") for name in ("asked", "steered"))
    return paired_difference(asked - steered, flips=False)
