"""Draws the picture of README: one dial, what the model writes over it, what that gains and costs.

python docs/first_picture.py            measures SmolLM2, a few minutes; writes docs/dial.json, .png
python docs/first_picture.py --draw     only draws
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

import trimtab as tt
from trimtab.reading import plain_texts

matplotlib.use("agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent
PROMPT = "Write a text message to my sister."
DIALS = (-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
#: The dials whose texts are shown.
SHOWN = (-2.0, 0.0, 1.0, 2.0)
PAIRS, TEXTS, TOKENS = 40, 12, 40
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


def measured() -> dict[str, Any]:
    """Gain on held-out pairs and cost on plain texts at each dial, and a text at some."""
    lm = tt.load("smollm2-135m-instruct")
    contrast = tt.Contrast.builtin("formality")
    steering = tt.CAA().fit(lm, contrast, measure=False)
    held_out = contrast.part("test").take(PAIRS)
    plain = plain_texts()[-TEXTS:]
    before = tt.log_odds(lm, held_out)
    nll, _ = tt.cross_entropy(lm, plain)
    rows = []
    for dial in DIALS:
        now = steering.at(dial)
        gain = tt.mean_interval(tt.log_odds(lm, held_out, now) - before)
        spread = tt.mean_interval(tt.cross_entropy(lm, plain, now)[0] - nll)
        rows.append({
            "dial": dial,
            "gain": [gain.value, *(gain.ci95 or (gain.value,) * 2)],
            "cost": [spread.value, *(spread.ci95 or (spread.value,) * 2)],
        })  # fmt: skip
    texts = {
        f"{dial:g}": lm.generate([PROMPT], steering=steering.at(dial), max_new_tokens=TOKENS)[
            0
        ].text
        for dial in SHOWN
    }
    return {"prompt": PROMPT, "pairs": PAIRS, "rows": rows, "texts": texts}


def draw(found: dict[str, Any]) -> None:
    """The texts above, gain and cost below."""
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(9.6, 4.3), facecolor="white", layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.7), squeeze=False)[:, 0]
    above.suptitle(f"“{found['prompt']}”", fontsize=11)
    for axes, (dial, text) in zip(
        above.subplots(1, len(found["texts"])), found["texts"].items(), strict=True
    ):
        axes.axis("off")
        value = float(dial)
        colour = GREY if value == 0 else BLUE if value > 0 else ORANGE
        said = "unsteered" if value == 0 else f"dial {value:+g}".replace("-", "−")
        axes.set_title(said, fontsize=10, color=colour, fontweight="bold", loc="left")
        short = textwrap.shorten(" ".join(text.split()), 130, placeholder="")
        short += " ..." if len(short) < len(" ".join(text.split())) else ""
        axes.text(0, 1, textwrap.fill(short, 30), va="top", fontsize=9, transform=axes.transAxes)
    gain, cost = below.subplots(1, 2)
    _curve(gain, found["rows"], "gain", BLUE)
    gain.set_ylabel("log-odds of the formal side,\nnats more than unsteered")
    gain.set_title(f"what it does: {found['pairs']} held-out pairs", fontsize=10)
    _curve(cost, found["rows"], "cost", ORANGE)
    cost.axhline(0.1, color=GREY, linewidth=0.8, linestyle=":")
    cost.text(-2.5, 0.11, "rarely seen", ha="left", va="bottom", fontsize=8, color=GREY)
    cost.set_ylabel("cost on plain text,\nnats per token")
    cost.set_title("what it costs", fontsize=10)
    figure.savefig(DOCS / "dial.png", dpi=150)


def _curve(axes: Any, rows: list[dict[str, Any]], name: str, colour: str) -> None:
    dials = [row["dial"] for row in rows]
    middle, low, high = zip(*(row[name] for row in rows), strict=True)
    axes.fill_between(dials, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(dials, middle, color=colour, marker="o", markersize=3)
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.axvline(0, color=GREY, linewidth=0.6)
    axes.set_xlabel("dial")


def main() -> None:
    """Measure, unless only the drawing is wanted, and draw."""
    kept = DOCS / "dial.json"
    if "--draw" not in sys.argv:
        kept.write_text(json.dumps(measured(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    draw(json.loads(kept.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
