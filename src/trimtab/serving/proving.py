"""Whether an engine's sites are the model's: the same activations on the same text.

An engine has modules of its own, fused and split in other ways, with names that are nearly those of
transformers. Instead of believing names, each site is read on a short text in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from safetensors.torch import load
from torch import Tensor

from trimtab.anatomy import hooked
from trimtab.engines import SPLIT
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel, probe_texts

#: How far the last token's activation may be off, as a share of its length: by what kernels round
#: otherwise, in float32 and in half precision.
_OFF, _OFF_HALF = 1e-3, 0.1


def probe(language_model: LanguageModel) -> list[int]:
    """Token ids of a short text."""
    return list(probe_texts(language_model.anatomy)[0])


@torch.inference_mode()
def last_activations(language_model: LanguageModel, sites: Sequence[str]) -> dict[str, Tensor]:
    """What the model of transformers has at each site at the last token of the probe, [units]."""
    anatomy, found = language_model.anatomy, dict[str, Tensor]()

    def note(site: str, x: Tensor) -> None:
        found[site] = x.reshape(-1, x.shape[-1])[-1].float().cpu().clone()

    edits = {anatomy.point(site): partial(note, site) for site in sites}
    with hooked(anatomy.body, edits):
        language_model.model(
            torch.tensor([probe(language_model)], device=language_model.device), use_cache=False
        )
    return found


def joined(ranks: Sequence[bytes]) -> dict[str, Tensor]:
    """What the ranks of an engine have seen at each site, [units]: those that split a site have a
    part of it each, in order, and others the same."""
    parts: dict[str, list[Tensor]] = {}
    for content in ranks:
        for site, x in load(content).items():
            parts.setdefault(site, []).append(x)
    return {
        site: torch.cat(of) if site.rpartition(".")[2] in SPLIT else of[0]
        for site, of in parts.items()
    }


def of_ranks(key: str, site: str, ranks: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """What the ranks have read of a site under a key: those that split it have a part of its units
    each, in order, and others the same."""
    parts = [rank[key] for rank in ranks if key in rank]
    return torch.cat(parts, -1) if site.rpartition(".")[2] in SPLIT else parts[0]


def refuse_others(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Refuse an engine that has something else at a site than the model, or nothing."""
    most = _OFF if dtype in (torch.float32, torch.float64) else _OFF_HALF
    for site, wanted in expected.items():
        if site not in found:
            raise TrimtabError(f"the engine never passed {site}: it cannot be steered there")
        seen = found[site]
        off = float("inf")
        if seen.shape == wanted.shape:
            off = float((seen - wanted).norm() / wanted.norm().clamp(min=1e-12))
        if not off <= most:
            raise TrimtabError(
                f"{site} is something else in the engine than in transformers (off by {off:.2g} of "
                "its length): give the engine --vllm model_impl=transformers, or the model's dtype"
            )
