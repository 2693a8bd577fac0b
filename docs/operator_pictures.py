"""Draws what each operator does to activations, with the operators themselves: points of a plane of
two units before (tails of arrows) and after (heads)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trimtab.steering import (
    Ablate,
    Add,
    Affine,
    Clamp,
    Force,
    Operator,
    Respond,
    Rotate,
    Scale,
    SetFeatures,
    Shift,
    Turn,
)

#: Readable on white and on black.
INK, BEFORE, AFTER, MARK = "#7d8894", "#a9b2bc", "#2f81d6", "#d9822b"
#: A direction of length 1 that is neither unit's own.
SLANTED = torch.tensor([math.cos(0.6), math.sin(0.6)])


@dataclass(frozen=True)
class Shown:
    """An operator of two units at some dials; `marks` are directions that are drawn, `says` what
    to look for."""

    operator: Operator
    dials: Sequence[float]
    says: str
    marks: Sequence[Tensor] = ()


def _both(values: Sequence[float]) -> dict[str, Any]:
    return {"units": torch.tensor([0]), "width": 2, "gain": torch.tensor(values)}


def _feature(bias: float) -> dict[str, Any]:
    return {
        "encoder": SLANTED[None],
        "bias": torch.tensor([bias]),
        "threshold": torch.zeros(1),
        "decoder": SLANTED[None],
    }


#: Each operator as it is drawn, by its name.
OPERATORS: dict[str, Shown] = {
    "Add": Shown(
        Add(0.8 * SLANTED), (0.5, 1.0), "Every activation moves by the same vector.", (SLANTED,)
    ),
    "Scale": Shown(
        Scale(**_both([1.0])),
        (0.5, -1.5),
        "The chosen unit (across) grows; below a factor of 0 it changes its sign. The other unit "
        "stays.",
    ),
    "Shift": Shown(
        Shift(torch.tensor([0]), torch.tensor([0.4]), torch.tensor([0.9]), 2),
        (0.5, 1.0),
        "Each unit is carried along a line of its own: here the one across to 0.4 x + 0.9.",
    ),
    "Ablate": Shown(
        Ablate(SLANTED),
        (0.5, 1.0),
        "What lies along the direction goes; what is across it stays.",
        (SLANTED,),
    ),
    "Affine": Shown(
        Affine(
            SLANTED[:, None], torch.tensor([[-0.9], [0.4]]), 0.6 * SLANTED
        ),
        (0.5, 1.0),
        "One direction says what moves, another one where to; across that nothing changes.",
        (SLANTED,),
    ),
    "Clamp": Shown(
        Clamp(SLANTED, low=0.3),
        (0.5, 1.0),
        "What lies below the bound along the direction is brought up to it; the rest stays.",
        (SLANTED,),
    ),
    "Respond": Shown(
        Respond(0.7 * SLANTED, torch.tensor([0.0, 1.0]), 0.0),
        (0.5, 1.0),
        "A vector is added as far as the reader (here the unit upward) finds something; below zero "
        "nothing happens.",
        (SLANTED,),
    ),
    "Rotate": Shown(
        Rotate(torch.eye(2)), (30.0, 120.0), "All turn by the same angle and keep their lengths."
    ),
    "Turn": Shown(
        Turn(torch.eye(2)),
        (30.0, 120.0),
        "All are laid at the same angle, whichever way they pointed, and keep their lengths.",
    ),
    "SetFeatures": Shown(
        SetFeatures(**_feature(-0.2), mode="clamp", level=torch.tensor([1.0])),
        (0.0, 1.0),
        "What the encoder reads is put to one value, 0 or the level; what it does not see stays, "
        "and so does what is across.",
        (SLANTED,),
    ),
}  # fmt: skip
#: The router's logits of eight experts, of which one is forced on and one off.
_LOGITS = torch.tensor([1.1, -0.4, 0.6, 0.1, -0.9, 0.3, -0.2, 0.8])
FORCE = Force(torch.tensor([4]), torch.tensor([0]), 8)


def svg(name: str) -> bytes:
    """The picture of an operator."""
    figure = _forced() if name == "Force" else _moved(OPERATORS[name])
    written = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same picture is the same file
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return written.getvalue()


def says(name: str) -> str:
    """What a picture shows, in words."""
    if name == "Force":
        return "One expert is lifted above all others, one is put below them."
    return OPERATORS[name].says


def moved(operator: Operator, dial: float) -> tuple[Tensor, Tensor]:
    """Points on three circles, [points, 2], before and after."""
    angles = torch.arange(0, 360, 30).deg2rad()
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    before = torch.cat([radius * circle for radius in (0.45, 0.9, 1.35)])
    change: Callable[[Tensor], Tensor] = operator.bind(dial, "cpu")
    return before, change(before)


def _moved(shown: Shown) -> Figure:
    figure = Figure(figsize=(3.1 * len(shown.dials), 3.1), layout="constrained")
    for axes, dial in zip(figure.subplots(1, len(shown.dials)), shown.dials, strict=True):
        before, after = moved(shown.operator, dial)
        _cross(axes)
        for direction in shown.marks:
            (x, y) = (2.4 * direction).tolist()
            axes.plot([-x, x], [-y, y], color=MARK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.scatter(*before.T, s=9, color=BEFORE, zorder=2)
        axes.quiver(
            *before.T, *(after - before).T,
            angles="xy", scale_units="xy", scale=1, color=AFTER, width=0.008, zorder=3,
        )  # fmt: skip
        unit = "°" if isinstance(shown.operator, Rotate | Turn) else ""
        axes.set_title(f"dial {dial:g}{unit}", color=INK, fontsize=10)
    return figure


def _cross(axes: Any) -> None:
    axes.set_xlim(-2.1, 2.1)
    axes.set_ylim(-2.1, 2.1)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.axhline(0, color=INK, linewidth=0.6, zorder=0)
    axes.axvline(0, color=INK, linewidth=0.6, zorder=0)


def _forced() -> Figure:
    figure = Figure(figsize=(6.2, 2.4), layout="constrained")
    for axes, dial in zip(figure.subplots(1, 2), (0.0, 1.0), strict=True):
        after = FORCE.bind(dial, "cpu")(_LOGITS)
        chosen = [MARK if i in (0, 4) else AFTER for i in range(len(after))]
        axes.bar(range(len(after)), after.tolist(), color=chosen)
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.set_title(f"dial {dial:g}", color=INK, fontsize=10)
        axes.tick_params(colors=INK, labelsize=8)
        axes.set_xlabel("expert", color=INK, fontsize=9)
        axes.set_ylim(-1.3, 1.3)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure
