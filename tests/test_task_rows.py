"""A bench measures what an evaluation measures, with less work: same records, costs, figures."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from evaluations import Scorer, chooser, copa_rows, data, speaking, strong, wilson, write
from helpers import language_model, refused_in_one_line, steer_at
from test_preference import pairs_file
from trimtab.contrasts import Part
from trimtab.evaluation.evaluation import evaluate
from trimtab.evaluation.jobs import TaskJob
from trimtab.evaluation.tasks import TASKS
from trimtab.figures import more_is_better
from trimtab.model.language_model import LanguageModel
from trimtab.reading.reader import Next, Reading, plan, run_batches
from trimtab.reading.streams import StreamCache
from trimtab.reports import summarise
from trimtab.sweeps import plain_text as module
from trimtab.sweeps.effect import Effect
from trimtab.sweeps.rows import TaskRows

__all__ = ["chooser", "data"]  # fixtures, which pytest finds by their names here

PARTS: tuple[Part, Part] = ("validation", "test")


def without_seconds(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records as JSON has them."""
    bare = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
    found: list[dict[str, Any]] = json.loads(json.dumps(bare))
    return found


def counted(lm: LanguageModel) -> list[int]:
    """One entry for each pass of the model's body."""
    passes: list[int] = []
    lm.anatomy.body.register_forward_pre_hook(lambda m, args: passes.append(1))
    return passes


# -- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed", [True, False])
def test_records_are_those_of_an_evaluation(
    chooser: LanguageModel, data: Path, resumed: bool
) -> None:
    bench = TaskRows(chooser, "copa", data=str(data), resumed=resumed)
    steering = strong(chooser)
    flipped = 0
    for part in PARTS:
        expected = evaluate(chooser, "copa", steering={"s": steering}, data=data, part=part)
        plain = [r for r in expected.records if r["steering"] is None]
        steered = [r for r in expected.records if r["steering"] == "s"]
        assert without_seconds(bench.unsteered(part)) == without_seconds(plain)
        assert without_seconds(bench.records(steering, part, name="s")) == without_seconds(steered)
        assert bench.rows(part) == len(plain)
        flipped += sum(a["output"] != b["output"] for a, b in zip(plain, steered, strict=True))
    assert flipped  # or a steering that is lost would not show


def test_texts_of_many_tokens_are_those_of_an_evaluation(data: Path) -> None:
    lm = speaking(*"0123456789 ")
    write(data / "svamp" / "train.jsonl", json_rows(data / "svamp" / "test.jsonl") * 2)
    bench = TaskRows(lm, "svamp", data=str(data), batch_size=4, max_new_tokens=3, test_limit=5)
    found = bench.records(strong(lm), "test", name="s")
    expected = evaluate(
        lm,
        "svamp",
        steering={"s": strong(lm)},
        unsteered=False,
        data=data,
        limit=5,
        batch_size=4,
        max_new_tokens=3,
    )
    assert without_seconds(found) == without_seconds(expected.records)


def json_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_some_of_the_rows_have_the_indices_of_the_whole(
    chooser: LanguageModel, data: Path, tmp_path: Path
) -> None:
    pairs = f"contrast:{pairs_file(tmp_path)}"
    for task, source, stops in (("copa", str(data), (0, 3, 4, 24)), (pairs, None, (0, 1, 3, 4))):
        bench = TaskRows(chooser, task, data=source)
        whole = bench.records(strong(chooser), "test", name="s")
        assert [record["index"] for record in whole] == list(range(stops[-1]))
        for start, stop in pairwise(stops):
            some = bench.records(strong(chooser), "test", start, stop, name="s")
            assert [record["index"] for record in some] == list(range(start, stop))
            for one, other in zip(some, whole[start:stop], strict=True):
                assert one["values"] == pytest.approx(other["values"], abs=1e-4)
                assert (one["id"], one["steering"]) == (other["id"], "s")
        joined = bench.records(strong(chooser), "test", stops[1], name="s")
        assert [record["index"] for record in joined] == list(range(stops[1], stops[-1]))


def test_the_unsteered_model_runs_once(chooser: LanguageModel, data: Path) -> None:
    passes = counted(chooser)
    bench = TaskRows(chooser, "copa", data=str(data))
    assert not passes  # making one runs nothing
    first = bench.unsteered("validation")
    assert passes
    passes.clear()
    assert bench.metric == "accuracy"
    assert bench.unsteered("validation") == first
    bench.result(first)
    assert not passes


