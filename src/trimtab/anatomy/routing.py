"""Finds the router of a mixture by how it computes, and proves it by running it again.

The router is a module before the experts that chooses among them by its logits: with the same
logits all that the experts are called with is the same, bit for bit; and where some experts are
given the largest logits, and the first places where it chooses, these are chosen for every token,
and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trimtab.anatomy.experts import Routes, layout_of, routes_of
from trimtab.anatomy.hooks import install
from trimtab.anatomy.proof import BlockCalls
from trimtab.anatomy.routers import Router
from trimtab.anatomy.sites import Edit, Point, Side
from trimtab.anatomy.tracing import Call

#: What running a module by itself may raise.
_FAILS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


def find_router(calls: BlockCalls) -> Router | str:
    """The router of a block's mixture, or why it has none that is known."""
    experts = next((call for call in calls.trace.calls if _is_routed(call.module)), None)
    if experts is None:
        return "the block has no mixture of experts"
    for around, candidate in _candidates(calls, experts):
        with suppress(*_FAILS):
            found = _proved(around, candidate, experts)
            if found is not None:
                return found
    return f"no module is found that chooses among {experts.name} by its logits"


def _is_routed(module: nn.Module) -> bool:
    layout = layout_of(module)
    return layout is not None and layout.call != "shared"


def _candidates(calls: BlockCalls, experts: Call) -> Iterator[tuple[Call, Call]]:
    """Modules that may be the router, each after a module around it and the experts: what ran
    before the experts beside them, the last first; then beside the module around these, and so on.
    JetMoE's experts have their router inside."""
    for call in calls.trace.calls:
        if _parent(call.name) == experts.name:
            yield experts, call
    before = calls.trace.calls[: calls.trace.place(experts)]
    inner = experts.name
    while inner:
        around = calls.call(_parent(inner))
        for call in reversed(before):
            beside = call.name not in ("", inner) and _parent(call.name) == _parent(inner)
            if beside and around is not None:
                yield around, call
        inner = _parent(inner)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _proved(around: Call, candidate: Call, experts: Call) -> Router | None:
    """A candidate as the router that it is proved to be, None where it is none."""
    made = _logits_of(candidate, experts)
    if made is None:
        return None
    plain, module, width = _routed(around, experts), candidate.module, made.width
    same = _routed(around, experts, module, width, {"router": torch.clone})
    if not all(map(torch.equal, _tensors(plain), _tensors(same))):
        return None
    counts = torch.tensor([len(route.token) for route in plain.experts])
    of_none = 0 if plain.identities is None else len(plain.identities[0])
    chosen, rest = divmod(int(counts.sum()) + of_none, plain.tokens)
    if rest or not 0 < chosen < width:
        return None
    least = counts.argsort(stable=True)[:chosen]
    only = torch.full((width,), False).index_fill(0, least, True)
    edits: dict[Side, Edit] = {"router": _lifting(only), "router_choice": _choosing(only)}
    if not _goes_to(_routed(around, experts, module, width, edits), set(least.tolist())):
        return None
    return Router(candidate.name, width, chosen, made.owner(module), made.bias is not None)


def _logits_of(candidate: Call, experts: Call) -> _Map | None:
    """The one linear map in a module that returns a logit for each expert: of several the one that
    returns no more, else the last."""
    layout = layout_of(experts.module)
    has_map = any(parameter.dim() == 2 for parameter in candidate.module.parameters())
    if layout is None or not has_map or candidate.x is None:
        return None
    with _Maps() as seen:
        candidate.again(candidate.x)
    enough = [each for each in seen.maps if each.width >= layout.experts]
    exact = [each for each in enough if each.width == layout.experts]
    found: _Map | None = next(iter([*exact, *reversed(enough)]), None)
    if found is None or [each.width for each in seen.maps].count(found.width) != 1:
        return None
    return found


def _lifting(only: Tensor) -> Edit:
    """Logits of which some are larger than all others."""

    def lift(x: Tensor) -> Tensor:
        span = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True) + 1
        return torch.where(only.to(x.device), x + span, x - span)

    return lift


def _choosing(only: Tensor) -> Edit:
    """Scores of which some are larger than all others, which are below even those ruled out."""

    def choose(x: Tensor) -> Tensor:
        infinite = torch.full_like(x, float("inf"))
        return torch.where(only.to(x.device), infinite, -infinite)

    return choose


def _goes_to(routes: Routes, numbers: set[int]) -> bool:
    """Whether every token goes to these experts, and to no others."""
    if routes.identities is not None and len(routes.identities[0]):
        return False
    found = [len(route.token.unique()) for route in routes.experts]
    return all(
        count == (routes.tokens if expert in numbers else 0) for expert, count in enumerate(found)
    )


class _Reached(Exception):  # noqa: N818
    """The experts are called: with what is known, and nothing else is wanted."""


def _routed(
    around: Call,
    experts: Call,
    router: nn.Module | None = None,
    width: int = 0,
    edits: Mapping[Side, Edit] | None = None,
) -> Routes:
    """Which tokens go to which experts when a module around them is run again, with edits at a
    router."""
    layout = layout_of(experts.module)
    assert layout is not None
    assert around.x is not None
    routes: list[Routes] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        routes.append(routes_of(module, layout, args, kwargs))
        raise _Reached

    with ExitStack() as undone:
        for side, edit in (edits or {}).items():
            assert router is not None
            undone.callback(install(Point("router", router, side, width), edit))
        handle = experts.module.register_forward_pre_hook(see, with_kwargs=True)
        undone.callback(handle.remove)
        with suppress(_Reached):
            around.again(around.x)
    return routes[0]


def _tensors(routes: Routes) -> list[Tensor]:
    """All that routes say."""
    found = [routes.hidden, *(routes.identities or ())]
    for route in routes.experts:
        found += [each for each in (route.row, route.token, route.weight) if each is not None]
    return found


class _Map:
    """One linear map that ran: how many units it returned, and by which weights."""

    def __init__(self, width: int, weight: Tensor, bias: Tensor | None) -> None:
        self.width, self.weight, self.bias = width, weight, bias

    def owner(self, router: nn.Module) -> str | None:
        """The module of a router whose weight, and bias where there is one, these are."""
        path: str
        for path, module in router.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if not _is(own.get("weight"), self.weight):
                continue
            if self.bias is None or _is(own.get("bias"), self.bias):
                return path
        return None


def _is(parameter: nn.Parameter | None, used: Tensor) -> bool:
    """Whether what a map used is a parameter, in whatever dtype."""
    if parameter is None or parameter.shape != used.shape:
        return False
    return torch.equal(parameter.to(used.dtype), used)


class _Maps(TorchFunctionMode):
    """Notes every linear map that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[_Map] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self.maps.append(_Map(output.shape[-1], given["weight"], given.get("bias")))
        return output
