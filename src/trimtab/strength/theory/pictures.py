"""Figures 3, 4, 5 and B.1 of "Towards Understanding Steering Strength", drawn from the theory.

The paper does not print the parameters of its pictures. Ours, `example`, are chosen to show the
same: V = 9 and G = 3 with the paper's ε, and log-odds near enough to each other for the peaks to
lie within -60 to 60.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trimtab.errors import TrimtabError
from trimtab.files import make_directory, write_whole
from trimtab.reports import DOWN, NEUTRAL, UP, panels, rendered, styled
from trimtab.strength.theory.data import Array
from trimtab.strength.theory.ufm import SteeredUFM, perfect, specification, train
from trimtab.terminal import progress

# Eq. 2, but for its last three, α, β and γ: α is the strength here.
TOKENS = ("a", "b", "c", "A", "B", "C", "φ", "χ", "ψ")
CONCEPTS = ("lower case", "capitals", "Greek")
STYLES = ("-", "--", "-.")
CONTEXT = 8  # Greek: where there is little of the target, and of its opposite, to begin with


def example() -> SteeredUFM:
    """The steered model of the pictures: toward lower case, away from mostly capitals.

    The negatives are three contexts of capitals and one of Greek letters (the random setting),
    so that capitals have the lowest log-odds and Greek letters neither the lowest nor the
    highest. In the first two concepts, the likelier a token is outside its concept the weaker
    its log-odds are, so that tokens overtake each other one by one.
    """
    steep, even = np.array([0.9, 0.09, 0.01]), np.array([0.4, 0.33, 0.27])
    omega = np.concatenate([steep, steep, even])
    gamma = omega * np.exp([0.0, 0.2, 0.3, 0.0, 0.2, 0.35, 0.0, 0.02, 0.04])
    gamma /= np.repeat(gamma.reshape(3, 3).sum(1), 3)
    data = specification(gamma=gamma, omega=omega)
    return SteeredUFM(data, perfect(data), 0, (0, 1, 2, 3), (4, 5, 6, 8))


def figure_3(axes: Any) -> None:
    """Next-token probabilities at positive α."""
    _draw_tokens(axes, example(), CONTEXT, np.linspace(0, 60, 1201))
    axes.set_title("Figure 3: most target tokens peak and fade, one rises on")


def figure_4(axes: Any) -> None:
    """Concept probabilities."""
    _draw_concepts(axes, example(), CONTEXT, np.linspace(-5, 5, 401))
    axes.set_title("Figure 4: the target rises, one concept falls, one falls both ways")


def figure_5(axes: Any) -> None:
    """Cross-entropy."""
    _draw_cross_entropy(axes, example(), np.linspace(-1, 1, 401))
    axes.set_title("Figure 5: near zero, steering costs the square of its strength")


def figure_b1(axes: Any) -> None:
    """Next-token probabilities at negative α."""
    _draw_tokens(axes, example(), CONTEXT, np.linspace(-60, 0, 1201))
    axes.set_title("Figure B.1: at negative strength, off-target tokens do the same")


FIGURES: dict[str, Callable[[Any], None]] = {
    "figure-3": figure_3,
    "figure-4": figure_4,
    "figure-5": figure_5,
    "figure-b1": figure_b1,
}


@styled
def figure(name: str) -> Figure:
    """One of FIGURES by its name, on a page of its own."""
    if name not in FIGURES:
        raise TrimtabError(f"there is no figure {name!r}: choose one of {', '.join(FIGURES)}")
    wide = FIGURES[name] in (figure_3, figure_b1)  # the legend of nine tokens stands beside it
    page, (axes,) = panels((9 if wide else 6.5, 4.5))
    FIGURES[name](axes)
    return page


def save_pictures(directory: Path | str, *, overwrite: bool = False) -> list[Path]:
    """Each figure as PNG and as SVG, its text as text; all are drawn before any is written."""
    directory = Path(directory)
    for path in (directory / f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")):
        if path.exists() and not overwrite:
            raise TrimtabError(f"{path} exists: choose another directory, or pass overwrite")
    make_directory(directory)
    drawn: dict[str, bytes] = {}
    with progress("drawing", len(FIGURES)) as advance:
        for name in FIGURES:
            drawn |= {f"{name}.{kind}": file for kind, file in _rendered(name).items()}
            advance(1)
    return [write_whole(directory / name, drawn[name], overwrite=overwrite) for name in drawn]


def facts() -> dict[str, Any]:
    """The numbers behind the pictures, ready for JSON. A peak at infinity is null."""
    steered, uniform = example(), specification()
    near = np.linspace(-0.01, 0.01, 41)
    with progress("training", 2) as advance:
        trained = train(steered.data)
        advance(1)
        trained_uniform = train(uniform)
        advance(1)
    peaks = steered.peaks()[CONTEXT]
    return {
        "uniform": {"entropy": uniform.entropy, "trained_loss": trained_uniform.loss},
        "entropy": steered.data.entropy,
        "trained_loss": trained.loss,
        "context": {"index": CONTEXT, "concept": CONCEPTS[steered.data.contexts[CONTEXT]]},
        "positive": list(steered.positive),
        "negative": list(steered.negative),
        "tokens": [_token_facts(steered, z, float(peak)) for z, peak in enumerate(peaks)],
        "concepts": [_concept_facts(steered, concept) for concept in range(3)],
        "curvature": float(steered.curvature()[0]),
        # Twice the coefficient of α² in a polynomial fitted to ΔCE near zero.
        "fitted_curvature": 2 * float(np.polyfit(near, steered.delta_cross_entropy(near), 4)[2]),
    }


def lines(numbers: dict[str, Any]) -> list[str]:
    """What `facts` says, in words."""
    uniform = numbers["uniform"]
    context = numbers["context"]
    tokens = [_token_line(token) for token in numbers["tokens"]]
    return [
        f"the paper's uniform example: entropy {uniform['entropy']:.6f} nats, training reaches "
        f"{uniform['trained_loss']:.6f}",
        f"the example of the pictures: entropy {numbers['entropy']:.6f} nats, training reaches "
        f"{numbers['trained_loss']:.6f}",
        f"in a context of {context['concept']}:",
        *(f"  {line}" for line in tokens),
        *(f"  {_concept_line(concept)}" for concept in numbers["concepts"]),
        f"cost begins with {numbers['curvature'] / 2:.4f} α² (Theorem 3.8), a polynomial fitted to "
        f"the curve says {numbers['fitted_curvature'] / 2:.4f} α²",
    ]


def _token_line(token: dict[str, Any]) -> str:
    course = {"rises": "rises with α", "falls": "falls with α"}.get(token["course"])
    course = course or f"most probable at α = {token['peak']:.3g}"
    return f"{token['token']} ({token['concept']}, log-odds {token['log_odds']:+.3f}): {course}"


def _concept_line(concept: dict[str, Any]) -> str:
    below, above = concept["limits"]
    target = ", the target" if concept["target"] else ""
    return (
        f"{concept['concept']}{target}: probability {concept['probability']:.4f}, {below:.4f} for "
        f"α → -∞, {above:.4f} for α → ∞"
    )


def _draw_tokens(axes: Any, steered: SteeredUFM, context: int, alphas: Array) -> None:
    """Δp of each token in one context, with its peak α_(j,z) where that is within `alphas`."""
    increase = steered.delta_p(alphas, context)  # [alphas, V]
    peaks = steered.peaks()[context]
    target = steered.data.tokens_of(steered.target)
    size = steered.data.size
    axes.axhline(0, color="black", linewidth=0.6)
    for z in range(steered.data.vocabulary):
        colour = UP if target[z] else DOWN
        name = TOKENS[z]
        side = "target" if target[z] else "off-target"
        label = f"{name}, {side}" + _course(steered, z, peaks[z])
        style = {"linestyle": STYLES[z % size % 3], "linewidth": (2.2, 1.5, 0.9)[z // size % 3]}
        axes.plot(alphas, increase[:, z], color=colour, label=label, **style)
        if alphas[0] < peaks[z] < alphas[-1]:
            height = steered.delta_p(peaks[z], context)[0, z]
            axes.plot([peaks[z]] * 2, [0, height], color=colour, linestyle=":", linewidth=1)
            axes.plot(peaks[z], height, "o", color=colour, markersize=5)
            if 0.02 < (peaks[z] - alphas[0]) / np.ptp(alphas) < 0.98:  # else names would collide
                place = {"xytext": (5, 4), "textcoords": "offset points", "color": colour}
                axes.annotate(name, (peaks[z], height), **place, fontsize=11, fontweight="bold")
    axes.set(
        xlim=(alphas[0], alphas[-1]), xlabel="steering strength α", ylabel="probability gained, Δp"
    )
    axes.legend(
        title="token, and its peak α_(j,z)",
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )


def _draw_concepts(axes: Any, steered: SteeredUFM, context: int, alphas: Array) -> None:
    """Δp of each concept in one context, and its limits at both ends."""
    axes.axhline(0, color="black", linewidth=0.6)
    others = iter([DOWN, NEUTRAL])
    for concept in range(3):
        target = concept == steered.target
        colour = UP if target else next(others)
        curve = steered.concept_increase(concept, alphas)[:, context]
        label = f"{CONCEPTS[concept]}, {'target' if target else 'off-target'}"
        axes.plot(alphas, curve, color=colour, linestyle=STYLES[concept], label=label)
        for sign, end in ((-1, alphas[0]), (1, alphas[-1])):
            limit = steered.concept_limit(concept, sign)[context]
            axes.plot([0, end], [limit, limit], color=colour, linestyle=":", linewidth=1)
            edge = {"marker": "<" if sign < 0 else ">", "clip_on": False, "linestyle": "none"}
            last = "limits for α → ±∞" if (concept, sign) == (2, 1) else None
            axes.plot(end, limit, color=colour, markersize=8, label=last, **edge)
    axes.set(
        xlim=(alphas[0], alphas[-1]),
        xlabel="steering strength α",
        ylabel="mean probability gained, Δp(C)",
    )
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.72))


def _draw_cross_entropy(axes: Any, steered: SteeredUFM, alphas: Array) -> None:
    """ΔCE, and the parabola that Theorem 3.8 puts at its foot."""
    curvature = float(steered.curvature()[0])
    axes.plot(alphas, steered.delta_cross_entropy(alphas), color=UP, linewidth=2.2, label="ΔCE(α)")
    axes.plot(
        alphas,
        curvature / 2 * alphas**2,
        color="black",
        linestyle="--",
        label=f"½ · {curvature:.3f} · α², Theorem 3.8",
    )
    axes.set(
        xlim=(alphas[0], alphas[-1]),
        ylim=(0, None),
        xlabel="steering strength α",
        ylabel="cross-entropy added, ΔCE, nats per token",
    )
    axes.legend(frameon=False, loc="upper center")


def _rendered(name: str) -> dict[str, bytes]:
    page = figure(name)
    return {kind: rendered(page, kind, name) for kind in ("png", "svg")}


def _token_facts(steered: SteeredUFM, z: int, peak: float) -> dict[str, Any]:
    return {
        "token": TOKENS[z],
        "concept": CONCEPTS[z // steered.data.size],
        "log_odds": float(steered.log_odds[z]),
        "peak": peak if np.isfinite(peak) else None,
        "course": "peaks" if np.isfinite(peak) else "rises" if peak > 0 else "falls",
        "limits": [float(steered.limit(sign)[CONTEXT, z]) for sign in (-1, 1)],
    }


def _concept_facts(steered: SteeredUFM, concept: int) -> dict[str, Any]:
    """The probability of the concept's tokens together, unsteered and at both ends of α."""
    unsteered = float(steered.concept_probability(concept, 0)[0, CONTEXT])
    size = steered.data.size
    limits = [
        unsteered + size * float(steered.concept_limit(concept, sign)[CONTEXT]) for sign in (-1, 1)
    ]
    return {
        "concept": CONCEPTS[concept],
        "target": concept == steered.target,
        "probability": unsteered,
        "limits": limits,
    }


def _course(steered: SteeredUFM, z: int, peak: float) -> str:
    if steered.highest[z]:
        return ": rises with α"
    if steered.lowest[z]:
        return ": falls with α"
    return f": α = {peak:.3g}".replace("-", "−")