def test_the_blocks_below_run_once(data: Path) -> None:
    lm = speaking("A", "B")
    bench = TaskRows(lm, "copa", data=str(data))
    ran: list[int] = []
    for layer, block in enumerate(lm.model.model.layers):
        block.mlp.register_forward_hook(lambda m, a, o, layer=layer: ran.append(layer))
    steering = steer_at(lm, "ffn_in", layer=1)
    bench.records(steering, "test")
    assert set(ran) == {0, 1, 2}
    ran.clear()
    bench.records(steering.at(-1.0), "test")
    assert set(ran) == {1, 2}
    ran.clear()
    TaskRows(lm, "copa", data=str(data), resumed=False).records(steering, "test")
    assert set(ran) == {0, 1, 2}


# -- which rows -----------------------------------------------------------------------------------


def test_the_validation_rows_are_shuffled_by_the_seed(chooser: LanguageModel, data: Path) -> None:
    def ids(part: Part, **options: Any) -> list[str]:
        bench = TaskRows(chooser, "copa", data=str(data), **options)
        return [record["id"] for record in bench.records(None, part)]

    plain, shuffled = ids("validation"), ids("validation", shuffle=1)
    assert sorted(shuffled) == sorted(plain)
    assert shuffled != plain
    assert ids("validation", shuffle=1) == shuffled != ids("validation", shuffle=2)
    assert ids("test", shuffle=1) == ids("test")
    # The first rows are taken before they are shuffled: the same rows whatever the seed.
    assert sorted(ids("validation", shuffle=1, limit=4)) == sorted(plain[:4])


def test_limits_are_of_each_part(chooser: LanguageModel, data: Path) -> None:
    bench = TaskRows(chooser, "copa", data=str(data), limit=3)
    assert (bench.rows("validation"), bench.rows("test")) == (3, 24)
    assert len(bench.records(None, "validation")) == 3
    assert bench.describe()["validation"]["rows"] == 3
    for wrong in (0, -1):
        refused_in_one_line(
            lambda wrong=wrong: TaskRows(chooser, "copa", data=str(data), test_limit=wrong),
            f"limit of test rows must be 1 or more, not {wrong}",
        )


def test_another_task_stands_in_for_the_validation_rows(data: Path) -> None:
    lm = speaking(*"0123456789 ")
    for name, count in (("ours", 4), ("theirs", 3)):
        write(data / f"{name}.jsonl", [{"prompt": f"Write {i} for {name}"} for i in range(count)])
    bench = TaskRows(
        lm,
        f"refusal:{data / 'ours.jsonl'}",
        validation_task=f"refusal:{data / 'theirs.jsonl'}",
        max_new_tokens=2,
    )
    assert (bench.rows("validation"), bench.rows("test")) == (3, 4)
    (prompt,) = {str(r["prompt"]).rpartition(" ")[2] for r in bench.unsteered("validation")}
    assert prompt.startswith("theirs")
    assert bench.metric == "refusal"


# -- the metric -----------------------------------------------------------------------------------


def test_the_metric_is_the_first_or_the_one_that_is_named(
    chooser: LanguageModel, data: Path, tmp_path: Path
) -> None:
    bench = TaskRows(chooser, "copa", data=str(data))
    assert (bench.metric, bench.maximise) == ("accuracy", True)
    named = TaskRows(chooser, "copa", data=str(data), metric="answered")
    assert named.metric == "answered"
    records = named.unsteered("test")
    assert named.result(records).value == sum(r["values"]["answered"] for r in records) / 24
    assert TaskRows(chooser, f"contrast:{pairs_file(tmp_path)}").metric == "log_odds"
    unknown = TaskRows(chooser, "copa", data=str(data), metric="bleu")
    refused_in_one_line(
        lambda: unknown.metric, "copa has no metric 'bleu': it has accuracy, answered"
    )


def test_less_of_what_is_bad_is_better(data: Path) -> None:
    lm = speaking(*"0123456789 ")
    rows = [{"text": "So it is.", "toxicity": i / 10} for i in range(10)]
    write(data / "rtp" / "train_contrast.jsonl", rows)
    bench = TaskRows(
        lm,
        "detox",
        data=str(data),
        validation_task="detox",
        chooses=False,
        toxicity=Scorer(),
        max_new_tokens=2,
        metric="toxicity",
        limit=3,
        test_limit=3,
    )
    assert bench.maximise is False
    value = bench.result(bench.unsteered("test")).value
    assert value == pytest.approx(sum(r["values"]["toxicity"] for r in bench.unsteered("test")) / 3)


def test_which_way_a_metric_counts(chooser: LanguageModel, data: Path) -> None:
    assert more_is_better("accuracy")
    assert more_is_better("refusal")
    assert not more_is_better("attack_success (phrases)")
    assert not TaskRows(chooser, "copa", data=str(data), better="less").maximise
    assert TaskRows(chooser, "copa", data=str(data), better="more").maximise
    wrong: Any = "worse"
    refused_in_one_line(
        lambda: TaskRows(chooser, "copa", data=str(data), better=wrong), "more or less, not 'worse'"
    )


