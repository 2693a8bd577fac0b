"""Names of sites, and where a hook sees one.

A *site* is a place where an activation can be read or changed, written `layers.12.ffn_out`,
`embed` or `final_norm`. In the order in which a token passes them:

    embed           what the first block receives (embedding, GPT-2's positions, Gemma's scaling)
    attn_norm_in    what the norm before attention reads: the residual stream, seen by that norm
                    only, so that a change there leaves the stream alone (OLMo 2 has no such norm)
    attn_norm       what attention reads: the output of that norm (OLMo 2: attention's own input)
    heads           input of the attention output projection: all heads side by side, which is
                    n_heads * head_dim units and not always hidden_size
    attn_out        output of that projection (before Gemma's and OLMo 2's norm on the branch)
    attn_post_norm  output of that norm on the branch (Gemma and OLMo 2 only)
    ffn_norm_in     what the norm before the FFN reads: the stream between attention and FFN
    ffn_norm        what the FFN reads (OLMo 2: the FFN's own input)
    router          of a mixture: the logits by which its router chooses experts, one unit each
    ffn_in          input of the FFN down projection; with experts, all experts side by side, zero
                    where a token was not routed
    ffn_out         output of the FFN (before Gemma's and OLMo 2's norm on the branch)
    ffn_post_norm   output of that norm on the branch (Gemma and OLMo 2 only)
    resid           output of the block
    final_norm      what the unembedding reads

Two places can be read and not steered. By the first SADI ranks units, by the other SteerMoE counts
experts:

    ffn_act         output of the FFN's activation function: of a gated FFN act(gate), which is
                    multiplied by another map to give `ffn_in`; with experts as `ffn_in`
    router_choice   of a mixture: the scores of which its router takes the largest, one of each
                    expert: its logits, probabilities, or these with a bias and without some groups
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from trimtab.errors import TrimtabError, shown

#: Site kinds inside a block, in the order of the computation.
BLOCK_KINDS = (
    "attn_norm_in", "attn_norm", "heads", "attn_out", "attn_post_norm",
    "ffn_norm_in", "ffn_norm", "router", "ffn_in", "ffn_out", "ffn_post_norm", "resid",
)  # fmt: skip
#: All site kinds.
KINDS = ("embed", *BLOCK_KINDS, "final_norm")
#: What a block has that can be read and is no site; `ffn_act` comes just before `ffn_in`, and
#: `router_choice` just after `router`.
READ_ONLY, CHOICE = "ffn_act", "router_choice"
#: The site beside each of them, of the same width, and how far behind it that is read.
_BESIDE = {READ_ONLY: ("ffn_in", -0.5), CHOICE: ("router", 0.5)}

#: What a hook does to an activation [rows, tokens, units]: a new one, or None to leave it.
Edit = Callable[[Tensor], Tensor | None]


def parse_site(site: str) -> tuple[int | None, str]:
    """`layers.12.ffn_out` -> (12, "ffn_out"); `embed` -> (None, "embed")."""
    if site in ("embed", "final_norm"):
        return None, site
    # One spelling for each site: no 007, and no digits but these ten.
    match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,4})\.([a-z_]+)", site)
    if match is not None and match[2] == READ_ONLY:
        raise TrimtabError(
            f"{site} can be read and not steered: steer layers.{match[1]}.ffn_in, where scaling a "
            "unit does the same"
        )
    if match is not None and match[2] == CHOICE:
        raise TrimtabError(
            f"{site} can be read and not steered: steer layers.{match[1]}.router, the logits"
        )
    if match is None or match[2] not in BLOCK_KINDS:
        raise TrimtabError(
            f"unknown site '{shown(site, 40)}': write layers.N.KIND with a kind of "
            f"{', '.join(BLOCK_KINDS)}, or embed, or final_norm"
        )
    return int(match[1]), match[2]


def site_order(site: str) -> tuple[float, float]:
    """Sort key: sites, and what can only be read, in the order in which a token passes them."""
    kind = read_only(site)
    if kind is not None:
        layer, place = site_order(site_beside(site))
        return (layer, place + _BESIDE[kind][1])
    number, kind = parse_site(site)
    if number is None:
        return (-1, 0) if kind == "embed" else (float("inf"), 0)
    return (number, BLOCK_KINDS.index(kind))


def read_only(site: str) -> str | None:
    """The kind of what can be read and is no site; None of all else."""
    kind = site.rpartition(".")[2]
    return kind if kind in _BESIDE else None


def site_beside(place: str) -> str:
    """The site beside what can only be read, of the same width: `ffn_in` after `ffn_act`, `router`
    before `router_choice`."""
    start, _, kind = place.rpartition(".")
    return f"{start}.{_BESIDE[kind][0]}"


Side = Literal["input", "output", "experts", "expert_acts", "router", "router_choice"]


@dataclass(frozen=True)
class Point:
    """Where a hook goes to see one site: a module's input or output, of `width` units.

    `side="experts"` is the input of a mixture's down projections, which no module boundary shows,
    and "expert_acts" what its activation functions put out, which an edit can only read. There
    `module` is the fused experts' own, which mostly sees the tokens of all rows in one list, and
    `around` a module that stands around it and is called with [rows, tokens, units].

    At a "router" `module` is the router's own, and "router_choice" is what it chooses by.
    """

    site: str
    module: nn.Module
    side: Side
    width: int
    around: nn.Module | None = None
