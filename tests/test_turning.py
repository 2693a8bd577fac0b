"""Many dials at once: the same numbers as one dial at a time, and the derivative of the logits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import (
    LINEAR,
    OPERATORS,
    PROMPTS,
    language_model,
    refused_in_one_line,
    relative,
    steer,
    steer_at,
    token_ids,
)
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.dials.solving import variance
from trimtab.dials.turning import (
    Turning,
    check_turns,
    dial_limits,
    divergence,
    entropy,
    idle_dial,
)
from trimtab.steering import Positions
from trimtab.steering.operators import Ablate, Add, Rotate, Scale

TEXTS = [token_ids(prompt) for prompt in PROMPTS]
#: Of each operator some dials at which it does something, and the one at which it does nothing.
DIALS = {"Scale": (0.0, 1.5, -3.0), "Add": (0.0, 2.5, -7.0), "Ablate": (0.0, 1.0, -2.0)} | {
    "Rotate": (0.0, 70.0, -140.0),
    "Absolute": (0.0, 1.5, -3.0),
    "Turn": (0.0, 70.0, 200.0),
    "Respond": (0.0, 1.5, -3.0),
    "Adaptive": (0.0, 70.0, 200.0),
}

#: For tests that leave the model as it is.
shared = cache(language_model)


def one_by_one(lm: tt.LanguageModel, steering: tt.Steering, dial: float) -> Tensor:
    """The next token's log-distribution after each prompt, one pass for each."""
    turned = replace(steering, value=dial)  # at() warns of dials outside the range
    rows = [lm.logits([prompt], steering=turned)[0] for prompt in PROMPTS]
    return torch.stack(rows).log_softmax(-1)


def all_at_once(turning: Turning, texts: list[int], dials: list[float]) -> Tensor:
    found: dict[int, Tensor] = {}
    for places, log_p in turning.log_p(texts, dials):
        found |= dict(zip(places, log_p, strict=True))
    return torch.stack([found[place] for place in range(len(texts))])


def check_dials(
    lm: tt.LanguageModel, steering: tt.Steering, dials: tuple[float, ...], bound: float = 1e-5
) -> None:
    turning = Turning(lm, steering, TEXTS)
    # The dials of a text in one batch, texts of several lengths in it.
    asked = [(text, dial) for dial in dials for text in (2, 0, 1)]
    found = all_at_once(turning, *map(list, zip(*asked, strict=True)))
    expected = {dial: one_by_one(lm, steering, dial) for dial in dials}
    for (text, dial), row in zip(asked, found, strict=True):
        assert (row - expected[dial][text]).abs().max() < bound, (text, dial)
    plain = torch.stack([lm.logits([prompt])[0] for prompt in PROMPTS]).log_softmax(-1)
    assert (turning.base - plain).abs().max() < bound


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3", "gpt2"])
def test_dials_in_a_batch_are_a_loop_over_dials(name: str, op: str) -> None:
    lm = shared(name)
    steering = steer_at(lm, "resid", op)
    check_dials(lm, steering, DIALS[op])
    changed = one_by_one(lm, steering, DIALS[op][1]) - one_by_one(lm, steering, DIALS[op][2])
    assert changed.abs().amax(-1).min() > 1e-3  # there is something to see, after each prompt


@pytest.mark.parametrize("positions", ["last", "prompt"])
@pytest.mark.parametrize("kind", ["attn_norm_in", "ffn_in", "heads", "final_norm", "embed"])
def test_at_other_positions_and_sites(kind: str, positions: Positions) -> None:
    lm = shared("gemma3")
    check_dials(lm, steer_at(lm, kind, "Add", positions=positions), DIALS["Add"])


def test_experts() -> None:
    lm = shared("qwen3_moe")
    check_dials(lm, steer_at(lm, "ffn_in", "Scale"), DIALS["Scale"])


def test_several_interventions_turn_together() -> None:
    lm = shared("qwen2")
    first, second = steer_at(lm, "ffn_out", "Scale", 0), steer_at(lm, "resid", "Add", 2)
    sites = [(i.site, i.operator) for one in (second, first) for i in one.interventions]
    check_dials(lm, steer(lm, *sites), (1.5, -3.0))


def test_more_questions_than_one_batch_holds() -> None:
    lm = shared("llama")
    steering = steer_at(lm, "resid", "Rotate")
    dials = [float(dial) for dial in range(-90, 90, 2)]
    found = all_at_once(Turning(lm, steering, TEXTS), [1] * 90, dials)
    for i in (0, 40, 89):
        assert (found[i] - one_by_one(lm, steering, dials[i])[1]).abs().max() < 1e-5


