"""Which ranking of units steers best: how often a sign agrees (AUSteer's), the mean difference,
what scaling a unit does to the answers, that per nat, or chance, on the same pairs and at an equal
cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab import options
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation import Asked
from trimtab.model import LanguageModel
from trimtab.options import flat, option
from trimtab.papers.austeer.effect.alone import alone_as_json, steered_alone
from trimtab.papers.austeer.effect.gains import PARTS, Bench, Chosen, cells_of, chosen_of
from trimtab.papers.austeer.effect.rankings import RANDOM, RANKINGS, USUAL, Costs, Fitted, fitted
from trimtab.papers.austeer.effect.shown import (
    alone_picture,
    alone_table,
    chosen_table,
    gain_picture,
    gain_tables,
    notes_of,
    overlap_picture,
    overlap_table,
)
from trimtab.papers.austeer.ranking import chance_overlap, site_units
from trimtab.papers.result import StudyResult, Value, timed
from trimtab.papers.settings import means, plain_means, rows_of
from trimtab.reports import Run
from trimtab.sweeps import FINE, contrast_for

#: Validation prompts on which dials are held to a budget.
_PROMPTS = 32


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Which units are ranked, from how many pairs, and how effects are counted."""

    heading = "Units"

    site: str = option("A kind of site: heads, attn_out, ffn_in, ffn_out or resid.", "heads")
    pairs: int | None = option("Train pairs that rankings are made from (default: all).", None)
    draws: int = option("Random choices of units.", 5)
    per_token: bool = option("Effects on an answer's mean per token, not on its sum.", False)
    first_token: bool = option("Whether effects count a text's first token.", True)


@dataclass(frozen=True, kw_only=True)
class Steered:
    """How many units are steered, and how strongly."""

    heading = "Strengths"

    k: Sequence[int] = option("Numbers of units, as in 4,16,64.", (1, 4, 16, 64, 256))
    kl: Sequence[float] = option(
        "Budgets, in nats at the next token, as in 0.05,0.1.", (0.02, 0.05, 0.1, 0.3)
    )
    alone: int = option("Units of each ranking that are scaled one by one; 0: none.", 8)
    gamma: float = option("How much those are scaled: by 1 + gamma and by 1 - gamma.", 0.5)


