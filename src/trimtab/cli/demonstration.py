"""The demonstration: steer a real model with a few dozen of its units, and measure it.

Fits AUSteer and CAA on a built-in contrast in one pass, chooses their settings on its validation
part, measures effect and cost on its test part, and leaves a picture, the steerings, a baked
checkpoint and the numbers in a directory.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from trimtab.contrasts import PARTS, Contrast
from trimtab.errors import TrimtabError
from trimtab.figures import Estimate, mean_interval
from trimtab.files import write_whole
from trimtab.fitting import fit
from trimtab.methods import CAA, AUSteer
from trimtab.model import LanguageModel, bake
from trimtab.reading import plain_texts
from trimtab.reports import bars, rendered
from trimtab.steering import Steering
from trimtab.sweeps import Effect, Trial

CONTRAST = "formality"
#: A setting is allowed when plain text gets no harder to predict than this, in nats per token.
COST_LIMIT = 0.1
VALIDATION_PAIRS = 40
VALIDATION_TEXTS = 6
UNITS = (32, 96)
ALPHAS = (1.0, 1.5, 2.0, 3.0)
# Blocks at a quarter, 40 % and 55 % of the depth; where CAA works in most models.
DEPTHS = (0.25, 0.4, 0.55)
#: For the eye only: raw beginnings whose register is open.
PROMPTS = (
    "Text message to my sister:\n",
    "Q: Can you come to the party on Saturday?\nA:",
    'She picked up the phone and said, "',
    "He opened the door of the hotel and told the guest that",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """One steering on the test part."""

    name: str
    gain: Estimate
    preferred: float  # share of pairs whose positive side is the more probable one
    cost: Estimate


def run(
    language_model: LanguageModel, contrast: Contrast, output: Path, say: Say
) -> dict[str, Any]:
    """The whole demonstration; returns its numbers and leaves its files in `output`."""
    started = time.perf_counter()
    _check(contrast, output)
    plain = plain_texts()
    fitted = _fit(language_model, contrast, say)
    austeer, caa = _choose(language_model, contrast, fitted, plain[:VALIDATION_TEXTS], say)
    compared = {
        "AUSteer, signed": austeer.steering,
        "AUSteer, paper": _with_papers_sign(austeer.steering, fitted),
        "CAA": caa.steering,
    }
    test = contrast.part("test")
    results = _measure(language_model, test, plain[VALIDATION_TEXTS:], compared, say)
    texts = _texts(language_model, [None, austeer.steering, caa.steering], say)
    _claim(output)
    drawn = _draw(output / "demo.png", austeer.steering, results[1:], len(test))
    saved = [
        trial.steering.save(output / f"{trial.steering.method}.safetensors", overwrite=True)
        for trial in (austeer, caa)
    ]
    baked = _bake(language_model, austeer.steering, output / "model")
    say(f"\npicture     {drawn}")
    say(f"steerings   {', '.join(map(str, saved))}")
    say(
        f"checkpoint  {output / 'model'}: loaded by plain transformers it writes the same "
        f"{baked['same_tokens']} of {baked['tokens']} tokens as the attached steering"
    )
    seconds = time.perf_counter() - started
    say(f"done in {seconds:.0f} s")
    numbers = {
        "model": dict(vars(language_model.identity)),
        "contrast": {"name": contrast.name, "digest": contrast.digest},
        "chosen": [
            {
                "method": trial.steering.method,
                "hyperparameters": trial.steering.hyperparameters,
                "dial": trial.steering.setting,
                "validation": {"gain": trial.gain, "cost": trial.cost},
            }
            for trial in (austeer, caa)
        ],
        "results": [
            {
                "name": result.name,
                "gain": vars(result.gain),
                "preferred": result.preferred,
                "cost": vars(result.cost),
            }
            for result in results
        ],
        "texts": texts,
        "baked": baked,
        "picture": str(drawn),
        "steerings": [str(path) for path in saved],
        "seconds": seconds,
    }
    text = json.dumps(numbers, indent=1, ensure_ascii=False)
    write_whole(output / "demo.json", text.encode(), overwrite=True)
    return numbers


def _check(contrast: Contrast, output: Path) -> None:
    """Before minutes of work: a contrast that lacks something, a directory of somebody else's."""
    if not contrast.paired:
        raise TrimtabError(f"{contrast.name} is unpaired: the demonstration compares pairs")
    for part in PARTS:
        contrast.part(part)
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise TrimtabError(f"cannot write {output}: {existing} is not a directory")
    if not os.access(existing, os.W_OK):
        raise TrimtabError(f"cannot write {output}: no permission to write in {existing}")
    if existing == output and any(output.iterdir()) and not (output / "demo.json").is_file():
        raise TrimtabError(f"{output} holds other things than a demo: name another directory")


def _claim(output: Path) -> None:
    """From here on the directory is the demo's, and no old numbers stand beside new files."""
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "demo.json", b"{}", overwrite=True)


def _fit(language_model: LanguageModel, contrast: Contrast, say: Say) -> list[Steering]:
    """AUSteer on the heads with either sign of gamma, and CAA at several depths, in one pass."""
    layers = language_model.anatomy.layers
    methods = [
        *(AUSteer(site="heads", k=k, direction="signed") for k in UNITS),
        *(AUSteer(site="heads", k=k, direction="paper") for k in UNITS),
        *(CAA(layer=int(depth * layers), token="mean") for depth in DEPTHS),
    ]
    say(f"Fitting {len(methods)} steerings on {len(contrast.train)} pairs, in one pass ...")
    return fit(methods, language_model, contrast, measure=False)


