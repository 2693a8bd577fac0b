"""Metrics: equal to a plain computation with transformers alone, one text at a time."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import processors
from torch import Tensor

import trimtab as tt
from helpers import add, language_model, operator, plain_logits, steer, token_ids
from readings import hand_hooked
from tiny import TINY, tiny_tokenizer
from trimtab.contrasts import Text
from trimtab.figures.intervals import Estimate, mean_interval
from trimtab.reading.likelihood import cross_entropy, log_odds, preference
from trimtab.steering import POSITIONS, Positions

#: Longer and shorter than the sliding window of 8, with answers of one and of many tokens.
PAIRS = [
    ("Today I feel", " happy.", " sad because of the rain."),
    (
        "She looked at the map and asked where they were",
        " going.",
        " yesterday, and the day before.",
    ),
    ("The answer to the question is", " yes", " no"),
    ("What is the best way to learn a language? Read,", " write and speak every day.", " or not."),
]
TEXTS = [
    "The ship left the harbour in the morning.",
    "Yes.",
    "When the rain came, the children ran into the house and sat by the fire.",
]
CONTRAST = tt.Contrast.from_pairs(PAIRS)


# -- the oracle: no packing, no batch, no shared prompt ----------------------------------------


def log_likelihood(model: Any, ids: list[int], start: int) -> float:
    """Of the tokens from `start` on, given those before."""
    log_p = plain_logits(model, ids).double().log_softmax(-1)
    return sum(float(log_p[place - 1, ids[place]]) for place in range(start, len(ids)))


def shared(*texts: list[int]) -> int:
    """How many tokens texts have in common at their beginning."""
    length = 0
    while all(length < len(ids) and ids[length] == texts[0][length] for ids in texts):
        length += 1
    return length


def odds_by_hand(
    model: Any, pair: tuple[str, str, str], op: Any = None, positions: Positions = "all"
) -> float:
    prompt, *answers = pair
    sides = [token_ids(prompt + answer) for answer in answers]
    start = shared(token_ids(prompt), *sides)
    found = []
    for ids in sides:
        if op is None:
            found.append(log_likelihood(model, ids, start))
        else:
            with hand_hooked(model, op, positions, start):
                found.append(log_likelihood(model, ids, start))
    return found[0] - found[1]


def entropy_by_hand(model: Any, text: str) -> float:
    ids = token_ids(text)
    return -log_likelihood(model, ids, 1) / (len(ids) - 1)


def hidden_steering(
    lm: tt.LanguageModel, kind: str = "Add", positions: Positions = "all"
) -> tuple[Any, tt.Steering]:
    """An operator at block 1's output, and the steering of it."""
    op = operator(kind, lm.anatomy.hidden_size)
    return op, steer(lm, ("layers.1.resid", op), positions=positions)


def close(actual: Tensor, expected: list[float]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


# -- log-odds and cross-entropy ----------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_log_odds_of_every_architecture(name: str) -> None:
    lm = language_model(name)
    expected = [odds_by_hand(lm.model, pair) for pair in PAIRS]
    close(log_odds(lm, CONTRAST), expected)
    # The oracle is not one that anything would match.
    assert max(abs(value) for value in expected) > 1


@pytest.mark.parametrize("name", TINY)
def test_cross_entropy_of_every_architecture(name: str) -> None:
    lm = language_model(name)
    nll, counts = cross_entropy(lm, TEXTS)
    close(nll, [entropy_by_hand(lm.model, text) for text in TEXTS])
    assert counts.tolist() == [len(token_ids(text)) - 1 for text in TEXTS]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["Add", "Scale"])
def test_steered_metrics_equal_plain_hooks(name: str, kind: str) -> None:
    lm = language_model(name)
    op, steering = hidden_steering(lm, kind)
    close(log_odds(lm, CONTRAST, steering), [odds_by_hand(lm.model, p, op) for p in PAIRS])
    nll, _ = cross_entropy(lm, TEXTS, steering)
    with hand_hooked(lm.model, op):
        close(nll, [entropy_by_hand(lm.model, text) for text in TEXTS])
    assert not torch.allclose(nll, cross_entropy(lm, TEXTS)[0], atol=0.01)


