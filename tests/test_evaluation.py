"""Evaluations: every figure from its records, and records from a model that is run by hand.

Tiny models speak only a few tokens (the rows of their LM head for all others are zero), so that
they answer A or B, or numbers, often enough for figures to mean something.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab as tt
from helpers import add, language_model, refused_in_one_line, steer, steer_at
from tiny import tiny_model, tiny_tokenizer
from trimtab.evaluation.evaluation import evaluate
from trimtab.evaluation.metrics.judges import PhraseJudge
from trimtab.evaluation.tasks import TASKS
from trimtab.figures.records import Evaluation, summarise
from trimtab.model.language_model import LanguageModel
from trimtab.steering.artifact import Steerings

WEATHER = ["in the morning", "when the rain came", "with a king", "and the wind was good"]
CHOICES = [
    ("They sat by the fire.", "The wind was good."),
    ("She asked.", "He was old."),
    ("The rudder turns.", "The day was long, and they said that they did not know."),
]


# -- rows and models ------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def copa_rows(start: int = 0) -> list[dict[str, Any]]:
    """24 questions."""
    return [
        {
            "id": start + i,
            "premise": f"The ship left the harbour {weather}.",
            "question": question,
            "choice1": first,
            "choice2": second,
            "label": i % 2,
        }
        for i, (weather, question, (first, second)) in enumerate(
            (weather, question, choice)
            for weather in WEATHER
            for question in ("cause", "effect")
            for choice in CHOICES
        )
    ]


def svamp_rows(count: int = 7) -> list[dict[str, Any]]:
    return [
        {
            "id": f"s{i}",
            "body": "He had a map." if i % 2 else "She had ten maps and gave two to a king.",
            "question": f"How many are {i} and {i}?",
            "answer": 2 * i,
        }
        for i in range(count)
    ]


def rtp_rows(count: int = 7) -> list[dict[str, Any]]:
    return [
        {
            "filename": f"f{i}",
            "prompt": f"{' so'.join(WEATHER[: 1 + i % 4])} {i}",
            "challenging": True,
        }
        for i in range(count)
    ]


def pair_rows() -> list[dict[str, Any]]:
    """Every third row is of the train part."""
    return [
        {
            "prompt": f"The ship left{' so' * (i % 4)} {weather}",
            "positive": " and the day was long.",
            "negative": f" and{' then' * (i % 5)} no more.",
            "part": "test" if i % 3 else "train",
        }
        for i, weather in enumerate(WEATHER * 4)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Data sets with the layout of the real ones."""
    folder = tmp_path / "data"
    write(folder / "copa" / "test.jsonl", copa_rows())
    train = copa_rows() + copa_rows(1000)
    for row in train:  # each question twice, and no two with the same choices
        row["choice1"] += f" {row['id'] % 1000}"
    write(folder / "copa" / "balanced_train.jsonl", train)
    write(folder / "svamp" / "test.jsonl", svamp_rows())
    write(folder / "rtp" / "challenging.jsonl", rtp_rows())
    write(folder / "bpo" / "test.jsonl", [{"id": i, "prompt": f"Write {i}"} for i in range(5)])
    labels = ["safe", "unsafe", "safe", "safe", "unsafe"]
    write(
        folder / "xstest" / "xstest_v2.jsonl",
        [{"id": i, "prompt": f"What is {i}?", "label": label} for i, label in enumerate(labels)],
    )
    (folder / "text.txt").write_text(LONG)
    return folder


#: 768 tokens of the tiny tokenizer, whose models read 256.
LONG = "\n".join(
    f"The ship left the harbour {weather} {i}, and the captain stood at the wheel. Zebra {i * 7}."
    for i in range(4)
    for weather in WEATHER
)


def speaking(*texts: str, name: str = "llama", **options: Any) -> LanguageModel:
    """A tiny model that writes only these tokens, and padding."""
    lm = language_model(name, **options)
    spoken = torch.zeros(len(lm.tokenizer), 1)
    for text in texts:
        spoken[lm.tokenizer(text, add_special_tokens=False).input_ids] = 1
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(spoken)
    return lm


@pytest.fixture
def chooser() -> LanguageModel:
    """Answers A or B, or nothing."""
    return speaking("A", "B")


@pytest.fixture
def talker() -> LanguageModel:
    return speaking(*"0123456789 ")


def strong(lm: LanguageModel, seed: int = 3, size: float = 3.0) -> tt.Steering:
    """A steering that changes many answers."""
    width = lm.anatomy.width("layers.1.resid")
    return steer(lm, ("layers.1.resid", add(width, seed, size)))


@dataclass
class Scorer:
    """Calls a text toxic if it has a 7."""

    name: str = "sevens"
    asked: list[str] = field(default_factory=list)

    def scores(self, texts: Sequence[str]) -> list[float]:
        self.asked += texts
        return [0.75 if "7" in text else 0.125 for text in texts]


