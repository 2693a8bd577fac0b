"""Analyses as studies: their tables and pictures as they are, and the figures of theirs that a
paper prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.papers.found import Found, Value
from trimtab.papers.result import Analysis

_Data = Mapping[str, Any]


def found_of(analysis: Analysis) -> Found:
    """An analysis as a study's find."""
    values = _VALUES.get(analysis.name)
    return Found(
        analysis.as_json(),
        {} if values is None else values(analysis.data),
        analysis.tables,
        analysis.pictures,
        analysis.notes,
    )


def _figure(figures: _Data, metric: str) -> Value:
    """The metric among the figures of an analysis."""
    found = figures[metric]
    ends = found.get("ci95") or (found.get("low"), found.get("high"))
    interval = None if None in ends else (float(ends[0]), float(ends[1]))
    return Value(found["value"], interval, found.get("n"), share=True)


def _ablations(data: _Data) -> dict[str, Value]:
    """Table 3: each variant on the test rows."""
    metric = data["metric"]
    values = {"unsteered": _figure(data["unsteered_test"], metric)}
    return values | {one["name"]: _figure(one["test"], metric) for one in data["variants"]}


def _count(data: _Data) -> dict[str, Value]:
    """Table 12: the best strength for each number of units, on validation rows."""
    metric = data["metric"]
    values = {"0": _figure(data["unsteered"], metric)}
    for one in data["counts"]:
        found, known = _figure(one["figures"], metric), values.get(str(one["k"]))
        if known is None or float(found.value or 0) > float(known.value or 0):
            values[str(one["k"])] = found
    return values


def _suppression(data: _Data) -> dict[str, Value]:
    """Table 13: each way at its own setting, on the test rows."""
    metric = data["metric"]
    values = {"unsteered": _figure(data["unsteered_test"], metric)}
    return values | {one["name"]: _figure(one["test"], metric) for one in data["chosen"]}


def _units(data: _Data) -> dict[str, Value]:
    """Figures 2 and 6 to 8: the combinations on the test rows, and how many units do what."""
    metric = data["metric"]
    values = {
        one["name"]: _figure(one["test"], metric)
        for one in data["combinations"]
        if (one.get("test") or {}).get(metric)
    }
    return values | {name: Value(count) for name, count in data["counts"][metric].items()}


def _tokens(data: _Data) -> dict[str, Value]:
    """Figures 3 and 4: the tokens at the largest strength, and how far from there at the least."""
    values = {}
    for one in data["units"]:
        top = ", ".join(repr(token["token"]) for token in one["tokens"][-1]["top"])
        name = f"unit {one['unit']}"
        values[name] = Value(top)
        values[f"{name}, KL to the limit at the least strength"] = Value(one["kl_to_far"][0])
        values[f"{name}, KL to the limit at the largest strength"] = Value(one["kl_to_far"][-1])
    return values


def _scores(data: _Data) -> dict[str, Value]:
    """Figure 11: the highest score of each kind of site, and what chance gives."""
    values = {}
    for kind, one in data["sites"].items():
        values[f"{kind}, highest score"] = Value(max(one["layer_max"]))
        values[f"{kind}, largest by chance (95 %)"] = Value(one["chance_maximum"]["q95"])
        values[f"{kind}, units above that"] = Value(one["above_chance"])
    return values


def _overlap(data: _Data) -> dict[str, Value]:
    """Figure 12: units in common."""
    return {
        f"{one['first']} and {one['second']}": Value(
            f"{one['shared']} of {data['k']} (chance {one['chance']:.2g})"
        )
        for one in data["shared"]
    }


def _pairs(data: _Data) -> dict[str, Value]:
    """Figure 13: the mean over draws of each number of pairs."""
    metric = data["metric"]
    values = {"unsteered": _figure(data["unsteered"], metric)}
    for one in data["counts"]:
        drawn = one["values"][metric]
        values[f"{one['pairs']} pairs"] = Value(sum(drawn) / len(drawn), n=len(drawn), share=True)
    return values


def _heatmap(data: _Data) -> dict[str, Value]:
    """Figure 10: the setting that validation chose, and the unsteered model."""
    best, base = data["best"], data["unsteered"]["test"]
    values = {"unsteered": Value(base["value"], base["ci95"], base["n"], True)}
    if best is None:
        return values
    chosen = Value(best["test"], best["ci95"], best["n"], True)
    return values | {"chosen": chosen} | {name: Value(v) for name, v in best["params"].items()}


def _plane(data: _Data) -> dict[str, Value]:
    """Where the direction is taken from, and which blocks discriminate."""
    blocks = ", ".join(map(str, data["discriminative"]["blocks"]))
    return {
        "taken from": Value(str(data["plane"]["source_site"])),
        "mean cosine of the winner": Value(data["plane"]["mean_cosine"]),
        "blocks that discriminate": Value(blocks or "none"),
    }


def _norms(data: _Data) -> dict[str, Value]:
    """How much longer the stream is in the last block than in the first."""
    stream = [one["median"] for one in data["sites"] if one["kind"] == "resid"]
    if len(stream) < 2:
        return {}
    return {"median length, last block over first": Value(stream[-1] / stream[0])}


def _circle(dial: Sequence[_Data], metric: str) -> str:
    """The lowest and the highest figure over the circle, and where they are."""
    points = [
        (one["metrics"][metric]["value"], one["theta"])
        for one in dial
        if metric in one["metrics"] and one["metrics"][metric]["value"] is not None
    ]
    if len(points) < 2:
        return ""
    (low, first), (high, last) = min(points), max(points)
    return f"{low:.3g} at {first:g}° to {high:.3g} at {last:g}°"


def _turned(rows: str) -> Callable[[_Data], dict[str, Value]]:
    """A circle's methods or masks: the angle that was chosen, or where none was the best one."""

    def values(data: _Data) -> dict[str, Value]:
        found = {}
        for one in data[rows]:
            chosen, oracle = one["chosen"], one["oracle"]
            if chosen is not None:
                found[one["name"]] = Value(chosen["test"], chosen["ci95"], chosen["n"])
                found[f"{one['name']}, θ"] = Value(chosen["theta"])
            if oracle is not None:
                found[f"{one['name']}, oracle"] = Value(oracle["test"])
            circle = _circle(one["dial"], data["metric"])
            if circle:
                found[f"{one['name']}, over the circle"] = Value(circle)
        return found

    return values


#: By analysis: from its data to figures by the row of the paper's table.
_VALUES: dict[str, Callable[[_Data], dict[str, Value]]] = {
    "ablations": _ablations,
    "count": _count,
    "suppression": _suppression,
    "units": _units,
    "tokens": _tokens,
    "scores": _scores,
    "overlap": _overlap,
    "pairs": _pairs,
    "heatmap": _heatmap,
    "plane": _plane,
    "norms": _norms,
    "dial": _turned("methods"),
    "masks": _turned("masks"),
}
