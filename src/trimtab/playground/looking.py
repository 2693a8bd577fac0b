"""A closer look at an answer that was written: at which tokens steerings acted, and which of the
sites that they change pushed a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import parse_site
from trimtab.model import LanguageModel, extended, firing
from trimtab.reading import run_upper
from trimtab.steering import Steering

#: So many sites are told apart; of more, those of a block are one.
_MOST_SITES = 24
#: Rows that are read at once.
_AT_ONCE = 8


def acted(
    language_model: LanguageModel,
    steerings: Sequence[Steering],
    names: Sequence[str],
    prompt: Sequence[int],
    new: Sequence[int],
) -> list[dict[str, Any]]:
    """Of each steering how much of its dial each token of the prompt and of the answer got, as
    scopes and gates had it; 0 where it was left alone. The answer's last token is not read."""
    lm, found = language_model, []
    # All of them together: what one does, another's gate may see.
    fires = iter(firing(lm.anatomy, lm.marks, steerings, prompt, list(new)[:-1]).fires)
    for name, steering in zip(names, steerings, strict=True):
        columns = zip(*(next(fires).weights for _ in steering.scopes), strict=True)
        weights = [max(column, key=abs) for column in columns]
        found.append({
            "name": name,
            "scopes": [str(scope) for scope in steering.scopes],
            "gate": None if steering.gate is None else steering.gate.kind,
            "prompt": weights[: len(prompt)],
            "answer": weights[len(prompt) :],
        })  # fmt: skip
    return found


def pushes(
    language_model: LanguageModel,
    steerings: tuple[Steering, ...],
    names: Sequence[str],
    prompt: Sequence[int],
    new: Sequence[int],
    place: int,
) -> dict[str, Any]:
    """Which sites push the answer's token at `place`: by how much its log-probability (nats) falls
    when one site is left as it is and all others are steered. What sites do together is in none of
    them alone, so that they need not sum to the whole change."""
    groups = _groups(steerings)
    variants = [steerings, (), *(_without(steerings, places) for places in groups.values())]
    text = list(new)[:place]
    found = _log_p(language_model, variants, prompt, text, list(new)[place])
    whole, base, rest = found[0], found[1], found[2:]
    return {
        "token": language_model.tokenizer.decode([list(new)[place]]),
        "logp": whole,
        "base_logp": base,
        "sites": [
            {"steering": names[number], "site": site, "push": whole - without}
            for (number, site), without in zip(groups, rest, strict=True)
        ],
    }


def _groups(steerings: Sequence[Steering]) -> dict[tuple[int, str], set[tuple[int, int]]]:
    """What is left out together, by steering and site (or block): places of interventions."""
    every = [
        (number, place, each.site)
        for number, steering in enumerate(steerings)
        for place, each in enumerate(steering.interventions)
    ]
    many = len({(number, site) for number, _, site in every}) > _MOST_SITES
    found: dict[tuple[int, str], set[tuple[int, int]]] = {}
    for number, place, site in every:
        layer = parse_site(site)[0]
        name = f"block {layer}" if many and layer is not None else site
        found.setdefault((number, name), set()).add((number, place))
    return found


def _without(steerings: Sequence[Steering], left_out: set[tuple[int, int]]) -> tuple[Steering, ...]:
    kept = []
    for number, steering in enumerate(steerings):
        own = tuple(
            each
            for place, each in enumerate(steering.interventions)
            if (number, place) not in left_out
        )
        if own:
            kept.append(replace(steering, interventions=own))
    return tuple(kept)


@torch.inference_mode()
def _log_p(
    lm: LanguageModel,
    variants: Sequence[tuple[Steering, ...]],
    prompt: Sequence[int],
    text: Sequence[int],
    token: int,
) -> list[float]:
    """The log-probability of a token after prompt and text under each variant."""
    found: list[float] = []
    rows, _ = lm.settled(variants, [prompt] * len(variants), False)
    for start in range(0, len(rows), _AT_ONCE):
        own: list[Any] = list(rows[start : start + _AT_ONCE])
        with lm.steered(own) as sequences:
            sequences.given_ends = [len(prompt)] * len(own)
            sequences.in_part = True  # a scope may hold nowhere
            hidden: Tensor = run_upper(lm, [extended(prompt, text)] * len(own), (), 0)
        found += lm.unembed(hidden[:, -1]).log_softmax(-1)[:, token].tolist()
    return found
