"""The pass that reads effects: the same numbers however texts are batched, kept and run, and a
model that is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seeing
import trimtab as tt
from effects_by_hand import (
    PAIRS,
    all_sites,
    effects,
    fresh,
    known,
    means,
    scored_from,
)
from helpers import refused_in_one_line, relative, steer, steer_at, traces, without_bos
from stored_passes import contrast_of, watched
from tiny import tiny_model, tiny_tokenizer
from trimtab.fitting import Effect, Effects, Means, Samples, Want
from trimtab.fitting.activations import collect
from trimtab.reading import log_odds
from trimtab.steering import Scale

F32, BF16 = torch.float32, torch.bfloat16
MANY = contrast_of()


def same(one: dict[str, Tensor], two: dict[str, Tensor], share: float = 1e-5) -> None:
    assert set(one) == set(two)
    for site in one:
        assert relative(one[site], two[site]) <= share, site


@contextmanager
def batches_of(tokens: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tt.LanguageModel, "batch_tokens", tokens)
        yield


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe", "lfm2", "gpt2"])
def test_batches_padding_order_and_packing_make_no_difference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = known(name, F32)
    sites = all_sites(lm)
    with batches_of(100_000):
        whole = means(lm, MANY, sites)
    for tokens in (1, 150):
        with batches_of(tokens):
            same(means(lm, MANY, sites), whole)
    same(means(lm, tt.Contrast(MANY.pairs[::-1]), sites), whole)
    monkeypatch.setattr("trimtab.fitting.activations.packed", lambda lm, rows: False)
    same(means(lm, MANY, sites), whole)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe", "gpt2"])
def test_half_precision_ranks_the_units_alike(name: str, dtype: torch.dtype) -> None:
    found, exact = (
        means(fresh(name, each), MANY, ["layers.1.heads", "layers.0.ffn_in"])
        for each in (dtype, F32)
    )
    for site, mean in exact.items():
        both = torch.corrcoef(torch.stack([mean, found[site]]))[0, 1]
        assert both > (0.97 if dtype == BF16 else 0.999)
        top = [set(each[site].abs().topk(16).indices.tolist()) for each in (found, exact)]
        assert len(top[0] & top[1]) >= 12
        assert (found[site].sign() == mean.sign())[mean.abs().topk(16).indices].all()


def test_sums_are_in_float32_whatever_the_model_is() -> None:
    lm = known("llama", BF16)
    one = effects(lm, PAIRS[:1], ["layers.1.ffn_out"])["layers.1.ffn_out"].mean
    assert (one.float().to(BF16).double() != one).float().mean() > 0.9


def test_answers_of_one_token_chats_and_merged_tokens() -> None:
    lm = known("llama")
    chat = [{"role": "user", "content": "What is the best way?"}]
    merged = ("The answ", "er is yes", "ers")
    assert scored_from(*merged) < len(lm.encode(["The answ"])[0])
    site = "layers.1.attn_out"
    width = lm.anatomy.width(site)
    gain = torch.randn(width, generator=torch.Generator().manual_seed(0))
    for pair in [
        ("Is it?", " yes", " no"),
        (chat, "Read.", "Talk."),
        merged,
        ("Is it?", "", " no"),
    ]:
        contrast = tt.Contrast.from_pairs([pair])
        found = means(lm, contrast, [site])[site]
        steering = steer(lm, (site, Scale(torch.arange(width), gain, width)))
        up, down = (float(log_odds(lm, contrast, steering.at(at))) for at in (1e-3, -1e-3))
        told = float(gain.double() @ found)
        assert abs((up - down) / 2e-3 - told) < 2e-3 * float(found.abs().max())


def test_texts_with_images() -> None:
    lm = seeing.seeing()
    red, green = seeing.square("red"), seeing.square("green")
    contrast = tt.Contrast.from_pairs(
        [
            (seeing.about("What? ", red), "It is red", "It is"),
            (seeing.about(green, "What? "), "green", "It is red"),
            ("What is it? ", "It is good", "no"),
        ]
    )
    for site in ("layers.0.ffn_in", "layers.1.resid"):
        found, width = means(lm, contrast, [site])[site], lm.anatomy.width(site)
        gain = torch.randn(width, generator=torch.Generator().manual_seed(0))
        steering = steer(lm, (site, Scale(torch.arange(width), gain, width)))
        up, down = (float(log_odds(lm, contrast, steering.at(at)).mean()) for at in (2e-3, -2e-3))
        told = float(gain.double() @ found)
        assert (up - down) / 4e-3 == pytest.approx(told, rel=0.01)


def test_texts_without_a_token_to_score_are_refused() -> None:
    lm = tt.wrap(tiny_model("llama"), without_bos())
    short = tt.Contrast.from_texts(["I", "I do."], ["No."])
    refused_in_one_line(lambda: means(lm, short, ["layers.0.heads"]), "row 1.*no token to score")


# -- kept and resumed ------------------------------------------------------------------------------


def wants(lm: tt.LanguageModel) -> list[Want]:
    sites = ["layers.0.heads", "layers.1.ffn_in", "layers.2.resid"]
    found = [Want(site, Effect(), kind) for site in sites for kind in (Effects, Samples)]
    found += [Want(site, Effect(counted="first"), Effects) for site in sites]
    return [*found, *(Want(site, "last", Means) for site in sites)]


def numbers(statistic: Any) -> list[Tensor]:
    if isinstance(statistic, Samples):
        return list(statistic.texts())
    kept = (
        [statistic.sums, statistic.squares] if isinstance(statistic, Effects) else [statistic.sums]
    )
    return [torch.as_tensor(each) for sides in kept for each in sides]


def check_bits(one: Any, two: Any) -> None:
    for want in one:
        for a, b in zip(numbers(one[want]), numbers(two[want]), strict=True):
            assert torch.equal(a, b), want


class KilledError(Exception):
    pass


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_pass_that_was_killed_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    lm = known(name, F32)
    with batches_of(150):
        plain = collect(lm, MANY, wants(lm))
        passes = 0

        def kill(module: nn.Module, args: Any) -> None:
            nonlocal passes
            passes += 1
            if passes == 4:
                raise KilledError

        handle = lm.anatomy.blocks[1].register_forward_pre_hook(kill)
        with pytest.raises(KilledError):
            collect(lm, MANY, wants(lm), cache=tmp_path)
        handle.remove()
        with watched(lm) as run:
            check_bits(collect(lm, MANY, wants(lm), cache=tmp_path), plain)
        assert 0 < run.rows <= len(MANY) - 3
        with watched(lm) as run:
            check_bits(collect(lm, MANY, wants(lm), cache=tmp_path), plain)
        assert not run.modules


def test_what_another_pass_has_kept_is_taken(tmp_path: Path) -> None:
    lm = known("llama", F32)
    plain = collect(lm, MANY, wants(lm))
    collect(lm, MANY, [want for want in wants(lm) if want.token == "last"], cache=tmp_path)
    found = collect(lm, MANY, wants(lm), cache=tmp_path)
    check_bits(found, plain)
    only = [Want("layers.0.heads", Effect(), Effects)]
    with watched(lm) as run:
        collect(lm, MANY, only, cache=tmp_path)
    assert not run.modules
    for other in (Effect("prompt"), Effect(per_token=True), Effect(counted="rest")):
        with watched(lm) as run:
            collect(lm, MANY, [Want("layers.0.heads", other, Effects)], cache=tmp_path)
        assert run.rows == len(MANY)


def test_other_models_effects_are_not_taken(tmp_path: Path) -> None:
    sites = ["layers.0.heads"]
    for lm in (fresh("llama", F32), fresh("llama", BF16), fresh("llama", torch.float64)):
        plain = means(lm, MANY, sites)
        same(means(lm, MANY, sites, cache=tmp_path), plain, 0)
    lm = fresh("llama", F32)
    with torch.no_grad():
        lm.model.lm_head.weight[7] *= 1.5
    same(means(lm, MANY, sites, cache=tmp_path), means(lm, MANY, sites), 0)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3", "gpt_oss", "falcon_h1", "bloom"])
def test_blocks_that_run_again_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = known(name, F32)
    plain = means(lm, MANY, all_sites(lm))
    again = 0

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal again
        again += 1

    inner = next(
        m
        for m in lm.anatomy.blocks[1].modules()
        if isinstance(m, nn.Linear) or "Conv1D" in type(m).__name__
    )
    monkeypatch.setattr("trimtab.fitting.gradients.asks_for_memory", lambda *a: True)
    handle = inner.register_forward_pre_hook(count, with_kwargs=True)
    before = traces(lm.model)
    same(means(lm, PAIRS, ["layers.0.resid"]), means(lm, PAIRS, ["layers.0.resid"]), 0)
    again = 0
    with batches_of(100_000):
        found = means(lm, MANY, all_sites(lm))
    assert again == 2  # forward, and again on the way back
    assert traces(lm.model) == before
    handle.remove()
    same(found, plain)


# -- a model that others use -----------------------------------------------------------------------


def test_weights_keep_their_gradients_and_learn_as_before() -> None:
    lm = fresh("llama", F32)
    weights = list(lm.model.parameters())
    weights[2].requires_grad_(False)
    weights[3].grad = torch.ones_like(weights[3])
    learning = [weight.requires_grad for weight in weights]
    before = traces(lm.model)
    with batches_of(150):
        plain = means(lm, MANY, all_sites(lm))
    assert [weight.requires_grad for weight in weights] == learning
    assert [weight.grad is None for weight in weights] == [i != 3 for i in range(len(weights))]
    assert bool((weights[3].grad == 1).all())
    assert traces(lm.model) == before
    lm.model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        means(lm, MANY, ["layers.0.heads"])
    assert [weight.requires_grad for weight in weights] == learning
    lm.model.requires_grad_(False)
    lm.model.model.layers[1].mlp.down_proj._forward_hooks.clear()
    with batches_of(150):
        same(means(lm, MANY, all_sites(lm)), plain, 0)


def test_inside_of_inference_mode_and_without_gradients() -> None:
    lm = known("llama", F32)
    plain = means(lm, MANY, all_sites(lm))
    with torch.inference_mode():
        same(means(lm, MANY, all_sites(lm)), plain, 0)
        made_there = fresh("llama", F32)
    with torch.no_grad():
        same(means(lm, MANY, all_sites(lm)), plain, 0)
    refused_in_one_line(lambda: means(made_there, MANY, all_sites(lm)), "inference_mode")


def test_gradients_of_others_are_left_alone() -> None:
    """Embeddings that are told to require gradients, as for training adapters, and a vector that
    somebody trains by a hook of his own."""
    lm = fresh("llama", F32)
    plain = means(lm, MANY, all_sites(lm))
    lm.model.enable_input_require_grads()
    same(means(lm, MANY, all_sites(lm)), plain, 0)
    lm.model.disable_input_require_grads()
    trained = torch.zeros(48, requires_grad=True)
    lm.model.model.layers[1].register_forward_hook(lambda module, args, output: output + trained)
    same(means(lm, MANY, all_sites(lm)), plain, 1e-6)
    assert trained.grad is None


def test_what_is_overwritten_later_is_seen_as_it_was() -> None:
    lm = fresh("llama", F32)
    site = "layers.0.ffn_out"
    plain = means(lm, MANY, [site, "layers.1.ffn_out"])

    def overwrite(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.mul_(1.0).add_(0.0)

    for layer in (0, 1):
        lm.model.model.layers[layer].mlp.register_forward_hook(overwrite)
    same(means(lm, MANY, [site, "layers.1.ffn_out"]), plain, 0)


def test_adapters_that_act() -> None:
    peft = pytest.importorskip("peft")
    model: Any = tiny_model("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], r=4, lora_alpha=16)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    lm = tt.wrap(model.eval(), tiny_tokenizer(), "adapted")
    learning = [weight.requires_grad for weight in model.parameters()]
    found = means(lm, MANY, all_sites(lm))
    assert [weight.requires_grad for weight in model.parameters()] == learning
    assert all(weight.grad is None for weight in model.parameters())
    merged = tt.wrap(model.merge_and_unload(), tiny_tokenizer(), "merged")
    same(found, means(merged, MANY, all_sites(merged)), 1e-3)


def test_compiled_code() -> None:
    lm = fresh("llama", F32)
    plain = means(lm, PAIRS, all_sites(lm))
    torch._dynamo.reset()
    for layer in lm.model.model.layers:
        layer.compile(backend="eager")
    ids = torch.tensor([[1, 50, 60]])
    lm.model(ids)
    same(means(lm, PAIRS, all_sites(lm)), plain, 1e-6)
    torch._dynamo.reset()


def test_dropout_is_refused() -> None:
    model = tiny_model("llama", attention_dropout=0.1)
    lm = tt.wrap(model, tiny_tokenizer())
    model.train()
    refused_in_one_line(lambda: means(lm, PAIRS, ["layers.0.heads"]), "training mode")


def test_threads_take_turns() -> None:
    lm = fresh("llama", F32)
    sites = all_sites(lm)
    plain = means(lm, MANY, sites)
    with batches_of(150), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: means(lm, MANY, sites), range(4)))
    for each in found:
        same(each, plain)
    assert all(weight.requires_grad for weight in lm.model.parameters())


@pytest.mark.parametrize("kind", ["heads", "resid"])
def test_of_a_steered_model_it_is_the_steered_models(kind: str) -> None:
    lm = known("llama", torch.float64)
    contrast, site = tt.Contrast.from_pairs(PAIRS), f"layers.1.{kind}"
    width = lm.anatomy.width(site)
    steering = steer_at(lm, kind)
    gain = torch.randn(width, generator=torch.Generator().manual_seed(0))
    scaling = steer(lm, (site, Scale(torch.arange(width), gain, width)))
    with lm.steered(steering):
        found = means(lm, contrast, [site])[site]
        lm.generate(["Today"], max_new_tokens=2)
        again = means(lm, contrast, [site])[site]
    both = [
        float(log_odds(lm, contrast, [[steering, scaling.at(at)]] * 2).mean())
        for at in (2e-3, -2e-3)
    ]
    assert (both[0] - both[1]) / 4e-3 == pytest.approx(float(gain.double() @ found), rel=1e-3)
    assert torch.equal(again, found)
    assert relative(means(lm, contrast, [site])[site], found) > 0.01


# -- graphs that are broken ------------------------------------------------------------------------


def detached(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0].detach(), *output[1:])
    return output.detach()


@pytest.mark.parametrize(
    "broken", ["self_attn", "self_attn.v_proj", "self_attn.q_proj", "mlp", "mlp.gate_proj"]
)
def test_a_graph_that_is_broken_somewhere_is_refused(broken: str) -> None:
    lm = fresh("llama", F32)
    for kind in ("heads", "ffn_in", "resid"):
        site = f"layers.0.{kind}"
        lm.model.model.layers[1].get_submodule(broken).register_forward_hook(detached)
        refused_in_one_line(
            lambda site=site: means(lm, PAIRS, [site]),
            "effects cannot be read off the backward|no gradient arrives",
        )


@pytest.mark.parametrize("broken", ["self_attn", "mlp.gate_proj"])
def test_a_graph_that_is_broken_in_every_block_is_refused_in_half_precision(broken: str) -> None:
    lm = fresh("llama", BF16)
    for layer in lm.model.model.layers[1:]:
        layer.get_submodule(broken).register_forward_hook(detached)
    refused_in_one_line(
        lambda: means(lm, PAIRS, ["layers.0.resid"]), "effects cannot be read off the backward"
    )


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("this kernel has no backward pass")


def test_a_kernel_that_cannot_go_back_is_refused() -> None:
    lm = fresh("llama", F32)
    block = lm.model.model.layers[1]
    block.mlp.register_forward_hook(lambda module, args, output: _NoBackward.apply(output))
    refused_in_one_line(lambda: means(lm, PAIRS, ["layers.0.heads"]), "no backward pass")


def test_activations_that_are_rounded_are_refused() -> None:
    lm = fresh("llama", F32)
    for layer in lm.model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: ((args[0] * 4).round() / 4,)
        )
    refused_in_one_line(lambda: means(lm, PAIRS, ["layers.0.ffn_in"]), "no gradient|cannot be read")


def test_the_question_is_asked_once_and_short() -> None:
    lm = fresh("llama", F32)
    lm.anatomy.blocks[0].register_forward_hook(lambda *args: None)  # so that it is asked anew
    runs: list[int] = []
    body = lm.anatomy.body
    body.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    means(lm, PAIRS, ["layers.0.heads"])
    first, runs[:] = len(runs), []
    means(lm, PAIRS, ["layers.0.heads", "layers.2.heads"])
    assert len(runs) == 1
    assert first <= 1 + 2 + 6  # its own, what it takes to differentiate, and whether it packs


class _Interrupts:
    """Stands for Ctrl-C on the way back."""

    name = "interrupts"

    def __call__(self, activation: Tensor, gradient: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_an_interrupt_on_the_way_back_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    lm = fresh("llama", F32)
    plain = means(lm, PAIRS, ["layers.0.heads"])
    before = traces(lm.model)
    want = Want("layers.1.heads", Effect(), Effects, _Interrupts())
    with pytest.raises(KeyboardInterrupt):
        collect(lm, MANY, [want], cache=tmp_path)
    assert traces(lm.model) == before
    assert all(weight.requires_grad and weight.grad is None for weight in lm.model.parameters())
    same(means(lm, PAIRS, ["layers.0.heads"]), plain, 0)
