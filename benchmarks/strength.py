"""A curve over 1,025 dials against as many forward passes, and budgets against forward passes.

The curve follows the next token after a paragraph under CAA at the middle block, from -20 to 20.
The passes that it is compared with are the bare model's with the steering attached, one dial at a
time; of the 1,025 every sixteenth is timed, and the time counts sixteen times. The budget is 0.1
nats for 64 prompts on both sides of the dial, in seconds of one plain pass over the same prompts,
in batches. Before anything is timed, the curve is compared with the passes and the budgets' KL with
the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from clock import Contender, Report, Times, interleaved, ratio
from torch import Tensor

import trimtab as tt
from trimtab.reading import plain_texts

MODEL = "smollm2-135m-instruct"
POINTS = 1025
EVERY = 16  # of the separate passes, the share that is timed
SPAN = (-20.0, 20.0)
WORDS = 60
PROMPTS = 64
BATCH = 16
NATS = 0.1

Say = Callable[[str], None]


def run(rounds: int, pairs: int | None, say: Say) -> list[Report]:
    lm = tt.load(MODEL, device="cpu")
    contrast = tt.Contrast.builtin("formality")
    few = contrast.part("train").take(32)
    caa, austeer = tt.fit(
        [
            tt.CAA(layer=lm.anatomy.layers // 2, token="mean"),
            tt.AUSteer(site="heads", k=96, direction="signed"),
        ],
        lm,
        few,
    )
    return [
        _curve(lm, caa, rounds, say),
        _budget(lm, {"CAA": caa, "AUSteer": austeer}, pairs or PROMPTS, rounds, say),
    ]


def _curve(lm: tt.LanguageModel, steering: tt.Steering, rounds: int, say: Say) -> Report:
    text = " ".join(plain_texts()[0].split()[:WORDS])
    ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
    dials = torch.linspace(*SPAN, POINTS, dtype=torch.float64)[::EVERY].tolist()
    say("strength: checking the curve against separate passes")
    curve = tt.strength.curve(lm, steering, [text], span=SPAN, points=POINTS, chat=False)
    shown = [token.id for token in curve.tokens]
    apart = torch.stack([p[shown] for p in _separate(lm, steering, ids, dials)]).double()
    base = torch.tensor([token.base_p for token in curve.tokens], dtype=torch.float64)
    followed = torch.stack([token.delta_p[::EVERY] for token in curve.tokens], 1) + base
    error = float((followed - apart).abs().max())
    if error > curve.tolerance:
        raise tt.TrimtabError(f"strength: the curve is off by {error:.2g}")
    say(f"strength: {rounds} rounds of the curve")
    contenders: dict[str, Contender] = {
        "curve": lambda: tt.strength.curve(
            lm, steering, [text], span=SPAN, points=POINTS, chat=False
        ),
        "one by one": lambda: _separate(lm, steering, ids, dials),
        "one by one, last logits": lambda: _separate(lm, steering, ids, dials, keep=1),
    }
    times = interleaved(contenders, rounds)
    for name in ("one by one", "one by one, last logits"):
        share = POINTS / len(dials)
        times[name] = Times(
            [share * taken for taken in times[name].cpu],
            [share * taken for taken in times[name].wall],
        )
    return Report(
        f"strength: a curve of {POINTS} dials, {ids.shape[1]} tokens, SmolLM2 135M",
        POINTS,
        times,
        [
            ratio("one by one / curve", times["one by one"], times["curve"], at_least=20),
            ratio("last logits / curve", times["one by one, last logits"], times["curve"]),
        ],
        {"unit": "dials", "measured": curve.passes, "largest error": error},
    )


@torch.inference_mode()
def _separate(
    lm: tt.LanguageModel,
    steering: tt.Steering,
    ids: Tensor,
    dials: Sequence[float],
    **options: Any,
) -> list[Tensor]:
    """The next token's probabilities at each dial, one forward pass each."""
    options = {f"logits_to_{name}": value for name, value in options.items()}
    found = []
    for dial in dials:
        with lm.steered(steering.at(dial)):
            logits = lm.model(ids, use_cache=False, **options).logits[0, -1]
        found.append(logits.softmax(-1))
    return found


def _budget(
    lm: tt.LanguageModel,
    steerings: dict[str, tt.Steering],
    count: int,
    rounds: int,
    say: Say,
) -> Report:
    prompts = [pair.prompt for pair in tt.Contrast.builtin("formality").pairs[:count]]
    find = partial(tt.strength.budget, lm, prompts=prompts, kl=NATS, chat=False)
    say("strength: checking the budgets against the model's logits")
    base = lm.logits(prompts).double().log_softmax(-1)
    for name, steering in steerings.items():
        found = find(steering=steering)
        dials = [steering.at(row.dial) for row in found.per_prompt]
        steered = lm.logits(prompts, steering=dials).double().log_softmax(-1)
        kl = (base.exp() * (base - steered)).sum(-1)
        pairs = zip(kl.tolist(), found.per_prompt, strict=True)
        off = [abs(k / NATS - 1) for k, row in pairs if row.reached]
        if max(off, default=0) > 0.02:
            raise tt.TrimtabError(f"strength: a budget of {name} is off by {max(off):.1%}")
    batches = [
        lm.tokenizer(prompts[i : i + BATCH], padding=True, padding_side="left", return_tensors="pt")
        for i in range(0, count, BATCH)
    ]
    say(f"strength: {rounds} rounds of budgets")
    contenders: dict[str, Contender] = {"plain pass": lambda: _plain(lm, batches)}
    for name, steering in steerings.items():
        contenders[name] = partial(find, steering=steering)
    times = interleaved(contenders, rounds)
    return Report(
        "strength: a budget of 0.1 nats, SmolLM2 135M",
        count,
        times,
        [
            ratio(f"{name} / plain pass", times[name], times["plain pass"], at_most=8)
            for name in steerings
        ],
        {"unit": "prompts"},
    )


@torch.inference_mode()
def _plain(lm: tt.LanguageModel, batches: Sequence[Any]) -> None:
    for inputs in batches:
        lm.model(**inputs, use_cache=False)
