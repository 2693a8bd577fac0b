"""Where a model ends when a steering is turned without end (Proposition 4.1).

What is added to the residual stream outgrows everything else, and every norm takes the size away:

    logits -> unembed(norm(+-v))      as alpha -> +-infinity, off by O(1 / alpha)

with v the sum of all that is added to the stream, whatever the text. A soft-cap acts after the
unembedding. With a LayerNorm that has a bias the two ends are not each other's negative.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, parse_site
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.steering import Steering

#: The size of a unit of v when it meets the final norm: the norm's eps is nothing beside it.
_LARGE = 1e4


@torch.no_grad()
def limit(language_model: LanguageModel, steering: Steering, sign: Literal[1, -1] = 1) -> Tensor:
    """The next token's log-distribution as the dial goes to +infinity or -infinity, [vocabulary].

    For steerings that add vectors to the residual stream, at the token that is read; others do not
    outgrow the stream, and are refused.
    """
    added = stream_vector(language_model.anatomy, steering)
    weight = language_model.model.get_output_embeddings().weight
    anatomy = language_model.anatomy
    norm: Any = anatomy.final_norm
    if isinstance(norm, nn.LayerNorm) and (added - added.mean()).norm() < 1e-6 * added.norm():
        raise TrimtabError(
            "this steering adds the same to every unit, which a LayerNorm takes away: Proposition "
            "4.1 does not hold for it"
        )
    v = sign * added
    v = (v * (_LARGE / v.square().mean().sqrt())).to(weight)
    hidden = norm(v[None, None])
    if not torch.isfinite(hidden).all():
        raise TrimtabError("the limit overflows in this dtype: load the model with float32")
    logits = language_model.unembed(hidden)[0, 0]
    return logits.log_softmax(-1)


def stream_vector(anatomy: Anatomy, steering: Steering) -> Tensor:
    """The sum of what a steering adds to the residual stream per unit of its dial, [units]."""
    total = torch.zeros(anatomy.hidden_size, dtype=torch.float64)
    writers = set(anatomy.stream_writers)
    for intervention in steering.interventions:
        _, kind = parse_site(intervention.site)
        operator = intervention.operator
        added = operator.added
        if added is None:
            raise TrimtabError(
                f"{type(operator).__name__} at {intervention.site} has no limit of Proposition "
                "4.1: it does more than add a vector, and what comes of an activation depends on "
                "the activation, however far the dial is turned"
            )
        if kind != "resid" and intervention.site not in writers:
            raise TrimtabError(
                f"what is added at {intervention.site} passes weights or a norm before the "
                "residual stream, so Proposition 4.1 does not hold for it"
            )
        if intervention.scope.only_generated:
            raise TrimtabError(
                f"what is added at {intervention.site} to generated tokens only leaves a text that "
                "is read as it is: Proposition 4.1 is about steering the token that is read"
            )
        if intervention.scope.at_end is not True:
            raise TrimtabError(
                f"whether the scope '{intervention.scope}' takes the token that is read depends on "
                "the text: Proposition 4.1 is about steering that token"
            )
        total += intervention.weight * added.double()
    if not total.any():
        raise TrimtabError("this steering adds nothing to the residual stream")
    return total
