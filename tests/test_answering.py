"""Answers of a task: those of plain passes and loops, each made once, also when a run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import (
    PROMPTS,
    asked,
    language_model,
    operator,
    plain_logits,
    refused_in_one_line,
    steer,
    token_ids,
)
from readings import hand_hooked
from tiny import tiny_tokenizer
from trimtab.evaluation.answering import Entry, Settings, answer
from trimtab.evaluation.tasks.data import Source
from trimtab.evaluation.tasks.task import Example, Generation, Task

# -- answering ---------------------------------------------------------------------------------


def a_task(generation: Generation, **options: Any) -> Task:
    return Task(
        name="songs",
        about="",
        test=Source("songs.jsonl"),
        train=None,
        columns={},
        example=lambda row, index, protocol: Example(str(index), row["prompt"]),
        generation=generation,
        **options,
    )


ONE_TOKEN = a_task(
    Generation(1),
    read=lambda output, protocol: output if protocol == "paper" else output.upper(),
    right=lambda a, b: a == b,
)
SAMPLED = a_task(Generation(6, sampled=True))
GREEDY = a_task(Generation(6))

LINES = [f"{prompt} {line}" for line in range(4) for prompt in PROMPTS]


def entries(
    prompts: Sequence[Any], protocols: Sequence[Any] = ("trimtab",), target: str | None = None
) -> list[Entry]:
    examples = tuple(Example(f"no {i}", prompt, target) for i, prompt in enumerate(prompts))
    return [Entry(protocol, examples) for protocol in protocols]


def answered(lm: tt.LanguageModel, task: Task, *args: Any, **options: Any) -> list[dict[str, Any]]:
    steering = options.pop("steering", None)
    done = options.pop("done", set())
    chosen = Settings(**{"batch_size": 3, **options.pop("settings", {})})
    given = args[0] if args else entries(LINES)
    return [r for some in answer(lm, task, given, steering, done, chosen, **options) for r in some]


@contextmanager
def counted_rows(lm: tt.LanguageModel) -> Iterator[list[int]]:
    """How many rows each pass of the model has, once it has been asked what it can."""
    asked(lm)
    rows: list[int] = []
    handle = lm.model.get_input_embeddings().register_forward_pre_hook(
        lambda m, args: rows.append(args[0].shape[0])
    )
    try:
        yield rows
    finally:
        handle.remove()


def plainly(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its time."""
    return {key: value for key, value in record.items() if key != "seconds"}


