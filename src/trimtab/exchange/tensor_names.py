"""What the names of tensors say: the block, the site that a map writes or reads, and how a matrix
is stored. It holds for the names that most architectures have; of others nothing is said."""

from __future__ import annotations

import re

from trimtab.exchange.edits import Edit
from trimtab.exchange.weights import Weights

#: Where the number of a block stands in the name of a tensor.
_BLOCK = re.compile(r"\.(?:layers|layer|blocks|block|h)\.(\d+)\.")
#: Sites that maps of these names write and read, as most architectures call them.
_SITES = (
    (r"attn\.|attention\.|mixer\.", r"(o_proj|c_proj|out_proj|dense|wo)$", "attn_out", "heads"),
    (r"attn\.|attention\.", r"(q_proj|k_proj|v_proj|qkv_proj|c_attn|query_key_value)$", "",
     "attn_norm"),
    (r"mlp\.|feed_forward\.|moe\.|ffn\.",
     r"(down_proj|c_proj|fc2|dense_4h_to_h|w2|fc_out|fc_2)$", "ffn_out", "ffn_in"),
    (r"mlp\.|feed_forward\.|moe\.|ffn\.",
     r"(gate_proj|up_proj|gate_up_proj|c_fc|fc1|fc_1|dense_h_to_4h|w1|w3|fc_in)$", "", "ffn_norm"),
    (r"mlp\.|moe\.", r"gate$", "router", "ffn_norm"),
    (r"", r"(embed_tokens|wte|embed_in|word_embeddings)$", "embed", ""),
    (r"", r"(lm_head|embed_out)$", "", "final_norm"),
)  # fmt: skip
#: Tables, and the layers of GPT-2 and its kind, are stored [in, out].
_TABLES = re.compile(r"(embed_tokens|wte|wpe|embed_in|word_embeddings)\.weight$")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
_CONV1D_KINDS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def names_of(*weights: Weights) -> list[str]:
    """The tensors of some checkpoints, each once, blocks in their order."""
    twice = frozenset.intersection(*(each.tied for each in weights))
    names = {name for each in weights for name in each.shapes} - twice
    return sorted(names, key=lambda name: [_numbered(part) for part in re.split(r"(\d+)", name)])


def _numbered(part: str) -> int | str:
    return int(part) if part.isdigit() else part


def block_of(name: str) -> int | None:
    """The number of the block that a tensor is in."""
    found = _BLOCK.search(f".{name}")
    return int(found[1]) if found else None


def is_turned(name: str, base: Weights) -> bool:
    """Whether a matrix is stored [in, out]."""
    conv1d = base.kind in _CONV1D_KINDS and _CONV1D.search(name)
    return bool(conv1d or _TABLES.search(name))


def site_of(name: str, edit: Edit | None) -> str:
    """The site at which such an edit acts, as far as the names of modules say it: what a map writes
    for an edit of its output, what it reads for one of its input."""
    if edit is None or edit.kind in ("rounding", "slight"):
        return ""
    module = name.removesuffix(".weight").removesuffix(".bias")
    reads = edit.kind == "scaled columns" or edit.numbers.get("side") == "input"
    writes = edit.kind in ("scaled rows", "constant") or edit.numbers.get("side") == "output"
    block = block_of(name)
    for inside, last, written, read in _SITES:
        if re.search(inside, module) and re.search(last, module):
            kind = written if writes else read if reads else ""
            if not kind:
                return ""
            return kind if block is None else f"layers.{block}.{kind}"
    return ""
