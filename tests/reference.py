"""The tiny models a second time: every site and the logits, from the weights alone.

Written out in plain tensor algebra in float64, one sequence at a time, without transformers' code
and without trimtab's, so that both can be compared with it. `edits` change a site where it is
computed, which says by hand what a steering at that site has to do.

Imports only torch and transformers' model class for its type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from transformers import PreTrainedModel

Edits = Mapping[str, Callable[[Tensor], Tensor]]


def reference(
    name: str, model: PreTrainedModel, ids: list[int], edits: Edits | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Sites by name, each [tokens, units], and the logits [tokens, vocabulary], in float64."""
    config: Any = model.config
    weights = {key: value.double() for key, value in model.state_dict().items()}
    gemma, gpt2, olmo2 = name in ("gemma2", "gemma3"), name == "gpt2", name == "olmo2"
    eps = config.layer_norm_epsilon if gpt2 else config.rms_norm_eps
    sites: dict[str, Tensor] = {}

    def seen(site: str, x: Tensor) -> Tensor:
        sites[site] = x = edits[site](x) if edits and site in edits else x
        return x

    def linear(x: Tensor, key: str) -> Tensor:
        weight, bias = weights[f"{key}.weight"], weights.get(f"{key}.bias", 0.0)
        return (x @ weight if gpt2 else x @ weight.T) + bias  # GPT-2 stores [in, out]

    def norm(x: Tensor, key: str) -> Tensor:
        weight = weights[f"{key}.weight"]
        if gpt2:
            x = x - x.mean(-1, keepdim=True)
            return (
                x / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * weight
                + (weights[f"{key}.bias"])
            )
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * (1 + weight if gemma else weight)

    # Embedding.
    body = "transformer" if gpt2 else "model"
    table = weights["transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"]
    x = table[ids]
    if gemma:
        x = x * torch.tensor(config.hidden_size**0.5).double()  # a float32 buffer there
    if gpt2:
        x = x + weights["transformer.wpe.weight"][: len(ids)]
    x = seen("embed", x)

    for layer in range(config.num_hidden_layers):
        block, at = f"{body}.{'h' if gpt2 else 'layers'}.{layer}", f"layers.{layer}"
        # Attention.
        if olmo2:
            read = x
        else:
            into = seen(f"{at}.attn_norm_in", x)  # for this norm only: x itself goes on
            read = norm(into, f"{block}.{'ln_1' if gpt2 else 'input_layernorm'}")
        read = seen(f"{at}.attn_norm", read)
        heads = seen(f"{at}.heads", _heads(name, config, layer, read, block, weights, linear, norm))
        out = linear(
            heads, f"{block}.{'attn' if gpt2 else 'self_attn'}.{'c' if gpt2 else 'o'}_proj"
        )
        out = seen(f"{at}.attn_out", out)
        if gemma or olmo2:
            normed = norm(out, f"{block}.post_attention_layernorm")
            out = seen(f"{at}.attn_post_norm", normed)
        x = x + out
        # FFN.
        before = {
            "gpt2": "ln_2",
            "gemma2": "pre_feedforward_layernorm",
            "gemma3": "pre_feedforward_layernorm",
        }.get(name, "post_attention_layernorm")
        if olmo2:
            read = x
        else:
            read = norm(seen(f"{at}.ffn_norm_in", x), f"{block}.{before}")
        read = seen(f"{at}.ffn_norm", read)
        mlp = f"{block}.mlp"
        if f"{mlp}.experts.down_proj" in weights:
            router = seen(f"{at}.router", read @ weights[f"{mlp}.gate.weight"].T)
            inner, down = _experts(config, read, router, weights, mlp)
            out = down(seen(f"{at}.ffn_in", inner))
        else:
            if gpt2:
                inner = gelu(linear(read, f"{mlp}.c_fc"), approximate="tanh")
            elif name == "phi3":
                width = config.intermediate_size
                fused = linear(read, f"{mlp}.gate_up_proj")
                inner = silu(fused[:, :width]) * fused[:, width:]
            else:
                gate, up = linear(read, f"{mlp}.gate_proj"), linear(read, f"{mlp}.up_proj")
                inner = (gelu(gate, approximate="tanh") if gemma else silu(gate)) * up
            inner = seen(f"{at}.ffn_in", inner)
            out = linear(inner, f"{mlp}.{'c_proj' if gpt2 else 'down_proj'}")
        out = seen(f"{at}.ffn_out", out)
        if gemma or olmo2:
            normed = norm(out, f"{block}.post_feedforward_layernorm")
            out = seen(f"{at}.ffn_post_norm", normed)
        x = x + out
        x = seen(f"{at}.resid", x)

    x = seen("final_norm", norm(x, f"{body}.{'ln_f' if gpt2 else 'norm'}"))
    logits = x @ weights["lm_head.weight"].T
    cap = getattr(config, "final_logit_softcapping", None)
    return sites, logits if cap is None else cap * torch.tanh(logits / cap)


