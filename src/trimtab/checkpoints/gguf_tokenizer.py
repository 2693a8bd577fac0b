"""The tokenizer in a GGUF file: read from its metadata, and written into it.

It is built here because transformers does it right in some versions only: 5.16 gives Gemma wrong
merges and no BOS, and SmolLM2 a wrong end-of-text token.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError, TrimtabWarning, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

#: What a file's metadata say, by key.
Values = Mapping[str, Any]

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


def read_tokenizer(values: Values, longest: int) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata describe, the same in every version of transformers."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    kind = values.get("tokenizer.ggml.model")
    tokens: list[str] = values.get("tokenizer.ggml.tokens", [])
    kinds: list[int] = values.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if kind == "gpt2":
        backend = _byte_level(values, tokens)
    elif kind == "llama":
        backend = _sentencepiece(values, tokens)
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
        index = values.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if index is not None and index < len(tokens) else None

    bos, eos = special("bos"), special("eos")
    adds_bos = kind == "llama" or values.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    if bos and values.get("tokenizer.ggml.add_bos_token", adds_bos):
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
        chat_template=values.get("tokenizer.chat_template"),
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(values: Values, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE, as of GPT-2, with the split that the vocabulary was learned on."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = values.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ")) for merge in values.get("tokenizer.ggml.merges", [])]
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


def _sentencepiece(values: Values, tokens: list[str]) -> Tokenizer:
    """Sentencepiece BPE: a space is written ▁, what the vocabulary lacks becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    # Gemma's files spell the tokens of several spaces with real spaces; text has ▁ by then.
    spelled = ["▁" * len(token) if token.isspace() and " " in token else token for token in tokens]
    vocabulary = {token: index for index, token in enumerate(spelled)}
    if "tokenizer.ggml.merges" in values:
        merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    elif values.get("general.architecture", "").startswith("gemma"):
        # Gemma's merges go by position; the scores of its user-defined tokens do not.
        merges = _merges(vocabulary, [float(-index) for index in range(len(spelled))])
    else:
        merges = _merges(vocabulary, values["tokenizer.ggml.scores"])
    unknown = spelled[values.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    normalize: list[Any] = [normalizers.Replace(" ", "▁")]
    if values.get("tokenizer.ggml.add_space_prefix", True):
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


# -- written ----------------------------------------------------------------------------------

#: One name for each way to cut text that is known, GPT-2's first.
_NAMES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "dbrx")
_UNKNOWN, _UNUSED, _BYTE = 2, 5, 6  # kinds of token, as above
#: What is tokenized both ways before a file is written.
_TEXTS = (
    "Today I feel happy. I'VE 3 ships, 12345 sails and 0.5 l of rum!?\n\n  Two  spaces   \t",
    ' Über die Straße, «мир» 日本語 🎉 e\u0301 <b>x</b> {"a": [1, 2]}\r\n---- ▁ a ▁▁ b',
    "",
)


def tokenizer_metadata(tokenizer: Any, rows: int, ends: Sequence[int] = ()) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer, for a model with so many rows of embeddings that ends
    its texts with any of these tokens.

    TrimtabError where it is of a kind that is not read here, or would not be read as it is.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unwritten("it is written in Python")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE" or any(
        model[name] for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise _unwritten(f"its model is {shown(model['type'])}, not plain byte-pair encoding")
    tokens, kinds = _tokens(tokenizer, rows, model)
    values = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    kind = _sentencepiece_values if model["byte_fallback"] else _byte_level_values
    values |= kind(content) | _special_values(tokenizer, ends)
    _prove(tokenizer, values)
    return values


def _unwritten(why: str) -> TrimtabError:
    return TrimtabError(
        f"a GGUF file cannot carry this tokenizer: {why}; bake a checkpoint (without --to gguf), "
        "and convert that with llama.cpp's convert_hf_to_gguf.py"
    )