@pytest.mark.parametrize(
    ("name", "options"),
    [("mistral", {"sliding_window": 8}), ("gemma2", {}), ("gemma3", {}), ("gpt2", {})],
)
def test_packed_sides_stay_apart(name: str, options: dict[str, Any]) -> None:
    """Windows count positions of a text, not columns of the row that both sides share."""
    lm = language_model(name, **options)
    long = "The ship left the harbour in the morning, and the captain stood at the wheel."
    pairs = [(long, " A large rudder is hard to turn when the water runs fast.", " No."), PAIRS[2]]
    expected = [odds_by_hand(lm.model, pair) for pair in pairs]
    close(log_odds(lm, tt.Contrast.from_pairs(pairs)), expected)


def test_final_soft_cap_counts() -> None:
    """Gemma 2 caps its logits at 2 here: without the cap the numbers are others."""
    lm = language_model("gemma2")
    capped = log_odds(lm, CONTRAST)
    free = language_model("gemma2", final_logit_softcapping=None)
    assert not torch.allclose(capped, log_odds(free, CONTRAST), atol=0.05)


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_in_log_odds(positions: Positions) -> None:
    lm = language_model("llama")
    op, steering = hidden_steering(lm, positions=positions)
    expected = [odds_by_hand(lm.model, pair, op, positions) for pair in PAIRS]
    close(log_odds(lm, CONTRAST, steering), expected)


def test_positions_differ() -> None:
    lm = language_model("llama")
    found = [log_odds(lm, CONTRAST, hidden_steering(lm, positions=p)[1]) for p in POSITIONS]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert not torch.allclose(one, other, atol=0.01)


def test_cross_entropy_takes_a_text_as_prompt() -> None:
    lm = language_model("llama")
    whole, prompt = (
        cross_entropy(lm, TEXTS, hidden_steering(lm, positions=positions)[1])[0]
        for positions in ("all", "prompt")
    )
    assert torch.equal(whole, prompt)
    with pytest.raises(tt.TrimtabError, match="touched nothing"):
        cross_entropy(lm, TEXTS, hidden_steering(lm, positions="generated")[1])


def test_alpha_zero_changes_nothing() -> None:
    lm = language_model("qwen3")
    steering = hidden_steering(lm)[1].at(0)
    assert torch.equal(log_odds(lm, CONTRAST, steering), log_odds(lm, CONTRAST))
    assert torch.equal(cross_entropy(lm, TEXTS, steering)[0], cross_entropy(lm, TEXTS)[0])


def test_one_steering_per_text() -> None:
    """Batches are sorted by length: each text keeps its own steering all the same."""
    lm = language_model("llama")
    _, one = hidden_steering(lm)
    two = steer(lm, ("layers.0.resid", add(lm.anatomy.hidden_size, seed=5)))
    base = log_odds(lm, CONTRAST)
    mixed = log_odds(lm, CONTRAST, [one, None, [one, two], two])
    for place, argument in enumerate((one, None)):
        expected = base if argument is None else log_odds(lm, CONTRAST, argument)
        torch.testing.assert_close(mixed[place], expected[place], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[3], log_odds(lm, CONTRAST, two)[3], rtol=1e-5, atol=1e-5)
    nll, _ = cross_entropy(lm, TEXTS, [None, None, one])
    torch.testing.assert_close(nll[2], cross_entropy(lm, TEXTS, one)[0][2], rtol=1e-5, atol=1e-5)
    with pytest.raises(tt.TrimtabError, match="2 steerings for 4 texts"):
        log_odds(lm, CONTRAST, [one, two])


def test_an_answer_that_merges_with_the_prompt() -> None:
    """Both sides are scored from the same token on, also where one tokenises across the border."""
    lm = language_model("llama")
    pair = ("The answ", "er is yes", " no")
    prompt, merged, apart = (
        token_ids(text) for text in (pair[0], *(pair[0] + a for a in pair[1:]))
    )
    assert shared(prompt, apart) == len(prompt) > shared(prompt, merged)  # else it tests nothing
    close(log_odds(lm, tt.Contrast.from_pairs([pair])), [odds_by_hand(lm.model, pair)])


def test_an_answer_without_tokens() -> None:
    lm = language_model("llama")
    pair = ("Today I feel", "", " sad.")
    close(log_odds(lm, tt.Contrast.from_pairs([pair])), [odds_by_hand(lm.model, pair)])


def test_conversations_go_through_the_chat_template() -> None:
    lm = language_model("llama")
    messages = [{"role": "user", "content": "Are you well?"}]
    contrast = tt.Contrast.from_pairs([(messages, "Yes.", "No, I am not.")])
    rendered = lm.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    # The template begins with BOS, which the tokenizer must not add again.
    ids = [
        lm.tokenizer(rendered + answer, add_special_tokens=False).input_ids
        for answer in ("Yes.", "No, I am not.")
    ]
    start = len(lm.tokenizer(rendered, add_special_tokens=False).input_ids)
    expected = [log_likelihood(lm.model, side, start) for side in ids]
    close(log_odds(lm, contrast), [expected[0] - expected[1]])


def test_another_models_steering_needs_force() -> None:
    lm = language_model("llama")
    _, steering = hidden_steering(language_model("llama", seed=1))
    with pytest.raises(tt.TrimtabError, match="made for"):
        log_odds(lm, CONTRAST, steering)
    with pytest.raises(tt.TrimtabError, match="made for"):
        cross_entropy(lm, TEXTS, steering)
    assert not torch.equal(log_odds(lm, CONTRAST, steering, force=True), log_odds(lm, CONTRAST))
    assert torch.isfinite(cross_entropy(lm, TEXTS, steering, force=True)[0]).all()


def test_what_cannot_be_scored() -> None:
    lm = language_model("llama")
    unpaired = tt.Contrast.from_texts(["Good."], ["Bad."])
    with pytest.raises(tt.TrimtabError, match="unpaired"):
        log_odds(lm, unpaired)
    with pytest.raises(tt.TrimtabError, match="text 2 has no token to score"):
        cross_entropy(lm, ["Yes.", ""])
    with pytest.raises(tt.TrimtabError, match="text 1 has .* tokens, the model takes 256"):
        cross_entropy(lm, ["word " * 300])
    with pytest.raises(tt.TrimtabError, match="no text"):
        cross_entropy(lm, [])
    lm.tokenizer = bare_tokenizer()
    with pytest.raises(tt.TrimtabError, match="row 1: no token of the prompt"):
        log_odds(lm, tt.Contrast.from_pairs([("", "Yes.", "No.")]))


# -- preference --------------------------------------------------------------------------------

#: More texts of one side than of the other, mixed.
LABELLED = [
    ("I love this film, it was wonderful.", "positive"),
    ("I hate this film.", "negative"),
    ("The actors were bad, and it was boring.", "negative"),
    ("It is true that water boils at 100 degrees", "positive"),
    ("No.", "negative"),
]
UNPAIRED = tt.Contrast(tuple(Text(text, label) for text, label in LABELLED))  # type: ignore[arg-type]


