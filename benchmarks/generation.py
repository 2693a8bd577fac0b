"""What steering costs while a model writes: attached, and baked, against the same model unsteered.

AUSteer with k=100 units, fitted at `ffn_out` and at `heads` on 32 pairs. Greedy, 32 new tokens
with the end-of-text token held back, batches of 8 prompts and of one. Putting the hooks on and
taking them off again is part of the attached time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from clock import Contender, Ratio, Report, interleaved, ratio
from torch import Tensor

import trimtab as tt

MODEL = "smollm2-135m-instruct"
PAIRS = 32
UNITS = 100
NEW_TOKENS = 32
# Batch size, turns within a round, and the most that an attached steering may cost. Differences of
# a hundredth need many short turns, more than long ones.
BATCHES = ((8, 2, 1.01), (1, 4, 1.03))
SITES = ("ffn_out", "heads")

Say = Callable[[str], None]


def run(rounds: int, pairs: int | None, say: Say) -> list[Report]:
    lm = tt.load(MODEL, device="cpu")
    contrast = tt.Contrast.builtin("formality")
    methods = [tt.AUSteer(site=site, k=UNITS) for site in SITES]
    fitted = tt.fit(methods, lm, contrast.part("train").take(pairs or PAIRS))
    steerings = dict(zip(SITES, fitted, strict=True))
    baked = {site: tt.bake(lm, steering) for site, steering in steerings.items()}
    prompts = [pair.prompt for pair in contrast.part("test").pairs]
    reports = []
    for batch, turns, most in BATCHES:
        name = f"generation: SmolLM2 135M, batch {batch}"
        inputs = lm.tokenizer(
            prompts[:batch], padding=True, padding_side="left", return_tensors="pt"
        )
        contenders: dict[str, Contender] = {"unsteered": partial(_write, lm, inputs)}
        for site in SITES:
            steering = steerings[site]
            contenders[f"attached {site}"] = partial(_write, lm, inputs, steering)
            contenders[f"baked {site}"] = partial(_write, baked[site], inputs)
        say(f"{name}: warming up")
        for contender in contenders.values():
            contender()
        same = {
            site: _same(_generate(lm, inputs, steerings[site]), _generate(baked[site], inputs))
            for site in SITES
        }
        say(f"{name}: {rounds} rounds of {turns} turns")
        times = interleaved(contenders, rounds * turns)
        ratios: list[Ratio] = []
        for site in SITES:
            for kind, target in (
                ("attached", {"at_most": most}),
                ("baked", {"at_least": 0.99, "at_most": 1.01}),
            ):
                one = f"{kind} {site}"
                ratios.append(ratio(f"{one} / unsteered", times[one], times["unsteered"], **target))
        facts = {
            "unit": "rows",
            "new_tokens": NEW_TOKENS,
            "turns_in_a_round": turns,
            "layers_steered": {site: len(steerings[site].interventions) for site in SITES},
            "same_tokens_attached_and_baked": same,
        }
        reports.append(Report(name, batch, times, ratios, facts))
    return reports


def _write(lm: tt.LanguageModel, inputs: Any, steering: tt.Steering | None = None) -> None:
    _generate(lm, inputs, steering)


@torch.inference_mode()
def _generate(lm: tt.LanguageModel, inputs: Any, steering: tt.Steering | None = None) -> Tensor:
    """The new tokens, [rows, NEW_TOKENS]."""
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    if steering is None:
        written = lm.model.generate(**inputs, **options)
    else:
        with lm.steered(steering):
            written = lm.model.generate(**inputs, **options)
    new: Tensor = written[:, inputs["input_ids"].shape[1] :]
    return new


def _same(first: Tensor, second: Tensor) -> str:
    return f"{int((first == second).sum())} of {first.numel()}"
