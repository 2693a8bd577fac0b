"""What is in a steering: as plain data for programs, and in words for people.

A file of a method that is not known here is described by its operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from trimtab.anatomy import parse_site
from trimtab.errors import TrimtabError
from trimtab.fitting import Method
from trimtab.methods.effects import predicted_at, predicted_at_strengths
from trimtab.methods.known import METHODS
from trimtab.methods.words import adds_vectors
from trimtab.steering import (
    STRENGTHS,
    Gate,
    Scope,
    Steering,
    chosen,
    operators_in_words,
    steered_blocks,
)

_PLACES = {
    "all": "every token",
    "prompt": "the prompt's tokens only",
    "generated": "generated tokens only",
    "last": "the prompt's last token and the generated ones",
}

#: What the method of a steering is called that was read from another tool's file.
_IMPORTED = "imported"
_KINDS = {"all": "", "text": ", where it is text", "image": ", where it stands for an image"}


def describe(steering: Steering) -> dict[str, Any]:
    """A steering as plain data: method, dial, interventions, model, findings.

    Methods that choose units, heads or features list them in rank order (gamma at the dial where
    it stands); rotations have their plane and the layers that they steer. Of units by effect,
    `predicted` has the gain in nats per pair and the KL in nats per token of plain text that were
    predicted for the dial where it stands, with their standard errors where these are known, and
    for each named strength beside the KL that was measured there.
    """
    method = _method(steering)
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
                **_placed(intervention.scope),
                "scope": str(intervention.scope),
                **intervention.details,
            }
            for intervention in steering.interventions
        ],
        "scope": _common_scope(steering),
        "gate": None if steering.gate is None else steering.gate.as_json(),
        "model": dict(vars(steering.model)),
        "contrast": steering.contrast,
        "findings": steering.findings,
        "calibration": None if steering.calibration is None else asdict(steering.calibration),
        "versions": steering.versions,
        "date": steering.date,
    }
    foreseen = predicted_at(steering, steering.setting)
    if foreseen is not None:
        strengths = predicted_at_strengths(steering)
        described["predicted"] = {**foreseen, "dial": steering.setting, "strengths": strengths}
    described |= chosen(steering, () if method is None else method.columns)
    planes = [intervention.operator.plane for intervention in steering.interventions]
    plane = next((plane for plane in planes if plane is not None), None)
    if plane is not None:
        basis = plane.double()
        described["plane"] = {
            "source_site": steering.findings.get("source_site"),
            "basis_norms": basis.norm(dim=-1).tolist(),
            "basis_dot": float(basis[0] @ basis[1]),
        }
        described["layers"] = steered_blocks(steering)
    return described


def gate_in_words(gate: Gate) -> list[str]:
    """How well a gate tells its texts apart, where that was measured."""
    lines = []
    test = gate.findings.get("test")
    if test:
        fired = " and ".join(
            f"{_share(test[side])} of {test[side]['n']} {side} texts"
            for side in ("positive", "negative")
        )
        lines.append(f"On its test texts it fires at {fired} (F1 {test['f1']:.2f}).")
    for name, found in gate.findings.get("unrelated", {}).items():
        tokens = ""
        if "tokens_fired" in found:
            tokens = f", at {100 * found['tokens_fired']:.1f} % of their tokens"
        lines.append(f"Of {found['n']} texts of {name} it fires at {_share(found)}{tokens}.")
    return lines


def _share(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{100 * found['fired']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _common_scope(steering: Steering) -> str | None:
    """The scope of all interventions; None where they have several."""
    scopes = steering.scopes
    return str(scopes[0]) if len(scopes) == 1 else None


def _placed(scope: Scope) -> dict[str, str]:
    """The place and the kind of tokens of a scope, where two words say it."""
    if scope.as_placed is None:
        return {}
    positions, tokens = scope.as_placed
    return {"positions": positions, **({} if tokens == "all" else {"tokens": tokens})}


def _tokens_in_words(scope: Scope) -> str:
    if scope.as_placed is None:
        return f"the tokens of the scope '{scope}'"
    positions, tokens = scope.as_placed
    return f"{_PLACES[positions]}{_KINDS[tokens]}"


def explain(steering: Steering) -> list[str]:
    """What the steering does, in sentences for someone who meets the method for the first time."""
    model, dial = steering.model, steering.dial
    lines = _what_it_does(steering)
    lines += [f"It acts on {_tokens_in_words(scope)}." for scope in steering.scopes]
    if steering.gate is not None:
        lines += [
            f"It acts where its gate fires, a {steering.gate}.",
            *gate_in_words(steering.gate),
        ]
    now, fitted, low, high = (
        f"{value:g}{dial.unit}" for value in (steering.setting, dial.default, *dial.range)
    )
    as_it_was = "in its file" if steering.method == _IMPORTED else "as fitted"
    lines += [
        f"Dial {dial.name}: {now} now, {fitted} {as_it_was}, sensible from {low} to {high}.",
        f"Made for {model} from {_origin(steering)} on {steering.date[:10]}.",
    ]
    measured = _what_was_measured(steering)
    lines += measured
    if steering.calibration is not None and not measured:
        budgets = ", ".join(f"{kl:g}" for kl in steering.calibration.kl)
        lines.append(
            f"Calibrated on {steering.calibration.prompts} prompts for budgets of {budgets} nats: "
            "FILE@kl=NATS turns the dial to one of them, or to one between."
        )
    return lines


def _origin(steering: Steering) -> str:
    """What it was made from: a contrast, or another tool's file."""
    about, contrast = steering.hyperparameters, steering.contrast
    if steering.method == _IMPORTED:
        digest = str(about.get("sha256"))[:12]
        return f"{about.get('file')} ({about.get('format')}, SHA-256 {digest})"
    return f"{contrast.get('rows', '?')} rows of {contrast.get('name', 'an unnamed contrast')}"


