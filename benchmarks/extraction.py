"""AUSteer's sign counts at `heads` and `ffn_out` of all layers: ours, the authors' way, the floor.

The authors' way is their released procedure in plain transformers: one text at a time, each side
by itself, through the whole model with its LM head, with forward hooks that keep every token's
activation, of which the last token's is then taken. It is leaner than their code, which collects
one kind of site a run, stacks all hidden states, and counts unit by unit in Python.

The floor is the least that any extraction must do: the bare transformer body over each pair's
distinct tokens once, without hooks, in batches by length, at the fastest batch size. Tokenising
and batching are not counted for the floor; for the other two they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import texts
import torch
from clock import Ratio, Report, interleaved, ratio, timed
from torch import Tensor

import trimtab as tt
from trimtab.fitting.activations import collect
from trimtab.fitting.statistics import SignCounts
from trimtab.reading.packing import encode_contrast

METHODS = (tt.AUSteer(site="heads"), tt.AUSteer(site="ffn_out"))
FLOOR_BATCH_TOKENS = (256, 512, 1024, 2048)
#: Activations closer than this, in units of their site's mean size, may compare either way.
NEAR_TIE = 1e-3
MEMORY_PAIRS = 1000
MEMORY_TARGET_MB = 300

Say = Callable[[str], None]

# Name, model, pairs, how many of them, and how many times faster than the authors' way.
CASES = (
    ("COPA, SmolLM2 135M", "smollm2-135m-instruct", texts.copa, 60, 3.5),
    ("BoolQ, SmolLM2 135M", "smollm2-135m-instruct", texts.boolq, 16, 2.2),
    ("BoolQ, Gemma 3 270M", "gemma3-270m", texts.boolq, 8, 4.0),
)


def run(data: Path, rounds: int, pairs: int | None, say: Say) -> list[Report]:
    reports = []
    for name, model, read, count, target in CASES:
        lm = tt.load(model, device="cpu")
        contrast = read(data, pairs or count)
        reports.append(_one(f"extraction: {name}", lm, contrast, target, rounds, say))
        del lm
    reports.append(_memory(data, pairs or MEMORY_PAIRS, say))
    return reports


def _one(
    name: str, lm: tt.LanguageModel, contrast: tt.Contrast, target: float, rounds: int, say: Say
) -> Report:
    say(f"{name}: checking that both ways count the same")
    checked = _check(lm, contrast)
    say(f"{name}: looking for the floor's best batch size")
    rows = encode_contrast(lm, contrast, None)
    tokens = [list(row.tokens) for row in rows]
    prepared = {size: _plain_batches(tokens, size) for size in FLOOR_BATCH_TOKENS}
    trials = interleaved(
        {str(size): partial(_floor, lm.anatomy.body, b) for size, b in prepared.items()}, 2
    )
    size = min(FLOOR_BATCH_TOKENS, key=lambda size: min(trials[str(size)].cpu))
    timed(lambda: _fit(lm, contrast))
    say(f"{name}: {rounds} rounds")
    times = interleaved(
        {
            "trimtab": lambda: _fit(lm, contrast),
            "authors' way": lambda: _discard(authors_way(lm.model, lm.tokenizer, contrast)),
            "floor": lambda: _floor(lm.anatomy.body, prepared[size]),
        },
        rounds,
    )
    facts = {
        "unit": "pairs",
        "tokens_of_texts": sum(row.common * 2 + sum(row.sides) for row in rows),
        "tokens_distinct": sum(map(len, tokens)),
        "floor_batch_tokens": size,
        **checked,
    }
    ratios = [
        ratio("authors' way / trimtab", times["authors' way"], times["trimtab"], at_least=target),
        ratio("trimtab / floor", times["trimtab"], times["floor"], at_most=1.3),
    ]
    return Report(name, len(contrast), times, ratios, facts)


# -- the contenders ---------------------------------------------------------------------------


def _fit(lm: tt.LanguageModel, contrast: tt.Contrast) -> None:
    tt.fit(METHODS, lm, contrast)


@torch.no_grad()
def authors_way(model: Any, tokenizer: Any, contrast: tt.Contrast) -> dict[str, Tensor]:
    """Last-token differences, [pairs, layers, units] for each kind of site, and their counts.

    Counts are [2, layers, units]: pairs with the larger activation on the positive side, and on
    the negative side.
    """
    kept: dict[str, list[Tensor]] = {"heads": [], "ffn_out": []}

    def keep_input(module: Any, args: Any) -> None:
        kept["heads"].append(args[0].detach().cpu())

    def keep_output(module: Any, args: Any, output: Any) -> None:
        kept["ffn_out"].append(output.detach().cpu())

    handles = []
    for block in model.model.layers:
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(keep_input))
        handles.append(block.mlp.register_forward_hook(keep_output))
    activations: dict[str, list[list[Tensor]]] = {"heads": [[], []], "ffn_out": [[], []]}
    try:
        for side in (0, 1):
            for pair in contrast.pairs:
                assert isinstance(pair.prompt, str)
                text = pair.prompt + (pair.negative if side else pair.positive)
                model(**tokenizer(text, return_tensors="pt"))
                for kind, every_token in kept.items():
                    last = torch.stack([activation[0, -1] for activation in every_token])
                    activations[kind][side].append(last)
                    every_token.clear()
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for kind, (positive, negative) in activations.items():
        momentum = torch.stack(positive) - torch.stack(negative)
        result[kind] = momentum
        result[f"{kind} counts"] = torch.stack([(momentum > 0).sum(0), (momentum < 0).sum(0)])
    return result


def _discard(result: Any) -> None:
    """A contender returns nothing."""


def _plain_batches(tokens: list[list[int]], size: int) -> list[tuple[Tensor, Tensor | None]]:
    """Token ids padded on the right, longest first, with a mask where anything is padded."""
    batches = []
    waiting = sorted(tokens, key=len, reverse=True)
    while waiting:
        longest = len(waiting[0])
        count = max(1, size // longest)
        rows, waiting = waiting[:count], waiting[count:]
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        batches.append((ids, None if mask.all() else mask))
    return batches


@torch.inference_mode()
def _floor(body: Any, batches: list[tuple[Tensor, Tensor | None]]) -> None:
    for ids, mask in batches:
        body(input_ids=ids, attention_mask=mask, use_cache=False)


# -- the same result? -------------------------------------------------------------------------


def _check(lm: tt.LanguageModel, contrast: tt.Contrast) -> dict[str, int]:
    """Counts must be equal, but for as many pairs of a unit as are near ties."""
    theirs = authors_way(lm.model, lm.tokenizer, contrast)
    wants = [want for method in METHODS for want in method.wants(lm, contrast)]
    ours = collect(lm, contrast, wants)
    compared = differing = 0
    for method in METHODS:
        kind = method.site
        counts = [ours.of(site, "last", SignCounts) for site in lm.anatomy.sites(kind)]
        mine = torch.stack(
            [
                torch.stack([torch.as_tensor(count.larger) for count in counts]),
                torch.stack([torch.as_tensor(count.smaller) for count in counts]),
            ]
        )  # [2, layers, units]
        momentum = theirs[kind]
        scale = momentum.abs().mean((0, 2), keepdim=True)
        near = (momentum.abs() < NEAR_TIE * scale).sum(0)  # [layers, units]
        apart = (mine - theirs[f"{kind} counts"]).abs()
        if (apart > near).any():
            raise tt.TrimtabError(f"{contrast.name}: trimtab's counts at {kind} are not theirs")
        compared += apart.numel()
        differing += int((apart > 0).sum())
    return {"counts_compared": compared, "counts_off_by_near_ties": differing}


# -- memory -----------------------------------------------------------------------------------


def _memory(data: Path, pairs: int, say: Say) -> Report:
    say(f"extraction: peak memory at {pairs} pairs")
    script = Path(__file__).with_name("memory.py")
    ran = subprocess.run(
        [sys.executable, script, data, str(pairs)], stdout=subprocess.PIPE, text=True, check=True
    )
    measured = json.loads(ran.stdout)
    above = measured["above_model_mb"]
    shown = Ratio("MB above the model", above, above, at_most=MEMORY_TARGET_MB)
    name = "extraction: memory, COPA, SmolLM2 135M"
    return Report(name, measured["pairs"], {}, [shown], {"unit": "pairs", "memory": measured})
