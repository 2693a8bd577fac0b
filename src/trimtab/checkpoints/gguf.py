"""Makes a plain checkpoint (safetensors and tokenizer) of a GGUF file.

transformers dequantises the weights. The tokenizer is built here from the file's metadata, because
transformers does it right in some versions only: 5.16 gives Gemma wrong merges and no BOS, and
SmolLM2 a wrong end-of-text token.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.checkpoints.gguf_header import DamagedError, Header, check_header
from trimtab.errors import TrimtabError, TrimtabWarning, first_line, os_reason, shown

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Writes configuration, weights (safetensors, dequantised) and tokenizer to `destination`.

    The weights are stored in the smallest type that holds every value exactly: a file of half
    precision stays one; the blocks of a quantised file (fp16 scale times integer) need float32.
    """
    from transformers import GenerationConfig

    header = _checked(gguf)
    reader = _read_gguf(gguf)
    fields: dict[str, Any] = dict(reader.fields)
    _warn_of_losses(reader, fields)
    destination.mkdir(parents=True, exist_ok=True)
    model = _load_weights(gguf, destination, header)
    try:
        tokenizer = _tokenizer(fields, model.config.max_position_embeddings)
    except TrimtabError:
        raise
    except Exception as error:  # ids, scores or merges that do not fit together
        raise TrimtabError(
            f"cannot build the tokenizer of the GGUF file {shown(gguf, 150)}: {_reason(error)}"
        ) from error

    # The end of a turn ends generation too, where the file tells the two apart.
    ends = {tokenizer.eos_token_id, _field(fields, "tokenizer.ggml.eot_token_id")} - {None}
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    try:
        with redirect_stderr(io.StringIO()):  # hides a bar that cannot be turned off
            model.to(_smallest_lossless(model)).save_pretrained(destination)
        tokenizer.save_pretrained(destination)
        _shorten(destination / "tokenizer.json")
        for weights in destination.glob("*.safetensors"):  # safetensors lets the owner only
            shutil.copymode(destination / "config.json", weights)
    except Exception as error:  # a full disk comes as safetensors' own error
        raise TrimtabError(f"cannot write to {destination}: {os_reason(error)}") from error


def check_is_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise TrimtabError(f"cannot read {shown(path, 200)}: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise TrimtabError(
            f"{shown(path, 150)} is not a GGUF file: it begins with {magic!r}, not b'GGUF'"
        )


def gguf_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a small GGUF file by name, each a copy in float32, and the plain values and
    strings of its header. Quantised tensors are refused."""
    import numpy as np
    import torch

    header = _checked(path)
    tensors = {}
    for tensor in _read_gguf(path).tensors:
        numbers = np.asarray(tensor.data)
        if numbers.dtype.kind != "f":
            raise TrimtabError(
                f"{shown(path, 150)}: tensor '{shown(tensor.name)}' is of type "
                f"{tensor.tensor_type.name}, not of plain floats"
            )
        tensors[str(tensor.name)] = torch.from_numpy(numbers.astype(np.float32))
    return tensors, header.values


def _checked(path: Path) -> Header:
    """The header of a file that can hold what it says that it holds."""
    check_is_gguf(path)
    try:
        return check_header(path)
    except DamagedError as error:
        raise _damaged(path, error) from error


def _read_gguf(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # whatever it reads in a way of its own
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> TrimtabError:
    return TrimtabError(
        f"{shown(path, 150)} is a truncated or damaged GGUF file ({shown(error, 120)}): "
        "fetch it again"
    )


def _field(fields: dict[str, Any], key: str, default: Any = None) -> Any:
    return fields[key].contents() if key in fields else default


def _warn_of_losses(reader: GGUFReader, fields: dict[str, Any]) -> None:
    scaling = [key for key in fields if key.endswith(".rope.scaling.type")]
    if any(_field(fields, key) != "none" for key in scaling) or any(
        tensor.name == "rope_freqs.weight" for tensor in reader.tensors
    ):
        warnings.warn(
            "this GGUF file scales its rotary frequencies for long contexts, which the conversion "
            "does not carry over: long texts will come out worse than in the original model",
            TrimtabWarning,
            stacklevel=3,
        )


def _load_weights(gguf: Path, empty: Path, header: Header) -> PreTrainedModel:
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # later than 5.16
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # From the empty directory: files that lie beside a user's GGUF must not count.
    place: dict[str, Any] = {"gguf_file": str(gguf.absolute()), "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(str(empty), **place)
        _check_size(config, header)
        # The redirection hides a bar that cannot be turned off.
        with redirect_stderr(io.StringIO()):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(empty), dtype=torch.float32, output_loading_info=True, **place, **options
            )
        model: PreTrainedModel = loaded[0]
        _check_complete(model, loaded[1])
    except Exception as error:
        raise TrimtabError(
            f"cannot load the GGUF file {shown(gguf, 150)}: {_reason(error)}"
        ) from error
    # Its mark as quantised, which makes saving fail, though every weight is plain by now.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _check_size(config: Any, header: Header) -> None:
    """Refuse sizes that are none of the file's, before there is room made for them."""
    import torch
    import transformers

    with torch.device("meta"):  # which takes no memory
        sketch = transformers.AutoModelForCausalLM.from_config(config)
    wanted = sum(parameter.numel() for parameter in sketch.parameters())
    # A few more than the file's are right where an architecture adds something to its files.
    if wanted > 1.5 * header.elements:
        raise DamagedError(
            f"by its sizes it is a model of {wanted} numbers, and it holds {header.elements}"
        )


