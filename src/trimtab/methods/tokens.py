"""Activations of every token of some texts, for methods that need more than one token of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.anatomy import Edit, Enough, Point, hooked, site_order
from trimtab.model import ImageText, LanguageModel
from trimtab.reading import Packed, batches, run_packed
from trimtab.training import Text


@torch.no_grad()
def token_activations(
    language_model: LanguageModel, texts: Sequence[Text], sites: Sequence[str]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Of each text, by its number, the activations at each site when nothing is steered,
    [tokens, units]; texts come in portions of similar length."""
    lm, last = language_model, max(sites, key=site_order)
    seen: dict[str, Tensor] = {}

    def reader(site: str) -> Edit:
        def read(x: Tensor) -> None:
            seen[site] = x
            if site == last:
                raise Enough

        return read

    edits: dict[Point, Edit] = {lm.anatomy.read_point(site): reader(site) for site in sites}
    rows = [_packed(number, text) for number, text in enumerate(texts)]
    for batch in batches(rows, lm.batch_tokens, packed=False):
        with hooked(lm.anatomy.body, edits), suppress(Enough):
            run_packed(batch, lm)
        width = batch.tokens.shape[1]
        # Layers that read others' keys see the last tokens alone.
        whole = {site: pad(x, (0, 0, width - x.shape[1], 0)) for site, x in seen.items()}
        for line, row in enumerate(batch.rows):
            yield row.index, {site: whole[site][line, : len(texts[row.index])] for site in sites}


def _packed(number: int, text: Text) -> Packed:
    seen = (text.tokens,) if isinstance(text.tokens, ImageText) else ()
    return Packed(number, tuple(text.tokens), len(text), (0,), (text.start,), seen)
