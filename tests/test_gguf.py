"""GGUF files become plain checkpoints: every value and token is kept, and what cannot be is
said."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tiny_packs import (
    LAYERS,
    add_byte_level_tokenizer,
    add_sentencepiece_tokenizer,
    cache,
    quick,
    tiny_gguf,
    visible,
    write_tiny_llama,
)
from trimtab.checkpoints import packs
from trimtab.errors import TrimtabError, TrimtabWarning

__all__ = ["cache", "quick", "tiny_gguf"]  # fixtures, which pytest finds by their names here

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
