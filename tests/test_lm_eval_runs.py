"""trimtab as a model of lm-evaluation-harness: nothing is computed twice, a scoring that was killed
goes on, and the harness builds it from arguments."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
import trimtab.evaluation.harness.model
from harness_models import (
    CHOICE,
    CONTEXTS,
    PAIRS,
    SHARED,
    choice_rows,
    evaluated,
    hf,
    likelihoods,
    lm,
    no_survey,
    write_task,
    written,
)
from helpers import asked, language_model, operator, refused_in_one_line, steer, token_ids
from trimtab.evaluation.harness.model import TrimtabLM
from trimtab.evaluation.harness.run import run_task

__all__ = ["lm", "no_survey"]  # fixtures, which pytest finds by their names here

# -- nothing is computed twice -----------------------------------------------------------------


@contextmanager
def counted(lm: tt.LanguageModel) -> Iterator[list[tuple[int, int]]]:
    """[rows, tokens] of every pass through the body of the model, once it has been asked what it
    can."""
    asked(lm)
    seen: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    handle = lm.anatomy.body.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def test_options_of_one_token_share_a_reading(lm: tt.LanguageModel) -> None:
    questions = [f"{CONTEXTS[i % 5]} {i}?\nAnswer" for i in range(10)]
    pairs = [(question, letter) for question in questions for letter in "ABCD"]
    assert all(len(token_ids(q + a)) == len(token_ids(q)) + 1 for q, a in pairs)
    with counted(lm) as seen:
        likelihoods(TrimtabLM(lm), pairs)
    assert sum(rows for rows, _ in seen) == 10
    assert len({option for option, _ in likelihoods(TrimtabLM(lm), pairs)}) == 40


def test_examples_that_prompts_share_are_run_once(lm: tt.LanguageModel) -> None:
    shared = len(token_ids(SHARED))
    pairs = [(SHARED + context, " yes") for context in CONTEXTS]
    with counted(lm) as seen:
        likelihoods(TrimtabLM(lm), pairs)
    assert seen[0][0] == 1
    assert seen[0][1] >= shared - 1
    rest = sum(rows * tokens for rows, tokens in seen[1:])
    assert rest < len(pairs) * 30 < len(pairs) * shared


def test_a_greedy_text_is_written_once(lm: tt.LanguageModel) -> None:
    with counted(lm) as seen:
        found = written(TrimtabLM(lm), ["Today I feel"] * 5, max_gen_toks=3)
    assert len(found) == 5
    assert len(set(found)) == 1
    assert all(rows == 1 for rows, _ in seen)


# -- answers are kept --------------------------------------------------------------------------


class Killed(BaseException):
    """What no `except Exception` holds back."""


def killed_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """The next run dies when it wants one batch more."""
    original = trimtab.evaluation.harness.model.next_tokens

    def dying(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, found in enumerate(original(*args, **kwargs)):
            if number == batches:
                raise Killed
            yield found

    monkeypatch.setattr(trimtab.evaluation.harness.model, "next_tokens", dying)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_killed_scoring_goes_on(
    batches: int, lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tt.LanguageModel, "batch_tokens", 60)
    pairs = [(f"{context} {i}", answer) for i in range(3) for context, answer in PAIRS[:9]]
    with counted(lm) as whole:
        expected = likelihoods(TrimtabLM(lm), pairs)
    file = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch:
        killed_after(patch, batches)
        with pytest.raises(Killed):
            likelihoods(TrimtabLM(lm, answers=file), pairs)
    with file.open("ab") as opened:
        opened.write(b'{"abc": [[-1.5, tr')  # and cut off in the middle of a line
    with counted(lm) as second:
        assert likelihoods(TrimtabLM(lm, answers=file), pairs) == expected
    assert len(whole) > 4
    # Finished batches are not run again; a beginning that batches share is.
    rows = [sum(one for one, _ in seen) for seen in (whole, second)]
    assert rows[1] < rows[0] if batches else rows[1] == rows[0]
    fresh = tmp_path / "fresh.jsonl"
    likelihoods(TrimtabLM(lm, answers=fresh), pairs)
    assert file.read_bytes() == fresh.read_bytes()  # a line for each batch, in their order
    with counted(lm) as third:
        assert likelihoods(TrimtabLM(lm, answers=file), pairs) == expected
    assert not third


def test_killed_writing_goes_on(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = written(TrimtabLM(lm, batch_size=2), CONTEXTS, max_gen_toks=6)
    file, calls = tmp_path / "answers.jsonl", []
    original = tt.LanguageModel.generate

    def dying(self: tt.LanguageModel, prompts: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise Killed
        return original(self, prompts, **options)

    monkeypatch.setattr(tt.LanguageModel, "generate", dying)
    with pytest.raises(Killed):
        written(TrimtabLM(lm, batch_size=2, answers=file), CONTEXTS, max_gen_toks=6)
    model = TrimtabLM(lm, batch_size=2, answers=file)
    assert written(model, CONTEXTS, max_gen_toks=6) == expected
    assert calls == [2, 2, 2, 1]  # killed in the second, and the first is not run again
    assert written(TrimtabLM(lm, answers=file), CONTEXTS, max_gen_toks=6) == expected
    assert len(calls) == 4


def test_answers_of_another_steering_model_or_question_are_not_taken(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    file, pairs = tmp_path / "answers.jsonl", PAIRS[:4]
    steering = steer(lm, ("layers.1.resid", operator("Add", lm.anatomy.hidden_size)))
    others = [
        (lm, None),
        (lm, steering.at(1)),
        (lm, steering.at(2)),
        (lm, steering.at(1) + steering.at(2)),
        (language_model("llama", seed=1), None),
        (language_model("llama", dtype=torch.bfloat16), None),
    ]
    likely, texts = [], []
    for one in others:
        fresh, kept = TrimtabLM(*one), TrimtabLM(*one, answers=file)  # which has the earlier ones'
        likely.append(likelihoods(fresh, pairs))
        texts.append(written(fresh, CONTEXTS[:1], max_gen_toks=8)[0])
        assert likelihoods(kept, pairs) == likely[-1]
        assert written(kept, CONTEXTS[:1], max_gen_toks=8)[0] == texts[-1]
    assert len({one[0][0] for one in likely}) == len(others)
    assert len(set(texts)) >= 4
    shorter = written(TrimtabLM(lm, answers=file), CONTEXTS[:1], max_gen_toks=4)
    assert shorter == written(TrimtabLM(lm), CONTEXTS[:1], max_gen_toks=4)


def test_answers_that_cannot_be_kept_are_refused_in_one_line(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"a": 1}\nno answers\n{"b": 2}\n')
    refused_in_one_line(lambda: TrimtabLM(lm, answers=file), "line 2 is damaged: it is not JSON")
    assert file.read_text().count("\n") == 3  # nothing is lost
    refused_in_one_line(lambda: TrimtabLM(lm, answers=tmp_path), "cannot be read: Is a directory")
    gone = TrimtabLM(lm, answers=tmp_path / "no" / "answers.jsonl")
    refused_in_one_line(lambda: likelihoods(gone, PAIRS[:1]), "cannot write .*answers.jsonl")


# -- as a user names it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, tt.LanguageModel]:
    """A model's directory and a steering's file, and the model."""
    room = tmp_path_factory.mktemp("saved")
    lm = language_model("llama")
    lm.save_pretrained(room / "model")
    steering = steer(lm, ("layers.1.resid", operator("Add", lm.anatomy.hidden_size)))
    steering.save(room / "formal.safetensors")
    return str(room / "model"), str(room / "formal.safetensors"), lm


def accuracies(found: Any) -> list[float]:
    return [
        log_p
        for sample in found["samples"]["toy"]
        for response in sample["resps"]
        for log_p, _ in response
    ]


@pytest.mark.parametrize("dials", [(), (2.0,), (2.0, -3.0)])
def test_the_harness_builds_the_model_from_its_arguments(
    dials: tuple[float, ...], saved: tuple[str, str, tt.LanguageModel], tmp_path: Path
) -> None:
    directory, file, lm = saved
    manager = write_task(tmp_path, "toy", choice_rows(4), **CHOICE)
    steering = tt.Steering.load(file)
    arguments = f"pretrained={directory}"
    if dials:
        arguments += ",steering=" + ";".join(f"{file}@{dial:g}" for dial in dials)
    found = evaluated(
        "trimtab",
        "toy",
        manager,
        model_args=arguments,
        batch_size="auto",
        device="cuda:0",  # as the harness's command says on any machine
    )
    together = tt.Steerings(steering.at(dial) for dial in dials) if dials else None
    direct = evaluated(TrimtabLM(lm, together), "toy", manager)
    assert accuracies(found) == pytest.approx(accuracies(direct), abs=1e-4)
    unsteered = evaluated(TrimtabLM(lm), "toy", manager)
    assert (accuracies(found) != pytest.approx(accuracies(unsteered), abs=1e-2)) == bool(dials)


def test_arguments_that_are_wrong_are_refused_in_one_line(
    saved: tuple[str, str, tt.LanguageModel], tmp_path: Path
) -> None:
    directory, file, _ = saved
    manager = write_task(tmp_path, "toy", choice_rows(2), **CHOICE)

    def run(arguments: str) -> None:
        evaluated("trimtab", "toy", manager, model_args=f"pretrained={directory},{arguments}")

    refused_in_one_line(lambda: run("steering=no.safetensors@2"), "no.safetensors")
    refused_in_one_line(lambda: run(f"steering={file}@two"), "'two' is no number")
    refused_in_one_line(lambda: run("dtype=float64"), "float64")
    refused_in_one_line(lambda: run("parallelize=True"), "no argument parallelize: known are")
    other = language_model("llama", seed=5)
    steer(other, ("layers.1.resid", operator("Add", 48))).save(tmp_path / "other.safetensors")
    theirs = f"steering={tmp_path}/other.safetensors"
    refused_in_one_line(lambda: run(theirs), "this steering was made for llama")
    run(f"{theirs},force=True")
    steer(language_model("qwen2"), ("layers.1.resid", operator("Add", 64))).save(
        tmp_path / "wide.safetensors"
    )
    refused_in_one_line(lambda: run(f"steering={tmp_path}/wide.safetensors,force=True"), "sizes")


def test_chats_go_through_the_template(lm: tt.LanguageModel, tmp_path: Path) -> None:
    manager = write_task(tmp_path, "toy", choice_rows(3), **CHOICE)
    options = {"apply_chat_template": True, "num_fewshot": 1}
    ours = evaluated(TrimtabLM(lm), "toy", manager, **options)
    theirs = evaluated(hf(lm, batch_size=2), "toy", manager, **options)
    prompts = [sample["arguments"][0][0] for sample in ours["samples"]["toy"]]
    assert all(prompt.startswith("<s><|user|>") for prompt in prompts)
    assert accuracies(ours) == pytest.approx(accuracies(theirs), abs=1e-3)
    lm = tt.wrap(lm.model, copy.deepcopy(lm.tokenizer), "bare")
    lm.tokenizer.chat_template = None
    refused_in_one_line(
        lambda: run_task("toy", TrimtabLM(lm), task_files=[tmp_path], chat=True), "chat template"
    )


def test_a_template_without_system_messages_is_used_without_them(lm: tt.LanguageModel) -> None:
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert TrimtabLM(lm).apply_chat_template(chat) == hf(lm).apply_chat_template(chat) == "[Hello]"


@pytest.mark.slow  # the harness's command reads all of its own task files
def test_the_command_works_as_typed(
    saved: tuple[str, str, tt.LanguageModel], tmp_path: Path
) -> None:
    directory, file, lm = saved
    manager = write_task(tmp_path, "toy", choice_rows(6), **CHOICE)
    steering = tt.Steering.load(file).at(2)
    expected = evaluated(TrimtabLM(lm, steering), "toy", manager)["results"]["toy"]

    def typed(task: str, steering: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trimtab.lm_eval", "--model", "trimtab"]
        command += ["--model_args", f"pretrained={directory},steering={steering}"]
        command += ["--tasks", task, "--include_path", str(tmp_path)]
        command += ["--output_path", str(tmp_path / "out"), "--batch_size", "4"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    done = typed("toy", f"{file}@2")
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["toy"]
    assert found["acc,none"] == expected["acc,none"]
    assert found["acc_norm,none"] == expected["acc_norm,none"]
    assert "|toy" in done.stdout.replace(" ", "")
    for wrong in (typed("toy", "no.safetensors@2"), typed("no_such_task", f"{file}@2")):
        assert wrong.returncode == 2
        assert "Traceback" not in wrong.stderr
        assert wrong.stderr.strip().splitlines()[-1].startswith("trimtab: ")