def preference_by_hand(model: Any) -> float:
    """Of the labelled texts: each text's mean per token first, then each side's mean."""
    means = {"positive": 0.0, "negative": 0.0}
    for side in means:
        own = [-entropy_by_hand(model, text) for text, label in LABELLED if label == side]
        means[side] = sum(own) / len(own)
    return means["positive"] - means["negative"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_preference_of_pairs_is_the_mean_log_odds(name: str) -> None:
    lm = language_model(name)
    op, steering = hidden_steering(lm)
    for own, argument in ((None, None), (op, steering)):
        odds = [odds_by_hand(lm.model, pair, own) for pair in PAIRS]
        found = preference(lm, CONTRAST, argument)
        assert found == pytest.approx(sum(odds) / len(odds), abs=1e-3)
    assert preference(lm, CONTRAST) != pytest.approx(preference(lm, CONTRAST, steering), abs=0.01)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_preference_of_texts_is_per_token(name: str) -> None:
    lm = language_model(name)
    op, steering = hidden_steering(lm)
    unsteered = preference_by_hand(lm.model)
    assert preference(lm, UNPAIRED) == pytest.approx(unsteered, abs=1e-4)
    with hand_hooked(lm.model, op):
        steered = preference_by_hand(lm.model)
    assert preference(lm, UNPAIRED, steering) == pytest.approx(steered, abs=1e-4)
    assert abs(steered - unsteered) > 0.002


def test_preference_turns_with_the_sides() -> None:
    lm = language_model("llama")
    swapped = tt.Contrast.from_pairs([(prompt, no, yes) for prompt, yes, no in PAIRS])
    assert preference(lm, swapped) == pytest.approx(-preference(lm, CONTRAST), abs=1e-5)
    other = {"positive": "negative", "negative": "positive"}
    labelled = tt.Contrast(tuple(Text(text, other[label]) for text, label in LABELLED))  # type: ignore[arg-type]
    assert preference(lm, labelled) == pytest.approx(-preference(lm, UNPAIRED), abs=1e-5)


def test_preference_knows_whose_steering_it_is() -> None:
    lm = language_model("llama")
    _, steering = hidden_steering(language_model("llama", seed=1))
    for contrast in (CONTRAST, UNPAIRED):
        with pytest.raises(tt.TrimtabError, match="made for"):
            preference(lm, contrast, steering)
        assert preference(lm, contrast, steering, force=True) != preference(lm, contrast)


def bare_tokenizer() -> Any:
    """The tiny tokenizer without BOS, so that an empty prompt has no token at all."""
    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return bare


# -- intervals ---------------------------------------------------------------------------------


def test_interval_is_scipys_bootstrap() -> None:
    values = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.4
    rng = np.random.default_rng(0)
    expected = stats.bootstrap((values.numpy(),), np.mean, confidence_level=0.95, rng=rng)
    found = mean_interval(values)
    assert (found.low, found.high) == tuple(expected.confidence_interval)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.n == 40
    # Near what the normal distribution says of 40 values.
    half = 1.96 * float(values.std()) / 40**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.2)
    assert mean_interval(values) == found
    assert mean_interval(values, seed=1) != found


@pytest.mark.parametrize(
    ("values", "estimate"),
    [
        ([2.0, 2.0, 2.0], Estimate(2.0, 2.0, 2.0, 3)),
        ([2.0], Estimate(2.0, 2.0, 2.0, 1)),
        ([0.0] * 50, Estimate(0.0, 0.0, 0.0, 50)),
    ],
)
def test_interval_of_equal_values_is_a_point(values: list[float], estimate: Estimate) -> None:
    assert mean_interval(torch.tensor(values)) == estimate


@pytest.mark.parametrize("values", [[1e8, 1e8 + 1e-8, 1e8], [5.0, 5.0, 5.0, 5 + 9e-16]])
def test_interval_of_values_that_differ_by_rounding(values: list[float]) -> None:
    """BCa gives NaN there, which is no JSON."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mean_interval(torch.tensor(values, dtype=torch.float64))
    assert found.low == pytest.approx(values[0])
    assert found.high == pytest.approx(values[0])


def test_interval_reads() -> None:
    assert str(Estimate(1.234, -0.5, 3.0, 9)) == "+1.23 [-0.50, +3.00]"
