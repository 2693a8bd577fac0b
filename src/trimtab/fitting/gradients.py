"""What scaling units does to a figure of the texts, from one backward pass over them.

Multiplying unit i of a site by 1 + g at some tokens changes a figure m by

    e_i g,    e_i = sum over these tokens of  x_i dm/dx_i

for small g. Activations at all wanted sites and the gradient of m there come out of one forward and
one backward pass, so that e of every unit of a model costs about three forward passes. The graph is
kept from the lowest wanted site on, weights get no gradient, the LM head runs only where a token is
scored and forgets its logits at once, and each gradient is used up as it comes by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.anatomy import Anatomy, Edit, Point, exclusively, hooked
from trimtab.errors import TrimtabError, first_line
from trimtab.model import LanguageModel
from trimtab.reading import Batch, run_packed

#: Logits in float32 whose gradient is taken at once.
_LOGITS = 1 << 25
#: Numbers that a block keeps of a token for the backward pass, in widths of the stream: those of
#: its norms and its attention, and those of an FFN three or four times as wide.
_KEPT = 28
#: The share of free memory that the graph of one batch may take; what needs more is checkpointed.
_SHARE = 0.5


@dataclass(frozen=True)
class Scored:
    """Tokens whose log-probabilities make up a figure: the sum of weight times log p(target), read
    at the columns before the targets. All [tokens]; `lines` and `columns` are of a batch."""

    lines: Tensor
    columns: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Summed:
    """What is kept of the products at a site: `weights` [lines, tokens] say which tokens count,
    `read` what is made of activation and gradient (None: their product)."""

    weights: Tensor
    read: Any = None


#: From what the final norm puts out, [lines, tokens, units], to the tokens that are scored.
Figure = Callable[[Tensor], Scored]


def run_gradients(
    language_model: LanguageModel,
    batch: Batch,
    sums: Mapping[str, Mapping[Any, Summed]],
    figures: Sequence[Figure],
    readers: Mapping[str, Edit] | None = None,
) -> dict[Any, Tensor]:
    """Run a batch forward once and backward once for each figure.

    `sums` says what to keep at each site, by any keys; each becomes [figures, lines, numbers] in
    float32. `readers` see the activations of sites on the way.
    """
    anatomy, readers = language_model.anatomy, readers or {}
    found: dict[Any, list[Tensor]] = {key: [] for kept in sums.values() for key in kept}
    # What every activation of a wanted site is joined to, so that there is a way back to it.
    with torch.inference_mode(False):
        anchor = torch.zeros((), requires_grad=True)
    goes_back = False
    moved: dict[Any, Tensor] = {}

    def take(site: str, activation: Tensor, gradient: Tensor) -> None:
        wide = torch.promote_types(activation.dtype, torch.float32)
        x, slope = activation.to(wide), gradient.to(wide)
        products: dict[Any, Tensor] = {}
        for key, kept in sums[site].items():
            if kept.read not in products:
                products[kept.read] = kept.read(x, slope) if kept.read else x * slope
            # Layers that read others' keys see a text's last tokens alone.
            weights = there(kept.weights, x)[:, None, -x.shape[1] :]
            found[key].append((weights @ products[kept.read])[:, 0].float())

    def there(weights: Tensor, x: Tensor) -> Tensor:
        """On the device of a site, where they are moved once for all sites."""
        key = id(weights), x.device, x.dtype
        if key not in moved:
            moved[key] = weights.to(x)
        return moved[key]

    def watch(site: str) -> Edit:
        def edit(x: Tensor) -> Tensor | None:
            if site in readers and not goes_back:  # a block may run again on the way back
                readers[site](x.detach())
            return _Seen.apply(x, anchor, partial(take, site))  # type: ignore[no-untyped-call, no-any-return]

        return edit if site in sums else readers[site]

    points = {site: anatomy.read_point(site) for site in {**sums, **readers}}
    edits: dict[Point, Edit] = {point: watch(site) for site, point in points.items()}
    shape = batch.tokens.shape[0], batch.tokens.shape[1]
    with with_gradients(language_model, shape), hooked(anatomy.body, edits):
        hidden = run_packed(batch, language_model).last_hidden_state
        known = hidden.detach()
        slopes = [_slope(language_model, known, figure(known)) for figure in figures]
        goes_back = True
        for number, slope in enumerate(slopes):
            _go_back(language_model, hidden, slope, anchor, number + 1 < len(slopes))
    for site, kept in sums.items():
        if any(len(found[key]) < len(figures) for key in kept):
            raise TrimtabError(
                f"no gradient arrives at {site} when {language_model.name} runs: its code, or "
                "a kernel that replaces it, cannot be differentiated from there on"
            )
    return {key: torch.stack(values) for key, values in found.items()}


class _Seen(torch.autograd.Function):
    """Hands on an activation as a tensor of its own, so that the gradient is that of whoever reads
    the site, and passes both to `take` on the way back. An activation that was overwritten by then
    is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, take: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.take(*ctx.saved_tensors, *gradients)
        return gradients[0], None, None


