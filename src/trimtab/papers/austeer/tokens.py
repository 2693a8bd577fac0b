"""Which tokens a unit promotes, and how the model's next token goes to the unit's own distribution
as it is scaled up (AUSteer, Figures 3 and 4)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, hooked, parse_site
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import check_number
from trimtab.model import LanguageModel
from trimtab.options import flat, option
from trimtab.papers.austeer.ranking import rankings
from trimtab.papers.result import StudyResult, Value, opened, timed
from trimtab.reports import Picture, Table, look_of, panels, styled
from trimtab.steering import Add, Dial, Intervention, Operator, Scale, Steering
from trimtab.strength import Turning, divergence
from trimtab.strength import limit as far_limit
from trimtab.terminal import progress

#: The factors of Figure 3, and the one that stands for no end.
STRENGTHS = (10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
FAR = 1e5
#: What is read where no prompts are named.
PROMPTS = ("She looked at the map and", "The most important thing is", "Today I feel")
#: Kinds whose units are weighed by one linear map on their way to the stream, and what it writes.
_WEIGHED = {"heads": "attn_out", "ffn_in": "ffn_out"}


@dataclass(frozen=True, kw_only=True)
class Scales:
    """How much units are scaled, and how much of what comes of it is shown."""

    heading = "Strengths"

    strengths: Sequence[float] = option("Strengths, as in -10,1,10.", STRENGTHS)
    top: int = option("How many of the highest are shown.", 5)
    far: float = option("The strength that stands for the limit.", FAR)


@flat
@timed
def tokens(
    language_model: LanguageModel,
    *,
    site: str = "heads",
    layer: int | None = None,
    units: Sequence[int] | None = None,
    scales: Scales = Scales(),
    prompts: Sequence[Any] | None = None,
    contrast: Contrast | str | None = None,
    data: str | None = None,
    chat: bool | None = False,
    seed: int = 0,
) -> StudyResult:
    """Scale single units of one block and decode what the model would write next.

    A unit x becomes (1 + s) x at all tokens. For each strength s: the `top` tokens by mean
    probability over the prompts; KL(p_s || p_far) to the distribution at `far`, and between each
    two units at the same strength, means over prompts in nats. Where a unit is added to the
    residual stream as it is, p_far is also held against what Proposition 4.1 of the strength paper
    foretells: the unembedded norm of the unit's direction, with the sign of its activation at the
    prompt's last token. With a `contrast` and no `units` the three of the highest scores in the
    block are taken (of the block of the highest one, where no `layer` is named), else three drawn
    by `seed`.
    """
    anatomy = language_model.anatomy
    top, far = scales.top, scales.far
    grid = _grid(scales.strengths, far)
    if top < 1:
        raise TrimtabError(f"the number of tokens must be 1 or more, not {top}")
    where, chosen = _chosen(language_model, site, layer, units, contrast, data, seed)
    texts = language_model.fitting(language_model.prompts(list(prompts or PROMPTS), chat))
    if not texts:
        raise TrimtabError("there is no prompt to read on from")
    signs = _signs(language_model, where, chosen, texts)
    logs: dict[int, Tensor] = {}
    base = torch.empty(0)
    with progress("scaling units", len(chosen)) as advance:
        for unit in chosen:
            base, logs[unit] = _turned(language_model, where, unit, texts, grid)
            advance(1)
    entries: list[dict[str, Any]] = []
    for place, unit in enumerate(chosen):
        found = logs[unit]  # [prompts, strengths, vocabulary]; the last is far
        direction = unit_direction(anatomy, where, unit)
        foretold = _foretold(language_model, where, direction, signs[:, place])
        kl = divergence(found[:, :-1], found[:, -1:])  # [prompts, strengths]
        entries.append(
            {
                "unit": unit,
                "activation": signs[:, place].tolist(),
                "kl_to_far": kl.mean(0).tolist(),
                "kl_to_far_prompts": kl.tolist(),
                "tokens": _tops(language_model, found, grid, top),
                "proposition": _held(language_model, found, foretold, top),
            }
        )
    between = [
        {
            "units": [one, other],
            "kl": divergence(logs[one], logs[other]).mean(0).tolist(),
        }
        for one, other in itertools.combinations(chosen, 2)
    ]
    unsteered = _top(language_model, base.exp().mean(0), top)
    document = {
        "site": where,
        "units": entries,
        "strengths": list(grid[:-1]),
        "far": far,
        "prompts": len(texts),
        "unsteered": unsteered,
        "between": [{**each, "strengths": list(grid)} for each in between],
    }
    values = {}
    for entry in entries:
        name, to_limit = f"unit {entry['unit']}", entry["kl_to_far"]
        values[name] = Value(", ".join(repr(one["token"]) for one in entry["tokens"][-1]["top"]))
        values[f"{name}, KL to the limit at the least strength"] = Value(to_limit[0])
        values[f"{name}, KL to the limit at the largest strength"] = Value(to_limit[-1])
    title = f"Tokens that units of {where} promote"
    return StudyResult(
        document,
        values,
        [_token_table(entries, unsteered, grid, len(texts)), _kl_table(entries, grid)],
        [_picture(title, document)],
        _notes(document, language_model),
        "tokens",
        title,
    )


# -- which units ----------------------------------------------------------------------------------


def _grid(strengths: Sequence[float], far: float) -> list[float]:
    for strength in (*strengths, far):
        check_number("a strength", strength)
    found = sorted(set(strengths))
    if not found or found[0] < 0 or found[-1] >= far:
        raise TrimtabError(f"strengths must lie between 0 and {far:g}, which stands for no end")
    return [*map(float, found), float(far)]


def _chosen(
    language_model: LanguageModel,
    kind: str,
    layer: int | None,
    units: Sequence[int] | None,
    contrast: Contrast | str | None,
    data: str | None,
    seed: int,
) -> tuple[str, list[int]]:
    """The site and its units."""
    anatomy = language_model.anatomy
    if units is None and contrast is not None:
        ranking = rankings(language_model, opened(contrast, data), [kind])[kind]
        if layer is None:
            layer = ranking.top(1)[0].layer
        site = anatomy.sites(kind, (layer,))[0]
        here = parse_site(site)[0]
        found = [unit.unit for unit in ranking.top(ranking.size) if unit.layer == here]
        return site, found[:3]
    site = anatomy.sites(kind, (-1 if layer is None else layer,))[0]
    width = anatomy.width(site)
    if units is None:
        generator = torch.Generator().manual_seed(seed)
        return site, sorted(torch.randperm(width, generator=generator)[:3].tolist())
    chosen = list(dict.fromkeys(units))
    for unit in chosen:
        if not 0 <= unit < width:
            raise TrimtabError(f"{site} has units 0 to {width - 1}, not {unit}")
    if not chosen:
        raise TrimtabError("there is no unit to scale: name some, or leave units out")
    return site, chosen


@torch.inference_mode()
def _signs(
    language_model: LanguageModel, site: str, units: Sequence[int], texts: Sequence[Sequence[int]]
) -> Tensor:
    """The units' unsteered activations at each text's last token, [texts, units] in float32."""
    found: list[Tensor] = []

    def see(activation: Tensor) -> None:
        found.append(activation[0, -1, list(units)].float().cpu())

    anatomy = language_model.anatomy
    with hooked(anatomy.body, {anatomy.point(site): see}):
        for text in texts:
            ids = torch.tensor([list(text)], device=language_model.device)
            anatomy.body(input_ids=ids, use_cache=False)
    return torch.stack(found)


def _steering(language_model: LanguageModel, site: str, operator: Operator, far: float) -> Steering:
    return Steering(
        method="unit",
        hyperparameters={},
        interventions=(Intervention(site, operator),),
        dial=Dial("s", 1.0, (-far, far)),
        model=language_model.identity,
    )


def _turned(
    language_model: LanguageModel,
    site: str,
    unit: int,
    texts: Sequence[Sequence[int]],
    grid: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Log-distributions of the next token: unsteered [texts, vocabulary], and at each strength,
    [texts, strengths, vocabulary]."""
    width = language_model.anatomy.width(site)
    operator = Scale(torch.tensor([unit]), torch.ones(1), width)
    turning = Turning(language_model, _steering(language_model, site, operator, grid[-1]), texts)
    found = torch.empty(len(texts) * len(grid), turning.base.shape[-1])
    questions = [i for i in range(len(texts)) for _ in grid]
    for places, log_p in turning.log_p(questions, list(grid) * len(texts)):
        found[places] = log_p.float().cpu()
    if not torch.isfinite(found).all():
        raise TrimtabError(
            f"the model's numbers overflow at strengths up to {grid[-1]:g}: load it with float32 "
            "(--dtype float32), or take smaller ones"
        )
    return turning.base.float().cpu(), found.unflatten(0, (len(texts), len(grid)))


