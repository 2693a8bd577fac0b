"""Fitting several methods in one pass, on the train rows, each as if it were alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import asked
from tiny import tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.methods import METHODS

PAIRS = [
    (f"The {who} looked at the {what} and said that it was", " right.", " wrong!")
    for who in ("king", "mother", "captain")
    for what in ("ship", "map", "fire")
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")

SEVERAL: list[Any] = [
    tt.AUSteer(site="ffn_out", k=10, direction="paper"),
    tt.AUSteer(site="heads", k=7, direction="signed", layers=(0, 1)),
    tt.AUSteer(site="ffn_out", k=10, change="vector", direction="paper"),
    tt.CAA(layer=1, token="last"),
    tt.CAA(layer=1, token="mean", alpha=2),
    tt.CAA(layer=0, token="answer", variant="pca"),
    tt.ActAdd(pairs=2),
    tt.ITI(k=3),
    tt.SADI(variant="hidden", k=5),
]


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return tt.wrap(tiny_model(name), tiny_tokenizer(), name)


def _passes(lm: Any, action: Callable[[], Any]) -> tuple[Any, int]:
    """What an action returns, and how many forward passes of the model it took."""
    passes = []
    body = lm.model.get_submodule("transformer" if lm.anatomy.name == "gpt2" else "model")
    handle = body.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        return action(), len(passes)
    finally:
        handle.remove()


def _same(one: tt.Steering, other: tt.Steering) -> None:
    assert one.method == other.method
    assert one.hyperparameters == other.hyperparameters
    assert one.contrast == other.contrast
    assert [i.site for i in one.interventions] == [i.site for i in other.interventions]
    x = torch.randn(3, 80)
    for a, b in zip(one.interventions, other.interventions, strict=True):
        own = x[:, : a.operator.width]
        left, right = (each.operator.bind(2.0, "cpu")(own) for each in (a, b))
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-5)
    assert one.tables.keys() == other.tables.keys()
    for name, table in one.tables.items():
        assert torch.allclose(table, other.tables[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_many_methods_in_one_pass(name: str) -> None:
    lm = asked(_lm(name))
    together, passes = _passes(lm, lambda: tt.fit(SEVERAL, lm, CONTRAST))
    assert [steering.method for steering in together] == [method.name for method in SEVERAL]
    for method, steering in zip(SEVERAL, together, strict=True):
        alone, alone_passes = _passes(lm, lambda method=method: method.fit(lm, CONTRAST))
        assert alone_passes == passes
        _same(steering, alone)
    assert tt.fit([], lm, CONTRAST) == []


def test_fit_uses_the_train_part_only() -> None:
    lm = _lm()
    parts = ["train", "test", "validation"] * 3
    rows = tuple(replace(row, part=part) for row, part in zip(CONTRAST.pairs, parts, strict=True))
    train = Contrast.from_pairs(PAIRS[::3], "mine")
    for method in (
        tt.AUSteer(k=20, site="ffn_out", direction="paper"),
        tt.CAA(token="last"),
        tt.ActAdd(),
        tt.ITI(k=2),
        tt.SADI(),
    ):
        found = method.fit(lm, Contrast(rows, "mine"))  # type: ignore[arg-type]
        _same(found, method.fit(lm, train))
        assert found.contrast == {"name": "mine", "digest": train.digest, "rows": 3}
        everything = method.fit(lm, CONTRAST)
        assert everything.contrast["rows"] == 9
        assert everything.contrast["digest"] != train.digest
    with pytest.raises(tt.TrimtabError, match="mine has no train rows"):
        tt.CAA(token="last").fit(lm, Contrast((replace(CONTRAST.pairs[0], part="test"),), "mine"))


def test_one_method_that_cannot_stops_them_all() -> None:
    unpaired = Contrast.from_texts(["I love it"], ["I hate it"], "mine")
    with pytest.raises(tt.TrimtabError, match="mine is unpaired"):
        tt.fit(
            [tt.CAA(token="last"), tt.AUSteer(site="ffn_out", k=16, direction="paper")],
            _lm(),
            unpaired,
        )


def test_long_texts_are_warned_about_once() -> None:
    long = Contrast.from_pairs([(PAIRS[0][0] * 3, " yes", " no"), *PAIRS])
    with pytest.warns(tt.TrimtabWarning, match="1 of 10 rows are longer than 40") as caught:
        tt.fit(SEVERAL, _lm(), long, max_length=40)
    assert sum(issubclass(warning.category, tt.TrimtabWarning) for warning in caught) == 1


def test_methods_have_names_and_help() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        for option in fields(method):  # type: ignore[arg-type]
            assert option.metadata["help"].endswith("."), f"{name}: {option.name}"
