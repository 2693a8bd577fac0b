"""Features chosen by how answers went, against plain hidden states and numpy; and what is no file
of outcomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab as tt
from autoencoders import CONTRAST, FEATURES, autoencoder, library, tiny_lm, vector_of
from helpers import refused_in_one_line, relative
from tiny import tiny_tokenizer
from trimtab.methods import describe, explain

__all__ = ["autoencoder"]  # fixtures, which pytest finds by their names here

ROWS: list[dict[str, Any]] = [
    {"prompt": "The king looked at the ship and", "answer": " sang.", "outcome": 1},
    {"prompt": "The king looked at the map and", "answer": " did not like it at all", "outcome": 0},
    {"prompt": "She said that the day was", "answer": " good", "outcome": 1},
    {"prompt": "She said that the film was", "answer": " bad and long!", "outcome": 0},
    {"prompt": "Today I feel", "answer": " happy and light.", "outcome": 1},
    {"prompt": "The old fire in the rain was", "answer": " true.", "outcome": 0},
    {"prompt": "It is", "answer": " right", "outcome": 0},
]


def _write(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _pooled(sae: Any, pool: str) -> torch.Tensor:
    """Of each answer what the features were where it was written, [answers, features]: at the
    prompt's last token, and at each of its own that another one followed."""
    model: Any = tiny_lm().model
    found = []
    for row in ROWS:
        start = len(tiny_tokenizer()(row["prompt"])["input_ids"])
        ids = tiny_tokenizer()(row["prompt"] + row["answer"])["input_ids"]
        with torch.no_grad():
            states = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
            active = sae.encode(states.hidden_states[2][0]).double()[start - 1 : len(ids) - 1]
        found.append(active.amax(0) if pool == "max" else active.mean(0))
    return torch.stack(found)


def _fitted(path: Path, outcomes: str, **options: Any) -> tt.Steering:
    method = tt.SAE(str(path), by="correlation", outcomes=outcomes, **options)
    return method.fit(tiny_lm(), CONTRAST, measure=False)


@pytest.mark.filterwarnings("ignore:sae. outcomes go with the length")
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_features_that_go_with_outcomes(
    autoencoder: Callable[..., Path], tmp_path: Path, pool: str
) -> None:
    path = autoencoder("standard")
    sae, y = library(path), np.array([float(row["outcome"]) for row in ROWS])
    pooled = _pooled(sae, pool)
    with np.errstate(invalid="ignore"):
        r = [np.corrcoef(pooled[:, i].numpy(), y)[0, 1] for i in range(FEATURES)]
    r = np.nan_to_num(r)
    best = np.argsort(-r, kind="stable")[:3]
    steering = _fitted(path, _write(tmp_path / "rows.jsonl"), pool=pool, k=3)
    assert steering.tables["feature"].tolist() == best.tolist()
    assert steering.tables["r"].tolist() == pytest.approx(r[best].tolist(), abs=1e-5)
    # Added is the mean over the answers that went well.
    means = pooled[y == 1][:, best].mean(0)
    assert relative(vector_of(steering), means @ sae.W_dec.detach()[best].double()) < 1e-4
    about = steering.findings["outcomes"]
    assert (about["rows"], about["successful"]) == (7, 3)
    assert "7 answers, 3 of which went well" in " ".join(explain(steering))


def test_scores_are_outcomes_whatever_their_unit(
    autoencoder: Callable[..., Path], tmp_path: Path
) -> None:
    path = autoencoder("standard")
    scores = [0.9, 0.1, 0.7, 0.4, 0.6, 0.2, 0.3]
    rows = [row | {"outcome": score} for row, score in zip(ROWS, scores, strict=True)]
    tens = [row | {"outcome": 10 * score - 3} for row, score in zip(ROWS, scores, strict=True)]
    one = _fitted(path, _write(tmp_path / "a.jsonl", rows), pool="mean")
    other = _fitted(path, _write(tmp_path / "b.jsonl", tens), pool="mean")
    assert torch.equal(one.tables["feature"], other.tables["feature"])
    assert one.tables["r"].tolist() == pytest.approx(other.tables["r"].tolist())
    assert torch.equal(vector_of(one), vector_of(other))


def test_records_of_an_evaluation(autoencoder: Callable[..., Path], tmp_path: Path) -> None:
    """Those of the unsteered model; what was written under a steering is left out."""
    path = autoencoder("standard")
    records = [
        {
            "task": "t", "prompt": row["prompt"], "output": row["answer"], "steering": None,
            "values": {"accuracy": float(row["outcome"]), "answered": 1.0},
        }
        for row in ROWS
    ]  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    _write(run / "records.jsonl", [*records, {**records[0], "steering": "caa alpha=1"}])
    with pytest.warns(tt.TrimtabWarning, match="1 answers were written under a steering"):
        steering = _fitted(path, str(run), pool="mean")
    plain = _fitted(path, _write(tmp_path / "rows.jsonl"), pool="mean")
    assert torch.equal(vector_of(steering), vector_of(plain))
    (record,) = describe(steering)["features"]
    assert {"feature", "layer", "site", "a_max", "mean", "r"} == set(record)


def test_outcomes_that_go_with_lengths_are_said(
    autoencoder: Callable[..., Path], tmp_path: Path
) -> None:
    longer = [
        row | {"answer": row["answer"] + row["outcome"] * " and light and good and happy"}
        for row in ROWS
    ]
    path, rows = autoencoder("standard"), _write(tmp_path / "rows.jsonl", longer)
    with pytest.warns(tt.TrimtabWarning, match="outcomes go with the length"):
        steering = _fitted(path, rows)
    lengths = [
        len(tiny_tokenizer()(r["prompt"] + r["answer"])["input_ids"])
        - len(tiny_tokenizer()(r["prompt"])["input_ids"])
        for r in longer
    ]
    expected = np.corrcoef(lengths, [row["outcome"] for row in ROWS])[0, 1]
    assert steering.findings["outcomes"]["length_r"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "a", "answer": " b", "outcome": 1}], "all went alike"),
        ([{"prompt": "a", "outcome": 1}], "row 1: rows of outcomes have prompt, answer"),
        ([{"prompt": "a", "answer": " b"}], "row 1: the outcome must be a number"),
        ([{"prompt": "a", "answer": " b", "outcome": "well"}], "not 'well'"),
        (
            [{"prompt": "a", "answer": "", "outcome": o} for o in (0, 1)],
            "no answers are left that went differently",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*are left out")
def test_what_are_no_outcomes_is_refused(
    autoencoder: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]], says: str
) -> None:
    path = autoencoder("standard")
    refused_in_one_line(lambda: _fitted(path, _write(tmp_path / "rows.jsonl", rows)), says)


def test_a_file_that_is_not_there(autoencoder: Callable[..., Path]) -> None:
    path = autoencoder("standard")
    refused_in_one_line(lambda: _fitted(path, "nowhere.jsonl"), "cannot read the outcomes")
