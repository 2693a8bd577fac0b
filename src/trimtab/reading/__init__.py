"""A model over many texts, with nothing computed twice."""

from trimtab.reading.likelihood import cross_entropy, log_odds, preference, side_readings
from trimtab.reading.next_tokens import Next, Reading, after, next_tokens, plan
from trimtab.reading.streams import Kept, begin, blocks_below, grouped, resume

__all__ = [
    "Kept",
    "Next",
    "Reading",
    "after",
    "begin",
    "blocks_below",
    "cross_entropy",
    "grouped",
    "log_odds",
    "next_tokens",
    "plan",
    "preference",
    "resume",
    "side_readings",
]
