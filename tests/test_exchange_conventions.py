"""Which layer a tool means, and with what scale and sign: against the tools themselves, against
files and logits that they made, and against their loops written out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from exchanged import FOREIGN, TEXT, added_by_hand, hooks, imported, logits, vector, what
from helpers import add, language_model, refused_in_one_line, steer, token_ids
from tiny import TINY, tiny_tokenizer
from trimtab.exchange.modules import module_names, sites_by_module
from trimtab.steering.operators import Clamp

hf_steered = pytest.importorskip("lm_eval.models.hf_steered")


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def equal(actual: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- llama.cpp and repeng -------------------------------------------------------------------------


def _as_llama_cpp_adds(lm: tt.LanguageModel, path: Path) -> Tensor:
    """common_control_vector_load_one and llama_adapter_cvec::apply, line by line."""
    data: list[float] = []
    units = -1
    for tensor in gguf.GGUFReader(path).tensors:
        begin, _, number = tensor.name.partition(".")
        layer = int(number) if begin == "direction" else -1
        assert layer > 0, "the file is refused"
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        assert units in (-1, tensor.n_elements)
        units = int(tensor.n_elements)
        data += [0.0] * max(0, units * layer - len(data))
        for j, value in enumerate(np.asarray(tensor.data)):
            data[units * (layer - 1) + j] += float(value)
    of_layer: dict[int, Tensor] = {}
    for il in range(1, lm.anatomy.layers):
        offset = units * (il - 1)
        if offset + units <= len(data):
            of_layer[il] = torch.tensor(data[offset : offset + units])
    return added_by_hand(lm, of_layer)  # build_cvec: added to what block il puts out


def test_llama_cpp(lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering = steer(lm, ("layers.1.resid", add(48, 1)), ("layers.2.resid", add(48, 2))).at(1.5)
    path = tmp_path / "x.gguf"
    tt.export(lm, steering, "gguf", path)
    equal(_as_llama_cpp_adds(lm, path), logits(lm, steering))
    equal(logits(lm, imported(path, lm)), logits(lm, steering))
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert names == {"direction.1", "direction.2"}
    reader = gguf.GGUFReader(path)
    said = {key: reader.fields[key].contents() for key in reader.fields if "GGUF" not in key}
    assert said == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }


def _control_vector(path: Path, tensors: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_llama_cpp_refuses(lm: tt.LanguageModel, tmp_path: Path) -> None:
    path = _control_vector(tmp_path / "zero.gguf", {"direction.0": vector(0)})
    assert imported(path, lm).hyperparameters["format"] == "repeng"  # which knows block 0
    refused_in_one_line(lambda: imported(path, lm, format="gguf"), "direction.0")
    for name in ("direction.x", "direction.1.a", "direction.-1", "directions.1"):
        path = _control_vector(tmp_path / "x.gguf", {"direction.1": vector(1), name: vector(1)})
        refused_in_one_line(lambda path=path: imported(path, lm), "no tensor")
    path = _control_vector(tmp_path / "x.gguf", {"direction.3": vector(1)})
    refused_in_one_line(lambda: imported(path, lm), "0 to 2")


def test_repeng(lm: tt.LanguageModel, tmp_path: Path) -> None:
    back = imported(FOREIGN / "repeng.gguf", lm)
    assert back.hyperparameters["format"] == "repeng"
    equal(logits(lm, back), added_by_hand(lm, {0: vector(0), 1: vector(1)}))
    tt.export(lm, back, "repeng", tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == (FOREIGN / "repeng.gguf").read_bytes()


# -- what the tools themselves gave ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "sites"),
    [
        ("repeng.gguf", ["layers.0.resid", "layers.1.resid"]),
        ("steering-vectors.pt", ["layers.0.resid", "layers.1.resid"]),
        ("steering-vectors-mlp.pt", ["layers.0.ffn_out", "layers.1.ffn_out"]),
        ("steering-lite.safetensors", ["layers.0.resid", "layers.1.resid"]),
        ("steering-lite-ablation.safetensors", ["layers.1.resid"]),
        # Directions 1 and 2, which are added to what layers 1 and 2 take in.
        ("activation-steering.svec", ["layers.0.resid", "layers.1.resid"]),
    ],
)
def test_the_tools_logits(file: str, sites: list[str], lm: tt.LanguageModel) -> None:
    back = imported(FOREIGN / file, lm, site="resid" if file.endswith("svec") else ())
    assert [each.site for each in back.interventions] == sites
    recorded = load_file(FOREIGN / "logits.safetensors")[Path(file).stem]
    equal(logits(lm, back)[0, :, ::5], recorded, 1e-5)
    assert not torch.allclose(logits(lm)[0, :, ::5], recorded, atol=0.1)


def test_an_object_is_not_loaded(lm: tt.LanguageModel) -> None:
    path = FOREIGN / "steering-vectors-object.pt"
    refused_in_one_line(lambda: imported(path, lm), r"steering_vector.*torch.save\(vars")


def test_a_svec_file_is_chosen_from(lm: tt.LanguageModel) -> None:
    path = FOREIGN / "activation-steering.svec"
    refused_in_one_line(lambda: imported(path, lm), "--site")
    back = imported(path, lm, site="layers.1.resid")
    equal(what(back)["layers.1.resid"], vector(2))
    refused_in_one_line(lambda: imported(path, lm, site="layers.2.resid"), "nothing for")


def test_vllm_lens(lm: tt.LanguageModel, tmp_path: Path) -> None:
    # As its _apply_steering: target + vec * scale, vec in the activation's dtype.
    tt.export(
        lm,
        steer(lm, ("layers.0.resid", add(48, 0)), ("layers.2.resid", add(48, 2))).at(1.5),
        "vllm-lens",
        tmp_path / "x.json",
    )
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["layer_indices"] == [0, 2]
    assert written["scale"] == 1.5
    back = imported(tmp_path / "x.json", lm)
    expected = added_by_hand(lm, {0: vector(0) * 1.5, 2: vector(2) * 1.5})
    equal(logits(lm, back), expected)


def test_vllm_lens_compresses(lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = FOREIGN / "vllm-lens.json"
    refused_in_one_line(
        lambda: imported(path, lm), r"need the extra zstd: pip install 'trimtab\[zstd\]'"
    )
    monkeypatch.undo()
    expected = added_by_hand(lm, {0: vector(0) * 1.5, 2: vector(2) * 1.5})
    read = imported(FOREIGN / "vllm-lens.json", lm)
    equal(logits(lm, read), expected)
    half = imported(FOREIGN / "vllm-lens-bfloat16.json", lm)
    assert half.setting == 2
    equal(what(half)["layers.1.resid"], 2 * vector(1).bfloat16().float())


def test_what_vllm_lens_scales_by_tokens(lm: tt.LanguageModel, tmp_path: Path) -> None:
    tt.export(lm, steer(lm, ("layers.1.resid", add(48, 1))), "vllm-lens", tmp_path / "x.json")
    good = json.loads((tmp_path / "x.json").read_text())
    for change in ({"norm_match": True}, {"position_indices": [1]}):
        (tmp_path / "y.json").write_text(json.dumps([{**good, **change}]))
        refused_in_one_line(lambda: imported(tmp_path / "y.json", lm), "norm_match")


# -- lm-eval --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(lm: tt.LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as the harness opens it."""
    directory = tmp_path_factory.mktemp("model")
    lm.model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def _by_the_harness(saved: Path, file: Path) -> Tensor:
    model = hf_steered.SteeredModel(
        pretrained=str(saved), steer_path=str(file), device="cpu", dtype="float32"
    )
    return model._model_call(torch.tensor([token_ids(TEXT)]))


