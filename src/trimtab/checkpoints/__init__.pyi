# What is in this folder for others. __init__.py loads each when it is asked for.

from . import packs
from .baked import (
    CARD,
    RECORD,
    baked_already,
    baked_content,
    in_words,
    read_baked,
    write_baked,
    write_record,
)
from .directory import (
    ADAPTER_CONFIG,
    CheckpointError,
    Misfit,
    check_adapter_files,
    check_files,
    check_tokenizer_files,
    damage_is_said,
    has_weights,
    is_adapter,
    not_finite,
    read_config,
    read_json,
    read_model,
    some,
)
from .gguf import attention_scale, gguf_tensors
from .gguf_metadata import BAKED, Metadata, metadata_of
from .gguf_tokenizer import tokenizer_metadata
from .hub import Found, find_on_hub
from .memory import Counts, counted, counted_on_hub, weight_bytes
from .packs import encoder_directory

__all__ = [
    "ADAPTER_CONFIG",
    "BAKED",
    "CARD",
    "RECORD",
    "CheckpointError",
    "Counts",
    "Found",
    "Metadata",
    "Misfit",
    "attention_scale",
    "baked_already",
    "baked_content",
    "check_adapter_files",
    "check_files",
    "check_tokenizer_files",
    "counted",
    "counted_on_hub",
    "damage_is_said",
    "encoder_directory",
    "find_on_hub",
    "gguf_tensors",
    "has_weights",
    "in_words",
    "is_adapter",
    "metadata_of",
    "not_finite",
    "packs",
    "read_baked",
    "read_config",
    "read_json",
    "read_model",
    "some",
    "tokenizer_metadata",
    "weight_bytes",
    "write_baked",
    "write_record",
]
