"""Finds a model's description from how it computes, without a name of a module or a class.

The blocks are the one list of modules that hand the residual stream on, bit for bit; a block's
branches are what `solving.py` finds; what a branch is, reads and is written by is found by
comparing activations and by running modules again on others. What cannot be found is left out of
the description, and `proof.py` says why a site is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy.behaviour import computes_its_map, is_linear, is_norm, mixes_tokens
from trimtab.anatomy.description import Block, Branch
from trimtab.anatomy.experts import layout_of
from trimtab.anatomy.numbers import epsilon, factor_of, is_sum
from trimtab.anatomy.proof import BlockCalls, Shown, attends, find_readers, is_mixture
from trimtab.anatomy.solving import Sum, candidates, solve
from trimtab.anatomy.tracing import ROWS, Call


class Finder:
    """Finds the blocks of one model, layer by layer, and remembers what earlier layers came to."""

    def __init__(self, model: Any, shown: Shown) -> None:
        self.shown = shown
        self.constants = constants(model)
        self._sums: list[Sum] = []

    def block(self, calls: BlockCalls) -> tuple[Block, str | None]:
        """The description of one layer; with what is wrong where it is no sum."""
        outputs = candidates(calls)
        solved = solve(calls, outputs, self._sums)
        if isinstance(solved, str):
            return Block(scale=None), solved
        if solved not in self._sums:
            self._sums.append(solved)
        members = {name: names for _, names in outputs for name in names}
        order = {call.name: i for i, call in enumerate(calls.trace.calls)}
        paired = sorted(
            zip(solved.terms, solved.factors, strict=True), key=lambda pair: order[pair[0]]
        )
        scale = self._snapped(solved.scale, calls)
        branches = [
            self._branch(calls, members[term], self._snapped(factor, calls))
            for term, factor in paired
        ]
        block = Block(tuple(branches), scale)
        return replace(block, branches=tuple(self._reading(block, calls))), None

    def _snapped(self, factor: float, calls: BlockCalls) -> float:
        """A factor as the configuration or a parameter of the block says it, where one does."""
        return snapped(factor, [*self.constants, *_scalars(calls.top.module)], calls.y.dtype)

    # -- one branch ---------------------------------------------------------------------------

    def _branch(self, calls: BlockCalls, members: list[str], factor: float) -> Branch:
        """What returns a term of the block's sum: a norm on the branch, what computes it, what
        writes it."""
        post_norm, members = _post_norm(calls, members)
        if not members:  # what the norm reads is no module's output
            return Branch("ffn", None, post_norm=post_norm, factor=factor)
        raw = calls.returned(members[0])
        assert raw is not None
        composite = [name for name in members if _is_composite(calls.call(name))]
        module = min(composite, key=len) if composite else None
        writer, writer_factor = _writer(calls, raw, module)
        output = None
        if module is None:
            output = members[-1] if writer is None or writer_factor != 1 else writer
            module = _around(calls, output)
        elif module != members[0] and writer is None:
            output = module
        branch = Branch(
            "ffn",
            module,
            writer=writer,
            post_norm=post_norm,
            output=None if output in (module, None if module else writer) else output,
            factor=factor,
            writer_factor=1.0 if writer is None else self._snapped(writer_factor, calls),
        )
        branch = _with_experts(calls, branch, raw)
        return replace(branch, kind=self._kind(calls, branch))

    def _kind(self, calls: BlockCalls, branch: Branch) -> Any:
        asked = calls.call(branch.module)
        if asked is None or asked.x is None or asked.y is None:
            return "ffn"
        try:
            by_class = type(asked.module) in self.shown.averaging
            if not by_class and not mixes_tokens(asked, ROWS):
                return "ffn"
            if branch.writer is not None and attends(asked, calls, branch, self.shown) is None:
                return "attn"
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            pass  # it cannot be run by itself; whatever it is, it is no plain FFN
        return "mixer"

    # -- what branches read -------------------------------------------------------------------

    def _reading(self, block: Block, calls: BlockCalls) -> Iterable[Branch]:
        norms = [call for call in calls.trace.calls[1:] if _is_norm_of_stream(call, calls)]
        for number, branch in enumerate(block.branches):
            yield self._with_input(block, number, branch, calls, norms)

    def _with_input(
        self, block: Block, number: int, branch: Branch, calls: BlockCalls, norms: list[Call]
    ) -> Branch:
        read = calls.taken(branch.module)
        if branch.module is None and branch.writer is not None:
            read = _read_by_bare_maps(calls, branch)
        if read is None or read.shape != calls.x.shape:
            return branch
        source, found = read, branch
        for call in norms:
            normed = calls.each_token(call.y)
            if normed is None or call.name == branch.post_norm:
                continue
            factor = factor_of(normed, read)
            if factor is not None and factor > 0:
                taken = calls.taken(call.name)
                if taken is None:
                    continue
                factor = self._snapped(factor, calls)
                source, found = taken, replace(branch, norm=call.name, input_factor=factor)
                break
        reads = _reads(block, number, calls, source)
        if reads is not None:
            found = replace(found, reads=reads)
        if found.module is None:
            maps = [call for call in calls.trace.calls[1:] if is_linear(call.module)]
            readers = [call.name for call in maps if calls.takes(call, read)]
        else:
            readers = sorted(find_readers(found, calls)[0])
        found = replace(found, readers=tuple(readers))
        return replace(found, act=_activation(calls, found))


def _is_composite(call: Call | None) -> bool:
    return (
        call is not None
        and not is_linear(call.module)
        and any(True for _ in call.module.children())
    )


def _post_norm(calls: BlockCalls, members: list[str]) -> tuple[str | None, list[str]]:
    """A norm that returns a term, and the modules that return what it reads."""
    called = [calls.call(name) for name in members]
    if any(_is_composite(call) and call is not None and not is_norm(call) for call in called):
        return None, members
    norm = next((call for call in called if call is not None and is_norm(call)), None)
    if norm is None:
        return None, members
    raw = calls.taken(norm.name)
    behind = [
        call.name
        for call in calls.trace.calls[1:]
        if (y := calls.each_token(call.y)) is not None and raw is not None and torch.equal(y, raw)
    ]
    return norm.name, behind


def _writer(calls: BlockCalls, raw: Tensor, module: str | None) -> tuple[str | None, float]:
    """The last linear map inside of a branch whose output is the branch, up to a factor."""
    for call in reversed(calls.inside(module)):
        written = calls.each_token(call.y)
        if written is None or written.shape != raw.shape or not is_linear(call.module):
            continue
        factor = factor_of(written, raw)
        if factor is not None and computes_its_map(call):
            return call.name, factor
    return None, 1.0


def _around(calls: BlockCalls, path: str) -> str | None:
    """The module around a branch that it does not return as it is (BLOOM, MPT)."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        call = calls.call(".".join(parts[:depth]))
        if call is not None and call.x is not None and call.x.shape[-1] == calls.hidden:
            return call.name
    return None


