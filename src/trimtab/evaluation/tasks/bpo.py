"""BPO: answers to instructions, preferred or not by a judge (AUSteer; Black-Box Prompt
Optimization)."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.contrasts import Pair
from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    return Example(str(row["id"]), row["prompt"])


def _pairs(rows: Sequence[Row], protocol: Protocol, seed: int) -> list[Pair]:
    return [
        Pair(row["prompt"], row["good_res"], row["bad_res"])
        for row in rows
        if row["good_res"] != row["bad_res"]
    ]


TASK = Task(
    name="bpo",
    about="instructions; ΔWR of steered over unsteered answers by a pairwise judge",
    test=Source("bpo/test.jsonl", hub="THUDM/BPO", hub_split="test"),
    train=Source(
        "bpo/train.jsonl", "bpo/hh_harmless_pairs.jsonl", hub="THUDM/BPO", hub_split="train"
    ),
    columns={"prompt": str},
    train_columns={"prompt": str, "good_res": str, "bad_res": str},
    example=_example,
    generation=Generation(500),
    pairs=_pairs,
    group=lambda row: row["prompt"],
    measures=("coherence",),
    pairwise=True,
    differences="each pair of answers is judged in both orders",
    behaviour="give a helpful and thorough answer",
    opposite="give an unhelpful and careless answer",
)
