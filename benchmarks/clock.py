"""The stopwatch: contenders in turn, CPU seconds and wall seconds, ratios with their targets."""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

RESAMPLES = 2000


def one_thread() -> None:
    """Everything on one thread; call it before torch is imported. Children inherit it."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)


@dataclass
class Times:
    """What one contender took, round by round, in seconds."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


class Took(NamedTuple):
    """CPU and wall seconds of one run."""

    cpu: float
    wall: float


#: Runs a contender once. What it took by its own clock, as in another process, it returns as
#: `Took`; anything else that it returns is dropped.
Contender = Callable[[], object]


def interleaved(contenders: Mapping[str, Contender], rounds: int) -> dict[str, Times]:
    """Every contender once in each round; every other round in the opposite order.

    The caller has run each of them before, so that nothing here is a first time.
    """
    times = {name: Times() for name in contenders}
    for number in range(rounds):
        order = list(contenders)
        for name in order if number % 2 == 0 else reversed(order):
            cpu, wall = timed(contenders[name])
            times[name].cpu.append(cpu)
            times[name].wall.append(wall)
    return times


def timed(run: Contender) -> Took:
    """What one run took."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    took = Took(time.process_time() - cpu, time.perf_counter() - wall)
    return result if isinstance(result, Took) else took


@dataclass(frozen=True)
class Ratio:
    """A comparison: of the best rounds, the median over rounds, and what it should be.

    The target is for the best rounds, or with `of_median` for the median.
    """

    what: str
    best: float
    median: float
    at_least: float | None = None
    at_most: float | None = None
    of_median: bool = False
    interval: tuple[float, float] | None = None  # 95 %, of the median

    @property
    def target(self) -> str:
        if self.at_least is None and self.at_most is None:
            return ""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    @property
    def met(self) -> bool | None:
        """Whether it is what it should be; None where nothing was asked."""
        if not self.target:
            return None
        figure = self.median if self.of_median else self.best
        low = self.at_least is None or figure >= self.at_least
        return low and (self.at_most is None or figure <= self.at_most)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "target": self.target, "met": self.met}


def ratio(what: str, above: Times, below: Times, **target: Any) -> Ratio:
    """CPU seconds of one contender over those of another."""
    per_round = [a / b for a, b in zip(above.cpu, below.cpu, strict=True)]
    best, median = min(above.cpu) / min(below.cpu), statistics.median(per_round)
    return Ratio(what, best, median, interval=_of_median(per_round), **target)


def _of_median(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of a median by bootstrap; of few values that is about all of them."""
    draws = random.Random(0)
    medians = sorted(
        statistics.median(draws.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    return medians[RESAMPLES // 40], medians[-1 - RESAMPLES // 40]


@dataclass
class Report:
    """One benchmark's result. `n` counts what the name says: pairs, or rows of a batch."""

    name: str
    n: int
    times: dict[str, Times]
    ratios: list[Ratio]
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        times = {name: asdict(taken) for name, taken in self.times.items()}
        ratios = [ratio.as_json() for ratio in self.ratios]
        return {"name": self.name, "n": self.n, "times": times, "ratios": ratios, **self.facts}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch
    import transformers

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
