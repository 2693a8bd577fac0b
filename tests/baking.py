"""What the tests of baking share: what bakes, and that attached and baked are the same."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import trimtab as tt
from helpers import LINEAR, PROMPTS, SITES, plain_logits, relative, steer, token_ids
from tiny import TINY
from trimtab.steering import Ablate

#: What is not exact, and the words that say why. Everything else bakes.
NO_WEIGHTS = "divide by its length"  # the residual stream goes through norms only
BEFORE_A_NORM = "the norm that reads it divides by its length"
AFTER_A_NORM = "a norm writes it straight into the residual stream"
NORM_BETWEEN = "a norm stands between"
ACROSS_EXPERTS = "the router weighs each expert's part"
NO_BIAS = "(has no bias at|takes no bias)"
WITHOUT_MLP_BIAS = ("qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "olmo2")
REFUSED: dict[tuple[str, str, str], str] = {
    **{(name, "resid", op): NO_WEIGHTS for name in TINY for op in LINEAR if op != "Add"},
    **{(name, kind, op): BEFORE_A_NORM for name, kind in SITES for op in LINEAR
       if kind in ("attn_norm_in", "ffn_norm_in")},
    **{(name, kind, op): AFTER_A_NORM for name, kind in SITES for op in LINEAR
       if kind in ("attn_post_norm", "ffn_post_norm") and op != "Scale"},  # into the norm's gain
    **{(name, kind, op): f"cannot bake test: {why} is not linear in the activation"
       for name, kind in SITES for op, why in (
           ("Absolute", r"a Scale that adds a multiple of \|x\|"),
           ("Turn", "Turn, which lays activations at an absolute angle,"),
           ("Adaptive", "Turn, which lays activations at an absolute angle,"),
           ("Respond", "Respond, which adds where its reader fires,"))},
    **{(name, "final_norm", "Add"): NO_BIAS for name in TINY if name != "gpt2"},
    **{(name, "ffn_norm", "Add"): NO_BIAS for name in WITHOUT_MLP_BIAS},
    **{(name, "ffn_in", "Add"): NO_BIAS for name in WITHOUT_MLP_BIAS},
    **{(name, "ffn_out", "Add"): NO_BIAS for name in WITHOUT_MLP_BIAS},
    **{(name, "resid", "Add"): NO_BIAS for name in ("qwen3", "qwen3_moe", "phi3")},
    **{(name, "resid", "Add"): NORM_BETWEEN for name in ("gemma2", "gemma3", "olmo2")},
    ("qwen3_moe", "router", "Add"): NO_BIAS,
    ("qwen3_moe", "ffn_in", "Ablate"): ACROSS_EXPERTS,
    ("qwen3_moe", "ffn_in", "Rotate"): ACROSS_EXPERTS,
    ("phi3", "attn_norm", "Add"): NO_BIAS,
    ("phi3", "heads", "Add"): NO_BIAS,
    ("phi3", "attn_out", "Add"): NO_BIAS,
}  # fmt: skip


def check_same(
    lm: tt.LanguageModel, baked: tt.LanguageModel, *steerings: tt.Steering, new: int = 32
) -> None:
    """Attached and baked have the same logits, and write the same text."""
    prompts = PROMPTS[:2]
    every = list(steerings)
    with lm.steered(*every):
        attached = lm.logits(prompts, at="all")
        written = lm.generate(prompts, max_new_tokens=new, chat=False)
    for one, other in zip(attached, baked.logits(prompts, at="all"), strict=True):
        assert relative(other, one) < 1e-4
    plain = lm.logits(prompts, at="all")
    assert max(relative(one, other) for one, other in zip(plain, attached, strict=True)) > 1e-3
    # The baked model's next token after each prefix of the attached model's text is the next one
    # there, so its greedy text is the same. One pass over all prefixes instead of 32.
    for prompt, completion in zip(prompts, written, strict=True):
        assert len(completion.tokens) == new
        ids = [*token_ids(prompt), *completion.tokens]
        following = plain_logits(baked.model, ids).argmax(-1).tolist()
        assert following[-new - 1 : -1] == list(completion.tokens)


def snapshot(model: Any) -> dict[str, tuple[int, Tensor]]:
    """Every parameter and buffer: which object it is, and a copy of its numbers."""
    tensors = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors}


def check_untouched(model: Any, before: dict[str, tuple[int, Tensor]]) -> None:
    after = snapshot(model)
    assert list(after) == list(before)
    for name, (identity, tensor) in before.items():
        assert after[name][0] == identity, name
        assert torch.equal(after[name][1], tensor), name


def ablated(lm: tt.LanguageModel, sites: list[str], direction: Tensor) -> tt.Steering:
    return steer(lm, *((site, Ablate(direction)) for site in sites))