def _heads(
    name: str,
    config: Any,
    layer: int,
    x: Tensor,
    block: str,
    weights: dict[str, Tensor],
    linear: Callable[[Tensor, str], Tensor],
    norm: Callable[[Tensor, str], Tensor],
) -> Tensor:
    """The concatenated heads [tokens, heads * size]: causal attention before its projection."""
    count = config.num_attention_heads
    groups = count if name == "gpt2" else config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // count
    attention = f"{block}.self_attn"
    if name == "gpt2":
        q, k, v = linear(x, f"{block}.attn.c_attn").chunk(3, dim=-1)
    elif name == "phi3":  # all queries, then all keys, then all values
        widths = [count * size, groups * size, groups * size]
        q, k, v = linear(x, f"{attention}.qkv_proj").split(widths, dim=-1)
    else:
        q, k, v = (linear(x, f"{attention}.{letter}_proj") for letter in "qkv")
    if name == "olmo2":  # a norm over all heads together
        q, k = norm(q, f"{attention}.q_norm"), norm(k, f"{attention}.k_norm")
    q, k, v = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in (q, k, v))
    if name in ("qwen3", "qwen3_moe", "gemma3"):  # a norm over each head
        q, k = norm(q, f"{attention}.q_norm"), norm(k, f"{attention}.k_norm")
    slides = name in ("gemma2", "gemma3") and config.layer_types[layer] == "sliding_attention"
    if name != "gpt2":
        rope = config.rope_parameters
        if name == "gemma3":
            rope = rope[config.layer_types[layer]]
        q, k = _rotated(q, rope["rope_theta"]), _rotated(k, rope["rope_theta"])
    k, v = (part.repeat_interleave(count // groups, dim=0) for part in (k, v))
    scale = config.query_pre_attn_scalar if name in ("gemma2", "gemma3") else size
    scores = q @ k.transpose(-1, -2) / scale**0.5  # [heads, tokens, tokens]
    # The configuration of Gemma 2 caps these scores, but only eager attention does it.
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None and config._attn_implementation == "eager":
        scores = cap * torch.tanh(scores / cap)
    place = torch.arange(len(x))
    distance = place[:, None] - place
    unseen = distance < 0
    window = config.sliding_window if slides or name == "mistral" else None
    if window is not None:
        unseen = unseen | (distance >= window)
    return (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def _rotated(x: Tensor, base: float) -> Tensor:
    """Rotary positions on [heads, tokens, size]: unit i turns with unit i + size / 2."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1])[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _experts(
    config: Any, x: Tensor, router: Tensor, weights: dict[str, Tensor], mlp: str
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A mixture's inner activations, all experts side by side, and what maps them to its output."""
    probabilities = router.softmax(-1)
    top, chosen = probabilities.topk(config.num_experts_per_tok)
    share = torch.zeros_like(probabilities).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
    width = config.moe_intermediate_size
    inner = []
    for expert, both in enumerate(weights[f"{mlp}.experts.gate_up_proj"]):
        gate_up = x @ both.T
        active = silu(gate_up[:, :width]) * gate_up[:, width:]
        inner.append(active * (share[:, expert, None] > 0))  # zero where a token was not routed

    def down(activations: Tensor) -> Tensor:
        maps = weights[f"{mlp}.experts.down_proj"]  # [experts, hidden, units]
        parts = activations.split(width, dim=-1)
        return sum(
            (share[:, i, None] * (part @ maps[i].T) for i, part in enumerate(parts)),
            start=torch.zeros(1, dtype=torch.float64),
        )

    return torch.cat(inner, dim=-1), down