def test_lm_eval_adds_what_we_write(lm: tt.LanguageModel, saved: Path, tmp_path: Path) -> None:
    sites = ("layers.0.resid", "layers.1.ffn_out", "layers.2.attn_out", "layers.1.ffn_norm")
    one = steer(lm, *((site, add(48, n)) for n, site in enumerate(sites))).at(1.5)
    two = steer(lm, ("layers.2.resid", add(48, 7)), ("final_norm", add(48, 8))).at(-0.5)
    tt.export(lm, one + two, "lm-eval", tmp_path / "x.pt")
    equal(_by_the_harness(saved, tmp_path / "x.pt"), logits(lm, one + two), 1e-5)
    back = imported(tmp_path / "x.pt", lm)
    assert back.setting == 1  # several coefficients are weights
    equal(logits(lm, back), logits(lm, one + two), 1e-5)


@pytest.mark.parametrize("bias", [None, vector(5)])
def test_lm_eval_clamps(
    bias: Tensor | None, lm: tt.LanguageModel, saved: Path, tmp_path: Path
) -> None:
    content = {
        "layers.1": {
            "steering_vector": 3 * vector(1),
            "steering_coefficient": 2.5,
            "action": "clamp",
            "bias": bias,
        },
        "layers.0.mlp.down_proj": {"steering_vector": vector(2), "action": "add"},
    }
    torch.save(content, tmp_path / "x.pt")
    back = imported(tmp_path / "x.pt", lm)
    assert [each.site for each in back.interventions] == ["layers.1.resid", "layers.0.ffn_out"]
    assert isinstance(back.interventions[0].operator, Clamp)
    assert back.dial == tt.Dial("amount", 1.0, (0.0, 1.0))
    equal(logits(lm, back), _by_the_harness(saved, tmp_path / "x.pt"), 1e-5)