def plain_tokens(lm: LanguageModel, prompt: str, count: int, edit: Any = None) -> list[int]:
    """The most probable continuation, each token from a fresh pass over the whole text.

    `edit` changes the output of block 1.
    """
    ids = lm.tokenizer(prompt).input_ids
    new = []
    for _ in range(count):
        new.append(int(block_edited(lm, ids + new, edit)[-1].argmax()))
    return new


def block_edited(lm: LanguageModel, ids: list[int], edit: Any = None) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one text."""
    blocks = lm.model.model.layers
    handle = blocks[1].register_forward_hook(lambda m, a, out: edit(out) if edit else out)
    try:
        with torch.no_grad():
            logits: torch.Tensor = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits


def added(steering: tt.Steering) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a steering of one Add does, by hand."""
    operator: Any = steering.interventions[0].operator
    return lambda x: x + steering.setting * operator.vector


def wilson(ones: float, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    p = ones / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def content(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without their seconds, and the checksum over them, as JSON has them."""
    unlike = ("seconds", "checksum")
    without = [{k: v for k, v in record.items() if k not in unlike} for record in records]
    found: list[dict[str, Any]] = json.loads(json.dumps(without))
    return found


def same(one: Evaluation, other: Evaluation) -> None:
    """Everything but the seconds."""
    assert one.results == other.results
    assert one.comparisons == other.comparisons
    assert one.notes == other.notes
    assert content(one.records) == content(other.records)


def of(evaluation: Evaluation, **wanted: Any) -> list[dict[str, Any]]:
    """The records with these values."""
    return [r for r in evaluation.records if all(r[k] == v for k, v in wanted.items())]


# -- what the records say -------------------------------------------------------------------------


def test_choices_are_those_of_a_plain_loop(chooser: LanguageModel, data: Path) -> None:
    steering = strong(chooser)
    found = evaluate(chooser, "copa", steering=steering, data=data)
    for name, edit in ((None, None), (steering.label, added(steering))):
        right = []
        for row, record in zip(copa_rows(), of(found, steering=name), strict=True):
            prompt = (
                f"Question:\n{row['premise']} Based on the previous passage, choose the most "
                f"reasonable {row['question']}.\nA:{row['choice1']}\nB:{row['choice2']}\n\n"
                "Answer:\n"
            )
            output = chooser.tokenizer.decode(
                plain_tokens(chooser, prompt, 1, edit), skip_special_tokens=True
            )
            right.append(output == "AB"[row["label"]])
            assert (record["id"], record["index"]) == (str(row["id"]), row["id"])
            assert (record["prompt"], record["output"]) == (prompt, output)
            assert record["target"] == "AB"[row["label"]]
            assert record["values"] == {
                "accuracy": float(right[-1]),
                "answered": float(output != ""),
            }
        result = found.value("copa", steering=name)
        assert 0 < sum(right) < len(right)
        assert (result.value, result.n) == (sum(right) / 24, 24)
        assert result.ci95 == pytest.approx(wilson(sum(right), 24), abs=1e-6)


def test_numbers_are_those_of_a_plain_loop(talker: LanguageModel, data: Path) -> None:
    steering = strong(talker)
    written = {}
    rows = svamp_rows()
    for name, edit in ((None, None), (steering.label, added(steering))):
        for row in rows:
            prompt = (
                "Answer the following grade-school math word problem. Reply with only the final "
                f"answer as a number.\nQuestion: {row['body']} {row['question']}\nAnswer:"
            )
            tokens = plain_tokens(talker, prompt, 4, edit)
            written[name, row["id"]] = talker.tokenizer.decode(tokens, skip_special_tokens=True)
    # What the unsteered model writes is right in every other row.
    for i, row in enumerate(rows):
        numbers = re.findall(r"\d+", written[None, row["id"]])
        row["answer"] = int(numbers[-1]) + i % 2
    write(data / "svamp" / "test.jsonl", rows)
    found = evaluate(talker, "svamp", steering=steering, data=data, max_new_tokens=4, batch_size=3)
    assert {(r["steering"], r["id"]): r["output"] for r in found.records} == written
    assert found.value("svamp").value == 4 / 7
    steered = [
        float(re.findall(r"\d+", written[steering.label, row["id"]] or "-1")[-1]) == row["answer"]
        for row in rows
    ]
    assert found.value("svamp", steering=steering.label).value == sum(steered) / 7


def test_answers_do_not_depend_on_the_batch(talker: LanguageModel, data: Path) -> None:
    alone = evaluate(talker, "svamp", data=data, max_new_tokens=6, batch_size=1)
    for size in (2, 16):
        together = evaluate(talker, "svamp", data=data, max_new_tokens=6, batch_size=size)
        assert content(together.records) == content(alone.records)


def test_answers_are_the_models_own_whatever_the_checkpoint_asks(
    talker: LanguageModel, data: Path
) -> None:
    plain = evaluate(talker, "svamp", data=data, max_new_tokens=6)
    own = talker.model.generation_config
    try:
        talker.model.generation_config = copy.deepcopy(own)
        talker.model.generation_config.repetition_penalty = 1.9
        talker.model.generation_config.no_repeat_ngram_size = 1
        asked = evaluate(talker, "svamp", data=data, max_new_tokens=6)
    finally:
        talker.model.generation_config = own
    assert content(asked.records) == content(plain.records)


def test_max_new_tokens_shortens_texts_and_nothing_else(talker: LanguageModel, data: Path) -> None:
    short = evaluate(talker, "svamp", data=data, max_new_tokens=2)
    long = evaluate(talker, "svamp", data=data, max_new_tokens=5)
    for one, more in zip(short.records, long.records, strict=True):
        assert more["output"].startswith(one["output"])
        assert len(more["output"]) > len(one["output"])


def test_a_model_without_a_chat_template_gets_plain_text(data: Path) -> None:
    lm = tt.wrap(speaking(*"0123456789 ").model, _without_template(), "base")
    lm.model.generation_config.eos_token_id = None
    found = evaluate(lm, "xstest", data=data, max_new_tokens=4)
    for i, record in enumerate(found.records):
        tokens = plain_tokens(lm, f"What is {i}?\n", 4)
        assert record["output"] == lm.tokenizer.decode(tokens, skip_special_tokens=True)


def _without_template() -> Any:
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.model_max_length = 256
    assert not tokenizer.chat_template
    return tokenizer


def test_a_chat_model_gets_its_template(talker: LanguageModel, data: Path) -> None:
    found = evaluate(talker, "xstest", data=data, max_new_tokens=4)
    for i, record in enumerate(found.records):
        ids = talker.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {i}?"}],
            add_generation_prompt=True,
            tokenize=False,
        )
        tokens = plain_tokens(talker, ids.removeprefix("<s>"), 4)
        assert record["output"] == talker.tokenizer.decode(tokens, skip_special_tokens=True)
        assert record["prompt"] == [["user", f"What is {i}?"]]


# -- figures from the records ---------------------------------------------------------------------


def test_every_result_follows_from_the_records(talker: LanguageModel, data: Path) -> None:
    steering = strong(talker)
    found = evaluate(
        talker,
        ["svamp", "copa"],
        steering={"weak": steering.at(0.1), "strong": steering},
        data=data,
        protocol=["paper", "trimtab"],
        max_new_tokens=4,
    )
    expected = {}
    for record in found.records:
        for metric, value in record["values"].items():
            key = (record["task"], record["protocol"], record["steering"], metric)
            expected.setdefault(key, []).append(value)
    assert len(expected) == 2 * 2 * 3 * 2
    results = {(r.task, r.protocol, r.steering, r.metric): r for r in found.results}
    assert results.keys() == expected.keys()
    assert len(results) == len(found.results)
    for key, values in expected.items():
        result = results[key]
        assert (result.value, result.n, result.unclear) == (np.mean(values), len(values), 0)
        assert result.ci95 == pytest.approx(wilson(sum(values), len(values)), abs=1e-6)
    assert found.seconds == pytest.approx(sum(r["seconds"] for r in found.records), abs=0.01)
    assert found.model == vars(talker.identity)


def test_every_comparison_follows_from_the_records(chooser: LanguageModel, data: Path) -> None:
    steering = strong(chooser)
    found = evaluate(chooser, "copa", steering=steering, data=data)
    before, after = of(found, steering=None), of(found, steering=steering.label)
    for comparison in found.comparisons:
        old = np.array([record["values"][comparison.metric] for record in before])
        new = np.array([record["values"][comparison.metric] for record in after])
        assert (comparison.gained, comparison.lost) == ((new > old).sum(), (new < old).sum())
        assert comparison.difference == pytest.approx(new.mean() - old.mean())
        assert (comparison.n, comparison.steering) == (24, steering.label)
    assert [c.metric for c in found.comparisons] == ["accuracy", "answered"]
    accuracy = found.comparisons[0]
    assert accuracy.gained
    assert accuracy.lost
    flipped = [
        (one, two)
        for one, two in zip(before, after, strict=True)
        if one["values"]["accuracy"] != two["values"]["accuracy"]
    ]
    assert found.flips() == flipped
    assert len(flipped) == accuracy.gained + accuracy.lost
    answered = found.flips("answered")
    assert len(answered) == found.comparisons[1].gained + found.comparisons[1].lost  # type: ignore[operator]


def made(index: int, steering: str | None, **more: Any) -> dict[str, Any]:
    return {
        "task": "t",
        "protocol": "",
        "steering": steering,
        "index": index,
        "id": str(index),
        "seconds": 0.5,
        "values": {},
    } | more


def test_the_interval_of_a_difference_is_paired() -> None:
    # Steered is right where unsteered is, and in a tenth of the others: the pairs vary little.
    random = np.random.default_rng(0)
    old = random.integers(0, 2, 300)
    new = old | (random.random(300) < 0.1)
    records = [made(i, None, values={"accuracy": float(v)}) for i, v in enumerate(old)]
    records += [made(i, "s", values={"accuracy": float(v)}) for i, v in enumerate(new)]
    (comparison,) = summarise(records, {}).comparisons
    draws = random.integers(0, 300, (4000, 300))
    low, high = np.percentile((new - old)[draws].mean(1), (2.5, 97.5))
    assert comparison.difference == pytest.approx((new - old).mean())
    assert comparison.ci95 == pytest.approx((low, high), abs=0.01)
    assert comparison.ci95[1] - comparison.ci95[0] < 0.07  # unpaired it would be 0.16
    assert (comparison.gained, comparison.lost) == ((new > old).sum(), 0)


def test_flips_have_the_p_of_mcnemars_exact_test() -> None:
    def p_of(gained: int, lost: int) -> float | None:
        flips = [(0, 1)] * gained + [(1, 0)] * lost + [(1, 1)] * 4
        records = [
            made(i, steering, values={"accuracy": float(flips[i][side])})
            for side, steering in enumerate((None, "a"))
            for i in range(len(flips))
        ]
        (comparison,) = summarise(records, {}).comparisons
        return comparison.p

    # Twice the tail of a fair coin, by hand.
    assert p_of(3, 0) == pytest.approx(2 / 8)
    assert p_of(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert p_of(2, 2) == 1
    assert p_of(0, 0) == 1


def test_a_failure_to_write_leaves_the_model_unsteered(
    chooser: LanguageModel, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, records: Any) -> None:
        raise tt.TrimtabError("the disk is full")

    monkeypatch.setattr("trimtab.reports.run.Run.append", full)
    try:
        tt.evaluate(chooser, "copa", steering=strong(chooser), unsteered=False, data=data)
    except tt.TrimtabError:  # whose traceback, here alive, holds on to what was under way
        assert not any(module._forward_hooks for module in chooser.model.modules())
        assert not any(module._forward_pre_hooks for module in chooser.model.modules())
    else:
        pytest.fail("nothing was raised")


def test_records_are_paired_by_example_whatever_their_order() -> None:
    records = [made(i, None, values={"accuracy": float(i == 2)}) for i in (2, 0, 1, 3)]
    records += [made(i, "s", values={"accuracy": float(i != 0)}) for i in (1, 3, 2)]
    found = summarise(records, {})
    (comparison,) = found.comparisons
    assert (comparison.n, comparison.gained, comparison.lost) == (3, 2, 0)
    assert comparison.difference == pytest.approx(2 / 3)
    assert [r["index"] for r in found.records] == [0, 1, 2, 3, 1, 2, 3]
    assert [(a["index"], b["index"]) for a, b in found.flips()] == [(1, 1), (3, 3)]


def test_what_is_unclear_is_counted_apart() -> None:
    verdicts = [1.0, None, 0.0, 1.0, None]
    records = [made(i, None, values={"attack": v}) for i, v in enumerate(verdicts)]
    records += [
        made(i, "s", values={"attack": v}) for i, v in enumerate([0.0, 1.0, None, 0.0, 1.0])
    ]
    found = summarise(records, {})
    first, second = found.results
    assert (first.value, first.n, first.unclear) == (pytest.approx(2 / 3), 3, 2)
    assert (second.value, second.n, second.unclear) == (0.5, 4, 1)
    (comparison,) = found.comparisons  # of rows 0 and 3, which are clear in both
    assert (comparison.difference, comparison.n) == (-1.0, 2)
    assert (comparison.gained, comparison.lost) == (0, 2)
    assert [before["index"] for before, _ in found.flips()] == [0, 3]


def test_where_all_is_unclear_there_is_no_figure() -> None:
    found = summarise([made(i, None, values={"attack": None}) for i in range(3)], {})
    (result,) = found.results
    assert (result.value, result.n, result.ci95, result.unclear) == (None, 0, None, 3)


def test_examples_weigh_what_they_weigh() -> None:
    old, new, weights = [1.0, 2.0, 4.0], [1.5, 2.0, 3.0], [1, 2, 7]
    records = [
        made(i, steering, values={"cross_entropy": v}, weight=w)
        for steering, values in ((None, old), ("s", new))
        for i, (v, w) in enumerate(zip(values, weights, strict=True))
    ]
    found = summarise(records, {})
    assert found.value("t", "cross_entropy").value == pytest.approx(33 / 10)
    assert found.value("t", "cross_entropy").n == 3
    assert found.value("t", "perplexity").value == pytest.approx(math.exp(3.3))
    low, high = found.value("t", "cross_entropy").ci95  # type: ignore[misc]
    assert found.value("t", "perplexity").ci95 == pytest.approx((math.exp(low), math.exp(high)))
    (comparison,) = found.comparisons
    assert comparison.difference == pytest.approx((0.5 * 1 + 0 * 2 - 1 * 7) / 10)
    assert (comparison.gained, comparison.lost) == (None, None)


def test_means_that_happen_to_be_whole_are_no_rates() -> None:
    records = [made(i, s, values={"toxicity": 1.0}) for s in (None, "s") for i in range(4)]
    found = summarise(records, {})
    assert found.results[0].ci95 == (1.0, 1.0)  # Wilson's would be wide
    assert found.comparisons[0].gained is None
    assert found.flips() == []


def test_a_result_that_is_not_there(chooser: LanguageModel, data: Path) -> None:
    found = evaluate(chooser, "copa", data=data, limit=2)
    assert found.value("copa", "accuracy") is found.results[0]
    refused_in_one_line(lambda: found.value("copa", "perplexity"), "no result with .*perplexity")


# -- what is evaluated ----------------------------------------------------------------------------


def test_alternatives_by_list_and_by_name(chooser: LanguageModel, data: Path) -> None:
    a, b = strong(chooser), strong(chooser, seed=5)
    by_list = evaluate(chooser, "copa", steering=[a.at(1), a.at(2), b.at(3)], data=data, limit=4)
    labels = ["test alpha=1", "test alpha=2", "test alpha=3"]
    assert list(dict.fromkeys(r.steering for r in by_list.results)) == [None, *labels]
    by_name = evaluate(
        chooser, "copa", steering={"x": a.at(1), "y": a.at(2), "z": b.at(3)}, data=data, limit=4
    )
    renamed = dict(zip((None, "x", "y", "z"), (None, *labels), strict=True))
    assert [{**r, "steering": renamed[r["steering"]]} for r in content(by_name.records)] == content(
        by_list.records
    )
    alone = evaluate(chooser, "copa", steering=b.at(3), data=data, limit=4)
    assert content(of(alone, steering=labels[2])) == content(of(by_list, steering=labels[2]))


def test_a_plus_b_act_together(chooser: LanguageModel, data: Path) -> None:
    a, b = strong(chooser), strong(chooser, seed=5)
    found = evaluate(chooser, "copa", steering=a.at(0.5) + b.at(2), data=data)
    name = "test alpha=0.5 + test alpha=2"
    first, second = added(a.at(0.5)), added(b.at(2))
    for record in of(found, steering=name):
        tokens = plain_tokens(chooser, record["prompt"], 1, lambda x: second(first(x)))
        assert record["output"] == chooser.tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(of(found, steering=name)) == 24


def test_each_dial_by_itself(chooser: LanguageModel, data: Path) -> None:
    steering = strong(chooser)
    dials = {f"{dial:g}": steering.at(dial) for dial in (0.0, 1.0, -1.0)}
    found = evaluate(chooser, "copa", steering=dials, data=data)
    outputs = {
        name: [record["output"] for record in of(found, steering=name)] for name in (None, *dials)
    }
    assert outputs["0"] == outputs[None]
    assert len({tuple(each) for each in outputs.values()}) == 3
    zero = [c for c in found.comparisons if c.steering == "0"]
    assert [(c.difference, c.ci95, c.gained, c.lost) for c in zero] == [(0, (0, 0), 0, 0)] * 2


def test_without_the_unsteered_model(chooser: LanguageModel, data: Path) -> None:
    found = evaluate(chooser, "copa", steering=strong(chooser), unsteered=False, data=data)
    assert {r["steering"] for r in found.records} == {"test alpha=1"}
    assert found.comparisons == ()
    assert found.flips() == []


def test_both_protocols_at_once_are_each_by_itself(talker: LanguageModel, data: Path) -> None:
    together = evaluate(talker, "svamp", data=data, protocol=["paper", "trimtab"], max_new_tokens=5)
    for protocol in ("paper", "trimtab"):
        alone = evaluate(talker, "svamp", data=data, protocol=protocol, max_new_tokens=5)
        assert content(of(together, protocol=protocol)) == content(alone.records)
        assert [r for r in together.results if r.protocol == protocol] == list(alone.results)
    twice = evaluate(talker, "svamp", data=data, protocol=["paper", "paper"], max_new_tokens=5)
    assert twice.value("svamp").n == 7


def test_limit_takes_the_first(chooser: LanguageModel, data: Path) -> None:
    found = evaluate(chooser, ["copa", "copa"], data=data, limit=5)
    assert [record["id"] for record in found.records] == ["0", "1", "2", "3", "4"]
    beyond = evaluate(chooser, "copa", data=data, limit=1000)
    assert beyond.value("copa").n == 24


def test_validation_rows_are_every_fifth_question(chooser: LanguageModel, data: Path) -> None:
    found = evaluate(chooser, "copa", data=data, part="validation")
    train = evaluate(chooser, "copa", data=data, part="train")
    assert len(train.records) == 48 - len(found.records)
    fifth = [i for i in range(24) if i % 5 == 4]  # each with its twin, a thousand later
    assert [r["id"] for r in found.records] == [str(s + i) for s in (0, 1000) for i in fifth]
    write(data / "copa" / "balanced_train.jsonl", copa_rows()[:3])
    refused_in_one_line(
        lambda: evaluate(chooser, "copa", data=data, part="validation"), "copa has no validation"
    )
    refused_in_one_line(
        lambda: evaluate(chooser, "copa", data=data, part="validation", protocol="paper"),
        "no validation rows",
    )


def test_what_is_missing_or_impossible_is_refused(chooser: LanguageModel, data: Path) -> None:
    a = strong(chooser)

    def refused(says: str, tasks: Any = "copa", **options: Any) -> None:
        refused_in_one_line(lambda: evaluate(chooser, tasks, data=data, **options), says)

    refused("there is no task", tasks=[])
    refused("unknown task 'cola': known are boolq, copa.*perplexity:FILE", tasks="cola")
    refused("unknown protocol 'ours'", protocol="ours")
    refused("there is no protocol", protocol=[])
    refused("limit must be 1 or more, not 0", limit=0)
    refused("batch size", batch_size=0)
    refused("new tokens", max_new_tokens=0)
    refused("nothing to evaluate", unsteered=False)
    refused("nothing to evaluate", unsteered=False, steering=[])
    refused("two steerings are called 'test alpha=1'", steering=[a, strong(chooser, 9)])
    refused("is not a steering", steering="joy.safetensors")
    refused("is not a steering", steering=[a, None])
    refused("is not a steering", steering={"both": [a, a]})
    refused("is not a steering", steering=Steerings())
    refused("no such file of text", tasks="perplexity:absent.txt")
    refused("no such file of prompts", tasks="refusal:absent.jsonl")


def test_another_models_steering_is_refused_before_anything_runs(
    chooser: LanguageModel, tmp_path: Path
) -> None:
    other = strong(language_model("llama", seed=1))
    wide = strong(language_model("llama", hidden_size=32))
    output = tmp_path / "run"
    for steering, says in ((other, "made for .*--force"), (wide, "sizes do not fit")):
        # The data are not even looked for.
        refused_in_one_line(
            lambda: evaluate(chooser, "copa", steering=steering, data="absent", output=output), says
        )
        assert not output.exists()


def test_force_steers_with_another_models(chooser: LanguageModel, data: Path) -> None:
    operator = strong(chooser).interventions[0].operator
    other = steer(language_model("llama", seed=1), ("layers.1.resid", operator))
    found = evaluate(chooser, "copa", steering=other, data=data, force=True)
    own = evaluate(chooser, "copa", steering=strong(chooser), data=data)
    assert content(found.records) == content(own.records)


def test_a_steering_that_reaches_no_token_is_refused_at_once(
    chooser: LanguageModel, data: Path, tmp_path: Path
) -> None:
    late = steer_at(chooser, "resid", positions="generated")
    refused_in_one_line(
        lambda: evaluate(chooser, "copa", steering=late, data=data, output=tmp_path / "run"),
        "copa reads the first token",
    )
    assert not (tmp_path / "run").exists()
    evaluate(chooser, "copa", steering=steer_at(chooser, "resid", positions="last"), data=data)


def test_numbers_that_overflow_are_refused(talker: LanguageModel, data: Path) -> None:
    with torch.no_grad():
        talker.model.model.norm.weight.fill_(torch.nan)
    refused_in_one_line(
        lambda: evaluate(talker, f"perplexity:{data / 'text.txt'}", data=data),
        r"the logits of text \d are not finite, .* in float32 without a steering of its own",
    )


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


# -- interrupted and resumed ----------------------------------------------------------------------

#: The tasks of each kind: one token, greedy text, sampled text that is scored, likelihood.
KINDS = ("copa", "svamp", "detox", "perplexity", "contrast")


@dataclass
class Job:
    """An evaluation that can be run again."""

    lm: LanguageModel
    task: str
    data: Path
    options: dict[str, Any]

    def run(self, output: Path | None = None) -> Evaluation:
        return evaluate(
            self.lm,
            self.task,
            data=self.data,
            output=output,
            toxicity=Scorer(),
            batch_size=3,
            **self.options,
        )


@pytest.fixture(params=KINDS)
def job(request: pytest.FixtureRequest, data: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Unsteered and steered, in several batches."""
    monkeypatch.setattr(LanguageModel, "batch_tokens", property(lambda self: 300))
    lm = speaking("A", "B") if request.param == "copa" else speaking(*"0123456789 ")
    task = request.param
    if task == "perplexity":  # several texts in a batch, and one of several windows
        texts = [*(f"The king was old {weather}." for weather in WEATHER * 2), LONG]
        write(data / "texts.jsonl", [{"text": text} for text in texts])
        task = f"perplexity:{data / 'texts.jsonl'}"
    if task == "contrast":
        write(data / "pairs.jsonl", pair_rows())
        task = f"contrast:{data / 'pairs.jsonl'}"
    options: dict[str, Any] = {"steering": strong(lm), "limit": 9}
    if request.param in ("svamp", "detox"):
        options |= {"max_new_tokens": 4, "protocol": ["paper", "trimtab"]}
    return Job(lm, task, data, options)


def finished_run(job: Job, folder: Path) -> Evaluation:
    found = job.run(folder)
    same(job.run(), found)  # the directory changes nothing
    return found


def test_cut_anywhere_and_resumed_it_is_the_same(job: Job, tmp_path: Path) -> None:
    whole_run = tmp_path / "whole"
    expected = finished_run(job, whole_run)
    whole = (whole_run / "records.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    half = len(ends) // 2
    sizes = {
        0,
        1,
        ends[0] - 1,
        ends[0],  # in the middle of the first batch
        ends[1] + 10,
        ends[half - 1],  # the unsteered part alone
        ends[half] + 5,
        ends[-2],
        len(whole) - 1,
        len(whole),
    }
    for size in sorted(sizes):
        cut = tmp_path / f"cut{size}"
        shutil.copytree(whole_run, cut)
        (cut / "results.json").unlink()
        (cut / "records.jsonl").write_bytes(whole[:size])
        same(job.run(cut), expected)
        lines = (cut / "records.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        records = [json.loads(line) for line in lines]
        assert content(records) == content([json.loads(x) for x in whole.decode().split("\n")[:-1]])
        results = json.loads((cut / "results.json").read_text())
        assert results["results"] == json.loads(
            json.dumps([asdict(result) for result in expected.results])
        )


def test_interrupted_in_the_model_and_resumed_it_is_the_same(job: Job, tmp_path: Path) -> None:
    expected = job.run()
    body, seen = job.lm.anatomy.body, 0

    def count(*arguments: Any) -> None:
        nonlocal seen
        seen += 1

    handle = body.register_forward_pre_hook(count)
    job.run()
    handle.remove()
    assert seen >= 4
    for passes in sorted({1, 2, seen // 3, seen // 2, seen - 1, seen}):
        remaining = passes

        def interrupt(*arguments: Any) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                raise KeyboardInterrupt

        handle = body.register_forward_pre_hook(interrupt)
        output = tmp_path / f"run{passes}"
        try:
            # More passes at each try than before, so that it ends.
            while True:
                try:
                    found = job.run(output)
                    break
                except KeyboardInterrupt:
                    passes += 3
                    remaining = passes
        finally:
            handle.remove()
        same(found, expected)


def test_a_finished_run_is_not_run_again(job: Job, tmp_path: Path) -> None:
    expected = job.run(tmp_path / "run")
    records = (tmp_path / "run" / "records.jsonl").read_bytes()

    def fail(*arguments: Any) -> None:
        raise AssertionError("the model ran")

    handle = job.lm.anatomy.body.register_forward_pre_hook(fail)
    try:
        again = job.run(tmp_path / "run")
    finally:
        handle.remove()
    same(again, expected)
    assert again.seconds == expected.seconds
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == records


def test_a_task_of_the_harness_that_was_interrupted_asks_only_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator")
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # which asks pip
    monkeypatch.setattr(LanguageModel, "batch_tokens", property(lambda self: 60))
    rows = [{"question": f"{weather} {i}", "gold": i % 2} for i, weather in enumerate(WEATHER * 2)]
    write(tmp_path / "toy" / "toy.jsonl", rows)
    files = {"data_files": {"test": str(tmp_path / "toy" / "toy.jsonl")}}
    toy = {"task": "toy", "dataset_path": "json", "test_split": "test"}
    toy |= {"dataset_kwargs": files | {"cache_dir": str(tmp_path / "cache")}}
    toy |= {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
    }
    toy |= {"doc_to_choice": ["the king was strong", "She asked."]}
    (tmp_path / "toy" / "toy.yaml").write_text(json.dumps(toy))
    lm = language_model("llama")
    options: dict[str, Any] = {"steering": strong(lm), "task_files": [tmp_path / "toy"]}
    expected = evaluate(lm, "lm-eval:toy", **options)
    assert expected.value("lm-eval:toy", "acc").n == 8
    # By hand: the more likely of the two answers, by the sum over its tokens.
    for row, record in zip(rows, of(expected, steering=None), strict=True):
        sums = []
        for choice in toy["doc_to_choice"]:
            before = lm.tokenizer(row["question"]).input_ids
            ids = lm.tokenizer(f"{row['question']} {choice}").input_ids
            log_p = block_edited(lm, ids).log_softmax(-1)
            sums.append(sum(float(log_p[i - 1, ids[i]]) for i in range(len(before), len(ids))))
        assert record["values"]["acc"] == float((sums[1] > sums[0]) == row["gold"])

    left = 2

    def interrupt(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    handle = lm.anatomy.body.register_forward_pre_hook(interrupt)
    try:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                evaluate(lm, "lm-eval:toy", output=tmp_path / "run", **options)
            left = 2
        left = 1000
        same(evaluate(lm, "lm-eval:toy", output=tmp_path / "run", **options), expected)
        resumed, left = 1000 - left, 1000
        evaluate(lm, "lm-eval:toy", output=tmp_path / "other", **options)
        assert resumed == 1000 - left - 4
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"limit": 7}, "limit, tasks"),
        ({"seed": 3}, "seed"),
        ({"max_new_tokens": 9}, "max_new_tokens"),
        ({"steering": None}, "steerings"),
        ({"protocol": "paper"}, "protocols"),
    ],
)
def test_another_configuration_is_another_run(
    chooser: LanguageModel, data: Path, tmp_path: Path, changed: dict[str, Any], key: str
) -> None:
    options: dict[str, Any] = {"data": data, "limit": 6, "output": tmp_path / "run"}
    options["steering"] = strong(chooser)
    evaluate(chooser, "copa", **options)
    records = (tmp_path / "run" / "records.jsonl").read_bytes()
    refused_in_one_line(
        lambda: evaluate(chooser, "copa", **(options | changed)), f"differs in {key}: "
    )
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == records


def test_other_data_dials_and_models_are_another_run(
    chooser: LanguageModel, data: Path, tmp_path: Path
) -> None:
    named = {"s": strong(chooser)}
    options: dict[str, Any] = {"data": data, "limit": 3, "output": tmp_path / "run"}
    evaluate(chooser, "copa", steering=named, **options)
    turned = {"s": strong(chooser).at(2)}
    refused_in_one_line(
        lambda: evaluate(chooser, "copa", steering=turned, **options), "differs in steerings"
    )
    retrained = {"s": strong(chooser, seed=8)}
    refused_in_one_line(
        lambda: evaluate(chooser, "copa", steering=retrained, **options), "differs in steerings"
    )
    other = speaking("A", "B", seed=1)
    refused_in_one_line(
        lambda: evaluate(other, "copa", steering=named, force=True, **options), "differs in model"
    )
    write(data / "copa" / "test.jsonl", copa_rows(7))
    refused_in_one_line(
        lambda: evaluate(chooser, "copa", steering=named, **options), "differs in tasks"
    )


def test_what_fails_at_its_first_batch_leaves_nothing(
    talker: LanguageModel, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    refused_in_one_line(
        lambda: evaluate(talker, "svamp", data=data, output=output, max_new_tokens=250),
        "exceed the 256 tokens",
    )
    assert not output.exists()
    evaluate(talker, "svamp", data=data, output=output, max_new_tokens=2)
    before = (output / "records.jsonl").read_bytes()
    refused_in_one_line(
        lambda: evaluate(
            talker, "svamp", data=data, output=output, max_new_tokens=250, overwrite=True
        ),
        "exceed the 256 tokens",
    )
    assert (output / "records.jsonl").read_bytes() == before


# -- a real model ---------------------------------------------------------------------------------


def test_choices_of_smollm2(smollm2: LanguageModel, data: Path) -> None:
    steering = steer(
        smollm2, ("layers.12.resid", add(smollm2.anatomy.width("layers.12.resid"), 0, 8.0))
    )
    found = evaluate(smollm2, "copa", steering=steering, data=data, limit=3)
    blocks = smollm2.model.model.layers
    for name in (None, steering.label):
        edit = added(steering) if name else lambda x: x
        handle = blocks[12].register_forward_hook(lambda m, a, out: edit(out))
        try:
            for record in of(found, steering=name):
                ids = smollm2.tokenizer(record["prompt"], return_tensors="pt")
                with torch.no_grad():
                    token = smollm2.model(**ids).logits[0, -1].argmax()
                assert record["output"] == smollm2.tokenizer.decode([int(token)])
        finally:
            handle.remove()


def test_perplexity_of_smollm2(smollm2: LanguageModel, tmp_path: Path) -> None:
    text = "The ship left the harbour in the morning. " * 3 + "The less you push, the more you get."
    (tmp_path / "text.txt").write_text(text)
    found = evaluate(smollm2, f"perplexity:{tmp_path / 'text.txt'}")
    ids = smollm2.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(smollm2.model(ids, labels=ids).loss)
    entropy, perplexity = found.results
    assert (entropy.metric, perplexity.metric) == ("cross_entropy", "perplexity")
    assert entropy.value == pytest.approx(loss, abs=1e-4)
    assert perplexity.value == pytest.approx(math.exp(loss), rel=1e-4)


_EVALUATE = """
import sys
import trimtab as tt
lm = tt.load("smollm2-135m-instruct", device="cpu")
tt.evaluate(lm, ["copa", "svamp"], data=sys.argv[1], output=sys.argv[2], batch_size=2,
            max_new_tokens=6, limit=8, protocol=["paper", "trimtab"])
"""


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same(
    smollm2: LanguageModel, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": data, "batch_size": 2, "max_new_tokens": 6, "limit": 8}
    options["protocol"] = ["paper", "trimtab"]
    expected = evaluate(smollm2, ["copa", "svamp"], **options)
    output = tmp_path / "run"
    records = output / "records.jsonl"
    for wanted in (1, 17, 22):  # lines after which it is killed, in copa and then in svamp
        arguments = [sys.executable, "-c", _EVALUATE, str(data), str(output)]
        with subprocess.Popen(arguments) as process:
            while process.poll() is None:
                if records.exists() and records.read_bytes().count(b"\n") >= wanted:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.002)
            process.wait()
    assert not (output / "results.json").exists()
    same(evaluate(smollm2, ["copa", "svamp"], output=output, **options), expected)


def test_the_tasks_of_the_evaluation_are_listed() -> None:
    assert list(TASKS) == [
        "boolq",
        "copa",
        "winogrande",
        "svamp",
        "mawps",
        "detox",
        "bpo",
        "xstest",
    ]


def test_a_tiny_model_is_what_the_others_begin_with() -> None:
    """`speaking` changes a model of its own."""
    assert torch.count_nonzero(tiny_model("llama").lm_head.weight.sum(1)) == len(tiny_tokenizer())
