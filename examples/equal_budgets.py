"""Equal alpha against equal budgets: how alike are the effects of different steerings?

Additive and scaling methods, at several layers, on several models, are fitted on one contrast. Each
is then measured on held-out prompts and texts twice: with its dial at one number that is the same
for all, and with its dial where the median of the validation prompts uses up the same budget of
KL(unsteered || steered). What is measured is not the budget itself: KL per token along what the
unsteered model would write (16 tokens), cross-entropy of plain text, and the log-odds gained on the
contrast's test pairs. The table tells how far each varies over methods, layers and models: the
factor by which one standard deviation of its logarithm stretches it.

Over prompts the same is asked of one steering: with one dial for all prompts, and with the dial
that the budget allows each prompt; what varies is the total variation of the next token's
distribution, and again the KL along the following tokens.

    python examples/equal_budgets.py -o equal-budgets
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter, run
from matplotlib.figure import Figure

import trimtab as tt
from trimtab.fitting.method import Method
from trimtab.reading import plain_texts
from trimtab.sweeps.effect import Effect

#: The first model's steerings in one colour, the second's in another (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73")
MARKS = {"caa": "o", "austeer": "s", "iti": "^", "actadd": "v"}
EFFECTS = {
    "kl_after": "KL per following token, nats",
    "cost": "cost on plain text, nats per token",
    "gain": "gain in log-odds, nats per pair",
}
FOLLOWING = 16


@dataclass(frozen=True)
class Measured:
    """One steering at one dial."""

    model: str
    name: str
    method: str
    way: str  # "alpha" or "budget"
    dial: float
    kl_after: float
    cost: float
    gain: float


def methods(layers: int) -> dict[str, Method]:
    """Steerings whose dial is called alpha."""
    found: dict[str, Method] = {}
    for depth in (0.2, 0.4, 0.6, 0.8):
        layer = int(depth * layers)
        found[f"CAA, layer {layer}"] = tt.CAA(layer=layer, token="mean")
    found["ActAdd, layer 40 %"] = tt.ActAdd(layer=int(0.4 * layers))
    found["ITI, 16 heads"] = tt.ITI(k=16)
    found["AUSteer, 96 of heads"] = tt.AUSteer(site="heads", k=96, direction="signed")
    found["AUSteer, 64 of ffn_out"] = tt.AUSteer(site="ffn_out", k=64, direction="signed")
    return found


def following(lm: tt.LanguageModel, prompts: list[str]) -> list[str]:
    """Prompts with what the unsteered model writes next."""
    written = lm.generate(prompts, chat=False, max_new_tokens=FOLLOWING, min_new_tokens=FOLLOWING)
    return [prompt + done.text for prompt, done in zip(prompts, written, strict=True)]


def kl_after(
    lm: tt.LanguageModel, prompts: list[str], texts: list[str], steering: Any
) -> torch.Tensor:
    """Mean KL of the next token after the prompt and after each token that follows, [prompts]."""
    plain, steered = (lm.logits(texts, steering=s, at="all") for s in (None, steering))
    found = []
    for prompt, before, after in zip(prompts, plain, steered, strict=True):
        start = len(lm.encode([prompt])[0]) - 1
        p, q = (logits[start:].double().log_softmax(-1) for logits in (before, after))
        found.append((p.exp() * (p - q)).sum(-1).mean())
    return torch.stack(found)


def variation(lm: tt.LanguageModel, prompts: list[str], steering: Any) -> torch.Tensor:
    """Total variation between the next token's distributions, [prompts] from 0 to 1."""
    plain, steered = (lm.logits(prompts, steering=s).double().softmax(-1) for s in (None, steering))
    apart: torch.Tensor = plain - steered
    return apart.abs().sum(-1) / 2


def spread(values: list[float]) -> float:
    """exp(standard deviation of the logarithm): a factor, 1 where all are equal."""
    logs = torch.tensor([math.log(max(abs(value), 1e-6)) for value in values])
    return float(logs.std().exp())


def study(
    model: str, alpha: float, kl: float, pairs: int, prompts: int
) -> tuple[list[Measured], dict[str, float]]:
    """Everything of one model, and how the effect varies over prompts."""
    lm, contrast = tt.load(model), tt.Contrast.builtin("formality")
    named = methods(lm.anatomy.layers)
    fitted = dict(zip(named, tt.fit(list(named.values()), lm, contrast), strict=True))
    plain = plain_texts()
    chosen = [str(pair.prompt) for pair in contrast.part("validation").pairs][:prompts]
    held_out = [str(pair.prompt) for pair in contrast.part("test").pairs][:prompts]
    texts = following(lm, held_out)
    effect = Effect(lm, contrast.part("test").take(pairs), plain)
    rows = []
    for name, steering in fitted.items():
        found = tt.strength.budget(lm, steering, chosen, kl, side="positive", chat=False)
        for way, dial in (("alpha", alpha), ("budget", found.dial)):
            turned = steering.at(dial)
            rows.append(
                Measured(
                    model,
                    name,
                    steering.method,
                    way,
                    dial,
                    float(kl_after(lm, held_out, texts, turned).mean()),
                    effect.cost(turned),
                    float(effect.gains(turned).mean()),
                )
            )
            print(rows[-1], flush=True)
    return rows, over_prompts(lm, fitted[next(iter(fitted))], held_out, texts, kl)


