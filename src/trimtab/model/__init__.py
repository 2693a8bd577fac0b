"""A model in memory: load or wrap it, steer it, bake it."""

from trimtab.model.attach import finds_dials, turned
from trimtab.model.baking import bake
from trimtab.model.decoding import OPTIONS, are_sound, left_aside, unsound
from trimtab.model.language_model import (
    Completion,
    LanguageModel,
    SteeringArgument,
    per_text,
    row_steerings,
)
from trimtab.model.loading import load, locations, wrap
from trimtab.model.packing import (
    BATCH_ROWS,
    Batch,
    Packed,
    batches,
    batches_by_length,
    encode_contrast,
    encode_texts,
    refuse_dropout,
    run_packed,
)
from trimtab.model.saving import check_target
from trimtab.model.versions import cache_argument, warn_if_untested

__all__ = [
    "BATCH_ROWS",
    "OPTIONS",
    "Batch",
    "Completion",
    "LanguageModel",
    "Packed",
    "SteeringArgument",
    "are_sound",
    "bake",
    "batches",
    "batches_by_length",
    "cache_argument",
    "check_target",
    "encode_contrast",
    "encode_texts",
    "finds_dials",
    "left_aside",
    "load",
    "locations",
    "per_text",
    "refuse_dropout",
    "row_steerings",
    "run_packed",
    "turned",
    "unsound",
    "warn_if_untested",
    "wrap",
]

warn_if_untested()
