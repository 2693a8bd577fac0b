"""Routers of mixtures: their logits read and steered, experts that are forced, and what bakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import trimtab as tt
from helpers import (
    IDS,
    PROMPTS,
    few_quick,
    left_padded,
    refused_in_one_line,
    relative,
    steer,
    token_ids,
    traces,
)
from tiny import TINY, tiny_model, tiny_tokenizer
from tiny_curated import curated_model
from trimtab.anatomy import Anatomy, hooked
from trimtab.methods import describe, explain
from trimtab.steering.operators import Add, Force, Operator, Scale, apply

#: Every tiny mixture; 2 of 4 experts are chosen in each.
MIXTURES = (
    "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "glm4_moe", "llama4_text",
    "qwen3_next", "qwen3_5_moe", "granitemoehybrid", "nemotron_h", "gemma4_moe",
)  # fmt: skip
#: Those whose routers make scores by a sigmoid, with a bias for the choice, in groups.
SIGMOID = ("deepseek_v3", "glm4_moe", "nemotron_h")


@cache
def lm_of(name: str, dtype: torch.dtype = torch.float32) -> tt.LanguageModel:
    model = (tiny_model if name in TINY else curated_model)(name, dtype=dtype)
    lm = tt.wrap(model, tiny_tokenizer(), name)
    lm.model.generation_config.eos_token_id = None
    return lm


def site_of(lm: tt.LanguageModel) -> str:
    return lm.anatomy.sites("router")[-1]


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def soft(seed: int = 0) -> Add:
    return Add(torch.randn(4, generator=torch.Generator().manual_seed(seed)))


def at_router(lm: tt.LanguageModel, *operators: Operator) -> tt.Steering:
    return steer(lm, *((site_of(lm), operator) for operator in operators))


@contextmanager
def seen_by_experts(lm: tt.LanguageModel) -> Iterator[list[tuple[Tensor, ...]]]:
    """What the experts of the last mixture are called with, beside hidden states."""
    layer = int(site_of(lm).split(".")[1])
    block = lm.anatomy.blocks[layer]
    named = block.named_modules()
    (experts,) = (module for name, module in named if name.rpartition(".")[2] == "experts")
    seen: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    try:
        yield seen
    finally:
        handle.remove()


def chosen_by(lm: tt.LanguageModel, *steerings: Any, text: list[int] = IDS) -> list[set[int]]:
    """To which experts each token of a text goes."""
    with torch.no_grad(), lm.steered(*steerings), seen_by_experts(lm) as seen:
        lm.model(input_ids=torch.tensor([text]), use_cache=False)
    args = seen[-1]
    if len(args) == 1:  # Llama 4: all tokens for each expert in turn, most of them weighed by zero
        routed = args[0].view(4, len(text), -1).any(-1).T
        return [set(row.nonzero()[:, 0].tolist()) for row in routed]
    return [set(row) for row in args[1].reshape(len(text), -1).tolist()]


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_the_site_is_the_router_s_logits(name: str) -> None:
    """By hand: the router's weight on what the router reads."""
    lm = lm_of(name)
    site = site_of(lm)
    layer = int(site.split(".")[1])
    router = lm.anatomy.router(site)
    assert (router.width, router.chosen, lm.anatomy.width(site)) == (4, 2, 4)
    module = lm.anatomy.blocks[layer].get_submodule(router.path)
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    seen: dict[str, Tensor] = {}
    ids = torch.tensor([IDS, IDS[::-1]])
    with torch.no_grad():
        plain = lm.model(input_ids=ids, use_cache=False).logits
        edits = {lm.anatomy.point(site): lambda x: seen.__setitem__(site, x)}
        with hooked(lm.anatomy.body, edits):  # type: ignore[arg-type]
            same = lm.model(input_ids=ids, use_cache=False).logits
    handle.remove()
    assert torch.equal(same, plain)
    x = read[-1].reshape(2, len(IDS), -1)
    owner: Any = module.proj if name == "gemma4_moe" else module
    if name == "gemma4_moe":
        x = module.norm(x) * module.scale * module.scalar_root_size
    expected = linear(x.float(), owner.weight.float(), getattr(owner, "bias", None))
    assert seen[site].shape == (2, len(IDS), 4)
    assert relative(seen[site], expected) < 1e-5


