"""Which settings of each method work without being told: the choice of the defaults, measured.

    python benchmarks/defaults.py [--model M ...] [--contrast C ...] [--pairs 24] --out FILE.json
    python benchmarks/defaults.py --table FILE.json ...

Every setting of every method is fitted on train rows of every contrast; its dial then stands where
`fit` puts it: at 1 nat of the next token, or where plain text costs 0.5 nats per token. What it
gains there is measured on other rows of the contrast, what it costs on other plain text. A setting
is worth its gain as a share of the best gain of any setting on the same model and contrast, at
least -1, averaged over all of them. The table has of each method the settings in that order.

The contrasts are builtin ones, or files whose rows name their parts; Gemma, which has no chat
template, skips those whose prompts are conversations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clock import one_thread

MODELS = ("smollm2-135m-instruct", "gemma3-270m")
CONTRASTS = ("builtin:formality", "builtin:warmth", "builtin:facts")


def settings(layers: int) -> list[Any]:
    """What is tried of each method, on a model of so many blocks."""
    import trimtab as tt

    blocks = sorted({round(share * layers) for share in (0.25, 0.4, 0.55)})
    return [
        *(tt.CAA(layer=b, token=t) for b in blocks for t in ("last", "mean", "answer")),
        *(tt.ActAdd(layer=blocks[0], token=t) for t in ("last", "mean", "answer")),
        tt.ITI(k=16, direction="mean"),
        tt.ITI(k=48, direction="mean"),
        tt.ITI(k=48, direction="probe"),
        tt.SADI(variant="head", k=8),
        tt.SADI(variant="head", k=32),
        tt.SADI(variant="neuron", k=64),
        tt.SADI(variant="hidden", k=64),
        tt.SADI(variant="resid", k=8),
        tt.AUSteer(site="ffn_out", k=16, direction="paper"),
        tt.AUSteer(site="ffn_out", k=96, direction="signed"),
        tt.AUSteer(site="ffn_in", k=96, direction="signed"),
        tt.AUSteer(site="heads", k=96, direction="paper"),
        *(tt.AUSteer(site="heads", k=k, direction="signed") for k in (16, 96, 384)),
        *(tt.SAS(theta=t) for t in (0.0, 60.0)),
        tt.AAS(theta=0.0, candidates="input"),
        tt.AAS(theta=0.0, candidates="output"),
        tt.AAS(theta=60.0, candidates="input"),
        tt.SS(whole_blocks=True, candidates="output"),
        tt.SS(whole_blocks=False, candidates="output"),
        tt.SS(whole_blocks=False, candidates="input"),
    ]


def label(method: Any) -> str:
    """The method and what of it differs from its defaults."""
    from dataclasses import fields

    shown = [
        f"{item.name}={getattr(method, item.name)}"
        for item in fields(method)
        if item.name in {"layer", "token", "k", "direction", "variant", "site", "theta"}
        or item.name in {"candidates", "whole_blocks"}
    ]
    return f"{method.name} {' '.join(shown)}"


def measure(model: str, sources: list[str], pairs: int) -> list[dict[str, Any]]:
    """One row for each setting on each contrast that the model can be given."""
    import trimtab as tt
    from trimtab.reading import plain_texts
    from trimtab.sweeps import Effect

    lm, found = tt.load(model, device="cpu"), []
    for source in sources:
        contrast = tt.load_contrast(source)
        if not lm.chats and any(not isinstance(pair.prompt, str) for pair in contrast.pairs):
            continue
        train, test = contrast.train.take(40), contrast.part("test").take(pairs)
        effect = Effect(lm, test, plain_texts()[-4:])
        tried = settings(lm.anatomy.layers)
        for method, steering in zip(tried, fitted(tried, lm, train), strict=True):
            row: dict[str, Any] = {"model": lm.name, "contrast": source, "setting": label(method)}
            if isinstance(steering, str):
                row["failed"] = steering
            else:
                gain = float(effect.gains(steering).mean())
                row |= {"gain": gain, "cost": effect.cost(steering), "dial": steering.setting}
            found.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def fitted(methods: list[Any], lm: Any, train: Any) -> Iterator[Any]:
    """The steering of each method, or why there is none."""
    import trimtab as tt
    from trimtab.dials import measured
    from trimtab.fitting import collect

    wants = [want for method in methods for want in method.wants(lm, train)]
    statistics = collect(lm, train, wants)  # one pass for all of them
    for method in methods:
        try:
            steering = method.build(lm, train, statistics)
            yield measured(lm, steering, train, default=method.asks_for_dial)
        except tt.TrimtabError as error:
            yield str(error)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: of each method the settings from the best to the worst."""
    best: dict[tuple[str, str], float] = defaultdict(lambda: 1e-9)
    for row in rows:
        place = row["model"], row["contrast"]
        best[place] = max(best[place], row.get("gain", 0.0))
    shares: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    failed: dict[str, int] = defaultdict(int)
    for row in rows:
        if "failed" in row:
            failed[row["setting"]] += 1
            shares[row["setting"]].append(0.0)
            continue
        shares[row["setting"]].append(max(-1.0, row["gain"] / best[row["model"], row["contrast"]]))
        costs[row["setting"]].append(row["cost"])
    lines = [
        "| setting | share of the best gain | least | cost | failed |",
        "|---|---|---|---|---|",
    ]
    order = sorted(shares, key=lambda name: (name.split()[0], -statistics.mean(shares[name])))
    for name in order:
        values, cost = shares[name], costs[name]
        shown = f"{statistics.mean(cost):+.2f}" if cost else ""
        lines.append(
            f"| {name} | {statistics.mean(values):.2f} | {min(values):.2f} | {shown} | "
            f"{failed[name] or ''} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--contrast", action="append")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.table:
        files = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.table]
        print(table([row for rows in files for row in rows]))
        return 0
    one_thread()
    warnings.simplefilter("ignore")
    rows = []
    for model in arguments.model or MODELS:
        rows += measure(model, arguments.contrast or list(CONTRASTS), arguments.pairs)
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
