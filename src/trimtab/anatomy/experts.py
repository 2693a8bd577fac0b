"""Fused experts of a mixture: where they keep their weights, and a pass that shows their inside.

transformers keeps the weights of all experts of a layer in a few tensors of one module, which gets
hidden states and says what the chosen experts add up to. Routers and shared experts stand beside
it. What its down projections read is the site `ffn_in`, which no boundary of modules shows:
`experts_forward` computes what the module computes with these activations in the open.

Layouts differ (`ExpertLayout`), and so do the ways in which a module learns who reads what:

    routed   (hidden states, chosen experts, their weights): nearly all
    logits   (hidden states, the router's logits): Aria in transformers 5.16
    every    hidden states of all experts, one below the other, already times their weights: Llama 4
    shared   (hidden states, a weight of each expert): Inkling's shared experts
    block    hidden states alone, the router being inside: JetMoE
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy.sites import Edit
from trimtab.errors import TrimtabError, first_line


@dataclass(frozen=True)
class ExpertLayout:
    """Where fused experts keep their weights, and how a pass goes through them.

    Names are paths of parameters from the experts' module. A transposed weight is stored
    [experts, in, out], any other [experts, out, in].
    """

    call: Literal["routed", "logits", "every", "shared", "block"]
    #: How many experts have weights, and how many units each has inside.
    experts: int
    units: int
    #: One weight that gives gate and up, or one of each, or one without a gate.
    up: tuple[str, ...]
    down: str
    up_bias: str | None = None
    down_bias: str | None = None
    up_transposed: bool = False
    down_transposed: bool = False
    #: "own": by the module's `_apply_gate`; "plain": act(gate) * up; "none": act(up).
    gate: Literal["none", "plain", "own"] = "plain"
    #: Whether gate and up take turns unit by unit; else the gate is the first half.
    interleaved: bool = False
    #: The activation function; None is SiLU.
    activation: str | None = "act_fn"
    #: A norm on what each expert returns, before it is weighed.
    post_norm: str | None = None
    #: A bias of the sum over the experts.
    sum_bias: str | None = None
    #: Whether there are experts without weights, which return what they get (LongCat).
    identities: bool = False
    #: How many experts stand one below the other in weights of two dimensions (DBRX); else 0.
    stacked: int = 0
    #: The linear map of a router that is inside the module.
    router: str | None = None

    @property
    def width(self) -> int:
        """Units of all experts side by side: of the site `ffn_in`."""
        return self.experts * self.units


def layout_of(module: nn.Module) -> ExpertLayout | None:
    """The layout of a fused experts module; None where it is none, or none that is known.

    A layout is read off names and shapes. `disagreement` says whether it is the right one.
    """
    experts: Any = module
    if hasattr(experts, "base_layer"):  # an adapter: its weights alone are not what it computes
        return None
    if _stored(experts, "down_proj", 3):
        return _fused(experts)
    if _stored(experts, "fc2.weight", 3) and hasattr(experts, "route_tokens_to_experts"):
        return _aria(experts)
    if _stored(experts, "mlp.w2", 2) and hasattr(experts, "num_experts"):
        return _dbrx(experts)
    # JetMoE's attention, too, has such maps, but no activation function between them.
    if _stored(experts, "output_linear.weight", 3) and hasattr(experts, "activation"):
        return _jetmoe(experts)
    return None


def _fused(experts: Any) -> ExpertLayout | None:
    """`down_proj` and one of `gate_up_proj`, `up_proj`, or `gate_proj` and `up_proj`."""
    arguments = len(inspect.signature(type(experts).forward).parameters) - 1
    gated = getattr(experts, "has_gate", _stored(experts, "gate_up_proj", 3))
    apart = _stored(experts, "gate_proj", 3)
    up = ("gate_proj", "up_proj") if apart else ("gate_up_proj",) if gated else ("up_proj",)
    if not all(_stored(experts, name, 3) for name in up):
        return None
    maps = 2 if len(up) == 1 and gated else 1  # that one weight holds
    transposed = getattr(experts, "is_transposed", None)
    if transposed is None:
        transposed = arguments == 1 or not _fits(experts, up[0], maps, transposed=False)
    if not _fits(experts, up[0], maps, transposed):
        return None
    biased = getattr(experts, "has_bias", isinstance(_part(experts, "down_proj_bias"), Tensor))
    count = len(experts.down_proj)
    own = hasattr(experts, "_apply_gate")
    return ExpertLayout(
        call="shared" if apart else "every" if arguments == 1 else "routed",
        experts=count,
        units=experts.down_proj.shape[1 if transposed else 2],
        up=up,
        down="down_proj",
        up_bias=f"{up[0]}_bias" if biased else None,
        down_bias="down_proj_bias" if biased else None,
        up_transposed=transposed,
        down_transposed=transposed,
        gate="plain" if apart else "none" if not gated else "own" if own else "plain",
        interleaved=not getattr(experts, "is_concatenated", True),
        post_norm="post_expert_norm" if getattr(experts, "has_post_expert_norm", False) else None,
        identities=bool(getattr(experts, "zero_expert_num", 0)),
    )


def _fits(experts: Any, up: str, maps: int, transposed: bool) -> bool:
    """Whether the weights' shapes go together, read in this orientation."""
    first, last = (2, 1) if transposed else (1, 2)  # the dimensions of what is written and read
    wide, down = _part(experts, up), experts.down_proj
    return bool(
        wide.shape[first] == maps * down.shape[last] and wide.shape[last] == down.shape[first]
    )


