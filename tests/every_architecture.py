"""A tiny random model of every decoder architecture that the installed transformers has.

The sizes come from a table by names of configuration fields, which most architectures share; what
one of them needs besides stands in a table of exceptions. A model is built only where it stays
below 25 million parameters.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from every_size import EXCEPTIONS, LEFT_OUT, SMALL, VARIANTS
from tiny import randomise

_LARGEST = 25_000_000

#: What has an encoder and is asked for besides, to see it refused.
_ENCODER_DECODERS = ("bart", "mt5", "t5")


class NotBuilt(Exception):  # noqa: N818
    """This architecture has no tiny model; the message says why."""


def names() -> list[str]:
    """Every model type, and the variants of some, sorted."""
    return sorted(
        {
            *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            *_ENCODER_DECODERS,
            *VARIANTS,
        }
    )


def build(name: str) -> PreTrainedModel:
    """The tiny model, float32, in eval mode; the same weights each time. May raise NotBuilt."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    try:
        config = _config(CONFIG_MAPPING[model_type], changes)
        auto = _auto_class(name, model_type)
        with init_empty_weights():
            size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
        if size <= _LARGEST:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = auto.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever a foreign configuration or model trips over
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise NotBuilt(f"{name}: {reason}") from error
    if size > _LARGEST:
        raise NotBuilt(f"{name}: no smaller than {size / 1e6:.0f} million parameters")
    randomise(model, torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return model.eval()


def _auto_class(name: str, model_type: str) -> Any:
    """Types that are known with and without images are built without, but as `..._wrapper`."""
    wrapped = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if wrapped and (name.endswith("_wrapper") or name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return AutoModelForImageTextToText
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    return AutoModelForSeq2SeqLM


def _config(cls: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A small configuration; `changes` go to that of the decoder, which may be inside."""
    fields = {field.name for field in dataclasses.fields(cls)}
    sizes: dict[str, Any] = {}
    for standard, own in (getattr(cls, "attribute_map", None) or {}).items():
        if standard in SMALL and own in fields:
            sizes[own] = SMALL[standard]
    sizes |= {name: size for name, size in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields:  # every head has keys and values of its own
        sizes["num_key_value_heads"] = SMALL["num_attention_heads"]
    special = EXCEPTIONS.get(cls.model_type, {})
    inner = dict(_inner_configs(cls, special))
    for name, inner_cls in inner.items():
        inside = changes if name in ("text_config", "decoder") else {}
        sizes[name] = _config(inner_cls, {**inside, **special.get(name, {})}).to_dict()
    sizes |= {name: size for name, size in special.items() if name not in inner}
    if not {"text_config", "decoder"} & inner.keys():
        sizes |= changes
    return cls(**{name: size for name, size in sizes.items() if size is not LEFT_OUT})


def _inner_configs(
    cls: type[PreTrainedConfig], special: Mapping[str, Any]
) -> Iterator[tuple[str, type[PreTrainedConfig]]]:
    """The configurations inside of one, such as a wrapper's of its decoder."""
    needed = {name: value for name, value in special.items() if name.endswith("_config")}
    for name, value in vars(cls(**needed)).items():
        if isinstance(value, PreTrainedConfig):
            yield name, type(value)