def _go_back(
    language_model: LanguageModel, hidden: Tensor, slope: Tensor, anchor: Tensor, again: bool
) -> None:
    """One backward pass, from what the final norm put out."""
    if not hidden.requires_grad:
        return
    try:
        # In this thread: what runs again on the way back is to find what hooks noted here.
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.backward(hidden, slope, retain_graph=again, inputs=[anchor])
    except (RuntimeError, NotImplementedError) as error:
        if any(sign in str(error) for sign in ("out of memory", "allocate memory")):
            raise
        raise TrimtabError(
            f"{language_model.name} cannot be differentiated ({first_line(error)}): choose units "
            "by another score (locate momentum), or load the model otherwise"
        ) from error


@contextmanager
def with_gradients(language_model: LanguageModel, shape: tuple[int, int]) -> Iterator[None]:
    """Passes over batches of a shape, [lines, tokens], keep their graph while the block lasts; no
    weight gets a gradient."""
    if any(weight.is_inference() for weight in language_model.model.parameters()):
        raise TrimtabError(
            f"{language_model.name} was loaded inside of torch.inference_mode(), so that nothing "
            "of it can be differentiated: load it outside"
        )
    with (
        exclusively(language_model.anatomy.body),
        torch.inference_mode(False),
        torch.enable_grad(),
        _frozen(language_model.model),
        _lean(language_model, shape),
    ):
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight gets a gradient while the block lasts."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in learning:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learning:
            weight.requires_grad_(True)


def _slope(language_model: LanguageModel, hidden: Tensor, scored: Scored) -> Tensor:
    """The gradient of a figure at what the final norm puts out; logits are made and forgotten
    for a few tokens at a time."""
    slope = torch.zeros_like(hidden)
    lines, columns, targets, weights = (
        x.to(hidden.device) for x in (scored.lines, scored.columns, scored.targets, scored.weights)
    )
    vocabulary = language_model.model.get_output_embeddings().weight.shape[0]
    for chunk in torch.arange(len(lines), device=hidden.device).split(
        max(1, _LOGITS // vocabulary)
    ):
        places = lines[chunk], columns[chunk]
        read = hidden[places].requires_grad_(True)
        log_p = language_model.unembed(read).log_softmax(-1)
        own = log_p.gather(-1, targets[chunk, None].to(log_p.device)).squeeze(-1)
        (part,) = torch.autograd.grad((own * weights[chunk].to(own)).sum(), read)
        slope.index_put_(places, part, accumulate=True)
    return slope


# -- memory ---------------------------------------------------------------------------------------


@contextmanager
def _lean(language_model: LanguageModel, shape: tuple[int, int]) -> Iterator[None]:
    """Where the graph of a batch would take too much memory, each block forgets what is inside it
    and runs again in the backward pass."""
    blocks = language_model.anatomy.blocks
    if not asks_for_memory(language_model, shape):
        yield
        return
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
            object.__setattr__(block, "forward", forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is not None:
                object.__setattr__(block, "forward", own)
            else:
                object.__delattr__(block, "forward")


def asks_for_memory(language_model: LanguageModel, shape: tuple[int, int]) -> bool:
    """Whether the graph of a batch, [lines, tokens], takes too much of the memory that is free."""
    anatomy, (lines, length) = language_model.anatomy, shape
    size = max(2, next(anatomy.body.parameters()).element_size())
    numbers = lines * length * anatomy.hidden_size * _KEPT
    if getattr(anatomy.config, "_attn_implementation", None) == "eager":  # which keeps its weights
        numbers += 3 * lines * length * length * _heads(anatomy)
    return anatomy.layers * numbers * size > _SHARE * _free(language_model.device)


def _heads(anatomy: Anatomy) -> int:
    heads = getattr(anatomy.config, "num_attention_heads", 0)
    return heads if isinstance(heads, int) else 0


def _free(device: torch.device) -> float:
    """Bytes of memory that are free."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + own)
