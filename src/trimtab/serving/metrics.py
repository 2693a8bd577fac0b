"""What a server counts, in the form that Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trimtab.serving.jobs import Answers

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counters of one server. Names of steerings are labels only as far as they are served, so
    that no client can make new ones."""

    def __init__(self, engine: Answers) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "trimtab_requests", "Requests by route and status.", ("route", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.steered = Counter(
            "trimtab_steered_answers", "Answers by steering.", ("steering",),
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter(
            "trimtab_tokens", "Tokens that were read or written.", ("kind",),
            registry=self.registry,
        )  # fmt: skip
        self.gates = Counter(
            "trimtab_gates", "Decisions of gates.", ("steering", "fired"), registry=self.registry
        )
        self.first = Histogram(
            "trimtab_first_token_seconds", "Time to the first token.", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.whole = Histogram(
            "trimtab_answer_seconds", "Time to the end of an answer.", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        for name, about, read in (
            ("trimtab_running", "Texts that are being written.", lambda: engine.running),
            ("trimtab_waiting", "Texts that wait for a place.", lambda: engine.waiting),
        ):
            Gauge(name, about, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Everything, as text."""
        return generate_latest(self.registry)