# -- where it ends --------------------------------------------------------------------------------


def unit_direction(anatomy: Anatomy, site: str, unit: int) -> Tensor | None:
    """What a unit adds to the residual stream per unit of its activation, [hidden]; None where a
    norm or more than one linear map stands between."""
    layer, kind = parse_site(site)
    writers = set(anatomy.stream_writers)
    if kind == "resid" or site in writers:
        direction = torch.zeros(anatomy.hidden_size)
        direction[unit] = 1.0
        return direction
    if kind in _WEIGHED and f"layers.{layer}.{_WEIGHED[kind]}" in writers:
        maps = anatomy.readers(site)
        if len(maps) == 1 and not maps[0].joint:
            weight = maps[0].read()
            if weight.is_floating_point() and weight.shape == (
                anatomy.hidden_size,
                anatomy.width(site),
            ):
                return weight[:, unit].float().cpu()
    return None


def _foretold(
    language_model: LanguageModel, site: str, direction: Tensor | None, activations: Tensor
) -> Tensor | None:
    """Proposition 4.1's log-distribution for each prompt, [prompts, vocabulary]; None where it
    does not hold."""
    if direction is None or not direction.any() or not activations.all():
        return None
    layer = parse_site(site)[0]
    operator = Add(direction)
    steering = _steering(language_model, f"layers.{layer}.resid", operator, 1.0)
    ends: dict[Any, Tensor] = {}
    with suppress(TrimtabError):  # a direction that a LayerNorm takes away
        ends = {sign: far_limit(language_model, steering, sign).float().cpu() for sign in (1, -1)}
    if not ends:
        return None
    return torch.stack([ends[1 if x > 0 else -1] for x in activations.tolist()])


