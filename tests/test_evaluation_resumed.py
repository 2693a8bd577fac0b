"""Evaluations that were cut anywhere or killed go on, and end as those that were not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from evaluations import (
    LONG,
    WEATHER,
    Scorer,
    block_edited,
    chooser,
    content,
    copa_rows,
    data,
    of,
    same,
    speaking,
    strong,
    talker,
    write,
)
from helpers import language_model, refused_in_one_line
from trimtab.evaluation.evaluation import evaluate
from trimtab.model.language_model import LanguageModel
from trimtab.reports import Evaluation

__all__ = ["chooser", "data", "talker"]  # fixtures, which pytest finds by their names here

# -- rows and models ------------------------------------------------------------------------------


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