@pytest.mark.parametrize("op", LINEAR)
def test_bfloat16(op: str) -> None:
    lm = tt.wrap(tiny_model("gemma2", dtype=torch.bfloat16), tiny_tokenizer(), "gemma2")
    steering = steer_at(lm, "resid", op)
    turning = Turning(lm, steering, TEXTS)
    assert turning.base.dtype == torch.float32
    check_dials(lm, steering, DIALS[op], bound=0.1)
    for _, logits, slope in turning.derivative([0, 1], [0.0, 0.0]):
        assert torch.isfinite(logits).all()
        assert slope.abs().amax(-1).min() > 0


def test_inside_another_steering_it_is_that_model_which_is_turned() -> None:
    """Also where both act on one block's output, up to which nothing runs twice."""
    lm = language_model("llama")
    outer, inner = steer_at(lm, "resid", "Add", seed=1).at(2), steer_at(lm, "resid", "Add", seed=2)
    with lm.steered(outer):
        check_dials(lm, inner, (0.0, 2.5))


def test_rows_are_counted() -> None:
    lm = shared("llama")
    turning = Turning(lm, steer_at(lm, "resid"), TEXTS)
    assert turning.rows == 3
    list(turning.log_p([0, 0, 1], [1.0, 2.0, 3.0]))
    assert turning.rows == 6


# -- the derivative ---------------------------------------------------------------------------


def exact(kind: str, width: int) -> Any:
    """Operators whose float32 arithmetic with a dial of few binary digits is exact, so that
    differences of dials in float64 see the model, not the rounding."""
    coarse = torch.randn(width, generator=torch.Generator().manual_seed(3)).mul(16).round() / 16
    if kind == "Add":
        return Add(coarse / 4)
    if kind == "Scale":
        return Scale(torch.arange(width), coarse / 4, width)
    plane = torch.zeros(2, width)
    plane[0, :2] = torch.tensor([0.6, 0.8])
    plane[1, 2:4] = torch.tensor([-0.8, 0.6])
    return Ablate(plane[0]) if kind == "Ablate" else Rotate(plane)


#: Where the derivative is taken beside the idle dial, and the step of the differences.
POINTS = {"Add": (1.5, 2**-8), "Scale": (0.75, 2**-8), "Ablate": (0.5, 2**-8)} | {
    "Rotate": (40.0, 2**-2)
}


@cache
def wide(name: str) -> tt.LanguageModel:
    """A model in float64 throughout: transformers' RMSNorms compute in float32 in any case, and
    differences of dials would see nothing but their rounding."""
    model = tiny_model(name, dtype=torch.float64)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = partial(_norm, module, 1.0 if name.startswith("gemma") else 0.0)
    if name == "qwen3_moe":
        model.set_experts_implementation("eager")  # the default has no float64
    return tt.wrap(model, tiny_tokenizer(), name)


def _norm(module: Any, plus: float, x: Tensor) -> Tensor:
    eps = getattr(module, "eps", None) or module.variance_epsilon
    return (plus + module.weight) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


@pytest.fixture
def wide_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some attention and the choice of experts take a softmax in float32 in any case."""
    original = torch.nn.functional.softmax

    def softmax(x: Tensor, dim: int, dtype: Any = None, **options: Any) -> Tensor:
        return original(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


def logits_at(lm: tt.LanguageModel, steering: tt.Steering, text: list[int], dial: float) -> Tensor:
    """Float64 logits after a text, from transformers' own forward."""
    with lm.steered(steering.at(dial)), torch.no_grad():
        return lm.model(torch.tensor([text]), use_cache=False).logits[0, -1]


def differences(
    lm: tt.LanguageModel, steering: tt.Steering, text: list[int], dial: float, step: float
) -> Tensor:
    """Central differences of fourth order."""
    far, near = (
        logits_at(lm, steering, text, dial + d) - logits_at(lm, steering, text, dial - d)
        for d in (2 * step, step)
    )
    return (8 * near - far) / (12 * step)


@pytest.mark.usefixtures("wide_softmax")
@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("name", TINY)
def test_the_derivative_is_that_of_central_differences(name: str, op: str) -> None:
    lm = wide(name)
    site = "layers.1.resid"
    steering = steer(lm, (site, exact(op, lm.anatomy.width(site))))
    point, step = POINTS[op]
    asked = [(0, 0.0), (1, point), (0, point)]
    turning = Turning(lm, steering, TEXTS[:2])
    texts, dials = map(list, zip(*asked, strict=True))
    seen = 0
    for places, logits, slope in turning.derivative(texts, dials):
        assert slope.dtype == torch.float64
        for place, row, change in zip(places, logits, slope, strict=True):
            text, dial = TEXTS[texts[place]], dials[place]
            assert relative(row, logits_at(lm, steering, text, dial)) < 1e-9
            assert change.abs().max() > 1e-5
            assert relative(change, differences(lm, steering, text, dial, step)) < 1e-6
            seen += 1
    assert seen == 3


