"""Concepts found in texts, and vectors at each layer and strength, against plain loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import block, hand_hooked, language_model, token_ids, write_pairs
from trimtab.papers.detection import detection
from trimtab.papers.layer_curves import layer_curves

SITE = "layers.1.resid"


def write_set(directory: Path, name: str, counts: tuple[int, int] = (6, 5)) -> None:
    """Texts of two concepts, sea and sums, in AxBench's columns."""
    words = {"0": "wave ship tide", "1": "seven plus nine", "-1": "door chair lamp"}
    (directory / "axbench").mkdir()
    for end, count in zip(("train", "eval"), counts, strict=True):
        rows = []
        for concept, text in words.items():
            for i in range(count):
                row = {"input": f"Tell me {i}", "output_concept": text, "concept_id": concept}
                kind = "negative" if concept == "-1" else "positive"
                if end == "eval" and concept == "-1":
                    for other in ("0", "1"):
                        hard = "hard negative" if i == 0 else "negative"
                        mine = {**row, "output": f"{text} {i}", "category": hard}
                        rows.append({**mine, "concept_id": other})
                    continue
                rows.append({**row, "output": f"{text} {i} and", "category": kind})
        file = directory / "axbench" / f"{name}_{end}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def activations(lm: tt.LanguageModel, text: str) -> torch.Tensor:
    """[tokens, units] at the output of block 1."""
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        seen.append(x[0].double())
        return x

    with hand_hooked(block(lm.model, 1), keep):
        lm.model(input_ids=torch.tensor([token_ids(text)]), use_cache=False)
    return seen[0]


def test_auroc_of_each_concept_by_a_loop(tmp_path: Path) -> None:
    write_set(tmp_path, "tiny")
    lm = language_model("llama")
    method = {"name": "mean", "method": "caa", "fixed": {"layer": 1, "token": "mean"}}
    found = detection(lm, [method], texts_of="tiny", data=str(tmp_path))
    train, test = (
        [json.loads(line) for line in (tmp_path / f"axbench/tiny_{end}.jsonl").open()]
        for end in ("train", "eval")
    )

    def of(rows: list[dict[str, Any]]) -> list[torch.Tensor]:
        return [activations(lm, f"{row['input']}\n{row['output']}") for row in rows]

    none = torch.stack([x.mean(0) for x in of([r for r in train if r["concept_id"] == "-1"])])
    assert [one["id"] for one in found.data["concepts"]] == ["0", "1"]
    for one in found.data["concepts"]:
        own = torch.stack(
            [x.mean(0) for x in of([r for r in train if r["concept_id"] == one["id"]])]
        )
        direction = own.mean(0) - none.mean(0)
        rows = [row for row in test if row["concept_id"] == one["id"]]
        scores = [float((x @ direction)[1:].max()) for x in of(rows)]
        right = [row["category"] == "positive" for row in rows]
        above = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for a, is_a in zip(scores, right, strict=True) if is_a
            for b, is_b in zip(scores, right, strict=True) if not is_b
        ]  # fmt: skip
        figure = one["auroc"]["mean"]
        assert figure["value"] == pytest.approx(sum(above) / len(above))
        assert figure["n"] == len(rows) == 10
        assert figure["ci95"][0] <= figure["value"] <= figure["ci95"][1]
    means = [one["auroc"]["mean"]["value"] for one in found.data["concepts"]]
    assert found.data["mean"]["mean"]["value"] == pytest.approx(sum(means) / 2)
    assert found.values["mean, concept 0"].n == 10
    with pytest.raises(tt.TrimtabError, match="there is no axbench/other_train.jsonl"):
        detection(lm, [method], texts_of="other", data=str(tmp_path))


def test_a_vector_at_each_layer_and_strength(tmp_path: Path) -> None:
    """The gain is that of test pairs, from vectors that were fitted on train pairs alone."""
    lm = language_model("llama")
    contrast = tt.Contrast.from_jsonl(write_pairs(tmp_path / "pairs.jsonl").partition(":")[2])
    found = layer_curves(
        lm, contrast, layers=[0, 2], strengths=[-1.0, 1.0], limit=6, new_tokens=4,
        method={"method": "caa", "fixed": {"token": "mean"}},
    )  # fmt: skip
    places = {(one["layer"], one["strength"]): one for one in found.data["places"]}
    assert list(places) == [(0, -1.0), (0, 1.0), (2, -1.0), (2, 1.0)]
    test = tt.Contrast(contrast.part("test").pairs[:6])
    validation = tt.Contrast(contrast.part("validation").pairs[:6])
    chosen = {}
    for layer in (0, 2):
        vector = tt.CAA(layer=layer, token="mean").fit(lm, contrast, measure=False)
        for strength in (-1.0, 1.0):
            gain = tt.log_odds(lm, test, vector.at(strength)) - tt.log_odds(lm, test)
            one = places[layer, strength]
            assert one["gain"]["difference"] == pytest.approx(float(gain.mean()), abs=1e-4)
            assert one["kl"]["mean"] > 0
        gain = tt.log_odds(lm, validation, vector.at(1.0)) - tt.log_odds(lm, validation)
        chosen[layer] = float(gain.mean())
    assert found.data["chosen_layer"] == max(chosen, key=lambda layer: chosen[layer])


class Scoring:
    """A judge whose scores are those of a plain rule: how many letters an answer has, and of what
    its question is made."""

    name = "rule"

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def ask(self, conversations: Any) -> list[str]:
        self.seen += conversations
        return [self._score(*(one["content"] for one in each)) for each in conversations]

    @staticmethod
    def _score(system: str, user: str) -> str:
        answer = user.split("<answer>\n")[1].removesuffix("\n</answer>")
        if "coherent" not in system:
            return str(min(100, len(answer)))
        return "refusal" if len(answer) % 2 else "50"


def test_a_judge_scores_what_is_written_at_each_place(tmp_path: Path) -> None:
    lm = language_model("llama")
    contrast = tt.Contrast.from_jsonl(write_pairs(tmp_path / "pairs.jsonl").partition(":")[2])
    method = {"method": "caa", "fixed": {"token": "mean"}}
    asked: dict[str, Any] = {"layers": [1], "strengths": [4.0], "limit": 6, "new_tokens": 4}
    asked |= {"method": method, "pairs": 8}
    with pytest.raises(tt.TrimtabError, match="does not say in words what the trait is"):
        layer_curves(lm, contrast, judge=Scoring(), **asked)
    judge = Scoring()
    told = replace(contrast, behaviour="write formally")
    found = layer_curves(lm, told, judge=judge, **asked)
    assert all("write formally" in each[0]["content"] for each in judge.seen[:1])
    train = contrast.train.take(8)
    vector = tt.CAA(layer=1, token="mean").fit(lm, train, measure=False).at(4.0)
    prompts = list(dict.fromkeys(pair.prompt for pair in contrast.part("test").pairs[:6]))
    unsteered, steered = found.data["judged"]["places"]
    for one, steering in ((unsteered, None), (steered, vector)):
        written = lm.generate(prompts, steering=steering, chat=False, max_new_tokens=4)
        lengths = [len(each.text) for each in written]
        assert one["trait"]["value"] == pytest.approx(sum(map(float, lengths)) / len(lengths))
        even = sum(length % 2 == 0 for length in lengths)
        assert one["coherence"] is None if not even else one["coherence"]["n"] == even
    assert found.values["layer 1, strength 4, trait score"].value == steered["trait"]["value"]
    assert any("rule scores answers by 'write formally'" in note for note in found.notes)
    assert len(found.tables) == len(found.pictures) == 2
