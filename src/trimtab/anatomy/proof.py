"""Proves a description: every claim of it is an equation, checked on what a model computed.

What holds for a layer is found by name of the aspect: "stream" (the block is the sum that the
description says), and for each branch "kind", "read" (what it reads), "norm", "output", "writer",
"experts", "post_norm", "readers", "act". `prove_block` returns what does not hold, each with the
equation that failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy.behaviour import (
    computes_its_map,
    is_linear,
    is_norm,
    mixes_and_averages,
    mixes_tokens,
    reads_by_weight,
)
from trimtab.anatomy.description import Block, Branch
from trimtab.anatomy.experts import disagreement
from trimtab.anatomy.numbers import epsilon, flat, is_sum, multiple
from trimtab.anatomy.tracing import ROWS, Call, Trace

#: What is false of a branch (its number and the aspect) or of the block (None, "stream").
Problems = dict[tuple[int | None, str], str]


@dataclass
class Shown:
    """What earlier layers have shown, which later ones of the same classes rest on."""

    heads: int | None
    #: Classes of attention modules that were seen to average.
    averaging: set[type] = field(default_factory=set)


@dataclass
class BlockCalls:
    """One block's calls, by the paths of their modules."""

    trace: Trace
    hidden: int

    @property
    def top(self) -> Call:
        return self.trace.calls[0]

    @property
    def x(self) -> Tensor:
        assert self.top.x is not None
        return flat(self.top.x)

    @property
    def y(self) -> Tensor:
        assert self.top.y is not None
        return flat(self.top.y)

    @property
    def tokens(self) -> int:
        return len(self.x)

    def call(self, path: str | None) -> Call | None:
        return None if path is None else self.trace.at(path)

    def taken(self, path: str | None) -> Tensor | None:
        """What a module took, [tokens, units]; None where it does not run on all tokens at once."""
        call = self.call(path)
        return self.each_token(None if call is None else call.x)

    def returned(self, path: str | None) -> Tensor | None:
        call = self.call(path)
        return self.each_token(None if call is None else call.y)

    def each_token(self, x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() < 2 or x.numel() != self.tokens * x.shape[-1]:
            return None
        return flat(x)

    def returned_by_experts(self, path: str) -> Tensor | None:
        """What fused experts add up to, [tokens, units]; those that say it expert by expert
        (Llama 4) are added up by what is around them."""
        call = self.call(path)
        if call is None or call.y is None or call.y.shape[-1] != self.hidden:
            return None
        experts, rest = divmod(call.y.numel(), self.tokens * self.hidden)
        if rest:
            return None
        return call.y.reshape(experts, self.tokens, self.hidden).sum(0)

    def term(self, branch: Branch) -> Tensor | None:
        """What a branch adds to the stream, before its factor."""
        return self.returned(branch.post_norm or branch.out)

    def inside(self, path: str | None) -> list[Call]:
        """The calls inside of a module, its own among them."""
        if not path:
            return self.trace.calls[1:]
        prefix = f"{path}."
        return [c for c in self.trace.calls if c.name == path or c.name.startswith(prefix)]

    def takes(self, call: Call, read: Tensor) -> bool:
        """Whether a module was given exactly this, [tokens, units]."""
        taken = self.each_token(call.x)
        return taken is not None and torch.equal(taken, read)

    def input_of(self, branch: Branch) -> Tensor | None:
        """What a branch reads, [tokens, units]."""
        if branch.module is not None:
            return self.taken(branch.module)
        if branch.readers:
            return self.taken(branch.readers[0])
        return self.returned(branch.norm)


def prove_block(block: Block, calls: BlockCalls, shown: Shown) -> Problems:
    """What of a layer's description does not hold, by branch and aspect."""
    if block.scale is None:
        return {(None, "stream"): _NO_SUM}
    missing = _missing(block, calls)
    if missing:
        return {(None, "stream"): missing}
    problems: Problems = {}
    terms, factors = _sum_of(block, calls, tuple(range(len(block.branches))))
    scale = float(block.scale)
    if terms is None or not is_sum(
        calls.y, [calls.x, *terms], [scale, *(scale * factor for factor in factors)]
    ):
        return {(None, "stream"): f"its output is not {_written(block)}"}
    for i, branch in enumerate(block.branches):
        for aspect, reason in _prove_branch(block, i, branch, calls, shown).items():
            problems[i, aspect] = reason
    return problems


_NO_SUM = "its output is not its input plus what its branches return"


def _missing(block: Block, calls: BlockCalls) -> str | None:
    """What a description names and the block does not run, or not once."""
    for branch in block.branches:
        named = (branch.module, branch.writer, branch.norm, branch.post_norm, branch.output)
        for path in (*named, branch.experts, branch.act, *branch.readers, *branch.beside):
            if path is not None and calls.call(path) is None:
                times = sum(call.name == path for call in calls.trace.calls)
                return f"{path} runs {times} times in it, not once"
    return None


def _sum_of(
    block: Block, calls: BlockCalls, numbers: tuple[int, ...]
) -> tuple[list[Tensor] | None, list[float]]:
    terms, factors = [], []
    for i in numbers:
        term = calls.term(block.branches[i])
        if term is None or term.shape != calls.x.shape:
            return None, []
        terms.append(term)
        factors.append(float(block.branches[i].factor))
    return terms, factors


def _written(block: Block) -> str:
    """The sum that a block claims to be, for people."""
    parts = ["its input"]
    for branch in block.branches:
        factor = float(branch.factor)
        name = branch.post_norm or branch.out
        parts.append(name if factor == 1 else f"{factor:g} * {name}")
    total = " + ".join(parts)
    assert block.scale is not None
    scale = float(block.scale)
    return total if scale == 1 else f"{scale:g} * ({total})"


def _prove_branch(
    block: Block, i: int, branch: Branch, calls: BlockCalls, shown: Shown
) -> dict[str, str]:
    problems: dict[str, str] = {}
    checks = {
        "post_norm": _prove_post_norm,
        "norm": _prove_norm,
        "read": _prove_reading,
        "writer": _prove_writer,
        "experts": _prove_experts,
        "kind": _prove_kind,
        "readers": _prove_readers,
        "act": _prove_act,
    }
    for aspect, check in checks.items():
        reason = check(block, i, branch, calls, shown)
        if reason is not None:
            problems[aspect] = reason
    return problems


def _prove_post_norm(
    block: Block, i: int, branch: Branch, calls: BlockCalls, shown: Shown
) -> str | None:
    if branch.post_norm is None:
        return None
    norm = calls.call(branch.post_norm)
    raw, taken = calls.returned(branch.out), calls.taken(branch.post_norm)
    if norm is None or not is_norm(norm):
        return f"{branch.post_norm} is no norm: what it returns changes with its input's length"
    if branch.out == branch.post_norm:
        return None  # what it reads is no module's output (Gemma 4's mixtures)
    if raw is None or taken is None or not torch.equal(raw, taken):
        return f"{branch.post_norm} does not read what {branch.out} returns"
    return None


def _prove_norm(
    block: Block, i: int, branch: Branch, calls: BlockCalls, shown: Shown
) -> str | None:
    if branch.norm is None:
        return None
    norm = calls.call(branch.norm)
    if norm is None or not is_norm(norm):
        return f"{branch.norm} is no norm: what it returns changes with its input's length"
    if branch.norm == branch.post_norm:
        return f"{branch.norm} cannot stand both before the branch and after it"
    return None


def _prove_reading(
    block: Block, i: int, branch: Branch, calls: BlockCalls, shown: Shown
) -> str | None:
    """The branch, or its norm, reads the stream with the branches that it says are in it."""
    if branch.module is None and branch.norm is None and not branch.readers:
        return None  # what it reads is not to be seen, and so is no site
    where = branch.module or branch.norm or branch.out
    asked = calls.call(branch.module)
    if asked is not None and asked.times > 1:
        return f"{branch.module} takes what it reads in {asked.times} arguments"
    read = calls.input_of(branch)
    if branch.norm is not None:
        normed = calls.returned(branch.norm)
        factor = float(branch.input_factor)
        if read is None or normed is None or not multiple(normed, read, factor):
            times = "" if factor == 1 else f"{factor:g} times "
            return f"{where} does not read {times}what {branch.norm} returns"
        read, where = calls.taken(branch.norm), branch.norm
    terms, factors = _sum_of(block, calls, branch.reads)
    if read is None or terms is None or not is_sum(read, [calls.x, *terms], [1.0, *factors]):
        inside = [block.branches[j].post_norm or block.branches[j].out for j in branch.reads]
        stream = " + ".join(["the block's input", *inside])
        return f"{where} does not read {stream}"
    return None


def _prove_writer(
    block: Block, i: int, branch: Branch, calls: BlockCalls, shown: Shown
) -> str | None:
    if branch.writer is None:
        return None
    writer = calls.call(branch.writer)
    raw, written = calls.returned(branch.out), calls.returned(branch.writer)
    factor = float(branch.writer_factor)
    if writer is None or not is_linear(writer.module) or not computes_its_map(writer):
        return f"{branch.writer} is no linear map"
    if raw is None or written is None or not multiple(written, raw, factor):
        times = "" if factor == 1 else f"{factor:g} times "
        return f"{branch.out} does not return {times}what {branch.writer} returns"
    return None


def _prove_experts(
    block: Block, i: int, branch: Branch, calls: BlockCalls, shown: Shown
) -> str | None:
    """The fused experts compute what is known of their layout, and the mixture is, token by token,
    a multiple of their output and of what stands beside them."""
    if branch.experts is None:
        return f"{branch.beside[0]} stands beside no experts" if branch.beside else None
    experts = calls.call(branch.experts)
    if experts is None or experts.y is None:
        return f"{branch.experts} does not run"
    reason = disagreement(experts.module, experts.args, experts.kwargs, experts.y)
    if reason is not None:
        return f"{branch.experts}: {reason}"
    raw = calls.returned(branch.out)
    parts = [
        calls.returned_by_experts(branch.experts),
        *(calls.returned(path) for path in branch.beside),
    ]
    if raw is None or any(part is None or part.shape != raw.shape for part in parts):
        return f"{branch.experts} does not return one row for each token"
    if not is_mixture(raw, [part for part in parts if part is not None]):
        names = " and ".join([branch.experts, *branch.beside])
        return f"{branch.out} returns more, or something else, than {names} together"
    return None


def is_mixture(total: Tensor, parts: list[Tensor]) -> bool:
    """Whether each token of a tensor is a weighted sum of the same token of others."""
    stacked = torch.stack([part.double() for part in parts], -1)  # [tokens, units, parts]
    weights = torch.linalg.lstsq(stacked, total.double()[..., None]).solution
    expected = (stacked @ weights)[..., 0]
    size = (stacked.abs() @ weights.abs())[..., 0] + total.double().abs()
    # A massive unit's rounding is felt in the weights, and so in all units of its token.
    room = 8 * epsilon(total.dtype) * (size + 0.05 * size.amax(-1, keepdim=True))
    return bool(((expected - total.double()).abs() <= room + 1e-9).all())


def _prove_kind(
    block: Block, i: int, branch: Branch, calls: BlockCalls, shown: Shown
) -> str | None:
    asked = calls.call(branch.module)
    if asked is None:  # bare maps of the block: attention has more than these
        return None if branch.kind == "ffn" else f"{branch.out} sees each token by itself"
    if asked.x is None or asked.y is None:
        return f"{branch.module} takes or returns no activations"
    if branch.kind == "ffn":
        mixed = mixes_tokens(asked, ROWS)
        return f"{branch.module} mixes tokens, as an FFN does not" if mixed else None
    if branch.kind == "mixer":
        if mixes_tokens(asked, ROWS):
            return None
        return f"{branch.module} does not mix tokens"
    if branch.writer is None:
        return f"no linear map writes {branch.module}, so that its heads are not to be seen"
    return attends(asked, calls, branch, shown)


def attends(asked: Call, calls: BlockCalls, branch: Branch, shown: Shown) -> str | None:
    """None where a branch is softmax attention, else why it is not."""
    writer = calls.call(branch.writer)
    if writer is None or shown.heads is None:
        return "the configuration says no number of heads"
    try:
        asked_both = mixes_and_averages(asked, writer.module, shown.heads, ROWS)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        asked_both = False, False
    if all(asked_both):
        shown.averaging.add(type(asked.module))
        return None
    # Attention to keys and values that another layer made (Gemma 4) cannot be asked by itself: it
    # is what layers of its class that make their own have shown to be.
    if type(asked.module) in shown.averaging:
        return None
    return f"{branch.module} is no softmax attention: alike tokens do not give alike heads"


def _prove_readers(
    block: Block, i: int, branch: Branch, calls: BlockCalls, shown: Shown
) -> str | None:
    """The readers that are named are all that read the branch's input."""
    found, others = find_readers(branch, calls)
    if others:
        return f"{', '.join(others[:3])} reads it, too, and is no linear map"
    more = sorted(set(found) - set(branch.readers))
    if more:
        return f"{', '.join(more[:3])} reads it, too"
    less = sorted(set(branch.readers) - set(found))
    if less:
        return f"{', '.join(less[:3])} does not read it"
    return None


def find_readers(branch: Branch, calls: BlockCalls) -> tuple[list[str], list[str]]:
    """The maps that read what a branch reads, and what else does."""
    read = calls.input_of(branch)
    if read is None:
        return [], []
    found, others = [], []
    for call in calls.inside(branch.module):
        module: Any = call.module
        if call.name == branch.norm or not calls.takes(call, read):
            continue
        if call.x is not None and call.y is not None and torch.equal(call.x, call.y):
            continue  # an identity only hands on
        if is_linear(module):
            found.append(call.name)
        elif call.name == branch.experts:
            continue
        elif any(True for _ in module.children()) and not module._parameters:
            continue  # what is inside of it reads
        elif branch.experts is not None and call.name.startswith(f"{branch.experts}."):
            continue
        elif reads_by_weight(call):
            found.append(call.name)
        elif branch.module is not None and call.name != branch.module:
            others.append(call.name)
    return found, others


def _prove_act(block: Block, i: int, branch: Branch, calls: BlockCalls, shown: Shown) -> str | None:
    if branch.act is None:
        return None
    act, inner = calls.call(branch.act), calls.taken(branch.writer)
    if act is None or act.x is None or act.y is None or inner is None:
        return f"{branch.act} takes or returns no activations"
    if act.y.shape[-1] != inner.shape[-1] or is_linear(act.module):
        return f"{branch.act} returns {act.y.shape[-1]} units, not those of {branch.writer}"
    return None
