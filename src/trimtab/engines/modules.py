"""Hooks on the modules of an engine's model, put on once, before anything is compiled.

Each site has a place: the path of a module as transformers has it, and whether the site is the
module's input or output. Engines call their modules the same, but for what stands before the path
of a block and for maps that they fuse. An engine's block returns (hidden, residual), whose sum is
the stream, and a norm that adds the residual first returns (normed, residual).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, find_input, parse_site
from trimtab.errors import TrimtabError

#: What stands for a block that another rank has.
_ELSEWHERE = "PPMissingLayer"


#: Kinds of sites that an engine has no place of its own for, and why.
_NOWHERE = {
    "attn_norm_in": "an engine adds to the stream and norms it in one step",
    "ffn_norm_in": "an engine adds to the stream and norms it in one step",
    "router": "an engine chooses experts in a kernel of its own",
    "router_choice": "an engine chooses experts in a kernel of its own",
    "ffn_act": "an engine multiplies the gate's activation in the same step",
}


class Place(NamedTuple):
    """Where a site is: a module of transformers by its path, and which side of it."""

    path: str
    side: Literal["input", "output"]


def places_of(anatomy: Anatomy, sites: Sequence[str]) -> dict[str, Place]:
    """Where sites are in a model of transformers. Refuses those that engines have no place for."""
    paths = {module: path for path, module in anatomy.model.named_modules()}
    places = {}
    for site in sites:
        if reason := _NOWHERE.get(parse_site(site)[1]):
            raise TrimtabError(f"{site} has no place of its own there: {reason}")
        point = anatomy.point(site)
        if point.side not in ("input", "output"):
            raise TrimtabError(
                f"{site} is inside of {type(point.module).__name__}, which an engine computes in "
                "one kernel: steer ffn_out or resid"
            )
        places[site] = Place(paths[point.module], point.side)
    return places


def install(model: nn.Module, places: Mapping[str, Place], sites: Sequence[str]) -> list[str]:
    """Put a hook on each site that is on this rank; those sites are returned. Refuses a model that
    has no such module."""
    here = []
    for number, site in enumerate(sites):
        module = _module(model, places[site].path)
        if module is None:
            raise TrimtabError(
                f"the engine's {type(model).__name__} has no module like {places[site].path}, "
                f"where {site} is: give it model_impl=transformers, which keeps the names"
            )
        if type(module).__name__ == _ELSEWHERE:
            continue
        here.append(site)
        if places[site].side == "input":
            hook = partial(_on_input, number)
            module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            module.register_forward_hook(partial(_on_output, number, is_stream(site)))
    return here


def is_stream(site: str) -> bool:
    """Whether a site is what a block hands on: the sum of what it returns."""
    return parse_site(site)[1] == "resid"


def _module(model: nn.Module, path: str) -> nn.Module | None:
    """The module of an engine's model that has a path in transformers: of a block that ends alike
    from the block's number on; of what stands beside the blocks that has the same name."""
    in_block = re.search(r"\w+\.\d+(\..*)?$", path)
    ending = in_block[0] if in_block else path.rpartition(".")[2]
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not in_block and re.search(r"\.\d+\.", name):
            continue
        # Of a block that is on another rank all modules are.
        gone = type(module).__name__ == _ELSEWHERE and ending.startswith(f"{_block(name)}.")
        if gone or name == ending or name.endswith(f".{ending}"):
            found[name] = module
    return found[min(found, key=len)] if found else None


def _block(path: str) -> str:
    """The last two names of a path, of a block its list's and its number."""
    return ".".join(path.split(".")[-2:])


def _on_output(site: int, stream: bool, module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        torch.ops.trimtab.steer(output, None, site)
    else:
        residual = output[1] if stream and len(output) > 1 else None
        torch.ops.trimtab.steer(output[0], residual, site)
    return output


def _on_input(site: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    place = find_input(args, kwargs)
    assert place is not None  # what takes no activations is no site
    x = args[place] if isinstance(place, int) else kwargs[place]
    torch.ops.trimtab.steer(x, None, site)