def _check_complete(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse a model that does not have all of its weights from the file."""
    missing = sorted(map(str, info.get("missing_keys", ())))
    if missing:
        raise DamagedError(f"it lacks {len(missing)} of the model's tensors, {missing[0]} first")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise DamagedError(f"{name} holds NaN or infinity")


def _reason(error: Exception) -> str:
    return shown(first_line(error) or type(error).__name__, 150)


def _smallest_lossless(model: PreTrainedModel) -> Any:
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight, weight.to(dtype).float()) for weight in model.parameters()):
            return dtype
    return torch.float32


def _shorten(tokenizer: Path) -> None:
    """Without the indentation and with each merge as one string, Gemma's loads twice as fast."""
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    if not any(" " in piece for merge in merges for piece in merge):
        content["model"]["merges"] = [" ".join(merge) for merge in merges]
    short = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    tokenizer.write_text(short, encoding="utf-8", newline="\n")


# --- the tokenizer in a GGUF -----------------------------------------------------------------

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of token in a GGUF
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_SPLIT = rf"{_CLITICS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2_SPLIT = rf"{_CLITICS}|{_WORD}|\p{{N}}|{_REST}"
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: `tokenizer.ggml.pre` -> how text is cut before the merges; llama.cpp's table.
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _LLAMA3_SPLIT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2_SPLIT),
    "tekken": _TEKKEN_SPLIT,
}
_DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_GPT2 = ("gpt-2", "gpt2", "default", "olmo", "phi-2", "mpt")
#: Those that take a whole word which is in the vocabulary as it is, and that add BOS by default.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")


def _tokenizer(fields: dict[str, Any], longest: int) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata describe, the same in every version of transformers."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    kind = _field(fields, "tokenizer.ggml.model")
    tokens: list[str] = _field(fields, "tokenizer.ggml.tokens", [])
    kinds: list[int] = _field(fields, "tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if kind == "gpt2":
        backend = _byte_level(fields, tokens)
    elif kind == "llama":
        backend = _sentencepiece(fields, tokens)
    else:
        raise TrimtabError(
            f"the GGUF file has a tokenizer '{shown(kind)}': trimtab reads gpt2 and llama"
        )

    vocabulary = backend.get_vocab()
    pieces = [pair for pair in zip(tokens, kinds, strict=True) if pair[0] in vocabulary]
    backend.add_special_tokens(
        [AddedToken(text, normalized=False) for text, of in pieces if of == _CONTROL]
    )
    backend.add_tokens(
        [AddedToken(text, normalized=False) for text, of in pieces if of == _USER_DEFINED]
    )

    def special(name: str) -> str | None:
        index = _field(fields, f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if index is not None and index < len(tokens) else None

    bos, eos = special("bos"), special("eos")
    adds_bos = kind == "llama" or _field(fields, "tokenizer.ggml.pre") in _WHOLE_WORDS
    if bos and _field(fields, "tokenizer.ggml.add_bos_token", adds_bos):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B:1",
            special_tokens=[(bos, tokens.index(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=special("unknown"),
        pad_token=special("padding") or eos,
        chat_template=_field(fields, "tokenizer.chat_template"),
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Byte-level BPE, as of GPT-2, with the split that the vocabulary was learned on."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _field(fields, "tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ")) for merge in _field(fields, "tokenizer.ggml.merges", [])]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in _WHOLE_WORDS,
        )
    )
    cuts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if pre in _DIGIT_BY_DIGIT:
        cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre in _SPLITS:
        cuts = [
            pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    elif pre not in _GPT2:
        warnings.warn(
            f"the GGUF file cuts text in a way ('{shown(pre)}') that trimtab does not know: "
            "GPT-2's is used, and some texts may get other tokens than in the original model",
            TrimtabWarning,
            stacklevel=4,
        )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Sentencepiece BPE: a space is written ▁, what the vocabulary lacks becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    # Gemma's files spell the tokens of several spaces with real spaces; text has ▁ by then.
    spelled = ["▁" * len(token) if token.isspace() and " " in token else token for token in tokens]
    vocabulary = {token: index for index, token in enumerate(spelled)}
    if "tokenizer.ggml.merges" in fields:
        merges = [tuple(merge.split(" ")) for merge in _field(fields, "tokenizer.ggml.merges")]
    elif _field(fields, "general.architecture", "").startswith("gemma"):
        # Gemma's merges go by position; the scores of its user-defined tokens do not.
        merges = _merges(vocabulary, [float(-index) for index in range(len(spelled))])
    else:
        merges = _merges(vocabulary, _field(fields, "tokenizer.ggml.scores"))
    unknown = spelled[_field(fields, "tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    normalize: list[Any] = [normalizers.Replace(" ", "▁")]
    if _field(fields, "tokenizer.ggml.add_space_prefix", True):
        normalize.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(normalize)
    backend.decoder = decoders.Sequence(decode)
    return backend


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary implies: every way to cut a token, best first."""
    cuts = [
        (token[:cut], token[cut:], score)
        for token, score in zip(vocabulary, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    cuts.sort(key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    cuts.sort(key=lambda cut: (cut[2], len(cut[0]), len(cut[1])), reverse=True)
    return [(left, right) for left, right, _ in cuts]
