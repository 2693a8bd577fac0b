"""From a model in memory to a description of it that is proved.

A description comes from one of three places, in this order: what the user registered for the model
type, which is refused where it does not hold; the entry that trimtab has or the description that an
earlier discovery left in the cache, neither of them believed before it is proved; and discovery.
Whatever it comes from, one pass over two short texts proves it, with the branches run again on
other activations, which together takes about three passes' time.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from trimtab.anatomy.architectures import Architecture, find_registered
from trimtab.anatomy.description import Block, Description
from trimtab.anatomy.discovery import Finder, constants
from trimtab.anatomy.drawing import ranges
from trimtab.anatomy.entries import ENTRIES
from trimtab.anatomy.exclusive import exclusively_whole
from trimtab.anatomy.hooks import eager, is_hooked
from trimtab.anatomy.outer import (
    NoBlocksError,
    Outer,
    cap_of,
    equal,
    find_blocks,
    find_ends,
    find_final_norm,
    find_tables,
    prove_outer,
    refuse_encoder_decoder,
)
from trimtab.anatomy.proof import BlockCalls, Problems, Shown, prove_block
from trimtab.anatomy.routers import Router
from trimtab.anatomy.routing import find_router
from trimtab.anatomy.tracing import Call, Trace, probe_ids, survey, trace_blocks
from trimtab.errors import TrimtabError, TrimtabWarning, first_line
from trimtab.files import cache_dir, write_whole

#: Goes up when discovery learns to find more, so that what it left out before is looked for again.
_DISCOVERY = 1

_NOT_FINITE = "its activations are NaN or infinite on a short text"

#: What models raise that take something else than text, or run elsewhere.
DOES_NOT_RUN = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


@dataclass
class Known:
    """A description with what of it does not hold: of layers by number, branch and aspect, and of
    what is around them by name."""

    description: Description
    #: Units of the residual stream.
    width: int
    layers: list[Problems] = field(default_factory=list)
    around: dict[str, str] = field(default_factory=dict)
    #: In each layer the modules that see the tokens of all rows in one list, [tokens, units].
    flat: list[frozenset[str]] = field(default_factory=list)
    #: Of each layer the router of its mixture, or why it has none.
    routers: list[Router | str] = field(default_factory=list)
    #: "registered", "entry", "cache" or "discovery".
    source: str = "discovery"

    def first_problem(self) -> str | None:
        """What does not hold, for people; of several the first."""
        for name in ("causal", "body", "final_norm", "tables"):
            if name in self.around:
                return self.around[name]
        for number, problems in enumerate(self.layers):
            for reason in problems.values():
                return f"layer {number}: {reason}"
        return None


def know(model: Any) -> Known:
    """A proved description of a model. Raises TrimtabError where it cannot be steered."""
    name = str(model.config.model_type)
    refuse_encoder_decoder(model, name)
    if model.get_output_embeddings() is None:
        raise TrimtabError(
            f"this {name} model ({type(model).__name__}) is no causal language model: it has no "
            "LM head to write with; load it with AutoModelForCausalLM"
        )
    with exclusively_whole(model), eager(), torch.no_grad():
        if is_hooked(model):
            raise TrimtabError(
                f"cannot look at this {name} model while it is steered or read, because what it "
                "computes is not its own: wrap it before the block, or after it"
            )
        registered = find_registered(name)
        if registered is not None:
            return _registered(model, name, registered)
        entry = ENTRIES.get(name)
        if entry is not None:
            known = _claimed(model, entry)
            if known is not None:
                return known
        cached = _read_cache(model)
        if cached is not None:
            described = cached.description
            proved = _proved(model, described, [[block] for block in described.layers], "cache")
            if isinstance(proved, Known) and _noted(proved) == cached.problems:
                return proved
        known = discover(model)
        _write_cache(model, _Cached(known.description, _noted(known)))
        return known


def discover(model: Any) -> Known:
    """A description found without any hint, and proved."""
    name = str(model.config.model_type)
    try:
        ids = probe_ids(model)
        trace, logits = survey(model, ids)
        blocks = find_blocks(model, trace)
    except NoBlocksError as error:
        raise _refusal(model, name, f"no residual stream runs through it: {error}") from error
    except DOES_NOT_RUN as error:
        reason = first_line(error) or type(error).__name__
        raise _refusal(model, name, f"it does not run on a short text: {reason}") from error
    calls = [c for c in trace.calls if c.name.rpartition(".")[0] == blocks]
    streams = _several_streams(model, calls[0])
    if streams is not None:
        raise _refusal(model, name, streams)
    constant = constants(model)
    try:
        body, maker, before, after = find_ends(trace, blocks, logits, cap_of(model), constant)
    except NoBlocksError as error:
        raise _refusal(model, name, str(error)) from error
    tables, factor = find_tables(trace, calls[0], ids, constant)
    description = Description(
        body=body,
        blocks=blocks,
        layers=(Block(),) * len(calls),
        final_norm=find_final_norm(trace, calls[-1], body),
        unembedding=maker,
        final_factor=before,
        logit_factor=after,
        tables=tables,
        embedding_factor=factor,
    )
    known = _proved(model, description, None, "discovery")
    if isinstance(known, str):
        raise _refusal(model, name, known)
    for aspect in ("causal", "body", "final_norm"):
        if aspect in known.around:
            raise _refusal(model, name, known.around[aspect])
    return known


def _several_streams(model: Any, first: Call) -> str | None:
    """Why the stream is more than one, None where it is one."""
    size = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    assert first.x is not None
    width = first.x.shape[-1]
    if not isinstance(size, int) or width == size or width % size:
        return None
    return f"its blocks take {width // size} residual streams of {size} units, side by side"


def _refusal(model: Any, name: str, reason: str) -> TrimtabError:
    return TrimtabError(
        f"cannot steer this {name} model ({type(model).__name__}): {reason}; registering an "
        "architecture is no way out, because steering needs one residual stream to act on"
    )


def _registered(model: Any, name: str, architecture: Architecture) -> Known:
    known = _claim(model, architecture, "registered")
    reason = known if isinstance(known, str) else known.first_problem()
    if reason is not None:
        raise TrimtabError(
            f"what is registered for {name} does not hold for this model "
            f"({type(model).__name__}): {reason}"
        )
    assert isinstance(known, Known)
    return known


def _claimed(model: Any, architecture: Architecture) -> Known | None:
    """What an entry of trimtab's own says, where all of it holds."""
    known = _claim(model, architecture, "entry")
    return known if isinstance(known, Known) and known.first_problem() is None else None