def test_a_model_without_experts_has_no_router() -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer(), "llama")
    says = "llama has no .*router: the block has no mixture of experts"
    refused_in_one_line(lambda: lm.anatomy.sites("router"), says)
    steering = steer(lm, ("layers.1.router", soft()))
    refused_in_one_line(lambda: lm.logits(PROMPTS, steering=steering), says)
    mixed = lm_of("qwen3_moe")
    refused_in_one_line(
        lambda: mixed.anatomy.point("layers.0.router"),
        "no mixture of experts; the layers that have one are 1 to 2",
    )


class Fixed(nn.Module):
    """A router that sends every token to the same experts, whatever its logits."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.weight = gate.weight

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = linear(hidden_states, self.weight)
        chosen = torch.tensor([2, 1]).expand(len(logits), 2)
        return logits, logits.softmax(-1).gather(1, chosen), chosen


def test_what_does_not_choose_by_its_logits_is_no_router() -> None:
    model = tiny_model("qwen3_moe")
    mlp = model.model.layers[2].mlp
    mlp.gate = Fixed(mlp.gate)
    anatomy = Anatomy(model)  # found, because the entry does not hold
    assert anatomy.sites("router") == ["layers.1.router"]
    reason = anatomy.missing(2, "router")
    assert reason == "no module is found that chooses among mlp.experts by its logits"


# -- soft -------------------------------------------------------------------------------------


def _softmax_of_all(gate: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen 3: softmax, the largest two, which sum to one again."""
    weights, ids = z.softmax(-1).sort(-1, descending=True)
    return weights[:, :2] / weights[:, :2].sum(-1, keepdim=True), ids[:, :2]


def _softmax_of_two(gate: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-OSS: the largest two, then softmax."""
    values, ids = z.sort(-1, descending=True)
    return values[:, :2].softmax(-1), ids[:, :2]


def _sigmoid_in_groups(gate: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek 3: sigmoid; the choice by a bias more, out of the best groups only."""
    scores = z.sigmoid()
    biased = scores + gate.e_score_correction_bias
    groups = biased.view(len(z), gate.num_group, -1)
    best = groups.sort(-1, descending=True).values[..., :2].sum(-1)
    kept = best.argsort(-1, descending=True)[:, : gate.topk_group]
    open_ = torch.zeros_like(best).scatter(1, kept, 1.0)[..., None].expand_as(groups)
    ids = biased.masked_fill(open_.reshape_as(z) == 0, -1e9).argsort(-1, descending=True)[:, :2]
    weights = scores.gather(1, ids)
    if gate.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * gate.routed_scaling_factor, ids


ROUTERS: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "qwen3_moe": _softmax_of_all,
    "mixtral": _softmax_of_all,
    "gpt_oss": _softmax_of_two,
    "granitemoehybrid": _softmax_of_two,
    "deepseek_v3": _sigmoid_in_groups,
    "glm4_moe": _sigmoid_in_groups,
    "nemotron_h": _sigmoid_in_groups,
}


