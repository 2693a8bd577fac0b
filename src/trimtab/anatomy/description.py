"""What is known of how a model computes: blocks, their branches, and what reads and writes them.

A block takes the residual stream and returns it with the outputs of its branches added:

    out = scale * (in + sum of factor * post_norm(branch))

A description says that of every layer by itself, so that hybrids and models whose first layers are
dense need nothing special. Paths of modules start at the block; the empty path is the block
itself. A description is a claim: `proof.py` checks it by numbers before anything relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What a branch does: softmax attention, another way of mixing tokens (linear attention, a state
#: space, a convolution), or something that is done to each token by itself.
BranchKind = Literal["attn", "mixer", "ffn"]


@dataclass(frozen=True)
class Branch:
    """One thing that a block adds to the residual stream."""

    kind: BranchKind
    #: What computes it; its input is what the branch reads. None: linear maps that are the
    #: block's own (OPT's FFN).
    module: str | None
    #: The linear map that writes it; None where several maps do, or none.
    writer: str | None = None
    #: The norm that it reads the stream through; None where it reads the stream itself.
    norm: str | None = None
    #: The norm between the branch and the stream.
    post_norm: str | None = None
    #: The branches of the block, by number, that are in what it reads: none of them in parallel
    #: blocks.
    reads: tuple[int, ...] = ()
    #: All that reads the branch's input, and only through weights: linear maps, routers.
    readers: tuple[str, ...] = ()
    #: The fused experts of a mixture.
    experts: str | None = None
    #: The maps that write what is added to the experts' output (shared experts).
    beside: tuple[str, ...] = ()
    #: The module whose output is the branch, where it is not `module`: one that adds the stream
    #: itself (BLOOM, MPT) returns something else.
    output: str | None = None
    #: The activation function of an FFN.
    act: str | None = None
    #: What the branch is multiplied by when it is added. In a hint the name of an attribute of the
    #: configuration stands for its value.
    factor: float | str = 1.0
    #: What the norm's output is multiplied by before the branch reads it.
    input_factor: float | str = 1.0
    #: What the writer's output is multiplied by to give the branch.
    writer_factor: float | str = 1.0

    @property
    def out(self) -> str:
        """The module whose output is the branch."""
        out = self.output or self.module or self.writer or self.post_norm
        assert out is not None
        return out


@dataclass(frozen=True)
class Block:
    """The branches of one layer, in the order in which they run."""

    branches: tuple[Branch, ...] = ()
    #: What the whole sum is multiplied by. None says that the block is no such sum (a norm stands
    #: on the stream itself, as in BERT), so that only its input and output are sites.
    scale: float | str | None = 1.0

    @property
    def attention(self) -> int | None:
        """The number of the branch that the attention's sites belong to: softmax attention, and
        where there is none another mixer."""
        attention = self._first("attn")
        return self._first("mixer") if attention is None else attention

    @property
    def ffn(self) -> int | None:
        """The number of the branch that the FFN's sites belong to: the first one with a norm."""
        found = [i for i, branch in enumerate(self.branches) if branch.kind == "ffn"]
        normed = [i for i in found if self.branches[i].norm or self.branches[i].post_norm]
        return next(iter(normed or found), None)

    def _first(self, kind: BranchKind) -> int | None:
        return next((i for i, branch in enumerate(self.branches) if branch.kind == kind), None)

    def shares_norm(self, number: int) -> bool:
        """Whether another branch reads through the same norm (parallel blocks)."""
        norm = self.branches[number].norm
        return norm is not None and any(
            other.norm == norm for i, other in enumerate(self.branches) if i != number
        )


@dataclass(frozen=True)
class Description:
    """A model's parts. Paths of `body` and `final_norm` start at the model, as those of `blocks`
    (the list of blocks) and `tables` do; those of a layer start at its block."""

    body: str
    blocks: str
    layers: tuple[Block, ...]
    #: The norm that the unembedding reads; None where none is proved.
    final_norm: str | None = None
    #: The module that makes logits of what the body returns times `final_factor`: the unembedding,
    #: and with it what some architectures put before it (BERT's decoders).
    unembedding: str = "lm_head"
    final_factor: float | str = 1.0
    #: What its output is multiplied by to give the logits, before they are capped.
    logit_factor: float | str = 1.0
    #: The embedding tables whose rows are summed to the first block's input; none where it is no
    #: such sum.
    tables: tuple[str, ...] = ()
    #: What the sum is multiplied by.
    embedding_factor: float | str = 1.0
