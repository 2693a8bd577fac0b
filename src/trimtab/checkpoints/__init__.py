"""Where weights come from: packs, GGUF files, directories."""

from trimtab.checkpoints import packs
from trimtab.checkpoints.directory import (
    ADAPTER_CONFIG,
    CheckpointError,
    Misfit,
    check_adapter_files,
    check_files,
    damage_is_said,
    first_line,
    has_weights,
    is_adapter,
    not_finite,
    read_config,
    read_json,
    read_model,
    some,
)
from trimtab.checkpoints.packs import encoder_directory
