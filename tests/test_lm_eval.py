"""trimtab as a model of lm-evaluation-harness: its numbers are those of the harness's own `hf`
model, steered ones those of a plain loop, and an evaluation that was killed goes on."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors
from torch import Tensor

import trimtab as tt
import trimtab.evaluation.harness.model
import trimtab.evaluation.harness.run
from helpers import (
    by_hand,
    language_model,
    operator,
    plain_logits,
    refused_in_one_line,
    steer,
    token_ids,
)
from tiny import tiny_tokenizer
from trimtab.evaluation.harness.model import TrimtabLM
from trimtab.evaluation.harness.run import run_task
from trimtab.steering.artifact import POSITIONS, Positions


@pytest.fixture(autouse=True)
def _no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks pip and the operating system what there is, for its own record."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture
def lm() -> tt.LanguageModel:
    return language_model("llama")


def hf(lm: tt.LanguageModel, **options: Any) -> HFLM:
    """The harness's own model on the same weights."""
    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, device="cpu", **options)


def asks(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def likelihoods(model: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = model.loglikelihood(
        asks("loglikelihood", pairs), disable_tqdm=True
    )
    return found


def rolling(model: Any, texts: Sequence[str]) -> list[float]:
    asked = asks("loglikelihood_rolling", [(text,) for text in texts])
    found: list[float] = model.loglikelihood_rolling(asked, disable_tqdm=True)
    return found


def written(model: Any, contexts: Sequence[str], **options: Any) -> list[str]:
    asked = asks("generate_until", [(context, options) for context in contexts])
    found: list[str] = model.generate_until(asked, disable_tqdm=True)
    return found


def same_likelihoods(
    actual: Sequence[tuple[float, bool]],
    expected: Sequence[tuple[float, bool]],
    tolerance: float = 1e-3,
) -> None:
    assert len(actual) == len(expected)
    for (log_p, greedy), (other, also) in zip(actual, expected, strict=True):
        assert log_p == pytest.approx(other, abs=tolerance)
        assert greedy is also


# -- a task in files ---------------------------------------------------------------------------


def write_task(
    directory: Path, name: str, rows: Sequence[dict[str, Any]], **content: Any
) -> TaskManager:
    """A task file with its rows, and a manager that knows nothing else."""
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}
    (directory / f"{name}.yaml").write_text(json.dumps(task | content), encoding="utf-8")
    return TaskManager(include_path=[str(directory)], include_defaults=False)


def choice_rows(count: int) -> list[dict[str, Any]]:
    """Questions with two to four options, of one word and of several."""
    chance = random.Random(0)
    things = {
        "bread": "flour, water, salt and time",
        "tea": "leaves and hot water",
        "a poem": "words, one after the other",
        "snow": "frozen water",
        "a map": "paper and ink",
        "paper": "wood",
    }
    rows = []
    for _ in range(count):
        if chance.random() < 0.5:
            thing, right = chance.choice(list(things.items()))
            question = f"What is {thing} made of?"
            wrong = [one for one in things.values() if one != right]
        else:
            a, b = chance.randrange(50), chance.randrange(50)
            question, right = f"How much is {a} and {b}?", str(a + b)
            wrong = [str(a + b + step) for step in (1, 7, 10)]
        options = [right, *chance.sample(wrong, chance.randrange(1, 4))]
        chance.shuffle(options)
        rows.append({"question": question, "options": options, "gold": options.index(right)})
    return rows


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "gold",
    "fewshot_split": "test",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}


def evaluated(model: Any, name: str, manager: TaskManager, **options: Any) -> Any:
    return simple_evaluate(
        model=model, tasks=[name], task_manager=manager, bootstrap_iters=0, **options
    )


# -- the harness's own model says the same -----------------------------------------------------


def test_a_task_on_smollm2_is_scored_as_by_hf(smollm2: Any, tmp_path: Path) -> None:
    manager = write_task(tmp_path, "toy", choice_rows(50), **CHOICE)
    ours = evaluated(TrimtabLM(smollm2), "toy", manager)
    theirs = evaluated(hf(smollm2, batch_size=8), "toy", manager)
    responses = [
        [(sample["doc_id"], *response[0]) for sample in found["samples"]["toy"]
         for response in sample["resps"]]
        for found in (ours, theirs)
    ]  # fmt: skip
    assert len(responses[0]) > 120
    assert [one[0] for one in responses[0]] == [one[0] for one in responses[1]]
    same_likelihoods([one[1:] for one in responses[0]], [one[1:] for one in responses[1]])
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"]["toy"][metric] == theirs["results"]["toy"][metric]
    assert 0.1 < ours["results"]["toy"]["acc,none"] < 0.9  # or anything would pass


