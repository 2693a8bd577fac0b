"""What is around a model's blocks: the list of blocks, embedding tables, final norm, body."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy.behaviour import first_tensor, is_norm, with_first
from trimtab.anatomy.description import Description
from trimtab.anatomy.discovery import snapped
from trimtab.anatomy.numbers import epsilon, factor_of, flat, is_sum, multiple, near, ratio
from trimtab.anatomy.tracing import ALIKE, LENGTH, ROWS, Call, Trace, run
from trimtab.errors import TrimtabError


class NoBlocksError(Exception):
    """Why a model is no stack of blocks with one residual stream."""


# -- the blocks -----------------------------------------------------------------------------------


def find_blocks(model: Any, trace: Trace) -> str:
    """The path of the list of modules that take the residual stream and return it."""
    found, reasons = [], []
    for path, members in _lists(model):
        calls = [[c for c in trace.calls if c.name == f"{path}.{i}"] for i in range(len(members))]
        if not any(calls):
            continue
        reason = _why_no_blocks(path, members, calls)
        if reason is None:
            found.append(path)
        elif len([each for each in calls if each]) > 1:
            reasons.append(reason)
    if len(found) > 1:
        raise NoBlocksError(f"more than one list of blocks runs: {', '.join(found)}")
    if not found:
        raise NoBlocksError("; ".join(reasons[:2]) or "no list of its modules runs")
    return found[0]


def _lists(model: Any) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules."""
    above: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{a}.") for a in above):
            above.append(path)
            yield path, module


def _why_no_blocks(path: str, members: nn.ModuleList, calls: list[list[Call]]) -> str | None:
    ran = [each for each in calls if each]
    for each in ran:
        call = each[0]
        if call.x is None or call.y is None or call.x.shape != call.y.shape or call.y.dim() != 3:
            shapes = [None if t is None else list(t.shape) for t in (call.x, call.y)]
            kind = type(call.module).__name__
            return f"the members of {path} ({kind}) take {shapes[0]} and return {shapes[1]}"
        if call.y.shape[:2] != (ROWS, LENGTH):
            return f"the members of {path} do not see the text as [rows, tokens, units]"
        if not any(True for _ in call.module.children()):
            return f"the members of {path} have nothing inside of them"
    times = max(len(each) for each in ran)
    if times > 1:
        return f"the members of {path} run {times} times in one pass: the model loops over them"
    for number, each in enumerate(calls[: len(ran)]):
        if not each:
            return f"{path}.{number} does not run on a text"
    for number, (before, after) in enumerate(pairwise(ran), 1):
        if not equal(before[0].y, after[0].x):
            return f"{path}.{number} does not read what {path}.{number - 1} returns"
    if len(ran) < len(members) and not calls[len(ran) - 1]:
        return f"only some of {path} run"
    return None


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two activations are the same to the bit, wherever they are."""
    if a is None or b is None or a.shape != b.shape:
        return False
    b = b.to(a.device)
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


# -- body and unembedding -------------------------------------------------------------------------


def find_ends(
    trace: Trace, blocks: str, logits: Tensor, cap: float | None, known: list[float]
) -> tuple[str, str, float, float]:
    """The body, the innermost module around the blocks that takes the tokens and returns what the
    logits are made of; the module that makes them; and the factors before and after it."""
    parts = blocks.split(".")
    makers = [
        (call, after)
        for call in reversed(trace.calls)
        if trace.at(call.name) is call
        and (after := _makes_logits(call, logits, cap, known)) is not None
    ]
    for depth in range(len(parts) - 1, 0, -1):
        body = trace.at(".".join(parts[:depth]))
        if body is None or not _takes_tokens(body) or body.y is None:
            continue
        for maker, after in makers:
            before = None if maker.x is None else _multiple_of(body.y, maker.x)
            if before is not None:
                return body.name, maker.name, snapped(before, known, body.y.dtype), after
    raise NoBlocksError(
        "no module of its own makes the logits of what the module around the blocks returns"
    )


def _makes_logits(
    call: Call, logits: Tensor, cap: float | None, known: list[float]
) -> float | None:
    """The factor with which a module's output gives the logits; None where it does not."""
    y = call.y
    if y is None or call.x is None or y.shape[:-1] != logits.shape[:-1]:
        return None
    if y.shape[-1] < logits.shape[-1] or call.x.shape[-1] == y.shape[-1]:
        return None
    made = y[..., : logits.shape[-1]].to(logits.device)
    before = logits.float()
    if cap is not None:  # what the cap was put on, where it left enough of it
        before = torch.atanh((before / cap).clamp(-0.999, 0.999)) * cap
    measured = ratio(_finite(flat(made).float()), _finite(flat(before)))
    for factor in (1.0, snapped(measured, known, y.dtype), measured):
        if factor and are_logits(made, logits, factor, cap):
            return factor
    return None


