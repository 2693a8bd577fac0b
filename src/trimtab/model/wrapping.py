"""Wraps a model that the user already holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.errors import TrimtabError
from trimtab.model.chats import chat_form
from trimtab.model.language_model import LanguageModel
from trimtab.model.plain import decompress, unwrap


def wrap(
    model: Any,
    tokenizer: Any,
    name: str | None = None,
    chat_options: Mapping[str, Any] | None = None,
    system: str | None = None,
    *,
    processor: Any = None,
) -> LanguageModel:
    """A model that the user already holds, with its tokenizer (or a processor that has one).

    A `processor` is what makes a model's inputs of images in messages; without one it takes none.
    `chat_options` and `system` say how conversations are put, as in `load`. What stands around a
    model (torch.compile, DataParallel, peft) is taken off; adapters that peft put into its layers
    stay and act.
    """
    plain = unwrap(_checked_model(model))
    if processor is None and _is_tokenizer(getattr(tokenizer, "tokenizer", None)):
        processor = tokenizer
    tokenizer = _with_template(_checked_tokenizer(tokenizer), processor)
    if not callable(getattr(plain, "generate", None)) or plain.get_output_embeddings() is None:
        raise TrimtabError(
            f"{type(plain).__name__} is no causal language model: it has no LM head to write "
            "with; load it with AutoModelForCausalLM"
        )
    decompress(plain)
    path = str(name or getattr(plain, "name_or_path", "") or type(plain).__name__)
    form = chat_form(tokenizer, path, chat_options, system)
    language_model = LanguageModel(plain.eval(), tokenizer, path, form)
    language_model.processor = _checked_processor(processor, path)
    _check_vocabulary(language_model)
    return language_model


def _checked_model(model: Any) -> Any:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str | Path):
        raise TrimtabError(f"wrap takes a model, not a name: load it with load({str(model)!r})")
    if isinstance(model, LanguageModel):
        raise TrimtabError("this model is wrapped already: use it as it is")
    if _is_tokenizer(model):
        raise TrimtabError("wrap takes the model first, and then the tokenizer: wrap(model, tok)")
    raise TrimtabError(f"wrap takes a model of transformers, not {type(model).__name__}")


def check_model(given: object) -> None:
    """Refuse what stands where a model is to be, with what to write instead."""
    if isinstance(given, LanguageModel):
        return
    if isinstance(given, str | Path):
        raise TrimtabError(f"{str(given)!r} is a name, not a model: load it with load(...)")
    if isinstance(given, nn.Module):
        raise TrimtabError("a model of transformers is wrapped first: wrap(model, tokenizer)")
    raise TrimtabError(
        f"{type(given).__name__} stands where the model is to be: give what load or wrap returns"
    )


def _checked_tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise TrimtabError("wrap needs a tokenizer: AutoTokenizer.from_pretrained(...)")
    if isinstance(tokenizer, str | Path):
        raise TrimtabError(
            f"wrap takes a tokenizer, not a name: AutoTokenizer.from_pretrained({tokenizer!r})"
        )
    if _is_tokenizer(tokenizer):
        return tokenizer
    inner = getattr(tokenizer, "tokenizer", None)  # of a processor
    if _is_tokenizer(inner):
        return inner
    raise TrimtabError(
        f"wrap takes a tokenizer of transformers, not {type(tokenizer).__name__}: "
        "AutoTokenizer.from_pretrained(...)"
    )


def _checked_processor(processor: Any, name: str) -> Any:
    """A processor of images; one of other things alone (sounds) is none."""
    if processor is None or getattr(processor, "image_processor", None) is not None:
        return processor
    if _is_tokenizer(getattr(processor, "tokenizer", None)):
        return None
    raise TrimtabError(
        f"the processor of {name} is {type(processor).__name__}, which makes no inputs of texts "
        "with images: AutoProcessor.from_pretrained(...)"
    )


def _with_template(tokenizer: Any, processor: Any) -> Any:
    """The tokenizer with the processor's chat template, where it has none of its own."""
    template = getattr(processor, "chat_template", None)
    if tokenizer.chat_template or not template:
        return tokenizer
    own = copy.copy(tokenizer)  # the user's stays what it was
    own.chat_template = template
    return own


def _is_tokenizer(given: Any) -> bool:
    wanted = ("decode", "apply_chat_template", "bos_token_id", "model_max_length")
    return callable(given) and all(hasattr(given, name) for name in wanted)


def _check_vocabulary(language_model: LanguageModel) -> None:
    """Tokens without a row in the embedding table would end in the middle of a run."""
    rows = language_model.anatomy.config.vocab_size
    tokens = getattr(language_model.tokenizer, "vocab_size", 0)  # those added later apart
    if tokens > rows:
        raise TrimtabError(
            f"the tokenizer of {language_model.name} has {tokens} tokens, the model {rows}: it is "
            "another model's tokenizer"
        )
