"""What is in a steering: as plain data for programs, and in words for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trimtab.anatomy import parse_site
from trimtab.errors import TrimtabError
from trimtab.operators import Add
from trimtab.steering import Steering


def describe(steering: Steering) -> dict[str, Any]:
    """A steering as plain data: method, dial, interventions, model, and the units of a unit method.

    `units` are in rank order, with gamma at the dial where it stands.
    """
    described: dict[str, Any] = {
        "method": steering.method,
        "hyperparameters": steering.hyperparameters,
        "dial": {
            "name": steering.dial.name,
            "unit": steering.dial.unit,
            "default": steering.dial.default,
            "range": list(steering.dial.range),
            "value": steering.setting,
        },
        "interventions": [
            {
                "site": intervention.site,
                "operator": type(intervention.operator).__name__,
                "size": intervention.operator.size,
                "positions": intervention.positions,
            }
            for intervention in steering.interventions
        ],
        "model": dict(vars(steering.model)),
        "contrast": steering.contrast,
        "versions": steering.versions,
        "date": steering.date,
    }
    if "gain" in steering.tables:
        described["units"] = _units(steering)
    return described


def _units(steering: Steering) -> list[dict[str, Any]]:
    kind, tables = steering.hyperparameters.get("site"), steering.tables
    names = ("layer", "unit", "score", "r_pos", "r_neg", "gain")
    shapes = {tuple(tables[name].shape) for name in names if name in tables}
    if kind is None or not tables.keys() >= set(names) or {len(shape) for shape in shapes} != {1}:
        raise TrimtabError(f"the {steering.method} steering does not say which units it has")
    if len(shapes) > 1:
        raise TrimtabError(f"the tables of the {steering.method} steering have several lengths")
    columns = [tables[name].tolist() for name in names]
    return [
        {
            "site": f"layers.{layer}.{kind}",
            "layer": layer,
            "unit": unit,
            "score": score,
            "r_pos": r_pos,
            "r_neg": r_neg,
            "gamma": steering.setting * gain,
        }
        for layer, unit, score, r_pos, r_neg, gain in zip(*columns, strict=True)
    ]


def explain(steering: Steering) -> list[str]:
    """What the steering does, in sentences for someone who meets the method for the first time."""
    model, dial = steering.model, steering.dial
    lines = _EXPLANATIONS.get(steering.method, _explain_any)(steering)
    low, high = dial.range
    contrast = steering.contrast
    lines += [
        f"Dial {dial.name}: {steering.setting:g}{dial.unit} now, {dial.default:g} as fitted, "
        f"sensible from {low:g} to {high:g}.",
        f"Made for {model} from {contrast.get('rows', '?')} rows of "
        f"{contrast.get('name', 'an unnamed contrast')} on {steering.date[:10]}.",
    ]
    return lines


def _explain_austeer(steering: Steering) -> list[str]:
    units = _units(steering)
    if not units:
        return ["AUSteer with k = 0: no unit is changed."]
    layers = Counter(unit["layer"] for unit in units)
    up, down = (sum(sign * unit["gamma"] > 0 for unit in units) for sign in (1, -1))
    scores = [unit["score"] for unit in units]
    where = ", ".join(f"{layer} ({count})" for layer, count in sorted(layers.items()))
    clamp = steering.hyperparameters.get("clamp_sign", False)
    flips = any(unit["gamma"] < -1 for unit in units) and not clamp
    lines = [
        f"AUSteer scales {len(units)} single units of {steering.hyperparameters['site']}, "
        f"in layers {where}: each activation x becomes (1 + gamma) x.",
        f"They were chosen because on {min(scores):.0%} to {max(scores):.0%} of the pairs the "
        f"positive text's activation lies on the same side of the negative's. {up} are "
        f"scaled up, {down} down.",
    ]
    if flips:
        lines.append(
            "A gamma below -1 turns an activation's sign around: that is how the method is defined."
        )
    return lines


def _explain_caa(steering: Steering) -> list[str]:
    lines = []
    for intervention in steering.interventions:
        if isinstance(intervention.operator, Add):
            layer, _ = parse_site(intervention.site)
            length = float(intervention.operator.vector.norm())
            lines.append(
                f"CAA adds one vector (length {length:.2f} at {steering.dial.name} 1) to the "
                f"residual stream after block {layer}, at {intervention.positions} positions. It "
                "is the mean activation of the positive texts minus that of the negative ones."
            )
    return lines


def _explain_any(steering: Steering) -> list[str]:
    return [
        f"{steering.method}: {type(intervention.operator).__name__} on "
        f"{intervention.operator.size} units of {intervention.site}."
        for intervention in steering.interventions
    ]


_EXPLANATIONS = {"austeer": _explain_austeer, "caa": _explain_caa}
