"""Budgets: the KL at the dials that are found, measured by plain passes; and how they are found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import (
    LINEAR,
    PROMPTS,
    kl_at,
    language_model,
    refused_in_one_line,
    steer,
    steer_at,
    token_ids,
    with_range,
)
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.anatomy.hooks import is_hooked
from trimtab.dials import solving
from trimtab.dials.budgets import Budget, _of_set
from trimtab.dials.solving import Solution, _run, _Search
from trimtab.steering.operators import Add
from trimtab.strength import budget, calibrate, within

#: For tests that leave the model as it is.
shared = cache(language_model)


def check_budget(
    lm: tt.LanguageModel, steering: tt.Steering, prompts: Sequence[Any], kl: float, found: Budget
) -> None:
    """Every dial uses up the budget to 2 %, and lies on the side that it is of."""
    sides = [(1, found)] + ([(-1, found.other)] if found.other else [])
    for sign, side in sides:
        assert [row.prompt for row in side.per_prompt] == list(prompts)
        for row in side.per_prompt:
            assert row.reached
            assert row.dial * sign > 0
            measured = kl_at(lm, steering, row.prompt, row.dial)
            assert measured == pytest.approx(kl, rel=0.02)
            assert row.kl == pytest.approx(measured, rel=1e-3, abs=1e-6)


# -- one budget -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("name", TINY)
def test_the_budget_is_kept_on_both_sides(name: str, op: str) -> None:
    lm = shared(name)
    # Plane and direction that matter to each model; 5 degrees cost less than 1e-3 nats.
    steering = with_range(steer_at(lm, "resid", op, layer=1))
    kl = 0.002
    if op == "Rotate":
        steering = with_range(steering, -180.0, 180.0)
        kl = 0.5 * min(kl_at(lm, steering, p, sign * 100.0) for p in PROMPTS for sign in (1, -1))
    check_budget(lm, steering, PROMPTS, kl, budget(lm, steering, PROMPTS, kl, chat=False))


@pytest.mark.parametrize("positions", ["last", "prompt"])
def test_positions(positions: Any) -> None:
    lm = shared("gemma3")
    steering = with_range(steer_at(lm, "ffn_out", positions=positions))
    check_budget(lm, steering, PROMPTS, 0.02, budget(lm, steering, PROMPTS, 0.02, chat=False))


def test_more_nats_allow_more() -> None:
    lm = shared("llama")
    steering = steer_at(lm, "resid")
    dials = []
    for kl in (0.001, 0.01, 0.1, 0.5):
        found = budget(lm, steering, PROMPTS, kl, chat=False)
        check_budget(lm, steering, PROMPTS, kl, found)
        assert found.other is not None
        dials.append(
            [row.dial for row in found.per_prompt] + [-row.dial for row in found.other.per_prompt]
        )
    for less, more in pairwise(dials):
        assert all(a < b for a, b in zip(less, more, strict=True))


def test_the_set() -> None:
    lm = shared("llama")
    steering = steer_at(lm, "resid")
    texts = [" ".join(PROMPTS[i % 3].split()[: 3 + i // 3]) for i in range(21)]
    found = budget(lm, steering, texts, 0.05, chat=False)
    for side in (found, found.other):
        assert side is not None
        sizes = sorted(abs(row.dial) for row in side.per_prompt)
        assert abs(side.dial) == pytest.approx(sizes[10])
        # One of 21 is less than 5 %: that many may bear less.
        assert abs(side.worst5_dial) == pytest.approx(sizes[1])
        over = [kl_at(lm, steering, text, side.worst5_dial) > 0.05 * 1.011 for text in texts]
        assert sum(over) <= 1
    assert found.other is not None
    assert found.other.dial < 0 < found.dial
    assert found.other.worst5_dial < 0 < found.worst5_dial
    assert _of_set([-3.0, -1.0, -2.0]) == (-2.0, -1.0)
    assert _of_set([4.0]) == (4.0, 4.0)


def test_long_lists_in_parts_are_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = shared("gemma3")
    steering = steer_at(lm, "resid")
    texts = [" ".join((PROMPTS[i % 3] * 2).split()[: 2 + i]) for i in range(12)]
    monkeypatch.setattr(solving, "_TEXTS_AT_ONCE", 5)
    monkeypatch.setattr(solving, "_TOKENS_AT_ONCE", 60)
    parts = list(solving._chunks([token_ids(text) for text in texts]))
    assert len(parts) > 3
    assert [len(text) for part in parts for text in part] == [len(token_ids(t)) for t in texts]
    together = budget(lm, steering, texts, 0.03, chat=False)
    for text, row in zip(texts, together.per_prompt, strict=True):
        alone = budget(lm, steering, [text], 0.03, chat=False, side="positive").per_prompt[0]
        assert row.prompt == text
        assert row.dial == pytest.approx(alone.dial, rel=1e-3)


def test_one_side_only_and_chats() -> None:
    lm = shared("llama")
    steering = steer_at(lm, "resid")
    chats: list[Any] = ["Is it true?", [{"role": "user", "content": "What is the ship?"}]]
    found = budget(lm, steering, chats, 0.05, side="negative")
    assert found.other is None
    assert found.dial < 0
    for prompt, row in zip(chats, found.per_prompt, strict=True):
        assert row.prompt[0][0] == "user"
        assert kl_at(lm, steering, prompt, row.dial, chat=True) == pytest.approx(0.05, rel=0.02)
    raw = budget(lm, steering, chats[:1], 0.05, side="negative", chat=False)
    assert raw.per_prompt[0].prompt == chats[0]
    assert raw.dial != found.per_prompt[0].dial


def test_as_json() -> None:
    lm = shared("llama")
    found = budget(lm, steer_at(lm, "resid"), ["Is it true?"], 0.05)
    document = found.as_json()
    assert document["per_prompt"][0]["prompt"] == [{"role": "user", "content": "Is it true?"}]
    assert document["per_prompt"][0]["dial"] == document["dial"] == found.dial > 0
    assert document["negative"]["dial"] < 0
    assert "negative" not in document["negative"]


# -- where the dial ends ----------------------------------------------------------------------


def test_the_range_is_kept_and_prompts_that_do_not_reach_are_told() -> None:
    lm = shared("llama")
    free = steer_at(lm, "resid")
    dials = sorted(row.dial for row in budget(lm, free, PROMPTS, 0.1, chat=False).per_prompt)
    middle = (dials[0] + dials[1]) / 2
    narrow = with_range(free, -1.0, middle)
    with pytest.warns(tt.TrimtabWarning, match="2 of 3 prompts cost less than 0.1 nats") as told:
        found = budget(lm, narrow, PROMPTS, 0.1, chat=False, side="positive")
    assert f"its end, {middle:g}" in str(told[0].message)
    assert found.unreached == 2
    assert sorted(row.reached for row in found.per_prompt) == [False, False, True]
    for row in found.per_prompt:
        assert row.in_range
        assert row.dial <= middle
        assert row.kl == pytest.approx(kl_at(lm, narrow, row.prompt, row.dial), rel=1e-3)
        if not row.reached:
            assert row.dial == middle
            assert row.kl < 0.1
    beyond = budget(lm, narrow, PROMPTS, 0.1, chat=False, beyond_range=True)
    check_budget(lm, narrow, PROMPTS, 0.1, beyond)
    assert sorted(row.in_range for row in beyond.per_prompt) == [False, False, True]


@pytest.mark.parametrize("reach", [360.0, 180.0, 90.0])
def test_a_rotation_ends_at_half_a_turn(reach: float) -> None:
    lm = shared("llama")
    turn = with_range(steer_at(lm, "resid", "Rotate"), -reach, reach)
    for beyond in (False, True):
        with pytest.warns(tt.TrimtabWarning, match="cost less"):
            found = budget(lm, turn, PROMPTS[:1], 50.0, chat=False, beyond_range=beyond)
        end = 180.0 if beyond else min(reach, 180.0)
        assert found.dial == end
        assert found.other is not None
        assert found.other.dial == -end
        assert found.per_prompt[0].in_range == (end <= reach)


def test_a_dial_without_a_negative_side() -> None:
    lm = shared("llama")
    steering = with_range(steer_at(lm, "resid"), 0.0, 100.0)
    assert budget(lm, steering, PROMPTS, 0.05, chat=False).other is None
    refused_in_one_line(
        lambda: budget(lm, steering, PROMPTS, 0.05, side="negative"),
        "no negative side: it goes from 0 to 100",
    )
    refused_in_one_line(
        lambda: budget(lm, with_range(steering, 0.0, 0.0), PROMPTS, 0.05),
        "no side: it goes from 0 to 0",
    )


@pytest.mark.filterwarnings("ignore::trimtab.errors.TrimtabWarning")
def test_a_steering_that_does_nothing_is_unreached() -> None:
    lm = shared("llama")
    nothing = steer(lm, ("layers.1.resid", Add(torch.zeros(lm.anatomy.hidden_size))))
    found = budget(lm, nothing, PROMPTS, 0.1, chat=False)
    assert found.unreached == 3
    assert [row.dial for row in found.per_prompt] == [100.0] * 3
    assert found.per_prompt[0].kl == pytest.approx(0, abs=1e-6)  # what float32 rounds
    calibrated = calibrate(lm, nothing, PROMPTS, [0.1], chat=False)
    refused_in_one_line(lambda: calibrated.at(kl=0.1), "no dials of the positive side")


def test_overflow_is_too_much() -> None:
    """A dial at which the model says NaN is beyond every budget."""
    lm = tt.wrap(tiny_model("llama", dtype=torch.float16), tiny_tokenizer(), "llama")
    steering = with_range(steer_at(lm, "resid"), -1e8, 1e8)
    found = budget(lm, steering, PROMPTS[:1], 0.1, chat=False)
    assert found.per_prompt[0].reached
    assert found.per_prompt[0].kl == pytest.approx(0.1, rel=0.02)


# -- the search, on curves that are known -----------------------------------------------------


class Known:
    """Stands for a Turning: KL of a binary token is a given function of the dial."""

    def __init__(self, *curves: Any) -> None:
        self.curves, self.asked = curves, 0
        self.base = torch.tensor([[1.0, 0.0]] * len(curves)).log()

    def log_p(self, texts: list[int], dials: list[float]) -> Any:
        self.asked += len(texts)
        kl = torch.tensor(
            [self.curves[text](dial) for text, dial in zip(texts, dials, strict=True)],
            dtype=torch.float64,
        )
        # KL of (1, 0) and (q, 1 - q) is -ln q; the second entry takes no part.
        yield list(range(len(texts))), torch.stack((-kl, torch.zeros_like(kl)), -1)


def found_on(curve: Any, nats: Sequence[float], end: float, guess: float) -> list[Solution]:
    turning: Any = Known(curve)
    turning.base = torch.tensor([[0.0, -1e9]], dtype=torch.float64)
    searches = [_Search(0, "positive", end, one, min(guess, end)) for one in nats]
    _run(turning, searches)
    assert turning.asked <= 40 * len(nats)
    return [search.solution() for search in searches]


CURVES = {
    "square": lambda d: d * d,
    "steep": lambda d: (d / 3) ** 8,
    "flat": lambda d: 0.6 * d**0.4,
    "saturating": lambda d: 1.2 * (1 - math.exp(-d * d / 9)),
    "exploding": lambda d: math.expm1(min(d, 20.0) ** 2) / 100,
    "late": lambda d: max(0.0, d - 40) ** 2 + 1e-9 * d * d,
}


@pytest.mark.parametrize("guess", [1e-6, 0.3, 7.0, 1e5])
@pytest.mark.parametrize("curve", CURVES)
def test_the_search_finds_what_is_there(curve: str, guess: float) -> None:
    kl = CURVES[curve]
    solutions = found_on(kl, [0.01, 0.1, 1.0], 1e5, guess)
    for nats, solution in zip([0.01, 0.1, 1.0], solutions, strict=True):
        assert solution.reached
        assert kl(solution.dial) == pytest.approx(nats, rel=0.011)
        assert solution.kl == pytest.approx(kl(solution.dial))
    assert solutions[0].dial < solutions[1].dial < solutions[2].dial


def test_kl_that_falls_again() -> None:
    """A hump of 1 nat at 5: each budget below it is met somewhere, and above it not at all."""
    hump = lambda d: math.exp(-((d - 5) ** 2)) + 1e-4 * d  # noqa: E731
    for guess in (0.5, 4.0, 6.0, 15.0):
        low, high = found_on(hump, [0.1, 3.0], 20.0, guess)
        assert low.reached == (hump(low.dial) == pytest.approx(0.1, rel=0.011))
        assert hump(low.dial) <= 0.1 * 1.011
        assert not high.reached
        assert hump(high.dial) < 3
    turn = lambda d: 0.5 * math.sin(math.radians(d)) ** 2  # noqa: E731
    for guess in (1.0, 26.0, 100.0, 180.0):  # the end is idle again: what is on the way counts
        found, too_much = found_on(turn, [0.1, 0.6], 180.0, guess)
        assert found_on(turn, [0.1], 180.0, guess)[0].reached
        assert found.reached
        assert turn(found.dial) == pytest.approx(0.1, rel=0.011)
        assert found.dial < 90
        assert (too_much.dial, too_much.reached) == (180.0, False)


def test_kl_that_jumps_past_the_budget() -> None:
    """As with experts: the last dial that keeps to the budget is what the budget allows."""
    jump = lambda d: 0.02 * d if d < 2 else 3.0  # noqa: E731
    for guess in (0.1, 1.9, 50.0):
        (solution,) = found_on(jump, [0.5], 100.0, guess)
        assert solution.reached
        assert 1.9 < solution.dial < 2
        assert solution.kl == pytest.approx(jump(solution.dial))


def test_infinite_kl_is_too_much() -> None:
    for bad in (math.inf, math.nan):
        wall = lambda d, bad=bad: d * d if d < 1 else bad  # noqa: E731
        (solution,) = found_on(wall, [0.1], 1e4, 1e3)
        assert solution.reached
        assert solution.dial == pytest.approx(math.sqrt(0.1), rel=0.01)


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [0.0, -0.1, math.nan, math.inf])
def test_budgets_that_are_none(kl: float) -> None:
    lm = shared("llama")
    steering = steer_at(lm, "resid")
    says = "must be above 0 nats"
    refused_in_one_line(lambda: budget(lm, steering, PROMPTS, kl), says)
    refused_in_one_line(lambda: calibrate(lm, steering, PROMPTS, [0.1, kl]), says)
    refused_in_one_line(lambda: lm.generate(PROMPTS, steering=within(steering, kl=kl)), says)
    refused_in_one_line(lambda: lm.steered(within(steering, kl=kl)).__enter__(), says)


def test_what_has_no_budget() -> None:
    lm = shared("llama")
    ok, late = steer_at(lm, "resid"), steer_at(lm, "resid", positions="generated")
    for op in ("Turn", "Adaptive"):
        turn = steer_at(lm, "resid", op)
        for action in (
            lambda turn=turn: budget(lm, turn, PROMPTS),
            lambda turn=turn: lm.steered(within(turn, kl=0.1)).__enter__(),
            lambda turn=turn: lm.generate(PROMPTS, steering=within(turn, kl=0.1)),
        ):
            refused_in_one_line(action, "sets an angle rather than turning by one")
    for action in (
        lambda: budget(lm, late, PROMPTS),
        lambda: lm.steered(within(late, kl=0.1)).__enter__(),
    ):
        refused_in_one_line(action, "acts on generated tokens only")
    both: Any = ok + ok
    refused_in_one_line(lambda: budget(lm, both, PROMPTS), "one steering, not several")
    refused_in_one_line(lambda: lm.steered(within(ok, kl=0.1), ok).__enter__(), "alone")
    refused_in_one_line(
        lambda: lm.logits(PROMPTS, steering=[within(ok, kl=0.1), None, None]), "for all rows"
    )
    refused_in_one_line(
        lambda: lm.generate(PROMPTS, steering=within(both, kl=0.1)), "the dial of one steering"
    )
    refused_in_one_line(lambda: within(None, kl=0.1), "the dial of one steering")
    other: Any = "up"
    refused_in_one_line(lambda: budget(lm, ok, PROMPTS, side=other), "known are positive, negative")
    refused_in_one_line(lambda: budget(lm, ok, []), "there is no prompt")
    refused_in_one_line(lambda: calibrate(lm, ok, []), "there is no prompt")
    refused_in_one_line(lambda: calibrate(lm, ok, PROMPTS, []), "there is no budget")
    refused_in_one_line(lambda: lm.generate([], steering=within(ok, kl=0.1)), "there is no prompt")
    gpt2 = shared("gpt2")
    refused_in_one_line(lambda: gpt2.steered(within(ok, kl=0.1)).__enter__(), "sizes do not fit")
    assert not is_hooked(lm.model)


def test_another_models_weights_need_force() -> None:
    lm = shared("llama")
    other = replace(steer_at(lm, "resid"), model=replace(lm.identity, digest="0" * 64))
    refused_in_one_line(lambda: budget(lm, other, PROMPTS, 0.1, chat=False), "made for")
    refused_in_one_line(lambda: lm.steered(within(other, kl=0.1)).__enter__(), "made for")
    found = budget(lm, other, PROMPTS, 0.1, chat=False, force=True)
    check_budget(lm, steer_at(lm, "resid"), PROMPTS, 0.1, found)
    with lm.steered(within(other, kl=0.1), force=True):
        lm.logits(PROMPTS)


# -- real models ------------------------------------------------------------------------------

QUESTIONS = ("Is the sky blue?", "Do you like tea?", "Can she swim?", "Is it late?", "Was it good?")
CONTRAST = tt.Contrast.from_pairs([(q, " Yes.", " No, not at all.") for q in QUESTIONS], "yes")
#: Short ones; a chat or a long one makes nothing else true.
REAL_PROMPTS = ["The capital of France is", "Yesterday we walked to the harbour and"]


def fitted(lm: tt.LanguageModel, method: str) -> tt.Steering:
    """A steering that a method made; SS's plane at blocks where its angle matters."""
    layer = lm.anatomy.layers // 3
    if method == "caa":
        return tt.CAA(layer=layer, token="last").fit(lm, CONTRAST)
    if method == "austeer":
        return tt.AUSteer(k=16, site="ffn_out", direction="paper").fit(lm, CONTRAST)
    steering = tt.SS(whole_blocks=False).fit(lm, CONTRAST)
    plane = steering.interventions[0].operator
    sites = [f"layers.{i}.resid" for i in range(layer, layer + 3)]
    return replace(steering, interventions=tuple(tt.Intervention(site, plane) for site in sites))