def test_a_result_is_that_of_an_evaluation(chooser: LanguageModel, data: Path) -> None:
    bench = TaskRows(chooser, "copa", data=str(data))
    records = bench.records(strong(chooser), "test", name="s")
    right = sum(record["values"]["accuracy"] for record in records)
    found = bench.result(records)
    assert (found.value, found.n, found.steering) == (right / 24, 24, "s")
    assert found.ci95 == pytest.approx(wilson(right, 24), abs=1e-9)
    assert found == next(r for r in summarise(records, {}).results if r.metric == "accuracy")


def test_what_is_unclear_or_of_another_kind_does_not_count(
    chooser: LanguageModel, data: Path
) -> None:
    bench = TaskRows(chooser, "copa", data=str(data), metric="accuracy")
    base = bench.unsteered("test")[:6]
    values: list[Any] = [1.0, None, 0.0, 1.0]
    records = [{**r, "values": {"accuracy": v}} for r, v in zip(base, values, strict=False)]
    records += [{**r, "values": {"other": 1.0}} for r in base[4:]]
    found = bench.result(records)
    assert (found.value, found.n, found.unclear) == (pytest.approx(2 / 3), 3, 1)
    assert found == next(r for r in summarise(records, {}).results if r.metric == "accuracy")
    none = bench.result(records[1:2])
    assert (none.value, none.n, none.unclear, none.ci95) == (None, 0, 1, None)


# -- what a steering costs ------------------------------------------------------------------------


