"""The norms before attention and FFN of every block, for the methods that work at all of them.

Blocks of hybrids may have one of the two branches only; both may read through one norm (parallel
blocks), or none stand before them (OLMo 2). A branch that a block has, and whose site is not to be
seen, is refused: a method that works at all norms would leave it out unsaid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from trimtab.anatomy import Anatomy
from trimtab.errors import TrimtabError


class Norms(NamedTuple):
    """What one branch of one block reads."""

    layer: int
    part: str  # "attn" or "ffn"
    before: bool  # whether it reads through a norm
    after: bool  # whether a norm stands between it and the residual stream
    reads_block_input: bool  # whether what it reads, before the norm, is what the block reads

    @property
    def site(self) -> str:
        """What the branch reads: its norm's output, where there is one."""
        return f"layers.{self.layer}.{self.part}_norm"


def norms(anatomy: Anatomy) -> Iterator[Norms]:
    """Of every attention (or other mixer) and FFN, in the order of the computation."""
    for layer, block in enumerate(anatomy.known.description.layers):
        numbers = {"attn": block.attention, "ffn": block.ffn}
        found = {part: number for part, number in numbers.items() if number is not None}
        if not found:
            anatomy.sites("attn_norm", (layer,))  # refuses, with the reason
        for part, number in found.items():
            branch = block.branches[number]
            yield Norms(
                layer,
                part,
                branch.norm is not None,
                branch.post_norm is not None,
                not branch.reads,
            )


def read_sites(anatomy: Anatomy) -> list[str]:
    """What attention and FFN read, in every block."""
    return [
        site
        for each in norms(anatomy)
        for site in anatomy.sites(f"{each.part}_norm", (each.layer,))
    ]


def norm_sites(anatomy: Anatomy) -> list[str]:
    """All norms of every block, those on its branches, too."""
    sites = []
    for each in norms(anatomy):
        kinds = [f"{each.part}_norm"] * each.before + [f"{each.part}_post_norm"] * each.after
        sites += [site for kind in kinds for site in anatomy.sites(kind, (each.layer,))]
    return sites


def norm_inputs(anatomy: Anatomy) -> dict[str, str]:
    """What the norm before each branch reads, by the site of what the branch reads: that itself
    where no norm stands before it."""
    found = {}
    for each in norms(anatomy):
        if not each.before:
            found[each.site] = each.site
        elif anatomy.missing(each.layer, f"{each.part}_norm_in") is None:
            found[each.site] = f"{each.site}_in"
        elif each.reads_block_input:  # a norm that branches share has no such site
            found[each.site] = anatomy.block_input(each.layer)
        else:
            reason = anatomy.missing(each.layer, f"{each.part}_norm_in")
            raise TrimtabError(
                f"{anatomy.name} has no {each.site}_in: {reason}; take candidates from the norms' "
                "outputs instead (candidates output)"
            )
    return found