def _claim(model: Any, architecture: Architecture, source: str) -> Known | str:
    try:
        described, layers = architecture.described(model)
    except AttributeError as error:
        return first_line(error)
    return _proved(model, described, layers, source)


class _Layers:
    """Proves the layers of a model one by one while it runs, or finds them."""

    def __init__(self, model: Any, options: Sequence[Sequence[Block]] | None) -> None:
        self._shown = Shown(_heads(model))
        #: The descriptions that each layer may have; where there are none they are found.
        self._options = options
        self._finder = Finder(model, self._shown)
        self.found: list[tuple[Block, Problems]] = []
        self.flat: list[frozenset[str]] = []
        self.routers: list[Router | str] = []
        #: The first block's call and the last one's so far, without what is inside.
        self.ends: list[Call] = []
        #: Why the blocks do not hand on one stream.
        self.broken: str | None = None
        #: Layers of which nothing could be proved, because their activations are not finite.
        self.unproved: list[int] = []

    def visit(self, layer: int, trace: Trace) -> None:
        """Look at a block that has run; the first that breaks the stream ends it."""
        top = trace.calls[0] if trace.calls else None
        self.broken = self.broken or self._break(layer, top)
        if self.broken is not None or top is None or top.x is None or top.y is None:
            return
        self.ends = [*self.ends[:1], Call("", top.module, (), {}, None, top.x, top.y)]
        self.flat.append(frozenset(c.name for c in trace.calls if _is_flat(c.x) or _is_flat(c.y)))
        if not (top.x.isfinite().all() and top.y.isfinite().all()):
            self.unproved.append(layer)
            self.routers.append(_NOT_FINITE)
            self.found.append((self._options[layer][0] if self._options else Block(), {}))
            return
        calls = BlockCalls(trace, top.x.shape[-1])
        self.routers.append(find_router(calls))
        if self._options is not None:
            self.found.append(_best(self._options[layer], calls, self._shown))
            return
        block, reason = self._finder.block(calls)
        problems = prove_block(block, calls, self._shown)
        self.found.append((block, problems if reason is None else {(None, "stream"): reason}))

    def _break(self, layer: int, top: Call | None) -> str | None:
        """Why the stream ends at a block; None where it does not."""
        if top is None or top.x is None or top.y is None or layer != len(self.found):
            return f"block {layer} does not run once, in its turn"
        if top.x.shape != top.y.shape or top.x.dim() != 3:
            return f"block {layer} does not return what it takes, [rows, tokens, units]"
        if self.ends and not equal(self.ends[-1].y, top.x):
            return f"block {layer} does not read what block {layer - 1} returns"
        return None


