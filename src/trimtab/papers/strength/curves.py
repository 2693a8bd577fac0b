"""What a mean-difference steering does over its strength: next tokens, cost, a concept, a task.

The practical part of "Towards Understanding Steering Strength" (sections 4 and 5, appendix A): the
vector is the difference of mean activations at a block's output over two sets of texts, added at
every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.contrasts import Contrast
from trimtab.files import read_jsonl
from trimtab.fitting import fit
from trimtab.methods import CAA
from trimtab.model import LanguageModel
from trimtab.options import Sampling, Tracing, flat
from trimtab.papers.recipe import plain_text_file
from trimtab.papers.result import StudyResult, Value, contrast_of
from trimtab.reading import plain_texts
from trimtab.reports import Picture, Table
from trimtab.steering import Steering
from trimtab.strength import (
    Beside,
    ConceptAsked,
    CostAsked,
    Curves,
    LexiconJudge,
    Negatives,
    Refits,
    TaskAsked,
    document,
    draw,
    follow,
    generate_contrast,
    lexicon,
    resampled,
    spaced,
)

#: Words of a context: the paper's are up to 100 tokens.
_WORDS = 60


@dataclass(frozen=True, kw_only=True)
class Written:
    """Texts that the model writes about a concept, a side."""

    texts: int = 500
    text_tokens: int = 300
    negatives: Negatives = "empty"


@dataclass(frozen=True, kw_only=True)
class Traced(Tracing):
    """What is followed, after how many neutral paragraphs, with how many resampled vectors; the
    tokens are those of the paper, the highest at the end of the dial."""

    choose: Literal["gain", "end"] = "end"
    contexts: int = 4
    resamples: int = 0


@dataclass(frozen=True, kw_only=True)
class Vector:
    """The mean difference, and where it is added."""

    unit_norm: bool = False
    positions: Literal["all", "last"] = "all"


@dataclass(frozen=True, kw_only=True)
class Also:
    """What else is measured, as a recipe writes it."""

    cost: Mapping[str, Any] | None = None
    concept: Mapping[str, Any] | None = None
    task: Mapping[str, Any] | None = None


@flat
def curves(
    language_model: LanguageModel,
    contrast: Contrast | str,
    *,
    written: Written = Written(),
    depths: Sequence[float] = (0.5,),
    tracing: Traced = Traced(span=(0.0, 200.0)),
    vector: Vector = Vector(),
    also: Also = Also(),
    data: str | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> StudyResult:
    """Curves of one steering for each of `depths` (0 is the first block, 1 the last).

    `contrast` is a source, or `concept:NAME`: `texts` texts a side of `text_tokens` tokens that the
    model writes itself. `contexts` are how many neutral paragraphs the next token is read after.
    `cost` {span, points, tokens}, `concept` {name or words, span, points, samples, max_new_tokens}
    and `task` {name, span, points, limit} add their curves.
    """
    source = _contrast(language_model, contrast, written, data, seed, output)
    # Of whole texts the paper takes the mean; of a pair the answer is what counts.
    token: Any = "answer" if source.paired else "mean"
    last = language_model.anatomy.layers - 1
    layers = list(dict.fromkeys(round(depth * last) for depth in depths))
    methods = [CAA(i, 1.0, token, **asdict(vector)) for i in layers]
    prompts = _contexts(tracing.contexts)
    beside = _beside(also, data, seed)
    every = []
    for layer, method, steering in zip(
        layers, methods, fit(methods, language_model, source, measure=False), strict=True
    ):
        others: Sequence[Steering] = ()
        if tracing.resamples:
            others = resampled(language_model, method, source, tracing.resamples, seed)
        every.append(
            follow(
                language_model,
                steering,
                prompts,
                f"block {layer}",
                tracing=tracing,
                beside=beside,
                refits=Refits(others),
                chat=False,
            )
        )
    values: dict[str, Value] = {}
    for each in every:
        values |= _values(each, f"{each.name}, " if len(layers) > 1 else "")
    tables = [
        Table(
            f"{each.name.capitalize()} in words",
            ["what the curves say"],
            [[line] for line in each.reading.lines()],
        )
        for each in every
    ]
    picture = Picture(
        "Curves over the strength α",
        "curves",
        draw(every),
        "change in next-token probability, KL and entropy, and what else was measured, over α",
        f"Means over {len(prompts)} contexts.",
    )
    notes = [f"the steering was fitted on {source.name}, {len(source.train)} rows"]
    documents = {"curves": [document(each) for each in every]}
    return StudyResult(documents, values, tables, [picture], notes)


def _contexts(count: int) -> list[str]:
    return [" ".join(text.split()[:_WORDS]) for text in plain_texts()[:count]]


def _contrast(
    language_model: LanguageModel,
    contrast: Contrast | str,
    written: Written,
    data: str | None,
    seed: int,
    output: Path | None,
) -> Contrast:
    if isinstance(contrast, Contrast):
        return contrast
    kind, colon, name = contrast.partition(":")
    if not (colon and kind == "concept"):
        source: Contrast = contrast_of(contrast, data)
        return source
    file = None if output is None else output / "contrast.jsonl"
    if file is not None and file.exists():
        return Contrast.from_jsonl(file)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    return generate_contrast(
        language_model, name, count=written.texts, max_new_tokens=written.text_tokens,
        negatives=written.negatives, seed=seed, output=file,
    )  # fmt: skip


def _beside(also: Also, data: str | None, seed: int) -> Beside:
    """What else is measured, with its texts, judge and dials."""
    cost = concept = task = None
    if also.cost is not None:
        tokens = also.cost["tokens"]
        cost = CostAsked(plain_corpus(data, tokens), _dials(also.cost), tokens)
    if also.concept is not None:
        asked = also.concept
        words = asked.get("words")
        concept = ConceptAsked(
            LexiconJudge(tuple(words)) if words else lexicon(asked["name"]),
            _contexts(asked.get("prompts", 4)),
            _dials(asked),
            asked["samples"],
            Sampling(max_new_tokens=asked["max_new_tokens"], batch_size=32, seed=seed),
        )
    if also.task is not None:
        task = TaskAsked(also.task["name"], _dials(also.task), also.task.get("limit"), data)
    return Beside(cost, concept, task)


def _dials(asked: Mapping[str, Any]) -> list[float]:
    low, high = asked["span"]
    return spaced(low, high, asked["points"])


def plain_corpus(data: str | None, tokens: int) -> list[str]:
    """Our own paragraphs where they suffice; else what the user's directory has."""
    own = plain_texts()
    if tokens <= sum(len(text.split()) for text in own):
        return own
    return [row["text"] for row in read_jsonl(plain_text_file(data))]


