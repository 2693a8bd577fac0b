"""Fits a gate: a direction and a threshold from texts at which it should fire and texts at which it
should not.

Directions and thresholds come from the train part, the site is chosen on the validation part, and
what is reported is measured on the test part and on texts about other things. One pass reads every
site that is a candidate.

    cosine, projection  the difference of the two sides' means
    probe               logistic regression, as a direction and a bias
    compat              the first principal component of the centred pairs, as the authors of
                        conditional activation steering have it (arXiv:2409.05907); the two sides'
                        texts are paired in their order. They check one block below the one that
                        they read; here both are the same site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Pair, Prompt, check_contrast
from trimtab.errors import TrimtabError, check_choice
from trimtab.fitting.classifiers import (
    best_threshold,
    f1_of,
    fired_rate,
    logistic,
    separation,
    sides_fired,
)
from trimtab.model import (
    LanguageModel,
    batches_by_length,
    check_model,
    read_prompts,
    score_pass,
    score_prompts,
)
from trimtab.steering import (
    READS_ALL_BUT_FIRST,
    READS_LAST,
    Condition,
    Gate,
    GateKind,
    GateScore,
    Scope,
    Steering,
    check_gate,
    reads_below,
)
from trimtab.terminal import progress

#: Inverse strengths of the probe's L2 penalty that are tried, on activations of unit variance.
_PENALTIES = (0.001, 0.01, 0.1)


@dataclass(frozen=True)
class _Part:
    """Activations of one part of the texts at each site, and which of them are positive."""

    at: Mapping[str, Tensor]
    positive: Tensor


@dataclass(frozen=True)
class _Tried:
    """A condition, how well it does on validation, and what says so of the gate's findings."""

    condition: Condition
    f1: float
    margin: float

    @property
    def rank(self) -> tuple[float, float]:
        return self.f1, self.margin


def fit_gate(
    language_model: LanguageModel,
    contrast: Contrast,
    *,
    kind: GateKind = "two-pass",
    score: GateScore = "probe",
    reads: str | None = None,
    sites: Sequence[str] | None = None,
    below: Steering | None = None,
    any_of: int = 1,
    chat: bool | None = None,
    unrelated: Mapping[str, Sequence[Any]] | None = None,
) -> Gate:
    """A gate that fires at the contrast's positive texts and not at its negative ones.

    An unpaired contrast has texts or conversations; of a pair each side is a text with its prompt.
    Plain texts are put as a user's message where the model has a chat template, as `generate` does
    (`chat`). `reads` says whose tokens' mean activation is scored (a scope, or "last": the prompt's
    last token, the default of token gates). `sites` are the candidates (default: the output of
    every block, of `below` those that it does not steer). `any_of` lets so many conditions fire
    each by itself, as far as that is better on validation. `unrelated` names texts at which it
    should not fire either; how often it does is in the gate's `findings`.

    Errors: a TrimtabError where a part lacks a side, or no site is a candidate.
    """
    check_model(language_model)
    check_contrast(contrast)
    check_choice("kind", kind, GateKind)
    check_choice("score", score, GateScore)
    if any_of < 1:
        raise TrimtabError("any_of must be 1 or more: how many conditions may fire by themselves")
    for name, texts in (unrelated or {}).items():
        if not texts:
            raise TrimtabError(f"unrelated '{name}' has no text: give some, or leave it out")
    if kind == "token" and reads not in (None, "last"):
        raise TrimtabError(
            f"a token gate scores single tokens, and reads '{reads}' is a mean of several: leave "
            "it out (it is fitted on the prompt's last token), or make the gate two-pass"
        )
    asked = (
        Scope.of(reads)
        if reads is not None
        else READS_LAST
        if kind == "token"
        else READS_ALL_BUT_FIRST
    )
    chosen = contrast.with_parts()
    candidates = _candidates(language_model, sites, below, kind)
    if not chosen.has_parts:
        raise TrimtabError(
            f"{contrast.name} has too few texts to hold some out for validation and test: "
            f"{chosen.too_few}"
        )
    parts = {
        part: _read(language_model, chosen.part(part), candidates, asked, chat)
        for part in ("train", "validation", "test")
    }
    tried = [
        each
        for site in candidates
        for each in _fitted(site, score, asked, parts["train"], parts["validation"])
    ]
    kept = _combined(sorted(tried, key=lambda each: each.rank)[::-1], parts["validation"], any_of)
    gate = Gate(
        tuple(each.condition for each in kept),
        kind,
        0 if len(kept) == 1 else ("or", *range(len(kept))),
        language_model.identity,
        {"name": contrast.name, "digest": chosen.train.digest, "rows": len(chosen.train)},
    )
    if below is not None:
        check_gate(gate, below.interventions)
    findings = {
        "validation": _figures(gate, parts["validation"]),
        "test": _figures(gate, parts["test"]),
        "sites": _best_by_site(tried),
    }
    others = {
        name: _false_fires(language_model, gate, texts, chat)
        for name, texts in (unrelated or {}).items()
    }
    return replace(gate, findings=findings | ({"unrelated": others} if others else {}))