def by_index(records: Sequence[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    found = {(record["protocol"], record["index"]): plainly(record) for record in records}
    assert len(found) == len(records)
    return found


@pytest.mark.parametrize("steered", [False, True])
def test_one_token_answers_are_the_most_probable_tokens(steered: bool) -> None:
    lm = language_model("gemma3")
    op = operator("Add", lm.anatomy.hidden_size)
    steering = steer(lm, ("layers.1.resid", op), positions="last") if steered else None
    records = by_index(answered(lm, ONE_TOKEN, steering=steering))
    for i, line in enumerate(LINES):
        ids = token_ids(line)
        if steered:
            with hand_hooked(lm.model, op, "last", len(ids)):
                best = int(plain_logits(lm.model, ids)[-1].argmax())
        else:
            best = int(plain_logits(lm.model, ids)[-1].argmax())
        record = records["trimtab", i]
        assert record["output"] == tiny_tokenizer().decode([best], skip_special_tokens=True)
        assert record["id"] == f"no {i}"
        assert record["prompt"] == line


def test_a_prompt_of_both_protocols_is_answered_once_and_read_by_each() -> None:
    lm = language_model("llama")
    both = entries(LINES, ("paper", "trimtab"))
    with counted_rows(lm) as rows:
        records = by_index(answered(lm, GREEDY, both))
    assert sum(rows) == 6 * len(LINES)
    assert len(records) == 2 * len(LINES)
    for i in range(len(LINES)):
        assert records["paper", i]["output"] == records["trimtab", i]["output"]
    read = by_index(answered(lm, ONE_TOKEN, both))
    for i in range(len(LINES)):
        output = read["paper", i]["output"]
        assert read["paper", i]["prediction"] == output
        assert read["trimtab", i]["prediction"] == output.upper()


def test_rows_with_one_prompt_are_answered_once_each_with_its_own_target() -> None:
    lm = language_model("llama")
    best = tiny_tokenizer().decode(
        [int(plain_logits(lm.model, token_ids(PROMPTS[0]))[-1].argmax())]
    )
    examples = (Example("a", PROMPTS[0], best.upper()), Example("b", PROMPTS[0], "something else"))
    with counted_rows(lm) as rows:
        records = answered(lm, ONE_TOKEN, [Entry("trimtab", examples)])
    assert sum(rows) == 1
    assert [(record["id"], record["values"]["accuracy"]) for record in records] == [
        ("a", 1.0),
        ("b", 0.0),
    ]


@pytest.mark.parametrize("task", [ONE_TOKEN, GREEDY, SAMPLED], ids=["one", "greedy", "sampled"])
def test_a_run_goes_on_with_the_very_same_answers(task: Task) -> None:
    lm = language_model("llama")
    whole = answered(lm, task)
    full = by_index(whole)
    for kept in (3, 4, 7, len(whole)):  # also in the middle of a batch
        done = {(record["protocol"], record["index"]) for record in whole[:kept]}
        rest = by_index(answered(lm, task, done=done))
        assert rest.keys() == full.keys() - done
        assert all(full[key] == record for key, record in rest.items())


def test_what_is_done_is_not_run_again() -> None:
    lm = language_model("llama")
    for task in (ONE_TOKEN, SAMPLED):
        whole = answered(lm, task)
        done = {(record["protocol"], record["index"]) for record in whole}
        with counted_rows(lm) as rows:
            assert answered(lm, task, done=done) == []
            assert rows == []
    done -= {("trimtab", whole[-1]["index"])}
    with counted_rows(lm) as rows:
        [record] = answered(lm, SAMPLED, done=done)
    assert plainly(record) == plainly(whole[-1])
    assert set(rows) == {3}  # its batch, and no other


def test_sampled_answers_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama")
    seeds: list[int] = []
    generate = lm.generate

    def watched(*args: Any, seed: int, **options: Any) -> Any:
        seeds.append(seed)
        return generate(*args, seed=seed, **options)

    monkeypatch.setattr(lm, "generate", watched)
    first = by_index(answered(lm, SAMPLED))
    assert len(set(seeds)) == len(seeds) == 4  # one for each batch
    torch.manual_seed(5)
    assert by_index(answered(lm, SAMPLED)) == first
    assert by_index(answered(lm, SAMPLED, settings={"seed": 1})) != first


def test_greedy_answers_are_generated_as_by_hand() -> None:
    lm = language_model("gemma3")
    records = by_index(answered(lm, GREEDY, settings={"max_new_tokens": 4}))
    for i, line in enumerate(LINES):
        ids = token_ids(line)
        for _ in range(4):
            ids = [*ids, int(plain_logits(lm.model, ids)[-1].argmax())]
        new = ids[-4:]
        assert records["trimtab", i]["output"] == tiny_tokenizer().decode(
            new, skip_special_tokens=True
        )


def test_each_output_is_measured_once_and_for_its_own_example() -> None:
    lm = language_model("llama")
    seen: list[str] = []

    def measure(examples: Any, completions: Any) -> list[dict[str, float | None]]:
        assert [e.prompt for e in examples] == [c.prompt for c in completions]
        seen.extend(example.prompt for example in examples)
        return [{"length": float(len(c.text)), "none": None} for c in completions]

    records = answered(lm, GREEDY, entries(LINES, ("paper", "trimtab")), measure=measure)
    assert sorted(seen) == sorted(LINES)
    assert len(records) == 2 * len(LINES)
    for record in records:
        assert record["values"] == {"length": float(len(record["output"])), "none": None}


def test_a_long_prompt_loses_its_beginning_but_not_bos() -> None:
    lm = language_model("llama")
    long = "The answer to the question is not known. " * 40
    ids = token_ids(long)
    room = lm.max_length - 1
    assert len(ids) > room
    with pytest.warns(tt.TrimtabWarning, match=f"1 of 2 prompts are longer than {room} tokens"):
        records = by_index(answered(lm, ONE_TOKEN, entries([long, PROMPTS[0]])))
    kept = [ids[0], *ids[len(ids) - room + 1 :]]
    assert len(kept) == room
    best = int(plain_logits(lm.model, kept)[-1].argmax())
    assert records["trimtab", 0]["output"] == tiny_tokenizer().decode([best])
    assert records["trimtab", 0]["prompt"] == long


def test_a_prompt_without_room_for_its_answer_is_refused_before_anything_runs() -> None:
    lm = language_model("llama")
    long = "The answer to the question is not known. " * 40
    with counted_rows(lm) as rows:
        refused_in_one_line(
            lambda: answered(lm, GREEDY, entries([*LINES, long])), "songs: a prompt of .* tokens"
        )
    assert rows == []


def test_a_prompt_without_tokens_is_refused() -> None:
    lm = language_model("gpt2")
    lm.tokenizer = tiny_tokenizer().__class__(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="<pad>"
    )
    lm.encode = lambda prompts: [[] for _ in prompts]  # type: ignore[method-assign,assignment,misc]
    refused_in_one_line(lambda: answered(lm, ONE_TOKEN, entries([""])), "has no tokens")


def test_conversations_go_through_the_template_or_become_plain_text() -> None:
    lm = language_model("llama")
    chat = (("system", "Write a poem."), ("user", "About bread."))
    [with_template] = answered(lm, ONE_TOKEN, entries([chat]))
    rendered = "<s><|system|>\nWrite a poem.</s>\n<|user|>\nAbout bread.</s>\n<|assistant|>\n"
    ids = tiny_tokenizer()(rendered, add_special_tokens=False).input_ids
    best = int(plain_logits(lm.model, ids)[-1].argmax())
    assert with_template["output"] == tiny_tokenizer().decode([best])
    plain = language_model("llama")
    plain.tokenizer = tiny_tokenizer().__class__(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token="<s>", pad_token="<pad>"
    )
    [without] = answered(plain, ONE_TOKEN, entries([chat]))
    best = int(plain_logits(lm.model, token_ids("Write a poem.\n\nAbout bread.\n"))[-1].argmax())
    assert without["output"] == tiny_tokenizer().decode([best])


def test_a_stop_pattern_ends_the_answer() -> None:
    lm = language_model("llama")
    plain = by_index(answered(lm, a_task(Generation(12))))
    stopped = by_index(answered(lm, a_task(Generation(12, stop=r"\S\s"))))
    shorter = 0
    for key, record in plain.items():
        assert record["output"].startswith(stopped[key]["output"])
        shorter += len(stopped[key]["output"]) < len(record["output"])
    assert shorter