def _held(
    language_model: LanguageModel, found: Tensor, foretold: Tensor | None, top: int
) -> dict[str, Any] | None:
    if foretold is None:
        return None
    kl = divergence(found, foretold[:, None])  # [prompts, strengths]
    return {
        "kl": kl.mean(0).tolist(),
        "kl_far": float(kl[:, -1].mean()),
        "tokens": _top(language_model, foretold.exp().mean(0), top),
    }


# -- for people -----------------------------------------------------------------------------------


def _top(language_model: LanguageModel, p: Tensor, count: int) -> list[dict[str, Any]]:
    best = p.topk(min(count, len(p)))
    return [
        {"token": language_model.tokenizer.decode([token]), "id": token, "p": value}
        for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _tops(
    language_model: LanguageModel, found: Tensor, grid: Sequence[float], top: int
) -> list[dict[str, Any]]:
    p = found.exp().mean(0)  # [strengths, vocabulary]
    return [
        {"strength": strength, "top": _top(language_model, p[i], top)}
        for i, strength in enumerate(grid)
    ]


def _notes(found: dict[str, Any], language_model: LanguageModel) -> list[str]:
    notes = [
        f"means over {found['prompts']} prompts; another prompt may have other tokens, because a "
        "unit's activation may have another sign there"
    ]
    known = [entry for entry in found["units"] if entry["proposition"]]
    if known:
        worst = max(entry["proposition"]["kl_far"] for entry in known)
        notes.append(
            f"for {len(known)} of {len(found['units'])} units Proposition 4.1 names the limit: at "
            f"{found['far']:g} the model is {worst:.2g} nats away from it or less"
        )
    if len(known) < len(found["units"]):
        notes.append(
            "where no limit is given, a norm or a mixture of experts stands between the unit and "
            "the residual stream (or the unit is 0 at a prompt's end), and the output need not go "
            "to one token distribution"
        )
    turning = [
        str(entry["unit"])
        for entry in found["units"]
        if min(entry["activation"]) < 0 < max(entry["activation"])
    ]
    if turning:
        notes.append(
            f"the activation's sign differs between prompts for unit {', '.join(turning)}: scaling "
            "it up goes to opposite ends there"
        )
    if language_model.dtype != torch.float32:
        notes.append(
            f"in {str(language_model.dtype).removeprefix('torch.')}: large strengths round"
        )
    return notes


def _words(tops: Sequence[dict[str, Any]]) -> str:
    return "  ".join(f"{each['token']!r} {each['p']:.2f}" for each in tops)


def _token_table(
    entries: Sequence[dict[str, Any]],
    unsteered: Sequence[dict[str, Any]],
    grid: Sequence[float],
    prompts: int,
) -> Table:
    lines: list[list[Any]] = [["", "unsteered", _words(unsteered)]]
    middle = grid[(len(grid) - 1) // 2]
    for entry in entries:
        for each in entry["tokens"]:
            if each["strength"] in (grid[0], middle, grid[-1]):
                strength = f"s = {each['strength']:g}"
                lines.append([entry["unit"], strength, _words(each["top"])])
        if entry["proposition"]:
            foretold = _words(entry["proposition"]["tokens"])
            lines.append([entry["unit"], "Proposition 4.1", foretold])
    note = f"Mean probabilities over {prompts} prompts."
    return Table("Most probable next tokens", ["unit", "strength", "tokens"], lines, note)


def _kl_table(entries: Sequence[dict[str, Any]], grid: Sequence[float]) -> Table:
    lines = []
    for entry in entries:
        held = entry["proposition"]
        far = "none" if held is None else f"{held['kl_far']:.3g}"
        lines.append([entry["unit"], *(f"{kl:.3g}" for kl in entry["kl_to_far"]), far])
    heads = ["unit", *(f"s = {strength:g}" for strength in grid[:-1])]
    return Table(
        f"KL(p at s || p at {grid[-1]:g}), nats",
        [*heads, f"p at {grid[-1]:g} to Proposition 4.1"],
        lines,
    )


@styled
def _picture(title: str, found: dict[str, Any]) -> Picture:
    """Both divergences over strength: to the far end, and between units."""
    count = 2 if found["between"] else 1
    figure, every = panels((9.5 if count > 1 else 5.5, 3.8), 1, count)
    strengths = found["strengths"]
    for i, entry in enumerate(found["units"]):
        colour = _draw(every[0], i, strengths, entry["kl_to_far"], f"unit {entry['unit']}")
        if entry["proposition"]:
            foretold = _drawable(entry["proposition"]["kl"][:-1])
            every[0].plot(strengths, foretold, color=colour, linestyle=":", linewidth=1)
    every[0].set(ylabel=f"KL(p at s || p at {found['far']:g}), nats")
    for i, each in enumerate(found["between"]):
        _draw(every[1], i, each["strengths"], each["kl"], "{} and {}".format(*each["units"]))
        every[1].set(ylabel="KL between two units at the same s, nats")
    for axes in every:
        axes.set(xscale="log", yscale="log", xlabel="strength s (a unit x becomes (1 + s) x)")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return Picture(
        title,
        "tokens",
        figure,
        "how far the next token's distribution is from where it ends, and two units' from each "
        "other, over the strength",
        f"Means over {found['prompts']} prompts. Dotted: to the limit that Proposition 4.1 names, "
        "where it holds.",
    )


def _draw(axes: Any, i: int, x: Sequence[float], y: Sequence[float], label: str) -> str:
    """One line of several; its colour."""
    colour, marker = look_of(i)
    axes.plot(x, _drawable(y), color=colour, marker=marker, markersize=4, label=label)
    return colour


def _drawable(values: Sequence[float]) -> list[float]:
    """What a logarithmic axis can show: nothing at 0 and below, which is rounding."""
    return [value if value > 0 else math.nan for value in values]
