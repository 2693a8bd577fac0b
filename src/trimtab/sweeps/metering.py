"""What work costs: seconds, tokens that the model read, peak memory; and what a steering adds to
generation (Table 11 of AUSteer's paper)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.contrasts import Prompt
from trimtab.evaluation import Attached, asked_with, steering_of
from trimtab.model import LanguageModel, UnsoundError, is_asking, row_steerings
from trimtab.reading import Engine

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Used:
    """What some work took. `tokens` counts positions that ran through the model, padding with
    them; `peak_bytes` is memory above what was in use before, None where it cannot be told (an
    engine takes all its memory when it starts)."""

    seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Overhead:
    """Generation with a steering (or words before prompts) beside the unsteered model: seconds per
    token of both (medians of interleaved rounds), their ratio, and peak memory of the steered one
    above the unsteered."""

    steered: float
    unsteered: float
    ratio: float
    peak_bytes: int | None


@contextmanager
def metered(language_model: LanguageModel, engine: Engine | None = None) -> Iterator[Used]:
    """Fills in what the work inside took, what an engine beside the model did of it with it."""
    used, device = Used(), language_model.device
    read = 0 if engine is None else engine.read

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is not None and not is_asking():  # which is done once, by whoever comes first
            used.tokens += tokens.numel()

    hook = language_model.anatomy.body.register_forward_pre_hook(count, with_kwargs=True)
    before = _reset_peak(device)
    started = time.perf_counter()
    try:
        yield used
    finally:
        hook.remove()
        used.seconds = round(time.perf_counter() - started, 3)
        peak = None
        if engine is None:
            peak = _peak(device)
        else:
            used.tokens += engine.read - read
        used.peak_bytes = None if peak is None or before is None else max(0, peak - before)


def overhead(
    language_model: LanguageModel,
    attached: Attached,
    prompts: Sequence[Prompt],
    new_tokens: int = 16,
    rounds: int = 3,
    engine: Engine | None = None,
) -> Overhead:
    """Measure generation with and without a steering, or words before the prompts, in turns; that
    of an engine, where one is given."""
    asked = asked_with(language_model, attached, prompts)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    peaks: dict[bool, list[int]] = {False: [], True: []}
    for number in range(rounds + 1):
        for steered in (False, True) if number % 2 else (True, False):
            steering = steering_of(attached) if steered else None
            with metered(language_model, engine) as used:
                given = asked if steered else prompts
                _generate(language_model, engine, given, steering, new_tokens)
            if number:  # the first round warms up
                seconds[steered].append(used.seconds / (len(prompts) * new_tokens))
                peaks[steered] += [] if used.peak_bytes is None else [used.peak_bytes]
    ratio = statistics.median(
        a / b for a, b in zip(seconds[True], seconds[False], strict=True) if b > 0
    )
    more = statistics.median(peaks[True]) - statistics.median(peaks[False]) if peaks[True] else None
    return Overhead(
        statistics.median(seconds[True]),
        statistics.median(seconds[False]),
        ratio,
        None if more is None else int(more),
    )


def _generate(
    language_model: LanguageModel,
    engine: Engine | None,
    prompts: Sequence[Prompt],
    steering: Any,
    count: int,
) -> None:
    """Have texts of so many tokens written, by the engine where there is one."""
    if engine is None:
        language_model.generate(
            prompts, max_new_tokens=count, min_new_tokens=count, steering=steering
        )
        return
    acting = [row_steerings(steering)] * len(prompts)
    length: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count}
    for some in engine.written(language_model.prompts(prompts, None), acting, **length):
        for _, made in some:
            if isinstance(made, UnsoundError):
                raise made


def _reset_peak(device: torch.device) -> int | None:
    """Forget the highest use of memory so far; what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        _REFERENCES.write_text("5", encoding="ascii")  # Linux: resets the high-water mark
    except OSError:
        return None
    return _peak(device)


def _peak(device: torch.device) -> int | None:
    """The highest use of memory since it was last forgotten."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None