#: Long enough that two of them, and much of one, leave the 256 tokens of a tiny model.
LONG = "She looked at the map and asked where they were going, and he did not know. " * 12
SHARED = "The answer to the first question is yes.\nThe answer to the second question is no.\n" * 2

PAIRS = [
    ("Today I feel", " happy"),
    ("Today I feel", " sad because of the rain"),
    ("Today I feel ", "happy"),  # the space belongs to the answer
    ("Today I feel \n\n ", "happy"),
    ("", "The ship left the harbour."),
    ("", "yes"),
    ("Is it true?", "\n\nIt is. ☃ 雪"),
    (SHARED + "Is it right?", " yes"),
    (SHARED + "Is it right?", " no"),
    (SHARED + "Is it wrong?", " no, it is not"),
    (SHARED + "Is it wrong?", " no, it is"),
    (SHARED + "Is it wrong?", " no, it is"),  # asked twice
    (LONG, " yes"),
    (LONG, " no, they were not"),
    (LONG + "And so?", " They ruled together."),
    ("x", LONG[: len(LONG) // 2]),
    ("<s>Today I feel", " happy"),  # BOS is there already
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_likelihoods_are_those_of_hf(name: str, lm: tt.LanguageModel) -> None:
    lm = language_model(name)
    assert len(token_ids(LONG)) > 257  # the context alone is too long
    with pytest.warns(tt.TrimtabWarning, match="3 of 17 prompts are longer than the 256 tokens"):
        ours = likelihoods(TrimtabLM(lm), PAIRS)
    same_likelihoods(ours, likelihoods(hf(lm, batch_size=3), PAIRS))


def test_the_most_probable_answer_is_greedy(lm: tt.LanguageModel) -> None:
    """At random none of the answers is; one that the model itself wrote is."""
    texts = [(("context", ""), token_ids("Today I feel"), []) for _ in range(2)]
    best = plain_logits(lm.model, texts[0][1])[-1].argmax().item()
    after = plain_logits(lm.model, [*texts[0][1], int(best)])[-1].argmax().item()
    requests = [
        (None, texts[0][1], [int(best)]),
        (None, texts[0][1], [int(best), int(after)]),
        (None, texts[0][1], [int(best), int(after) - 1]),
    ]
    model = TrimtabLM(lm)
    assert [greedy for _, greedy in model._loglikelihood_tokens(requests)] == [True, True, False]
    same_likelihoods(
        model._loglikelihood_tokens(requests), hf(lm)._loglikelihood_tokens(requests, True)
    )


@pytest.mark.parametrize("length", [256, 16])
def test_rolling_likelihoods_are_those_of_hf(
    length: int, lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tt.LanguageModel, "max_length", length)
    texts = ["Yes.", LONG, "", "She looked at the map.", "Water boils at 100 degrees " * 9]
    theirs = rolling(hf(lm, max_length=length, batch_size=2), texts)
    assert rolling(TrimtabLM(lm), texts) == pytest.approx(theirs, abs=2e-3)
    assert theirs[2] != theirs[0]


def test_what_cannot_be_scored_is_refused_in_one_line(lm: tt.LanguageModel) -> None:
    model = TrimtabLM(lm)
    refused_in_one_line(lambda: likelihoods(model, [("Yes", "")]), "likelihood of 0 tokens")
    refused_in_one_line(lambda: likelihoods(model, [("Yes", LONG)]), "it can be 1 to 256")


CONTEXTS = [
    "Today I feel",
    "She looked at the map and asked where they were going",
    "Q: What is the capital of France?\nA:",
    "Two and two is",
    "The king said:",
]


def ends_of(texts: Sequence[str]) -> list[str]:
    """Strings that these texts hold: one early in the first, one late in the second."""
    return [texts[0][3:6], texts[1][-9:-6]]


def test_texts_are_those_of_hf(lm: tt.LanguageModel) -> None:
    theirs = hf(lm, batch_size=2)
    options: dict[str, Any] = {"max_gen_toks": 20, "do_sample": False}
    whole = written(theirs, CONTEXTS, until=[], **options)
    assert written(TrimtabLM(lm), CONTEXTS, until=[], **options) == whole
    assert len(set(whole)) == len(whole)
    until = ends_of(whole)
    ended = written(theirs, CONTEXTS, until=until, **options)
    assert ended[0] != whole[0]  # the strings were met
    assert ended[1] != whole[1]
    for size in (1, 2, 16):
        assert written(TrimtabLM(lm, batch_size=size), CONTEXTS, until=until, **options) == ended
    # What the harness passes over, so do we: an empty string, other names of the length.
    options = {"max_new_tokens": 20, "temperature": 0.0}
    assert written(TrimtabLM(lm), CONTEXTS, until=["", *until], **options) == ended
    assert written(TrimtabLM(lm), CONTEXTS[:1], until=until[0], **options) == ended[:1]


def test_a_text_ends_where_the_model_ends_it(lm: tt.LanguageModel) -> None:
    news = []
    for context in CONTEXTS[:3]:
        ids = torch.tensor([token_ids(context)])
        new = lm.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        news.append(new.tolist())
    end = news[1][5]
    lm.model.generation_config.eos_token_id = end
    cut = [new[: new.index(end)] if end in new else new for new in news]
    expected = [lm.tokenizer.decode(new, skip_special_tokens=True) for new in cut]
    assert len(cut[1]) < 12
    assert written(TrimtabLM(lm), CONTEXTS[:3], max_gen_toks=12) == expected


def test_texts_are_256_tokens_unless_said_otherwise(lm: tt.LanguageModel) -> None:
    refused_in_one_line(
        lambda: written(TrimtabLM(lm), ["Today"]), "256 new tokens do not fit in the 256 tokens"
    )


def test_a_context_that_is_too_long_keeps_its_end(lm: tt.LanguageModel) -> None:
    bare = copy.deepcopy(tiny_tokenizer())
    bare.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    lm = tt.wrap(lm.model, bare, "without BOS")
    contexts = [LONG + "Today I feel", "The king said:"]
    with pytest.warns(tt.TrimtabWarning, match="1 of 2 prompts are longer than"):
        ours = written(TrimtabLM(lm), contexts, max_gen_toks=8)
    assert ours == written(hf(lm, batch_size=1), contexts, max_gen_toks=8, until=[])


def test_a_context_that_is_cut_keeps_bos(lm: tt.LanguageModel) -> None:
    ids = token_ids(LONG)
    bos, room = ids[0], 256 - 8
    tail = [bos, *ids[-(room - 1) :]]
    new = lm.model.generate(torch.tensor([tail]), max_new_tokens=8, do_sample=False)[0, room:]
    with pytest.warns(tt.TrimtabWarning, match="lost their beginning"):
        assert written(TrimtabLM(lm), [LONG], max_gen_toks=8) == [
            lm.tokenizer.decode(new, skip_special_tokens=True)
        ]


def test_options_of_texts_that_trimtab_lacks_are_refused(lm: tt.LanguageModel) -> None:
    model = TrimtabLM(lm)
    refused_in_one_line(
        lambda: written(model, ["Today"], max_gen_toks=4, num_beams=4), "texts with num_beams"
    )
    greedy = written(model, ["Today"], max_gen_toks=4)
    assert written(model, ["Today"], max_gen_toks=4, num_beams=1) == greedy


def test_options_of_a_task_are_those_of_generate(lm: tt.LanguageModel) -> None:
    model, asked = TrimtabLM(lm), {"repetition_penalty": 1.6, "suppress_tokens": [9, 10]}
    ours = written(model, CONTEXTS[:3], max_gen_toks=8, **asked)
    same = lm.generate(CONTEXTS[:3], max_new_tokens=8, chat=False, **asked)
    assert ours == [one.text for one in same] != written(model, CONTEXTS[:3], max_gen_toks=8)


def test_settings_of_the_checkpoint_leave_a_tasks_texts_alone(lm: tt.LanguageModel) -> None:
    free = written(TrimtabLM(lm), CONTEXTS[:3], max_gen_toks=8)
    for name, value in {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "min_p": 0.9}.items():
        setattr(lm.model.generation_config, name, value)
    assert written(TrimtabLM(lm), CONTEXTS[:3], max_gen_toks=8) == free


def test_a_template_that_refuses_the_messages_is_one_line(lm: tt.LanguageModel) -> None:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles\nmust alternate') }}"
    model = TrimtabLM(tt.wrap(lm.model, tokenizer, "strict"))
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    refused_in_one_line(lambda: model.apply_chat_template(talk), "strict refuses .* must alternate")


def test_what_is_sampled_several_times_differs(lm: tt.LanguageModel) -> None:
    """As a task with `repeats` wants it; and the harness's seed says what is sampled."""
    options: dict[str, Any] = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}

    def samples(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return written(TrimtabLM(lm, batch_size=4), ["Today I feel"] * 6, **options)

    first = samples(0)
    assert len(set(first)) == 6
    assert samples(0) == first
    assert not set(samples(1)) & set(first)


# -- steered: a plain loop ---------------------------------------------------------------------


@contextmanager
def hand_hooked(model: Any, op: Any, positions: Positions, prompt: int) -> Iterator[None]:
    """The operator at block 1's output of one unpadded text, whose prompt has so many tokens."""
    change = by_hand(op, 1.5)
    first = {"all": 0, "prompt": 0, "generated": prompt, "last": prompt - 1}[positions]
    stop = prompt if positions == "prompt" else 10**6

    def hook(module: Any, args: Any, x: Tensor) -> Tensor:
        return torch.cat((x[:, :first], change(x[:, first:stop]), x[:, stop:]), dim=1)

    handle = model.model.layers[1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def steered_by_hand(
    lm: tt.LanguageModel, op: Any, positions: Positions, pairs: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """One text at a time: without batches, caches and shared beginnings."""
    found = []
    for context, continuation in pairs:
        prompt = len(token_ids(context))
        ids = token_ids(context + continuation)
        with hand_hooked(lm.model, op, positions, prompt):
            logits = plain_logits(lm.model, ids[:-1])[prompt - 1 :]
        target = torch.tensor(ids[prompt:])
        log_p = logits.double().log_softmax(-1).gather(-1, target[:, None])
        found.append((float(log_p.sum()), bool((logits.argmax(-1) == target).all())))
    return found


#: Those of the pairs that fit, and whose context ends with a letter: a plain loop does no more.
STEERED_PAIRS = [
    (context, answer)
    for context, answer in PAIRS
    if context.strip() == context and context[:3] not in ("", "<s>")
    if len(token_ids(context + answer)) < 200
]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", ["Add", "Rotate", "Adaptive"])
def test_steered_likelihoods_are_those_of_a_plain_loop(
    kind: str, positions: Positions, lm: tt.LanguageModel
) -> None:
    op = operator(kind, lm.anatomy.hidden_size)
    steering = steer(lm, ("layers.1.resid", op), positions=positions).at(1.5)
    ours = likelihoods(TrimtabLM(lm, steering), STEERED_PAIRS)
    same_likelihoods(ours, steered_by_hand(lm, op, positions, STEERED_PAIRS), 1e-4)
    plain = likelihoods(TrimtabLM(lm), STEERED_PAIRS)
    moved = [abs(a - b) > 1e-3 for (a, _), (b, _) in zip(ours, plain, strict=True)]
    assert sum(moved) >= 4


def test_steered_texts_are_those_of_a_plain_loop(lm: tt.LanguageModel) -> None:
    width = lm.anatomy.hidden_size
    both = steer(lm, ("layers.1.resid", operator("Add", width))).at(2) + steer(
        lm, ("layers.0.resid", operator("Rotate", width)), positions="generated"
    ).at(80)
    expected = []
    for context in CONTEXTS:
        ids = torch.tensor([token_ids(context)])
        with lm.steered(both):
            new = lm.model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
        expected.append(lm.tokenizer.decode(new, skip_special_tokens=True))
    assert written(TrimtabLM(lm, both, batch_size=3), CONTEXTS, max_gen_toks=10) == expected
    assert written(TrimtabLM(lm), CONTEXTS, max_gen_toks=10) != expected


# -- nothing is computed twice -----------------------------------------------------------------


@contextmanager
def counted(lm: tt.LanguageModel) -> Iterator[list[tuple[int, int]]]:
    """[rows, tokens] of every pass through the body of the model."""
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


# -- tasks as records --------------------------------------------------------------------------


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness without task files of its own, which take long to read."""
    monkeypatch.setattr(
        trimtab.evaluation.harness.run,
        "TaskManager",
        lambda include_path=None, include_defaults=True: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    trimtab.evaluation.harness.run._own_manager.cache_clear()


def test_every_example_leaves_a_record(lm: tt.LanguageModel, tmp_path: Path) -> None:
    rows = choice_rows(5)
    manager = write_task(tmp_path, "toy", rows, **CHOICE)
    theirs = evaluated(hf(lm), "toy", manager)["samples"]["toy"]
    records = run_task("toy", TrimtabLM(lm), task_files=[tmp_path])
    assert [record["id"] for record in records] == [f"toy-{i}" for i in range(5)]
    assert [record["index"] for record in records] == [*range(5)]
    for row, record, sample in zip(rows, records, theirs, strict=True):
        assert record["prompt"] == f"Question: {row['question']}\nAnswer:"
        assert record["target"] == row["gold"]
        pairs = [tuple(response[0]) for response in sample["resps"]]
        same_likelihoods([tuple(one) for one in record["output"]], pairs)
        assert record["prediction"] == max(range(len(pairs)), key=lambda i: pairs[i][0])
        assert record["values"] == {name: float(sample[name]) for name in ("acc", "acc_norm")}
        assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert len(run_task("toy", TrimtabLM(lm), task_files=[tmp_path], limit=2)) == 2


def test_numbers_that_json_lacks_leave_a_record_too(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As logits beyond float16 give them."""
    model = TrimtabLM(lm)
    monkeypatch.setattr(model, "loglikelihood", lambda asked: [(-math.inf, False) for _ in asked])
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE)
    for record in run_task("toy", model, task_files=[tmp_path]):
        assert record["output"][0] == ["-Infinity", False]
        assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_examples_in_prompts_are_those_of_the_harness(lm: tt.LanguageModel, tmp_path: Path) -> None:
    manager = write_task(tmp_path, "toy", choice_rows(12), **CHOICE)
    theirs = evaluated(hf(lm, batch_size=12), "toy", manager, num_fewshot=2)["samples"]["toy"]
    records = run_task("toy", TrimtabLM(lm), task_files=[tmp_path], few_shot=2)
    assert [r["prompt"] for r in records] == [s["arguments"][0][0] for s in theirs]
    assert all(record["prompt"].count("Question:") == 3 for record in records)
    other = run_task("toy", TrimtabLM(lm), task_files=[tmp_path], few_shot=2, seed=1)
    assert [r["prompt"] for r in other] != [r["prompt"] for r in records]


def test_examples_that_a_task_never_takes_are_warned_of(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE, num_fewshot=0)
    with pytest.warns(tt.TrimtabWarning, match="toy always has 0 examples in its prompts, not 3"):
        run_task("toy", TrimtabLM(lm), task_files=[tmp_path], few_shot=3)


def test_a_figure_that_is_no_mean_is_the_harnesss(lm: tt.LanguageModel, tmp_path: Path) -> None:
    """Perplexity is exp of a mean; the examples have its logarithm under the same name."""
    metrics = [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ]
    rows = [{"text": context, "end": " yes"} for context in CONTEXTS]
    options = {"output_type": "loglikelihood", "doc_to_text": "text", "doc_to_target": "end"}
    manager = write_task(tmp_path, "likely", rows, **options, metric_list=metrics)
    theirs = evaluated(hf(lm), "likely", manager)
    *examples, last = run_task("likely", TrimtabLM(lm), task_files=[tmp_path])
    assert len(examples) == 5
    assert all(set(record["values"]) == {"acc"} for record in examples)
    assert set(last["figures"]) == {"perplexity"}
    logs = [pair[0] for pair in likelihoods(hf(lm), [(row["text"], " yes") for row in rows])]
    assert last["figures"]["perplexity"] == pytest.approx(math.exp(-sum(logs) / 5), rel=1e-3)
    reported = theirs["results"]["likely"]["perplexity,none"]
    assert last["figures"]["perplexity"] == pytest.approx(reported, rel=1e-3)
    assert last["n"] == 5
    assert last["values"] == {}


def test_word_perplexity_is_the_harnesss(lm: tt.LanguageModel, tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("The ship left the harbour.", LONG, "Yes.")]
    options = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    manager = write_task(tmp_path, "pages", rows, **options)
    theirs = evaluated(hf(lm), "pages", manager)["results"]["pages"]
    last = run_task("pages", TrimtabLM(lm), task_files=[tmp_path])[-1]
    assert set(last["figures"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    for name, value in last["figures"].items():
        assert value == pytest.approx(theirs[f"{name},none"], rel=1e-4)


def test_a_text_that_is_read_in_two_ways_is_one_record(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    def first(pattern: str) -> list[dict[str, str]]:
        return [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]

    filters = [
        {"name": "word", "filter": first(r"([a-z]+)")},
        {"name": "digit", "filter": first(r"([0-9])")},
    ]
    rows = [{"text": context, "end": "7"} for context in CONTEXTS]
    manager = write_task(
        tmp_path,
        "texts",
        rows,
        output_type="generate_until",
        doc_to_text="text",
        doc_to_target="end",
        filter_list=filters,
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    theirs = evaluated(hf(lm, batch_size=5), "texts", manager)
    records = run_task("texts", TrimtabLM(lm), task_files=[tmp_path])
    assert len(records) == 5
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in theirs["samples"]["texts"]}
    assert [record["output"] for record in records] == [texts[i] for i in range(5)]
    for i, record in enumerate(records):
        own = {s["filter"]: s for s in theirs["samples"]["texts"] if s["doc_id"] == i}
        assert record["prediction"] == {name: s["filtered_resps"][0] for name, s in own.items()}
        assert record["values"] == {
            f"exact_match ({name})": float(s["exact_match"]) for name, s in own.items()
        }


def test_tasks_that_cannot_be_run_are_refused_in_one_line(
    lm: tt.LanguageModel, tmp_path: Path, few_tasks: None
) -> None:
    model = TrimtabLM(lm)
    refused_in_one_line(lambda: run_task("no_task", model), "lm-eval has no task 'no_task'")
    missing = tmp_path / "missing"
    refused_in_one_line(lambda: run_task("toy", model, task_files=[missing]), "not a directory")
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE | {"doc_to_choice": "{{no_column}}"})
    refused_in_one_line(lambda: run_task("toy", model, task_files=[tmp_path]), "task toy cannot be")
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE)
    (tmp_path / "toy.jsonl").unlink()
    refused_in_one_line(lambda: run_task("toy", model, task_files=[tmp_path]), "task toy cannot be")
    (tmp_path / "toy.yaml").write_text("task: toy\ntest_split: [test\n")
    refused_in_one_line(
        lambda: run_task("toy", model, task_files=[tmp_path]), r"toy.yaml is not YAML: .*line 3"
    )


def test_warnings_are_seen_where_bars_are_not(
    lm: tt.LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": LONG, "options": ["yes", "no"], "gold": 0}]
    write_task(tmp_path, "toy", rows, **CHOICE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_task("toy", TrimtabLM(lm), task_files=[tmp_path])
    assert ["2 of 2 prompts are longer" in str(one.message) for one in caught] == [True]
    assert "it/s" not in capsys.readouterr().err


def test_the_harnesss_own_files_are_read_only_where_they_are_needed(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def manager(include_path: Any = None, include_defaults: bool = True) -> TaskManager:
        wanted.append(include_defaults)
        return TaskManager(include_path=include_path, include_defaults=False)

    wanted: list[bool] = []
    monkeypatch.setattr(trimtab.evaluation.harness.run, "TaskManager", manager)
    write_task(tmp_path, "toy", choice_rows(2), **CHOICE)
    write_task(tmp_path, "more", choice_rows(1), **CHOICE)
    for name, parts in {"both": ["toy", "more"], "mixed": ["toy", "arc_easy"]}.items():
        content = json.dumps({"group": name, "task": parts})
        (tmp_path / f"{name}.yaml").write_text(content)
    assert len(run_task("toy", TrimtabLM(lm), task_files=[tmp_path])) == 2
    records = run_task("both", TrimtabLM(lm), task_files=[tmp_path])
    assert [record["id"] for record in records] == ["toy-0", "toy-1", "more-0"]
    assert wanted == [False, False]
    with pytest.raises(tt.TrimtabError):
        run_task("mixed", TrimtabLM(lm), task_files=[tmp_path])
    assert wanted == [False, False, False, True]
