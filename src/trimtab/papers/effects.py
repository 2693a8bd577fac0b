"""Studies of what steered models write and cost: overhead, coherence over angles, tasks of the
harness, sheets for people who rate texts."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, last_message
from trimtab.errors import TrimtabError
from trimtab.evaluation import (
    coherence,
    evaluate,
    find_task,
    load_contrast,
    prompts_task,
    repetition,
)
from trimtab.figures import VIOLATION, Estimate, Result, mean_interval
from trimtab.fitting import collect, fit
from trimtab.methods import METHODS
from trimtab.model import LanguageModel, answer_of
from trimtab.papers.result import StudyResult, Value, contrast_of, value_of
from trimtab.reports import (
    Line,
    Picture,
    Table,
    curve,
    forest,
    interval,
    look_of,
    one_line_each,
    panels,
    styled,
)
from trimtab.steering import Steering
from trimtab.sweeps import metered, overhead

#: Measures of coherence that the paper averages over angles, and its words for them.
_MEASURES = {
    "repetition_4gram": "repetition",
    "language_consistency": "language",
    "compression_ratio": "compression",
}


def fitted(
    language_model: LanguageModel, methods: Sequence[Mapping[str, Any]], contrast: Contrast
) -> dict[str, Steering]:
    """Methods as a recipe writes them, {name, method, fixed}, fitted in one pass."""
    made = [METHODS[one["method"]](**one.get("fixed", {})) for one in methods]
    names = [one.get("name", one["method"]) for one in methods]
    return dict(zip(names, fit(made, language_model, contrast, measure=False), strict=True))


def cost(
    language_model: LanguageModel,
    methods: Sequence[Mapping[str, Any]],
    task: str,
    *,
    pairs: int | None = None,
    rows: int = 16,
    new_tokens: int = 16,
    rounds: int = 3,
    data: str | None = None,
) -> StudyResult:
    """Preparation and inference of methods beside the unsteered model: seconds, tokens, memory.

    Each method is fitted by itself, on the first `pairs` pairs of the task's train rows; generation
    runs in turns with the unsteered model, `rounds` times (medians).
    """
    source = load_contrast(f"task:{task}", data=data).train
    source = source.take(pairs) if pairs else source
    job = find_task(task, data)
    some = job.rows("test", "trimtab", data)[:rows]
    asked = [job.example(row, i, "trimtab").prompt for i, row in enumerate(some)]
    lines: list[list[Any]] = []
    values: dict[str, Value] = {}
    for one in methods:
        name, method = one.get("name", one["method"]), METHODS[one["method"]]
        made = method(**one.get("fixed", {}))
        with metered(language_model) as used:
            gathered = collect(language_model, source, made.wants(language_model, source))
            steering = made.build(language_model, source, gathered)
        beside = overhead(language_model, steering, asked, new_tokens, rounds)
        values |= {
            f"{name}, preparation": Value(f"{used.seconds:.1f} s, {_memory(used.peak_bytes)}"),
            f"{name}, inference": Value(
                f"{beside.ratio:.3f} × unsteered, {_memory(beside.peak_bytes)}"
            ),
        }
        lines.append(
            [
                name,
                f"{used.seconds:.2f}",
                f"{used.tokens:,}",
                _memory(used.peak_bytes),
                f"{1000 * beside.unsteered:.2f}",
                f"{1000 * beside.steered:.2f}",
                f"{beside.ratio:.3f}",
                _memory(beside.peak_bytes),
            ]
        )
    heads = [
        "method",
        "preparation, s",
        "tokens read",
        "memory, preparation",
        "unsteered, ms per token",
        "steered, ms per token",
        "ratio",
        "memory, steering",
    ]
    table = Table(
        f"Cost on {task}: {len(source)} pairs, {len(asked)} prompts of {new_tokens} new tokens",
        heads,
        lines,
        f"Memory is above what was in use before; medians of {rounds} rounds in turns.",
    )
    document = {"rows": [dict(zip(heads, line, strict=True)) for line in lines]}
    return StudyResult(document, values, [table])


def _memory(peak: int | None) -> str:
    return "" if peak is None else f"{peak / 1e9:.3f} GB"


def incoherence(
    language_model: LanguageModel,
    methods: Sequence[Mapping[str, Any]],
    contrast: Contrast | str,
    *,
    angles: Sequence[float],
    prompts: str | None = None,
    rows: int = 16,
    max_new_tokens: int = 64,
    data: str | None = None,
) -> StudyResult:
    """Coherence of what rotations write, angle by angle: own perplexity, repetition, language,
    compression. `prompts` is a file; without one the prompts of the contrast are continued."""
    source = contrast_of(contrast, data)
    asked, chat = _asked(source, prompts, rows, data)
    turned: dict[str, list[tuple[float | None, Steering | None]]] = {"unsteered": [(None, None)]}
    for name, steering in fitted(language_model, methods, source).items():
        turned[name] = [(float(angle), replace(steering, value=float(angle))) for angle in angles]
    curves: dict[str, list[dict[str, Estimate]]] = {}
    lines: list[list[Any]] = []
    values: dict[str, Value] = {}
    document = []
    for name, each in turned.items():
        written = [_written(language_model, one, asked, chat, max_new_tokens) for _, one in each]
        curves[name] = [{key: _mean(row) for key, row in one.items()} for one in written]
        for (angle, _), means in zip(each, curves[name], strict=True):
            plain = {key: asdict(found) for key, found in means.items()}
            document.append({"method": name, "angle": angle, **plain})
        over = _over_angles(written)
        violated = sum(one["self_perplexity"].value > VIOLATION for one in curves[name])
        values |= {f"{name}, {word}": value for word, value in over.items()}
        values[f"{name}, violations"] = Value(violated)
        shown = [value.shown("") for value in over.values()]
        lines.append([name, f"{violated} of {len(each)}", *shown])
    table = Table(
        f"Coherence over {len(angles)} angles, {len(asked)} prompts each",
        ["method", f"self-perplexity above {VIOLATION:g}", "4-gram repetition",
         "language consistency", "compression ratio"],
        lines,
        "Means over the angles, with 95 % intervals over the prompts.",
    )  # fmt: skip
    return StudyResult({"angles": document}, values, [table], [_coherence_picture(angles, curves)])


def _asked(
    contrast: Contrast, prompts: str | None, rows: int, data: str | None
) -> tuple[list[Any], bool | None]:
    """Prompts of the user's file as chat; else those of the contrast, as they are."""
    if prompts is not None:
        task = prompts_task("coherence", prompts, data)
        some = task.rows("test", "trimtab", data)[:rows]
        return [task.example(row, i, "trimtab").prompt for i, row in enumerate(some)], None
    own = [pair.prompt for pair in contrast.pairs] or [row.text for row in contrast.texts]
    return list(dict.fromkeys(own))[:rows], False


