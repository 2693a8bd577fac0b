"""What is known of every feature of some autoencoders, and which are chosen for it.

On a contrast, of each text the largest activation over its answer's tokens (or their mean; of texts
without a prompt over all tokens but the first) stands for it, and a feature has

    auroc        how well that tells the two sides apart               (AxBench's SAE-A)
    difference   its mean over the positive texts - over the negative ones
    r            Pearson's correlation with the outcome, 1 on the positive side and 0 on the other
    effect       what scaling the feature does to the log-odds, in standard errors (first_order.py)

Of answers that the model wrote itself r is with how each went, and the tokens are those at which it
wrote them: the prompt's last one and its own but the last (CorrSteer). r says no more than Cohen's
d does: with p the share of successes and q = 1 - p, r = d / sqrt(d^2 + 1 / (p q)).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.fitting import (
    Aurocs,
    Correlation,
    Effect,
    Largest,
    Means,
    Pooled,
    Sides,
    Statistics,
    Want,
    read_outcomes,
    read_texts,
    unit_costs,
    written,
)
from trimtab.methods.effects import refuse_unsure
from trimtab.methods.first_order import scaled_scores, scaled_wants
from trimtab.methods.ranking import places, rank
from trimtab.model import LanguageModel
from trimtab.reading import Cutoff, FeatureEffects, Features, Packed, encode_contrast

By = Literal["auroc", "difference", "correlation", "effect"]
Pool = Literal["max", "mean"]
#: Over all tokens of a text but the first, whose activations are huge in many models.
PEAK = Pooled("max", "rest")
#: A correlation of outcomes with lengths that is said.
_CONFOUNDED = 0.3


@dataclass(frozen=True)
class Known:
    """What is known of every feature of an autoencoder, [features] each: `signed` is by how much it
    speaks for the positive side, `peak` its largest activation, `mean` that over the positive
    texts, `columns` what a table says of it. `cutoff` stands for the k-th largest activation of an
    autoencoder that is by rank."""

    features: Features
    signed: Tensor
    peak: Tensor
    mean: Tensor
    columns: dict[str, Tensor]
    cutoff: float | None = None


@dataclass(frozen=True)
class Asked:
    """How features are scored."""

    by: By
    pool: Pool
    positions: str

    def pooled(self, contrast: Contrast) -> Pooled:
        """What stands for a text of a contrast."""
        return Pooled(self.pool, "answer" if contrast.paired else "rest")

    def wants(self, contrast: Contrast, features: Sequence[Features]) -> list[Want]:
        """What a pass over a contrast gathers."""
        more: dict[str, type[Any]] = {"auroc": Aurocs, "correlation": Correlation}
        statistics: list[type[Any]] = [Means, *([more[self.by]] if self.by in more else [])]
        pooled = self.pooled(contrast)
        wants = [
            Want(one.site, pooled, statistic, read=one)
            for one in features
            for statistic in statistics
        ]
        wants += [Want(one.site, PEAK, Largest, read=one) for one in features]
        wants += [
            Want(one.site, Pooled("mean", "rest"), Means, read=Cutoff(one))
            for one in features
            if one.by_rank
        ]
        if self.by == "effect":
            reads = {one.site: FeatureEffects(one) for one in features}
            wants += scaled_wants(reads, Effect(self.positions))
        return wants

    def known(
        self,
        language_model: LanguageModel,
        contrast: Contrast,
        statistics: Statistics,
        features: Sequence[Features],
    ) -> list[Known]:
        """Of each autoencoder what the pass says."""
        effects = self._effects(language_model, statistics, features)
        return [
            self._known(contrast, statistics, one, own)
            for one, own in zip(features, effects, strict=True)
        ]

    def _known(
        self,
        contrast: Contrast,
        statistics: Statistics,
        features: Features,
        effects: dict[str, Tensor],
    ) -> Known:
        pooled, site = self.pooled(contrast), features.site
        means = statistics.of(site, pooled, Means, read=features)
        columns = {"difference": means.difference}
        signed = means.difference
        if self.by == "auroc":
            columns["auroc"] = statistics.of(site, pooled, Aurocs, read=features).auroc
            signed = columns["auroc"] - 0.5
        elif self.by == "correlation":
            signed = columns["r"] = statistics.of(site, pooled, Correlation, read=features).r
        elif self.by == "effect":
            columns |= effects
            signed = (effects["effect"] / effects["error"].clamp(min=1e-300)).nan_to_num(0.0)
        cutoff = None
        if features.by_rank:
            rest = Pooled("mean", "rest")
            found = statistics.of(site, rest, Means, read=Cutoff(features))
            cutoff = float(found.positive + found.negative) / 2
        peak = torch.as_tensor(statistics.of(site, PEAK, Largest, read=features).value)
        return Known(features, signed, peak, means.positive, columns, cutoff)

    def _effects(
        self, language_model: LanguageModel, statistics: Statistics, features: Sequence[Features]
    ) -> list[dict[str, Tensor]]:
        """Of each autoencoder's features what scaling them does, by column."""
        if self.by != "effect":
            return [{} for _ in features]
        reads = {one.site: FeatureEffects(one) for one in features}
        costs = statistics.once(
            ("costs of features", *(one.name for one in features)),
            lambda: unit_costs(language_model, list(reads), reads=reads),
        )
        found = scaled_scores(statistics, reads, Effect(self.positions), costs)
        refuse_unsure("sae", "features", found.columns["error"])
        widths = [one.width for one in features]
        split = {
            name: found.columns[name].split(widths) for name in ("effect", "error", "cost", "first")
        }
        return [{name: parts[i] for name, parts in split.items()} for i in range(len(features))]


