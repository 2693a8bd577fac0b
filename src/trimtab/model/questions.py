"""Questions about how a model runs, each answered once, by numbers on two short random texts.

Whether rows may be padded, packed or taken up in the middle depends on how an architecture builds
its masks, counts positions and keeps states. No list of architectures says that for sure, so that
each model is asked: what is computed in the clever way is compared with each text alone. An error
or a difference beyond rounding is a no.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, eager, exclusively, first_tensor, near, probe_ids
from trimtab.model.attach import unsteered
from trimtab.model.batching import refuse_dropout

#: What models raise at what they do not take.
_DOES_NOT_RUN = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
)

#: The answers of each model, by its transformer body and what was asked.
_ANSWERS: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()


_HERE = threading.local()


def is_asking() -> bool:
    """Whether what this thread runs at the moment only answers a question."""
    return bool(getattr(_HERE, "asking", 0))


@contextmanager
def _asking() -> Iterator[None]:
    _HERE.asking = getattr(_HERE, "asking", 0) + 1
    try:
        yield
    finally:
        _HERE.asking -= 1


def answered(anatomy: Anatomy, question: Hashable, ask: Callable[[], bool]) -> bool:
    """The answer to a question about a model, which is asked once."""
    refuse_dropout(anatomy.model)
    # Another attention may answer otherwise.
    key = (question, getattr(anatomy.config, "_attn_implementation", None))
    with exclusively(anatomy.body):
        answers = _ANSWERS.setdefault(anatomy.body, {})
        if key not in answers:
            with _asking(), eager(), unsteered(anatomy), torch.no_grad():
                try:
                    answers[key] = ask()
                except _DOES_NOT_RUN:
                    answers[key] = False
        return answers[key]


def probe_texts(anatomy: Anatomy) -> tuple[list[int], list[int]]:
    """Token ids of two texts of different lengths that begin with the same four tokens."""
    first, second = probe_ids(anatomy.model).tolist()
    return first, second[:8]


def hidden_alone(anatomy: Anatomy, text: Sequence[int]) -> Tensor:
    """What the transformer body returns of one text that the model reads by itself,
    [tokens, units]: what any other way of running it is held against."""
    seen: list[Tensor | None] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(first_tensor(output))

    model: Any = anatomy.model
    handle = anatomy.body.register_forward_hook(see)
    try:
        ids = torch.tensor([list(text)], device=probe_ids(model).device)
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    (hidden,) = seen
    if hidden is None:
        raise ValueError("the body returns no activations")
    return hidden[0]


def alike(found: Tensor, alone: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether activations or logits of the same tokens, [tokens, units], differ by no more than
    rounding, in the `dtype` that they were computed in (default: their own).

    In half precision the experts of a mixture may be chosen otherwise for a rounding's sake, so
    that a few tokens may differ.
    """
    epsilon = torch.finfo(dtype or alone.dtype).eps
    tolerance = max(1e-4, 12 * epsilon)
    if epsilon < 1e-5:
        return near(found, alone, tolerance)
    fine = [near(found[i : i + 1], alone[i : i + 1], tolerance) for i in range(len(alone))]
    return found.shape == alone.shape and sum(fine) >= 0.7 * len(fine)
