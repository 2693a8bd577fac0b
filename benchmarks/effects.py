"""The effect of every unit at two kinds of sites against a plain forward pass.

On the first pairs of the built-in contrast's train part. The plain pass is the bare transformer
body over the same batches of the same tokens, without hooks; effects need a forward pass, the
logits of the answers and a backward pass, for all sites at once. Memory is the highest resident
size above the loaded model, of each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import torch
from clock import Ratio, Report, interleaved, ratio
from memory import peak_during

import trimtab as tt
from trimtab.fitting import Effect, Effects, Want, collect
from trimtab.reading import batches, encode_contrast, packed, run_packed

KINDS = ("heads", "ffn_in")
MODELS = ("smollm2-135m-instruct", "gemma3-270m")
PAIRS = 48
WARM_UP_PAIRS = 2
AT_MOST = 3.6

Say = Callable[[str], None]


def run(rounds: int, pairs: int | None, say: Say) -> list[Report]:
    reports = []
    for model in MODELS:
        name = f"effects: formality, {model}"
        effects, plain, facts = contenders(opened(model), pairs or PAIRS)
        effects()
        plain()
        say(f"{name}: {rounds} rounds")
        times = interleaved({"effects": effects, "plain pass": plain}, rounds)
        shown = [
            ratio(
                "effects / plain pass",
                times["effects"],
                times["plain pass"],
                at_most=AT_MOST,
                of_median=True,
            )
        ]
        say(f"{name}: peak memory")
        above = {way: peak_of(model, pairs or PAIRS, way) for way in ("effects", "plain")}
        share = above["effects"] / max(above["plain"], 1.0)
        shown.append(Ratio("MB above the model, effects / plain pass", share, share))
        reports.append(Report(name, pairs or PAIRS, times, shown, {**facts, "above_mb": above}))
    return reports


def opened(model: str) -> tt.LanguageModel:
    return tt.load(model, device="cpu", dtype=torch.float32)


def contenders(
    lm: tt.LanguageModel, pairs: int
) -> tuple[Callable[[], None], Callable[[], None], dict[str, object]]:
    """Both ways, and what they run on."""
    contrast = tt.Contrast.builtin("formality").part("train").take(pairs)
    sites = [site for kind in KINDS for site in lm.anatomy.sites(kind)]
    rows = encode_contrast(lm, contrast, None)
    every = list(batches(rows, lm.batch_tokens, packed(lm, rows)))

    def effects() -> None:
        collect(lm, contrast, [Want(site, Effect(), Effects) for site in sites])

    @torch.inference_mode()
    def plain() -> None:
        for batch in every:
            run_packed(batch, lm)

    units = sum(lm.anatomy.width(site) for site in sites)
    tokens = sum(batch.tokens.numel() for batch in every)
    return effects, plain, {"unit": "pairs", "units": units, "padded_tokens": tokens}


def peak_of(model: str, pairs: int, way: str) -> float:
    """MB above the loaded model that a way takes, in a process of its own."""
    command = [sys.executable, __file__, model, str(pairs), way]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(ran.stdout)["above_mb"])


def main() -> None:
    torch.set_num_threads(1)
    lm, pairs, place = opened(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3] == "plain")
    contenders(lm, WARM_UP_PAIRS)[place]()
    before, peak = peak_during(contenders(lm, pairs)[place])
    print(json.dumps({"above_mb": peak - before}))


if __name__ == "__main__":
    main()
