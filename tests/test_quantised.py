"""Models whose linear maps are stored in fewer bits, each by the package that does it.

A test is skipped where the package is not installed. Some of them are no part of any extra:

    pip install bitsandbytes compressed-tensors loguru torchao optimum-quanto hqq gptqmodel optimum
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import trimtab as tt
from effects_by_hand import means
from helpers import (
    IDS,
    PROMPTS,
    by_hand,
    plain_logits,
    raw_greedy,
    refused_in_one_line,
    relative,
    steer,
    steer_at,
)
from tiny import tiny_model, tiny_tokenizer
from trimtab.anatomy import KINDS
from trimtab.anatomy.hooks import hooked
from trimtab.reading import log_odds
from trimtab.steering import Scale

#: Sizes that every package takes: multiples of the groups that share a scale.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def whole(folder: Path, name: str = "llama") -> Path:
    """A tiny model's directory."""
    place = folder / name
    if not place.exists():
        tiny_model(name, **SIZES).save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
    return place


def opened(place: Path, **options: Any) -> tt.LanguageModel:
    lm = tt.load(place, device="cpu", **options)
    lm.model.generation_config.eos_token_id = None
    return lm


# -- one model by each package ---------------------------------------------------------------------


def bitsandbytes(folder: Path, bits: str, name: str) -> tt.LanguageModel:
    pytest.importorskip("bitsandbytes")
    return opened(whole(folder, name), quantise=bits)


def torchao(folder: Path, kind: str) -> tt.LanguageModel:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(getattr(quantization, kind)())
    return opened(whole(folder), quantization_config=config)


def quanto(folder: Path, bits: str) -> tt.LanguageModel:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return opened(whole(folder), quantization_config=QuantoConfig(weights=bits))


def hqq(folder: Path) -> tt.LanguageModel:
    """By hqq itself: transformers 5 does not load such models."""
    core = pytest.importorskip("hqq.core.quantize")
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoModelForCausalLM.from_pretrained(whole(folder))
    config = core.BaseQuantizeConfig(nbits=4, group_size=64)
    options = {"quant_config": config, "compute_dtype": torch.float32, "device": "cpu"}
    AutoHQQHFModel.quantize_model(model, **options)
    lm = tt.wrap(model, tiny_tokenizer(), "hqq")
    lm.model.generation_config.eos_token_id = None
    return lm


def compressed(folder: Path, scheme: str) -> tt.LanguageModel:
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("loguru")
    from compressed_tensors import quantization as q
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model: Any = AutoModelForCausalLM.from_pretrained(whole(folder))
    groups = {"group_0": q.preset_name_to_scheme(scheme, ["Linear"])}
    config = q.QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    q.apply_quantization_config(model, config)
    for module in model.modules():
        if not hasattr(module, "weight_scale"):
            continue
        how, weight, shared = module.quantization_scheme.weights, module.weight.detach(), None
        parts = weight.unflatten(1, (-1, how.group_size or weight.shape[1]))
        if hasattr(module, "weight_global_scale"):
            shared = generate_gparam(weight.min(), weight.max())
            module.weight_global_scale.data.copy_(shared)
        scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), how, global_scale=shared)
        module.weight_scale.data.copy_(scale)
        module.quantization_status = q.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    place = folder / "compressed"
    model.save_pretrained(place)
    compressor.update_config(str(place))
    tiny_tokenizer().save_pretrained(place)
    return opened(place)