def _tokens(tokenizer: Any, rows: int, model: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens by their ids, one for each row of the embeddings, and of what kind they are."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    if len(texts) and max(texts) >= rows:
        raise _unwritten(f"it has {max(texts) + 1} tokens, and the model embeddings of {rows}")
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(rows):
        text = texts.get(index)
        if text is None:
            text, kind = f"[PAD{index}]", _UNUSED
        elif text == model["unk_token"] and model["byte_fallback"]:
            kind = _CONTROL if index in added and added[index].special else _UNKNOWN
        elif index in added:
            kind = _CONTROL if added[index].special else _USER_DEFINED
            if kind == _USER_DEFINED and model["byte_fallback"]:
                text = text.replace("▁", " ")  # as text has it before it is cut
        elif model["byte_fallback"] and len(text) == 6 and text.startswith("<0x"):
            kind = _BYTE
        else:
            kind = _NORMAL
        tokens.append(text)
        kinds.append(kind)
    return tokens, kinds


def _byte_level_values(content: dict[str, Any]) -> dict[str, Any]:
    """Of byte-level BPE: the name of how text is cut, and the merges."""
    merges = [
        merge if isinstance(merge, list) else merge.split(" ") for merge in _merges_of(content)
    ]
    said = _form(content)
    for name in _NAMES:
        known = _byte_level({"tokenizer.ggml.pre": name}, [])
        if _form(json.loads(known.to_str())) == said:
            return {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": name,
                "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
            }
    raise _unwritten("it cuts text in a way that has no name in a GGUF file known here")


def _merges_of(content: dict[str, Any]) -> list[Any]:
    merges: list[Any] = content["model"]["merges"]
    return merges


def _form(content: dict[str, Any]) -> Any:
    """How a byte-level tokenizer treats text before the merges, and whole words."""
    cuts = content["pre_tokenizer"] or {}
    cuts = cuts.get("pretokenizers", [cuts])
    cuts = [{key: value for key, value in cut.items() if key != "trim_offsets"} for cut in cuts]
    return cuts, content["normalizer"], bool(content["model"]["ignore_merges"])


def _sentencepiece_values(content: dict[str, Any]) -> dict[str, Any]:
    """Of sentencepiece BPE: scores that imply the merges, and whether a space is put in front."""
    vocabulary = content["model"]["vocab"]
    ranks: dict[str, int] = {}
    pairs = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" "))
        for merge in _merges_of(content)
    ]
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    by_rank = [-float(ranks.get(token, 0)) for token in vocabulary]
    by_place = [-float(index) for index in vocabulary.values()]
    for scores in (by_place, by_rank):
        if _merges(vocabulary, scores) == pairs:
            break
    else:
        raise _unwritten("its merges do not follow from a score of each token")
    size = max(vocabulary.values()) + 1
    placed = [0.0] * size
    for index, score in zip(vocabulary.values(), scores, strict=True):
        placed[index] = score
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": placed,
        "tokenizer.ggml.add_space_prefix": any(
            each["type"] == "Prepend"
            for each in (content["normalizer"] or {}).get("normalizers", ())
        ),
    }


def _special_values(tokenizer: Any, ends: Sequence[int]) -> dict[str, Any]:
    """The special tokens by their roles, whether BOS is put in front, and the chat template."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    further = [end for end in ends if end != tokenizer.eos_token_id]
    ids |= dict(zip(("eot", "eom"), further, strict=False))  # the ends of a turn, of a message
    if len(further) > 2:
        warnings.warn(
            f"the model ends its texts with {len(further) + 1} tokens, and a GGUF file has room "
            "for three: with some of them texts may run on",
            TrimtabWarning,
            stacklevel=5,
        )
    values: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None
    }
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    values["tokenizer.ggml.add_bos_token"] = begins
    template = tokenizer.chat_template
    if isinstance(template, dict):
        others = {name: text for name, text in template.items() if name != "default"}
        values |= {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
        values["tokenizer.chat_templates"] = list(others)
        template = template.get("default")
    if template:
        values["tokenizer.chat_template"] = template
    return values


def _prove(tokenizer: Any, values: dict[str, Any]) -> None:
    """Refuse a tokenizer of which another would be read."""
    read = read_tokenizer(values, tokenizer.model_max_length)
    for text in (*_TEXTS, *(f"a {special} b" for special in tokenizer.all_special_tokens)):
        if read(text).input_ids != tokenizer(text).input_ids:
            raise _unwritten(f"{shown(text, 60)!r} would get other tokens")