@contextmanager
def by_hand(name: str, lm: tt.LanguageModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The last mixture's router written out by hand, with other logits."""
    layer = int(site_of(lm).split(".")[1])
    gate: Any = lm.anatomy.blocks[layer].get_submodule(lm.anatomy.router(site_of(lm)).path)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.reshape(-1, x.shape[-1])
        z = change(linear(x.float(), gate.weight.float(), getattr(gate, "bias", None)))
        weights, ids = ROUTERS[name](gate, z)
        return z, weights, ids

    gate.forward = forward
    try:
        yield
    finally:
        del gate.forward


@pytest.mark.parametrize("name", ROUTERS)
def test_soft_steering_is_a_router_by_hand_with_other_logits(name: str) -> None:
    lm, operator = lm_of(name), soft()
    steering = at_router(lm, operator)
    plain = lm.logits(PROMPTS[:1])
    for dial in (0.0, 2.0, -3.0):
        with by_hand(name, lm, lambda z, dial=dial: z + dial * operator.vector):
            expected = lm.logits(PROMPTS[:1])
        found = lm.logits(PROMPTS[:1], steering=steering.at(dial))
        assert relative(found, expected) < 1e-5
        assert (relative(found, plain) > 1e-4) is (dial != 0)
    force = Force(numbers(3), numbers(0), 4)
    with by_hand(name, lm, lambda z: apply(force, z, 0.5)):
        expected = lm.logits(PROMPTS[:1])
    found = lm.logits(PROMPTS[:1], steering=at_router(lm, force).at(0.5))
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", MIXTURES)
def test_at_dial_zero_nothing_changes_to_the_bit(name: str) -> None:
    lm, before = lm_of(name), traces(lm_of(name).model)
    plain = lm.logits(PROMPTS[:1])
    for operator in (soft(), Force(numbers(1), numbers(2), 4), Force(numbers(), numbers(), 4)):
        steering = at_router(lm, operator)
        assert torch.equal(lm.logits(PROMPTS[:1], steering=steering.at(0.0)), plain)
        # Also where it is computed, because another row is steered.
        both = lm.logits([PROMPTS[0]] * 2, steering=[steering.at(0.0), steering.at(1.0)])
        assert relative(both[:1], plain) < 1e-5
    assert traces(lm.model) == before


# -- force ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", few_quick([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("name", MIXTURES)
def test_forced_experts_are_in_every_choice_and_others_in_none(
    name: str, dtype: torch.dtype
) -> None:
    lm = lm_of(name, dtype)
    for on, off in (((3,), ()), ((0, 2), ()), ((), (1,)), ((), (0, 3)), ((1,), (0, 2))):
        steering = at_router(lm, Force(numbers(*on), numbers(*off), 4))
        for dial in (1.0, 40.0):
            for experts in chosen_by(lm, steering.at(dial)):
                assert experts >= set(on)
                assert not experts & set(off)
                assert len(experts) == 2


@pytest.mark.parametrize("name", SIGMOID)
def test_a_bias_of_the_choice_is_overruled(name: str) -> None:
    """However large: no logit could be larger, because its sigmoid is at most one."""
    lm = tt.wrap(curated_model(name), tiny_tokenizer(), name)
    site = site_of(lm)
    gate: Any = lm.anatomy.blocks[int(site.split(".")[1])].get_submodule(
        lm.anatomy.router(site).path
    )
    gate.e_score_correction_bias.copy_(torch.tensor([50.0, 50.0, -50.0, -50.0]))
    assert all(experts == {0, 1} for experts in chosen_by(lm))
    steering = at_router(lm, Force(numbers(3), numbers(0), 4))
    lifted = chosen_by(lm, steering.at(0.99))  # the logits alone
    assert all(experts == {0, 1} for experts in lifted)
    forced = chosen_by(lm, steering)
    assert all(3 in experts and 0 not in experts for experts in forced)
    with torch.no_grad(), lm.steered(steering), seen_by_experts(lm) as seen:
        lm.model(input_ids=torch.tensor([IDS]), use_cache=False)
    _, ids, weights = seen[-1]
    assert (weights > 0).all()  # what the router makes of their logits
    assert ids.shape == weights.shape


def test_forced_experts_keep_the_router_s_preference() -> None:
    z = 2 * torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    on, off = numbers(1, 4), numbers(0)
    changed = apply(Force(on, off, 6), z, 1.0)
    assert (changed[:, 4] - changed[:, 1] - (z[:, 4] - z[:, 1])).abs().max() < 1e-5
    others = changed[:, [2, 3, 5]]
    assert torch.equal(others, z[:, [2, 3, 5]])
    lead = changed[:, on].amin(-1) - others.amax(-1)
    natural = z[:, on].amin(-1) - others.amax(-1)
    assert torch.allclose(lead, natural.clamp(min=0.01), atol=1e-5)  # no more than is needed
    assert (changed[:, 0] < others.amin(-1) - 0.009).all()
    near_one = apply(Force(on, off, 6), z, 0.5)
    assert torch.allclose(near_one, (z + changed) / 2, atol=1e-5)
    assert torch.equal(apply(Force(on, off, 6), z, 7.0), changed)
    assert torch.equal(apply(Force(on, off, 6), z, -7.0), z)


def test_rows_are_independent() -> None:
    for name in ("qwen3_moe", "deepseek_v3"):
        lm = lm_of(name)
        one, other = (at_router(lm, Force(numbers(a), numbers(b), 4)) for a, b in ((0, 1), (2, 0)))
        rows = [one, other, at_router(lm, soft()).at(2)]
        batch = lm.logits(PROMPTS, steering=rows)
        for prompt, row, logits in zip(PROMPTS, rows, batch, strict=True):
            assert relative(logits, lm.logits([prompt], steering=row)[0]) < 1e-4
        unsteered = lm.logits(PROMPTS, steering=[one, None, other])
        assert relative(unsteered[1], lm.logits(PROMPTS[1:2])[0]) < 1e-5


def test_text_is_steered_with_a_cache_as_without() -> None:
    lm = lm_of("deepseek_v3")
    rows = [at_router(lm, Force(numbers(0), numbers(1), 4)), None, at_router(lm, soft()).at(2)]
    written = []
    for cached in (True, False):
        with torch.no_grad(), lm.steered(rows):
            out = lm.model.generate(
                **left_padded(lm, PROMPTS),
                do_sample=False,
                max_new_tokens=4,
                use_cache=cached,
                output_logits=True,
                return_dict_in_generate=True,
            )
        written.append(torch.stack(out.logits))
    assert relative(*written) < 1e-4


def test_two_at_one_router_act_in_their_order() -> None:
    lm, added = lm_of("qwen3_moe"), soft()
    force = Force(numbers(3), numbers(0), 4)
    one, other = at_router(lm, added), at_router(lm, force).at(0.5)
    for both, change in (
        (one + other, lambda z: apply(force, z + added.vector, 0.5)),
        (other + one, lambda z: apply(force, z, 0.5) + added.vector),
    ):
        with by_hand("qwen3_moe", lm, change):
            expected = lm.logits(PROMPTS[:1])
        assert relative(lm.logits(PROMPTS[:1], steering=both), expected) < 1e-5
    # Forced experts stay so, whatever is added after it.
    chosen = chosen_by(lm, at_router(lm, force) + at_router(lm, Add(-9 * torch.eye(4)[3])))
    assert all(3 in experts and 0 not in experts for experts in chosen)


def test_experts_inside_and_router_are_steered_together() -> None:
    lm = lm_of("qwen3_moe")
    inner = site_of(lm).replace("router", "ffn_in")
    units = torch.arange(5)
    scale = steer(lm, (inner, Scale(units, torch.ones(5), lm.anatomy.width(inner))))
    added = soft()
    with by_hand("qwen3_moe", lm, lambda z: z + added.vector):
        expected = lm.logits(PROMPTS[:1], steering=scale)
    found = lm.logits(PROMPTS[:1], steering=at_router(lm, added) + scale)
    assert relative(found, expected) < 1e-5


# -- refused ----------------------------------------------------------------------------------


def test_what_a_router_cannot_do_is_refused(tmp_path: Path) -> None:
    lm = lm_of("qwen3_moe")

    def attach(on: Tensor, off: Tensor, dial: float = 1.0) -> None:
        lm.logits(PROMPTS[:1], steering=replace(at_router(lm, Force(on, off, 4)), value=dial))

    says = "chooses 2 of 4 experts: .*force at most 2 on and 2 off"
    refused_in_one_line(lambda: attach(numbers(0, 1, 2), numbers()), says)
    refused_in_one_line(lambda: attach(numbers(), numbers(0, 1, 2)), says)
    refused_in_one_line(lambda: attach(numbers(0), numbers(1), -1.0), "exchange the experts")
    wide = steer(lm, (site_of(lm), Force(numbers(0), numbers(7), 8)))
    refused_in_one_line(lambda: lm.logits(PROMPTS, steering=wide), "has 4 units")
    elsewhere = steer(lm, ("layers.1.ffn_norm", Force(numbers(0), numbers(1), 48)))
    refused_in_one_line(lambda: lm.logits(PROMPTS, steering=elsewhere), "is no router")
    refused_in_one_line(lambda: elsewhere.save(tmp_path / "no.safetensors"), "acts at a router")


@pytest.mark.parametrize(
    ("on", "off", "width", "says"),
    [
        (numbers(0, 0), numbers(), 4, "twice"),
        (numbers(0), numbers(0), 4, "twice"),
        (numbers(4), numbers(), 4, "outside 0 to 3"),
        (numbers(), numbers(-1), 4, "outside 0 to 3"),
        (torch.tensor([0.0]), numbers(), 4, "int64"),
        (numbers(0)[None], numbers(), 4, r"\[1, 1\]"),
        (numbers(0), numbers(), 0, "width"),
    ],
)
def test_check_refuses(on: Tensor, off: Tensor, width: int, says: str) -> None:
    refused_in_one_line(Force(on, off, width).check, says)


def test_the_file_and_the_words(tmp_path: Path) -> None:
    lm = lm_of("gpt_oss")
    steering = at_router(lm, Force(numbers(2), numbers(0, 3), 4))
    path = steering.save(tmp_path / "force.safetensors")
    again = tt.Steering.load(path)
    assert torch.equal(*(lm.logits(PROMPTS[:1], steering=one) for one in (steering, again)))
    (said,) = describe(again)["interventions"]
    assert (said["operator"], said["size"], said["on"], said["off"]) == ("Force", 3, [2], [0, 3])
    assert "Force (on [2], off [0, 3]) on 3 units of layers.2.router" in explain(again)[0]


# -- baking and budgets -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_what_bakes_at_a_router(name: str) -> None:
    lm = lm_of(name)
    scaled = at_router(lm, Scale(numbers(0, 2), torch.tensor([1.0, -2.0]), 4))
    attached = lm.logits(PROMPTS[:1], steering=scaled)
    assert relative(tt.bake(lm, scaled).logits(PROMPTS[:1]), attached) < 1e-4
    assert relative(attached, lm.logits(PROMPTS[:1])) > 1e-4
    added = at_router(lm, soft())
    if name == "gpt_oss":  # whose router has a bias
        attached = lm.logits(PROMPTS[:1], steering=added)
        assert relative(tt.bake(lm, added).logits(PROMPTS[:1]), attached) < 1e-4
    else:
        refused_in_one_line(lambda: tt.bake(lm, added), "takes no bias; attach")
    force = at_router(lm, Force(numbers(0), numbers(1), 4))
    refused_in_one_line(lambda: tt.bake(lm, force), "is not linear in the activation.*attach")


def test_a_budget_is_kept_at_a_router() -> None:
    lm = lm_of("qwen3_moe")
    steering = replace(at_router(lm, soft(3)), dial=tt.Dial("nats", 1.0, (-20.0, 20.0)))
    kl = 0.001  # before a token goes to other experts, where KL jumps
    found = tt.strength.budget(lm, steering, PROMPTS, kl=kl, chat=False)
    for prompt, each in zip(PROMPTS, found.per_prompt, strict=True):
        assert 0 < each.kl <= 1.02 * kl
        turned = lm.logits([prompt], steering=replace(steering, value=each.dial))[0]
        p, q = lm.logits([prompt])[0].double().log_softmax(-1), turned.double().log_softmax(-1)
        assert float((p.exp() * (p - q)).sum()) == pytest.approx(each.kl, rel=0.02, abs=1e-6)


def test_the_derivative_goes_through_the_router() -> None:
    lm = lm_of("qwen3_moe", torch.float64)
    steering, text = at_router(lm, soft(2)), token_ids(PROMPTS[0])
    turning = tt.strength.Turning(lm, steering, [text])

    def logits(dial: float) -> tuple[Tensor, Tensor]:
        ((_, value, slope),) = turning.derivative([0], [dial])
        return value.double(), slope.double()

    step = 3e-3  # the router itself computes in float32
    difference = (logits(0.3 + step)[0] - logits(0.3 - step)[0]) / (2 * step)
    assert relative(logits(0.3)[1], difference) < 2e-3
