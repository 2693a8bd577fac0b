"""What angular steering rests on: candidate directions, the plane, the discriminative layers.

Selective Steering (arXiv 2601.19375) takes one candidate direction from each norm, chooses the one
that is most like all others, and steers where the two sides project on it with opposite signs
(L_disc, its equation 9). `plane` shows each of these steps for SS, SAS or AAS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats
from torch import Tensor

from trimtab.anatomy import parse_site
from trimtab.contrasts import Contrast
from trimtab.errors import check_choice
from trimtab.fitting import Samples, UnitLength, Want, collect
from trimtab.methods import (
    AAS,
    SAS,
    SS,
    Candidates,
    candidate_wants,
    candidates,
    discriminative,
    plane_of,
    sites_of,
    unit_means,
)
from trimtab.model import LanguageModel
from trimtab.papers.result import StudyResult, Value, opened, timed
from trimtab.reports import (
    DOWN,
    GREEN,
    NEUTRAL,
    UP,
    Picture,
    Table,
    banded,
    heatmap,
    interval,
    panels,
    styled,
)

#: The methods that turn activations in a plane.
ANGULAR: dict[str, type[SAS] | type[SS]] = {"ss": SS, "sas": SAS, "aas": AAS}


@dataclass(frozen=True)
class Projection:
    """One side's mean of <h / |h|, b1> at a site, with its 95 % interval (Student's t)."""

    mean: float
    ci95: tuple[float, float]
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval keeps clear of zero."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


@timed
def plane(
    language_model: LanguageModel,
    contrast: Contrast | str,
    *,
    data: str | None = None,
    method: Literal["ss", "sas", "aas"] = "ss",
    candidates_from: Literal["output", "input"] | None = None,
    selection: Literal["cosine", "norm"] = "cosine",
    ss_compat: bool = False,
) -> StudyResult:
    """The candidate directions of all norms, the one that is chosen, and where the sides part.

    One pass over the contrast's train part. `method` is the one whose way is taken; SS reads
    candidates from the norms' outputs and SAS and AAS from their inputs unless `candidates_from`
    says otherwise. `selection` and `ss_compat` are the methods' own. The projections are those on
    b1, of the norms' outputs at the last token divided by their length; a site is discriminative
    where the two sides' means have opposite signs, and by the whole-block rule of SS's code a
    block is steered where all of its norms are.
    """
    check_choice("method", method, Literal["ss", "sas", "aas"])
    made = _method(method, candidates_from, selection, ss_compat)
    anatomy, train = language_model.anatomy, opened(contrast, data).train
    sites = sites_of(made, anatomy)
    every = [Want(site, "last", Samples, read=UnitLength()) for site in sites]
    wants = [*candidate_wants(made, anatomy).values(), *map(unit_means, sites), *every]
    statistics = collect(language_model, train, wants)
    found = candidates(made, anatomy, statistics)
    chosen = plane_of(made, found)
    means = {
        site: (statistics[unit_means(site)].positive, statistics[unit_means(site)].negative)
        for site in sites
    }
    projections = {
        want.site: _projections(chosen.basis[0], means[want.site], statistics[want])
        for want in every
    }
    alone = discriminative(chosen.basis[0], means, whole_blocks=False)
    whole = discriminative(chosen.basis[0], means, whole_blocks=True)
    rows = _rows(found, chosen.basis, projections, alone, whole)
    blocks = sorted({row["layer"] for row in rows if row["whole_block"]})
    document = {
        "method": made.name,
        "candidates": made.candidates,
        "selection": made.selection,
        "contrast": {"name": train.name, "digest": train.digest, "rows": len(train)},
        "plane": {"source_site": chosen.source, "mean_cosine": round(chosen.mean_cosine, 6)},
        "discriminative": {"sites": alone, "whole_blocks": whole, "blocks": blocks},
        "sites": rows,
        "cosines": [[round(value, 6) for value in row] for row in found.cosines.tolist()],
    }
    values = {
        "taken from": Value(chosen.source),
        "mean cosine of the winner": Value(round(chosen.mean_cosine, 6)),
        "blocks that discriminate": Value(", ".join(map(str, blocks)) or "none"),
    }
    return StudyResult(
        document,
        values,
        [_plane_table(rows, chosen.source)],
        [
            _cosine_picture(found, chosen.source, made.name),
            _projection_picture(rows, anatomy.layers, train.name),
        ],
        _plane_notes(rows, blocks, made),
        "plane",
        f"The plane of {made.name} on {train.name}",
    )


def _method(
    name: str,
    candidates_from: Literal["output", "input"] | None,
    selection: Literal["cosine", "norm"],
    ss_compat: bool,
) -> SAS | SS:
    kind = ANGULAR[name]
    if candidates_from is None:
        return kind(selection=selection, ss_compat=ss_compat)
    return kind(selection=selection, ss_compat=ss_compat, candidates=candidates_from)


def _projections(
    b1: Tensor, means: tuple[Tensor, Tensor], samples: Samples
) -> tuple[Projection, Projection]:
    """Of the two sides: exact means, and intervals from every text's own projection."""
    activations, positive, _ = samples.texts()
    own = activations.double() @ b1
    sides = (own[positive], own[~positive])
    first, second = (
        _projection(float(mean @ b1), values) for mean, values in zip(means, sides, strict=True)
    )
    return first, second