def correlated(
    language_model: LanguageModel, source: str, features: Sequence[Features], pool: Pool
) -> tuple[list[Known], dict[str, Any]]:
    """Of each autoencoder's features the correlation with how the answers of a file went, and what
    is to be said of the file."""
    outcomes = read_outcomes(source)
    rows = written(language_model, outcomes)
    successful = outcomes.successful
    correlations = [Correlation() for _ in features]
    means, cutoffs = ([Means() for _ in features] for _ in range(2))
    peaks = [Largest() for _ in features]
    sites = [one.site for one in features]
    for number, found in read_texts(language_model, sites, [each.text for each in rows]):
        each = rows[number]
        for i, one in enumerate(features):
            active = one(found[one.site])  # [tokens, features]
            own = active[each.first : each.end]
            pooled = (own.amax(0) if pool == "max" else own.mean(0))[None]
            correlations[i].add(pooled, outcomes.values[each.row, None])
            means[i].update(_on(pooled, bool(successful[each.row])))
            peaks[i].update(_on(active[1:] if len(active) > 1 else active, True))
            if one.by_rank:
                cutoffs[i].update(_on(Cutoff(one)(found[one.site])[1:], True))
    lengths = torch.tensor([[float(each.end - each.first)] for each in rows])
    confound = Correlation()
    confound.add(lengths, outcomes.values[[each.row for each in rows]])
    said = {
        "source": source,
        "digest": outcomes.digest,
        "rows": len(rows),
        "successful": int(successful[[each.row for each in rows]].sum()),
        "length_r": float(confound.r),
    }
    known = [
        Known(
            one,
            correlations[i].r,
            torch.as_tensor(peaks[i].value),
            means[i].positive,
            {"r": correlations[i].r},
            float(cutoffs[i].positive) if one.by_rank else None,
        )
        for i, one in enumerate(features)
    ]
    return known, said


def _on(activations: Tensor, positive: bool) -> Sides:
    """Texts that are all of one side."""
    none, rows = activations[:0], torch.arange(len(activations))
    sides = (activations, none, rows, rows[:0])
    return Sides(*sides) if positive else Sides(none, activations, rows[:0], rows)


def packed_quietly(
    language_model: LanguageModel, contrast: Contrast, most: int | None
) -> list[Packed]:
    """The rows of a contrast that a pass has read, and has warned of, already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        found: list[Packed] = encode_contrast(language_model, contrast, most)
    return found


def length_correlation(rows: Sequence[Packed], contrast: Contrast) -> float:
    """How the lengths of answers (of texts) go with the side that they are on."""
    found = Correlation()
    for row in rows:
        one = contrast.train.rows[row.index]
        starts = row.answers if contrast.paired else (0,)
        sides = (1.0, 0.0) if contrast.paired else (float(getattr(one, "label", "") == "positive"),)
        lengths = [[len(text) - start] for text, start in zip(row.texts(), starts, strict=True)]
        found.add(torch.tensor(lengths, dtype=torch.float64), torch.tensor(sides))
    return float(found.r)


def warn_of_length(r: float, pool: Pool) -> None:
    """Say where largest activations may have been chosen for the lengths of texts."""
    if pool == "max" and abs(r) >= _CONFOUNDED:
        warnings.warn(
            f"sae: outcomes go with the length of the answers (r {r:+.2f}), and the largest "
            "activation over an answer grows with its length: take pool mean, or answers of one "
            "length",
            TrimtabWarning,
            stacklevel=2,
        )


def choose(known: Sequence[Known], usable: Sequence[Tensor], k: int, negative: bool) -> Tensor:
    """The k best features over all autoencoders, as indices that are flat over them: those that
    speak for the positive side, with `negative` those against it, too. Only `usable` ones count;
    of equal ones the first goes first."""
    signed = torch.cat([one.signed for one in known])
    score = signed.abs() if negative else signed.clamp(min=0)
    score = torch.where(torch.cat(list(usable)), score, 0.0)
    order = rank(score)
    best = order[score[order] > 0][:k]
    if not len(best):
        raise TrimtabError(
            "sae: no feature that is active speaks for the positive side: take other texts, "
            "another score (by), or another autoencoder"
        )
    if len(best) < k:
        warnings.warn(
            f"sae: k is {k}, but only {len(best)} features speak for the positive side",
            TrimtabWarning,
            stacklevel=2,
        )
    return best


def by_autoencoder(known: Sequence[Known], picked: Tensor) -> list[Tensor]:
    """Of flat indices the features of each autoencoder, in rank order."""
    site_of, feature_of = places([one.features.width for one in known], picked)
    return [feature_of[site_of == number] for number in range(len(known))]


def cutoffs(
    language_model: LanguageModel,
    texts: Sequence[Sequence[int]],
    known: Sequence[Known],
    picked: Sequence[Tensor],
    operators: Mapping[str, Any],
) -> dict[str, Any]:
    """Of autoencoders by rank the cutoff that stands for the k-th largest activation, and the share
    of tokens of some texts at which a feature is active by both where it is by either."""
    by_rank = [
        (one, own)
        for one, own in zip(known, picked, strict=True)
        if one.features.by_rank and len(own)
    ]
    both = either = 0
    for _, found in read_texts(language_model, [one.features.site for one, _ in by_rank], texts):
        for one, own in by_rank:
            x = found[one.features.site][1:].float()
            exact = one.features(x)[..., own] > 0
            taken = operators[one.features.site].active(x) > 0
            both += int((exact & taken).sum())
            either += int((exact | taken).sum())
    return {
        "cutoffs": {one.features.site: one.cutoff for one, _ in by_rank},
        "agree": both / either if either else None,
    }
