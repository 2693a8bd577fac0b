"""bfloat16 over vLLM: log-probabilities of a real model under steerings, against transformers.

Both round, each in its own places. So what vLLM says is held against float32: on average it may be
off by half as much again as transformers is in bfloat16, and by MOST nats anywhere among the
likeliest tokens; what a steering does is many times that.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vllm_server import PYTHON, Served, asked, served

import trimtab as tt
from adapters import one
from helpers import steer, steer_at
from operator_formulas import random_operator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

MODEL = "smollm2-135m-instruct"
TEXTS = [
    "Text message to my sister: I will be late tonight, please start dinner without me and",
    "The weather today is going to be cold and wet in the north, while in the south the sun",
    "Dear sir, I am writing to you about the position that was advertised in the newspaper",
    "She told me that the museum had closed years ago, and that nobody knew what became of",
]
#: How many of a text's last tokens are asked for, each after all before it, and of how many of the
#: likeliest tokens.
LAST, TOP = 6, 5
#: Nats by which the log-probability of a token may be off from float32 on average, as a multiple of
#: what transformers is in bfloat16; and at most, at any of the likeliest tokens.
TIMES, MOST = 1.5, 0.6


def steerings_of(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    width = lm.anatomy.hidden_size
    turn = random_operator("Turn", 6, width)
    return {
        "added": steer_at(lm, "resid", layer=12, seed=2).at(6),
        "heads": one(lm, "layers.10.heads", seed=3).at(3),
        "turned": steer(lm, *((f"layers.{i}.ffn_norm", turn) for i in range(8, 20)), alpha=70.0),
    }


def log_p(lm: tt.LanguageModel, ids: list[int], steering: tt.Steering | None) -> Tensor:
    """Of the token after a text, [vocabulary]."""
    acting = [] if steering is None else [steering]
    with lm.steered(*acting, force=True), torch.no_grad():
        logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits.float().log_softmax(-1)


def told(running: Served, model: str, ids: list[int]) -> dict[str, float]:
    """The likeliest tokens after a text, by their words."""
    body = asked(ids, model=model, max_tokens=1, logprobs=TOP)
    answer = running.client.post("completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, float] = answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]
    return found


@pytest.mark.parametrize(("tier", "names"), [("plugin", ("added", "heads", "turned")),
                                             ("lora", ("heads",))])  # fmt: skip
def test_log_probabilities(tier: str, names: tuple[str, ...], tmp_path: Path) -> None:
    half = tt.load(MODEL, device="cpu", dtype=torch.bfloat16)
    steerings = {name: each for name, each in steerings_of(half).items() if name in names}
    options = ("--dtype", "bfloat16", "--tier", tier, "--vllm", "max_model_len=256")
    with served(half, steerings, tmp_path, *options) as running:
        whole = tt.load(tmp_path / "model", device="cpu", dtype=torch.float32)
        encoded = [list(half.tokenizer(text)["input_ids"]) for text in TEXTS]
        asked_of = [ids[: len(ids) - cut] for ids in encoded for cut in range(LAST)]
        found = {
            name: [told(running, f"base+{name}" if name else "base", ids) for ids in asked_of]
            for name in ("", *steerings)
        }
    # Some tokens are parts of characters, whose words are not their own.
    words = {half.tokenizer.decode([i]): i for i in range(len(half.tokenizer))}
    shared = Counter(half.tokenizer.decode([i]) for i in range(len(half.tokenizer)))
    sound = {}
    for name in ("", *steerings):
        steering = steerings.get(name)
        off, theirs, effect = [], [], []
        for ids, top in zip(asked_of, found[name], strict=True):
            exact, rounded, plain = (
                log_p(lm, ids, with_it)
                for lm, with_it in ((whole, steering), (half, steering), (whole, None))
            )
            for word, value in top.items():
                if shared[word] == 1:
                    token = words[word]
                    off.append(value - float(exact[token]))
                    theirs.append(float(rounded[token] - exact[token]))
                    effect.append(float(exact[token] - plain[token]))
        sizes = [float(torch.tensor(each).abs().mean()) for each in (off, theirs, effect)]
        most = float(torch.tensor(off).abs().max())
        print(f"\n{tier} {name or 'nothing'}: off {sizes[0]:.3f} nats on average, {most:.2f} most; "
              f"transformers {sizes[1]:.3f}, effect {sizes[2]:.2f}, n = {len(off)}")  # fmt: skip
        shows = not name or sizes[2] > 5 * sizes[0]
        sound[name] = shows and sizes[0] <= TIMES * sizes[1] and most <= MOST
    assert all(sound.values()), sound