def check_real(lm: tt.LanguageModel, method: str, nats: Sequence[float]) -> None:
    steering = fitted(lm, method)
    prompts = REAL_PROMPTS[:1] if method == "ss" else REAL_PROMPTS  # the other reaches 0.5 nats
    before = [0.0] * (2 * len(prompts))
    for kl in nats:
        found = budget(lm, steering, prompts, kl, chat=False)
        assert (found.other is None) == (method == "austeer")  # whose alpha is 0 or more
        check_budget(lm, steering, prompts, kl, found)
        rows = [*found.per_prompt, *(found.other.per_prompt if found.other else ())]
        assert all(row.in_range for row in rows)
        assert all(abs(r.dial) > size for r, size in zip(rows, before, strict=False))
        before = [abs(row.dial) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["caa", "ss"])
def test_a_budget_on_smollm2(smollm2: Any, method: str) -> None:
    check_real(smollm2, method, [0.1])


@pytest.mark.slow
def test_a_budget_on_gemma3(gemma3: Any) -> None:
    check_real(gemma3, "austeer", [0.1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["caa", "austeer", "ss"])
def test_every_budget_on_smollm2(smollm2: Any, method: str) -> None:
    check_real(smollm2, method, [0.01, 0.1, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["caa", "austeer", "ss"])
def test_every_budget_on_gemma3(gemma3: Any, method: str) -> None:
    check_real(gemma3, method, [0.01, 0.1, 1.0])


@pytest.mark.slow
def test_what_a_rotation_does_not_reach(smollm2: Any) -> None:
    """SS as it is fitted, on norms: KL of a rotation peaks before half a turn, or stays small."""
    steering = tt.SS(whole_blocks=False).fit(smollm2, CONTRAST)
    grid = range(15, 181, 15)
    peaks = [max(kl_at(smollm2, steering, text, d) for d in grid) for text in REAL_PROMPTS]
    for share in (0.7, 1.5):
        for text, peak in zip(REAL_PROMPTS, peaks, strict=True):
            with pytest.warns(tt.TrimtabWarning) if share > 1 else nullcontext():
                found = budget(
                    smollm2, steering, [text], share * peak, chat=False, side="positive"
                ).per_prompt[0]
            measured = kl_at(smollm2, steering, text, found.dial)
            if share < 1:
                assert found.reached
                assert measured == pytest.approx(share * peak, rel=0.02)
            else:
                assert (found.reached, found.dial) == (False, 180.0)
                assert measured < share * peak


@pytest.mark.parametrize(("op", "dial"), [("Add", 1.0), ("Add", -1.0), ("Rotate", 1.0)])
def test_a_search_that_is_told_what_others_measure(op: str, dial: float) -> None:
    """It comes to a dial of that budget, or to the end of the range, on the side that is asked."""
    lm = shared("llama")
    kind = "attn_norm" if op == "Rotate" else "resid"
    steering = with_range(steer_at(lm, kind, op), -170, 170).at(dial)
    for kl in (0.001, 0.05):
        search = solving.searched(steering, kl)
        asked, rounds = next(search), 0
        try:
            while True:
                rounds += 1
                asked = search.send(kl_at(lm, steering, PROMPTS[0], asked))
        except StopIteration as end:
            found = end.value
        assert math.copysign(1, found.dial) == math.copysign(1, dial)
        assert found.kl == pytest.approx(kl_at(lm, steering, PROMPTS[0], found.dial), rel=1e-3)
        if found.reached:
            assert found.kl == pytest.approx(kl, rel=0.011)
        else:
            assert abs(found.dial) == 170
        assert rounds < 20
