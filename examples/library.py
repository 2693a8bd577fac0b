"""A library of steerings for a model: one of each built-in contrast, chosen, measured and packed.

For each contrast several methods are fitted in one pass over its train part. Each stands at the
dial that changes the next token by 0.1 nats on half of the calibration's prompts; the one that
gains most log-odds on the validation part is kept, and what it gains on the test part and costs on
plain text is measured once. DIR gets NAME.safetensors, `library.json` and `library.md`; a contrast
that is there already is not run again.

    python examples/library.py smollm2-135m-instruct -o library/ [NAME ...]
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trimtab as tt
from trimtab.contrasts import builtins
from trimtab.reading import plain_texts

STRENGTH = "gentle"
PARAGRAPHS = 24


def methods() -> list[tt.Method]:
    """What is chosen from: whole directions, heads, and single units by their effect."""
    return [tt.CAA(), tt.ITI(k=24), tt.AUSteer(locate="effect", site="heads", k=64)]


@functools.cache
def unsteered(lm: tt.LanguageModel) -> Any:
    """The cross-entropy of each plain text, [texts] in nats per token."""
    return tt.cross_entropy(lm, plain_texts()[:PARAGRAPHS])[0]


def cost(lm: tt.LanguageModel, steering: tt.Steering) -> Any:
    """Nats per token that a steering adds to plain text."""
    steered, _ = tt.cross_entropy(lm, plain_texts()[:PARAGRAPHS], steering)
    return tt.mean_interval(steered - unsteered(lm))


def made(lm: tt.LanguageModel, name: str) -> tuple[tt.Steering, dict[str, Any]]:
    """The steering of a contrast, and what was measured of it."""
    contrast, started = tt.Contrast.builtin(name), time.perf_counter()
    fitted = [each.at(STRENGTH) for each in tt.fit(methods(), lm, contrast)]
    seconds = time.perf_counter() - started
    validation, test = contrast.part("validation"), contrast.part("test")
    before = tt.log_odds(lm, validation)
    scored = [(float((tt.log_odds(lm, validation, each) - before).mean()), each) for each in fitted]
    _, best = max(scored, key=lambda pair: pair[0])
    found = tt.mean_interval(tt.log_odds(lm, test, best) - tt.log_odds(lm, test))
    record = {
        "contrast": name,
        "method": best.method,
        "dial": best.setting,
        "validation": {each.method: gain for gain, each in scored},
        "gain": asdict(found),
        "cost": asdict(cost(lm, best)),
        "pairs": len(contrast.train),
        "seconds": round(seconds, 1),
    }
    return best, record


def table(records: list[dict[str, Any]]) -> str:
    """The library as a table in Markdown."""
    lines = [
        "| contrast | method | dial | gain, nats per pair | cost, nats per token of plain text |",
        "|---|---|---|---|---|",
    ]
    for each in records:
        gain, price = each["gain"], each["cost"]
        lines.append(
            f"| `{each['contrast']}` | {each['method']} | {each['dial']:.3g} | "
            f"{gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] | "
            f"{price['value']:+.3f} [{price['low']:+.3f}, {price['high']:+.3f}] |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("names", nargs="*", help="built-in contrasts (default: all)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_intermixed_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    kept = asked.output / "library.json"
    records = json.loads(kept.read_text()) if kept.exists() else []
    lm = tt.load(asked.model, dtype=asked.dtype)
    for name in asked.names or builtins():
        if any(each["contrast"] == name for each in records):
            continue
        steering, record = made(lm, name)
        steering.save(asked.output / f"{name}.safetensors", overwrite=True)
        records = sorted([*records, record], key=lambda each: each["contrast"])
        kept.write_text(json.dumps(records, indent=1) + "\n")
        (asked.output / "library.md").write_text(table(records))
        print(table([record]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
