"""Passes kept on disk: what they read, and what of it passed the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.fitting.activations import Statistics, UnitLength, Want
from trimtab.fitting.statistics import Active, Means, Samples, SecondMoment, SignCounts
from trimtab.model import is_asking
from trimtab.steering.operators import to_tensors

PAIRS = [
    (f"There are {n} numbers here, and {who} said{' it' * (n % 3)}", " yes, it is.", " no!")
    for n in range(6)
    for who in ("the king", "her mother", "one of the children")
]
TEXTS = [[prompt + side[i] for prompt, *side in PAIRS] for i in (0, 1)]
SITES = ("embed", "layers.0.heads", "layers.1.ffn_out", "layers.1.resid")
UNIT = UnitLength()


def contrast_of(paired: bool = True) -> tt.Contrast:
    return tt.Contrast.from_pairs(PAIRS) if paired else tt.Contrast.from_texts(*TEXTS)


def some_wants(paired: bool = True) -> list[Want]:
    kinds = (Means, Samples, Active) + ((SignCounts, SecondMoment) if paired else ())
    tokens = ("last", "mean", -2) + (("answer",) if paired else ())
    wants = [Want(site, token, kind) for site in SITES for token in tokens for kind in kinds]
    return [*wants, *(Want(site, "last", Means, read=UNIT) for site in SITES)]


def numbers(statistic: Any) -> list[Tensor]:
    """All that a statistic has found out."""
    if isinstance(statistic, Means):
        return [*statistic.sums, torch.tensor(statistic.counts)]
    if isinstance(statistic, Active):
        return list(statistic.counts)
    if isinstance(statistic, Samples):
        return list(statistic.texts())
    if isinstance(statistic, SecondMoment):
        return [statistic.sum]
    return [statistic.larger, statistic.smaller, torch.tensor(statistic.pairs)]


def check_equal(one: Statistics, two: Statistics) -> None:
    """Bit for bit."""
    assert set(one) == set(two)
    for want, statistic in one.items():
        for number, other in zip(numbers(statistic), numbers(two[want]), strict=True):
            assert torch.equal(number, other), want


def tensors(steering: tt.Steering) -> list[Tensor]:
    found = [steering.tables[name] for name in sorted(steering.tables)]
    for intervention in steering.interventions:
        found += to_tensors(intervention.operator)[0].values()
    return found


def check_same(one: Sequence[tt.Steering], two: Sequence[tt.Steering]) -> None:
    for first, second in zip(one, two, strict=True):
        for tensor, other in zip(tensors(first), tensors(second), strict=True):
            assert torch.equal(tensor, other)


class Run:
    """What passed the model: the rows of each batch, and how often each module was begun."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self.modules: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        return sum(map(len, self.batches))


@contextmanager
def watched(lm: tt.LanguageModel) -> Iterator[Run]:
    run = Run()

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not is_asking():
            run.batches.append([tuple(row) for row in kwargs["input_ids"].tolist()])

    def count(name: str, *call: Any) -> None:
        if not is_asking():
            run.modules.update([name])

    body = lm.anatomy.body
    handles = [body.register_forward_pre_hook(note, with_kwargs=True)]
    for name, module in lm.model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(count, name)))
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tt.LanguageModel, "batch_tokens", 150)
