"""Options of decoding: each does what its formula says, and none does nothing or fails inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import trimtab as tt
from helpers import PROMPTS, language_model, one_line, plain_logits, steer_at, token_ids
from trimtab.model.decoding import OPTIONS

# -- options that are asked for ---------------------------------------------------------------


def penalised(model: PreTrainedModel, ids: list[int], new: int, penalty: float) -> tuple[int, ...]:
    """Greedy with a repetition penalty (Keskar et al., 2019, equation 2 with its sign mended)."""
    written: list[int] = []
    for _ in range(new):
        logits = plain_logits(model, ids + written)[-1]
        for token in {*ids, *written}:
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        written.append(int(logits.argmax()))
    return tuple(written)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("penalty", [1.3, 2])
def test_a_repetition_penalty_is_the_formula_also_in_a_padded_batch(
    name: str, penalty: float
) -> None:
    lm = language_model(name)
    done = lm.generate(PROMPTS, max_new_tokens=8, chat=False, repetition_penalty=penalty)
    expected = [penalised(lm.model, token_ids(prompt), 8, penalty) for prompt in PROMPTS]
    assert [one.tokens for one in done] == expected


def test_padding_is_no_word_that_was_said() -> None:
    """Where EOS is the padding too, a penalty on padding would keep short rows from ending."""
    lm = language_model("llama")
    free = lm.generate(PROMPTS, max_new_tokens=8, chat=False, repetition_penalty=1.2)
    short = min(range(3), key=lambda i: len(token_ids(PROMPTS[i])))
    lm.tokenizer.pad_token_id, before = free[short].tokens[2], lm.tokenizer.pad_token_id
    try:
        assert lm.generate(PROMPTS, max_new_tokens=8, chat=False, repetition_penalty=1.2) == free
    finally:
        lm.tokenizer.pad_token_id = before


def kept_by_min_p(p: torch.Tensor) -> torch.Tensor:
    return p >= 0.3 * p.max()


def kept_by_epsilon(p: torch.Tensor) -> torch.Tensor:
    return p >= 0.02


@pytest.mark.parametrize(
    ("option", "kept"),
    [({"min_p": 0.3}, kept_by_min_p), ({"epsilon_cutoff": 0.02}, kept_by_epsilon)],
)
def test_an_option_narrows_samples_as_its_formula_says(option: dict[str, float], kept: Any) -> None:
    lm = language_model("llama")
    count = 2000
    done = lm.generate(
        ["The"] * count,
        max_new_tokens=1,
        chat=False,
        temperature=1.0,
        seed=0,
        batch_size=count,
        **option,
    )
    p = plain_logits(lm.model, token_ids("The"))[-1].softmax(-1)
    expected = torch.where(kept(p), p, 0.0)
    expected /= expected.sum()
    found = torch.tensor([one.tokens[0] for one in done]).bincount(minlength=len(p)) / count
    assert not found[~kept(p)].any()
    assert (found > 0).sum() > 1
    assert (found - expected).abs().sum() / 2 < 0.06


def test_barred_and_favoured_tokens() -> None:
    lm = language_model("llama")
    first = lm.generate(PROMPTS[:1], max_new_tokens=3, chat=False)[0].tokens[0]
    options: dict[str, Any] = {"max_new_tokens": 3, "chat": False}
    for option in (
        {"bad_words_ids": [[first]]},
        {"suppress_tokens": [first]},
        {"begin_suppress_tokens": [first]},
        {"sequence_bias": [[[first], -100.0]]},
    ):
        assert lm.generate(PROMPTS[:1], **options, **option)[0].tokens[0] != first
    favoured = lm.generate(PROMPTS[:1], sequence_bias=[[[33], 1000.0]], **options)[0].tokens
    assert favoured == (33, 33, 33)
    assert lm.generate(PROMPTS[:1], forced_eos_token_id=44, **options)[0].tokens[-1] == 44


@pytest.mark.parametrize("rows", [False, True])
def test_beams_are_transformers_own(rows: bool) -> None:
    """Each prompt alone in plain transformers, steered by a block."""
    lm = language_model("llama")
    steerings = [steer_at(lm, "resid"), None, steer_at(lm, "ffn_out")] if rows else [None] * 3
    done = lm.generate(
        PROMPTS,
        max_new_tokens=7,
        chat=False,
        num_beams=4,
        length_penalty=0.5,
        early_stopping=True,
        steering=steerings,
    )
    for prompt, steering, one in zip(PROMPTS, steerings, done, strict=True):
        ids = torch.tensor([token_ids(prompt)])
        with lm.steered(*([] if steering is None else [steering])):
            output = lm.model.generate(
                ids,
                max_new_tokens=7,
                num_beams=4,
                length_penalty=0.5,
                early_stopping=True,
                do_sample=False,
                attention_mask=torch.ones_like(ids),
                pad_token_id=0,
            )
        assert one.tokens == tuple(output[0, ids.shape[1] :].tolist())


def test_every_option_is_taken_and_its_neutral_value_changes_nothing() -> None:
    lm = language_model("llama")
    options: dict[str, Any] = {"max_new_tokens": 5, "chat": False}
    plain = lm.generate(PROMPTS, **options)
    assert lm.generate(PROMPTS, **options, **OPTIONS) == plain
    assert lm.generate(PROMPTS, **options, **dict.fromkeys(OPTIONS)) == plain
    warm = {**options, "temperature": 1.0, "seed": 1}
    assert lm.generate(PROMPTS, **warm, **OPTIONS) == lm.generate(PROMPTS, **warm)
    given = {
        "encoder_repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_h": 0.5,
        "encoder_no_repeat_ngram_size": 2, "typical_p": 0.5, "eta_cutoff": 0.01,
        "renormalize_logits": True,
        "watermarking_config": {"bias": 2.0}, "max_time": 60,
    }  # fmt: skip
    for name, value in given.items():
        assert len(lm.generate(PROMPTS, **warm, **{name: value})) == 3
    decay: dict[str, Any] = {"exponential_decay_length_penalty": [0, 9.0]}
    with pytest.raises(tt.TrimtabError, match="this model has no token for it"):
        lm.generate(PROMPTS, **options, **decay)
    lm.model.generation_config.eos_token_id = 2
    assert all(len(one.tokens) < 5 for one in lm.generate(PROMPTS, **options, **decay))


def test_each_setting_of_transformers_is_an_option_or_refused_with_a_reason() -> None:
    """Also those that a newer transformers brings: nothing is passed on unseen."""
    lm = language_model("llama")
    own = {"max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p"}
    named = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    refused = named - set(OPTIONS) - own
    assert {"num_return_sequences", "do_sample", "output_scores", "guidance_scale"} <= refused
    for name in sorted(refused):
        with pytest.raises(tt.TrimtabError, match=f"generate does not take {name}") as caught:
            lm.generate(PROMPTS, chat=False, **{name: 1})
        one_line(caught)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"repetition_penality": 1.1}, "did you mean repetition_penalty"),
        ({"max_new_token": 3}, "did you mean max_new_tokens"),
        ({"xyzzy": 3}, "no option 'xyzzy': there are"),
        ({"num_return_sequences": 2}, "each prompt as often as"),
        ({"min_p": 0.1}, "narrows sampling: give a temperature above 0"),
        ({"length_penalty": 2.0}, "num_beams of 2 or more"),
        ({"num_beams": 2, "stop": "a"}, "stop ends a text while it is written"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be a number"),
        ({"repetition_penalty": "high"}, "repetition_penalty must be a number"),
        ({"repetition_penalty": True}, "repetition_penalty must be a number"),
        ({"repetition_penalty": 10**400}, "repetition_penalty must be a number"),
        ({"repetition_penalty": -1.0}, "transformers does not take repetition_penalty=-1.0"),
        ({"min_p": 3.0, "temperature": 1.0}, "min_p must be 0 to 1, not 3.0"),
        ({"no_repeat_ngram_size": 1.5}, "must be a whole number"),
        ({"bad_words_ids": "word"}, "transformers does not take bad_words_ids='word'"),
        ({"bad_words_ids": [[5000]]}, "bad_words_ids must be token ids 0 to 399, not 5000"),
        ({"forced_eos_token_id": 10**6}, "forced_eos_token_id must be token ids 0 to 399"),
        ({"watermarking_config": {"no": 1}}, "transformers does not take watermarking_config"),
        ({"temperature": 1e-320}, "temperature must be 0 or more, not 1e-320: 0 is greedy"),
        ({"temperature": 1e300}, "temperature must be 0 or more"),
        ({"temperature": "warm"}, "temperature must be 0 or more"),
        ({"top_k": 2.5, "temperature": 1.0}, "top_k must be a whole number"),
        ({"stop": "("}, "stop must be a regular expression"),
        ({"stop": "*"}, "stop must be a regular expression"),
        ({"stop": 3}, "stop must be a regular expression"),
    ],
)
def test_options_that_cannot_be_are_one_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(tt.TrimtabError, match=reason) as caught:
        language_model("llama").generate(PROMPTS, chat=False, max_new_tokens=3, **options)
    one_line(caught)


WARM: dict[str, Any] = {"temperature": 1.0, "seed": 0}
ENDING = "exponential_decay_length_penalty"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"top_k": 5}, "top_k narrows sampling: give a temperature above 0"),
        ({"top_p": 0.5}, "top_p narrows sampling: give a temperature above 0"),
        ({"suppress_tokens": [99999]}, "suppress_tokens must be token ids 0 to 399, not 99999"),
        ({"suppress_tokens": [400]}, "suppress_tokens must be token ids 0 to 399, not 400"),
        ({"suppress_tokens": [-1]}, "suppress_tokens must be token ids 0 to 399, not -1"),
        ({"suppress_tokens": [1.5]}, "suppress_tokens must be token ids 0 to 399, not 1.5"),
        ({"suppress_tokens": [True]}, "suppress_tokens must be token ids 0 to 399, not True"),
        ({"suppress_tokens": []}, "suppress_tokens must name tokens"),
        ({"suppress_tokens": torch.tensor([5, 6])}, "suppress_tokens must be token ids"),
        ({"begin_suppress_tokens": [99999]}, "begin_suppress_tokens must be token ids"),
        ({"begin_suppress_tokens": []}, "begin_suppress_tokens must name tokens"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must name tokens"),
        ({"bad_words_ids": [[5], []]}, "bad_words_ids must name tokens"),
        ({"bad_words_ids": []}, "bad_words_ids"),
        ({"bad_words_ids": [[True]]}, "bad_words_ids must be token ids"),
        ({"bad_words_ids": torch.tensor([[5, 6]])}, "transformers does not take bad_words_ids"),
        ({"sequence_bias": [[[], 1.0]]}, "sequence_bias must name tokens"),
        ({"sequence_bias": {(400,): 1.0}}, "sequence_bias must be token ids 0 to 399, not 400"),
        ({"sequence_bias": {}}, "sequence_bias"),
        ({"forced_eos_token_id": []}, "forced_eos_token_id must name tokens"),
        ({"forced_eos_token_id": [5, -1]}, "forced_eos_token_id must be token ids"),
        ({"forced_bos_token_id": 9}, "forced_bos_token_id: it acts only on a text of one token"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be 0 or more, not -1"),
        ({"encoder_no_repeat_ngram_size": -1}, "encoder_no_repeat_ngram_size must be 0 or more"),
        ({"renormalize_logits": "yes"}, "renormalize_logits must be True or False, not 'yes'"),
        ({"renormalize_logits": 1}, "renormalize_logits must be True or False, not 1"),
        ({"epsilon_cutoff": 2, **WARM}, "epsilon_cutoff must be 0 or more and below 1, not 2"),
        ({"epsilon_cutoff": 1, **WARM}, "epsilon_cutoff must be 0 or more and below 1, not 1"),
        ({"eta_cutoff": -0.1, **WARM}, "eta_cutoff must be 0 or more and below 1, not -0.1"),
        ({"min_p": -0.1, **WARM}, "min_p must be 0 to 1, not -0.1"),
        ({"typical_p": 2, **WARM}, "typical_p must be above 0 and at most 1, not 2"),
        ({"typical_p": 0, **WARM}, "typical_p must be above 0 and at most 1, not 0"),
        ({"top_h": 0, **WARM}, "top_h must be above 0 and at most 1, not 0"),
        ({"top_h": 1.5, **WARM}, "top_h must be above 0 and at most 1, not 1.5"),
        ({"max_time": 0}, "max_time must be above 0 .seconds., not 0"),
        ({"max_time": -1}, "max_time must be above 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, not '5'"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, not None"),
        ({"min_new_tokens": 1.5}, "min_new_tokens must be a whole number, not 1.5"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, not 1.5"),
        ({"batch_size": "2"}, "batch_size must be a whole number, not '2'"),
        ({"batch_size": True}, "batch_size must be a whole number, not True"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": "a"}, "seed must be a whole number, not 'a'"),
        ({"seed": 2**70}, r"seed must be -2\*\*63 to 2\*\*64 - 1, not 1180591620717411303424"),
        ({"seed": 2**64}, "seed must be -2"),
        ({"seed": -(2**63) - 1}, "seed must be -2"),
        ({"num_beams": 0}, "num_beams must be 1 to 1000, not 0"),
        ({"num_beams": -2}, "num_beams must be 1 to 1000, not -2"),
        ({"num_beams": 10**9}, "num_beams must be 1 to 1000"),
        ({"num_beams": 2, "length_penalty": 1e308}, "length_penalty must be -10 to 10, not 1e"),
        ({"num_beams": 2, "length_penalty": -1e308}, "length_penalty must be -10 to 10, not -1e"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be True, False or"),
        ({"watermarking_config": 3}, "watermarking_config must be settings by their names"),
        ({"watermarking_config": "a"}, "watermarking_config must be settings by their names"),
        ({"watermarking_config": {"bias": "x"}}, "bias of watermarking_config must be a number"),
        ({"watermarking_config": {"hashing_key": "a"}}, "hashing_key of watermarking_config"),
        ({"watermarking_config": {"context_width": 0}}, "not take watermarking_config=.*positive"),
        ({ENDING: [0]}, f"{ENDING} must be two numbers"),
        ({ENDING: []}, f"{ENDING} must be two numbers"),
        ({ENDING: [-5, 1.1]}, f"the first token of {ENDING} must be 0 or more, not -5"),
        ({ENDING: [0, "a"]}, f"the factor of {ENDING} must be a number, not 'a'"),
    ],
)
def test_no_option_does_nothing_or_fails_inside(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(tt.TrimtabError, match=reason) as caught:
        language_model("llama").generate(
            PROMPTS[:1], **{"chat": False, "max_new_tokens": 3, **options}
        )
    one_line(caught)


@pytest.mark.parametrize("options", [{"seed": -(2**63)}, {"seed": 2**64 - 1}, {"seed": 3.0}])
def test_seeds_at_the_ends_of_what_torch_takes(options: dict[str, Any]) -> None:
    lm = language_model("llama")
    drawn = {"chat": False, "max_new_tokens": 3, "temperature": 1.0, **options}
    assert lm.generate(PROMPTS, **drawn) == lm.generate(PROMPTS, **drawn)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "length_penalty": 10, "early_stopping": "never"},
        {"num_beams": 4, "length_penalty": -10},
        {"min_p": 1, **WARM},
        {"min_p": 0, **WARM},
        {"typical_p": 1, **WARM},
        {"top_h": 1, **WARM},
        {"suppress_tokens": (0, 399)},
        {"suppress_tokens": list(torch.arange(3).numpy())},
        {"forced_eos_token_id": [4, 5]},
        {"max_new_tokens": 3.0, "batch_size": 2.0, "min_new_tokens": 1.0},
        {"top_k": 0, "top_p": 1},
    ],
)
def test_values_at_the_ends_of_their_ranges_are_taken(options: dict[str, Any]) -> None:
    lm = language_model("llama")
    done = lm.generate(PROMPTS, **{"chat": False, "max_new_tokens": 3, **options})
    assert [len(one.tokens) for one in done] == [3, 3, 3]


@pytest.mark.parametrize(
    "error", [ValueError, TypeError, AttributeError, OverflowError, ZeroDivisionError, KeyError]
)
def test_what_fails_inside_is_named_with_the_options(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model("llama")

    def fail(*inputs: Any, **options: Any) -> Any:
        raise error("out of\n\x1b[31mrange")

    monkeypatch.setattr(lm.model, "generate", fail)
    options: dict[str, Any] = {"chat": False, "max_new_tokens": 3}
    with pytest.raises(tt.TrimtabError, match="not take suppress_tokens=.*range") as caught:
        lm.generate(PROMPTS, suppress_tokens=list(range(300)), num_beams=1, **options)
    assert one_line(caught).isprintable()
    assert len(one_line(caught)) < 300
    assert "num_beams" not in one_line(caught)  # 1 is as if it had been left out
    with pytest.raises(error):
        lm.generate(PROMPTS, num_beams=1, **options)


def test_a_full_memory_is_no_fault_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama")

    def fail(*inputs: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(lm.model, "generate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        lm.generate(PROMPTS, chat=False, repetition_penalty=1.2)


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_bias": [[[7], float("nan")]]},
        {"suppress_tokens": list(range(400))},
        {"repetition_penalty": 1e-308},
    ],
)
def test_options_that_spoil_the_logits_are_named(options: dict[str, Any]) -> None:
    lm = language_model("llama")
    for steering, cause in ((None, "look at the model's weights"), (steer_at(lm, "resid"), "dial")):
        with pytest.raises(tt.TrimtabError, match="not finite, or all equal") as caught:
            lm.generate(PROMPTS, chat=False, max_new_tokens=3, steering=steering, **options)
        message = one_line(caught)
        assert cause in message
        assert message.endswith(f"look at what {next(iter(options))} makes of the logits")


def test_the_message_of_a_chat_template_cannot_command_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = language_model("llama")
    template = "{{ raise_exception('no \x1b[31mred\u202e\x07 roles') }}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    with pytest.raises(tt.TrimtabError, match=r"no \\x1b\[31mred\\u202e\\x07 roles") as caught:
        lm.generate(["x"], chat=True)
    assert one_line(caught).isprintable()


@pytest.mark.parametrize("temperature", [1e-6, 1, 2, 1e6])
def test_temperatures_at_the_ends_of_what_is_allowed(temperature: float) -> None:
    lm = language_model("llama")
    done = lm.generate(PROMPTS, chat=False, max_new_tokens=4, temperature=temperature, seed=0)
    if temperature == 1e-6:
        assert done == lm.generate(PROMPTS, chat=False, max_new_tokens=4)
