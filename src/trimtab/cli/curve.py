"""`trimtab strength curve`: all that changes over a steering's dial, measured, read and drawn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.cli.common import (
    as_chats,
    console,
    one_steering,
    open_beside,
    open_model,
    print_json,
    read_prompts,
    read_steerings,
    refuse_holding,
)
from trimtab.cli.options import Json, Opened, Prompting, Prompts, Steered
from trimtab.cli.tables import show_files
from trimtab.contrasts import last_message
from trimtab.errors import TrimtabError
from trimtab.files import json_digest, json_object
from trimtab.options import TOLERANCE, Bounds, Keep, Sampling, Tracing, flat_values, option
from trimtab.terminal import write_text

if TYPE_CHECKING:
    from trimtab.contrasts import Contrast
    from trimtab.model import LanguageModel
    from trimtab.steering import Steering
    from trimtab.strength import (
        Accuracy,
        ConceptAsked,
        ConceptJudge,
        CostAsked,
        Curves,
        Refits,
        TaskAsked,
        TextsAsked,
    )

#: More points than this are a slip of the finger.
_MOST_POINTS = 10_000
Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Turned(Steered):
    """The steering that is turned."""

    force: bool = option("Allow a steering that was made for another model.", False, flag="--force")


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What of the next token is followed over the dial, and how closely."""

    heading = "Curves"

    span: str | None = option(
        "LOW:HIGH of the dial (default: its own range).", None, flag="--range"
    )
    points: int = option("Dials of the next-token curve.", 1025)
    tolerance: float = option(
        "Error in probability between measured dials; 0 measures all.", TOLERANCE
    )
    token: Sequence[str] = option(
        "A token to follow, with its space: ' happy'; a text of several tokens is followed as "
        "their sequence; repeat.",
        (),
    )
    top: int = option("Follow so many tokens, where none is named.", 8)
    choose: Literal["gain", "end"] = option(
        "Which these are: gain, those that gain most while KL and entropy keep to their bounds; "
        "end, the most probable at the far end of the dial.",
        "gain",
    )

    def tracing(self, ends: Span) -> Tracing:
        """Between two ends of the dial."""
        tokens = self.token or self.top
        return Tracing(
            span=ends,
            points=self.points,
            tokens=tokens,
            tolerance=self.tolerance,
            choose=self.choose,
        )


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """What is fitted anew."""

    heading = "Curves"

    contrast: str | None = option(
        "The steering's contrast: log-odds of tokens, --resamples, --layers.", None
    )
    resamples: int = option("Fit so often on resampled rows, for error bars.", 0, least=0)
    layers: int | None = option(
        "Fit at so many layers, from the first to the last.", None, least=1, flag="--layers"
    )
    seed: int = option("For sampling and resampling.", 0, least=0)

    def refits(
        self, language_model: LanguageModel, steering: Steering, source: Contrast | None
    ) -> Refits:
        """The resampled steerings beside one, and what its tokens' log-odds are read off."""
        from trimtab.strength import Refits, method_of, resampled

        if not self.resamples or source is None:
            return Refits((), source)
        method = method_of(steering)
        others = resampled(language_model, method, source, self.resamples, self.seed)
        return Refits(others, source)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What plain text costs over the dial."""

    heading = "Cross-entropy"

    ce: bool = option("Cross-entropy of plain text too.", False, flag="--ce")
    ce_text: Path | None = option("Text for it: plain, or JSONL with `text`.", None)
    ce_tokens: int = option("So many tokens of it.", 4096)
    ce_points: int = option("Dials of the curve of cross-entropy.", 33)

    def texts(self) -> list[str]:
        """What is read: nothing where no cost is asked for."""
        return _plain(self.ce_text) if self.ce or self.ce_text else []

    def asked(self, texts: Sequence[str], ends: Span) -> CostAsked | None:
        """The texts and their dials."""
        from trimtab.strength import CostAsked, spaced

        if not texts:
            return None
        return CostAsked(texts, _denser(spaced(*ends, self.ce_points)), self.ce_tokens)


@dataclass(frozen=True, kw_only=True)
class Concept:
    """How often completions show a concept over the dial."""

    heading = "Concept"

    concept: str | None = option("Sample completions and judge whether they show this.", None)
    words: str | None = option("Words that show it, for a judge by words: dear,formal*.", None)
    judge: str | None = option("local:MODEL, or chat:NAME at --judge-url.", None)
    judge_url: str | None = option("Base URL of the API.", None)
    judge_key_env: str = option("Environment variable that holds the API's key.", "OPENAI_API_KEY")
    any_of: bool = option("One label for all samples of a prompt.", False, flag="--any-of")
    samples: int = option("Completions per prompt and dial.", 32)
    max_new_tokens: int = option("Tokens of a completion.", 100)
    concept_points: int = option("Dials of the concept's curve.", 41)
    concept_range: str | None = option("LOW:HIGH of the concept's curve (default: --range).", None)

    def __post_init__(self) -> None:
        if self.concept is None and (self.words or self.judge):
            raise TrimtabError("--words and --judge are for a --concept")
        if self.words is not None and self.judge is not None:
            raise TrimtabError("choose one of --words and --judge")

    def labeller(self, opened: Opened) -> ConceptJudge | None:
        """The judge that the options name; words where there is no model to ask."""
        from trimtab.evaluation import Chat, ChatEndpoint, LocalChat
        from trimtab.strength import ChatConceptJudge, LexiconJudge, lexicon

        if self.concept is None:
            return None
        if self.words is not None:
            return LexiconJudge(tuple(word.strip() for word in self.words.split(",")))
        if self.judge is None:
            return lexicon(self.concept)
        kind, _, name = self.judge.partition(":")
        chat: Chat
        if kind == "local" and name:
            held = open_beside(opened, name)
            chat = LocalChat(held, max_tokens=4)
        elif kind == "chat" and name and self.judge_url:
            chat = ChatEndpoint(self.judge_url, name, key_variable=self.judge_key_env, max_tokens=4)
        else:
            raise TrimtabError(
                f"--judge {self.judge}: write local:MODEL, or chat:NAME with --judge-url"
            )
        return ChatConceptJudge(chat, self.concept)

    def asked(
        self, judge: ConceptJudge | None, prompts: Sequence[Any], ends: Span, seed: int
    ) -> ConceptAsked | None:
        """What is sampled, and who says what it shows."""
        from trimtab.strength import ConceptAsked, spaced

        if judge is None:
            return None
        dials = spaced(*(_ends(self.concept_range, "--concept-range") or ends), self.concept_points)
        sampling = Sampling(max_new_tokens=self.max_new_tokens, batch_size=32, seed=seed)
        return ConceptAsked(judge, prompts, dials, self.samples, sampling, self.any_of)


@dataclass(frozen=True, kw_only=True)
class OnTask:
    """A task's metric over the dial."""

    heading = "Task"

    task: str | None = option("Accuracy of a task over the dial.", None, flag=("--task", "-t"))
    task_points: int = option("Dials at which the task is evaluated.", 9)
    limit: int | None = option("Only the first examples of it.", None)
    data: str | None = option(
        "Directory of data sets (default: the environment's TRIMTAB_DATA).", None
    )

    def asked(self, ends: Span) -> TaskAsked | None:
        """The task and its dials."""
        from trimtab.strength import TaskAsked, spaced

        if self.task is None:
            return None
        return TaskAsked(self.task, spaced(*ends, self.task_points), self.limit, self.data)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is written over the dial, to be read."""

    heading = "Curves"

    texts: int = option(
        "Prompts whose completions are shown, unsteered and at two dials.", 2, least=0
    )
    text_tokens: int = option("Tokens of such a completion.", 40, least=1)

    def asked(self) -> TextsAsked:
        """How many, and how long."""
        from trimtab.strength import TextsAsked

        return TextsAsked(self.texts, self.text_tokens)


@dataclass(frozen=True, kw_only=True)
class Also:
    """What is measured beside the next token."""

    cost: Cost = Cost()
    concept: Concept = Concept()
    task: OnTask = OnTask()
    texts: Texts = Texts()


def curve(
    *prompts: Prompts,
    opened: Opened,
    turned: Turned = Turned(),
    prompting: Prompting = Prompting(),
    traced: Traced = Traced(),
    refitted: Refitted = Refitted(),
    bounds: Bounds = Bounds(),
    also: Also = Also(),
    keep: Keep = Keep(),
    as_json: Json = False,
) -> None:
    """Follow a steering over its dial: tokens, KL and entropy, cost, a concept, a task.

    Example: `trimtab strength curve --model smollm2-135m-instruct --steer formal.safetensors --raw
    "She looked at the map and" --ce -o curves`
    """
    from trimtab import strength
    from trimtab.reports import Run

    chats = as_chats(prompting, opened)
    texts = read_prompts(prompts, prompting.file)
    steerings = read_steerings(turned)
    if not steerings:
        raise TrimtabError("name a steering: --steer FILE")
    _check(traced, refitted, also)
    output = None if keep.output is None else Path(keep.output)
    if output is not None:
        refuse_holding(output, "curve.json", keep.overwrite, {"curves", "model"})
    started = time.perf_counter()
    plain = also.cost.texts()
    source = _source(refitted, also.task.data, steerings[0])
    labeller = also.concept.labeller(opened)
    language_model = open_model(opened)
    if refitted.layers is not None:
        steerings = _at_layers(language_model, one_steering(steerings), refitted.layers, source)
    config = {
        "steerings": [
            {"label": one.label, "dial": one.setting, "sha256": one.digest} for one in steerings
        ],
        "prompts": texts,
        "chat": chats,
        "options": _options(traced, refitted, bounds, also),
        "contrast": source and {"name": source.name, "digest": source.digest},
        "plain_text": json_digest(plain) if plain else None,
        "model": language_model.described,
    }
    # A directory from before curves had one has no configuration to compare this one with.
    known = output is not None and (output / "config.json").exists()
    run = Run(output, config, keep.overwrite and known)
    every = []
    for steering in steerings:
        ends = _ends(traced.span, "--range") or strength.dial_limits(steering)
        beside = strength.Beside(
            also.cost.asked(plain, ends),
            also.concept.asked(labeller, texts, ends, refitted.seed),
            also.task.asked(ends),
            also.texts.asked(),
        )
        every.append(
            strength.follow(
                language_model,
                steering,
                texts,
                _name(steering),
                tracing=traced.tracing(ends),
                bounds=bounds,
                beside=beside,
                refits=refitted.refits(language_model, steering, source),
                chat=chats,
                force=turned.force,
            )
        )
    documents = [strength.document(each) | {"words": each.reading.lines()} for each in every]
    about: dict[str, Any] = {"model": dict(vars(language_model.identity)), "prompts": texts}
    several = {"curves": documents} if len(documents) > 1 else {}
    results = {**documents[0], **several, **about}
    results["seconds"] = round(time.perf_counter() - started, 2)
    pictures = strength.write_curves(every, {"curves": documents, **about}, results, run)
    if as_json:
        print_json({**results, "pictures": list(map(str, pictures))})
        return
    for each in every:
        _print_curves(each)
    for path in pictures:
        console.print(f"picture  {path}", style="dim")
    if output is not None:
        show_files(output, ("report.html", "curve.json", "texts.jsonl"))


def _options(*groups: Any) -> dict[str, Any]:
    """What config.json says of the options: not where data is, and no keys."""
    values = flat_values(groups)
    left_out = ("data", "judge_url", "judge_key_env")
    plain = {name: value for name, value in values.items() if name not in left_out}
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def _check(traced: Traced, refitted: Refitted, also: Also) -> None:
    """Before any work: what is too much, what does not go together, what is no range."""
    points = (traced.points, also.cost.ce_points, also.concept.concept_points)
    most = max(*points, also.task.task_points)
    if most > _MOST_POINTS:
        raise TrimtabError(f"a curve has {_MOST_POINTS} points at most, not {most}")
    _ends(traced.span, "--range")
    _ends(also.concept.concept_range, "--concept-range")
    if (refitted.resamples or refitted.layers is not None) and refitted.contrast is None:
        raise TrimtabError("--resamples and --layers fit anew: name the steering's --contrast")


def _source(refitted: Refitted, data: str | None, steering: Steering) -> Contrast | None:
    """The contrast, with the parts that the steering was fitted with."""
    from trimtab.evaluation import load_contrast

    if refitted.contrast is None:
        return None
    texts = load_contrast(refitted.contrast, data=data, seed=refitted.seed)
    return texts.with_parts(steering.contrast.get("split"))


def _at_layers(
    language_model: LanguageModel, steering: Steering, layers: int, source: Contrast | None
) -> list[Steering]:
    from trimtab.fitting import fit
    from trimtab.strength import at_layers

    assert source is not None
    methods = at_layers(steering, language_model.anatomy.layers, layers)
    return fit(methods, language_model, source, measure=False)


def _print_curves(found: Curves) -> None:
    console.print(found.name, style="bold")
    assert found.tokens is not None
    console.print(
        f"{found.tokens.passes} of {len(found.tokens.dials) * found.tokens.prompts} dials run, the "
        f"others within {found.tokens.tolerance:g} in probability",
        style="dim",
    )
    console.print(found.tokens.summary)
    for line in found.reading.lines():
        console.print(line)
    if found.accuracy is not None:
        console.print(_accuracy_line(found.accuracy))
    for prompt, some in groupby(found.samples, key=lambda sample: sample.prompt):
        console.print(last_message(prompt), style="bold")
        for sample in some:
            dial = "" if sample.dial is None else f" ({sample.dial:.4g}{found.reading.unit})"
            console.print(f"  {sample.place}{dial}", style="dim")
            write_text(f"    {sample.text.strip()}")


def _ends(text: str | None, option: str) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise TrimtabError(f"{option} {text!r}: write LOW:HIGH, as in -20:20") from error
    if not -1e30 < low < high < 1e30:
        raise TrimtabError(f"{option} {text!r}: LOW must be below HIGH")
    return low, high


def _denser(spaced: list[float]) -> list[float]:
    """The dials and some more around 0, where the cost's curvature is read."""
    step = spaced[1] - spaced[0]
    near = [side * step / 2**i for i in range(1, 5) for side in (-1, 1)]
    return sorted({*spaced, *(dial for dial in near if spaced[0] < dial < spaced[-1])})


def _plain(path: Path | None) -> list[str]:
    """Texts of a file: one plain text, or JSONL with `text`; without one our own paragraphs."""
    from trimtab.reading import plain_texts

    if path is None:
        return plain_texts()
    try:
        with path.open(encoding="utf-8-sig") as lines:
            if path.suffix != ".jsonl":
                return [lines.read()]
            return [json_object(line, str(path))["text"] + "" for line in lines if line.strip()]
    except OSError as error:
        raise TrimtabError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrimtabError(f'{path} is not text, or JSONL rows {{"text": TEXT}}') from error


def _accuracy_line(found: Accuracy) -> str:
    pairs = zip(found.figures, found.dials, strict=True)
    best, dial = max(pairs, key=lambda pair: pair[0].value)
    return (
        f"{found.task}, {found.metric}: {found.unsteered:.3g} unsteered, at best "
        f"{best.value:.3g} [{best.low:.3g}, {best.high:.3g}] at {dial:g} (n {best.n}; chosen on "
        "what it is shown on)"
    )


def _name(steering: Steering) -> str:
    sites = [intervention.site for intervention in steering.interventions]
    where = sites[0] if len(sites) == 1 else f"{len(sites)} sites"
    return f"{steering.method} at {where}"
