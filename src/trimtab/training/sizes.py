"""How large activations are where something is learnt, so that a step can be in proportion."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from statistics import mean

import torch
from torch import Tensor

from trimtab.anatomy import Edit, Enough, Point, hooked, site_order
from trimtab.contrasts import spread
from trimtab.model import LanguageModel
from trimtab.reading import run_upper
from trimtab.training.texts import Text

#: Texts that are read.
_TEXTS = 32


@torch.no_grad()
def typical_size(
    language_model: LanguageModel, sites: Sequence[str], texts: Sequence[Text]
) -> float:
    """The median size of a unit at the sites, over tokens but each text's first, whose activations
    are enormous in many models. Of several sites, and texts, it is the mean."""
    medians: list[float] = []
    last = max(sites, key=site_order)

    def see(x: Tensor) -> None:
        medians.append(float(x[:, 1:].float().abs().median()))

    def stop(x: Tensor) -> None:
        see(x)
        raise Enough

    anatomy = language_model.anatomy
    edits: dict[Point, Edit] = {
        anatomy.point(site): stop if site == last else see for site in sites
    }
    for text in spread(texts, _TEXTS):
        with hooked(anatomy.body, edits), suppress(Enough):
            run_upper(language_model, [text.tokens], (), 0)
    return mean(medians)
