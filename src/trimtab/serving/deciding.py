"""Gates of steerings that an engine carries: what is read of a prompt to decide them before it is
read under steerings, and what came of those that workers decide token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.anatomy import site_order
from trimtab.engines import Read
from trimtab.errors import TrimtabError
from trimtab.model import Fired, LanguageModel, fired_by, scope_weights
from trimtab.serving.placing import acts_of
from trimtab.serving.proving import of_ranks
from trimtab.steering import READS_LAST, Condition, Gate, Scope, Steering


@dataclass(eq=False)
class Decision:
    """The scores that a gate gives a prompt, [conditions], once they are known."""

    gate: Gate
    scores: Tensor | None = None


def decided(steering: Steering) -> Steering:
    """A steering as the workers hold it: only a gate that decides token by token goes with it."""
    gate = steering.gate
    return steering if gate is None or gate.kind == "token" else replace(steering, gate=None)


def early_of(acting: Sequence[Steering]) -> dict[int, Gate]:
    """The gates of some steerings that decide of the prompt as a whole, by place: from a pass that
    is not steered. A latched gate decides at the prompt's last token, from activations that its
    steering does not change, so that this is the same; refuses a stack in which it is not."""
    found = {}
    for place, steering in enumerate(acting):
        if steering.gate is None or steering.gate.kind == "token":
            continue
        if steering.gate.kind == "latched":
            refuse_what_it_sees(steering, [one for one in acting if one is not steering])
        found[place] = steering.gate
    return found


def refuse_what_it_sees(steering: Steering, others: Sequence[Steering]) -> None:
    """Refuse a stack in which a latched gate would read what another steering did to the prompt."""
    assert steering.gate is not None
    for other in others:
        for each in other.interventions:
            below = any(site_order(each.site) <= site_order(site) for site in steering.gate.sites)
            if below and not each.scope.only_generated:
                raise TrimtabError(
                    f"the latched gate of {steering.label} would read what {other.label} does at "
                    f"{each.site}, which this engine does not know in time: make the gate two-pass "
                    "(gate.of_kind('two-pass')), scope the other to generated, or have "
                    "transformers run the model (--engine transformers)"
                )


def check_scopes(
    language_model: LanguageModel, scopes: Sequence[Scope], tokens: Sequence[int]
) -> None:
    """Refuse a text that has no turns of a chat where a scope asks for some."""
    for scope in scopes:
        if scope.by_content:
            scope_weights(language_model.marks, scope, tokens, len(tokens))


def read_of(language_model: LanguageModel, condition: Condition, tokens: Sequence[int]) -> Read:
    """What a condition reads of a prompt."""
    if condition.reads == READS_LAST:
        return Read(condition.site)
    check_scopes(language_model, [condition.reads], tokens)
    return Read(condition.site, acts_of(language_model, condition.reads))


def scores_of(gate: Gate, ranks: Sequence[Mapping[str, Tensor]], first: int = 0) -> Tensor:
    """The scores that a gate gives a prompt, [conditions], by what ranks have read of it; from
    which read on it is this gate's."""
    return torch.stack(
        [
            each.scores(mean_of(first + number, each.site, ranks, each.width))
            for number, each in enumerate(gate.conditions)
        ]
    )


def mean_of(number: int, site: str, ranks: Sequence[Mapping[str, Tensor]], units: int) -> Tensor:
    """The mean that ranks have read of a site, [units] in float64; NaN where there was no token.
    Those that split a site have a part of it each, in order."""
    count = next((rank[f"count {number}"] for rank in ranks if f"count {number}" in rank), None)
    if count is None:
        return torch.full((units,), torch.nan, dtype=torch.float64)
    return of_ranks(f"sum {number}", site, ranks) / count


def token_by_token(
    steering: Steering,
    number: int,
    ranks: Sequence[Mapping[str, Tensor]],
    prompt: int,
    stop: int | None = None,
) -> Fired:
    """What the token gate of a steering decided, by its number there: of the first `prompt` tokens,
    and where `stop` says up to which, of those that were written."""
    told = next(rank for rank in ranks if f"scores {number}" in rank)
    at = told[f"fired {number}"]
    new = None if stop is None else int(((at >= prompt) & (at < stop)).sum())
    return fired_by(steering, told[f"scores {number}"], int((at < prompt).sum()), new)