def _candidates(
    language_model: LanguageModel,
    sites: Sequence[str] | None,
    below: Steering | None,
    kind: GateKind,
) -> list[str]:
    anatomy = language_model.anatomy
    if sites is not None:
        for site in sites:
            anatomy.width(site)  # refuses what there is not
        found = list(dict.fromkeys(sites))
    else:
        found = [f"layers.{layer}.resid" for layer in range(anatomy.layers)]
    if below is not None and kind != "two-pass":
        found = [site for site in found if reads_below(site, below.interventions)]
    if not found:
        raise TrimtabError(
            "no site is below what the steering changes: make the gate two-pass, or name sites"
        )
    return found


def _texts(
    language_model: LanguageModel, texts: Sequence[Any], chat: bool | None
) -> list[Sequence[int]]:
    return language_model.fitting(language_model.prompts(texts, chat))


def _read(
    language_model: LanguageModel,
    contrast: Contrast,
    sites: Sequence[str],
    reads: Scope,
    chat: bool | None,
) -> _Part:
    """The activations of one part's texts."""
    plain: list[Prompt] = []
    answers: list[str | None] = []
    labels: list[bool] = []
    for row in contrast.rows:
        if not isinstance(row, Pair):
            plain.append(row.text)
            answers.append(None)
            labels.append(row.label == "positive")
            continue
        for side, answer in ((True, row.positive), (False, row.negative)):
            # A text with its answer is a text; a conversation is read as it stands after it.
            whole = isinstance(row.prompt, str)
            plain.append(f"{row.prompt}{answer}" if whole else row.prompt)
            answers.append(None if whole else answer)
            labels.append(side)
    texts = _texts(language_model, plain, chat)
    answered = [i for i, answer in enumerate(answers) if answer is not None]
    if answered:
        ends = [answers[i] or "" for i in answered]
        found = language_model.encode([plain[i] for i in answered], ends)
        for i, text in zip(answered, found, strict=True):
            texts[i] = text
    with progress("reading texts", len(texts)) as advance:
        at = read_prompts(
            language_model.anatomy, language_model.marks, sites, reads, texts, advance
        )
    for site, activations in at.items():
        if not bool(activations.isfinite().all()):
            first = int((~activations.isfinite().all(-1)).nonzero()[0])
            raise TrimtabError(
                f"{contrast.name}, text {first + 1}: nothing can be read at {site} (no token of "
                f"the scope '{reads}', or activations that are no numbers)"
            )
    return _Part(at, torch.tensor(labels))


# -- one site -------------------------------------------------------------------------------------


