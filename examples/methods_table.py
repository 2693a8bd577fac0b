"""What every method does on one contrast, as the table in docs/methods.md.

All methods are fitted in one pass over the train part, each in several settings. The setting and
the dial are chosen on the validation part: the largest gain among those that cost plain text at
most a tenth of a nat per token. Then gain and cost are measured on the test part, at that dial and
at the opposite one.

    python examples/methods_table.py --model smollm2-135m-instruct --contrast builtin:formality
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, run

import trimtab as tt
from trimtab.figures.intervals import Estimate, mean_interval
from trimtab.fitting.method import Method
from trimtab.reading import plain_texts
from trimtab.sweeps.effect import Effect, Trial

COST_LIMIT = 0.1
VALIDATION_TEXTS = 6
ANGLES = tuple(float(angle) for angle in range(0, 360, 30))


def candidates(layers: int, sae: str | None) -> dict[str, tuple[list[Method], tuple[float, ...]]]:
    """Of each method: the settings and the dials to choose from."""
    depths = [int(depth * layers) for depth in (0.25, 0.4, 0.55)]
    small = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)
    table: dict[str, tuple[list[Method], tuple[float, ...]]] = {
        "ActAdd": ([tt.ActAdd(layer=layer) for layer in depths], small),
        "CAA": ([tt.CAA(layer=n, token=t) for n in depths for t in ("mean", "answer")], small),
        "CAA, PCA": ([tt.CAA(layer=n, token="mean", variant="pca") for n in depths], small),
        "ITI": ([tt.ITI(k=k) for k in (16, 48)], (-10.0, -5.0, -2.0, -1.0, 1.0, 2.0, 5.0, 10.0)),
        "SADI, heads": ([tt.SADI(k=k) for k in (2, 8)], (-1.0, -0.5, 0.5, 1.0, 2.0)),
        "SADI, neurons": ([tt.SADI(variant="neuron", k=50)], (-1.0, -0.5, 0.5, 1.0, 2.0, 4.0)),
        "Ablation": (
            [tt.Ablation(), tt.Ablation(where="layer", layer=depths[1])],
            (0.25, 0.5, 1.0),
        ),
        "SAS": ([tt.SAS()], ANGLES),
        "AAS": ([tt.AAS()], ANGLES),
        "SS": ([tt.SS(), tt.SS(whole_blocks=False)], ANGLES[1:]),
        "AUSteer": (
            [tt.AUSteer(site="heads", k=k, direction="signed") for k in (32, 96)],
            (-2.0, -1.5, -1.0, 1.0, 1.5, 2.0, 3.0),
        ),
    }
    if sae is not None:
        table["STA"] = ([tt.STA(sae=sae, p=p) for p in (0.05, 0.35)], small)
    return table


def opposite(steering: tt.Steering) -> tt.Steering:
    """The dial that should undo it: the other sign, or the other side of the plane."""
    if steering.method in ("sas", "aas"):
        return steering.at((steering.setting + 180) % 360)
    return steering.at(-steering.setting)


def choose(effect: Effect, steerings: list[tt.Steering], dials: tuple[float, ...]) -> Trial:
    """The trial that gains most (ablation: loses most) within the cost limit, else the cheapest."""
    trials = [
        trial for steering in steerings for trial in effect.trials(steering, dials, COST_LIMIT)
    ]
    sign = -1 if steerings[0].method == "ablation" else 1
    allowed: dict[float, Trial] = {
        sign * trial.gain: trial for trial in trials if trial.gain is not None
    }
    return allowed[max(allowed)] if allowed else min(trials, key=lambda trial: trial.cost)


def measure(effect: Effect, name: str, trial: Trial) -> dict[str, Any]:
    """One row: gain, cost, and gain at the opposite dial."""
    steering = trial.steering
    other = opposite(steering)
    return {
        "name": name,
        "hyperparameters": steering.hyperparameters,
        "dial": steering.setting,
        "unit": steering.dial.unit,
        "sites": len(steering.interventions),
        "validation": {"gain": trial.gain, "cost": trial.cost},
        "gain": vars(mean_interval(effect.gains(steering))),
        "cost": vars(mean_interval(effect.costs(steering))),
        "opposite_dial": other.setting,
        "opposite_gain": vars(mean_interval(effect.gains(other))),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for the docs."""

    def cell(estimate: dict[str, Any], digits: int = 2) -> str:
        value, low, high = (f"{estimate[name]:+.{digits}f}" for name in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    lines = [
        "| method | setting | dial | gain | cost | gain at the opposite dial |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = ("layer", "token", "k", "variant", "p", "where", "whole_blocks")
        options = row["hyperparameters"]
        named = {key: options[key] for key in shown if options.get(key) is not None}
        setting = ", ".join(f"{key} {value}" for key, value in named.items())
        lines.append(
            f"| {row['name']} | {setting} | {row['dial']:g}{row['unit']} | {cell(row['gain'])} | "
            f"{cell(row['cost'], 3)} | {cell(row['opposite_gain'])} |"
        )
    return "\n".join(lines)


def main(
    model: Annotated[str, Parameter(help="A pack, a directory or a hub id.")] = (
        "smollm2-135m-instruct"
    ),
    contrast: Annotated[str, Parameter(help="A paired one with all parts.")] = (
        "builtin:formality"
    ),
    sae: Annotated[str | None, Parameter(help="An autoencoder, for STA.")] = None,
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="JSON file for the numbers.")
    ] = None,
) -> None:
    """Fit, choose, measure, and print the table."""
    started = time.perf_counter()
    lm, texts = tt.load(model), tt.load_contrast(contrast)
    plain = plain_texts()
    table = candidates(lm.anatomy.layers, sae)
    methods = [method for settings, _ in table.values() for method in settings]
    fitted = iter(tt.fit(methods, lm, texts))
    validation = Effect(lm, texts.part("validation"), plain[:VALIDATION_TEXTS])
    test = Effect(lm, texts.part("test"), plain[VALIDATION_TEXTS:])
    rows = []
    for name, (settings, dials) in table.items():
        trial = choose(validation, [next(fitted) for _ in settings], dials)
        rows.append(measure(test, name, trial))
        print(f"{name}: {Estimate(**rows[-1]['gain'])}", file=sys.stderr)
    numbers = {
        "model": vars(lm.identity),
        "contrast": {"name": texts.name, "digest": texts.digest},
        "pairs": len(test.contrast),
        "unsteered": vars(mean_interval(test.base_odds)),
        "rows": rows,
        "seconds": time.perf_counter() - started,
    }
    if output is not None:
        output.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print(markdown(rows))
    print(
        f"\n{len(test.contrast)} test pairs, unsteered {mean_interval(test.base_odds)} nats; "
        f"{numbers['seconds']:.0f} s"
    )


if __name__ == "__main__":
    run(main)