def are_logits(made: Tensor, logits: Tensor, factor: float, cap: float | None) -> bool:
    """Whether logits are what an unembedding returned, times a factor and capped."""
    expected = capped(made.float() * factor, cap)
    found = logits.float()
    if not torch.equal(expected.isfinite(), found.isfinite()):
        return False
    expected, found = _finite(expected), _finite(found)
    # A cap leaves little of what large logits differ by.
    room = 8 * epsilon(logits.dtype) * (expected.abs() + expected.abs().mean())
    return bool(((expected - found).abs() <= room).all())


def _finite(x: Tensor) -> Tensor:
    """With nothing where a dtype overflowed."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits that a soft-cap keeps between -cap and cap (Gemma 2)."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


#: What configurations call it (Gemma 2 and others, RecurrentGemma, xLSTM).
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def cap_of(model: Any) -> float | None:
    """The soft-cap of a model's logits, by its configuration."""
    config = model.config.get_text_config(decoder=True)
    caps = [getattr(config, name, None) for name in _CAPS]
    return next((float(cap) for cap in caps if isinstance(cap, int | float) and cap > 0), None)


def _takes_tokens(call: Call) -> bool:
    names = ("input_ids", "inputs_embeds")
    given = any(isinstance(call.kwargs.get(name), Tensor) for name in names)
    first = call.args[0] if call.args else None
    return given or (isinstance(first, Tensor) and not first.is_floating_point())


def _multiple_of(a: Tensor, b: Tensor) -> float | None:
    """The factor with which b is a, wherever the two are; None where it is none."""
    return None if a.shape != b.shape else factor_of(flat(a), flat(b.to(a.device)))


# -- final norm and embedding ---------------------------------------------------------------------


def find_final_norm(trace: Trace, last: Call, body: str) -> str | None:
    """The norm that reads the last block's output and whose output the body returns."""
    returned = trace.at(body)
    for call in trace.calls if returned is not None else ():
        if call.name == body or trace.at(call.name) is not call:
            continue
        assert returned is not None
        if equal(last.y, call.x) and equal(call.y, returned.y) and is_norm(call):
            return call.name
    return None


def find_tables(
    trace: Trace, first: Call, ids: Tensor, known: list[float]
) -> tuple[tuple[str, ...], float]:
    """The embedding tables whose rows, times one factor, are summed to the first block's input."""
    assert first.x is not None
    stream = flat(first.x)
    rows = {}
    for call in trace.calls:
        found = _rows(call, ids, stream.shape[-1])
        if found is not None:
            rows[call.name] = found.to(stream.device)
    for size in (1, 2):
        for picked in combinations(rows, size):
            total = sum((rows[name].double() for name in picked), torch.zeros(()))
            factor = ratio(total, stream)
            for each in (snapped(factor, known, stream.dtype), factor):
                if each and is_sum(stream, [rows[name] for name in picked], [each] * size):
                    return picked, each
    return (), 1.0


def _rows(call: Call, ids: Tensor, width: int) -> Tensor | None:
    """The rows of its table that an embedding returned, whatever it multiplied them by."""
    weight: Any = getattr(call.module, "weight", None)
    if not isinstance(call.module, nn.Embedding) or weight is None or weight.shape[-1] != width:
        return None
    if call.y is None or call.y.shape[-1] != width:
        return None
    if weight.is_meta:
        return None
    if len(weight) > int(ids.max()):
        tokens: Tensor = weight.detach()[ids.to(weight.device).flatten()]
        if factor_of(tokens, flat(call.y)) is not None:
            return tokens
    if call.y.numel() == width * LENGTH:  # positions, alike for all rows
        rows = _nearest(weight.detach(), flat(call.y))
        return None if rows is None else rows.repeat(ROWS, 1)
    if call.y.numel() == width * LENGTH * ROWS:
        return _nearest(weight.detach(), flat(call.y))
    return None


def _nearest(weight: Tensor, returned: Tensor) -> Tensor | None:
    """The rows of a table that are exactly what was returned."""
    matches = [(weight == row.to(weight)).all(-1).nonzero() for row in returned]
    if not all(len(match) for match in matches):
        return None
    return weight[torch.stack([match[0, 0] for match in matches])]


# -- proof ----------------------------------------------------------------------------------------


