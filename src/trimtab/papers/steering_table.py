"""How well vectors bring concepts into answers: AxBench's table of steering, by a judge.

"AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders" (Wu et al., arXiv
2501.17148). Of each concept a method is fitted on answers that show it; the model answers
instructions that have nothing to do with it under each of some factors; a judge rates each answer
from 0 to 2 by how far it shows the concept, deals with the instruction, and reads. An answer's
score is the harmonic mean of the three. The factor is chosen on one half of the instructions, and
the score is that of the other half.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation import (
    RATINGS,
    Attached,
    Chat,
    ChatRater,
    OfflineRater,
    Rater,
    asked_with,
    offline_rater,
    overall,
    steering_of,
)
from trimtab.figures import Estimate, mean_interval
from trimtab.model import Completion, LanguageModel, answer_of
from trimtab.papers.axbench import concepts_of, first_tokens, read_set
from trimtab.papers.effects import fitted
from trimtab.papers.result import StudyResult, Value, value_of
from trimtab.reports import (
    Picture,
    Run,
    Table,
    cell,
    curve,
    one_line_each,
    panels,
    styled,
)
from trimtab.sweeps import ladder
from trimtab.terminal import progress

#: What stands in a recipe for a method that asks in words, and the row without any steering.
PROMPT, UNSTEERED = "prompt", "unsteered"
_PROTOCOL = "free"
Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is made: the first so many `concepts` (None: all), `train_texts` of each, so many
    `instructions`, answers of `new_tokens`, which is also how much of a train text is read."""

    concepts: int | None = None
    train_texts: int | None = None
    instructions: int = 10
    new_tokens: int = 128


@dataclass(frozen=True)
class Scores:
    """Of one method and concept: the factor that was chosen, the mean of each rating and of the
    score on the other half of the instructions, the score at each factor on the first half, and
    how many answers the judge gave no rating."""

    factor: str
    ratings: Mapping[str, float]
    curve: Mapping[str, Estimate]
    unclear: int