@pytest.mark.usefixtures("wide_softmax")
def test_the_derivative_through_several_sites_and_positions() -> None:
    lm = wide("gemma3")
    for positions in ("last", "prompt"):
        sites = [
            (f"layers.{layer}.{kind}", exact("Add", lm.anatomy.width(f"layers.{layer}.{kind}")))
            for layer, kind in ((0, "heads"), (2, "ffn_in"), (3, "attn_norm_in"))
        ]
        steering = steer(lm, *sites, positions=positions)
        for _, _, slope in Turning(lm, steering, TEXTS[:1]).derivative([0], [0.5]):
            expected = differences(lm, steering, TEXTS[0], 0.5, 2**-8)
            assert relative(slope[0], expected) < 1e-6


def test_the_experts_come_back_after_an_exception() -> None:
    lm = language_model("qwen3_moe")
    before = lm.model.config._experts_implementation
    turning = Turning(lm, steer_at(lm, "resid"), TEXTS[:1])
    list(turning.derivative([0], [0.0]))
    assert lm.model.config._experts_implementation == before == "grouped_mm"
    lm.model.model.norm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(turning.derivative([0], [0.0]))
    assert lm.model.config._experts_implementation == before


# -- curvature, divergence, entropy -----------------------------------------------------------


def test_variance_divergence_and_entropy_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]], dtype=torch.float64)
    slope = torch.tensor([[2.0, -2.0, 6.0], [1.0, 1.0, 1.0]])
    # Row 1: mean 1 - 0.5 + 1.5 = 2; variance 0.5 * 0 + 0.25 * 16 + 0.25 * 16 = 8.
    assert variance(p.log() + 3, slope).tolist() == pytest.approx([8.0, 0.0], abs=1e-12)
    q = torch.tensor([[0.25, 0.25, 0.5], [0.9, 0.05, 0.05]], dtype=torch.float64)
    # Row 1: 0.5 ln 2 + 0.25 ln 1 - 0.25 ln 2.
    assert divergence(p.log(), q.log()).tolist() == pytest.approx([0.25 * 0.6931471805599453, 0])
    assert entropy(p.log())[0].item() == pytest.approx(1.5 * 0.6931471805599453)


@pytest.mark.parametrize("op", LINEAR)
def test_kl_is_half_the_variance_times_the_square(op: str) -> None:
    """METHODS: KL = Var / 2 t^2 for small t, on both sides."""
    lm = wide("llama")
    steering = steer(lm, ("layers.1.resid", exact(op, lm.anatomy.hidden_size)))
    turning = Turning(lm, steering, TEXTS[:1])
    ((_, logits, slope),) = turning.derivative([0], [0.0])
    expected = float(variance(logits, slope)[0]) / 2
    base = logits_at(lm, steering, TEXTS[0], 0.0).log_softmax(-1)
    small = 2**-4 if op == "Rotate" else 2**-10
    for step in (small, -small):
        steered = logits_at(lm, steering, TEXTS[0], step).log_softmax(-1)
        kl = float((base.exp() * (base - steered)).sum())
        assert kl / step**2 == pytest.approx(expected, rel=2e-2)


# -- what has no dial to turn -----------------------------------------------------------------


def test_what_cannot_be_turned_is_refused() -> None:
    lm = shared("llama")
    ok = steer_at(lm, "resid")
    refused_in_one_line(lambda: check_turns(lm, ok + ok), "give one steering, not several")
    late = steer_at(lm, "resid", positions="generated")
    refused_in_one_line(lambda: Turning(lm, late, TEXTS), "generated tokens only, at layers.1")
    refused_in_one_line(lambda: Turning(shared("gpt2"), ok, TEXTS), "sizes do not fit")


def test_the_idle_dial() -> None:
    lm = shared("llama")
    for op in OPERATORS:
        idle = None if op in ("Turn", "Adaptive") else 0.0
        assert idle_dial(steer_at(lm, "resid", op)) == idle
    mixed = [
        (i.site, i.operator)
        for op in ("Add", "Turn")
        for i in steer_at(lm, "resid", op).interventions
    ]
    assert idle_dial(steer(lm, *mixed)) is None


def test_limits_of_a_rotation_are_half_a_turn() -> None:
    lm = shared("llama")
    turn = steer_at(lm, "resid", "Rotate")  # -100 to 100
    assert dial_limits(turn) == (-100.0, 100.0)
    assert dial_limits(turn, 5) == (-180.0, 180.0)
    assert dial_limits(steer_at(lm, "resid", "Add"), 5) == (-500.0, 500.0)