@dataclass
class Outer:
    """What a pass showed of everything outside of the blocks."""

    trace: Trace
    first: Call
    last: Call
    logits: Tensor
    ids: Tensor


def prove_outer(model: Any, description: Description, outer: Outer) -> dict[str, str]:
    """What of the parts around the blocks does not hold: "causal", "body", "final_norm",
    "tables"."""
    problems: dict[str, str] = {}
    if outer.last.y is None or not outer.last.y.isfinite().all():
        return problems  # what is not finite proves nothing; `knowing.py` says so
    if not is_causal(outer.logits):
        problems["causal"] = (
            "what it says of a token depends on later tokens, so that it is no causal language "
            "model"
        )
    problems |= _prove_final_norm(model, description, outer)
    problems |= _prove_ends(model, description, outer)
    if description.tables:
        rows = []
        for name in description.tables:
            call = outer.trace.at(name)
            found = None if call is None else _rows(call, outer.ids, outer.first.x.shape[-1])  # type: ignore[union-attr]
            rows.append(found)
        assert outer.first.x is not None
        stream, scale = flat(outer.first.x), float(description.embedding_factor)
        known = [row.to(stream.device) for row in rows if row is not None]
        if len(known) < len(rows) or not is_sum(stream, known, [scale] * len(known)):
            names = " + ".join(description.tables)
            problems["tables"] = f"the first block does not read {scale:g} * ({names})"
    return problems


def _prove_final_norm(model: Any, description: Description, outer: Outer) -> dict[str, str]:
    name = description.final_norm
    if name is None:
        if not reads_only_last(model, description, outer):
            return {"final_norm": "the logits depend on more than what the last block returns"}
        return {}
    norm, body = outer.trace.at(name), outer.trace.at(description.body)
    if norm is None or norm.y is None or not is_norm(norm):
        return {"final_norm": f"{name} is no norm that runs once"}
    if not equal(outer.last.y, norm.x):
        return {"final_norm": f"{name} does not read what the last block returns"}
    if body is None or not equal(norm.y, body.y):
        return {"final_norm": f"{description.body} does not return what {name} returns"}
    return {}


def _prove_ends(model: Any, description: Description, outer: Outer) -> dict[str, str]:
    """The body returns what the unembedding reads, and that makes the logits."""
    body, maker = outer.trace.at(description.body), outer.trace.at(description.unembedding)
    if body is None or body.y is None:
        return {"body": f"{description.body} does not run once, or returns no activations"}
    if maker is None or maker.x is None or maker.y is None:
        return {"body": f"{description.unembedding} does not run once"}
    read, before = flat(maker.x).to(body.y.device), float(description.final_factor)
    if maker.x.shape != body.y.shape or not multiple(flat(body.y), read, before):
        return {"body": f"{description.unembedding} does not read what {description.body} returns"}
    made = maker.y[..., : outer.logits.shape[-1]].to(outer.logits.device)
    after = float(description.logit_factor)
    if made.shape != outer.logits.shape or not are_logits(made, outer.logits, after, cap_of(model)):
        times = "" if after == 1 else f"{after:g} times "
        return {"body": f"the logits are not {times}what {description.unembedding} returns"}
    return {}


def is_causal(logits: Tensor) -> bool:
    """Whether two texts that begin alike have the same logits while they are alike."""
    alike = _finite(logits[:, :ALIKE].float())
    tolerance = 1e-3 if epsilon(logits.dtype) < 1e-5 else 0.1
    return near(flat(alike[1:]), flat(alike[:1]), tolerance)


@torch.no_grad()
def reads_only_last(model: Any, description: Description, outer: Outer) -> bool:
    """Whether the logits come from the last block's output alone: where that is one and the same
    for all tokens, so are the logits."""
    block = model.get_submodule(description.blocks)[len(description.layers) - 1]

    def alike(module: nn.Module, args: Any, output: Any) -> Any:
        first = first_tensor(output)
        if first is None:
            return output
        return with_first(output, first[:1, :1].expand_as(first).contiguous())

    handle = block.register_forward_hook(alike)
    try:
        logits = run(model, outer.ids)
    finally:
        handle.remove()
    rows = flat(logits)
    tolerance = 1e-3 if epsilon(rows.dtype) < 1e-5 else 0.05
    return near(rows, rows[:1].expand_as(rows), tolerance)


def refuse_encoder_decoder(model: Any, name: str) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise TrimtabError(
            f"cannot steer this {name} model ({type(model).__name__}): it is an encoder-decoder, "
            "where the prompt and the answer have a residual stream each; registering it is no "
            "way out, because trimtab's sites are those of one stream"
        )