@pytest.mark.parametrize("resumed", [True, False])
def test_the_cost_is_that_of_an_effect(
    data: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    texts = [
        "The wind was good and the day was long.",
        "She looked at the map and asked where they were going. " * 3,
        "Read, write, listen and speak every day.",
    ]
    monkeypatch.setattr(module, "plain_texts", lambda: texts)
    lm = language_model("gemma3")
    bench = TaskRows(lm, "copa", data=str(data), resumed=resumed)
    effect = Effect(lm, tt.Contrast.from_pairs([("So", " it is.", " be it.")]), texts)
    assert bench.plain.cost(None) == 0.0
    for steering in (
        steer_at(lm, "resid", layer=1),
        steer_at(lm, "heads", "Scale", layer=2, positions="prompt"),
        steer_at(lm, "embed"),
        steer_at(lm, "ffn_out", layer=0, positions="last"),
        steer_at(lm, "resid", layer=2).at(0.0),
    ):
        assert bench.plain.cost(steering) == pytest.approx(effect.cost(steering), abs=1e-5)
    # By hand: two plain passes over each text, weighed by tokens.
    steering = steer_at(lm, "resid", layer=1)
    operator: Any = steering.interventions[0].operator
    sums = [0.0, 0.0]
    for i, edit in enumerate((lambda x: x, lambda x: x + operator.vector)):
        handle = lm.model.model.layers[1].register_forward_hook(
            lambda m, a, out, edit=edit: edit(out)
        )
        for text in texts:
            ids = lm.tokenizer(text, return_tensors="pt").input_ids
            with torch.no_grad():
                loss = lm.model(ids, labels=ids).loss
            sums[i] += float(loss) * (ids.shape[1] - 1)
        handle.remove()
    tokens = sum(len(lm.tokenizer(text).input_ids) - 1 for text in texts)
    assert bench.plain.cost(steering) == pytest.approx((sums[1] - sums[0]) / tokens, abs=1e-5)


# -- what is refused ------------------------------------------------------------------------------


def test_tasks_without_validation_rows(chooser: LanguageModel, data: Path, tmp_path: Path) -> None:
    for task in (f"perplexity:{data / 'text.txt'}", "lm-eval:arc_challenge"):
        for options in ({}, {"validation_task": "copa"}):
            refused_in_one_line(
                lambda task=task, options=options: TaskRows(
                    chooser, task, data=str(data), **options
                ),
                f"{task} has no validation rows to choose on: choose",
            )
    for task in ("xstest", f"coherence:{data / 'xstest' / 'xstest_v2.jsonl'}"):
        refused_in_one_line(
            lambda task=task: TaskRows(chooser, task, data=str(data)),
            "has no validation rows to choose on: name another task .*--validation-task",
        )
    refused_in_one_line(
        lambda: TaskRows(chooser, "copa", data=str(data), protocol="paper"), "no validation rows"
    )
    refused_in_one_line(lambda: TaskRows(chooser, "cupa", data=str(data)), "unknown task 'cupa'")
    unmarked = pairs_file(tmp_path, [None] * 7)
    refused_in_one_line(lambda: TaskRows(chooser, f"contrast:{unmarked}"), "has no validation rows")
    write(data / "copa" / "balanced_train.jsonl", copa_rows()[:1])  # none is held out
    refused_in_one_line(
        lambda: TaskRows(chooser, "copa", data=str(data)), "copa has no validation rows"
    )


def test_a_steering_that_never_acts_is_refused(chooser: LanguageModel, data: Path) -> None:
    bench = TaskRows(chooser, "copa", data=str(data))
    steering = steer_at(chooser, "resid", positions="generated")
    refused_in_one_line(lambda: bench.records(steering, "validation"), "never reaches")
    other = steer_at(language_model("llama", seed=1), "resid")
    refused_in_one_line(lambda: bench.records(other, "validation"), "was made for")


# -- resumed from a layer, on real models ---------------------------------------------------------


def random_methods(lm: LanguageModel, count: int, seed: int = 0) -> list[Any]:
    """Methods with random hyperparameters, a kind in turn."""
    chance = random.Random(seed)
    layers = range(lm.anatomy.layers)
    made: list[Any] = []
    for number in range(count):
        kind = number % 4
        if kind == 0:
            made.append(
                tt.CAA(
                    layer=chance.choice(layers), alpha=chance.choice((0.5, 1.0, 2.0)), token="last"
                )
            )
        elif kind == 1:
            site, k = chance.choice(("heads", "ffn_out")), chance.choice((1, 2, 4, 16, 64))
            made.append(
                tt.AUSteer(site=site, k=k, alpha=chance.choice((1.0, 4.0, 8.0)), direction="paper")
            )
        elif kind == 2:
            made.append(tt.ITI(k=chance.choice((1, 4, 16, 48)), alpha=chance.choice((1.0, 5.0))))
        else:
            variant = chance.choice(("head", "neuron", "hidden", "resid"))
            made.append(tt.SADI(variant=variant, k=chance.choice((1, 4, 8)), delta=1.0))
    return made


def resumed_is_full(lm: LanguageModel, data: Path, rows: int, count: int) -> None:
    """The same most probable token of every prompt, and log-probabilities of A and B to 1e-4."""
    bench = TaskRows(lm, "copa", data=str(data), test_limit=rows)
    job = bench.jobs["test"]
    assert isinstance(job, TaskJob)
    prompts = [example.prompt for example in job.entries[0].examples]
    options = [lm.tokenizer(x, add_special_tokens=False).input_ids[0] for x in "AB"]
    readings = []
    for tokens in lm.encode(prompts):
        end = len(tokens) - 1
        readings.append(Reading(tuple(tokens), (end, end), len(tokens), tuple(options)))
    contrast = TASKS["copa"].contrast(data=str(data)).take(12)
    steerings = tt.fit(random_methods(lm, count), lm, contrast)
    kept = StreamCache(lm)

    def found(steering: tt.Steering, kept: StreamCache | None) -> dict[int, Next]:
        batches = plan(readings, lm.batch_tokens)
        read = run_batches(lm, readings, batches, steering, kept=kept)
        return {i: each for batch, some in read for i, each in zip(batch.rows, some, strict=True)}

    unlike = 0
    before = None
    for steering in steerings:
        full, resumed = found(steering, None), found(steering, kept)
        for i in range(len(readings)):
            assert torch.equal(full[i].best, resumed[i].best), steering.label
            torch.testing.assert_close(full[i].log_p, resumed[i].log_p, rtol=0, atol=1e-4)
        now = torch.stack([full[i].log_p for i in range(len(readings))])
        unlike += before is None or not torch.allclose(now, before, atol=1e-3)
        before = now
    assert unlike == count  # each of them changes something


@pytest.mark.slow
def test_resumed_from_a_layer_it_is_the_same(smollm2: LanguageModel, data_dir: Path) -> None:
    resumed_is_full(smollm2, data_dir, rows=4, count=4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_resumed_from_a_layer_it_is_the_same_at_length(
    model: str, request: pytest.FixtureRequest, data_dir: Path
) -> None:
    resumed_is_full(request.getfixturevalue(model), data_dir, rows=200, count=20)


@pytest.mark.slow
def test_the_cost_on_a_real_model_is_that_of_an_effect(
    smollm2: LanguageModel, data_dir: Path
) -> None:
    bench = TaskRows(smollm2, "copa", data=str(data_dir))
    few = tt.Contrast.builtin("formality").part("train").take(12)
    effect = Effect(smollm2, few.take(2), module.plain_texts())
    for steering in tt.fit(
        [tt.CAA(layer=10, token="last"), tt.AUSteer(k=16, site="ffn_out", direction="paper")],
        smollm2,
        few,
    ):
        assert bench.plain.cost(steering) == pytest.approx(effect.cost(steering), abs=1e-5)