def _aria(experts: Any) -> ExpertLayout:
    count, units, _ = experts.fc2.weight.shape
    return ExpertLayout(
        call="logits",
        experts=count,
        units=units,
        up=("fc1.weight",),
        down="fc2.weight",
        up_transposed=True,
        down_transposed=True,
        activation=None,
    )


def _dbrx(experts: Any) -> ExpertLayout:
    return ExpertLayout(
        call="routed",
        experts=experts.num_experts,
        units=len(experts.mlp.w2) // experts.num_experts,
        up=("mlp.w1", "mlp.v1"),
        down="mlp.w2",
        down_transposed=True,
        activation="mlp.activation_fn",
        stacked=experts.num_experts,
    )


def _jetmoe(experts: Any) -> ExpertLayout:
    count, _, units = experts.output_linear.weight.shape
    return ExpertLayout(
        call="block",
        experts=count,
        units=units,
        up=("input_linear.weight",),
        down="output_linear.weight",
        activation="activation",
        sum_bias="bias",
        router="router.layer",
    )


def _part(experts: Any, path: str) -> Any:
    """What stands at a path of attributes, None where there is nothing."""
    for name in path.split("."):
        experts = getattr(experts, name, None)
    return experts


def _stored(experts: Any, path: str, dimensions: int) -> bool:
    """Whether plain weights stand there, none that are packed into fewer bits."""
    weight = _part(experts, path)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == dimensions
        and weight.is_floating_point()
        and weight.element_size() > 1
    )


# -- the pass ---------------------------------------------------------------------------------


