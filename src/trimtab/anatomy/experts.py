"""A mixture of experts that shows what no boundary of its modules does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy.sites import Edit


def experts_forward(block: Any, edits: list[tuple[str, Edit]], hidden_states: Tensor) -> Tensor:
    """A mixture's forward pass that shows `ffn_in`, the input of its experts' down projections.

    The fused experts never leave their inner activations on a module boundary, so a hook cannot
    see them. This is transformers' own eager loop over experts with the activations gathered as
    [rows, tokens, experts * intermediate], zero where a token was not routed, and handed to each
    of `edits` in turn (which return a new tensor, or None to leave it). An edit comes with the
    side of its `Point`; at "expert_acts" it sees `ffn_act`, and what it returns is not used.
    """
    experts = block.experts
    rows, length, hidden = hidden_states.shape
    flat = hidden_states.reshape(-1, hidden)
    _, routing, selected = block.gate(flat)  # [tokens, top_k] both
    count, _, width = experts.down_proj.shape
    inner = flat.new_zeros(flat.shape[0], count, width)
    readers = [edit for side, edit in edits if side == "expert_acts"]
    acts = torch.zeros_like(inner) if readers else None
    # Where each expert was routed: pairs of (token, place among the token's top k).
    routed = [torch.where(selected == expert) for expert in range(count)]
    for expert, (token, _) in enumerate(routed):
        gate, up = nn.functional.linear(flat[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        active = experts.act_fn(gate)
        if acts is not None:
            acts[token, expert] = active
        inner[token, expert] = active * up
    if acts is not None:
        for read in readers:
            read(acts.view(rows, length, count * width))
    activation = inner.view(rows, length, count * width)
    for side, edit in edits:
        edited = edit(activation) if side == "experts" else None
        activation = activation if edited is None else edited
    inner = activation.view(-1, count, width)
    output = torch.zeros_like(flat)
    for expert, (token, place) in enumerate(routed):
        down = nn.functional.linear(inner[token, expert], experts.down_proj[expert])
        output.index_add_(0, token, down * routing[token, place, None])
    return output.view(rows, length, hidden)
