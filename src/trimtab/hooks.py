"""Puts functions on sites of a live model and takes them off again.

A hook sees an activation of shape [rows, tokens, units] and returns a new one, or None to leave
it as it is. Modules that return tuples keep their tuple; nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from torch import nn

from trimtab.anatomy import Edit, Point, experts_forward
from trimtab.errors import TrimtabError


class _Hook(partial[Any]):
    """A function on a model. Whoever copies or pickles the model with it on is told: the copy would
    stay changed for ever."""

    def __reduce__(self) -> NoReturn:
        raise TrimtabError(
            "cannot copy a model while it is steered or read: the copy would stay so; copy it "
            "outside the block"
        )


@contextmanager
def hooked(edits: Mapping[Point, Edit]) -> Iterator[None]:
    """Run every edit at its point while the block lasts; removed whatever happens inside."""
    removers: list[Callable[[], None]] = []
    try:
        for point, edit in edits.items():
            removers.append(_install(point, edit))
        yield
    finally:
        for remove in reversed(removers):
            remove()


def is_hooked(model: nn.Module) -> bool:
    """Whether an edit is on the model at this moment."""
    ours = (_on_output, _on_input, experts_forward)
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        for function in (*hooks, vars(module).get("forward")):
            if isinstance(function, partial) and function.func in ours:
                return True
    return False


def _install(point: Point, edit: Edit) -> Callable[[], None]:
    if point.side == "output":
        return point.module.register_forward_hook(_Hook(_on_output, edit)).remove
    if point.side == "input":
        hook = _Hook(_on_input, edit)
        return point.module.register_forward_pre_hook(hook, with_kwargs=True).remove
    return _on_experts(point.module, edit)


def _on_output(edit: Edit, module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, tuple):
        return edit(output)
    edited = edit(output[0])
    return None if edited is None else (edited, *output[1:])


def _on_input(edit: Edit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        edited = edit(args[0])
        return None if edited is None else ((edited, *args[1:]), kwargs)
    edited = edit(kwargs["hidden_states"])
    return None if edited is None else (args, {**kwargs, "hidden_states": edited})


def _on_experts(block: nn.Module, edit: Edit) -> Callable[[], None]:
    """Replace a mixture's forward; a second edit joins the first one's list."""
    forward = vars(block).get("forward")  # somebody else's, ours, or none
    ours = isinstance(forward, partial) and forward.func is experts_forward
    if forward is not None and ours:
        edits: list[Edit] = forward.args[1]
        edits.append(edit)
    else:
        edits = [edit]
        object.__setattr__(block, "forward", _Hook(experts_forward, block, edits))

    def remove() -> None:
        edits.remove(edit)
        if not edits:
            if forward is None or ours:
                object.__delattr__(block, "forward")
            else:
                object.__setattr__(block, "forward", forward)

    return remove
