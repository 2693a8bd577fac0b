"""Routers of mixtures: where their logits are, and a pass in which they are others.

A router makes one logit of each expert and token; from these it chooses k experts and their
weights, in a way of its own: softmax or sigmoid, with a bias for the choice, in groups. No boundary
of modules shows its logits, the site `router`. `router_forward` runs the router's own code and
changes what the linear map in it returns, so that all that follows from the logits is done again
exactly as the model does it.

Where a router chooses by other scores than its logits (DeepSeek's, with a bias and in groups), no
logit is large enough to be sure of a place among the k. So the scores by which it chooses can be
changed, too ("router_choice"): that changes which experts are chosen, and their weights stay what
the router gives them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trimtab.anatomy.sites import Edit


@dataclass(frozen=True)
class Router:
    """The router of one layer."""

    #: Its path from the block.
    path: str
    #: How many logits it makes of a token.
    width: int
    #: How many experts it chooses for a token.
    chosen: int
    #: Its linear map: the module that has the weight [logits, units], and whether with a bias. The
    #: empty path is the router itself; None where no parameter is what it maps by.
    owner: str | None
    biased: bool


# -- the pass ---------------------------------------------------------------------------------


@dataclass
class RouterEdits:
    """The edits at one router, in their order, each with the side of its `Point`."""

    width: int
    edits: list[tuple[str, Edit]] = field(default_factory=list)


def router_forward(router: Any, shown: RouterEdits, *args: Any, **kwargs: Any) -> Any:
    """A router's own forward pass, in which the edits see its logits, and those of the side
    "router_choice" the scores by which it chooses."""
    with _Logits(shown):
        hook = vars(router)["forward"]
        return (hook.before or type(router).forward.__get__(router))(*args, **kwargs)


class _Logits(TorchFunctionMode):
    """While it is on, linear maps that return `width` units have the edits done to what they
    return, and the choice among as many scores those that are of the choice."""

    def __init__(self, shown: RouterEdits) -> None:
        super().__init__()
        self._width = shown.width
        self._edits = [edit for side, edit in shown.edits if side == "router"]
        self._choices = [edit for side, edit in shown.edits if side == "router_choice"]
        self._shape: torch.Size | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._choices and func in _CHOOSING and args and args[0].shape == self._shape:
            return _chosen(func, self._choices, args, kwargs)
        output = func(*args, **kwargs)
        if func is not nn.functional.linear or output.shape[-1] != self._width:
            return output
        self._shape = output.shape
        return _edited(output, self._edits)


_CHOOSING = (torch.topk, Tensor.topk)


def _edited(x: Tensor, edits: list[Edit]) -> Tensor:
    for edit in edits:
        changed = edit(x)
        x = x if changed is None else changed
    return x


def _chosen(func: Any, edits: list[Edit], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The largest scores after the edits, with the values that these have without them."""
    scores = args[0]
    indices = func(_edited(scores, edits), *args[1:], **kwargs).indices
    return torch.return_types.topk((scores.gather(-1, indices), indices))
