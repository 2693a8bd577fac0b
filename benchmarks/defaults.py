"""Which settings of each method work without being told: the choice of the defaults, measured.

    python benchmarks/defaults.py [--model M ...] [--contrast C ...] [--pairs 24] --out FILE.json
    python benchmarks/defaults.py --table FILE.json ...

Every setting of every method is fitted on the train rows of every contrast; its dial then stands
where `fit` puts it: on the clear strength, or where plain text costs 0.3 nats per token. What it
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
        *(tt.ActAdd(layer=b, token=t) for b in blocks[:2] for t in ("last", "mean", "answer")),
        *(tt.ITI(k=k, direction=d) for k in (16, 48) for d in ("mean", "probe")),
        *(tt.SADI(variant="head", k=k) for k in (8, 32)),
        *(tt.SADI(variant=v, k=k) for v in ("neuron", "hidden", "resid") for k in (8, 64)),
        *(
            tt.AUSteer(site=s, k=k, direction=d)
            for s in ("heads", "ffn_in", "ffn_out")
            for k, d in ((16, "signed"), (96, "signed"), (96, "paper"))
        ),
        tt.AUSteer(site="heads", k=384, direction="signed"),
        *(tt.SAS(theta=t, candidates=c) for t in (0.0, 30.0, 60.0) for c in ("input", "output")),
        *(tt.AAS(theta=t, candidates=c) for t in (0.0, 30.0, 60.0) for c in ("input", "output")),
        *(tt.SS(whole_blocks=w, candidates=c) for w in (True, False) for c in ("input", "output")),
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
        train, test = contrast.train, contrast.part("test").take(pairs)
        effect = Effect(lm, test, plain_texts()[-4:])
        tried = settings(lm.anatomy.layers)
        steerings = {}
        for method, result in zip(tried, fitted(tried, lm, train.take(100)), strict=True):
            name = label(method)
            row = {"model": lm.name, "contrast": source, "method": method.name, "setting": name}
            if isinstance(result, str):
                found.append({**row, "failed": result})
                continue
            steerings[name] = result
            gains = effect.gains(result)
            row |= {"gain": float(gains.mean()), "cost": effect.cost(result)}
            row |= {"dial": result.setting, "range": list(result.dial.range)}
            found.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def fitted(methods: list[Any], lm: Any, train: Any) -> list[Any]:
    """The steering of each method, or why there is none."""
    import trimtab as tt

    results: list[Any] = []
    for method in methods:
        try:
            results.append(method.fit(lm, train))
        except tt.TrimtabError as error:
            results.append(str(error))
    return results


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
        shares[row["setting"]].append(
            max(-1.0, row["gain"] / best[row["model"], row["contrast"]])
        )
        costs[row["setting"]].append(row["cost"])
    lines = ["| setting | share of the best gain | least | cost | failed |", "|---|---|---|---|---|"]
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
