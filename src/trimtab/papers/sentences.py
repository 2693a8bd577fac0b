"""What each analysis found, in one sentence, from its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from trimtab.figures import Difference, more_is_better, words_for
from trimtab.reports import change_words, number_text, value_text

Data = Mapping[str, Any]


def _units(data: Data) -> str:
    counts, metric = data["counts"][data["metric"]], data["metric"]
    return (
        f"Steered alone, {counts['beneficial']} of {len(data['units'])} units of {data['site']} "
        f"clearly raise {words_for(metric)} on {data['task']}, and {counts['harmful']} clearly "
        "lower it."
    )


def _tokens(data: Data) -> str:
    unit = data["units"][0]
    token, strength = unit["tokens"][-1]["top"][0]["token"], data["strengths"][-1]
    return (
        f"Scaled {strength:g}-fold, unit {unit['unit']} of {data['site']} makes {token!r} the most "
        f"probable next token, {number_text(unit['kl_to_far'][-1])} nats from where it goes "
        "without end."
    )


def _scores(data: Data) -> str:
    said = [
        f"{one['above_chance']} of {one['units']:,} units of {kind} score higher than chance does "
        f"in 95 % of cases ({one['chance_maximum']['q95']:.3f}), the highest "
        f"{max(one['layer_max']):.3f}"
        for kind, one in data["sites"].items()
    ]
    return f"{'; '.join(said)}."


def _overlap(data: Data) -> str:
    most = max(data["shared"], key=lambda pair: pair["shared"])
    return (
        f"Of their {data['k']} highest units of {data['site']}, {most['first']} and "
        f"{most['second']} share {most['shared']}; chance alone gives "
        f"{number_text(most['chance'])}."
    )


def _pairs(data: Data) -> str:
    fewest, every = data["counts"][0], data["counts"][-1]
    metric = data["metric"]
    few, all_of = (sum(g["values"][metric]) / len(g["values"][metric]) for g in (fewest, every))
    same = sum(fewest["overlap"]) / len(fewest["overlap"])
    return (
        f"From {fewest['pairs']} pairs {words_for(metric)} on {data['task']} is "
        f"{value_text(few, metric)}, from all {every['pairs']} {value_text(all_of, metric)}; "
        f"{same:.0%} of the units are the same."
    )


def _count(data: Data) -> str:
    metric = data["metric"]
    best = _best(metric, data["counts"], lambda one: one["figures"][metric]["value"])
    return (
        f"Of {len(data['counts'])} settings, {best['k']:,} units at alpha {best['alpha']:g} do "
        f"best on {data['task']}: {_change(best['figures'][metric]['change'], metric)}."
    )


def _suppression(data: Data) -> str:
    metric = data["metric"]
    said = []
    for one in data["chosen"]:
        change = {**one["test"][metric]["change"], "p_corrected": one["p_corrected"]}
        said.append(f"{one['name']} {_change(change, metric)}")
    return f"On the test rows of {data['task']}, {words_for(metric)} changes by: {'; '.join(said)}."


def _ablations(data: Data) -> str:
    metric, variants = data["metric"], data["variants"]
    best = _best(metric, variants, lambda one: one["test"][metric]["value"])
    return (
        f"Of {len(variants)} variants of AUSteer, {best['name']} does best on the test rows of "
        f"{data['task']}: {_change(best['against_unsteered'][metric], metric)}."
    )


def _heatmap(data: Data) -> str:
    best, robust, metric = data["best"], data["robustness"], data["metric"]
    if best is None:
        return f"None of {robust['settings']} settings can be chosen on {data['task']}."
    new, old = (
        value_text(value, metric) for value in (best["test"], data["unsteered"]["test"]["value"])
    )
    return (
        f"Of {robust['settings']} settings, k {best['params']['k']} and alpha "
        f"{best['params']['alpha']:g} do best on validation: on the test rows "
        f"{words_for(metric)} is {new}, unsteered {old}; "
        f"{robust['better_than_unsteered']} settings beat the unsteered model on validation."
    )


def _effect(data: Data) -> str:
    budget = data["kl"][(len(data["kl"]) - 1) // 2]
    rankings = {one["name"] for one in data["rankings"]}
    here = [one for one in data["chosen"] if one["kl"] == budget and one["name"] in rankings]
    best = max(here, key=lambda one: one["validation"])
    usual = next(one for one in here if one["name"] == "signed momentum")
    said = [
        f"{one['name']} {_change(one['test'], data['metric'])}, with {one['params']['k']:,} units"
        for one in ([usual] if best is usual else [best, usual])
    ]
    return (
        f"Of {len(here)} rankings of units of {data['site']} within {budget:g} nats at the next "
        f"token, {best['name']} gains most on validation; on the test rows of {data['task']}: "
        f"{'; '.join(said)}."
    )


def _plane(data: Data) -> str:
    alone, blocks = len(data["discriminative"]["sites"]), data["discriminative"]["blocks"]
    return (
        f"The plane of {data['method']} is taken from {data['plane']['source_site']}; {alone} of "
        f"{len(data['sites'])} norms see the two sides on opposite sides of zero, and "
        f"{len(blocks)} blocks do at all of their norms."
    )


def _norms(data: Data) -> str:
    kind = data["sites"][0]["kind"]
    sites = [one for one in data["sites"] if one["kind"] == kind]
    first, last = sites[0], sites[-1]
    return (
        f"The median activation is {number_text(first['median'])} long at {first['site']} and "
        f"{number_text(last['median'])} at {last['site']}; {sum(one['massive'] for one in sites)} "
        f"tokens are more than {data['massive_above']:g} times the median's length."
    )


def _circle(data: Data, what: str) -> str:
    metric = data["metric"]
    chosen = [one for one in data[what] if one["chosen"] is not None]
    if not chosen:
        return f"No angle could be chosen for {len(data[what])} {what}."
    best = _best(metric, chosen, lambda one: one["chosen"]["test"])
    found = best["chosen"]
    change = "" if found["change"] is None else f": {_change(found['change'], metric)}"
    return (
        f"{best['name']} at {found['theta']:g}° does best of {len(data[what])} {what} on "
        f"{data['task']}: on the test rows {words_for(metric)} is "
        f"{value_text(found['test'], metric)}{change}."
    )


def _best(metric: str, each: Any, value: Callable[[Any], float | None]) -> Any:
    """What has the best value by a metric; what has none comes last."""
    sign = 1 if more_is_better(metric) else -1

    def rank(one: Any) -> float:
        found = value(one)
        return -math.inf if found is None else sign * found

    return max(each, key=rank)


def _change(change: Data, metric: str) -> str:
    """A difference as it is in JSON, in words."""
    found = Difference(
        change["difference"],
        tuple(change["ci95"]),
        change["n"],
        change.get("p"),
        corrected_p=change.get("p_corrected"),
    )
    return change_words(found, metric)


#: By the names of the analyses.
SENTENCES: Mapping[str, Callable[[Data], str]] = {
    "units": _units,
    "tokens": _tokens,
    "scores": _scores,
    "overlap": _overlap,
    "pairs": _pairs,
    "count": _count,
    "suppression": _suppression,
    "ablations": _ablations,
    "heatmap": _heatmap,
    "effect": _effect,
    "plane": _plane,
    "norms": _norms,
    "dial": lambda data: _circle(data, "methods"),
    "masks": lambda data: _circle(data, "masks"),
}
