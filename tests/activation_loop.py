"""A loop that reads the activations of one text at a time with hooks of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import trimtab as tt
from helpers import asked
from tiny import tiny_model, tiny_tokenizer
from trimtab.fitting.statistics import Sides

TALK = [{"role": "user", "content": "What is the best way to learn a language?"}]
PAIRS: list[tuple[Any, str, str]] = [
    ("She looked at the map and asked where they were going.", " He said: I do not know.", " No."),
    ("The answer is", " yes", " no"),
    ("Today I feel", " happy.", " happy. I love this film, it was wonderful."),
    ("What is the capital of France?", " It is Paris, as everybody knows.", " It is Paris"),
    ("Nothing more to say", "", ", and so nothing more was said."),
    ("When the rain ca", "me, the children ran into the house", "n be heard, the king is old"),
    (
        "",
        "Sure, I love this film.",
        "I hate this film, and the actors were bad and boring and old.",
    ),
    (TALK, "Read, write, listen and speak every day.", "I cannot help you with that request."),
    *(
        (f"There are {n} numbers here, and the {who} said that", " it is right.", " it is wrong!")
        for n in range(4)
        for who in ("king", "mother", "children")
    ),
]


# -- the loop, without trimtab ----------------------------------------------------------------


def wrapped(name: str, **options: Any) -> tt.LanguageModel:
    return tt.wrap(tiny_model(name, **options), tiny_tokenizer(), name)


def sites_of(language_model: Any, kinds: Sequence[str]) -> list[str]:
    return [site for kind in kinds for site in language_model.anatomy.sites(kind)]


@contextmanager
def batches_of(monkeypatch: pytest.MonkeyPatch, size: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(tt.LanguageModel, "batch_tokens", size)
        yield


@contextmanager
def counted(modules: dict[str, nn.Module]) -> Iterator[Counter[str]]:
    """How often each module begins a forward pass."""
    counts: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
        for name, module in modules.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Counting:
    """A statistic that counts what it is handed; `fail_at` is the update that raises."""

    needs_pairs: ClassVar[bool] = True
    fail_at: ClassVar[int | None] = None
    error: ClassVar[type[BaseException]] = RuntimeError
    updates: int = 0
    texts: int = 0

    def update(self, sides: Sides) -> None:
        assert sides.positive.shape == sides.negative.shape
        assert sides.positive.dtype is torch.float32
        self.updates += 1
        self.texts += len(sides.positive)
        if self.updates == self.fail_at:
            raise self.error("in the middle")


@pytest.fixture(autouse=True)
def fresh_counting() -> None:
    Counting.fail_at = None


@contextmanager
def rows_run(language_model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The tokens of each row that passes the model's body, once it has been asked what it can."""
    asked(language_model)
    rows: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows.extend(map(tuple, kwargs["input_ids"].tolist()))

    body = language_model.anatomy.body
    handle = body.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def hooks_on(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hook in (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *(["forward"] if "forward" in vars(module) else []),
        )
    ]
