"""Where the units lie that tell the sides of contrasts apart: maps of their scores over the model
(AUSteer, Figure 11), and which of them several contrasts share (Figure 12)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.figures import holm
from trimtab.model import LanguageModel
from trimtab.papers.austeer.ranking import Ranking, Unit, chance_overlap, rankings
from trimtab.papers.result import StudyResult, Value, opened, timed
from trimtab.reports import DOWN, NEUTRAL, UP, Picture, Table, heatmap, panels, styled

#: Units of each kind of site that the table of a map shows.
_SHOWN = 10


@timed
def scores(
    language_model: LanguageModel,
    contrast: Contrast | str,
    *,
    sites: Sequence[str] = ("heads", "ffn_out"),
    data: str | None = None,
    k: int = 100,
    locate: Literal["momentum", "effect"] = "momentum",
) -> StudyResult:
    """The discriminative score of every unit of some kinds of sites, from one pass (Figure 11); by
    effect how many standard errors from 0 the effect of scaling each unit is.

    Beside the scores stands what the largest of so many units reaches by chance, with half and
    with 95 % probability. Heads are also shown one by one. `k` says of how many of the highest
    units the layers are counted.
    """
    texts = opened(contrast, data)
    found = rankings(language_model, texts, sites, locate)
    heads = language_model.anatomy.heads
    entries, tables, pictures = {}, [], []
    values: dict[str, Value] = {}
    for kind, ranking in found.items():
        entry = _described(ranking, k)
        pictures.append(_map(ranking, entry, texts.name, heads))
        if kind == "heads":
            by_head = ranking.scores.unflatten(1, (heads, -1))
            entry["head_max"] = by_head.amax(-1).tolist()
            entry["head_mean"] = by_head.mean(-1).tolist()
            pictures.append(_head_map(ranking, by_head.amax(-1).numpy(), texts.name))
        tables.append(_top_table(ranking, entry, heads))
        entries[kind] = entry
        values[f"{kind}, highest score"] = Value(max(entry["layer_max"]))
        values[f"{kind}, largest by chance (95 %)"] = Value(entry["chance_maximum"]["q95"])
        values[f"{kind}, units above that"] = Value(entry["above_chance"])
    return StudyResult(
        {
            "contrast": {"name": texts.name, "digest": texts.digest},
            "locate": locate,
            "sites": entries,
        },
        values,
        tables,
        pictures,
        _score_notes(entries, locate == "effect"),
        "scores",
        f"{'Effects' if locate == 'effect' else 'Discriminative scores'} of units on {texts.name}",
    )


def _described(ranking: Ranking, k: int) -> dict[str, Any]:
    scores = ranking.scores
    likely, rare = ranking.chance_maximum(), ranking.chance_maximum(0.95)
    top = ranking.top(k)
    return {
        "pairs": ranking.pairs,
        "layers": list(ranking.layers),
        "units_per_layer": scores.shape[1],
        "units": ranking.size,
        "chance_maximum": {"median": likely, "q95": rare},
        "above_chance": int((scores > rare).sum()),
        "layer_max": scores.amax(1).tolist(),
        "layer_mean": scores.mean(1).tolist(),
        "top": [_as_json(unit) for unit in top],
        "top_by_layer": _by_layer(top, ranking.layers),
        "scores": [[round(value, 4) for value in row] for row in scores.tolist()],
    }


def _as_json(unit: Unit) -> dict[str, Any]:
    return {**unit.as_json(), "gamma": unit.gain}


def _by_layer(units: Sequence[Unit], layers: Sequence[int]) -> list[int]:
    counts = dict.fromkeys(layers, 0)
    for unit in units:
        counts[unit.layer] += 1
    return list(counts.values())


def _score_notes(entries: Mapping[str, dict[str, Any]], by_effect: bool) -> list[str]:
    notes = []
    for kind, entry in entries.items():
        chance = entry["chance_maximum"]
        notes.append(
            f"{kind}: {entry['above_chance']:,} of {entry['units']:,} units score above "
            f"{chance['q95']:.3f}, which the largest of as many units that know nothing of the "
            f"contrast exceeds with 5 % probability at {entry['pairs']} pairs (half of the time it "
            f"exceeds {chance['median']:.3f})"
        )
    tells = "tells the sides apart, which is not yet to say that steering it does anything"
    if by_effect:
        tells = "does something to the answers of such pairs when it is scaled a little"
    notes.append(
        "chance takes pairs and units as independent: pairs that resemble each other make larger "
        "scores by luck alone, units that go together smaller ones; and a unit above chance "
        f"{tells}"
    )
    return notes


@styled
def _map(ranking: Ranking, entry: dict[str, Any], contrast: str, heads: int) -> Picture:
    """Scores of all units, and of each layer the largest and the mean."""
    scores, kind = ranking.scores.numpy(), ranking.kind
    figure, (left, right) = panels((10, 4.2), 1, 2, width_ratios=[2.2, 1])
    options: dict[str, Any] = {"cmap": "cividis", "interpolation": "nearest"}
    options |= {"vmin": _lowest(ranking)}
    heatmap(figure, left, scores, _score_words(ranking), fraction=0.04, **options)
    left.set(ylabel="layer", xlabel=f"unit of {kind}")
    if kind == "heads":
        width = scores.shape[1] // heads
        for edge in range(1, heads):
            left.axvline(edge * width - 0.5, color="white", linewidth=0.5)
        left.set_xticks([(head + 0.5) * width - 0.5 for head in range(heads)], range(heads))
        left.set(xlabel=f"head ({width} units each)")
    places = np.arange(len(scores))
    right.plot(scores.max(1), places, "o-", color=UP, markersize=3, label="largest")
    right.plot(scores.mean(1), places, "s-", color=NEUTRAL, markersize=3, label="mean")
    chance = entry["chance_maximum"]
    right.axvline(chance["median"], color=DOWN, linestyle=":", label="chance's largest, half")
    right.axvline(chance["q95"], color=DOWN, linestyle="--", label="chance's largest, 95 %")
    right.set(xlabel=f"{_score_words(ranking)} of the layer's units", ylabel="layer")
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    right.legend(frameon=False, fontsize=7, ncols=2, **below)
    for axes in (left, right):
        _layer_ticks(axes, ranking.layers)
    title = f"Scores at {kind} on {contrast}, {ranking.pairs} pairs"
    figure.suptitle(title)
    return Picture(
        title,
        f"scores-{kind}",
        figure,
        f"the {_score_words(ranking)} of each of {ranking.size:,} units by layer; the largest is "
        f"{scores.max():.3f}, chance's largest {chance['median']:.3f}",
        f"A score is {_score_meaning(ranking)}. Dashed: what the largest of all units exceeds by "
        "luck with 5 % probability, dotted: with 50 %.",
    )


def _score_words(ranking: Ranking) -> str:
    return "discriminative score s" if ranking.effects is None else "certainty |z| of the effect"


def _score_meaning(ranking: Ranking) -> str:
    if ranking.effects is None:
        return "the share of pairs in which the unit is larger on the same side"
    return "the effect of scaling the unit on log-odds, in standard errors over the pairs"


def _lowest(ranking: Ranking) -> float:
    """The least that the highest scores can be, at which colours begin."""
    return 0.5 if ranking.effects is None else 0.0


def _layer_ticks(axes: Any, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 10)
    axes.set_yticks(range(0, len(layers), step), [layers[i] for i in range(0, len(layers), step)])
    axes.set_ylim(-0.5, len(layers) - 0.5)


@styled
def _head_map(ranking: Ranking, largest: Any, contrast: str) -> Picture:
    """The largest score of each head's units."""
    layers, heads = largest.shape
    figure, (axes,) = panels((max(4.0, 1.8 + 0.3 * heads), max(3.0, 1 + 0.13 * layers)))
    label = f"largest {_score_words(ranking)} of the head's units"
    heatmap(figure, axes, largest, label, cmap="cividis", vmin=_lowest(ranking), fraction=0.15)
    _layer_ticks(axes, range(layers))
    axes.set_xticks(range(0, heads, max(1, heads // 16)))
    title = f"Heads on {contrast}"
    axes.set(xlabel="head", ylabel="layer", title=title)
    return Picture(title, "scores-by-head", figure, "the largest score of each head's units")


def _top_table(ranking: Ranking, entry: dict[str, Any], heads: int) -> Table:
    width = ranking.scores.shape[1] // heads
    is_heads = ranking.kind == "heads"
    rows = [
        [
            unit.rank,
            unit.layer,
            *([unit.unit // width] if is_heads else []),
            unit.unit,
            f"{unit.score:.3f}",
            f"{unit.r_pos:.3f}",
            f"{unit.r_neg:.3f}",
            *([] if unit.effect is None else [f"{unit.effect:+.3g}"]),
        ]
        for unit in ranking.top(_SHOWN)
    ]
    score = ["s", "r pos", "r neg"]
    if ranking.effects is not None:
        score = ["|z|", "r pos", "r neg", "effect, nats"]
    named = ["rank", "layer", *(["head"] if is_heads else []), "unit", *score]
    chance = entry["chance_maximum"]
    return Table(
        f"The highest units of {ranking.kind}",
        named,
        rows,
        f"n = {ranking.pairs} pairs; the largest of {ranking.size:,} units by chance: "
        f"{chance['median']:.3f} (half of the time more), {chance['q95']:.3f} (5 % of the time).",
    )


# -- overlap --------------------------------------------------------------------------------------


@timed
def overlap(
    language_model: LanguageModel,
    contrasts: Mapping[str, Contrast | str],
    *,
    site: str = "ffn_out",
    k: int = 100,
    data: str | None = None,
    locate: Literal["momentum", "effect"] = "momentum",
) -> StudyResult:
    """How many of the k highest units several contrasts share (Figure 12), ranked by momentum or by
    effect.

    Beside each count stands what two random choices of k units share, of all units and of units
    drawn in the same layers, and the probability of so many among all units (hypergeometric),
    corrected for the number of comparisons (Holm).
    """
    if len(contrasts) < 2:
        raise TrimtabError("overlap compares contrasts: name two or more")
    loaded = {name: opened(contrast, data) for name, contrast in contrasts.items()}
    ranked = {
        name: rankings(language_model, contrast, [site], locate)[site]
        for name, contrast in loaded.items()
    }
    size = next(iter(ranked.values())).size
    if not 1 <= k <= size:
        raise TrimtabError(f"k is {k}, but {site} has 1 to {size} units here")
    tops = {name: ranking.top(k) for name, ranking in ranked.items()}
    compared = [
        _shared(tops, first, second, size, ranked[first])
        for first, second in itertools.combinations(contrasts, 2)
    ]
    for entry, p in zip(compared, holm([entry["p"] for entry in compared]), strict=True):
        entry["p_corrected"] = p
    lowest = {name: top[-1].score for name, top in tops.items()}
    document = {
        "site": site,
        "k": k,
        "locate": locate,
        "units": size,
        "contrasts": {
            name: {
                "pairs": ranking.pairs,
                "digest": loaded[name].digest,
                "chance_maximum": ranking.chance_maximum(),
                "lowest_score": lowest[name],
                "top": [[unit.layer, unit.unit] for unit in tops[name]],
            }
            for name, ranking in ranked.items()
        },
        "shared": compared,
    }
    notes = [
        f"two random choices of {k} among {size:,} units share {k * k / size:.2g}; p is the "
        f"probability of as many or more, times Holm's factor for {len(compared)} comparisons",
        "units of the same few layers are shared more often by chance than units of all layers: "
        "that expectation is given too",
    ]
    notes += [
        f"{name}: the last of its {k} units scores {lowest[name]:.3f}, which chance "
        "reaches too: part of its choice is luck"
        for name, ranking in ranked.items()
        if lowest[name] <= ranking.chance_maximum(0.95)
    ]
    values = {
        f"{one['first']} and {one['second']}": Value(
            f"{one['shared']} of {k} (chance {one['chance']:.2g})"
        )
        for one in compared
    }
    return StudyResult(
        document,
        values,
        [_shared_table(compared, k)],
        [_matrix(list(contrasts), compared, k, size, site)],
        notes,
        "overlap",
        f"Units of {site} that contrasts share",
    )


def _shared(
    tops: Mapping[str, Sequence[Unit]], first: str, second: str, size: int, ranking: Ranking
) -> dict[str, Any]:
    one, other = ({(u.layer, u.unit) for u in tops[name]} for name in (first, second))
    both = sorted(one & other)
    mean, p = chance_overlap(size, len(one), len(other), len(both))
    width = ranking.scores.shape[1]
    layers = ranking.layers
    in_layers = sum(
        a * b / width
        for a, b in zip(
            _by_layer(tops[first], layers), _by_layer(tops[second], layers), strict=True
        )
    )
    return {
        "first": first,
        "second": second,
        "shared": len(both),
        "jaccard": len(both) / len(one | other),
        "chance": mean,
        "chance_same_layers": in_layers,
        "p": p,
        "units": [list(place) for place in both],
    }


def _shared_table(compared: Sequence[dict[str, Any]], k: int) -> Table:
    rows = [
        [
            f"{entry['first']}, {entry['second']}",
            entry["shared"],
            f"{entry['jaccard']:.3f}",
            f"{entry['chance']:.2g}",
            f"{entry['chance_same_layers']:.2g}",
            f"{entry['p_corrected']:.2g}",
        ]
        for entry in compared
    ]
    heads = ["contrasts", "shared", "Jaccard", "by chance", "by chance, same layers", "p corrected"]
    return Table(f"Of the {k} highest units", heads, rows)


@styled
def _matrix(
    names: Sequence[str], compared: Sequence[dict[str, Any]], k: int, size: int, site: str
) -> Picture:
    counts = np.full((len(names), len(names)), np.nan)
    words = {(i, i): (f"{k}", False) for i in range(len(names))}
    top = max(k / 10, *(entry["shared"] for entry in compared))  # one unit is no dark field
    for entry in compared:
        i, j = names.index(entry["first"]), names.index(entry["second"])
        counts[i, j] = counts[j, i] = entry["shared"]
        text = f"{entry['shared']}\n({entry['chance_same_layers']:.1f})"
        words[i, j] = words[j, i] = text, entry["shared"] > 0.6 * top
    side = max(4.0, 2.2 + 0.8 * len(names))
    figure, (axes,) = panels((side + 1, side))
    options: dict[str, Any] = {
        "cmap": "Blues",
        "vmin": 0,
        "vmax": top,
        "aspect": "equal",
        "origin": "upper",
    }
    label = f"units that are among both's {k} highest"
    heatmap(figure, axes, counts, label, words=words, size=9, **options)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    title = f"Shared units of {site}, {k} of {size:,} each"
    axes.set_title(title)
    return Picture(
        title,
        "overlap",
        figure,
        "how many of the highest units each two contrasts share",
        "In brackets: what random choices in the same layers would share. On the diagonal: all "
        "units that were chosen.",
    )