def _what_was_measured(steering: Steering) -> list[str]:
    """What its dial does on the model and the contrast that it was made from."""
    measured, known = steering.findings.get("measured"), steering.calibration
    if not (isinstance(measured, dict) and known is not None):
        return []
    unit, lines = steering.dial.unit, []
    strengths, end = known.strengths, steering.dial.range[1]
    reached = [
        f"{name} {dial:.3g}{unit}{' (beyond the range)' if dial > end else ''}"
        for name, dial in strengths.items()
    ]
    if reached:
        lines.append(
            f"Strengths, by how far half of {known.prompts} prompts' next tokens move: "
            f"{', '.join(reached)}. FILE@{next(iter(strengths))} and so on turn the dial there, "
            "FILE@kl=NATS to what 95 % of them allow."
        )
    else:
        lines.append(
            f"It hardly moves the next token: {STRENGTHS['gentle']:g} nats are not reached."
        )
    if isinstance(measured.get("cost"), float):
        breaks = "; the range ends where text breaks" if measured.get("breaks") else ""
        lines.append(
            f"At {steering.dial.default:g}{unit} plain text costs {measured['cost']:+.2f} nats per "
            f"token{breaks}."
        )
    return lines


def _what_it_does(steering: Steering) -> list[str]:
    """The method's own words where it is known here, else what its operators are."""
    if steering.method == _IMPORTED and _adds_to_stream(steering):
        return adds_vectors("It", steering, "as its file has it")
    method = _method(steering)
    if method is not None:
        try:
            return method.explain(steering)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            pass  # a file may carry a method's name without what that method knows
    return operators_in_words(steering)


def _adds_to_stream(steering: Steering) -> bool:
    """Whether all that it does is to add vectors to what blocks put out."""
    return all(
        each.operator.added is not None and parse_site(each.site)[1] == "resid"
        for each in steering.interventions
    )


def _method(steering: Steering) -> type[Method] | None:
    """The steering's method, where it is known here and its package can be loaded."""
    with suppress(TrimtabError):  # which was said when the package was read
        return METHODS.get(steering.method)
    return None
