"""A model over many texts, with nothing computed twice."""

from trimtab.reading.likelihood import cross_entropy, log_odds, preference, side_readings
from trimtab.reading.next_tokens import (
    Next,
    Reading,
    last_logits,
    next_tokens,
    prompt_reading,
    read_columns,
)
from trimtab.reading.packing import (
    Batch,
    Packed,
    batches,
    encode_contrast,
    encode_texts,
    run_packed,
)
from trimtab.reading.streams import StreamCache, blocks_below, run_lower, run_upper

__all__ = [
    "Batch",
    "Next",
    "Packed",
    "Reading",
    "StreamCache",
    "batches",
    "blocks_below",
    "cross_entropy",
    "encode_contrast",
    "encode_texts",
    "last_logits",
    "log_odds",
    "next_tokens",
    "preference",
    "prompt_reading",
    "read_columns",
    "run_lower",
    "run_packed",
    "run_upper",
    "side_readings",
]
