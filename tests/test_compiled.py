"""Compiled code: a steering acts in it as in any other, and nothing of it is compiled in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

import trimtab as tt
from helpers import (
    PROMPTS,
    by_hand,
    few_quick,
    greedy_by_hand,
    language_model,
    left_padded,
    logits_of,
    steer_at,
    token_ids,
)

#: Compiles as any backend does, but for the code that it makes, which takes seconds.
FAST = {"backend": "eager"}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(lm: tt.LanguageModel, how: str) -> Any:
    """The model, compiled in one of the usual ways; what to call."""
    if how == "whole":
        lm.model.compile(**FAST)
    elif how == "blocks":
        for layer in lm.model.model.layers:
            layer.compile(**FAST)
    elif how == "body":
        lm.model.model.compile(**FAST)
    elif how == "forward":
        lm.model.forward = torch.compile(lm.model.forward, **FAST)
    else:
        return torch.compile(lm.model, **FAST)
    return lm.model


WAYS = [
    (how, kind)
    for how in ("whole", "blocks", "body", "forward", "object")
    for kind in ("resid", "heads", "ffn_in")
]


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        pytest.param(*way, marks=() if i % 4 == 0 else pytest.mark.slow, id="-".join(way))
        for i, way in enumerate(WAYS)
    ],
)
def test_a_model_that_was_compiled_before_is_steered(how: str, kind: str) -> None:
    expected_lm = language_model("llama")
    steering = steer_at(expected_lm, kind)
    with expected_lm.steered(steering):
        expected = logits_of(expected_lm)
    lm = language_model("llama")
    model, inputs = compiled(lm, how), left_padded(lm, PROMPTS)

    def run() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    plain = run()
    with lm.steered(steering):
        assert torch.equal(run(), expected)
    torch.testing.assert_close(run(), plain)
    with lm.steered(steering.at(2)):  # and again, at another dial
        assert not torch.allclose(run(), expected)
    torch.testing.assert_close(run(), plain)


def test_what_is_compiled_in_a_block_is_not_steered_after_it() -> None:
    lm = language_model("llama")
    plain = logits_of(lm)
    lm.model.compile(**FAST)
    with lm.steered(steer_at(lm, "resid")):
        assert not torch.allclose(logits_of(lm), plain)
    torch.testing.assert_close(logits_of(lm), plain)


@pytest.mark.parametrize(
    "positions", few_quick(["all", "prompt", "generated", "last"], "generated")
)
def test_a_static_cache_that_compiles_by_itself(positions: Any) -> None:
    """As generate does on a GPU: an unsteered call compiles, the next one decodes by it."""
    lm = language_model("llama")
    config = CompileConfig(fullgraph=False, mode=None, **FAST)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "do_sample": False}
    ids = torch.tensor([token_ids(PROMPTS[0])])

    def raw() -> list[int]:
        mask = torch.ones_like(ids)
        output = lm.model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
        tokens: list[int] = output[0, ids.shape[1] :].tolist()
        return tokens

    steering = steer_at(lm, "resid", positions=positions)
    unsteered = greedy_by_hand(lm.model, ids[0].tolist(), 8, lambda x: x)
    change = by_hand(steering.interventions[0].operator)
    steered = greedy_by_hand(lm.model, ids[0].tolist(), 8, change, positions)
    assert raw() == unsteered
    with lm.steered(steering):
        assert raw() == steered
    assert raw() == unsteered


def test_fits_read_a_compiled_model() -> None:
    contrast = tt.Contrast.from_pairs([(p, " yes", " no it is not") for p in PROMPTS])
    lm, other = language_model("llama"), language_model("llama")
    for layer in other.model.model.layers:
        layer.compile(**FAST)
    logits_of(other)
    vectors = [
        tt.CAA(layer=1, token="last").fit(m, contrast).interventions[0].operator.vector
        for m in (lm, other)
    ]
    assert torch.equal(*vectors)


def test_the_compiler_is_left_as_it_was() -> None:
    lm, other = language_model("llama"), language_model("gpt2")
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend)
    a, b = lm.steered(steer_at(lm, "resid")), other.steered(steer_at(other, "resid"))
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)  # the other block still needs plain code
    double(torch.ones(3))
    assert not calls
    b.__exit__(None, None, None)
    double(torch.ones(3))
    assert calls


def test_a_generate_without_a_pass_is_an_error() -> None:
    lm = language_model("llama")
    exported = lm.model.generate
    lm.model.generate = lambda *args, **kwargs: args[0]  # somebody else's, which runs no module
    with lm.steered(steer_at(lm, "resid")), pytest.raises(tt.TrimtabError, match="without a steer"):
        lm.model.generate(torch.tensor([[1, 2]]))
    lm.model.generate = exported