@pytest.mark.parametrize("name", TINY)
def test_lm_eval_finds_every_module(name: str) -> None:
    """Each site that has a module's name: the harness's own hooks there do what we do."""
    lm = language_model(name)
    names = module_names(lm, lm.model.base_model)
    assert len(names) >= 3 * lm.anatomy.layers
    assert sites_by_module(lm, lm.model.base_model).items() >= {(n, s) for s, n in names.items()}
    for site, module in names.items():
        direction = vector(1, lm.anatomy.width(site))
        steering = steer(lm, (site, add(lm.anatomy.width(site), 1)))
        acts = partial(hf_steered.SteeredModel.add, vector=direction, head_index=None)
        with hf_steered.steer(lm.model, {module: acts}):
            expected = logits(lm)
        equal(logits(lm, steering), expected, 1e-5)


def test_what_lm_eval_has_and_sites_have_not(lm: tt.LanguageModel, tmp_path: Path) -> None:
    good = {"steering_vector": vector(1), "action": "add", "steering_coefficient": 1.0}
    bad: dict[str, dict[Any, Any]] = {
        "no module": {"layers.9": good},
        "no module of": {"lm_head": good},
        "one head": {"layers.1": {**good, "head_index": 2}},
        "not add or clamp": {"layers.1": {**good, "action": "multiply"}},
        "refuses": {"layers.1": {**good, "bias": vector(2)}},
        "not known": {"layers.1": {**good, "sae": 1}},
        "zeros": {"layers.1": {**good, "action": "clamp", "steering_vector": torch.zeros(48)}},
        "another hook point": {"layers.1.mlp": good, "layers.1.mlp.down_proj": good},
        "not a number": {"layers.1": {**good, "steering_coefficient": "2"}},
    }
    for says, content in bad.items():
        torch.save(content, tmp_path / "x.pt")
        refused_in_one_line(lambda: imported(tmp_path / "x.pt", lm), says)
    head = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index"
    (tmp_path / "x.csv").write_text(f"{head}\nsparsify,add,some/model,layers.3,30,10.0,\n")
    refused_in_one_line(lambda: imported(tmp_path / "x.csv", lm), "derive_steer_config")


# -- persona vectors ------------------------------------------------------------------------------


def _as_persona_vectors_add(lm: tt.LanguageModel, path: Path, layer: int) -> Tensor:
    """eval_persona.py: torch.load(path)[layer], and ActivationSteerer(layer_idx=layer-1)."""
    return added_by_hand(lm, {layer - 1: torch.load(path, weights_only=True)[layer]})


def test_persona_vectors(lm: tt.LanguageModel, tmp_path: Path) -> None:
    rows = torch.stack([vector(n) for n in range(4)])
    torch.save(rows, tmp_path / "evil_response_avg_diff.pt")
    path = tmp_path / "evil_response_avg_diff.pt"
    refused_in_one_line(lambda: imported(path, lm), "--site")
    for layer in (1, 2, 3):
        back = imported(path, lm, site=f"layers.{layer - 1}.resid")
        assert back.hyperparameters["format"] == "persona-vectors"
        equal(logits(lm, back), _as_persona_vectors_add(lm, path, layer))
    refused_in_one_line(lambda: imported(path, lm, site="embed"), "nothing for embed")
    steering = steer(lm, ("layers.1.resid", add(48, 1))).at(2)
    done = tt.export(lm, steering, "persona-vectors", tmp_path / "out.pt")
    assert done.details == {"rows": [2]}
    equal(_as_persona_vectors_add(lm, tmp_path / "out.pt", 2), logits(lm, steering))


# -- TransformerLens and Neuronpedia --------------------------------------------------------------