def _proved(
    model: Any, description: Description, options: Sequence[Sequence[Block]] | None, source: str
) -> Known | str:
    """Prove a description by one pass, or say why it is none; with several blocks to choose from
    for a layer, the first one that holds is taken, and without any they are found."""
    ids, layers = probe_ids(model), _Layers(model, options)
    blocks = list(model.get_submodule(description.blocks).children())[: len(description.layers)]
    names = {description.unembedding, description.body, *description.tables}
    around = {name: model.get_submodule(name) for name in names}
    if description.final_norm is not None:
        around[description.final_norm] = model.get_submodule(description.final_norm)
    try:
        trace, logits = trace_blocks(model, ids, blocks, around, layers.visit)
    except DOES_NOT_RUN as error:
        return f"it does not run on a short text: {first_line(error) or type(error).__name__}"
    if layers.broken is not None or len(layers.found) < len(blocks):
        return layers.broken or "its blocks do not run once each"
    if layers.unproved and options is None:
        return f"in {str(model.dtype).removeprefix('torch.')} {_NOT_FINITE}"
    if layers.unproved:
        warnings.warn(
            f"{_NOT_FINITE} in layers {ranges(layers.unproved)}: what is known of these is not "
            "proved",
            TrimtabWarning,
            stacklevel=2,
        )
    description = replace(description, layers=tuple(block for block, _ in layers.found))
    first, last = layers.ends[0], layers.ends[-1]
    problems = prove_outer(model, description, Outer(trace, first, last, logits, ids))
    width = 0 if first.x is None else int(first.x.shape[-1])
    of_layers = [problems for _, problems in layers.found]
    flat, routers = layers.flat, layers.routers
    return Known(description, width, of_layers, problems, flat, routers, source)


def _is_flat(x: torch.Tensor | None) -> bool:
    return x is not None and x.dim() == 2


def _best(options: Sequence[Block], calls: BlockCalls, shown: Shown) -> tuple[Block, Problems]:
    """The first of several descriptions of a layer that holds, else the one that nearly does."""
    tried: list[tuple[Block, Problems]] = []
    for block in options:
        problems = prove_block(block, calls, shown)
        if not problems:
            return block, problems
        tried.append((block, problems))
    return min(tried, key=lambda each: ((None, "stream") in each[1], len(each[1])))


def _heads(model: Any) -> int | None:
    heads = getattr(model.config.get_text_config(decoder=True), "num_attention_heads", None)
    return heads if isinstance(heads, int) and heads > 0 else None


# -- the cache ------------------------------------------------------------------------------------


@dataclass
class _Cached:
    """What a discovery found, and what of it did not hold, which has to be the same again."""

    description: Description
    problems: list[str]


_CACHED = TypeAdapter(_Cached)


def _noted(known: Known) -> list[str]:
    layers = [
        f"{layer} {branch} {aspect}"
        for layer, problems in enumerate(known.layers)
        for branch, aspect in problems
    ]
    return sorted([*layers, *known.around])


def cache_file(model: Any, *further: Any) -> Path:
    """Where something is remembered of all models of an architecture and a configuration, as this
    version of transformers computes them; `further` is what it depends on besides."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version"):
        config.pop(name, None)
    parts = [_DISCOVERY, version("transformers"), type(model).__qualname__, config, *further]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / "anatomy" / f"{digest}.json"


def _read_cache(model: Any) -> _Cached | None:
    """What an earlier discovery found; anything else there is as if nothing were."""
    try:
        cached = _CACHED.validate_json(cache_file(model).read_bytes())
        description = cached.description
        blocks = model.get_submodule(description.blocks)
        names = (description.body, description.unembedding, *description.tables)
        for name in (*names, description.final_norm or ""):
            model.get_submodule(name)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    whole = isinstance(blocks, nn.ModuleList) and len(description.layers) <= len(blocks)
    return cached if whole and description.layers else None


def _write_cache(model: Any, found: _Cached) -> None:
    try:
        path = cache_file(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _CACHED.dump_json(found), overwrite=True)
    except (OSError, ValueError, TypeError, TrimtabError):
        pass  # a cache that cannot be written costs the next load some time, and nothing else