def grouped(folder: Path, method: str) -> tt.LanguageModel:
    """GPTQ's and AWQ's files: 4 bits, in groups of 32 inputs that share a scale."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    place = whole(folder)
    tensors = load_file(place / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        base, weight = name.removesuffix(".weight"), tensors.pop(name).T
        groups = weight.unflatten(0, (-1, 32))
        scales = groups.abs().amax(1) / 7
        whole_numbers = ((groups / scales[:, None]).round().clamp(-8, 7) + 8).flatten(0, 1).long()
        if method == "gptq":
            tensors[f"{base}.qweight"] = eight_in_one(whole_numbers.T, range(8)).T.contiguous()
            tensors[f"{base}.qzeros"] = eight_in_one(torch.full(scales.shape, 7), range(8))
            tensors[f"{base}.g_idx"] = torch.arange(len(weight), dtype=torch.int32) // 32
            tensors[f"{base}.scales"] = scales
        else:
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            tensors[f"{base}.qweight"] = eight_in_one(whole_numbers, order)
            tensors[f"{base}.qzeros"] = eight_in_one(torch.full(scales.shape, 8), order)
            tensors[f"{base}.scales"] = scales.half()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    own = {"gptq": {"desc_act": False, "sym": True}, "awq": {"zero_point": True, "version": "gemm"}}
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    config["quantization_config"] |= own[method]
    (place / "config.json").write_text(json.dumps(config))
    return opened(place)


def eight_in_one(numbers: Tensor, order: Any) -> Tensor:
    """Eight numbers of four bits in an int32, along the last dimension."""
    parts = numbers.unflatten(-1, (-1, 8)).long()
    packed = sum(parts[..., each] << (4 * place) for place, each in enumerate(order))
    assert isinstance(packed, Tensor)
    return torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32).contiguous()


MODELS: dict[str, Callable[[Path], tt.LanguageModel]] = {
    "bitsandbytes 4bit": partial(bitsandbytes, bits="4bit", name="llama"),
    "bitsandbytes 8bit": partial(bitsandbytes, bits="8bit", name="llama"),
    "bitsandbytes 4bit, fused projections": partial(bitsandbytes, bits="4bit", name="phi3"),
    "torchao int8": partial(torchao, kind="Int8WeightOnlyConfig"),
    "torchao float8": partial(torchao, kind="Float8WeightOnlyConfig"),
    "torchao int8, inputs too": partial(torchao, kind="Int8DynamicActivationInt8WeightConfig"),
    "quanto int8": partial(quanto, bits="int8"),
    "hqq": hqq,
    "compressed-tensors W4A16": partial(compressed, scheme="W4A16"),
    "compressed-tensors W8A8": partial(compressed, scheme="W8A8"),
    "compressed-tensors FP8": partial(compressed, scheme="FP8_DYNAMIC"),
    "compressed-tensors NVFP4": partial(compressed, scheme="NVFP4A16"),
    "GPTQ": partial(grouped, method="gptq"),
    "AWQ": partial(grouped, method="awq"),
}
#: Whose files transformers cannot write, or writes as those of another model.
NOT_WRITTEN = ("hqq", "quanto int8", "GPTQ")
#: Which round their inputs, too: what differs by a rounding may be rounded to the next number.
ROUND_INPUTS = (
    "bitsandbytes 8bit",
    "torchao int8, inputs too",
    "compressed-tensors W8A8",
    "compressed-tensors FP8",
)


@pytest.fixture(scope="module", params=MODELS)
def small(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, tt.LanguageModel]:
    return request.param, MODELS[request.param](tmp_path_factory.mktemp("models"))


# -- by plain hooks --------------------------------------------------------------------------------

#: Where each kind of site is, by the names of Llama's modules in a block.
PLACES = {
    "attn_norm_in": ("input_layernorm", "input"),
    "attn_norm": ("input_layernorm", "output"),
    "heads": ("self_attn.o_proj", "input"),
    "attn_out": ("self_attn.o_proj", "output"),
    "ffn_norm_in": ("post_attention_layernorm", "input"),
    "ffn_norm": ("post_attention_layernorm", "output"),
    "ffn_in": ("mlp.down_proj", "input"),
    "ffn_out": ("mlp", "output"),
    "resid": ("", "output"),
}


@contextmanager
def by_plain_hook(model: Any, site: str, change: Callable[[Tensor], Tensor | None]) -> Any:
    """`change` at a site, its result in the activation's place."""
    body = model.model
    if site == "embed":
        module, side = body.layers[0], "input"
    elif site == "final_norm":
        module, side = body.norm, "output"
    else:
        _, layer, kind = site.split(".")
        name, side = PLACES[kind]
        module = body.layers[int(layer)].get_submodule(name)

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        new = change(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    if side == "output":
        handle = module.register_forward_hook(lambda module, args, output: change(output))
    else:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def greedy(model: Any, ids: list[int], new: int) -> list[int]:
    """A plain loop without a KV cache."""
    text = list(ids)
    with torch.no_grad():
        for _ in range(new):
            logits = model(torch.tensor([text]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
    return text[len(ids) :]


# -- what holds for all of them --------------------------------------------------------------------


def test_every_site_is_what_plain_hooks_see(small: tuple[str, tt.LanguageModel]) -> None:
    _, lm = small
    kinds = [kind for kind in KINDS if lm.anatomy.has(kind)]
    for site in (site for kind in kinds for site in lm.anatomy.sites(kind)):
        found: list[Tensor] = []
        expected: list[Tensor] = []
        with by_plain_hook(lm.model, site, lambda x: expected.append(x.clone())):
            logits = plain_logits(lm.model, IDS)
        with hooked(lm.anatomy.body, {lm.anatomy.point(site): lambda x: found.append(x.clone())}):
            read = plain_logits(lm.model, IDS)
        assert torch.equal(read, logits)
        assert torch.equal(found[0], expected[0])
        assert found[0].shape[-1] == lm.anatomy.width(site)


@pytest.mark.parametrize("kind", ["resid", "heads", "ffn_in", "ffn_out"])
@pytest.mark.parametrize("op", ["Add", "Scale"])
def test_steering_is_a_plain_hook(small: tuple[str, tt.LanguageModel], kind: str, op: str) -> None:
    name, lm = small
    steering = steer_at(lm, kind, op)
    part = steering.interventions[0]
    with by_plain_hook(lm.model, part.site, by_hand(part.operator)):
        expected = plain_logits(lm.model, IDS)
        written = greedy(lm.model, IDS, 4), raw_greedy(lm, PROMPTS, 4)
    assert relative(expected, plain_logits(lm.model, IDS)) > 1e-3
    with lm.steered(steering):
        near = 0.02 if name in ROUND_INPUTS else 1e-5
        assert relative(plain_logits(lm.model, IDS), expected) < near
        assert (greedy(lm.model, IDS, 4), raw_greedy(lm, PROMPTS, 4)) == written


def test_what_is_not_exact_is_refused(small: tuple[str, tt.LanguageModel]) -> None:
    _, lm = small
    assert lm.quantised
    refused_in_one_line(lambda: tt.bake(lm, steer_at(lm, "ffn_out")), "is quantised: baking would")


def test_its_identity_stands(small: tuple[str, tt.LanguageModel]) -> None:
    """Running a model does not make another one of it."""
    _, lm = small
    before = lm.identity
    lm.logits(PROMPTS, steering=steer_at(lm, "ffn_out"))
    assert lm.identity == before


def test_the_steering_of_the_whole_model_fits(
    small: tuple[str, tt.LanguageModel], tmp_path: Path
) -> None:
    name, lm = small
    kind = "phi3" if "fused" in name else "llama"
    original = tt.wrap(tiny_model(kind, **SIZES), tiny_tokenizer(), kind)
    steering = steer_at(original, "ffn_out")
    assert relative(lm.logits(PROMPTS, steering=steering), lm.logits(PROMPTS)) > 1e-3
    stranger = tt.wrap(tiny_model(kind, seed=1, **SIZES), tiny_tokenizer(), kind)
    other = steer_at(stranger, "ffn_out")
    refused_in_one_line(lambda: lm.logits(PROMPTS, steering=other), "fit one for this model")


def test_what_is_saved_is_loaded(small: tuple[str, tt.LanguageModel], tmp_path: Path) -> None:
    name, lm = small
    if name in NOT_WRITTEN:
        refused_in_one_line(lambda: lm.save_pretrained(tmp_path / "saved"), "quanti[sz]ed")
        assert not list(tmp_path.iterdir())
        return
    expected = plain_logits(lm.model, IDS)
    again = tt.load(lm.save_pretrained(tmp_path / "saved"), device="cpu")
    assert again.quantised
    assert relative(plain_logits(again.model, IDS), expected) < 1e-5
    assert torch.equal(plain_logits(lm.model, IDS), expected)


def test_effects_are_slopes_or_refused(small: tuple[str, tt.LanguageModel]) -> None:
    """Those that round their inputs have a gradient of a part of what they compute at most."""
    name, lm = small
    pairs = [(PROMPTS[0], " I do.", " No."), (PROMPTS[1], " yes", " no it is not")]
    for kind in ("heads", "ffn_in", "resid"):
        if not lm.anatomy.has(kind):
            continue
        sites = lm.anatomy.sites(kind)
        if name in ROUND_INPUTS[1:]:
            refused_in_one_line(lambda sites=sites: means(lm, pairs, sites), "backward|gradient")
            continue
        found = means(lm, pairs, sites)
        gains = {
            site: torch.randn(len(mean), generator=torch.Generator().manual_seed(0))
            for site, mean in found.items()
        }
        scales = [(site, Scale(torch.arange(len(g)), g, len(g))) for site, g in gains.items()]
        if name in ROUND_INPUTS:  # one step is all noise, so that many were asked
            continue
        steering, contrast = steer(lm, *scales), tt.Contrast.from_pairs(pairs)
        up, down = (log_odds(lm, contrast, steering.at(at)).mean() for at in (1e-3, -1e-3))
        told = sum(float(gains[site].double() @ found[site]) for site in sites)
        typical = sum(float(mean.square().sum()) for mean in found.values()) ** 0.5
        assert abs(float(up - down) / 2e-3 - told) < 0.02 * typical
