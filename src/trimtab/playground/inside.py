"""What is inside a steering: where it acts and on how much, the tokens that a unit or an added
vector stands for, and what a text is along its direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, parse_site
from trimtab.errors import TrimtabError
from trimtab.methods import describe
from trimtab.model import LanguageModel
from trimtab.monitoring import monitor
from trimtab.steering import Steering

#: Units that are listed.
_LISTED = 64
_TOP = 10
#: Kinds whose units one linear map writes to the stream, and what that map writes.
_WEIGHED = {"heads": "attn_out", "ffn_in": "ffn_out"}


def contents(language_model: LanguageModel, steering: Steering) -> dict[str, Any]:
    """Its sites by block and kind with how many units each changes, and the units, heads or
    features that were chosen, in rank order."""
    said = describe(steering)
    sites = []
    for each in steering.interventions:
        layer, kind = parse_site(each.site)
        added = getattr(each.operator, "added", None)
        sites.append({
            "site": each.site,
            "layer": layer,
            "kind": kind,
            "operator": type(each.operator).__name__,
            "size": each.operator.size,
            "width": each.operator.width,
            "scope": str(each.scope),
            "length": None if added is None else float(added.double().norm()),
        })  # fmt: skip
    chosen = {kind: said[kind] for kind in ("units", "heads", "features", "experts")
              if said.get(kind)}  # fmt: skip
    kind, records = next(iter(chosen.items()), ("", []))
    return {
        "method": steering.method,
        "layers": language_model.anatomy.layers,
        "sites": sites,
        "chosen": kind,
        "records": records[:_LISTED],
        "of": len(records),
    }


@torch.inference_mode()
def decoded(
    language_model: LanguageModel, steering: Steering, site: str, unit: int | None
) -> dict[str, Any]:
    """The likeliest tokens where the residual stream, as the final norm reads it, is nothing but
    what a unit writes, or what a steering adds at a site: of the direction and of its opposite."""
    lm, anatomy = language_model, language_model.anatomy
    anatomy.check(site)
    if unit is not None:
        width = anatomy.width(site)
        if unit >= width:
            raise TrimtabError(f"{site} has units 0 to {width - 1}, not {unit}")
        vector = torch.zeros(width)
        vector[unit] = 1.0
    else:
        added = [getattr(each.operator, "added", None) for each in steering.interventions
                 if each.site == site]  # fmt: skip
        found = [one.detach().float().cpu() for one in added if one is not None]
        if not found:
            raise TrimtabError(f"this steering adds no vector at {site}: choose a unit")
        vector = torch.stack(found).sum(0)
    direction = to_stream(anatomy, site, vector)
    if direction is None:
        raise TrimtabError(
            f"a norm, or more than one map, stands between {site} and the stream: nothing to decode"
        )
    ends = torch.stack((direction, -direction)).to(lm.device, lm.dtype)
    log_p = lm.unembed(anatomy.final_norm(ends[:, None])[:, 0]).log_softmax(-1)
    sides = {}
    for name, row in zip(("toward", "away"), log_p, strict=True):
        values, tokens = row.topk(min(_TOP, len(row)))
        sides[name] = [
            [lm.tokenizer.decode([token]), value]
            for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
        ]
    return {"site": site, "unit": unit, **sides}


def to_stream(anatomy: Anatomy, site: str, vector: Tensor) -> Tensor | None:
    """What a change of a site by a vector [units] adds to the residual stream, [hidden]; None where
    a norm or more than one linear map stands between."""
    layer, kind = parse_site(site)
    writers = set(anatomy.stream_writers)
    if kind == "resid" or site in writers:
        return vector
    if kind in _WEIGHED and f"layers.{layer}.{_WEIGHED[kind]}" in writers:
        maps = anatomy.readers(site)
        if len(maps) == 1 and not maps[0].joint:
            weight = maps[0].read()
            if weight.is_floating_point() and weight.shape == (anatomy.hidden_size, len(vector)):
                return weight.float().cpu() @ vector
    return None


def projections(
    language_model: LanguageModel, steering: Steering, text: str, site: str | None
) -> dict[str, Any]:
    """What each token of a text is along a steering's direction, at unit length, where the model
    reads the text as it is."""
    if site is None:
        site = next((each.site for each in steering.interventions), None)
    found = monitor(language_model, steering, [text], site=site)
    (turn,) = found.turns
    return {
        "site": found.site,
        "what": found.source.get("what", "direction"),
        "tokens": [
            [text, value] for text, value in zip(turn.tokens, turn.projections, strict=True)
        ],
    }