def _choose(
    language_model: LanguageModel,
    contrast: Contrast,
    fitted: Sequence[Steering],
    plain: Sequence[str],
    say: Say,
) -> tuple[Trial, Trial]:
    """The setting of AUSteer (signed) and of CAA that gains most within the cost limit."""
    validation = contrast.part("validation").take(VALIDATION_PAIRS)
    say(
        f"Choosing k, layer and alpha on {len(validation)} validation pairs; allowed are at most "
        f"{COST_LIMIT} nats of cost on plain text:"
    )
    effect = Effect(language_model, validation, plain)
    trials: list[tuple[float, Trial]] = []
    for steering in fitted:
        if steering.hyperparameters.get("direction") == "paper":
            continue
        for trial in effect.trials(steering, ALPHAS, COST_LIMIT):
            line = f"  {_setting(trial.steering):28} cost {trial.cost:+.3f}"
            if trial.gain is None:
                say(f"{line}, too much")
                break  # a larger alpha costs more
            say(f"{line}, gain {trial.gain:+.2f}")
            trials.append((trial.gain, trial))
    best = []
    for method in ("austeer", "caa"):
        allowed = [(gain, trial) for gain, trial in trials if trial.steering.method == method]
        if not allowed:
            raise TrimtabError(f"no setting of {method} keeps its cost within {COST_LIMIT} nats")
        best.append(max(allowed, key=lambda pair: pair[0])[1])
        say(f"  chosen: {_setting(best[-1].steering)}")
    return best[0], best[1]


def _with_papers_sign(chosen: Steering, fitted: Sequence[Steering]) -> Steering:
    """The same units at the same alpha, with gamma as the paper defines it."""
    wanted = {**chosen.hyperparameters, "direction": "paper"}
    return next(s for s in fitted if s.hyperparameters == wanted).at(chosen.setting)


def _setting(steering: Steering) -> str:
    parameters = steering.hyperparameters
    what = f"k={parameters['k']}" if "k" in parameters else f"layer={parameters['layer']}"
    return f"{steering.method} {what} alpha={steering.setting:g}"


def _measure(
    language_model: LanguageModel,
    test: Contrast,
    plain: Sequence[str],
    steerings: dict[str, Steering],
    say: Say,
) -> list[Result]:
    """Effect on held-out pairs and cost on held-out plain text, beside the unsteered model."""
    say(f"\nOn {len(test)} held-out pairs and {len(plain)} plain texts (95 % intervals):")
    say(f"  {'':18}{'gain in log-odds, nats':>28}{'prefers positive':>18}{'cost, nats/token':>26}")
    results = []
    effect = Effect(language_model, test, plain)
    for name, steering in {"unsteered": None, **steerings}.items():
        if steering is None:
            gains, costs = torch.zeros(len(test)), torch.zeros(len(plain))
        else:
            gains, costs = effect.gains(steering), effect.costs(steering)
        result = Result(
            name,
            mean_interval(gains),
            float((effect.base_odds + gains > 0).double().mean()),
            mean_interval(costs),
        )
        results.append(result)
        cost = f"{result.cost.value:+.3f} [{result.cost.low:+.3f}, {result.cost.high:+.3f}]"
        say(f"  {name:18}{result.gain!s:>28}{result.preferred:>17.0%} {cost:>26}")
    return results


def _texts(
    language_model: LanguageModel, steerings: Sequence[Steering | None], say: Say
) -> list[dict[str, Any]]:
    """What the model writes, unsteered and steered, one under the other: a glance, no measure."""
    prompts = list(PROMPTS)
    written = [
        language_model.generate(prompts, chat=False, max_new_tokens=22, steering=steering)
        for steering in steerings
    ]
    shown = []
    for number, prompt in enumerate(prompts):
        say(f"\n{prompt.strip()}")
        for steering, completions in zip(steerings, written, strict=True):
            name = steering.label if steering else "unsteered"
            text = completions[number].text
            say(f"  {name:18} {' '.join(text.split())}")
            shown.append({"prompt": prompt, "steering": name, "text": text})
    return shown


def _draw(path: Path, steering: Steering, results: Sequence[Result], n: int) -> Path:
    """Where the units are, what each steering gains and what it costs, in one PNG file."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(12, 5), layout="constrained")
        halves: Any = figure.subfigures(1, 2, width_ratios=[1.15, 1])
        steering.plot(halves[0].subplots())
        upper, lower = halves[1].subplots(2, 1)
        gains = {result.name: result.gain for result in results}
        clear = [name for name, gain in gains.items() if gain.low > 0 or gain.high < 0]
        bars(upper, gains, "gain in log-odds of the positive side, nats per pair", clear)
        upper.set_title(f"What it does: {n} held-out pairs, 95 % intervals")
        costs = {result.name: result.cost for result in results}
        bars(lower, costs, "change in cross-entropy on plain text, nats per token")
        lower.set_title("What it costs")
        return write_whole(path, rendered(figure, "png"), overwrite=True)


def _bake(language_model: LanguageModel, steering: Steering, directory: Path) -> dict[str, Any]:
    """Save a baked checkpoint, load it with plain transformers, and compare greedy tokens."""
    from transformers import AutoModelForCausalLM

    bake(language_model, steering).save_pretrained(directory, overwrite=True)
    plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=language_model.dtype)
    same = total = 0
    for prompt in PROMPTS[:2]:
        ids = torch.tensor(language_model.encode([prompt]), device=language_model.device)
        options = {"max_new_tokens": 32, "do_sample": False}
        with language_model.steered(steering):
            attached = language_model.model.generate(ids, **options)[0, ids.shape[1] :].tolist()
        baked = plain.to(ids.device).generate(ids, **options)[0, ids.shape[1] :].tolist()
        total += len(attached)
        same += sum(a == b for a, b in zip(attached, baked, strict=False))
    return {"directory": str(directory), "same_tokens": same, "tokens": total}
