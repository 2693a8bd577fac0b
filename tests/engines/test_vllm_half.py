"""bfloat16 over vLLM: log-probabilities of a real model under steerings, against transformers.

Both round, each in its own places. So what vLLM says is held against float32: on average it may be
off by half as much again as transformers is in bfloat16, and by MOST nats anywhere among the
likeliest tokens; what a steering does is many times that.
"""

from __future__ import annotations

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
PROMPTS = ["Text message to my sister:\n", "The weather today is", "Dear sir, I", "She told me"]
TOP, WRITTEN = 5, 8
#: Nats by which the log-probability of a token may be off from float32 on average, as a multiple of
#: what transformers is in bfloat16; and at most, at any of the likeliest tokens.
TIMES, MOST = 1.5, 0.6


def steerings_of(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    width = lm.anatomy.hidden_size
    turn = random_operator("Turn", 6, width)
    return {
        "added": steer_at(lm, "resid", layer=12, seed=2).at(6),
        "heads": one(lm, "layers.10.heads", seed=3).at(0.5),
        "turned": steer(lm, *((f"layers.{i}.ffn_norm", turn) for i in range(8, 20)), alpha=70.0),
    }


def log_p(lm: tt.LanguageModel, ids: list[int], steering: tt.Steering | None) -> Tensor:
    """Of the last tokens of a text, [WRITTEN, vocabulary]."""
    acting = [] if steering is None else [steering]
    with lm.steered(*acting, force=True), torch.no_grad():
        logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits[-WRITTEN - 1 : -1].float().log_softmax(-1)


def told(running: Served, model: str, prompt: str) -> tuple[list[str], list[dict[str, float]]]:
    body = asked(prompt, model=model, max_tokens=WRITTEN, logprobs=TOP)
    answer = running.client.post("completions", json=body)
    assert answer.status_code == 200, answer.text
    about = answer.json()["choices"][0]["logprobs"]
    return about["tokens"], about["top_logprobs"]


@pytest.mark.parametrize(("tier", "names"), [("plugin", ("added", "heads", "turned")),
                                             ("lora", ("heads",))])  # fmt: skip
def test_log_probabilities(tier: str, names: tuple[str, ...], tmp_path: Path) -> None:
    half = tt.load(MODEL, device="cpu", dtype=torch.bfloat16)
    steerings = {name: each for name, each in steerings_of(half).items() if name in names}
    options = ("--dtype", "bfloat16", "--tier", tier, "--vllm", "max_model_len=256")
    with served(half, steerings, tmp_path, *options) as running:
        found = {
            (name, prompt): told(running, f"base+{name}" if name else "base", prompt)
            for name in ("", *steerings)
            for prompt in PROMPTS
        }
    whole = tt.load(tmp_path / "model", device="cpu", dtype=torch.float32)
    words = {half.tokenizer.decode([i]): i for i in range(len(half.tokenizer))}
    for name in ("", *steerings):
        steering = steerings.get(name)
        off, theirs, effect = [], [], []
        for prompt in PROMPTS:
            written, tops = found[name, prompt]
            new = [words[word] for word in written]
            ids = [*half.tokenizer(prompt)["input_ids"], *new]
            exact, rounded, plain = (
                log_p(lm, ids, with_it)
                for lm, with_it in ((whole, steering), (half, steering), (whole, None))
            )
            for at, top in enumerate(tops):
                for word, value in top.items():
                    token = words[word]
                    off.append(value - float(exact[at, token]))
                    theirs.append(float(rounded[at, token] - exact[at, token]))
                    effect.append(float(exact[at, token] - plain[at, token]))
        sizes = [float(torch.tensor(each).abs().mean()) for each in (off, theirs, effect)]
        most = float(torch.tensor(off).abs().max())
        print(f"\n{tier} {name or 'nothing'}: off {sizes[0]:.3f} nats on average, {most:.2f} most; "
              f"transformers {sizes[1]:.3f}, effect {sizes[2]:.2f}, n = {len(off)}")  # fmt: skip
        assert sizes[0] <= TIMES * sizes[1]
        assert most <= MOST
        assert not name or sizes[2] > 5 * sizes[0]
