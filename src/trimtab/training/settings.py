"""How long, how fast and in what portions the trainer works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """Settings of a training.

    A step is one of AdamW's, on `batch` rows of the contrast; a pass over all rows is an epoch,
    whose last batch may be smaller. `minutes` ends it earlier. The learning rate goes up over
    `warmup` steps and then, by the schedule, down to 0 at step `horizon` (None: at `steps`).
    Every `check_every` steps validation rows are read; after `patience` checks in a row without a
    better gain the training ends (0: it does not).
    """

    steps: int
    batch: int
    learning_rate: float
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: int = 0
    horizon: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    minutes: float | None = None
    check_every: int = 10
    patience: int = 0
    seed: int = 0
