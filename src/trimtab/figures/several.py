"""Differences between what was answered to the same rows, corrected for how many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from trimtab.figures.records import Record
from trimtab.figures.significance import Difference, corrected, paired_difference

Key = TypeVar("Key")


def differences(
    pairs: Mapping[Key, tuple[Sequence[Record], Sequence[Record]]], metric: str, more: bool
) -> dict[Key, Difference]:
    """Second minus first of each pair of records, corrected for the number of pairs (Holm); `more`
    says whether more of the metric is better."""
    found = {}
    for key, (first, second) in pairs.items():
        both = [each for each in changes_of(first, second, metric) if each is not None]
        if both:
            changes = torch.tensor(both, dtype=torch.float64)
            flips = set(both) <= {-1, 0, 1}
            found[key] = paired_difference(changes, flips=flips, more=more)
    return dict(zip(found, corrected(list(found.values())), strict=True))


def changes_of(
    first: Sequence[Record], second: Sequence[Record], metric: str
) -> list[float | None]:
    """Second minus first of each row; None where one of them has no clear value."""
    found: list[float | None] = []
    for before, after in zip(first, second, strict=True):
        old, new = before["values"].get(metric), after["values"].get(metric)
        found.append(None if None in (old, new) else new - old)
    return found
