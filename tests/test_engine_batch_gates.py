"""Gates of batches through an engine: texts, figures and what each gate is said to have decided are
those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from engine_stand_in import StandIn, stand_in
from evaluations import chooser, content, data, strong
from helpers import language_model, steer
from operator_formulas import random_operator
from test_engine_batch import PROMPTS, of_all
from test_engine_evaluation import close
from trimtab.reading import Reading, next_tokens, prompt_reading
from trimtab.steering import READS_LAST, Condition, Gate

__all__ = ["chooser", "data", "stand_in"]  # fixtures


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def direction(seed: int) -> Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed))


def gate(kind: Any, seed: int = 1, **changes: Any) -> Gate:
    """One that fires at some texts, or tokens, and not at others."""
    first = Condition("layers.0.resid", direction(seed), 0.0, score="projection", **changes)
    second = Condition("layers.0.ffn_out", direction(seed + 1), 0.0, score="projection", **changes)
    return Gate((first, second), kind, ("or", 0, ("not", 1)))


@pytest.fixture(scope="module")
def stacks(lm: tt.LanguageModel) -> list[Any]:
    add = steer(lm, ("layers.1.resid", random_operator("Add", 5, 48)), alpha=3.0)
    turn = steer(lm, ("layers.2.ffn_norm", random_operator("Turn", 6, 48)), alpha=140.0)
    token = add.gated(gate("token"))
    later = turn.gated(gate("token", 3)).scoped("generated")
    two_pass = turn.gated(gate("two-pass", 5))
    of_last = add.gated(gate("two-pass", 7, reads=READS_LAST))
    latched = turn.scoped("generated").gated(gate("latched", 9))
    late = add.scoped("generated")
    return [
        None, add, token, later, two_pass, of_last, latched, [token, two_pass], [two_pass, token],
        [of_last, two_pass, late], [late, latched],
    ]  # fmt: skip


def gates_of(found: Any) -> list[Any]:
    return [[each.as_json() for each in one.gates] for one in found]


def test_texts_and_what_gates_decided(lm: tt.LanguageModel, stacks: list[Any]) -> None:
    acting = [stack for stack in stacks for _ in PROMPTS]
    prompts = PROMPTS * len(stacks)
    options: dict[str, Any] = {"chat": False, "max_new_tokens": 6}
    expected = lm.generate(prompts, steering=acting, **options)
    with tt.VLLM(lm) as engine:
        found = engine.generate(prompts, steering=acting, **options)
        (inner,) = StandIn.opened
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.steering for one in found] == [one.steering for one in expected]
    close(gates_of(found), gates_of(expected))
    said = [each for one in expected for each in one.gates]
    for kind in ("two-pass", "latched"):
        assert {each.fired for each in said if each.kind == kind} == {True, False}, kind
    assert len({each.prompt_tokens for each in said if each.kind == "token"}) > 2
    assert any(each.new_tokens for each in said)
    # A gate's pass over a prompt is one for all who ask.
    passes = [one for one in inner.asked if one.reading is not None and one.reading.reads]
    assert len(passes) == 3 * len(PROMPTS)


def test_a_text_that_stops_counts_what_is_there(lm: tt.LanguageModel, stacks: list[Any]) -> None:
    token = stacks[2]
    plain = lm.generate(PROMPTS, chat=False, max_new_tokens=8, steering=token)
    for option in ({"stop": f"[{plain[1].text[2:4]}]"}, {}):
        if not option:
            lm.model.generation_config.eos_token_id = [one.tokens[3] for one in plain]
        try:
            given: dict[str, Any] = {"chat": False, "max_new_tokens": 8, "steering": token}
            expected = lm.generate(PROMPTS, **given, **option)
            with tt.VLLM(lm) as engine:
                found = engine.generate(PROMPTS, **given, **option)
        finally:
            lm.model.generation_config.eos_token_id = None
        assert min(len(one.tokens) for one in expected) < 8
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        close(gates_of(found), gates_of(expected))


def test_what_is_next_and_how_likely_texts_are(lm: tt.LanguageModel, stacks: list[Any]) -> None:
    """Also of texts whose answer stands in them: their prompt decides."""
    readings = []
    for number, tokens in enumerate(lm.encode([f"{one} and more" for one in PROMPTS])):
        start, text = 2 + number % 3, tuple(tokens)
        asked = tuple(range(start - 1, len(text) - 1))
        readings.append(Reading(text, asked, start, text[start:]))
        readings.append(Reading(text[:-1], asked, start, text[start:]))
        readings.append(prompt_reading(tokens))
    for stack in stacks:
        each = stack if isinstance(stack, list) else [] if stack is None else [stack]
        texts = [
            one for one in readings
            if one.prompt < len(one.tokens)
            or not any(scope.only_generated for own in each for scope in own.scopes)
        ]  # fmt: skip
        expected = of_all(next_tokens(lm, texts, [stack] * len(texts)), len(texts))
        with tt.VLLM(lm) as engine:
            found = of_all(engine.next_tokens(texts, [stack] * len(texts)), len(texts))
        for one, wanted in zip(found, expected, strict=True):
            assert one.best.tolist() == wanted.best.tolist()
            if len(one.log_p):
                torch.testing.assert_close(one.log_p, wanted.log_p, rtol=1e-5, atol=2e-5)
        close(gates_of(found), gates_of(expected))


@pytest.mark.slow
def test_records_say_whether_gates_fired(chooser: tt.LanguageModel, data: Path) -> None:
    steering = strong(chooser)
    condition = steering.condition()
    subjects = {
        kind: steering.gated(tt.Gate((condition,), kind=kind)) for kind in ("token", "two-pass")
    }
    options: dict[str, Any] = {"steering": subjects, "data": str(data), "limit": 8}
    expected = tt.evaluate(chooser, "copa", **options)
    with tt.VLLM(chooser) as engine:
        found = tt.evaluate(chooser, "copa", **options, engine=engine)
    close(content(found.records), content(expected.records))
    assert any("gate_fired" in one["values"] for one in found.records)
    assert any(result.metric == "gate_fired" for result in found.results)


@pytest.mark.slow
def test_a_sweep_under_a_gate(chooser: tt.LanguageModel, data: Path) -> None:
    under = tt.Gate((strong(chooser).condition(),), kind="two-pass")
    options: dict[str, Any] = {
        "data": str(data), "limit": 6, "test_limit": 6, "baselines": False, "gate": under,
        "fixed": {"token": "last"}, "oracle": False,
    }  # fmt: skip
    space = {"layer": [1, 2], "alpha": [0.5, 2.0]}
    expected = tt.sweep(chooser, "caa", "copa", space, **options)
    with tt.VLLM(chooser) as engine:
        found = tt.sweep(chooser, "caa", "copa", space, **options, engine=engine)
    for one, other in zip(found.trials, expected.trials, strict=True):
        close([one.params, one.state, one.value, one.cost],
              [other.params, other.state, other.value, other.cost])  # fmt: skip


def test_what_is_refused_before_it_starts(lm: tt.LanguageModel, stacks: list[Any]) -> None:
    latched = stacks[6]
    early = steer(lm, ("layers.0.resid", random_operator("Add", 7, 48)), alpha=2.0)
    with tt.VLLM(lm) as engine, pytest.raises(tt.TrimtabError, match="latched gate .* would read"):
        engine.generate(PROMPTS, steering=[[early, latched]] * len(PROMPTS))
    assert not StandIn.opened