def over_prompts(
    lm: tt.LanguageModel, steering: tt.Steering, prompts: list[str], texts: list[str], kl: float
) -> dict[str, float]:
    """How the effect of one steering varies, with one dial and with each prompt's own."""
    own = tt.strength.budget(lm, steering, prompts, kl, side="positive", chat=False)
    ways = {
        "one dial": steering.at(own.dial),
        "own dial": [steering.at(row.dial) for row in own.per_prompt],
    }
    found = {"dials": spread([row.dial for row in own.per_prompt])}
    for name, turned in ways.items():
        found[f"next token, {name}"] = spread(variation(lm, prompts, turned).tolist())
        found[f"following tokens, {name}"] = spread(kl_after(lm, prompts, texts, turned).tolist())
    return found


def table(rows: list[Measured], alpha: float, kl: float) -> str:
    """How far each effect varies, by way; gains also without the steerings that gain nothing."""
    lines = [
        f"| effect | spread at alpha = {alpha:g} | spread at {kl:g} nats |",
        "|---|---|---|",
    ]
    useless = {(row.model, row.name) for row in rows if row.gain <= 0}
    useful = [row for row in rows if (row.model, row.name) not in useless]
    shown = [(key, label, rows) for key, label in EFFECTS.items()]
    shown.append(("gain", f"the same, of the {len(useful) // 2} that gain at all", useful))
    for key, label, some in shown:
        cells = []
        for way in ("alpha", "budget"):
            values = [getattr(row, key) for row in some if row.way == way]
            least, most = min(map(abs, values)), max(map(abs, values))
            cells.append(f"{spread(values):.2f} x ({least:.3g} to {most:.3g})")
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def draw(rows: list[Measured], alpha: float, kl: float) -> Figure:
    """Cost against KL of the following tokens, both ways side by side on the same axes."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    models = list(dict.fromkeys(row.model for row in rows))
    for axes, way in ((left, "alpha"), (right, "budget")):
        for row in rows:
            if row.way == way:
                axes.scatter(
                    max(row.kl_after, 1e-4),
                    max(abs(row.gain), 1e-3),
                    color=COLOURS[models.index(row.model) % len(COLOURS)],
                    marker=MARKS.get(row.method, "D"),
                    s=46,
                )
        axes.set(xscale="log", yscale="log", xlabel=EFFECTS["kl_after"])
        axes.grid(alpha=0.3, which="both", linewidth=0.4)
    left.set(ylabel=f"{EFFECTS['gain']} (size)", title=f"the same alpha, {alpha:g}")
    right.set_title(f"the same budget, {kl:g} nats")
    handles = [
        left.scatter([], [], color=COLOURS[i % len(COLOURS)], label=model)
        for i, model in enumerate(models)
    ]
    used = dict.fromkeys(row.method for row in rows)
    handles += [
        left.scatter([], [], color="#666666", marker=MARKS.get(name, "D"), label=name)
        for name in used
    ]
    left.legend(handles=handles, fontsize=8, frameon=False)
    return figure


def main(
    model: Annotated[list[str] | None, Parameter(help="Models; repeat.")] = None,
    alpha: Annotated[float, Parameter(help="The dial that is the same for all.")] = 1.0,
    kl: Annotated[float, Parameter(help="The budget that is the same for all, nats.")] = 0.1,
    pairs: Annotated[int, Parameter(help="Test pairs for the log-odds.")] = 40,
    prompts: Annotated[int, Parameter(help="Prompts on either part.")] = 32,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="Directory.")] = Path(
        "equal-budgets"
    ),
) -> None:
    """Fit, find the budgets' dials, measure, draw, and print the table."""
    started = time.perf_counter()
    rows: list[Measured] = []
    over: dict[str, Any] = {}
    for name in model or ["smollm2-135m-instruct", "gemma3-270m"]:
        found, over[name] = study(name, alpha, kl, pairs, prompts)
        rows += found
    output.mkdir(parents=True, exist_ok=True)
    figure = draw(rows, alpha, kl)
    for kind in ("png", "svg"):
        figure.savefig(output / f"equal-budgets.{kind}", dpi=150)
    text = table(rows, alpha, kl)
    document = {"rows": [asdict(row) for row in rows], "over_prompts": over, "table": text}
    (output / "equal-budgets.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(text)
    for name, factors in over.items():
        print(f"{name}, over prompts: " + ", ".join(f"{k} {v:.2f} x" for k, v in factors.items()))
    print(f"{time.perf_counter() - started:.0f} s, {output}")


if __name__ == "__main__":
    run(main)
