"""What curves leave in the directory of a run: a page with what they say, their picture, peaks and
what is written on the way; the picture, the numbers, the texts that were judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from trimtab.contrasts import last_message
from trimtab.files import write_whole
from trimtab.reports import Picture, Run, Table, model_line, render_page, save_figure
from trimtab.strength.pictures import Curves, draw
from trimtab.strength.samples import Sample


def write_curves(
    found: Sequence[Curves], document: dict[str, Any], results: dict[str, Any], run: Run
) -> list[Path]:
    """report.html, results.json, curve.png and .svg, curve.json (the `document`),
    records/dials.jsonl, and texts.jsonl where texts were judged, in the directory of a run; the
    pictures' paths."""
    if run.path is None:
        return []
    figure = draw(found)
    run.begin()
    run.keep("dials", [row for one in found for row in _dial_rows(one)])
    pictures = save_figure(figure, run.path, "curve")
    judged = [dict(text) for one in found if one.concept is not None for text in one.concept.texts]
    texts = run.path / "texts.jsonl"
    texts.unlink(missing_ok=True)  # those of a run that is replaced
    if judged:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged)
        write_whole(texts, lines.encode(), overwrite=True)
    numbers = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(run.path / "curve.json", numbers.encode(), overwrite=True)

    def page(environment: dict[str, Any]) -> str:
        model, names = run.config["model"], ", ".join(one.name for one in found)
        tables = [table for table in (_peaks(found), _samples(found)) if table.rows]
        return render_page(
            f"Curves of {names}",
            f"{model['name']}; {model_line(model)}; {results['seconds']:g} seconds",
            [_said(found), _picture(figure, found), *tables],
            run.config,
            environment,
        )

    run.finish(results, page)
    return pictures


def _dial_rows(found: Curves) -> list[dict[str, Any]]:
    """A record of each dial: whether the model ran there, KL, entropy, and the probabilities of
    the tokens in their order."""
    curve = found.tokens
    assert curve is not None
    rows = zip(curve.dials, curve.measured, curve.kl, curve.entropy, strict=True)
    p = torch.stack([token.delta_p + token.base_p for token in curve.tokens], 1)
    return [
        {
            "task": "next token",
            "id": f"{float(dial):.12g}",
            "steering": found.name,
            "dial": float(dial),
            "measured": bool(measured),
            "kl": float(kl),
            "entropy": float(entropy),
            "p": p[place].tolist(),
        }
        for place, (dial, measured, kl, entropy) in enumerate(rows)
    ]


def _samples(found: Sequence[Curves]) -> Table:
    """Completions of each prompt, unsteered first."""
    rows = [
        [one.name, *_place(one, sample), last_message(sample.prompt), sample.text]
        for one in found
        for sample in one.samples
    ]
    heads = ["steering", "dial", "which is", "prompt", "what is written"]
    note = "Greedy: the most probable token each time."
    return _by_steering(found, Table("What is written over the dial", heads, rows, note))


def _place(one: Curves, sample: Sample) -> tuple[str, str]:
    dial = "" if sample.dial is None else f"{sample.dial:.4g}{one.reading.unit}"
    return dial, sample.place


def _said(found: Sequence[Curves]) -> Table:
    rows = [[one.name, line] for one in found for line in one.reading.lines()]
    return _by_steering(found, Table("What the curves say", ["steering", "in words"], rows))


def _by_steering(found: Sequence[Curves], table: Table) -> Table:
    """The table, without its first column where there is one steering only."""
    if len(found) > 1:
        return table
    return replace(table, heads=table.heads[1:], rows=[row[1:] for row in table.rows])


def _peaks(found: Sequence[Curves]) -> Table:
    courses = {"bump": "rises and falls", "rises": "rises on", "falls": "falls", "flat": "stays"}
    rows = []
    for one in found:
        tokens, unit = () if one.tokens is None else one.tokens.tokens, one.reading.unit
        for token, peak in zip(tokens, one.reading.peaks, strict=True):
            cells = (f"{token.base_p:.4f}", courses[peak.kind], f"{peak.dial:.4g}{unit}")
            ends = f"[{peak.low:.4g}, {peak.high:.4g}]"
            change = f"{peak.delta_p:+.4f}"
            rows.append([one.name, repr(token.token), *cells, change, ends, peak.interval])
    heads = ["steering", "token", "unsteered", "course", "highest at", "change there"]
    heads += ["interval", "which is"]
    return _by_steering(found, Table("Where tokens are most probable", heads, rows))


def _picture(figure: Figure, found: Sequence[Curves]) -> Picture:
    notes = ["A triangle is a token's peak, the green band the sweet spot."]
    if any(t.runs is not None for one in found if one.tokens for t in one.tokens.tokens):
        notes.append("Bands around tokens are one standard deviation over the fits on resamples.")
    if any(one.cost is not None for one in found):
        notes.append("Bands around cross-entropy are 95 % bootstrap intervals over blocks of text.")
    alt = "change in next-token probability, KL and entropy, and what else was measured, by dial"
    return Picture("Curves over the dial", "curve", figure, alt, " ".join(notes))
