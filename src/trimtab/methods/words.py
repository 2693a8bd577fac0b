"""Words that methods share when they say what a steering of theirs does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trimtab.anatomy import parse_site
from trimtab.steering import Steering, steered_blocks


def adds_vectors(name: str, steering: Steering, what: str) -> list[str]:
    """Of a method that adds vectors to the residual stream: where, how long, and what they are."""
    lengths = [
        abs(each.weight) * float(each.operator.added.norm())
        for each in steering.interventions
        if each.operator.added is not None
    ]
    blocks = steered_blocks(steering)
    at_one = f"at {steering.dial.name} 1"
    if len(lengths) == 1:
        (block,) = {parse_site(each.site)[0] for each in steering.interventions}
        where = "before the first block" if block is None else f"after block {block}"
        return [
            f"{name} adds one vector (length {lengths[0]:.2f} {at_one}) to the residual stream "
            f"{where}.",
            f"The vector is {what}.",
        ]
    return [
        f"{name} adds a vector to the residual stream after each of the blocks "
        f"{ranges(blocks)} (length {min(lengths):.2f} to {max(lengths):.2f} {at_one}).",
        f"Each vector is {what}.",
    ]


def difference_read_at(token: str | int) -> str:
    """The difference of the two sides' means, and which token it was read at."""
    return (
        f"the mean activation of the positive texts, {read_at(token)}, minus that of the negative "
        "ones"
    )


def read_at(token: str | int) -> str:
    """Which token of a text was read."""
    places = {
        "mean": "averaged over all tokens",
        "answer": "averaged over the answer's tokens",
        "last": "at the last token",
        "-1": "at the last token",
        "-2": "at the token before the last",
    }
    return places.get(str(token)) or f"at token {token} (from the end)"


def counted(records: Sequence[dict[str, Any]]) -> str:
    """Layers with how many of the records each has: `layers 3 (2 of them), 5 (1)`."""
    counts = sorted(Counter(record["layer"] for record in records).items())
    if len(counts) == 1:
        return f"layer {counts[0][0]}"
    (first, count), *rest = counts
    return ", ".join([f"layers {first} ({count} of them)", *(f"{n} ({c})" for n, c in rest)])


def percent(shares: Sequence[float]) -> str:
    """From the lowest share to the highest: `60% to 90%`."""
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def ranges(numbers: Sequence[int]) -> str:
    """`4-7, 9` for 4, 5, 6, 7, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
