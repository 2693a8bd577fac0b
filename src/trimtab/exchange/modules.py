"""Sites by the names of the modules whose output they are, which is how tools that hook a model
name places."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from trimtab.anatomy import Anatomy, Block, parse_site
from trimtab.model import LanguageModel

#: The kinds of sites that are some module's output.
_OUTPUTS = ("resid", "attn_out", "ffn_out", "attn_post_norm", "ffn_post_norm")


def module_names(language_model: LanguageModel, inside: nn.Module) -> dict[str, str]:
    """The name within `inside` of the module whose output each site is; sites that are no module's
    output have none."""
    names = {id(module): name for name, module in inside.named_modules()}
    return {
        site: names[id(module)] for site, module in _outputs(language_model) if id(module) in names
    }


def sites_by_module(language_model: LanguageModel, inside: nn.Module) -> dict[str, str]:
    """The site that is the output of each module, by the module's name within `inside`. Where a
    branch and the linear map that writes it put out the same, both names are there."""
    names = {id(module): name for name, module in inside.named_modules()}
    sites = [*_twins(language_model), *_outputs(language_model)]
    return {names[id(module)]: site for site, module in sites if id(module) in names}


def _outputs(language_model: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    """Each site that is a module's output, with the module."""
    anatomy = language_model.anatomy
    for kind in _OUTPUTS:
        for site in anatomy.sites(kind) if anatomy.has(kind) else ():
            point = anatomy.point(site)
            if point.side == "output":
                yield site, point.module
    for kind in ("attn_norm", "ffn_norm"):
        for site, block, number in _branches(anatomy, kind):
            branch = block.branches[number]
            # A norm that one branch alone reads: its output is what the branch reads.
            if branch.norm and not block.shares_norm(number) and branch.input_factor == 1.0:
                yield site, _module(anatomy, site, branch.norm)
    if anatomy.has("final_norm"):
        yield "final_norm", anatomy.final_norm


def _twins(language_model: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    """The outputs of the branches, with each module that puts out just that."""
    anatomy = language_model.anatomy
    for kind in ("attn_out", "ffn_out"):
        for site, block, number in _branches(anatomy, kind):
            branch = block.branches[number]
            yield site, _module(anatomy, site, branch.out)
            if branch.writer is not None and branch.writer_factor == 1.0 and not branch.experts:
                yield site, _module(anatomy, site, branch.writer)


def _branches(anatomy: Anatomy, kind: str) -> Iterator[tuple[str, Block, int]]:
    """The sites of a kind, each with its block and the number of the branch it belongs to."""
    for site in anatomy.sites(kind) if anatomy.has(kind) else ():
        layer, _ = parse_site(site)
        assert layer is not None
        block = anatomy.known.description.layers[layer]
        number = block.attention if kind.startswith("attn") else block.ffn
        assert number is not None
        yield site, block, number


def _module(anatomy: Anatomy, site: str, path: str) -> nn.Module:
    layer, _ = parse_site(site)
    assert layer is not None
    return anatomy.blocks[layer].get_submodule(path)