@flat
@timed
def effect(
    language_model: LanguageModel,
    task: Asked,
    *,
    contrast: Contrast | str | None = None,
    asked: options.Rows = options.Rows(),
    seed: int = 0,
    ranked: Ranked = Ranked(),
    steered: Steered = Steered(),
    run: Run | None = None,
) -> StudyResult:
    """Compare rankings of units on one model and contrast, all fitted from one pass: momentum in
    the paper's sign and signed, the mean difference, the effect of scaling by its size and by its
    standard error (z), the effect per nat, and random choices.

    What is said of them: how many of their `k` units they share; what the first `alone` units of
    each do when they are scaled one by one, by 1 + gamma and 1 - gamma, beside what was predicted
    (on the validation rows); and how much k units together raise the log-odds of the right answer,
    each at the largest dial within each budget of `kl` nats (the median over validation prompts of
    the next token's KL divergence). Settings are chosen on the validation rows and reported on the
    test rows, with p against signed momentum (Wilcoxon's, corrected by Holm within a budget). CAA,
    ITI and SADI, each with a few settings, stand beside them. `run` keeps what is finished, from
    which an interrupted study goes on.
    """
    run = run or Run(None, {})
    texts = contrast_for(task, contrast, asked).train
    texts = texts if ranked.pairs is None else texts.take(ranked.pairs)
    ks, budgets = _wanted(language_model, ranked, steered)
    rows = rows_of(language_model, task, asked, seed)
    if rows.fine is None:
        raise TrimtabError(
            f"{rows.task} has no right and wrong answer between which there are log-odds: take a "
            "task of choices, or contrast:SOURCE"
        )
    prompts = language_model.encode(rows.prompts(_PROMPTS))
    counted = {"per_token": ranked.per_token, "first_token": ranked.first_token}
    seeds = range(seed, seed + ranked.draws)
    found = fitted(language_model, texts, ranked.site, max(ks), seeds, counted)
    bench = Bench(rows, prompts, budgets, run)
    cells = cells_of(bench, found, texts, ks, Costs(language_model, ranked.site))
    single = steered_alone(rows, found, steered.alone, steered.gamma, run)
    alone = alone_as_json(single, steered.gamma)
    chosen = chosen_of(cells, budgets)
    total = site_units(language_model, ranked.site)
    overlaps = [_overlap(found, k, total) for k in ks]
    base = {part: means(rows.values(None, part)) for part in PARTS}
    rate = rows.rate if rows.rate != FINE else None
    document = {
        "task": rows.task,
        "contrast": {"name": texts.name, "digest": texts.digest, "pairs": len(texts)},
        "site": ranked.site,
        "units": total,
        "metric": FINE,
        "rows": rows.rows("validation"),
        "test_rows": rows.rows("test"),
        "prompts": len(prompts),
        "unsteered": {part: plain_means(each) for part, each in base.items()},
        "k": ks,
        "kl": budgets,
        "rankings": _rankings_as_json(found, max(16, steered.alone)),
        "overlap": overlaps,
        "alone": alone,
        "settings": [cell.as_json() for cell in cells],
        "chosen": [one.as_json(rate) for one in chosen],
    }
    title = f"Rankings of units of {ranked.site} on {rows.task}"
    tables = [chosen_table(chosen, rate, rows.rows("test"))]
    tables += gain_tables(cells, ks, budgets, rows.rows("test"))
    pictures = [gain_picture(title, cells, chosen, ks, budgets, rows.rows("test"))]
    middle = overlaps[len(overlaps) // 2]
    tables.append(overlap_table(middle))
    pictures.append(overlap_picture(middle, ranked.site, total))
    if alone is not None:
        tables.append(alone_table(alone, rows.rows("validation")))
        pictures.append(alone_picture(alone, rows.rows("validation")))
    return StudyResult(
        document,
        _values(chosen),
        tables,
        pictures,
        [*rows.notes(), *notes_of(document), *_left_out(steered.k, total)],
        "effect",
        title,
    )


def _wanted(
    language_model: LanguageModel, ranked: Ranked, steered: Steered
) -> tuple[list[int], list[float]]:
    """Numbers of units and budgets, each once and rising; those that there are."""
    total = site_units(language_model, ranked.site)
    ks = sorted({k for k in steered.k if 1 <= k <= total})
    if not ks:
        raise TrimtabError(f"{ranked.site} has 1 to {total} units here: name numbers k among them")
    budgets = sorted({float(kl) for kl in steered.kl})
    if not budgets or not all(math.isfinite(kl) and kl > 0 for kl in budgets):
        raise TrimtabError("budgets are numbers of nats above 0: name one or more (kl)")
    if ranked.draws < 1 or steered.alone < 0 or (ranked.pairs is not None and ranked.pairs < 2):
        raise TrimtabError("rankings take 1 random draw or more, and 2 pairs or more")
    if not (math.isfinite(steered.gamma) and steered.gamma > 0):
        raise TrimtabError(f"gamma must be above 0, not {steered.gamma:g}")
    return ks, budgets


def _left_out(ks: Sequence[int], total: int) -> list[str]:
    large = [f"{k:,}" for k in ks if k > total]
    return [f"there are {total:,} units, so k {', '.join(large)} was left out"] if large else []


def _values(chosen: Sequence[Chosen]) -> dict[str, Value]:
    """What was chosen gains on the test rows."""
    found = {}
    for one in chosen:
        gain = one.cell.gain
        name = f"{one.cell.name} within {one.cell.budget:g} nats"
        found[name] = Value(gain.difference, gain.ci95, gain.n)
    return found


# -- which units ----------------------------------------------------------------------------------


def _overlap(found: Fitted, k: int, total: int) -> dict[str, Any]:
    """How many of their first k units rankings share, as Jaccard's index. Of momentum there is one
    ranking, whatever the sign."""
    names = [name for name in RANKINGS if name not in (USUAL, RANDOM)]
    places = [found.of(name)[0].places(k) for name in names]
    jaccard = [[len(one & other) / len(one | other) for other in places] for one in places]
    shared, _ = chance_overlap(total, k, k, 0)
    return {"k": k, "names": names, "jaccard": jaccard, "chance": shared / (2 * k - shared)}


def _rankings_as_json(found: Fitted, most: int) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            **({} if one.draw is None else {"draw": one.draw}),
            "top": [
                {
                    "layer": unit.layer,
                    "unit": unit.unit,
                    "score": unit.score,
                    "gain": gain,
                    "effect": found.effects.of(unit),
                    "error": found.effects.error(unit),
                }
                for unit, gain in zip(one.units[:most], one.gains, strict=False)
            ],
        }
        for one in found.rankings
    ]