def _with_experts(calls: BlockCalls, branch: Branch, raw: Tensor) -> Branch:
    """The fused experts inside of a branch, and the maps that write what stands beside them."""
    inside = calls.inside(branch.module) if branch.module else []
    experts = next((call for call in inside if layout_of(call.module) is not None), None)
    if experts is None or experts.x is None:
        return branch
    returned = calls.returned_by_experts(experts.name)
    if returned is None or returned.shape != raw.shape:
        return replace(branch, writer=None)
    if is_mixture(raw, [returned]):
        return replace(branch, writer=None, experts=experts.name)
    written = [
        (call.name, y)
        for call in inside
        if is_linear(call.module)
        and not call.name.startswith(f"{experts.name}.")
        and (y := calls.each_token(call.y)) is not None
        and y.shape == raw.shape
    ]
    for size in (1, 2):
        for picked in combinations(written, size):
            if is_mixture(raw, [returned, *(y for _, y in picked)]):
                beside = tuple(name for name, _ in picked)
                return replace(branch, writer=None, experts=experts.name, beside=beside)
    return replace(branch, writer=None)


def _is_norm_of_stream(call: Call, calls: BlockCalls) -> bool:
    x = calls.each_token(call.x)
    return x is not None and x.shape == calls.x.shape and is_norm(call)


