"""A loaded model: loading, tokens, and the identity that steerings check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import PROMPTS, language_model, one_line, relative, steer_at, without_bos
from tiny import TINY, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """The same directory, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


# -- loading ----------------------------------------------------------------------------------


def test_load_reads_a_directory(saved: Path) -> None:
    lm = tt.load(saved, device="cpu")
    assert lm.name == str(saved)
    assert lm.dtype is torch.float32
    assert lm.device == torch.device("cpu")
    assert not lm.model.training
    assert lm.identity.architecture == "llama"
    assert torch.equal(lm.logits(PROMPTS), language_model("llama").logits(PROMPTS))
    assert tt.load(str(saved)).identity == lm.identity


@pytest.mark.parametrize("name", TINY)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    lm = language_model(name)
    again = tt.load(lm.save_pretrained(tmp_path / name), device="cpu")
    assert torch.allclose(again.logits(PROMPTS), lm.logits(PROMPTS), atol=1e-6)
    assert again.identity.digest == lm.identity.digest
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_load_in_half_precision(saved: Path, dtype: Any) -> None:
    lm = tt.load(saved, dtype=dtype, device="cpu")
    expected = {"float16": torch.float16}.get(str(dtype), torch.bfloat16)
    assert lm.dtype is expected
    assert all(parameter.dtype is expected for parameter in lm.model.parameters())
    logits = lm.logits(PROMPTS)
    assert logits.dtype is torch.float32
    assert relative(logits, language_model("llama").logits(PROMPTS)) < 0.05


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("./no/such/directory", "not a model's directory"),
        ("/no/such/directory", "not a model's directory"),
        ("~/no-such-directory", "not a model's directory"),
        ("missing.gguf", "no such file: missing.gguf"),
        ("~no-such-user/model", "no home directory of that name"),
        ("n" * 300, "is not a model's directory: File name too long"),
        ("a\0b", "cannot load the model"),
        ("one/two/three", "not a model's directory"),
        ("no-such-model", "cannot load the model 'no-such-model'"),
        ("nobody/no-such-model", "cannot load the model 'nobody/no-such-model'"),
        ("not a name!", "cannot load the model 'not a name!'"),
        ("", "cannot load the model ''"),
    ],
)
def test_bad_names_are_one_line(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tt.TrimtabError) as caught:
        tt.load(source)
    assert reason in one_line(caught)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _reshape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 60
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _truncate(folder / "model.safetensors"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"not safetensors"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: _truncate(folder / "config.json"),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "made_up"}'),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: _truncate(folder / "tokenizer.json"),
        lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        _reshape,
    ],
    ids=[
        "truncated-weights", "not-weights", "no-weights", "truncated-config", "empty-config",
        "unknown-type", "no-config", "truncated-tokenizer", "odd-tokenizer", "no-tokenizer",
        "other-sizes",
    ],
)  # fmt: skip
def test_damaged_directories_are_one_line(copied: Path, damage: Callable[[Path], Any]) -> None:
    damage(copied)
    with pytest.raises(tt.TrimtabError, match="cannot load the model") as caught:
        tt.load(copied)
    assert str(copied) in one_line(caught)


def test_a_file_is_no_model(copied: Path) -> None:
    with pytest.raises(tt.TrimtabError, match="not a model's directory"):
        tt.load(copied / "config.json")


def test_unknown_dtype_and_device(saved: Path) -> None:
    with pytest.raises(tt.TrimtabError, match="unknown dtype 'int8'.*bfloat16"):
        tt.load(saved, dtype="int8")
    with pytest.raises(tt.TrimtabError, match="unknown device 'tpu-7'.*cuda") as caught:
        tt.load(saved, device="tpu-7")
    one_line(caught)
    absent = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
    with pytest.raises(tt.TrimtabError, match=f"cannot move .* to {absent}") as caught:
        tt.load(saved, device=absent)
    one_line(caught)


def test_load_refuses_a_model_without_a_residual_stream(tmp_path: Path) -> None:
    from every_architecture import build

    build("gemma3n_text").save_pretrained(tmp_path / "streams")
    tiny_tokenizer().save_pretrained(tmp_path / "streams")
    with pytest.raises(tt.TrimtabError, match="gemma3n_text.*no residual stream.*no way out"):
        tt.load(tmp_path / "streams")


def test_wrap_takes_what_the_user_has() -> None:
    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer()
    lm = tt.wrap(model, tokenizer)
    assert lm.model is model
    assert lm.tokenizer is tokenizer
    assert lm.name == "LlamaForCausalLM"
    assert not model.training  # dropout would make steering look random
    assert tt.wrap(model, tokenizer, "mine").name == "mine"


# -- tokens -----------------------------------------------------------------------------------


def test_bos_is_never_doubled() -> None:
    lm = language_model("llama")
    bos = lm.bos
    prompts: list[Any] = [
        "Hello", "<s>Hello", (("user", "Hello"),), "", "She said <s> and left",
    ]  # fmt: skip
    encoded = lm.encode(prompts)
    assert [tokens.count(bos) for tokens in encoded] == [1, 1, 1, 1, 2]
    assert all(tokens[0] == bos for tokens in encoded)
    assert encoded[0] == encoded[1]
    text = "<s><|user|>\nHello</s>\n<|assistant|>\n"
    assert encoded[2] == lm.tokenizer(text, add_special_tokens=False).input_ids


def test_encode_appends_answers_as_they_are() -> None:
    lm = language_model("llama")
    prompts: list[Any] = ["The answer is", (("user", "Yes?"),)]
    with_answers = lm.encode(prompts, [" yes", "No"])
    chat = lm.render(prompts[1])
    assert with_answers[0] == lm.tokenizer("The answer is yes").input_ids
    assert with_answers[1] == lm.tokenizer(chat + "No", add_special_tokens=False).input_ids


