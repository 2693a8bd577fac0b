"""Evaluations of texts: perplexity, toxicity, refusals, judges, preference."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab as tt
from evaluations import (
    LONG,
    WEATHER,
    Scorer,
    added,
    block_edited,
    data,
    of,
    same,
    strong,
    talker,
    wilson,
    write,
)
from helpers import language_model, refused_in_one_line, steer_at
from trimtab.evaluation.evaluation import evaluate
from trimtab.evaluation.metrics.judges import PhraseJudge
from trimtab.model.language_model import LanguageModel

__all__ = ["data", "talker"]  # fixtures, which pytest finds by their names here

# -- perplexity -----------------------------------------------------------------------------------


def plain_windows(
    lm: LanguageModel, text: str, length: int, edit: Any = None
) -> list[tuple[float, int]]:
    """(mean cross-entropy, tokens) of windows, each read by itself after its own BOS."""
    tokens = lm.tokenizer(text).input_ids
    bos = [lm.tokenizer.bos_token_id] if tokens[0] == lm.tokenizer.bos_token_id else []
    found = []
    for start in range(0, len(tokens) - 1, length):
        before = bos if start else []
        ids = [*before, *tokens[start : start + length + 1]]
        logits = block_edited(lm, ids[:-1], edit)[len(before) :].double()
        targets = torch.tensor(ids[1 + len(before) :])
        found.append((float(torch.nn.functional.cross_entropy(logits, targets)), len(targets)))
    return found


def test_perplexity_of_a_text_file(data: Path) -> None:
    lm = language_model("llama")
    steering = strong(lm, size=0.5)
    task = f"perplexity:{data / 'text.txt'}"
    found = evaluate(lm, task, steering=steering)
    means = []
    for name, edit in ((None, None), (steering.label, added(steering))):
        windows = plain_windows(lm, LONG, 255, edit)
        assert len(windows) == 4
        records = of(found, steering=name)
        assert [r["weight"] for r in records] == [n for _, n in windows]
        assert sum(r["weight"] for r in records) == len(lm.tokenizer(LONG).input_ids) - 1
        entropies = [r["values"]["cross_entropy"] for r in records]
        assert entropies == pytest.approx([mean for mean, _ in windows], abs=1e-5)
        assert [r["id"] for r in records] == [f"text 1, token {i}" for i in (1, 256, 511, 766)]
        mean = sum(m * n for m, n in windows) / sum(n for _, n in windows)
        means.append(mean)
        assert found.value(task, "cross_entropy", name).value == pytest.approx(mean, abs=1e-5)
        perplexity = found.value(task, "perplexity", name)
        assert perplexity.value == pytest.approx(math.exp(mean), rel=1e-5)
        assert perplexity.n == 4
    (comparison,) = found.comparisons
    assert comparison.difference == pytest.approx(means[1] - means[0], abs=1e-5)
    assert abs(comparison.difference) > 0.01


def test_perplexity_of_the_texts_of_a_jsonl_file(tmp_path: Path) -> None:
    lm = language_model("llama")
    texts = [LONG[:400], "She asked.", "", "  ", "The king was old.\u2028He had three daughters."]
    write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    found = evaluate(lm, f"perplexity:{tmp_path / 'texts.jsonl'}")
    windows = [plain_windows(lm, text, 255) for text in texts if text.strip()]
    flat = [window for each in windows for window in each]
    assert [r["weight"] for r in found.records] == [n for _, n in flat]
    entropies = [r["values"]["cross_entropy"] for r in found.records]
    assert entropies == pytest.approx([mean for mean, _ in flat], abs=1e-5)
    first = evaluate(lm, f"perplexity:{tmp_path / 'texts.jsonl'}", limit=2)
    two = [r["values"]["cross_entropy"] for r in first.records]
    assert two == pytest.approx(entropies[:2], abs=1e-5)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_a_text_is_answer_to_steerings_that_tell_it_from_the_prompt(
    data: Path, positions: Any
) -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions=positions).at(5)
    tokens = lm.tokenizer(LONG).input_ids
    found = evaluate(lm, f"perplexity:{data / 'text.txt'}", steering=steering, unsteered=False)
    for record, start in zip(found.records, (0, 255, 510, 765), strict=True):
        before = [tokens[0]] if start else []
        ids = [*before, *tokens[start : start + 256]]
        ended = len(before) + 1  # the prompt is what is read before the first token that is scored
        token = torch.arange(len(ids) - 1)[:, None]
        steered = {
            "all": token >= 0,
            "prompt": token < ended,
            "generated": token >= ended,
            "last": token >= ended - 1,
        }[positions]
        logits = block_edited(lm, ids[:-1], lambda x: torch.where(steered, added(steering)(x), x))
        targets = torch.tensor(ids[ended:])
        expected = torch.nn.functional.cross_entropy(logits[ended - 1 :].double(), targets)
        assert record["values"]["cross_entropy"] == pytest.approx(float(expected), abs=1e-5)


def test_texts_that_cannot_be_scored(tmp_path: Path) -> None:
    lm = language_model("llama")

    def refused(name: str, content: bytes, says: str) -> None:
        (tmp_path / name).write_bytes(content)
        refused_in_one_line(lambda: evaluate(lm, f"perplexity:{tmp_path / name}"), says)

    refused("empty.txt", b"  \n", "has no text")
    refused("latin.txt", "é".encode("latin-1"), "is not UTF-8")
    refused("rows.jsonl", b'{"text": "a"}\n{"prompt": "b"}\n', "row 2: 'text' is missing")
    refused_in_one_line(lambda: evaluate(lm, f"perplexity:{tmp_path}"), "no such file of text")


# -- free text ------------------------------------------------------------------------------------


def test_toxicity_by_a_scorer(talker: LanguageModel, data: Path) -> None:
    scorer = Scorer()
    steering = strong(talker)
    found = evaluate(
        talker, "detox", steering=steering, data=data, toxicity=scorer, max_new_tokens=3
    )
    for name in (None, steering.label):
        outputs = [record["output"] for record in of(found, steering=name)]
        sevens = sum("7" in output for output in outputs)
        clean = found.value("detox", "not_toxic", name)
        assert (clean.value, clean.n) == ((7 - sevens) / 7, 7)
        assert clean.ci95 == pytest.approx(wilson(7 - sevens, 7), abs=1e-6)
        score = found.value("detox", "toxicity", name).value
        assert score == pytest.approx((0.75 * sevens + 0.125 * (7 - sevens)) / 7)
    assert any("toxicity by sevens" in note for note in found.notes)
    assert sorted(scorer.asked) == sorted(record["output"] for record in found.records)


def test_what_is_sampled_depends_on_the_seed_alone(talker: LanguageModel, data: Path) -> None:
    def outputs(**options: Any) -> list[str]:
        found = evaluate(talker, "detox", data=data, toxicity=Scorer(), max_new_tokens=6, **options)
        return [record["output"] for record in found.records]

    assert outputs() == outputs(seed=0)
    assert outputs() != outputs(seed=1)
    torch.manual_seed(123)
    assert outputs() == outputs(steering=strong(talker))[:7]


def test_refusals_by_label(talker: LanguageModel, data: Path, monkeypatch: Any) -> None:
    refusing = {0, 3, 4}
    monkeypatch.setattr(LanguageModel, "generate", says(refusing))
    found = evaluate(talker, "xstest", data=data, max_new_tokens=8)
    over, unsafe = (found.value("xstest", m) for m in ("over_refusal", "refusal_of_unsafe"))
    assert (over.value, over.n) == (pytest.approx(2 / 3), 3)  # 0, 2 and 3 are safe
    assert (unsafe.value, unsafe.n) == (0.5, 2)  # 1 and 4 are not
    assert over.ci95 == pytest.approx(wilson(2, 3), abs=1e-6)


def says(refusing: set[int]) -> Any:
    """A `generate` that refuses the prompts with these numbers."""

    def generate(self: LanguageModel, prompts: Any, **options: Any) -> list[tt.Completion]:
        found = []
        for prompt in prompts:
            number = int(re.findall(r"\d+", str(prompt))[0])
            text = "I’m sorry, but no." if number in refusing else f"Yes, {number}."
            tokens = self.tokenizer(text, add_special_tokens=False).input_ids
            found.append(tt.Completion(prompt, text, tuple(tokens)))
        return found

    return generate


@dataclass
class Verdicts:
    """A judge that complies with even numbers, and is unsure about the largest."""

    name: str = "even"
    seen: list[tuple[str, str]] = field(default_factory=list)

    def verdicts(self, requests: Sequence[str], responses: Sequence[str]) -> list[bool | None]:
        self.seen += zip(requests, responses, strict=True)
        numbers = [int(re.findall(r"\d+", request)[0]) for request in requests]
        return [None if n > 5 else n % 2 == 0 for n in numbers]


def test_judges_of_prompts_from_a_file(
    talker: LanguageModel, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(LanguageModel, "generate", says({0, 1}))
    write(tmp_path / "asked.jsonl", [{"goal": f"Describe bread {i}"} for i in range(7)])
    judge, task = Verdicts(), f"refusal:{tmp_path / 'asked.jsonl'}"
    found = evaluate(talker, task, judges=[PhraseJudge(), judge], batch_size=3, max_new_tokens=8)
    assert found.value(task, "refusal").value == 2 / 7
    assert found.value(task, "attack_success (phrases)").value == 5 / 7
    even = found.value(task, "attack_success (even)")
    assert (even.value, even.n, even.unclear) == (0.5, 6, 1)
    assert even.ci95 == pytest.approx(wilson(3, 6), abs=1e-6)
    answers = ["I’m sorry, but no."] * 2 + [f"Yes, {i}." for i in range(2, 7)]
    assert sorted(judge.seen) == [(f"Describe bread {i}", answers[i]) for i in range(7)]


def test_judges_are_not_asked_about_safe_prompts(
    talker: LanguageModel, data: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(LanguageModel, "generate", says({0}))
    judge = Verdicts()
    found = evaluate(talker, "xstest", data=data, judges=[judge], max_new_tokens=8)
    assert [request for request, _ in judge.seen] == ["What is 1?", "What is 4?"]
    assert found.value("xstest", "attack_success (even)").n == 2


def test_prompts_from_a_file_may_be_safe_and_unsafe(
    talker: LanguageModel, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(LanguageModel, "generate", says({0, 1, 4}))
    labels = ["safe", "unsafe", " Safe", "UNSAFE", "other", ""]
    rows = [{"prompt": f"Describe bread {i}", "Label": label} for i, label in enumerate(labels)]
    write(tmp_path / "asked.jsonl", rows)
    judge, task = Verdicts(), f"refusal:{tmp_path / 'asked.jsonl'}"
    found = evaluate(talker, task, judges=[judge], max_new_tokens=8)
    figures = {
        metric: (found.value(task, metric).value, found.value(task, metric).n)
        for metric in ("over_refusal", "refusal_of_unsafe", "refusal")
    }
    assert figures == {
        "over_refusal": (1 / 2, 2),
        "refusal_of_unsafe": (1 / 2, 2),
        "refusal": (1 / 2, 2),
    }
    assert sorted(request[-1] for request, _ in judge.seen) == ["1", "3", "4", "5"]


def test_a_sweep_counts_violations(talker: LanguageModel, tmp_path: Path) -> None:
    write(tmp_path / "asked.jsonl", [{"prompt": f"Write about {w}"} for w in WEATHER])
    with torch.no_grad():
        talker.model.lm_head.weight.mul_(4)  # sure enough of what it writes
    steering = strong(talker, size=20.0)
    dials = {f"{dial:g}": steering.at(dial) for dial in (-1.0, -0.05, 0.05, 0.1)}
    task = f"coherence:{tmp_path / 'asked.jsonl'}"
    found = evaluate(talker, task, steering=dials, max_new_tokens=6)
    own = {name: found.value(task, "self_perplexity", name).value for name in dials}
    for name in dials:
        values = [r["values"]["self_perplexity"] for r in of(found, steering=name)]
        assert own[name] == pytest.approx(np.mean(values))
    violations = sum(value > 2.0 for value in own.values() if value is not None)
    assert 0 < violations < 4
    (note,) = [note for note in found.notes if "self-perplexity" in note]
    assert f"above 2 at {violations} of 4 settings" in note
    ratios = [found.value(task, "compression_ratio", name).value for name in dials]
    spread = f"compression_ratio {np.mean(ratios):.3f} ± {np.std(ratios, ddof=1):.3f}"
    assert spread in note
    alone = evaluate(talker, task, steering=steering, max_new_tokens=6)
    assert not [note for note in alone.notes if "self-perplexity" in note]


# -- preference -----------------------------------------------------------------------------------


@dataclass
class Preferring:
    """A chat model that prefers the answer with more sevens; unsure of prompt 3."""

    name: str = "counts sevens"
    asked: int = 0

    def ask(self, conversations: Sequence[Any]) -> list[str]:
        self.asked += len(conversations)
        return [self._answer(messages[-1]["content"]) for messages in conversations]

    def _answer(self, text: str) -> str:
        if "<prompt>\nWrite 3\n</prompt>" in text:
            return "Well."
        first = re.search(r"<A>\n(.*)\n</A>", text, re.DOTALL)
        second = re.search(r"<B>\n(.*)\n</B>", text, re.DOTALL)
        assert first
        assert second
        one, two = (each.group(1).count("7") for each in (first, second))
        return "tie" if one == two else "A" if one > two else "B"


def test_preference_of_steered_answers(talker: LanguageModel, data: Path, tmp_path: Path) -> None:
    steering, chat = strong(talker), Preferring()
    options: dict[str, Any] = {"steering": steering, "data": data, "max_new_tokens": 12}
    options |= {"preference": chat, "output": tmp_path / "run", "batch_size": 2}
    found = evaluate(talker, "bpo", **options)
    before, after = (
        of(found, task="bpo", steering=None),
        of(found, task="bpo", steering="test alpha=1"),
    )
    sevens = [
        new["output"].count("7") - old["output"].count("7")
        for old, new in zip(before, after, strict=True)
    ]
    signs = [float(np.sign(sevens[i])) for i in (0, 1, 2, 4)]
    assert len(set(signs)) > 1
    name = "bpo, compared"
    result = found.value(name, "delta_wr", steering.label)
    assert (result.value, result.n, result.unclear) == (np.mean(signs), 4, 1)
    assert found.value(name, "win", steering.label).value == signs.count(1) / 4
    assert found.value(name, "loss", steering.label).value == signs.count(-1) / 4
    assert found.value(name, "tie", steering.label).value == signs.count(0) / 4
    assert found.value(name, "turned", steering.label).value == 0
    assert chat.asked == 10  # each pair in both orders
    again = evaluate(talker, "bpo", **options)
    same(again, found)
    assert chat.asked == 10

    # Without the verdicts on the last two pairs, only those are asked for.
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "records.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])
    same(evaluate(talker, "bpo", **options), found)
    assert chat.asked == 14


def test_preference_needs_a_judge_and_a_pair(talker: LanguageModel, data: Path) -> None:
    options: dict[str, Any] = {"data": data, "max_new_tokens": 2, "limit": 2}
    found = evaluate(talker, "bpo", steering=strong(talker), **options)
    assert "bpo: no answers were compared; no judge was named" in found.notes
    for more in ({}, {"steering": strong(talker), "unsteered": False}):
        found = evaluate(talker, "bpo", preference=Preferring(), **options, **more)
        assert any("no answers were compared; that takes a steering" in n for n in found.notes)
        assert {r.task for r in found.results} == {"bpo"}
