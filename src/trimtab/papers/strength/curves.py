"""What a mean-difference steering does over its strength: next tokens, cost, a concept, a task.

The practical part of "Towards Understanding Steering Strength" (sections 4 and 5, appendix A): the
vector is the difference of mean activations at a block's output over two sets of texts, added at
every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation import data_directory
from trimtab.files import read_jsonl
from trimtab.fitting import fit
from trimtab.methods import CAA
from trimtab.papers.result import StudyResult, Value, contrast_of
from trimtab.reports import Picture, Table
from trimtab.steering import Steering
from trimtab.strength import (
    Accuracy,
    ConceptJudge,
    Curves,
    LexiconJudge,
    Negatives,
    accuracy_curve,
    concept_curve,
    cost_curve,
    curve,
    draw,
    generate_contrast,
    lexicon,
    read,
    resampled,
    spaced,
)
from trimtab.sweeps import plain_texts

#: Words of a context: the paper's are up to 100 tokens.
_WORDS = 60
#: Plain text beside trimtab's own, in the user's directory of data sets: the first that is there.
_TEXTS = ("wikitext2/raw_test_articles.jsonl", "webtext/openwebtext_sentences.jsonl")


def curves(
    language_model: Any,
    contrast: str,
    *,
    texts: int = 500,
    text_tokens: int = 300,
    negatives: Negatives = "empty",
    depths: Sequence[float] = (0.5,),
    span: tuple[float, float] = (0.0, 200.0),
    points: int = 1025,
    tokens: int = 8,
    contexts: int = 4,
    unit_norm: bool = False,
    positions: Literal["all", "last"] = "all",
    resamples: int = 0,
    cost: Mapping[str, Any] | None = None,
    concept: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
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
    source = _contrast(language_model, contrast, texts, text_tokens, negatives, data, seed, output)
    # Of whole texts the paper takes the mean; of a pair the answer is what counts.
    token: Any = "answer" if source.paired else "mean"
    last = language_model.anatomy.layers - 1
    layers = list(dict.fromkeys(round(depth * last) for depth in depths))
    methods = [CAA(i, 1.0, token, unit_norm=unit_norm, positions=positions) for i in layers]
    prompts = [" ".join(text.split()[:_WORDS]) for text in plain_texts()[:contexts]]
    drawn, tables, documents = [], [], []
    values: dict[str, Value] = {}
    for layer, method, steering in zip(
        layers, methods, fit(methods, language_model, source), strict=True
    ):
        others = resampled(language_model, method, source, resamples, seed) if resamples else []
        followed = curve(
            language_model, steering, prompts, span=span, points=points, tokens=tokens,
            chat=False, resamples=others,
        )  # fmt: skip
        paid = None if cost is None else _cost(language_model, steering, cost, data)
        judged = None if concept is None else _concept(language_model, steering, concept, seed)
        accuracy = None if task is None else _task(language_model, steering, task, data)
        reading = read(followed, paid, judged)
        one = Curves(f"block {layer}", reading, followed, paid, judged, accuracy)
        drawn.append(one)
        lines = [[line] for line in reading.lines()]
        tables.append(Table(f"Block {layer} in words", ["what the curves say"], lines))
        values |= _values(one, f"block {layer}, " if len(layers) > 1 else "")
        documents.append(one.as_json())
    picture = Picture(
        "Curves over the strength α",
        "curves",
        draw(drawn),
        "change in next-token probability, KL and entropy, and what else was measured, over α",
        f"Means over {len(prompts)} contexts.",
    )
    notes = [f"the steering was fitted on {source.name}, {len(source.train)} rows"]
    return StudyResult({"curves": documents}, values, tables, [picture], notes)


def _contrast(
    language_model: Any,
    contrast: str,
    texts: int,
    text_tokens: int,
    negatives: Negatives,
    data: str | None,
    seed: int,
    output: Path | None,
) -> Contrast:
    kind, colon, name = contrast.partition(":")
    if not (colon and kind == "concept"):
        found: Contrast = contrast_of(contrast, data)
        return found
    file = None if output is None else output / "contrast.jsonl"
    if file is not None and file.exists():
        return Contrast.from_jsonl(file)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    return generate_contrast(
        language_model, name, count=texts, max_new_tokens=text_tokens, negatives=negatives,
        seed=seed, output=file,
    )  # fmt: skip


def _cost(language_model: Any, steering: Steering, asked: Mapping[str, Any], data: Any) -> Any:
    return cost_curve(
        language_model,
        steering,
        plain_corpus(data, asked["tokens"]),
        spaced(asked["span"], asked["points"]),
        limit_tokens=asked["tokens"],
    )


def plain_corpus(data: str | None, tokens: int) -> list[str]:
    """Our own paragraphs where they suffice; else what the user's directory has."""
    own = plain_texts()
    if tokens <= sum(len(text.split()) for text in own):
        return own
    directory = data_directory(data)
    for name in _TEXTS if directory is not None else ():
        if directory is not None and (directory / name).is_file():
            return [row["text"] for row in read_jsonl(directory / name)]
    raise TrimtabError(
        f"{tokens} tokens of plain text are more than trimtab has: name a directory with "
        f"{' or '.join(_TEXTS)} by --data"
    )


def _concept(language_model: Any, steering: Steering, asked: Mapping[str, Any], seed: int) -> Any:
    words = asked.get("words")
    judge: ConceptJudge = LexiconJudge(tuple(words)) if words else lexicon(asked["name"])
    prompts = [" ".join(text.split()[:_WORDS]) for text in plain_texts()[: asked.get("prompts", 4)]]
    return concept_curve(
        language_model,
        steering,
        prompts,
        judge,
        spaced(asked["span"], asked["points"]),
        samples=asked["samples"],
        max_new_tokens=asked["max_new_tokens"],
        chat=False,
        seed=seed,
    )


def _task(language_model: Any, steering: Steering, asked: Mapping[str, Any], data: Any) -> Accuracy:
    dials = spaced(asked["span"], asked["points"])
    limit = asked.get("limit")
    return accuracy_curve(language_model, steering, asked["name"], dials, data=data, limit=limit)


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