def steering_table(
    language_model: LanguageModel,
    methods: Sequence[Mapping[str, Any]],
    *,
    texts_of: str,
    sizes: Mapping[str, Any] | None = None,
    judge: Chat | None = None,
    data: str | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> StudyResult:
    """The mean over concepts of each method's score, with its 95 % interval.

    `methods` are as a recipe writes them, {name, method, fixed, factors}; of method prompt, which
    asks in words, the factors are the rungs of a ladder. They are fitted on pairs: an instruction,
    the set's answer that shows the concept, and the model's own. `texts_of` names the set, as in
    `detection`. `judge` gives the ratings; without one an offline judge does (`OfflineRater`).
    Answers are sampled at temperature 1 by `seed`; `output` keeps each method's ratings of a
    concept, from which an interrupted run goes on.
    """
    amounts = Sizes(**(sizes or {}))
    train, test = (read_set(texts_of, part, data) for part in ("train", "test"))
    known = concepts_of(train, amounts.concepts)
    if not known:
        raise TrimtabError(f"{texts_of} has no texts of a concept")
    for one in methods:
        if one["method"] != PROMPT and not one.get("factors"):
            raise TrimtabError(f"method {one['name']} has no factors to choose from")
    config = {
        "study": "steering-table",
        "methods": [dict(one) for one in methods],
        "texts_of": texts_of,
        "sizes": vars(amounts),
        "judge": None if judge is None else judge.name,
        "seed": seed,
        "model": language_model.described,
    }
    found: dict[str, dict[str, Scores]] = {}
    with (
        Run(output, config, alone=True) as run,
        progress("steering concepts", len(known)) as advance,
    ):
        for number, concept in known.items():
            bench = _Bench(language_model, (texts_of, number, concept), train, test, amounts)
            found[number] = bench.scores(methods, judge, run, seed)
            advance(1)
        judged = [one for one in run.records if one["id"] == _JUDGE]
        rated = sum(one["id"] != _JUDGE for one in run.records)
    names = list(next(iter(found.values())))
    means = {
        name: {
            rating: mean_interval(torch.tensor([of[name].ratings[rating] for of in found.values()]))
            for rating in (*RATINGS, "overall")
        }
        for name in names
    }
    return StudyResult(
        _as_json(texts_of, known, found, means, judge),
        _values(means, judge),
        _tables(known, found, means),
        [_picture(found)],
        _notes(judge, judged, found, rated),
    )


# -- one concept ----------------------------------------------------------------------------------

#: The id of the record that says how good the offline judge is.
_JUDGE = "judge"


class _Bench:
    """One concept: what is fitted on, what is asked, and who rates."""

    def __init__(
        self,
        language_model: LanguageModel,
        about: tuple[str, str, str],
        train: Sequence[Mapping[str, Any]],
        test: Sequence[Mapping[str, Any]],
        sizes: Sizes,
    ) -> None:
        self.language_model, self.sizes = language_model, sizes
        self.set, self.number, self.concept = about
        self.task = f"{self.set}, concept {self.number}"
        self.shown = [row for row in train if row["concept_id"] == self.number]
        self.shown = self.shown[: sizes.train_texts]
        seen = {row["input"] for row in train}
        # An instruction that is about code or sums has no answer that shows every concept.
        plain = [
            row["input"]
            for row in test
            if row["concept_id"] == self.number
            and row["category"] == "negative"
            and row.get("concept_genre", "text") == "text"
            and row["input"] not in seen
        ]
        asked = list(dict.fromkeys(plain))[: sizes.instructions]
        if len(asked) < 2:
            raise TrimtabError(
                f"concept {self.number} has {len(asked)} held-out instructions that no train text "
                "has, and two are the least: one to choose a factor on, one to report"
            )
        self.asked = asked
        self.prompts = [self._prompt(one) for one in asked]
        self.test = test
        self._plain: list[Completion] = []  # the unsteered model's, which the offline judge reads

    def _prompt(self, instruction: str) -> Any:
        if self.language_model.chats:
            return (("user", instruction),)
        return f"{instruction}\n"

    def scores(
        self, methods: Sequence[Mapping[str, Any]], judge: Chat | None, run: Run, seed: int
    ) -> dict[str, Scores]:
        """Of each method, what is there already taken from the run."""
        every = {UNSTEERED: [""], **{one["name"]: self._labels(one) for one in methods}}
        missing = [name for name, labels in every.items() if not self._is_done(run, name, labels)]
        if missing:
            rater: Rater = self._offline(run, seed) if judge is None else ChatRater(judge)
            todo = [one for one in methods if one["name"] in missing]
            made = self._fitted(todo, seed)
            if UNSTEERED in missing:
                self._rate(rater, UNSTEERED, {"": None}, run, seed)
            for one in todo:
                self._rate(rater, one["name"], self._under(one, made), run, seed)
        return {name: self._chosen(run, name, labels) for name, labels in every.items()}

    def _labels(self, one: Mapping[str, Any]) -> list[str]:
        """The factors of a method, or the rungs of a prompt, as they are called."""
        if one["method"] == PROMPT:
            return list(ladder(""))
        return [f"{factor:g}" for factor in one["factors"]]

    def _fitted(self, methods: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
        """Steerings of the methods that are no prompts, from one pass."""
        fits = [one for one in methods if one["method"] != PROMPT]
        if not fits:
            return {}
        most, lm = self.sizes.new_tokens, self.language_model
        prompts = [self._prompt(row["input"]) for row in self.shown]
        own = lm.generate(prompts, max_new_tokens=most, chat=False)
        pairs = [
            (prompt, first_tokens(lm, row["output"], most), answer_of(lm, answer).text or " ")
            for prompt, row, answer in zip(prompts, self.shown, own, strict=True)
        ]
        return dict(fitted(lm, fits, Contrast.from_pairs(pairs, self.task)))

    def _under(self, one: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Attached]:
        """What is attached at each factor."""
        if one["method"] == PROMPT:
            return dict(ladder(f"bring {self.concept.strip().rstrip('.')} into your answer"))
        steering = made[one["name"]]
        labels = self._labels(one)
        return {
            label: steering.at(factor) for label, factor in zip(labels, one["factors"], strict=True)
        }

    def _written(self, under: Mapping[str, Attached], seed: int) -> list[Completion]:
        """Answers to each instruction, factor by factor."""
        lm = self.language_model
        if self._plain and list(under.values()) == [None]:
            return self._plain
        asked = [one for each in under.values() for one in asked_with(lm, each, self.prompts)]
        steerings: list[Any] = [
            steering_of(each) or () for each in under.values() for _ in self.prompts
        ]
        written = lm.generate(
            asked,
            steering=steerings,
            chat=False,
            max_new_tokens=self.sizes.new_tokens,
            temperature=1.0,
            seed=seed,
        )
        answers = [answer_of(lm, one) for one in written]
        if list(under.values()) == [None]:
            self._plain = answers
        return answers

    def _rate(
        self, rater: Rater, name: str, under: Mapping[str, Attached], run: Run, seed: int
    ) -> None:
        """Write, rate and keep what is not there yet."""
        started = time.perf_counter()
        answers = self._written(under, seed)
        prompts = self.prompts * len(under)
        ratings = rater.ratings(self.concept, prompts, answers)
        seconds = (time.perf_counter() - started) / len(answers)
        labels = [label for label in under for _ in self.prompts]
        there = {(one["steering"], one["index"]) for one in self._records(run)}
        records = [
            {
                "task": self.task,
                "protocol": _PROTOCOL,
                "steering": _label(name, label),
                "index": place % len(self.prompts),
                "id": self.asked[place % len(self.prompts)],
                "values": rating,
                "seconds": seconds,
                "prompt": self.asked[place % len(self.prompts)],
                "output": answer.text,
            }
            for place, (label, answer, rating) in enumerate(
                zip(labels, answers, ratings, strict=True)
            )
        ]
        run.append([one for one in records if (one["steering"], one["index"]) not in there])

    # -- who rates --------------------------------------------------------------------------------

    def _offline(self, run: Run, seed: int) -> OfflineRater:
        """The judge where none is named: of texts that no method is fitted on, and that answer
        other instructions than those that are asked."""
        rows = [row for row in self.test if row["input"] not in self.asked]
        about = [r for r in rows if r["concept_id"] == self.number and r["category"] == "positive"]
        others = [
            row
            for row in rows
            if (row["concept_id"] == self.number) == (row["category"] != "positive")
        ]
        found = offline_rater(
            self.language_model,
            [row["output"] for row in about],
            list(dict.fromkeys(row["output"] for row in others)),
            self.prompts,
            self._written({"": None}, seed),
        )
        if not any(one["id"] == _JUDGE for one in self._records(run)):
            said = {"task": self.task, "protocol": _PROTOCOL, "steering": _JUDGE, "index": 0}
            figures = {"n": found.texts, "figures": {"auroc": found.auroc}}
            run.append([{**said, "id": _JUDGE, "values": {}, "seconds": 0.0, **figures}])
        return found

    # -- what came of it --------------------------------------------------------------------------

    def _records(self, run: Run) -> list[Record]:
        return [one for one in run.records if one["task"] == self.task]

    def _of(self, run: Run, name: str, label: str) -> list[Record]:
        """The records of a method at a factor, instruction by instruction."""
        own = [one for one in self._records(run) if one["steering"] == _label(name, label)]
        return sorted(own, key=lambda one: int(one["index"]))

    def _is_done(self, run: Run, name: str, labels: Sequence[str]) -> bool:
        return all(len(self._of(run, name, label)) == len(self.asked) for label in labels)

    def _chosen(self, run: Run, name: str, labels: Sequence[str]) -> Scores:
        """The factor that is best on every second instruction, and what it does on the others."""
        halves = {label: _halves(self._of(run, name, label)) for label in labels}
        curves = {label: _score(choosing) for label, (choosing, _) in halves.items()}
        given = {label: one for label, one in curves.items() if one is not None}
        if not given:
            self._refuse(name)
        best = max(given, key=lambda label: given[label].value)
        reported = halves[best][1]
        score = _score(reported)
        if score is None:
            self._refuse(name)
        unclear = sum(
            overall(one["values"]) is None for label in labels for one in self._of(run, name, label)
        )
        clear = [one["values"] for one in reported if overall(one["values"]) is not None]
        means = {rating: sum(one[rating] for one in clear) / len(clear) for rating in RATINGS}
        return Scores(best, {**means, "overall": score.value}, given, unclear)

    def _refuse(self, name: str) -> NoReturn:
        raise TrimtabError(
            f"{self.task}: the judge gave no three ratings for any answer of one half under "
            f"{name}: its replies must begin with 0, 1 or 2"
        )


def _label(name: str, label: str) -> str:
    return f"{name} at {label}" if label else name


def _halves(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Those that factors are chosen on, and those that are reported."""
    return list(records[::2]), list(records[1::2])


def _score(records: Sequence[Record]) -> Estimate | None:
    """The mean score of answers; None where the judge rated none."""
    scores = [one for one in (overall(each["values"]) for each in records) if one is not None]
    return mean_interval(torch.tensor(scores)) if scores else None


# -- shown ----------------------------------------------------------------------------------------

Means = Mapping[str, Mapping[str, Estimate]]
Found = Mapping[str, Mapping[str, Scores]]


def _as_json(
    texts_of: str, known: Mapping[str, str], found: Found, means: Means, judge: Chat | None
) -> dict[str, Any]:
    return {
        "texts_of": texts_of,
        "judge": None if judge is None else judge.name,
        "concepts": [
            {
                "id": number,
                "concept": known[number],
                "methods": {
                    name: {
                        "factor": one.factor,
                        **one.ratings,
                        "chosen_on": {label: each.value for label, each in one.curve.items()},
                        "unclear": one.unclear,
                    }
                    for name, one in of.items()
                },
            }
            for number, of in found.items()
        ],
        "mean": {
            name: {
                rating: {"value": one.value, "ci95": list(one.ci95), "n": one.n}
                for rating, one in of.items()
            }
            for name, of in means.items()
        },
    }


def _values(means: Means, judge: Chat | None) -> dict[str, Value]:
    """The overall scores; those of the offline judge do not stand beside the paper's."""
    end = " (offline judge)" if judge is None else ""
    return {f"{name}{end}": value_of(of["overall"], share=False) for name, of in means.items()}


def _tables(known: Mapping[str, str], found: Found, means: Means) -> list[Table]:
    rows = [
        [
            name,
            *(cell(of[rating]) for rating in (*RATINGS, "overall")),
            "" if name == UNSTEERED else ", ".join(one[name].factor for one in found.values()),
        ]
        for name, of in means.items()
    ]
    note = (
        "Each rating from 0 to 2, overall their harmonic mean answer by answer, with 95 % "
        f"intervals over {len(found)} concepts; of the half of the instructions that factors were "
        "not chosen on."
    )
    names = list(means)
    each = [
        [number, known[number], *(f"{of[name].ratings['overall']:.3g}" for name in names)]
        for number, of in found.items()
    ]
    return [
        Table("Steering by a judge", ["", *RATINGS, "overall", "factors"], rows, note),
        Table("Overall, concept by concept", ["id", "concept", *names], each),
    ]


@styled
def _picture(found: Found) -> Picture:
    """The score over the factor, on the half that factors are chosen on."""
    figure, (axes,) = panels((7, 3.8))
    over: dict[str, dict[float, list[float]]] = {}
    for of in found.values():
        for name, one in of.items():
            for label, score in one.curve.items():
                if _is_number(label):
                    over.setdefault(name, {}).setdefault(float(label), []).append(score.value)
    lines = one_line_each(
        {
            name: {factor: mean_interval(torch.tensor(of[factor])) for factor in sorted(of)}
            for name, of in over.items()
        }
    )
    curve(axes, lines, xlabel="factor", ylabel="overall, 0 to 2")
    if lines:
        axes.legend(frameon=False, fontsize=8)
    return Picture(
        "The score over the factor",
        "curves",
        figure,
        "mean over concepts of the harmonic mean of three ratings, on the instructions that "
        "factors are chosen on, with 95 % intervals over concepts",
    )


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _notes(judge: Chat | None, judged: Sequence[Record], found: Found, rated: int) -> list[str]:
    notes = []
    if judge is not None:
        notes.append(f"ratings are those of {judge.name}, in trimtab's wording")
    else:
        aurocs = sorted(one["figures"]["auroc"] for one in judged)
        said = (
            f"; its classifier tells held-out texts about a concept from others with an AUROC of "
            f"{aurocs[0]:.2f} to {aurocs[-1]:.2f}"
            if aurocs
            else ""
        )
        notes.append(
            "no judge was named: ratings are those of an offline judge (words, and the unsteered "
            f"model's own probabilities), and its figures are not the paper's{said}"
        )
    unclear = sum(one.unclear for of in found.values() for one in of.values())
    if unclear:
        notes.append(f"{unclear} of {rated} answers got no three ratings, and are left out")
    return notes
