"""What a steering of single units does, and why these units, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.methods.effects import predicted_in_words
from trimtab.methods.words import counted, percent
from trimtab.steering import Steering, chosen


def austeer_in_words(steering: Steering, columns: Sequence[str]) -> list[str]:
    """Sentences for someone who meets AUSteer for the first time; `columns` are those that its
    tables always have."""
    units = chosen(steering, columns).get("units", [])
    if not units:
        return ["AUSteer with k = 0: no unit is changed."]
    options, dial = steering.hyperparameters, steering.dial.name
    least = options.get("choose") == "least"
    change = str(options.get("change", "scale"))
    formula = {
        "scale": "each activation x becomes (1 + gamma) x",
        "absolute": "each activation x becomes x + gamma |x|",
        "vector": f"to each {dial} times the mean difference of the two sides is added",
    }[change]
    if least:
        formula = f"each activation x becomes (1 - {dial}) x"
    what = f"single units of {options.get('site')}"
    if options.get("basis") == "svd":
        what = f"singular directions of the weights at {options.get('site')}"
        formula = "what lies along each becomes 1 + gamma times as much"
    best = "least" if least else "most"
    reason = {
        "momentum": f"They were chosen because they tell the two sides apart {best} reliably: "
        f"in the same direction on {percent([unit['score'] for unit in units])} of the pairs.",
        "difference": f"They were chosen because their mean differs {best} between the two sides.",
        "random": "They were drawn at random, for comparison.",
        **_effect_in_words(units, best),
    }[options.get("locate", "momentum")]
    lines = [
        f"AUSteer {'shrinks' if least else 'changes'} {len(units)} {what}, in "
        f"{counted(units)}: {formula}.",
        reason,
    ]
    if least:
        return lines
    up, down = (sum(sign * unit["gamma"] > 0 for unit in units) for sign in (1, -1))
    verbs = ("scaled up", "down") if change == "scale" else ("raised", "lowered")
    lines.append(f"{up} are {verbs[0]}, {down} {verbs[1]}.")
    flipped = sum(unit["gamma"] < -1 for unit in units)
    if change == "scale" and flipped and not options.get("clamp_sign", False):
        why = (
            "" if "effect" in str(options.get("locate")) else ": that is how the method is defined"
        )
        lines.append(
            f"{flipped} have a gamma below -1, which turns an activation's sign around{why}."
        )
    return lines + _choice_in_words(steering, units) + predicted_in_words(steering)


def _effect_in_words(units: Sequence[dict[str, Any]], best: str) -> dict[str, str]:
    """Why units were chosen, by the score's name."""
    found = {}
    if all("effect" in unit and "error" in unit for unit in units):
        sizes = sorted(abs(unit["effect"]) for unit in units)
        first = percent([unit.get("first", 0.0) for unit in units])
        known = (
            f"scaling one of them by 1 % moves a pair's log-odds by {sizes[0] / 100:.2g} to "
            f"{sizes[-1] / 100:.2g} nats; the first token has {first} of that."
        )
        certain = sorted(abs(unit["effect"]) / max(unit["error"], 1e-30) for unit in units)
        found["effect"] = (
            f"They were chosen because what scaling them does is {best} certain ({certain[0]:.1f} "
            f"to {certain[-1]:.1f} standard errors): {known}"
        )
        found["effect_per_nat"] = (
            f"They were chosen because scaling them does {best} for what it costs on plain text: "
            f"{known}"
        )
    return found


def _choice_in_words(steering: Steering, units: Sequence[dict[str, Any]]) -> list[str]:
    """How the units were looked at again, where they were."""
    options, known = steering.hyperparameters, steering.findings.get("chosen")
    if not isinstance(known, dict):
        return []
    strength = f"a strength of {known['dial']:.3g}"
    lines = []
    if options.get("average"):
        lines.append(f"Their effects are the mean over none, half and all of {strength}.")
    if options.get("interaction") == "blocks":
        lines.append(
            f"They were chosen {options['block']} at a time, with those before scaled at "
            f"{strength}."
        )
    if "verified_on" in known and all("real" in unit for unit in units):
        real, foreseen = (sum(unit[name] for unit in units) for name in ("real", "predicted"))
        lines.append(
            f"Each was scaled alone on {known['verified_on']} rows at {strength}: they gained "
            f"{real:+.2f} nats in sum, where their effects say {foreseen:+.2f}."
        )
    if options.get("interaction") == "fisher":
        lines.append("gamma heeds what they cost together.")
    return lines