def _projection(mean: float, values: Tensor) -> Projection:
    n = len(values)
    reach = 0.0
    if n > 1:
        reach = float(stats.t.ppf(0.975, n - 1) * values.std() / n**0.5)
    return Projection(mean, (mean - reach, mean + reach), n)


def _rows(
    found: Candidates,
    basis: Tensor,
    projections: Mapping[str, tuple[Projection, Projection]],
    alone: Sequence[str],
    whole: Sequence[str],
) -> list[dict[str, Any]]:
    """What is known of each site."""
    mean_cosines = found.cosines.mean(-1).tolist()
    in_plane = (found.unit @ basis.T).norm(dim=-1).tolist()
    rows = []
    for i, site in enumerate(found.sites):
        layer, kind = parse_site(site)
        positive, negative = projections[site]
        rows.append(
            {
                "site": site,
                "layer": layer,
                "kind": kind,
                "length": float(found.lengths[i]),
                "mean_cosine": mean_cosines[i],
                "in_plane": in_plane[i],
                "positive": positive.mean,
                "positive_ci95": positive.ci95,
                "negative": negative.mean,
                "negative_ci95": negative.ci95,
                "signs_clear": positive.clear and negative.clear,
                "discriminative": site in alone,
                "whole_block": site in whole,
            }
        )
    return rows


def _plane_table(rows: Sequence[Mapping[str, Any]], source: str) -> Table:
    shown = [
        [
            row["site"] + (" (b1)" if row["site"] == source else ""),
            f"{row['length']:.4g}",
            f"{row['mean_cosine']:.3f}",
            f"{row['in_plane']:.3f}",
            f"{row['positive']:+.4f} {interval(row['positive_ci95'])}",
            f"{row['negative']:+.4f} {interval(row['negative_ci95'])}",
            "yes" if row["discriminative"] else "",
            "yes" if row["whole_block"] else "",
        ]
        for row in rows
    ]
    heads = [
        "site",
        "|d|",
        "mean cosine",
        "share in the plane",
        "positive on b1",
        "negative on b1",
        "discriminative",
        "whole block",
    ]
    note = (
        "|d| is the length of the difference between the sides. Share in the plane: the length of "
        "the unit candidate's part in span(b1, b2). Projections are of activations at unit length; "
        "their intervals are Student's t."
    )
    return Table("Sites", heads, shown, note)


def _plane_notes(rows: Sequence[Mapping[str, Any]], blocks: Sequence[int], made: Any) -> list[str]:
    notes = []
    by_sites = sorted({row["layer"] for row in rows if row["discriminative"]})
    if not by_sites:
        notes.append("no site is discriminative on this contrast: SS has nothing to steer")
    else:
        notes.append(
            f"discriminative: {sum(row['discriminative'] for row in rows)} of {len(rows)} sites, "
            f"in blocks {spans(by_sites)}; by the whole-block rule blocks {spans(blocks)}"
        )
    unclear = [row for row in rows if not row["signs_clear"]]
    if unclear:
        notes.append(
            f"at {len(unclear)} of {len(rows)} sites the interval of a side's mean holds zero, so "
            "whether they are discriminative may differ on other texts"
        )
    idle = [row["site"] for row in rows if row["length"] == 0]
    if idle:
        notes.append(f"the sides do not differ at {', '.join(idle)}: no direction there")
    if made.name != "ss":
        notes.append(f"{made.name} steers every site: it does not choose discriminative layers")
    return notes