def _written(
    language_model: LanguageModel,
    steering: Steering | None,
    asked: Sequence[Any],
    chat: bool | None,
    max_new_tokens: int,
) -> dict[str, Tensor]:
    """Each measure of what the model writes, [prompts]; NaN where nothing was written."""
    written = language_model.generate(
        asked, steering=steering, max_new_tokens=max_new_tokens, chat=chat
    )
    found = coherence(
        language_model,
        [one.prompt for one in written],
        [answer_of(language_model, one).text for one in written],
        [one.tokens for one in written],
        steering,
    )
    return {
        key: torch.tensor([nan if row[key] is None else row[key] for row in found]).double()
        for key in ("self_perplexity", "perplexity", *_MEASURES)
    }


def _over_angles(written: Sequence[Mapping[str, Tensor]]) -> dict[str, Value]:
    """The measures' means over all angles, by the paper's words, with intervals over prompts."""
    values = {}
    for key, word in _MEASURES.items():
        mean = _mean(torch.stack([one[key] for one in written]).nanmean(0))  # [angles, prompts]
        values[word] = value_of(mean, share=False)
    return values


def _mean(values: Tensor) -> Estimate:
    """Over what is there."""
    given = values[~values.isnan()]
    if not len(given):
        raise TrimtabError("every text that was written is empty: nothing can be measured")
    return mean_interval(given)


@styled
def _coherence_picture(
    angles: Sequence[float], curves: Mapping[str, Sequence[Mapping[str, Estimate]]]
) -> Picture:
    figure, (left, right) = panels((9, 3.4), 1, 2)
    turned = {name: rows for name, rows in curves.items() if name != "unsteered"}
    for axes, key in ((left, "self_perplexity"), (right, "repetition_4gram")):
        values = {
            name: dict(zip(angles, (row[key] for row in rows), strict=True))
            for name, rows in turned.items()
        }
        curve(axes, one_line_each(values), curves["unsteered"][0][key], xlabel="θ (degrees)")
    left.axhline(VIOLATION, color="black", linestyle=":", linewidth=1, label="violation")
    left.set_ylim(bottom=1)
    right.set_ylim(bottom=-0.01, top=max(0.1, right.get_ylim()[1]))
    left.set(ylabel="self-perplexity", title="How sure it is of its text")
    right.set(ylabel="4-gram repetition", title="How much it repeats")
    left.legend(frameon=False, fontsize=8)
    return Picture(
        "Coherence over the dial",
        "coherence",
        figure,
        "self-perplexity and 4-gram repetition over the angle, one line for each method, with "
        "95 % intervals",
    )


