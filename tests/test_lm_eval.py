"""trimtab as a model of lm-evaluation-harness: its numbers are those of the harness's own `hf`
model, steered ones those of a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

import trimtab as tt
from harness_models import (
    CHOICE,
    CONTEXTS,
    LONG,
    PAIRS,
    asks,
    choice_rows,
    evaluated,
    hf,
    likelihoods,
    lm,
    no_survey,
    same_likelihoods,
    write_task,
    written,
)
from helpers import (
    language_model,
    operator,
    plain_logits,
    refused_in_one_line,
    steer,
    token_ids,
)
from readings import hand_hooked
from tiny import tiny_tokenizer
from trimtab.evaluation.harness.model import TrimtabLM
from trimtab.steering import POSITIONS, Positions

__all__ = ["lm", "no_survey"]  # fixtures, which pytest finds by their names here


def rolling(model: Any, texts: Sequence[str]) -> list[float]:
    asked = asks("loglikelihood_rolling", [(text,) for text in texts])
    found: list[float] = model.loglikelihood_rolling(asked, disable_tqdm=True)
    return found


# -- the harness's own model says the same -----------------------------------------------------


@pytest.mark.slow
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
    bare = tiny_tokenizer()
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


def test_the_models_chats_are_the_harnesss_too(lm: tt.LanguageModel) -> None:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template += "{% if brief is defined %}{{ brief }} words{% endif %}"
    model = TrimtabLM(tt.wrap(lm.model, tokenizer, "tiny", {"brief": "few"}, "Be kind."))
    rendered = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert "<|system|>\nBe kind.</s>" in rendered
    assert rendered.endswith("<|assistant|>\nfew words")


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


def steered_by_hand(
    lm: tt.LanguageModel, op: Any, positions: Positions, pairs: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """One text at a time: without batches, caches and shared beginnings."""
    found = []
    for context, continuation in pairs:
        prompt = len(token_ids(context))
        ids = token_ids(context + continuation)
        with hand_hooked(lm.model, op, positions, prompt, dial=1.5):
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