@dataclass
class ExpertEdits:
    """The edits at one experts module, in their order, each with the side of its `Point`."""

    edits: list[tuple[str, Edit]] = field(default_factory=list)
    #: The rows and tokens of the pass that runs, which the module itself often sees flattened.
    shape: tuple[int, int] | None = None

    def notice(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Take rows and tokens from what the module around the experts is called with."""
        for value in (*arguments, *named.values()):
            if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
                self.shape = (value.shape[0], value.shape[1])
                return


def experts_forward(experts: Any, shown: ExpertEdits, *args: Any, **kwargs: Any) -> Tensor:
    """A fused experts module's forward pass that shows `ffn_in`, what its down projections read.

    The activations are gathered as [rows, tokens, experts * units], zero where a token was not
    routed, and handed to each of the edits in turn (which return a new tensor, or None to leave
    it). An edit of the side "expert_acts" sees what the activation function of the gates puts out,
    and what it returns is not used. What an edit puts where a token was not routed has no effect.
    """
    layout = layout_of(experts)
    assert layout is not None
    routes = routes_of(experts, layout, args, kwargs)
    readers = [edit for side, edit in shown.edits if side == "expert_acts"]
    editors = [edit for side, edit in shown.edits if side == "experts"]
    inner, acts = _inside(experts, layout, routes, acts=bool(readers))
    shape = (*_rows_and_tokens(shown, routes), layout.width)
    if readers:
        activation = _spread(layout, routes, acts).view(shape)
        for read in readers:
            read(activation)
    if editors:
        activation = _spread(layout, routes, inner).view(shape)
        for edit in editors:
            edited = edit(activation)
            activation = activation if edited is None else edited
        spread = activation.reshape(routes.tokens, layout.experts, layout.units)
        inner = [spread[route.token, expert] for expert, route in enumerate(routes.experts)]
    return _outside(experts, layout, routes, inner)


@dataclass(frozen=True)
class Route:
    """What one expert reads: n of the rows that the module was given."""

    row: Tensor  # [n], of the module's input, and of its output
    token: Tensor  # [n]
    weight: Tensor | None  # [n, 1]; None where the input was weighed


@dataclass(frozen=True)
class Routes:
    """Who reads what."""

    hidden: Tensor  # [rows of the input, hidden]
    shape: torch.Size  # of the module's input as it came
    tokens: int
    experts: list[Route]
    #: The rows [m] that stay as they are, with their weights [m, 1].
    identities: tuple[Tensor, Tensor] | None = None


def routes_of(
    experts: Any, layout: ExpertLayout, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Routes:
    """Read the arguments of a call of the module."""
    bound = inspect.signature(type(experts).forward).bind(experts, *args, **kwargs)
    hidden, *rest = [value for name, value in bound.arguments.items() if name != "self"]
    flat = hidden.reshape(-1, hidden.shape[-1])
    if layout.call == "every":
        routes = _weighed_before(flat, layout.experts)
        return Routes(flat, hidden.shape, len(flat) // layout.experts, routes)
    if layout.call == "shared":
        every = torch.arange(len(flat), device=flat.device)
        columns = rest[0].reshape(len(flat), layout.experts, 1).unbind(1)
        routes = [Route(every, every, weight) for weight in columns]
        return Routes(flat, hidden.shape, len(flat), routes)
    if layout.call == "block":
        _, tokens, weights, sizes, _ = experts.router(flat)  # sorted by expert
        pairs = zip(tokens.split(sizes), weights[:, None].split(sizes), strict=True)
        routes = [Route(token, token, weight) for token, weight in pairs]
        return Routes(flat, hidden.shape, len(flat), routes)
    if layout.call == "logits":
        rest = experts.route_tokens_to_experts(rest[0])
    chosen, weights = (given.reshape(len(flat), -1) for given in rest)
    picked = [_picked(chosen == expert, weights) for expert in range(layout.experts)]
    routes = [Route(token, token, weight) for token, weight in picked]
    identities = _picked(chosen >= layout.experts, weights) if layout.identities else None
    return Routes(flat, hidden.shape, len(flat), routes, identities)


def _weighed_before(flat: Tensor, count: int) -> list[Route]:
    """The routes where every expert gets all tokens, times a weight that is zero for most."""
    tokens = len(flat) // count
    found = [rows.any(-1).nonzero()[:, 0] for rows in flat.view(count, tokens, -1)]
    return [Route(token + i * tokens, token, None) for i, token in enumerate(found)]


def _picked(where: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens and the weights that stand at some places of [tokens, top k]."""
    token, place = torch.where(where)
    return token, weights[token, place, None]


def _inside(
    experts: Any, layout: ExpertLayout, routes: Routes, acts: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """What the experts' down projections read, [n, units] each, and, where `acts` asks for it,
    what their activation functions put out."""
    hidden = routes.hidden
    ups = [expert_weights(experts, layout, name) for name in layout.up]
    bias = None if layout.up_bias is None else _part(experts, layout.up_bias).to(hidden.dtype)
    inner, active = [], []
    for expert, route in enumerate(routes.experts):
        x = hidden[route.row]
        parts = [nn.functional.linear(x, up[expert].to(x.dtype)) for up in ups]
        before = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        before = before if bias is None else before + bias[expert]
        value = _activated(experts, layout, before)
        if acts:
            active.append(_act(experts, layout, before))
        if layout.call == "shared" and route.weight is not None:
            value = value * route.weight
        inner.append(value.to(hidden.dtype))
    return inner, active


def _activated(experts: Any, layout: ExpertLayout, before: Tensor) -> Tensor:
    """Activation function and gate on [n, units], or [n, 2 * units] where there is a gate."""
    if layout.gate == "own":
        gated: Tensor = experts._apply_gate(before)
        return gated
    function = _function(experts, layout)
    if layout.gate == "none":
        return function(before)
    gate, up = before.chunk(2, dim=-1)
    return function(gate) * up


def _act(experts: Any, layout: ExpertLayout, before: Tensor) -> Tensor:
    """What the activation function puts out: of a gate, the factor of `up`.

    A gate of the module's own hides it, so it is how fast the result grows with `up` at zero,
    which is the same and holds for (up + 1) * act(gate) and clamped units as well.
    """
    if layout.gate != "own":
        gates = before if layout.gate == "none" else before.chunk(2, dim=-1)[0]
        return _function(experts, layout)(gates)
    ups = torch.zeros_like(before)
    place = slice(1, None, 2) if layout.interleaved else slice(layout.units, None)
    ups[..., place] = 1
    gate_alone = before * (1 - ups)
    slope: Tensor = torch.func.jvp(experts._apply_gate, (gate_alone,), (ups,))[1]
    return slope


def _function(experts: Any, layout: ExpertLayout) -> Callable[[Tensor], Tensor]:
    if layout.activation is None:
        return nn.functional.silu
    function: Callable[[Tensor], Tensor] = _part(experts, layout.activation)
    return function


def _outside(experts: Any, layout: ExpertLayout, routes: Routes, inner: list[Tensor]) -> Tensor:
    """The module's output from what its down projections read."""
    hidden = routes.hidden
    down = expert_weights(experts, layout, layout.down)
    bias = None if layout.down_bias is None else _part(experts, layout.down_bias).to(hidden.dtype)
    # Summed in float32 at least and rounded once, as the grouped kernels do.
    total = hidden.new_zeros(
        len(hidden), down.shape[1], dtype=torch.promote_types(hidden.dtype, torch.float32)
    )
    for expert, route in enumerate(routes.experts):
        y = nn.functional.linear(inner[expert], down[expert].to(hidden.dtype))
        y = y if bias is None else y + bias[expert]
        y = y if layout.post_norm is None else _part(experts, layout.post_norm)(y)
        if route.weight is not None and layout.call != "shared":
            y = y * route.weight
        total.index_add_(0, route.row, y.to(total.dtype))
    if routes.identities is not None:
        row, weight = routes.identities
        total.index_add_(0, row, (hidden[row] * weight).to(total.dtype))
    output = total.to(hidden.dtype)
    if layout.sum_bias is not None:
        output = output + _part(experts, layout.sum_bias).to(output.dtype)
    return output.view(*routes.shape[:-1], -1)


def expert_weights(experts: nn.Module, layout: ExpertLayout, path: str) -> Tensor:
    """A weight of fused experts as [experts, out, in], whatever its layout."""
    weight: Tensor = _part(experts, path)
    if layout.stacked:
        weight = weight.unflatten(0, (layout.stacked, -1))
    transposed = layout.down_transposed if path == layout.down else layout.up_transposed
    return weight.mT if transposed else weight


def _spread(layout: ExpertLayout, routes: Routes, values: list[Tensor]) -> Tensor:
    """[tokens, experts, units], zero where a token was not routed."""
    spread = torch.zeros(
        routes.tokens, layout.experts, layout.units, dtype=values[0].dtype, device=values[0].device
    )
    for expert, route in enumerate(routes.experts):
        spread[route.token, expert] = values[expert]
    return spread


def _rows_and_tokens(shown: ExpertEdits, routes: Routes) -> tuple[int, int]:
    """Of the pass that runs."""
    if len(routes.shape) == 3 and routes.shape[0] * routes.shape[1] == routes.tokens:
        return routes.shape[0], routes.shape[1]
    if shown.shape is None or shown.shape[0] * shown.shape[1] != routes.tokens:
        raise TrimtabError(
            f"the experts of this mixture got {routes.tokens} tokens in one list, and nothing "
            "around them says how many rows they belong to: steer ffn_out instead"
        )
    return shown.shape


# -- the proof --------------------------------------------------------------------------------

#: How far the module may be from the exact result, in units of how far the replay is.
_WORST, _USUAL = 8.0, 3.0


@torch.no_grad()
def disagreement(
    experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> str | None:
    """How what a fused experts module returned on these arguments differs from what its layout
    says, in one clause; None where it does not.

    The layout is computed in the output's own dtype and in float64. The module has to be about as
    near to the latter as the former is, so that the tolerance is what rounding does there.
    """
    layout = layout_of(experts)
    if layout is None:
        return "no layout of experts is known that has its weights"
    # Models in float64, too, compute parts in float32.
    own = torch.float32 if output.dtype is torch.float64 else output.dtype
    try:
        routes = routes_of(experts, layout, args, dict(kwargs))
        exact = _replayed(experts, layout, replace(routes, hidden=routes.hidden.double()))
        replayed = _replayed(experts, layout, replace(routes, hidden=routes.hidden.to(own)))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"replaying its experts fails ({first_line(error) or type(error).__name__})"
    if output.shape != exact.shape:
        return f"it returns {list(output.shape)}, and its experts replayed {list(exact.shape)}"
    rounding, found = (replayed.double() - exact).abs(), (output.double() - exact).abs()
    # Of each number and of each token: a few huge units hide nothing in the others.
    eps = torch.finfo(own).eps
    size = exact.abs() + exact.abs().median(-1, keepdim=True).values
    scale = (eps * size + rounding.median(-1, keepdim=True).values).clamp(min=1e-30)
    rounding, found = rounding / scale, found / scale
    worst = float(found.max()) / max(1.0, float(rounding.max()))
    usual = float(found.square().mean().sqrt()) / max(0.3, float(rounding.square().mean().sqrt()))
    if worst <= _WORST and usual <= _USUAL:
        return None
    return (
        "it returns something else than its gate and up, activation function and down projections "
        f"do (off by {max(worst, usual):.2g} times the rounding)"
    )


def _replayed(experts: nn.Module, layout: ExpertLayout, routes: Routes) -> Tensor:
    inner, _ = _inside(experts, layout, routes)
    return _outside(experts, layout, routes, inner)
