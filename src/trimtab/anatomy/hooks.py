"""Puts functions on sites of a live model and takes them off again.

A hook sees an activation of shape [rows, tokens, units] and returns a new one, or None to leave
it as it is. Modules that return tuples keep their tuple; nothing is changed in place.

While something is hooked, compiled code is off: what was compiled before knows nothing of a hook,
and what would be compiled now would keep it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy.behaviour import find_input, first_tensor, with_first
from trimtab.anatomy.exclusive import exclusively
from trimtab.anatomy.experts import ExpertEdits, experts_forward, layout_of
from trimtab.anatomy.routers import RouterEdits, router_forward
from trimtab.anatomy.sites import Edit, Point
from trimtab.errors import TrimtabError


class Hook(partial[Any]):
    """A function of ours on a module: known as ours, and never copied along with the module."""

    #: What it stands in place of.
    before: Any = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TrimtabError(
            "cannot copy or pickle a model while it is steered, because the copy would stay so: "
            "do it after the block"
        )


class Enough(Exception):  # noqa: N818, it is a signal and no error
    """Raised by an edit that has seen all that is wanted of a pass, which ends there."""


@contextmanager
def hooked(body: nn.Module, edits: Mapping[Point, Edit]) -> Iterator[None]:
    """Run every edit at its point of the model with this transformer body while the block lasts;
    removed whatever happens inside."""
    removers: list[Callable[[], None]] = []
    with exclusively(body), eager():
        try:
            for point, edit in edits.items():
                removers.append(install(point, edit))
            yield
        finally:
            for remove in reversed(removers):
                remove()


def is_hooked(model: nn.Module) -> bool:
    """Whether an edit is on the model at this moment."""
    ours = (_on_output, _on_input, _on_rows, experts_forward, router_forward)
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        for function in (*hooks, vars(module).get("forward")):
            if isinstance(function, Hook) and function.func in ours:
                return True
    return False


class _Eager:
    """How many blocks need uncompiled code, and what to do when the last one ends.

    The compiler's stance is one for the whole process, so blocks that overlap share it.
    """

    lock = threading.Lock()
    blocks = 0
    stance: Any = None


@contextmanager
def eager() -> Iterator[None]:
    """Run modules as they are written, also those that are compiled."""
    with _Eager.lock:
        if _Eager.blocks == 0:
            try:
                _Eager.stance = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:  # torch is compiling the caller
                raise TrimtabError(
                    "a model cannot be steered or read inside of a compiled function: compile "
                    "what is inside the block, or nothing of it"
                ) from error
        _Eager.blocks += 1
    try:
        yield
    finally:
        with _Eager.lock:
            _Eager.blocks -= 1
            if _Eager.blocks == 0:
                _Eager.stance.__exit__(None, None, None)  # back to what it was before


def install(point: Point, edit: Edit) -> Callable[[], None]:
    """Put an edit at a point, and return what takes it off again."""
    if point.side in ("experts", "expert_acts"):
        return _on_experts(point, edit)
    removers: list[Callable[[], None]] = []
    if point.around is not None:
        edit = _Listed(edit)
        noting = point.around.register_forward_pre_hook(Hook(_on_rows, edit), with_kwargs=True)
        removers.append(noting.remove)
    if point.side in ("router", "router_choice"):
        removers.append(_on_router(point, edit))
    elif point.side == "output":
        handle = point.module.register_forward_hook(Hook(_on_output, edit))
        _ours_first(point.module._forward_hooks)
        removers.append(handle.remove)
    else:
        hook = Hook(_on_input, edit)
        handle = point.module.register_forward_pre_hook(hook, with_kwargs=True)
        _ours_first(point.module._forward_pre_hooks)
        removers.append(handle.remove)

    def remove() -> None:
        for each in reversed(removers):
            each()

    return remove


class _Listed:
    """An edit at a module that sees the tokens of all rows in one list, [tokens, units]."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit
        self._shape = threading.local()

    def notice(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the rows and tokens of the pass, from what a module around it is given."""
        place = find_input(args, kwargs)
        if place is not None:
            x = args[place] if isinstance(place, int) else kwargs[place]
            self._shape.rows = x.shape[0]

    def __call__(self, x: Tensor) -> Tensor | None:
        if x.dim() != 2:
            return self._edit(x)
        edited = self._edit(x.unflatten(0, (self._shape.rows, -1)))
        return None if edited is None else edited.flatten(0, 1)


def _ours_first(hooks: Any) -> None:
    """Let others' hooks on a module see what ours made of an activation, whichever came first.

    transformers records hidden states with hooks that it leaves on the model for good. `hooks` is
    the module's OrderedDict of them.
    """
    ours = [key for key, hook in hooks.items() if isinstance(hook, Hook)]
    for key in reversed(ours):  # which keeps their own order
        hooks.move_to_end(key, last=False)


def _on_output(edit: Edit, module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return edit(output)
    activations = first_tensor(output)
    edited = None if activations is None else edit(activations)
    return None if edited is None else with_first(output, edited)


def _on_input(edit: Edit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    place = find_input(args, kwargs)
    if isinstance(place, int):
        edited = edit(args[place])
        return None if edited is None else ((*args[:place], edited, *args[place + 1 :]), kwargs)
    assert place is not None  # what takes no activations is no site
    edited = edit(kwargs[place])
    return None if edited is None else (args, {**kwargs, place: edited})


def _on_experts(point: Point, edit: Edit) -> Callable[[], None]:
    """Replace a fused experts module's forward; a second edit joins the first one's list."""
    _check_shown(point.module)
    shown = _in_place(point.module, experts_forward, ExpertEdits())
    entry = (point.side, edit)
    shown.edits.append(entry)
    rows = None
    if point.around is not None:
        rows = point.around.register_forward_pre_hook(Hook(_on_rows, shown), with_kwargs=True)

    def remove() -> None:
        if rows is not None:
            rows.remove()
        shown.edits.remove(entry)
        if not shown.edits:
            _put_back(point.module)

    return remove


def _on_router(point: Point, edit: Edit) -> Callable[[], None]:
    """Stand around a router's forward; a second edit joins the first one's list."""
    shown = _in_place(point.module, router_forward, RouterEdits(point.width))
    entry = (point.side, edit)
    shown.edits.append(entry)

    def remove() -> None:
        shown.edits.remove(entry)
        if not shown.edits:
            _put_back(point.module)

    return remove


def _in_place(module: nn.Module, function: Callable[..., Any], shown: Any) -> Any:
    """Let a function stand in place of a module's forward, with what it shows to edits; where it
    stands there already, what it shows."""
    hook = vars(module).get("forward")  # ours, somebody else's, or none
    if not (isinstance(hook, Hook) and hook.func is function):
        before, hook = hook, Hook(function, module, shown)
        hook.before = before
        object.__setattr__(module, "forward", hook)
    return hook.args[1]


def _put_back(module: nn.Module) -> None:
    """The forward that a module had before `_in_place`."""
    before = vars(module)["forward"].before
    if before is None:
        object.__delattr__(module, "forward")
    else:
        object.__setattr__(module, "forward", before)


def _on_rows(
    shown: ExpertEdits | _Listed, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Note the rows and tokens that experts inside of a module see as one list."""
    shown.notice(args, kwargs)


def _check_shown(experts: nn.Module) -> None:
    """Refuse a module whose inner activations cannot be shown."""
    if hasattr(experts, "base_layer"):  # their weights alone are not what they compute
        raise TrimtabError(
            "the experts of this mixture carry an adapter, so that their activations cannot be "
            "shown: merge it first (merge_and_unload)"
        )
    if any(weight.is_meta for weight in experts.parameters()):
        raise TrimtabError(
            "the experts of this mixture are offloaded, and their inner activations cannot be "
            "shown there: steer another site, or load the model whole (no device_map)"
        )
    if layout_of(experts) is None:
        raise TrimtabError(
            f"the experts of this mixture ({type(experts).__name__}) keep their weights in a "
            "layout that is not known, so that their inner activations cannot be shown: steer "
            "ffn_out instead"
        )