def _fitted(
    site: str, score: GateScore, reads: Scope, train: _Part, validation: _Part
) -> list[_Tried]:
    """The conditions to choose from at a site: of a probe one for each penalty."""
    x = train.at[site]
    if score == "probe":
        made = [logistic(x, train.positive, penalty) for penalty in _PENALTIES]
        conditions = [
            Condition(site, direction, 0.0, "above", "probe", bias, reads)
            for direction, bias in made
        ]
    else:
        unsigned = score == "compat"
        direction = (_pairwise if unsigned else _means)(x, train.positive)
        plain = Condition(site, direction, 0.0, score=score, reads=reads)
        fires, threshold = best_threshold(plain.scores(x.double()), train.positive, unsigned)
        conditions = [replace(plain, fires=fires, threshold=threshold)]
    return [_tried(each, validation) for each in conditions]


def _means(x: Tensor, positive: Tensor) -> Tensor:
    x = x.double()
    return (x[positive].mean(0) - x[~positive].mean(0)).float()


def _pairwise(x: Tensor, positive: Tensor) -> Tensor:
    """The first principal component of pairs less their centres; its sign is that of most pairs."""
    n = min(int(positive.sum()), int((~positive).sum()))
    half = (x[positive][:n] - x[~positive][:n]).double() / 2
    direction: Tensor = torch.linalg.svd(half, full_matrices=False).Vh[0]
    return (direction if (half @ direction > 0).sum() * 2 >= n else -direction).float()


def _tried(condition: Condition, part: _Part) -> _Tried:
    scores = condition.scores(part.at[condition.site].double())
    margin = separation(scores, part.positive)
    return _Tried(condition, f1_of(condition.holds(scores), part.positive), margin)


def _combined(ranked: Sequence[_Tried], part: _Part, any_of: int) -> list[_Tried]:
    """The best condition, and others that find on validation what those before them do not."""
    kept = [ranked[0]]
    fired = _holds(ranked[0], part)
    for each in ranked[1:]:
        if len(kept) == any_of:
            break
        both = fired | _holds(each, part)
        if f1_of(both, part.positive) > f1_of(fired, part.positive):
            kept.append(each)
            fired = both
    return kept


def _holds(tried: _Tried, part: _Part) -> Tensor:
    condition = tried.condition
    return condition.holds(condition.scores(part.at[condition.site].double()))


# -- how well it does -----------------------------------------------------------------------------


def _figures(gate: Gate, part: _Part) -> dict[str, Any]:
    """F1 and the rates at which it fires, with their intervals."""
    fired = gate.decide([c.scores(part.at[c.site].double()) for c in gate.conditions])
    return sides_fired(fired, part.positive)


def _best_by_site(tried: Sequence[_Tried]) -> list[dict[str, Any]]:
    best: dict[str, _Tried] = {}
    for each in tried:
        site = each.condition.site
        if site not in best or each.rank > best[site].rank:
            best[site] = each
    return [{"site": site, "f1": each.f1, "margin": each.margin} for site, each in best.items()]


def _false_fires(
    language_model: LanguageModel, gate: Gate, texts: Sequence[Any], chat: bool | None
) -> dict[str, Any]:
    """At how many of some texts it fires, of a token gate also at how many of their tokens."""
    encoded = _texts(language_model, texts, chat)
    anatomy, marks = language_model.anatomy, language_model.marks
    if gate.kind != "token":
        return fired_rate(gate.decide(list(score_prompts(anatomy, marks, gate, encoded))))
    last = torch.zeros(len(encoded), dtype=torch.bool)
    tokens = fired = 0
    for rows in batches_by_length(list(map(len, encoded)), language_model.batch_tokens):
        own = [encoded[i] for i in rows]
        where = score_pass(anatomy, marks, gate, own, list(map(len, own))).fired.cpu()
        for row, (i, text) in enumerate(zip(rows, own, strict=True)):
            last[i] = where[row, len(text) - 1]
            fired += int(where[row, : len(text)].sum())
            tokens += len(text)
    return fired_rate(last) | {"tokens_fired": fired / tokens, "tokens": tokens}
