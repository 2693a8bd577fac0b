"""Effects of SAE-TS: what adding a vector does to every feature of an autoencoder.

"Improving Steering Vectors by Targeting Sparse Autoencoder Features" (Chalnev et al., 2411.02193)
releases, for a model and a site, a linear map that predicts how much more active each feature
becomes when a vector x is added: y = x M + b, M [units, features] and b [features], as `W` and `b`
of what torch saved (`adapter_2b_layer_12.pt`), or of a safetensors file. From it comes a vector
that raises wanted features and does as little else as it can:

    v = unit( unit(M t) - correction * unit(M b) )

with t the wanted features and their weights, and M b what any steering does (correction 1 in the
paper). v has length 1, so that all of its strength is the dial's.

The map does not say for which site it was made: --site does. The authors' other files (the rotation
of the decoder, single vectors) are bare tensors.

https://github.com/slavachalnev/SAE-TS (ft_effects/train.py, baselines/analysis.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trimtab.errors import TrimtabError
from trimtab.exchange.containers import Container, as_floats
from trimtab.exchange.vectors import Found, adds
from trimtab.model import LanguageModel


@dataclass(frozen=True)
class Target:
    """Features that a vector is to raise, each with its weight, and how much of what every
    steering does is taken away."""

    features: Mapping[int, float]
    correction: float = 1.0


def is_effects(container: Container) -> bool:
    """Whether a file is a linear map from vectors to features."""
    content = container.content
    return (
        container.kind in ("pickle", "safetensors")
        and isinstance(content, Mapping)
        and set(content) == {"W", "b"}
    )


def read(
    container: Container, lm: LanguageModel, sites: Sequence[str], target: Target | None
) -> Found:
    """The vector for the features that are wanted, at the site that is named."""
    if target is None or not target.features:
        raise container.refused(
            "it says what vectors do to features: name those that you want more of, as in "
            "--features 14455 or --features 14455=1,77=-0.5"
        )
    if len(sites) != 1:
        raise container.refused(
            "it does not say of which site: name it, as in --site layers.12.resid (blocks.12."
            "hook_resid_post, what block 12 puts out)"
        )
    lm.anatomy.check(sites[0])
    effects = as_floats(container.content["W"], f"{container.named}: W", (2,)).double()
    bias = as_floats(container.content["b"], f"{container.named}: b", (1,)).double()
    width, count = effects.shape
    if len(bias) != count or width != lm.anatomy.width(sites[0]):
        raise container.refused(
            f"W has the shape {[width, count]} and b {[len(bias)]}: they must be [units, features] "
            f"and [features], and {sites[0]} has {lm.anatomy.width(sites[0])} units"
        )
    wanted = torch.zeros(count, dtype=torch.float64)
    for feature, weight in target.features.items():
        if not 0 <= feature < count:
            raise container.refused(f"it knows features 0 to {count - 1}, and no {feature}")
        wanted[feature] = weight
    vector = targeted(effects, bias, wanted, target.correction)
    if not vector.any():
        raise container.refused(
            "what these features ask for is what every steering does: no vector"
        )
    named = ",".join(f"{feature}={weight:g}" for feature, weight in target.features.items())
    says = {"features": named, "correction": f"{target.correction:g}"}
    return adds({sites[0]: (vector.float(), 1.0)}, says)


def targeted(effects: Tensor, bias: Tensor, wanted: Tensor, correction: float) -> Tensor:
    """v, [units], of effects [units, features], bias and wanted [features]."""
    if not bool((effects @ wanted).any()):
        raise TrimtabError("no vector has any effect on the features that are wanted")
    toward, always = (normalize(effects @ each, dim=0) for each in (wanted, bias))
    return normalize(toward - correction * always, dim=0)
