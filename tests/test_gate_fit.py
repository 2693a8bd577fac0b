"""Fitting gates: what is planted is found, thresholds are the best ones, figures are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from gates_by_hand import prompt_score, stream
from helpers import language_model, refused_in_one_line, steer, write_pairs
from trimtab.contrasts import Contrast
from trimtab.fitting.classifiers import best_threshold, f1_of, logistic
from trimtab.fitting.gates import _pairwise
from trimtab.steering import Add, Condition, Gate

WORDS = ["ship", "rudder", "map", "day", "film", "answer", "way", "sea", "letter", "friend"]


def texts(word: str, count: int, shift: int = 0, last: bool = False) -> list[str]:
    """Texts that hold a word among others, or as their last one."""
    rows = [(WORDS[(i + shift) % 10], f"{WORDS[(3 * i + shift) % 10]} {i}") for i in range(count)]
    return [f"{a} {b} {word}" if last else f"{a} {word} {b}" for a, b in rows]


def planted(last: bool = False) -> Contrast:
    """Texts with one word, and texts with another one in its place."""
    one, other = ("happy", "sad") if last else ("please", "never")
    return Contrast.from_texts(texts(one, 40, last=last), texts(other, 40, last=last))


@pytest.mark.parametrize("kind", ["token", "latched", "two-pass"])
@pytest.mark.parametrize("score", ["cosine", "projection", "probe", "compat"])
def test_a_planted_word_is_found(kind: Any, score: Any) -> None:
    lm = language_model("llama")
    gate = tt.fit_gate(
        lm, planted(kind == "token"), kind=kind, score=score, chat=False,
        unrelated={"others": texts("quite", 12)},
    )  # fmt: skip
    test = gate.findings["test"]
    assert test["f1"] > (0.7 if score == "compat" else 0.8)
    assert test["positive"]["n"] + test["negative"]["n"] == 16
    low, high = test["positive"]["ci95"]
    assert 0 <= low <= test["positive"]["fired"] <= high <= 1
    assert {each["site"] for each in gate.findings["sites"]} == {
        f"layers.{i}.resid" for i in range(lm.anatomy.layers)
    }
    others = gate.findings["unrelated"]["others"]
    assert others["n"] == 12
    assert ("tokens_fired" in others) == (kind == "token")
    assert gate.contrast["rows"] == len(planted().with_parts().train)


def test_figures_are_those_of_a_plain_loop() -> None:
    lm = language_model("llama")
    contrast = planted().with_parts()
    gate = tt.fit_gate(
        lm, contrast, kind="latched", score="cosine", sites=["layers.1.resid"], chat=False
    )
    (condition,) = gate.conditions

    def score(text: Any) -> float:
        ids = lm.tokenizer(text)["input_ids"]
        return prompt_score(lm.model, ids, 1, "cosine", condition.direction, range(1, len(ids)))

    train = contrast.train
    sides: dict[str, Any] = {"positive": [], "negative": []}
    for row in train.texts:
        ids = lm.tokenizer(row.text)["input_ids"]
        sides[row.label].append(stream(lm.model, ids, 1)[1:].mean(0))
    means = {side: torch.stack(rows).mean(0) for side, rows in sides.items()}
    difference = means["positive"] - means["negative"]
    assert torch.allclose(condition.direction.double(), difference, atol=1e-6)
    fired = {side: [] for side in sides}
    for row in contrast.part("test").texts:
        fired[row.label].append(score(row.text) > condition.threshold)
    right = sum(fired["positive"])
    f1 = 2 * right / (right + sum(fired["negative"]) + len(fired["positive"]))
    assert gate.findings["test"]["f1"] == pytest.approx(f1)
    assert gate.findings["test"]["positive"]["fired"] == pytest.approx(right / 8)


@pytest.mark.parametrize("both", [False, True])
def test_the_threshold_has_the_best_f1_of_all(both: bool) -> None:
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        positive = torch.rand(25, generator=generator) < 0.4
        sign = -1 if both and seed % 2 else 1
        scores = torch.randn(25, generator=generator) + sign * positive.double()
        fires, threshold = best_threshold(scores, positive, both)
        found = f1_of(scores > threshold if fires == "above" else scores < threshold, positive)
        ends = [
            (a + b) / 2
            for a, b in zip(*[scores.sort().values.tolist()[i:] for i in (0, 1)], strict=False)
        ]
        best = max(
            max(f1_of(scores > end, positive), f1_of(scores < end, positive) if both else 0.0)
            for end in ends
        )
        assert found == pytest.approx(best)


def test_no_threshold_is_between_scores_that_are_one_number() -> None:
    scores, positive = torch.tensor([1.0, 1, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 1, 1]).bool()
    fires, threshold = best_threshold(scores, positive, False)
    assert (fires, threshold) == ("above", 1.5)  # 1 would seem to tell the four apart


def test_directions_of_probe_and_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(20, generator=generator)
    positive = torch.arange(60) % 2 == 0
    x = torch.randn(60, 20, generator=generator) + torch.where(positive, 1.0, -1.0)[:, None] * v
    half = (x[positive] - x[~positive]).double()
    _, vectors = torch.linalg.eigh(half.T @ half)
    top = vectors[:, -1]
    found = _pairwise(x, positive)
    assert abs(float(found.double() @ top)) == pytest.approx(1, abs=1e-5)
    assert float(found @ v) > 0
    direction, bias = logistic(x, positive, 0.1)
    assert ((x @ direction + bias > 0) == positive).double().mean() > 0.95


def test_candidates_are_below_what_is_steered() -> None:
    lm = language_model("llama")
    steering = steer(lm, ("layers.1.ffn_in", Add(torch.ones(lm.anatomy.width("layers.1.ffn_in")))))
    gate = tt.fit_gate(lm, planted(), kind="token", below=steering, chat=False)
    assert gate.sites == ("layers.0.resid",)
    steering.gated(gate)
    first = steer(lm, ("embed", Add(torch.ones(lm.anatomy.width("embed")))))
    refused_in_one_line(
        lambda: tt.fit_gate(lm, planted(), kind="latched", below=first), "no site is below"
    )
    free = tt.fit_gate(lm, planted(), below=first, chat=False)
    assert free.findings["sites"]


def test_mistakes_of_fits() -> None:
    lm = language_model("llama")
    few = Contrast.from_texts(["a", "b"], ["c", "d"])
    for arguments, says in (
        ({"kind": "once"}, "kind"),
        ({"score": "dot"}, "score"),
        ({"any_of": 0}, "any_of"),
        ({"sites": ["layers.99.resid"]}, "layer"),
        ({"reads": "generated"}, "cannot read"),
        ({"kind": "token", "reads": "all[1:]"}, "single tokens"),
        ({"reads": "token(3)", "chat": False}, "nothing can be read"),
    ):
        refused_in_one_line(lambda more=arguments: tt.fit_gate(lm, planted(), **more), says)
    refused_in_one_line(lambda: tt.fit_gate(lm, few), "too few")


def test_more_than_one_condition_where_one_is_not_enough() -> None:
    lm = language_model("llama")
    one = tt.fit_gate(lm, planted(), any_of=1, chat=False)
    three = tt.fit_gate(lm, planted(), any_of=3, chat=False)
    assert len(one.conditions) == 1
    assert len(three.conditions) <= 3
    assert three.findings["validation"]["f1"] >= one.findings["validation"]["f1"]


@pytest.mark.slow
def test_sweeps_and_comparisons_under_a_gate(tmp_path: Path) -> None:
    """A gate that never fires leaves the unsteered model; one that always does leaves nothing out;
    a run goes on under its own gate only."""
    lm = language_model("llama")
    task = write_pairs(tmp_path / "pairs.jsonl")
    site = "layers.0.attn_norm"
    direction = torch.ones(lm.anatomy.width(site))
    never, always = (
        Gate((Condition(site, direction, sign * 1e9, score="projection"),)) for sign in (1, -1)
    )
    always.save(tmp_path / "always.st")

    def swept(**more: Any) -> Any:
        space = {"alpha": (2.0, 30.0)}
        return tt.sweep(lm, "austeer", task, space, fixed={"k": 9}, metric="log_odds", **more)

    plain, idle = swept(), swept(gate=never, output=tmp_path / "run")
    same = swept(gate=str(tmp_path / "always.st"))
    assert [each.value for each in same.trials] == [each.value for each in plain.trials]
    assert [each.value for each in idle.trials] == [idle.unsteered["validation"].value] * 2
    assert idle.steering is not None
    assert idle.steering.gate is never
    assert tt.Steering.load(tmp_path / "run" / "best.safetensors").gate is not None
    refused_in_one_line(lambda: swept(gate=always, output=tmp_path / "run"), "gate")
    again = swept(gate=never, output=tmp_path / "run")
    assert [each.value for each in again.trials] == [each.value for each in idle.trials]
    candidates = [tt.Candidate("caa", {"layer": (1,)}), tt.Candidate("austeer", {"k": (9,)})]
    beside = tt.compare(lm, candidates, task, gate=never, metric="log_odds", timed=False)
    for row in beside.rows:
        assert row.test is not None
        assert row.test.value == pytest.approx(beside.unsteered["test"].value)


def test_one_text_of_a_side_is_enough_to_choose_by(tmp_path: Path) -> None:
    """It has no spread, and what is found is a file all the same."""
    lines = [
        {"text": text, "label": label, "part": part}
        for word, label in (("please", "positive"), ("never", "negative"))
        for text, part in zip(texts(word, 6), [*["train"] * 4, "validation", "test"], strict=True)
    ]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, lines)))
    few = Contrast.from_jsonl(tmp_path / "few.jsonl")
    lm = language_model("llama")
    gate = tt.fit_gate(lm, few, chat=False)
    gate.save(tmp_path / "few.st")
    assert tt.Gate.load(tmp_path / "few.st").findings == gate.findings
    refused_in_one_line(lambda: tt.fit_gate(lm, few, unrelated={"x": []}), "'x' has no text")
