"""A loaded model: loading, tokens, generation, logits, and the identity that steerings check."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import trimtab as tt
from helpers import PROMPTS, language_model, plain_logits, relative, steer_at, token_ids
from tiny import TINY, tiny_model, tiny_tokenizer

CHAT = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


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


def without_bos() -> PreTrainedTokenizerFast:
    """The tiny tokenizer as models have it that add no special token: an empty text is empty."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer().backend_tokenizer).from_str(
            tiny_tokenizer().backend_tokenizer.to_str()
        ),
        eos_token="</s>",
        model_max_length=256,
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


def one_line(error: Any) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


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


def test_load_refuses_an_architecture_without_anatomy(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = GPTNeoXConfig(**sizes, num_attention_heads=2, vocab_size=400)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    tiny_tokenizer().save_pretrained(tmp_path / "neox")
    with pytest.raises(tt.TrimtabError, match="unknown architecture 'gpt_neox'.*register"):
        tt.load(tmp_path / "neox")


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


# -- generation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_generate_is_transformers_greedy_search(name: str) -> None:
    lm = language_model(name)
    completions = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = token_ids(prompt)
        for _ in range(8):
            ids.append(int(plain_logits(lm.model, ids)[-1].argmax()))
        assert list(completion.tokens) == ids[-8:]
        assert completion.prompt == prompt
        text = lm.tokenizer.decode(ids[-8:], skip_special_tokens=True)
        assert completion.text == str(completion) == text


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_keep_the_order_of_the_prompts(batch_size: int) -> None:
    lm = language_model("llama")
    prompts = [*PROMPTS, "The", PROMPTS[1]]
    rows = [steer_at(lm, "resid", seed=1), None, steer_at(lm, "heads"), None, None]
    together = lm.generate(
        prompts, max_new_tokens=6, chat=False, steering=rows, batch_size=batch_size
    )
    logits = lm.logits(prompts, steering=rows, batch_size=batch_size)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        alone = lm.generate([prompt], max_new_tokens=6, chat=False, steering=row)[0]
        assert together[i] == alone
        assert relative(logits[i], lm.logits([prompt], steering=row)[0]) < 1e-5


def test_completions_name_their_steering() -> None:
    lm = language_model("llama")
    a = steer_at(lm, "resid")
    rows = [a.at(2), None, (a, a.at(-1))]
    done = lm.generate(PROMPTS, max_new_tokens=2, chat=False, steering=rows)
    assert [one.steering for one in done] == [
        ("test alpha=2",), (), ("test alpha=1", "test alpha=-1"),
    ]  # fmt: skip


def test_text_goes_through_the_chat_template_by_default_or_raw() -> None:
    lm = language_model("llama")
    chat = lm.generate(PROMPTS, max_new_tokens=6)
    assert chat == lm.generate(PROMPTS, max_new_tokens=6, chat=True)
    messages = lm.generate(CHAT, max_new_tokens=6)
    assert [one.tokens for one in messages] == [one.tokens for one in chat]
    assert messages[0].prompt == (("user", PROMPTS[0]),)
    raw = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    assert [one.tokens for one in raw] != [one.tokens for one in chat]
    # A conversation stays one, whatever `chat` says of text.
    assert lm.generate(CHAT, max_new_tokens=6, chat=False) == messages
    bare = tt.wrap(tiny_model("gpt2"), without_bos())
    assert bare.generate(["Hi"], max_new_tokens=2)[0].prompt == "Hi"


def test_logits_are_of_raw_text_by_default() -> None:
    lm = language_model("llama")
    expected = [plain_logits(lm.model, token_ids(prompt))[-1] for prompt in PROMPTS]
    assert relative(lm.logits(PROMPTS), torch.stack(expected)) < 1e-5
    ids = lm.encode([(("user", PROMPTS[0]),)])[0]
    for prompts in (PROMPTS[:1], CHAT[:1]):
        assert relative(lm.logits(prompts, chat=True)[0], plain_logits(lm.model, ids)[-1]) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_logits_of_all_tokens_are_transformers(name: str) -> None:
    lm = language_model(name)
    every = lm.logits(PROMPTS, at="all")
    last = lm.logits(PROMPTS)
    assert isinstance(every, list)
    for i, prompt in enumerate(PROMPTS):
        expected = plain_logits(lm.model, token_ids(prompt))
        assert every[i].shape == expected.shape  # no row for padding
        assert every[i].dtype is torch.float32
        assert relative(every[i], expected) < 1e-5
        assert relative(last[i], expected[-1]) < 1e-5


def test_the_end_of_a_text_stops_it() -> None:
    lm = language_model("llama")
    free = lm.generate(PROMPTS, max_new_tokens=12, chat=False)
    stop = free[0].tokens[4]
    assert stop not in free[0].tokens[:4]
    for eos in (stop, [stop, 399]):
        lm.model.generation_config.eos_token_id = eos
        stopped = lm.generate(PROMPTS, max_new_tokens=12, chat=False)
        assert stopped[0].tokens == free[0].tokens[:4]
        # Rows that end later are not cut where the first one ended.
        for one, other in zip(stopped[1:], free[1:], strict=True):
            cut = other.tokens.index(stop) if stop in other.tokens else 12
            assert one.tokens == other.tokens[:cut]
        assert any(len(one.tokens) == 12 for one in stopped)


def test_a_tokenizer_without_padding_token_generates_batches() -> None:
    lm = tt.wrap(tiny_model("gpt2"), without_bos())
    assert lm.tokenizer.pad_token_id is None
    lm.model.generation_config.pad_token_id = None
    together = lm.generate(PROMPTS, max_new_tokens=6)
    for prompt, one in zip(PROMPTS, together, strict=True):
        assert lm.generate([prompt], max_new_tokens=6)[0] == one


# -- sampling ---------------------------------------------------------------------------------


def test_a_seed_repeats_and_leaves_the_global_generator_alone() -> None:
    lm = language_model("llama")
    options: dict[str, Any] = {"max_new_tokens": 12, "chat": False, "temperature": 1.0}
    before = torch.random.get_rng_state()
    first = lm.generate(PROMPTS, seed=7, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    assert lm.generate(PROMPTS, seed=7, **options) == first
    assert lm.generate(PROMPTS, seed=8, **options) != first
    torch.random.set_rng_state(before)


def test_without_a_seed_sampling_follows_the_global_generator() -> None:
    lm = language_model("llama")
    options: dict[str, Any] = {"max_new_tokens": 12, "chat": False, "temperature": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = lm.generate(PROMPTS, **options), lm.generate(PROMPTS, **options)
        torch.manual_seed(1)
        assert lm.generate(PROMPTS, **options) == first
    assert first != second


def test_greedy_uses_no_randomness_and_warns_of_nothing() -> None:
    lm = language_model("llama")
    lm.model.generation_config.do_sample = True  # as many chat models have it
    lm.model.generation_config.temperature = 0.6
    lm.model.generation_config.top_p = 0.9
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == language_model("llama").generate(PROMPTS, max_new_tokens=8, chat=False)


def test_sampling_options_reach_the_distribution() -> None:
    lm = language_model("llama")
    greedy = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
    options: dict[str, Any] = {"max_new_tokens": 8, "chat": False, "seed": 3}
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert lm.generate(PROMPTS, temperature=5.0, **narrow, **options) == greedy
    assert lm.generate(PROMPTS, temperature=1e-4, **options) == greedy
    assert lm.generate(PROMPTS, temperature=5.0, **options) != greedy


def test_the_whole_distribution_is_sampled_by_default() -> None:
    """Frequencies of the first token against its probabilities, without the model's own top_k."""
    lm = language_model("llama")
    lm.model.generation_config.top_k = 5
    lm.model.generation_config.top_p = 0.5
    count = 3000
    done = lm.generate(
        ["The"] * count, max_new_tokens=1, chat=False, temperature=2.0, seed=0, batch_size=count
    )
    tokens = torch.tensor([one.tokens[0] for one in done])
    expected = (lm.logits(["The"])[0] / 2.0).softmax(-1)
    found = tokens.bincount(minlength=len(expected)) / count
    # Total variation between a distribution over ~100 likely tokens and 3,000 draws from it.
    assert (found - expected).abs().sum() / 2 < 0.15
    assert len(tokens.unique()) > 50


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"top_p": 1.5}, "top_p above 0"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
        ({"batch_size": 0}, "must be 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(tt.TrimtabError, match=reason) as caught:
        language_model("llama").generate(PROMPTS, chat=False, **options)
    one_line(caught)


# -- prompts that cannot be -------------------------------------------------------------------


def test_an_empty_prompt_is_refused_or_only_bos() -> None:
    lm = language_model("llama")  # with BOS there is something to go on from
    assert len(lm.generate([""], max_new_tokens=3, chat=False)[0].tokens) == 3
    bos = plain_logits(lm.model, [lm.bos])
    assert relative(lm.logits([""]), bos) < 1e-5
    bare = tt.wrap(tiny_model("gpt2"), without_bos())
    for prompts in ([""], ["Hello", ""]):
        with pytest.raises(tt.TrimtabError, match="the prompt '' is empty"):
            bare.generate(prompts)
        with pytest.raises(tt.TrimtabError, match="the prompt '' is empty"):
            bare.logits(prompts)


def test_no_prompts_and_no_list_are_refused() -> None:
    lm = language_model("llama")
    for run in (lm.generate, lm.logits):
        with pytest.raises(tt.TrimtabError, match="there is no prompt"):
            run([])
        with pytest.raises(tt.TrimtabError, match=r"write \[prompt\]"):
            run("Hello")
        with pytest.raises(tt.TrimtabError, match="prompt 2.*must be text or a list of messages"):
            run(["Hello", 3])
        with pytest.raises(tt.TrimtabError, match="message must be"):
            run([[{"role": "user"}]])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_that_are_too_long_are_refused(name: str) -> None:
    lm = language_model(name)
    assert lm.max_length == 256
    long = "ship " * 400
    length = len(token_ids(long))
    with pytest.raises(tt.TrimtabError, match=f"{length} tokens.*256 tokens") as caught:
        lm.generate(["short", long], max_new_tokens=4, chat=False)
    assert "shorten" in one_line(caught)
    with pytest.raises(tt.TrimtabError, match=f"{length} tokens.*256 tokens"):
        lm.logits(["short", long])
    # To the last token, and not one more.
    fits = lm.tokenizer.decode(token_ids(long)[1:248])
    room = 256 - len(token_ids(fits))
    assert 0 < room < 60
    assert len(lm.generate([fits], max_new_tokens=room, chat=False)[0].tokens) == room
    with pytest.raises(tt.TrimtabError, match="exceed the 256 tokens"):
        lm.generate([fits], max_new_tokens=room + 1, chat=False)


def test_the_length_limit_is_the_smaller_one_or_none() -> None:
    lm = language_model("llama")
    tokenizer = without_bos()
    tokenizer.model_max_length = int(1e30)  # how tokenizers say that they have no limit
    assert tt.wrap(lm.model, tokenizer).max_length == 256
    tokenizer.model_max_length = 100
    assert tt.wrap(lm.model, tokenizer).max_length == 100


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