#: Hook names, and what they are in Llama and in Gemma 2, whose branches have norms behind them.
HOOKS = {
    "blocks.0.hook_resid_pre": ("embed", "embed"),
    "blocks.2.hook_resid_pre": ("layers.1.resid", "layers.1.resid"),
    "blocks.2.hook_resid_mid": ("layers.2.attn_out", "layers.2.attn_post_norm"),
    "blocks.2.hook_resid_post": ("layers.2.resid", "layers.2.resid"),
    "blocks.1.hook_attn_out": ("layers.1.attn_out", "layers.1.attn_post_norm"),
    "blocks.1.hook_mlp_out": ("layers.1.ffn_out", "layers.1.ffn_post_norm"),
}


def _stream_by_hand(lm: tt.LanguageModel, hook: str) -> Tensor:
    """The vector added to the stream where TransformerLens has the hook: to a block's input, to
    its output, or to what a branch adds."""
    _, number, name = hook.split(".")
    block = lm.anatomy.blocks[int(number)]
    if name == "hook_resid_pre":
        handle = block.register_forward_pre_hook(
            lambda module, given: (given[0] + vector(1), *given[1:])
        )
        found = logits(lm)
        handle.remove()
        return found
    gemma = hasattr(block, "post_feedforward_layernorm")
    module = {
        "hook_resid_mid": block.post_attention_layernorm if gemma else block.self_attn,
        "hook_attn_out": block.post_attention_layernorm if gemma else block.self_attn,
        "hook_mlp_out": block.post_feedforward_layernorm if gemma else block.mlp,
        "hook_resid_post": block,
    }[name]
    with hooks({module: lambda x: x + vector(1)}):
        return logits(lm)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_transformer_lens(hook: str, name: str, tmp_path: Path) -> None:
    lm = language_model(name)
    site = HOOKS[hook][name == "gemma2"]
    save_file({hook: vector(1)}, tmp_path / "x.safetensors")
    torch.save({hook: vector(1)}, tmp_path / "x.pt")
    for file in ("x.safetensors", "x.pt"):
        back = imported(tmp_path / file, lm)
        assert back.hyperparameters["format"] == "transformer-lens"
        assert [each.site for each in back.interventions] == [site]
        equal(logits(lm, back), _stream_by_hand(lm, hook), 1e-5)


def test_hooks_that_are_not_known(lm: tt.LanguageModel, tmp_path: Path) -> None:
    for hook in ("blocks.1.mlp.hook_post", "blocks.3.hook_resid_pre", "blocks.x.hook_resid_pre"):
        torch.save({hook: vector(1)}, tmp_path / "x.pt")
        refused_in_one_line(lambda: imported(tmp_path / "x.pt", lm), "hook")
    twice = {"blocks.2.hook_resid_pre": vector(1), "blocks.1.hook_resid_post": vector(1)}
    torch.save(twice, tmp_path / "x.pt")
    refused_in_one_line(lambda: imported(tmp_path / "x.pt", lm), "another hook")


def _neuronpedia() -> dict[str, Callable[[list[float]], dict[str, Any]]]:
    """A vector as the service answers (get, new), as its library keeps it, and as it is asked."""
    return {
        "get": lambda values: {
            "vector": {
                "modelId": "tiny",
                "layer": "2-neuronpedia-resid-pre",
                "index": "clx",
                "vectorLabel": "dinosaurs",
                "hookName": "blocks.2.hook_resid_pre",
                "vector": values,
                "vectorDefaultSteerStrength": 44,
            }
        },
        "new": lambda values: {
            "url": "somewhere",
            "vector": {
                "modelId": "tiny",
                "label": "dinosaurs",
                "hookName": "blocks.2.hook_resid_pre",
                "values": values,
                "defaultSteerStrength": 44.0,
            },
        },
        "library": lambda values: {
            "label": "dinosaurs",
            "model_id": "tiny",
            "hook_name": "blocks.2.hook_resid_pre",
            "values": values,
            "default_steer_strength": 44,
        },
        "request": lambda values: {
            "modelId": "tiny",
            "layerNumber": 2,
            "hookType": "hook_resid_pre",
            "vector": values,
            "vectorDefaultSteerStrength": 44,
            "vectorLabel": "dinosaurs",
        },
    }


@pytest.mark.parametrize("form", _neuronpedia())
def test_neuronpedia(form: str, lm: tt.LanguageModel, tmp_path: Path) -> None:
    values = [round(value, 4) for value in vector(1).tolist()]
    (tmp_path / "x.json").write_text(json.dumps(_neuronpedia()[form](values)))
    back = imported(tmp_path / "x.json", lm)
    assert back.setting == 44
    assert back.hyperparameters["label"] == "dinosaurs"
    assert back.hyperparameters["made_for"] == "tiny"
    equal(logits(lm, back), added_by_hand(lm, {1: 44 * torch.tensor(values)}))