def harness(
    language_model: LanguageModel,
    methods: Sequence[Mapping[str, Any]],
    contrast: Contrast | str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    data: str | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> StudyResult:
    """Tasks, unsteered and with each method, all fitted on one contrast."""
    steerings = fitted(language_model, methods, contrast_of(contrast, data))
    done = evaluate(
        language_model, tasks, steering=steerings, data=data, limit=limit, seed=seed, output=output
    )
    names = [task.removeprefix("lm-eval:") for task in tasks]
    results: dict[str, list[Result]] = {}
    for label in (None, *steerings):
        for task in tasks:
            first = next(r for r in done.results if r.task == task)
            result = done.value(task, first.metric, label)
            results.setdefault(label or "unsteered", []).append(result)
    values = {
        f"{name}, {label}": value_of(each[i])
        for i, name in enumerate(names)
        for label, each in results.items()
    }
    picture = _tasks_picture(names, results)
    return StudyResult(done.as_json(), values, done.tables(), [picture], done.notes)


@styled
def _tasks_picture(names: Sequence[str], results: Mapping[str, Sequence[Result]]) -> Picture:
    figure, (axes,) = panels((6.5, 1.4 + 0.55 * len(names)))
    lines = []
    for i, (label, each) in enumerate(results.items()):
        known = {place: result.estimate for place, result in enumerate(each)}
        drawn = {place: estimate for place, estimate in known.items() if estimate is not None}
        look = look_of(i - 1) if i else ("black", "o")
        lines.append(Line(label, list(drawn), list(drawn.values()), *look))
    labels: dict[str, Any] = {"xlabel": "the task's metric, 95 % intervals", "xlim": (-0.02, 1.02)}
    forest(axes, names, lines, apart=0.18, title="What the steering costs elsewhere", **labels)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return Picture(
        "Tasks, unsteered and steered",
        "tasks",
        figure,
        "the metric of each task, unsteered and with each method, with 95 % intervals",
    )


def sheet(
    language_model: LanguageModel,
    methods: Sequence[Mapping[str, Any]],
    task: str,
    *,
    rows: int = 50,
    pairs: int | None = None,
    max_new_tokens: int = 100,
    data: str | None = None,
    seed: int = 0,
) -> StudyResult:
    """Answers of the unsteered model and of each method in a shuffled order, for people who rate
    quality and alignment; beside it what can be counted."""
    started = time.perf_counter()
    source = load_contrast(f"task:{task}", data=data).train
    steerings: dict[str, Any] = {
        "unsteered": None,
        **fitted(language_model, methods, source.take(pairs) if pairs else source),
    }
    job = find_task(task, data)
    some = job.rows("test", "trimtab", data)[:rows]
    if not some:
        raise TrimtabError(f"{task} has no test rows")
    asked = [job.example(row, i, "trimtab").prompt for i, row in enumerate(some)]
    order = random.Random(seed)
    texts: dict[str, list[str]] = {}
    lines, values = [], {}
    for name, steering in steerings.items():
        written = language_model.generate(asked, steering=steering, max_new_tokens=max_new_tokens)
        texts[name] = [one.text for one in written]
        repeated = mean_interval(torch.tensor([repetition(text) for text in texts[name]]).double())
        length = statistics.mean([len(one.tokens) for one in written])
        values[f"{name}, repetition"] = value_of(repeated, share=False)
        ends = interval(repeated.ci95)
        lines.append([name, f"{length:.1f}", f"{repeated.value:.3f} {ends}", len(asked)])
    blind, key = [], []
    for i, prompt in enumerate(asked):
        names = list(texts)
        order.shuffle(names)
        key.append(names)
        blind += [[i + 1, "ABCDEFGH"[j], last_message(prompt)[:300], texts[name][i]]
                  for j, name in enumerate(names)]  # fmt: skip
    tables = [
        Table("What can be counted", ["method", "tokens", "4-gram repetition", "n"], lines),
        Table("Texts to rate, 1 to 5, without their names", ["row", "text", "prompt", "answer"],
              blind[:60], "All of them, and which is whose (key), are in results.json."),
    ]  # fmt: skip
    document = {"sheet": blind, "key": key, "seconds": round(time.perf_counter() - started, 2)}
    return StudyResult(document, values, tables)
