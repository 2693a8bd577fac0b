"""Where weights come from: packs, GGUF files, directories."""

from trimtab.checkpoints import packs
from trimtab.checkpoints.directory import (
    ADAPTER_CONFIG,
    CheckpointError,
    Misfit,
    check_adapter_files,
    check_files,
    damage_is_said,
    has_weights,
    is_adapter,
    not_finite,
    read_config,
    read_json,
    read_model,
    some,
)
from trimtab.checkpoints.packs import encoder_directory

__all__ = [
    "ADAPTER_CONFIG",
    "CheckpointError",
    "Misfit",
    "check_adapter_files",
    "check_files",
    "damage_is_said",
    "encoder_directory",
    "has_weights",
    "is_adapter",
    "not_finite",
    "packs",
    "read_config",
    "read_json",
    "read_model",
    "some",
]
