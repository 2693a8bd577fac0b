"""The effect of every unit at two kinds of sites against a forward pass over the same batches.

On the first pairs of the built-in contrast's train part. The forward pass is that of the log-odds
whose slopes effects are: the transformer body over both sides of each pair, and logits of the
answers' tokens. Beside it stands the body alone. Memory is the highest resident size above the
loaded model, of each in a process of its own.
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
from trimtab.reading import batches, encode_contrast, log_odds, packed, run_packed

KINDS = ("heads", "ffn_in")
MODELS = ("smollm2-135m-instruct", "gemma3-270m")
PAIRS = 48
WARM_UP_PAIRS = 2
AT_MOST = 3.6
EFFECTS, FORWARD, BODY = "effects", "forward pass", "body alone"

Say = Callable[[str], None]


def run(rounds: int, pairs: int | None, say: Say) -> list[Report]:
    pairs = pairs or PAIRS
    reports = []
    for model in MODELS:
        name = f"effects: formality, {model}"
        ways, facts = contenders(opened(model), pairs)
        for way in ways.values():
            way()
        say(f"{name}: {rounds} rounds")
        times = interleaved(ways, rounds)
        shown = [
            ratio(
                f"{EFFECTS} / {other}", times[EFFECTS], times[other], at_most=most, of_median=True
            )
            for other, most in ((FORWARD, AT_MOST), (BODY, None))
        ]
        say(f"{name}: peak memory")
        for each in ways:
            above = peak_of(model, pairs, each)
            shown.append(Ratio(f"MB above the model: {each}", above, above))
        reports.append(Report(name, pairs, times, shown, facts))
    return reports


def opened(model: str) -> tt.LanguageModel:
    return tt.load(model, device="cpu", dtype=torch.float32)


def contenders(
    lm: tt.LanguageModel, pairs: int
) -> tuple[dict[str, Callable[[], None]], dict[str, object]]:
    """Each way, and what they run on."""
    contrast = tt.Contrast.builtin("formality").part("train").take(pairs)
    sites = [site for kind in KINDS for site in lm.anatomy.sites(kind)]
    rows = encode_contrast(lm, contrast, None)
    every = list(batches(rows, lm.batch_tokens, packed(lm, rows)))

    def effects() -> None:
        collect(lm, contrast, [Want(site, Effect(), Effects) for site in sites])

    def forward() -> None:
        log_odds(lm, contrast)

    @torch.inference_mode()
    def body() -> None:
        for batch in every:
            run_packed(batch, lm)

    units = sum(lm.anatomy.width(site) for site in sites)
    tokens = sum(batch.tokens.numel() for batch in every)
    facts = {"unit": "pairs", "units": units, "padded_tokens": tokens}
    return {EFFECTS: effects, FORWARD: forward, BODY: body}, facts


def peak_of(model: str, pairs: int, way: str) -> float:
    """MB above the loaded model that a way takes, in a process of its own."""
    command = [sys.executable, __file__, model, str(pairs), way]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(ran.stdout)["above_mb"])


def main() -> None:
    torch.set_num_threads(1)
    lm, pairs, way = opened(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    contenders(lm, WARM_UP_PAIRS)[0][way]()
    before, peak = peak_during(contenders(lm, pairs)[0][way])
    print(json.dumps({"above_mb": peak - before}))


if __name__ == "__main__":
    main()