def _read_by_bare_maps(calls: BlockCalls, branch: Branch) -> Tensor | None:
    """What the last linear map before a bare writer reads."""
    writer = calls.call(branch.writer)
    assert writer is not None
    before = calls.trace.calls[1 : calls.trace.place(writer)]
    maps = [c for c in before if is_linear(c.module) and calls.each_token(c.x) is not None]
    return calls.each_token(maps[-1].x) if maps else None


def _reads(block: Block, number: int, calls: BlockCalls, source: Tensor) -> tuple[int, ...] | None:
    """Which branches are in what a branch reads of the stream."""
    others = [i for i in range(len(block.branches)) if i != number]
    terms = {i: calls.term(block.branches[i]) for i in others}
    for size in range(len(others) + 1):
        for picked in combinations(others, size):
            inside = [terms[i] for i in picked]
            factors = [1.0, *(float(block.branches[i].factor) for i in picked)]
            if all(t is not None for t in inside) and is_sum(
                source, [calls.x, *(t for t in inside if t is not None)], factors
            ):
                return picked
    return None


def _activation(calls: BlockCalls, branch: Branch) -> str | None:
    """The activation function of an FFN: what is run first on what a reader returns."""
    inner = calls.taken(branch.writer)
    if branch.kind != "ffn" or inner is None or branch.experts is not None:
        return None
    made = [y for path in branch.readers if (y := calls.returned(path)) is not None]
    for call in calls.inside(branch.module):
        x, y = calls.each_token(call.x), calls.each_token(call.y)
        if x is None or y is None or y.shape != inner.shape or is_linear(call.module):
            continue
        if call.name in (branch.module, branch.norm) or _is_composite(call):
            continue
        if any(_is_part(x, whole) for whole in made) and not torch.equal(x, y):
            return call.name
    return None


def _is_part(x: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is another one, or some of its units side by side, up to a factor."""
    if x.shape[-1] > whole.shape[-1]:
        return False
    starts = {0, whole.shape[-1] - x.shape[-1]}
    parts = [whole[:, start : start + x.shape[-1]] for start in starts]
    return any(factor_of(part, x) is not None for part in parts)


# -- factors ------------------------------------------------------------------------------------


def constants(model: Any) -> list[float]:
    """The numbers that a configuration gives, which a factor is likely to be one of."""
    found: list[float] = []
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for value in vars(config).values():
            values = value if isinstance(value, list | tuple) else [value]
            for each in values:
                if isinstance(each, float) and each > 0:
                    found += [each, 1 / each]
    config = model.config.get_text_config(decoder=True)
    for size in (getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)):
        if isinstance(size, int):
            found += [math.sqrt(size), 1 / math.sqrt(size), 1 / math.sqrt(2 * size)]
    return found


def _scalars(module: nn.Module) -> list[float]:
    """The parameters and buffers of a block that are one number."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [float(t) for _, t in tensors if t.numel() == 1 and not t.is_meta]


def snapped(factor: float, known: Iterable[float], dtype: torch.dtype) -> float:
    """A measured factor as the number that it is meant to be, where one is near."""
    near = 1e-5 if epsilon(dtype) < 1e-5 else 2 * epsilon(dtype)
    best = min([1.0, *known], key=lambda value: abs(value - factor))
    return best if abs(best - factor) <= near * abs(factor) else factor
