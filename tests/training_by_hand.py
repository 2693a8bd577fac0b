"""What trainings are checked against: plain passes of the model, with a hook and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import trimtab as tt
from effects_by_hand import scored_from
from helpers import block, hand_hooked, token_ids
from trimtab.training import Objective, Run, texts_of
from trimtab.training.passes import Passes

#: Prompts and answers of unequal length.
PAIRS = [
    ("Today I feel", " happy and light.", " sad."),
    ("The answer to the question is", " yes", " not known"),
    ("I think that this film was", " wonderful.", " boring and long."),
    ("She said that the day was", " good", " bad"),
    ("The captain stood at the wheel and", " sang.", " slept."),
]
CONTRAST = tt.Contrast.from_pairs(PAIRS)


def log_p(
    lm: tt.LanguageModel, pair: tuple[str, str, str], side: int, change: Any, layer: int = 1
) -> tuple[Tensor, int]:
    """The summed log-probability of an answer while a block's output is changed, and how many
    tokens it has: one text, the whole model."""
    prompt, *answers = pair
    start, ids = scored_from(prompt, *answers), token_ids(prompt + answers[side])
    with hand_hooked(block(lm.model, layer), change):
        logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    found = logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    return found[start - 1 :].sum(), len(ids) - start


def plus(vector: Tensor, dial: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda x: x + dial * vector.to(x)


def loss_of(
    lm: tt.LanguageModel,
    objective: Objective,
    parameters: dict[str, Tensor],
    runs: list[list[Run]],
    contrast: tt.Contrast = CONTRAST,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Figures of some rows, and the gradient of their mean loss, as the trainer computes them."""
    passes = Passes(lm, objective, texts_of(lm, contrast).texts)
    own = {name: tensor.clone().requires_grad_(True) for name, tensor in parameters.items()}
    flat = [run for row in runs for run in row]
    with passes.learning(flat):
        outcome = passes.run(own, flat, len(runs), referring=objective.refers)
        figures = objective.loss(own, outcome)
        figures["loss"].mean().backward()
    slopes = {name: tensor.grad for name, tensor in own.items() if tensor.grad is not None}
    return {name: figure.detach() for name, figure in figures.items()}, slopes


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a loss ends from a start, by L-BFGS in float64."""
    x = start.clone().requires_grad_(True)
    solver = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-13, history_size=30,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def value() -> Tensor:
        solver.zero_grad()
        found = loss(x)
        found.backward()
        return found

    solver.step(value)  # type: ignore[no-untyped-call]
    return x.detach()
