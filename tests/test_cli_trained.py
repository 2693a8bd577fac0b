"""`trimtab fit ssv|bipo|reps`, and what `inspect` says of what was learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import trimtab as tt
from commands import PAIRS, Command, home, trimtab, work

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

FIT = "-m model -c parts.jsonl --layer 1 --steps 10"


@pytest.fixture
def parts(work: Path) -> Path:
    rows = [
        {**row, "part": "validation" if number > 1 else "train"} for number, row in enumerate(PAIRS)
    ]
    path = work / "parts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.usefixtures("parts")
def test_what_was_learnt_is_told(trimtab: Command) -> None:
    found = trimtab(f"fit reps {FIT} --patience 0 --factors 1,2 --cache kept -o a.st --json").json
    told = found["findings"]["training"]
    assert told["steps"] == 10
    assert told["validation_rows"] == 2
    assert list(told["validation_gain"]) == [str(step) for step in range(1, 11)]
    assert {"loss", "margin_add", "margin_sub", "seconds", "best_step", "ended"} <= set(told)
    assert found["hyperparameters"]["factors"] == [1.0, 2.0]
    assert found["dial"]["name"] == "alpha"
    assert trimtab("inspect a.st --json").json["findings"] == found["findings"]
    said = trimtab("inspect a.st").text
    assert "RePS adds a vector at layers.1.resid" in said
    assert "On 2 validation rows it gains most at step" in said
    assert "the loss went from" in said
    # A second time everything is read from the cache.
    again = trimtab(f"fit reps {FIT} --patience 0 --factors 1,2 --cache kept -o b.st --json").json
    assert again["findings"] == found["findings"]
    one, other = (tt.Steering.load(name).interventions[0].operator for name in ("a.st", "b.st"))
    assert torch.equal(one.vector, other.vector)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("method", ["ssv", "bipo"])
def test_from_the_command_line_as_from_python(trimtab: Command, work: Path, method: str) -> None:
    options = "--learning-rate 0.1 --batch 1 --seed 3 --patience 0 --site ffn_out --positions last"
    trimtab(f"fit {method} {FIT} {options} -o a.st --json")
    made = {"ssv": tt.SSV, "bipo": tt.BiPO}[method](
        layer=1, steps=10, learning_rate=0.1, batch=1, seed=3, patience=0, site="ffn_out",
        positions="last",
    ).fit(tt.load("model"), tt.Contrast.from_jsonl("parts.jsonl"))  # fmt: skip
    saved = tt.Steering.load("a.st")
    assert list(saved.sites) == list(made.sites) == ["layers.1.ffn_out"]
    assert torch.equal(
        saved.interventions[0].operator.vector, made.interventions[0].operator.vector
    )
    assert "loss" in trimtab("inspect a.st").text


def test_mistakes_end_in_one_line(trimtab: Command, work: Path) -> None:
    rows = [
        {"text": row["prompt"] + row[side], "label": side}
        for row in PAIRS
        for side in ("positive", "negative")
    ]
    (work / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in ("bipo", "reps"):
        ran = trimtab(f"fit {method} -m model -c texts.jsonl -o a.st")
        assert ran.status == 2
        assert "give it rows with prompt, positive and negative" in ran.err
        assert ran.err.count("\n") == 1
    for wrong in ("--steps 0", "--learning-rate 0", "--preset large", "--layer 9"):
        ran = trimtab(f"fit ssv -m model -c pairs.jsonl {wrong} -o a.st")
        assert ran.status == 2, wrong
        assert ran.err.count("\n") == 1
    assert not (work / "a.st").exists()
