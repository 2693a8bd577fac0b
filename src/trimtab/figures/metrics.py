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
    magnitude; None: as far as the values go. `says` is what people call it, where that is not its
    name with spaces.
    """

    name: str
    kind: Literal["rate", "mean"] = "rate"
    better: Literal["more", "less"] = "more"
    unit: str = ""
    range: tuple[float, float] | None = None
    says: str = ""

    @property
    def is_share(self) -> bool:
        """Whether it is a part of 1, which people read in %."""
        return self.unit == "share"

    @property
    def said_unit(self) -> str:
        """The unit that is said with a figure: nats; of shares % is, others have none."""
        return self.unit if self.unit.startswith("nats") else ""

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
        Metric("gate_fired", unit="share", range=_SHARE, says="share at which the gate fired"),
        Metric("prefers", unit="share", range=_SHARE),
        Metric("log_odds", "mean", unit="nats", says="log-odds"),
        Metric("cross_entropy", "mean", "less", "nats per token", says="cross-entropy"),
        Metric("plain_text_cost", "mean", "less", "nats per token", says="cost on plain text"),
        Metric("refusal", unit="share", range=_SHARE),
        Metric("refusal_of_unsafe", unit="share", range=_SHARE, says="refusal of unsafe prompts"),
        Metric("over_refusal", "rate", "less", "share", _SHARE, says="over-refusal"),
        Metric("attack_success", "rate", "less", "share", _SHARE),
        Metric("not_toxic", unit="share", range=_SHARE),
        Metric("toxicity", "mean", "less", "0 to 1"),
        Metric("perplexity", "mean", "less", "by the unsteered model", _ENDLESS),
        Metric(
            "self_perplexity", "mean", "less", "by the steered model", _ENDLESS, "self-perplexity"
        ),
        Metric("language_consistency", "mean", unit="share", range=_SHARE),
        Metric("same_language", unit="share", range=_SHARE, says="answers in their own language"),
        Metric("compression_ratio", "mean", unit="bytes/byte"),
        Metric("repetition_4gram", "mean", "less", "share", says="repeated 4-grams"),
        Metric("delta_wr", "mean", says="wins minus losses"),
        Metric("first_shown", "mean"),
        *(Metric(name, unit="share") for name in ("win", "loss", "tie", "turned")),
    )
}


def metric_of(name: str) -> Metric:
    """What is known of a metric; in brackets its name may say whose it is, as in
    `attack_success (phrases)`."""
    bare = bare_name(name)
    return METRICS.get(bare, Metric(bare))


def more_is_better(name: str) -> bool:
    """Whether more of a metric is better."""
    return metric_of(name).better == "more"


def bare_name(name: str) -> str:
    """A metric's name without what it says in brackets."""
    return name.partition(" (")[0]


def words_for(name: str) -> str:
    """What people call a metric: `log_odds` is log-odds; what is in brackets stays."""
    bare, bracket, rest = name.partition(" (")
    return (metric_of(name).says or bare.replace("_", " ")) + bracket + rest


def with_unit(name: str) -> str:
    """A metric in words with what it is measured in, where that does not go without saying."""
    return ", ".join(filter(None, (words_for(name), metric_of(name).said_unit)))


def on_task(name: str, task: str) -> str:
    """`log-odds on copa, nats`: over a table of its figures."""
    return ", ".join(filter(None, (f"{words_for(name)} on {task}", metric_of(name).said_unit)))
