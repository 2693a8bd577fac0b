# What is in this folder for others. __init__.py loads each when it is asked for.

from . import packs
from .directory import (
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
from .packs import encoder_directory

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
