"""How long activations are, layer by layer and site by site, and which tokens stand out.

The residual stream grows with depth, and some tokens are far longer than all others: what is added
to an activation means more in one layer than in the next. It is why Selective Steering (arXiv
2601.19375) turns activations and keeps their length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from trimtab.anatomy import hooked, parse_site
from trimtab.contrasts import Contrast, Text
from trimtab.errors import TrimtabError, check_choice
from trimtab.model import LanguageModel
from trimtab.papers.result import StudyResult, Value, opened, timed
from trimtab.reading import Batch, batches, encode_contrast, packed, run_packed
from trimtab.reports import DOWN, NEUTRAL, UP, Picture, Table, banded, panels, styled
from trimtab.terminal import progress

#: The sites that are shown: the stream, what the branches read, what they add.
KINDS = ("resid", "attn_norm", "ffn_norm", "attn_out", "ffn_out")


@dataclass
class _Lengths:
    """Lengths of activations at one site, text by text."""

    sides: list[list[float]] = field(default_factory=lambda: [[], []])
    #: Of every token of every text: its length, its position and its id.
    all: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)


@timed
def norms(
    language_model: LanguageModel,
    contrast: Contrast | str,
    *,
    data: str | None = None,
    kinds: Sequence[str] = KINDS,
    token: Literal["last", "mean"] = "last",
    massive: float = 10.0,
    limit: int | None = None,
) -> StudyResult:
    """Lengths of activations by layer and kind of site, of the two sides of a contrast.

    One pass over the train part, or over its first `limit` rows. A text stands for itself by its
    last token, or by the mean length over its tokens. A token is massive where its activation is
    more than `massive` times as long as that of the site's median token (such tokens, mostly the
    first one, take up attention that has nowhere to go).
    """
    check_choice("token", token, Literal["last", "mean"])
    if not massive > 1:
        raise TrimtabError(f"massive is a factor above 1, not {massive:g}")
    anatomy, train = language_model.anatomy, _first(opened(contrast, data).train, limit)
    for kind in kinds:
        if kind in ("embed", "final_norm"):
            raise TrimtabError(f"{kind} is not a site of the blocks: norms go by layer")
    sites = [site for kind in kinds for site in anatomy.sites(kind)]
    rows = encode_contrast(language_model, train, None)
    lengths = {site: _Lengths() for site in sites}
    with progress("norms", len(rows)) as advance:
        for batch in batches(rows, language_model.batch_tokens, packed(language_model, rows)):
            _take_in(lengths, _read(language_model, batch, sites), batch, train, token)
            advance(len(batch.rows))
    found = [_site_lengths(language_model, site, lengths[site], massive) for site in sites]
    stream = [one["median"] for one in found if one["kind"] == "resid"]
    values = {}
    if len(stream) > 1:
        values["median length, last block over first"] = Value(stream[-1] / stream[0])
    return StudyResult(
        {
            "contrast": {"name": train.name, "digest": train.digest, "rows": len(rows)},
            "token": token,
            "massive_above": massive,
            "sites": found,
        },
        values,
        [_norm_table(found)],
        [_norm_picture(found, list(dict.fromkeys(kinds)), anatomy.layers, token)],
        _norm_notes(found, massive),
        "norms",
        f"Activation norms on {train.name}",
    )


def _first(contrast: Contrast, limit: int | None) -> Contrast:
    """The first so many pairs, or texts of each side."""
    if limit is None:
        return contrast
    if limit < 1:
        raise TrimtabError(f"limit must be 1 row or more, not {limit}")
    taken: Counter[str] = Counter()
    kept = []
    for row in contrast.rows:
        label = row.label if isinstance(row, Text) else ""
        taken[label] += 1
        if taken[label] <= limit:
            kept.append(row)
    return replace(contrast, rows=tuple(kept))


@torch.inference_mode()
def _read(language_model: LanguageModel, batch: Batch, sites: Sequence[str]) -> dict[str, Tensor]:
    """The length of every activation, [lines, columns] of each site."""
    seen: dict[str, Tensor] = {}

    def reader(site: str) -> Any:
        def read(activation: Tensor) -> None:
            seen[site] = activation.float().norm(dim=-1).double().cpu()

        return read

    anatomy = language_model.anatomy
    with hooked(anatomy.body, {anatomy.point(site): reader(site) for site in sites}):
        run_packed(batch, language_model)
    return seen


def _take_in(
    lengths: Mapping[str, _Lengths],
    seen: Mapping[str, Tensor],
    batch: Batch,
    contrast: Contrast,
    token: str,
) -> None:
    """Sort the lengths of a batch by texts and sides."""
    for i, row in enumerate(batch.rows):
        for side in range(batch.place.shape[1]):
            where = batch.place_of(i, side)
            if not contrast.paired:
                side = 0 if contrast.texts[row.index].label == "positive" else 1
            for site, found in seen.items():
                own = found[where]
                kept = lengths[site]
                kept.sides[side].append(float(own[-1] if token == "last" else own.mean()))
                kept.all.append(own)
                kept.positions.append(torch.arange(len(own)))
                kept.ids.append(batch.tokens[where])


def _site_lengths(
    language_model: LanguageModel, site: str, lengths: _Lengths, massive: float
) -> dict[str, Any]:
    """Mean and spread of the two sides, and the tokens that stand out."""
    layer, kind = parse_site(site)
    every, positions, ids = (torch.cat(x) for x in (lengths.all, lengths.positions, lengths.ids))
    median = float(every.median())
    out = every > massive * median
    tokens = Counter(ids[out].tolist()).most_common(3)
    sides = {}
    for name, values in zip(("positive", "negative"), lengths.sides, strict=True):
        own = torch.tensor(values, dtype=torch.float64)
        spread = float(own.std()) if len(own) > 1 else 0.0
        sides[name] = {"mean": float(own.mean()), "sd": spread, "n": len(own)}
    return {
        "site": site,
        "layer": layer,
        "kind": kind,
        **sides,
        "median": median,
        "largest": float(every.max()),
        "tokens": len(every),
        "massive": int(out.sum()),
        "massive_first": int((positions[out] == 0).sum()),
        "massive_tokens": [
            {"token": language_model.tokenizer.decode([token]), "id": token, "n": n}
            for token, n in tokens
        ],
    }


def _norm_table(found: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for one in found:
        names = ", ".join(f"{shown['token']!r} {shown['n']}" for shown in one["massive_tokens"])
        rows.append(
            [
                one["site"],
                *(f"{one[side]['mean']:.4g} ± {one[side]['sd']:.2g}" for side in _SIDES),
                f"{one['median']:.4g}",
                f"{one['largest']:.4g}",
                f"{one['massive']} of {one['tokens']}" if one["massive"] else "",
                names,
            ]
        )
    heads = [
        "site",
        "positive, mean ± sd",
        "negative, mean ± sd",
        "median token",
        "longest token",
        "massive",
        "which",
    ]
    return Table("Norms", heads, rows)


_SIDES = ("positive", "negative")


def _norm_notes(found: Sequence[Mapping[str, Any]], massive: float) -> list[str]:
    notes = []
    out = [one for one in found if one["massive"]]
    if out:
        count, first = (sum(one[key] for one in out) for key in ("massive", "massive_first"))
        worst = max(out, key=lambda one: one["largest"] / one["median"])
        notes.append(
            f"massive tokens (more than {massive:g} times the median) at {len(out)} of "
            f"{len(found)} sites; {first / count:.0%} of them are the first token of a text; the "
            f"longest, at {worst['site']}, is {worst['largest'] / worst['median']:.0f} times the "
            "median"
        )
    else:
        notes.append(f"no token is longer than {massive:g} times the median of its site")
    stream = [
        one["positive"]["mean"] + one["negative"]["mean"] for one in found if one["kind"] == "resid"
    ]
    if len(stream) > 1:
        notes.append(
            f"from the first block to the last the residual stream grows "
            f"{stream[-1] / stream[0]:.1f} times"
        )
    return notes


@styled
def _norm_picture(
    found: Sequence[Mapping[str, Any]], kinds: Sequence[str], layers: int, token: str
) -> Picture:
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    figure, every = panels((1 + 4.4 * columns, 0.5 + 2.5 * lines), lines, columns)
    for axes, kind in zip(every, kinds, strict=False):
        own = [one for one in found if one["kind"] == kind]
        x = [one["layer"] for one in own]
        for side, colour, dash in (("positive", UP, "-"), ("negative", DOWN, (0, (5, 2)))):
            mean, sd = (np.array([one[side][key] for one in own]) for key in ("mean", "sd"))
            low = np.maximum(mean - sd, mean * 0.02)  # the axis is logarithmic
            style = {"linestyle": dash, "linewidth": 1.3, "label": side}
            banded(axes, x, low, mean + sd, colour, middle=mean, **style)
        longest = [one["largest"] for one in own]
        axes.plot(x, longest, color=NEUTRAL, linewidth=1, linestyle=":", label="longest token")
        massive = [(one["layer"], one["largest"]) for one in own if one["massive"]]
        at = np.array(massive).reshape(-1, 2).T
        axes.plot(*at, "*", color="black", markersize=6, label="massive")
        axes.set(yscale="log", xlabel="layer", ylabel="length of the activation")
        axes.set_xlim(-0.6, layers - 0.4)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(kind, loc="left")
    for axes in every[len(kinds) :]:
        axes.set_axis_off()
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    what = "last token" if token == "last" else "mean over tokens"
    return Picture(
        "Activation norms",
        "norms",
        figure,
        f"length of activations by layer for the two sides, {what}, mean and standard deviation",
        f"Bands: one standard deviation over texts ({what}). The dotted line is the longest token "
        "of all texts.",
    )
