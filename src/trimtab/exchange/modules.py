"""Sites by the names of the modules whose output they are, which is how tools that hook a model
name places."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from trimtab.anatomy import Branch
from trimtab.model import LanguageModel

#: The kinds of sites that are some module's output, the residual stream first.
_OUTPUTS = (
    "resid", "attn_out", "ffn_out", "attn_post_norm", "ffn_post_norm", "attn_norm", "ffn_norm",
)  # fmt: skip


def module_names(language_model: LanguageModel, inside: nn.Module) -> dict[str, str]:
    """The name within `inside` of the module whose output each site is; sites that are no module's
    output have none."""
    names = {id(module): name for name, module in inside.named_modules()}
    return {
        site: names[id(module)] for site, module in _modules(language_model) if id(module) in names
    }


def sites_by_module(language_model: LanguageModel, inside: nn.Module) -> dict[str, str]:
    """The site that is the output of each module, by the module's name within `inside`. Where a
    branch and the linear map that writes it put out the same, both names are there."""
    names = {id(module): name for name, module in inside.named_modules()}
    sites = [*_twins(language_model), *_modules(language_model)]
    return {names[id(module)]: site for site, module in sites if id(module) in names}


def _modules(language_model: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    """Each site that is a module's output, with the module."""
    anatomy = language_model.anatomy
    sites = [site for kind in _OUTPUTS if anatomy.has(kind) for site in anatomy.sites(kind)]
    if anatomy.has("final_norm"):
        sites.append("final_norm")
    for site in sites:
        point = anatomy.point(site)
        if point.side == "output":
            yield site, point.module


def _twins(language_model: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    """The outputs of the branches, with each module that puts out just that."""
    anatomy = language_model.anatomy
    for kind in ("attn_out", "ffn_out"):
        for site in anatomy.sites(kind) if anatomy.has(kind) else ():
            layer = int(site.split(".")[1])
            block = anatomy.known.description.layers[layer]
            number = block.attention if kind == "attn_out" else block.ffn
            assert number is not None
            for path in _paths(block.branches[number]):
                yield site, anatomy.blocks[layer].get_submodule(path)


def _paths(branch: Branch) -> list[str]:
    alone = branch.writer if branch.writer_factor == 1.0 and branch.experts is None else None
    return [path for path in (branch.out, alone) if path]
