"""A model over many texts, with nothing computed twice."""

from trimtab.reading.likelihood import cross_entropy, log_odds, preference, side_readings
from trimtab.reading.next_tokens import (
    Next,
    Reading,
    last_logits,
    next_tokens,
    plan,
    prompt_reading,
    read_columns,
)
from trimtab.reading.streams import StreamCache, blocks_below, run_lower, run_upper

__all__ = [
    "Next",
    "Reading",
    "StreamCache",
    "blocks_below",
    "cross_entropy",
    "last_logits",
    "log_odds",
    "next_tokens",
    "plan",
    "preference",
    "prompt_reading",
    "read_columns",
    "run_lower",
    "run_upper",
    "side_readings",
]
