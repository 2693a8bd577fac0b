"""What is known of a metric by its name: this table, and nothing beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A metric of the records.

    A `rate` is the share of examples for which something holds, a `mean` one also where every value
    happens to be 0 or 1. `better` says which way it counts, `unit` what it is measured in. `range`
    is what charts show whole, and with no end a metric that a collapse sends up by orders of
    magnitude; None: as far as the values go.
    """

    name: str
    kind: Literal["rate", "mean"] = "rate"
    better: Literal["more", "less"] = "more"
    unit: str = ""
    range: tuple[float, float] | None = None

    @property
    def unbounded(self) -> bool:
        """Whether it goes up by orders of magnitude."""
        return self.range is not None and math.isinf(self.range[1])


_SHARE = (0.0, 1.0)
_ENDLESS = (1.0, math.inf)

#: Metrics by name. Any other one is a rate of which more is better.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", unit="share", range=_SHARE),
        Metric("answered", unit="share", range=_SHARE),
        Metric("prefers", unit="share", range=_SHARE),
        Metric("log_odds", "mean", unit="nats"),
        Metric("cross_entropy", "mean", "less", "nats per token"),
        Metric("plain_text_cost", "mean", "less", "nats per token"),
        Metric("refusal", unit="share", range=_SHARE),
        Metric("refusal_of_unsafe", unit="share", range=_SHARE),
        Metric("over_refusal", "rate", "less", "share", _SHARE),
        Metric("attack_success", "rate", "less", "share", _SHARE),
        Metric("not_toxic", unit="share", range=_SHARE),
        Metric("toxicity", "mean", "less", "0 to 1"),
        Metric("perplexity", "mean", "less", "by the unsteered model", _ENDLESS),
        Metric("self_perplexity", "mean", "less", "by the steered model", _ENDLESS),
        Metric("language_consistency", "mean", unit="share", range=_SHARE),
        Metric("compression_ratio", "mean", unit="bytes/byte"),
        Metric("repetition_4gram", "mean", "less", "share"),
        Metric("delta_wr", "mean"),
        Metric("first_shown", "mean"),
    )
}


def metric_of(name: str) -> Metric:
    """What is known of a metric; in brackets its name may say whose it is, as in
    `attack_success (phrases)`."""
    bare = bare_name(name)
    return METRICS.get(bare, Metric(bare))


def bare_name(name: str) -> str:
    """A metric's name without what it says in brackets."""
    return name.partition(" (")[0]
