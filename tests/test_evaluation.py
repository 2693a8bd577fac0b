"""Evaluations: records are those of a model that is run by hand, and what is evaluated or
refused."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from evaluations import (
    added,
    block_edited,
    chooser,
    content,
    copa_rows,
    data,
    of,
    speaking,
    strong,
    svamp_rows,
    talker,
    wilson,
    write,
)
from helpers import add, language_model, refused_in_one_line, steer, steer_at
from tiny import tiny_model, tiny_tokenizer
from trimtab.evaluation.evaluation import evaluate
from trimtab.evaluation.tasks import TASKS
from trimtab.model import decisions
from trimtab.model.language_model import LanguageModel
from trimtab.steering import Condition, Gate, Scope, Steerings

__all__ = ["chooser", "data", "talker"]  # fixtures, which pytest finds by their names here

# -- rows and models ------------------------------------------------------------------------------


def plain_tokens(lm: LanguageModel, prompt: str, count: int, edit: Any = None) -> list[int]:
    """The most probable continuation, each token from a fresh pass over the whole text.

    `edit` changes the output of block 1.
    """
    ids = lm.tokenizer(prompt).input_ids
    new = []
    for _ in range(count):
        new.append(int(block_edited(lm, ids + new, edit)[-1].argmax()))
    return new


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


@pytest.mark.parametrize("kind", ["token", "latched", "two-pass"])
@pytest.mark.parametrize("task", ["copa", "svamp"])
def test_what_gates_decide_is_in_the_records(
    chooser: LanguageModel, talker: LanguageModel, data: Path, task: str, kind: Any
) -> None:
    lm = chooser if task == "copa" else talker
    width = lm.anatomy.width("layers.0.resid")
    direction = torch.randn(width, generator=torch.Generator().manual_seed(1))
    condition = Condition("layers.0.resid", direction, 0.0, reads=Scope.parse("last"))
    plain = strong(lm).scoped("last")
    settings: dict[str, Any] = {"data": data, "max_new_tokens": 3} if task == "svamp" else {
        "data": data
    }  # fmt: skip
    everywhere = evaluate(lm, task, steering=plain, **settings)
    prompts = [record["prompt"] for record in of(everywhere, steering=plain.label)]
    scores = [
        float(each.scores[0] or 0)
        for each in decisions(
            lm.anatomy, lm.marks, Gate((condition,), "latched"), lm.encode(prompts)
        )
    ]
    limit = sorted(scores)[len(scores) // 2] - 1e-4
    gated = plain.gated(Gate((replace(condition, threshold=limit),), kind))
    found = evaluate(lm, task, steering=gated, **settings)
    unsteered, steered = (of(everywhere, steering=name) for name in (None, plain.label))
    records = of(found, steering=gated.label)
    assert all("gate" not in record for record in of(found, steering=None))
    for i, record in enumerate(records):
        (said,) = record["gate"]
        assert said["scores"][0] == pytest.approx(scores[i], abs=1e-4)
        assert record["values"]["gate_fired"] == float(said["fired"])
        if kind != "token":
            assert said["fired"] == (scores[i] > limit)
            other = (steered if said["fired"] else unsteered)[i]
            assert record["output"] == other["output"]
    share = found.value(task, metric="gate_fired", steering=gated.label)
    fired = sum(record["values"]["gate_fired"] for record in records)
    assert share.value == fired / len(records)
    assert share.ci95 == pytest.approx(wilson(int(fired), len(records)), abs=1e-6)


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
    refused("unknown task 'cola': .*known are boolq, copa.*perplexity:FILE", tasks="cola")
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


# -- a real model ---------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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
        "mmlu",
        "gsm8k",
        "writing",
    ]


def test_a_tiny_model_is_what_the_others_begin_with() -> None:
    """`speaking` changes a model of its own."""
    assert torch.count_nonzero(tiny_model("llama").lm_head.weight.sum(1)) == len(tiny_tokenizer())