def spans(layers: Sequence[int]) -> str:
    """`9, 11-16`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    shown = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts]
    return ", ".join(shown) or "none"


@styled
def _cosine_picture(found: Candidates, source: str, method: str) -> Picture:
    """All candidates against each other, and the mean cosine that b1 is chosen by."""
    cosines, sites = found.cosines.numpy(), found.sites
    count, best = len(sites), found.sites.index(source)
    layers = [parse_site(site)[0] for site in sites]
    kinds = list(dict.fromkeys(parse_site(site)[1] for site in sites))
    figure, (grid, lines) = panels((10.5, 5.0), 1, 2, width_ratios=[1.25, 1])
    options: dict[str, Any] = {"cmap": "PuOr_r", "vmin": -1, "vmax": 1, "aspect": "equal"}
    heatmap(figure, grid, cosines, "cosine", **options)
    firsts = [i for i in range(count) if i == 0 or layers[i] != layers[i - 1]]
    ticks = firsts[:: max(1, len(firsts) // 12)]
    grid.set_xticks(ticks, [str(layers[i]) for i in ticks])
    grid.set_yticks(ticks, [str(layers[i]) for i in ticks])
    label = f"layer; in each: {', '.join(kinds)}"
    grid.set(xlabel=label, ylabel=label, title="cosine of the candidate directions")
    for line in (grid.axhline, grid.axvline):
        line(best, color=GREEN, linewidth=1.2)
    means = cosines.mean(-1)
    for kind, colour, marker in zip(kinds, (UP, DOWN, NEUTRAL, "#CC79A7"), "o^sD", strict=False):
        places = [i for i in range(count) if parse_site(sites[i])[1] == kind]
        style = {"marker": marker, "markersize": 4, "linewidth": 1.1, "color": colour}
        lines.plot([layers[i] for i in places], means[places], label=kind, **style)
    lines.plot(layers[best], means[best], "o", markersize=11, mfc="none", mec=GREEN, mew=1.8)
    right = (layers[best] or 0) > max(filter(None, layers), default=0) / 2
    lines.annotate(
        f"b1: {source}",
        (layers[best], means[best]),
        xytext=(0, 10),
        textcoords="offset points",
        ha="right" if right else "left",
        color="black",
    )
    low, high = lines.get_ylim()
    lines.set_ylim(low, high + 0.12 * (high - low))
    lines.axhline(0, color="black", linewidth=0.6)
    lines.set(xlabel="layer", ylabel="mean cosine to all candidates", title="which is most typical")
    lines.legend(frameon=False)
    return Picture(
        f"Candidate directions of {method}",
        "cosines",
        figure,
        f"cosines between the candidate directions of {count} sites; {source} is b1",
        f"The green lines cross at {source}, from which b1 is taken.",
    )


@styled
def _projection_picture(rows: Sequence[Mapping[str, Any]], layers: int, name: str) -> Picture:
    """Where the two sides' means lie on b1, site by site; what SS steers is shaded."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, every = panels((7.2, 0.7 + 2.4 * len(kinds)), len(kinds), sharex=True)
    for axes, kind in zip(every, kinds, strict=True):
        own = [row for row in rows if row["kind"] == kind]
        for row in own:
            if row["whole_block"]:
                axes.axvspan(row["layer"] - 0.5, row["layer"] + 0.5, color=GREEN, alpha=0.16, lw=0)
        x = [row["layer"] for row in own]
        for side, colour, marker in (("positive", UP, "^"), ("negative", DOWN, "v")):
            low, high = np.array([row[f"{side}_ci95"] for row in own]).T
            middle = [row[side] for row in own]
            banded(axes, x, low, high, colour, middle=middle, linewidth=1, label=side)
            for row in own:
                face = colour if row["discriminative"] else "white"
                axes.plot(row["layer"], row[side], marker, color=colour, mfc=face, markersize=5)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(ylabel="mean of ⟨h/|h|, b1⟩", xlim=(-0.6, layers - 0.4))
        axes.set_title(kind, loc="left")
    every[-1].set_xlabel("layer")
    handles, _ = every[0].get_legend_handles_labels()
    style: dict[str, Any] = {"linestyle": "", "marker": "o", "color": "black"}
    handles += [
        Line2D([], [], label="filled: discriminative", **style),
        Patch(color=GREEN, alpha=0.16, label="shaded: the whole block is"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return Picture(
        "Where the two sides part",
        "projections",
        figure,
        f"projection of the two sides of {name} on b1 by layer, with 95 % intervals",
        "Filled markers: the two means have opposite signs (discriminative). Shaded: all norms of "
        "the block are, which is what SS steers by default.",
    )
