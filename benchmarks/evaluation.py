"""Evaluating against the authors' way and against lm-eval's own model.

AUSteer's authors answer one example at a time through `generate`; lm-eval's `hf` model scores one
request at a time in batches that it is told the size of. Before anything is timed, it is checked
that all ways give the same predictions, or the same likelihoods.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import Report, interleaved, ratio

import trimtab as tt
from trimtab.evaluation.tasks import TASKS

MODEL = "smollm2-135m-instruct"
ROWS = {"copa": 48, "winogrande": 48, "boolq": 24}
#: Questions of four options with five examples before them, as MMLU has it.
QUESTIONS = 24
TOLERANCE = 1e-3  # nats

Say = Callable[[str], None]


def run(data: Path, rounds: int, rows: int | None, say: Say) -> list[Report]:
    lm = tt.load(MODEL, device="cpu")
    reports = [_task(lm, name, data, rounds, rows or n, say) for name, n in ROWS.items()]
    return [*reports, _choices(lm, rounds, rows or QUESTIONS, say)]


def _task(lm: tt.LanguageModel, name: str, data: Path, rounds: int, n: int, say: Say) -> Report:
    def ours() -> list[str]:
        found = tt.evaluate(lm, name, data=data, limit=n)
        return [record["output"] for record in found.records]

    task = TASKS[name]
    chosen = task.rows("test", "paper", str(data))[:n]
    prompts = [str(task.example(row, i, "paper").prompt) for i, row in enumerate(chosen)]

    def theirs() -> list[str]:
        return [_one_at_a_time(lm, prompt) for prompt in prompts]

    say(f"evaluation: checking {name}")
    if ours() != theirs():
        raise tt.TrimtabError(f"evaluation: the two ways answer {name} differently")
    say(f"evaluation: {name}, {rounds} rounds")
    times = interleaved({"trimtab": ours, "authors": theirs}, rounds)
    ratios = [ratio("authors / trimtab", times["authors"], times["trimtab"])]
    return Report(f"evaluation: {name}, SmolLM2 135M", n, times, ratios, {"unit": "examples"})


@torch.no_grad()
def _one_at_a_time(lm: tt.LanguageModel, prompt: str) -> str:
    inputs = lm.tokenizer(prompt, return_tensors="pt")
    output = lm.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    text: str = lm.tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


def _choices(lm: tt.LanguageModel, rounds: int, n: int, say: Say) -> Report:
    """A task of lm-eval on questions about sums, with five examples in the prompt."""
    from lm_eval.models.huggingface import HFLM

    from trimtab.evaluation.harness.model import TrimtabLM
    from trimtab.evaluation.harness.run import run_task

    with tempfile.TemporaryDirectory() as room:
        _write_task(Path(room), n)

        def scored(model: Any) -> list[float]:
            records = run_task("sums", model, task_files=[room])
            return [float(pair[0]) for record in records for pair in record["output"]]

        def ours() -> list[float]:
            return scored(TrimtabLM(lm))  # a new one each time: it keeps its answers

        theirs = {size: HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=size) for size in (1, 16)}
        say("evaluation: checking a task of lm-eval")
        expected = ours()
        for model in theirs.values():
            apart = max(abs(a - b) for a, b in zip(expected, scored(model), strict=True))
            if apart > TOLERANCE:
                raise tt.TrimtabError(f"evaluation: lm-eval's hf model is {apart} nats apart")
        say(f"evaluation: lm-eval, {rounds} rounds")
        contenders = {"trimtab": ours}
        for size, model in theirs.items():
            contenders[f"hf, batch {size}"] = partial(scored, model)
        times = interleaved(contenders, rounds)
    ratios = [
        ratio(f"{name} / trimtab", times[name], times["trimtab"])
        for name in times
        if name != "trimtab"
    ]
    return Report(
        "evaluation: five-shot choices through lm-eval, SmolLM2 135M",
        n,
        times,
        ratios,
        {"unit": "questions"},
    )


def _write_task(room: Path, n: int) -> None:
    rows = []
    for i in range(n + 5):
        a, b = 3 + 7 * i % 50, 4 + 5 * i % 41
        right = i % 4
        choices = [str(a + b + j - right) for j in range(4)]
        question = f"A baker sold {a} loaves in the morning and {b} after noon. How many in all?"
        rows.append({"question": question, "choices": choices, "answer": right})
    for split, part in (("dev", rows[:5]), ("test", rows[5:])):
        lines = (json.dumps(row) + "\n" for row in part)
        (room / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(room / f"{s}.jsonl") for s in ("dev", "test")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 5,
        "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (room / "sums.yaml").write_text(json.dumps(task), encoding="utf-8")