def _values(found: Curves, prefix: str) -> dict[str, Value]:
    """The curves in a few figures that stand beside what a paper says of its own."""
    values = {}
    peaks = found.reading.peaks
    if found.tokens is not None:
        names = ", ".join(repr(token.token) for token in found.tokens.tokens)
        values["highest tokens"] = Value(names)
        values["tokens with a bump"] = Value(sum(peak.kind == "bump" for peak in peaks))
        values["tokens that rise on"] = Value(sum(peak.kind == "rises" for peak in peaks))
    if found.concept is not None:
        shares, n = found.concept.probability.tolist(), found.concept.n.tolist()
        ends = list(zip(found.concept.low.tolist(), found.concept.high.tolist(), strict=True))
        values["concept, lowest α"] = Value(shares[0], ends[0], n[0], True)
        values["concept, highest α"] = Value(shares[-1], ends[-1], n[-1], True)
    if found.cost is not None:
        delta = found.cost.delta.tolist()
        ends = list(zip(found.cost.low.tolist(), found.cost.high.tolist(), strict=True))
        values["ΔCE, lowest α"] = Value(delta[0], ends[0])
        values["ΔCE, highest α"] = Value(delta[-1], ends[-1])
        values["lowest ΔCE"] = Value(min(delta))
    if found.accuracy is not None:
        values["accuracy, unsteered"] = Value(found.accuracy.unsteered, share=True)
        values["accuracy, lowest α"] = Value(found.accuracy.figures[0].value, share=True)
        values["accuracy, highest α"] = Value(found.accuracy.figures[-1].value, share=True)
    return {prefix + name: value for name, value in values.items()}