def test_encode_needs_no_bos_in_the_vocabulary() -> None:
    lm = tt.wrap(tiny_model("gpt2"), without_bos())
    assert lm.bos is None
    assert lm.encode(["Hello", ""])[1] == []
    assert not lm.chats


def test_rendering_a_chat() -> None:
    lm = language_model("llama")
    assert lm.chats
    messages = (("system", "Be kind."), ("user", "Hi"))
    expected = "<s><|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert lm.render(messages) == expected
    assert lm.render("as it is") == "as it is"
    bare = tt.wrap(tiny_model("gpt2"), without_bos(), "bare")
    with pytest.raises(tt.TrimtabError, match="bare has no chat template.*raw"):
        bare.render(messages)
    with pytest.raises(tt.TrimtabError, match="no chat template"):
        bare.generate(["Hi"], chat=True)


# -- identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_the_digest_is_the_same_in_every_dtype(name: str) -> None:
    digests = {
        language_model(name, dtype=dtype).identity.digest
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert len(digests) == 1
    digest = digests.pop()
    assert len(digest) == 64
    assert language_model(name).identity.digest == digest
    assert language_model(name, seed=1).identity.digest != digest


def test_digests_of_architectures_differ() -> None:
    assert len({language_model(name).identity.digest for name in TINY}) == len(TINY)


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_the_digest_tells_a_fine_tune_of_one_tensor(tensor: str) -> None:
    lm = language_model("llama")
    changed = language_model("llama")
    with torch.no_grad():
        weight = changed.model.get_parameter(tensor)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        weight += 0.05 * weight.std() * noise  # small: it changes the sign of small weights only
    assert changed.identity.digest != lm.identity.digest


def test_the_digest_tells_the_same_weights_in_other_shapes_and_places() -> None:
    lm, changed = language_model("llama"), language_model("llama")
    layers = changed.model.model.layers
    first, second = layers[0].mlp.up_proj, layers[1].mlp.up_proj
    first.weight, second.weight = second.weight, first.weight
    assert changed.identity.digest != lm.identity.digest


def test_identity_for_people() -> None:
    identity = language_model("gemma3").identity
    assert (identity.layers, identity.hidden_size) == (4, 48)
    assert identity.architecture == "gemma3_text"
    assert str(identity).startswith("gemma3 (gemma3_text, 4 layers, ")


def test_another_models_steering_is_refused_naming_both_and_force_overrides() -> None:
    lm = language_model("llama")
    other = tt.wrap(tiny_model("llama", seed=1), tiny_tokenizer(), "stranger")
    steering = steer_at(other, "resid")
    for run in (
        lambda **options: lm.logits(PROMPTS, steering=steering, **options),
        lambda **options: lm.generate(PROMPTS, max_new_tokens=2, steering=steering, **options),
    ):
        with pytest.raises(tt.TrimtabError, match="force") as caught:
            run()
        message = one_line(caught)
        assert str(lm.identity) in message
        assert str(other.identity) in message
        run(force=True)
    with pytest.raises(tt.TrimtabError, match="made for stranger"), lm.steered(steering):
        pass
    with lm.steered(steering, force=True):
        forced = lm.logits(PROMPTS)
    assert relative(forced, lm.logits(PROMPTS)) > 0.01
    with pytest.raises(tt.TrimtabError, match="made for stranger"), lm.steered([None, steering]):
        pass


@pytest.mark.parametrize("force", [False, True])
def test_sizes_that_do_not_fit_are_never_forced(force: bool) -> None:
    steering = steer_at(language_model("llama"), "resid")
    for wrong in (
        language_model("llama", num_hidden_layers=2),
        language_model("llama", hidden_size=32),
        language_model("mistral"),
    ):
        with (
            pytest.raises(tt.TrimtabError, match="the sizes do not fit") as caught,
            wrong.steered(steering, force=force),
        ):
            pass
        assert str(wrong.identity) in one_line(caught)
    narrow = language_model("llama", intermediate_size=60)
    inner = steer_at(language_model("llama"), "ffn_in", "Scale")
    with (
        pytest.raises(tt.TrimtabError, match=r"layers\.1\.ffn_in has 60 units.*has 80"),
        narrow.steered(inner, force=force),
    ):
        pass


def test_a_quantised_model_takes_the_steering_of_its_original() -> None:
    """Its stored weights have another digest; its norms and embeddings are the same, or it was made
    from another model. The sizes are still checked."""
    lm = language_model("llama")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight.neg_()
    other = language_model("llama", seed=1)
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
    lm.model.hf_quantizer = other.model.hf_quantizer = quantizer
    steering = steer_at(language_model("llama"), "resid")
    with lm.steered(steering):
        lm.logits(PROMPTS)
    with pytest.raises(tt.TrimtabError, match="fit one for this model"):
        other.logits(PROMPTS, steering=steering)
    other.logits(PROMPTS, steering=steering, force=True)
    with pytest.raises(tt.TrimtabError, match="sizes do not fit"):
        lm.logits(PROMPTS, steering=steer_at(language_model("mistral"), "resid"))


def test_half_precision_takes_the_steering_of_the_whole_one(saved: Path) -> None:
    steering = steer_at(language_model("llama"), "resid")
    half = tt.load(saved, dtype="bfloat16", device="cpu")
    assert relative(
        half.logits(PROMPTS, steering=steering),
        language_model("llama").logits(PROMPTS, steering=steering),
    ) < (0.05)
