"""A vector at one block after another, at several strengths: what it does and what it changes.

"Persona Vectors: Monitoring and Controlling Character Traits in Language Models" (arXiv
2507.21509) chooses the block that steers a trait most, and shows trait and coherence over the
coefficient. Here the trait is by how many nats the answers that show it are ahead on held-out
pairs, and coherence KL per generated token on neutral prompts, and cost on plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.evaluation import Continuations, TokenKL, neutral
from trimtab.figures import Difference, Estimate
from trimtab.methods import METHODS
from trimtab.model import LanguageModel
from trimtab.options import SPLIT
from trimtab.papers.effects import fitted
from trimtab.papers.result import StudyResult, Value, contrast_of
from trimtab.reports import (
    COLOURS,
    MARKERS,
    Line,
    Picture,
    Table,
    curve,
    difference_cell,
    number_cell,
    panels,
    styled,
)
from trimtab.sweeps import FINE, TaskRows
from trimtab.terminal import progress

#: A block, and the strength.
Place = tuple[int, float]


def layer_curves(
    language_model: LanguageModel,
    contrast: Contrast | str,
    *,
    layers: Sequence[int],
    strengths: Sequence[float],
    method: str = "caa",
    fixed: Mapping[str, Any] | None = None,
    limit: int | None = None,
    new_tokens: int = 32,
    data: str | None = None,
) -> StudyResult:
    """The gain in log-odds on held-out pairs, KL per generated token and cost on plain text of a
    method's vector at each block and strength, with n and 95 % intervals.

    The vectors are fitted on the train pairs in one pass. The block is chosen on validation pairs,
    at the strength that is nearest to 1; figures are those of test pairs.
    """
    source = contrast_of(contrast, data).with_parts(SPLIT)
    bench = TaskRows(language_model, source, limit=limit, test_limit=limit)
    field = "layer" if "layer" in METHODS[method].__dataclass_fields__ else "layers"  # type: ignore[attr-defined]
    blocks = list(dict.fromkeys(layers))
    methods = [
        {"name": str(one), "method": method, "fixed": {**(fixed or {}), field: one}}
        for one in blocks
    ]
    made = fitted(language_model, methods, source)
    continued = Continuations(language_model, neutral(language_model, bench.asks_chats), new_tokens)
    gains: dict[Place, Difference] = {}
    kl: dict[Place, TokenKL] = {}
    cost: dict[Place, float] = {}
    chosen_by: dict[int, float] = {}
    usual = min(strengths, key=lambda one: abs(one - 1))
    with progress("turning vectors", len(blocks) * len(strengths)) as advance:
        for block in blocks:
            for strength in strengths:
                turned, place = made[str(block)].at(strength), (block, strength)
                gains[place] = bench.change(bench.values(turned, "test"), FINE, "test")
                kl[place] = continued.kl(turned)
                cost[place] = bench.cost(turned)
                if strength == usual:
                    chosen_by[block] = bench.change(bench.values(turned), FINE).difference
                advance(1)
    best = max(chosen_by, key=lambda one: chosen_by[one])
    document = {
        "method": method,
        "chosen_layer": best,
        "places": [
            {
                "layer": block,
                "strength": strength,
                "gain": gains[block, strength].as_json(),
                "kl": kl[block, strength].as_json(),
                "cost": cost[block, strength],
            }
            for block, strength in gains
        ],
    }
    values = {"chosen layer": Value(best)}
    for (block, strength), gain in gains.items():
        name = f"layer {block}, strength {strength:g}"
        values[name] = Value(gain.difference, gain.ci95, gain.n)
        values[f"{name}, KL"] = Value(kl[block, strength].mean, kl[block, strength].ci95)
    return StudyResult(
        document, values, [_table(gains, kl, cost, best)], [_picture(gains, kl)], bench.notes()
    )


def _table(
    gains: Mapping[Place, Difference],
    kl: Mapping[Place, TokenKL],
    cost: Mapping[Place, float],
    best: int,
) -> Table:
    rows = [
        [
            f"{block} (chosen on validation)" if block == best else block,
            f"{strength:g}",
            difference_cell(gain, FINE),
            gain.n,
            f"{kl[block, strength].mean:.3g} [{kl[block, strength].ci95[0]:.3g}, "
            f"{kl[block, strength].ci95[1]:.3g}]",
            number_cell(cost[block, strength], "+.3f"),
        ]
        for (block, strength), gain in gains.items()
    ]
    heads = ["layer", "strength", "gain in log-odds, nats", "n", "KL per generated token, nats"]
    return Table(
        "A vector at each layer and strength",
        [*heads, "cost on plain text, nats per token"],
        rows,
        "Against the unsteered model on test pairs, with 95 % intervals; KL over neutral prompts.",
    )


@styled
def _picture(gains: Mapping[Place, Difference], kl: Mapping[Place, TokenKL]) -> Picture:
    figure, (left, right) = panels((9.5, 3.6), 1, 2)
    blocks = list(dict.fromkeys(block for block, _ in gains))
    for axes, of, label in (
        (left, {p: Estimate(g.difference, *g.ci95, g.n) for p, g in gains.items()}, "gain, nats"),
        (right, {p: Estimate(k.mean, *k.ci95, k.tokens) for p, k in kl.items()}, "KL per token"),
    ):
        lines = []
        for i, block in enumerate(blocks):
            own = {strength: one for (layer, strength), one in of.items() if layer == block}
            look = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            lines.append(Line(f"layer {block}", list(own), list(own.values()), *look))
        curve(axes, lines, xlabel="strength", ylabel=label)
        axes.axhline(0, color="black", linewidth=0.8)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return Picture(
        "Trait and change over the strength",
        "curves",
        figure,
        "gain in log-odds and KL per generated token over the strength, one line for each layer, "
        "with 95 % intervals",
    )
