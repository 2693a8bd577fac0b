"""Which tokens a curve follows: texts of several tokens, and those that nobody named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import (
    PROMPTS,
    add,
    block,
    by_hand,
    hand_hooked,
    language_model,
    plain_logits,
    refused_in_one_line,
    steer,
    token_ids,
)
from tiny import tiny_tokenizer
from trimtab.options import Bounds
from trimtab.strength import curve, read, token_log_odds

DIALS = (-2.0, 0.0, 3.0)


def pieces_of(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text, add_special_tokens=False).input_ids
    return ids


def long_word() -> str:
    """A text that the tokenizer has no token for, but three."""
    words = (f" {a}{b}{c}" for a in "qzxk" for b in "vwj" for c in "qzx")
    return next(word for word in words if len(pieces_of(word)) == 3)


def plain_p(lm: tt.LanguageModel, ids: list[int], op: Any, dial: float, first: int = 0) -> Tensor:
    """The next token's probabilities, a block's output changed by hand from a token on."""
    change = by_hand(op, dial)
    with hand_hooked(
        block(lm.model, 1), lambda x: torch.cat((x[:, :first], change(x[:, first:])), 1)
    ):
        return plain_logits(lm.model, ids)[-1].double().softmax(-1)


def sharp(lm: tt.LanguageModel, positions: Any = "all", size: float = 3.0) -> tt.Steering:
    return steer(lm, ("layers.1.resid", add(lm.anatomy.hidden_size, 5, size)), positions=positions)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_text_of_several_tokens_is_followed_as_their_sequence(positions: str) -> None:
    lm, word = language_model("llama"), long_word()
    ids, steering = pieces_of(word), sharp(lm, positions)
    found = curve(
        lm, steering, PROMPTS[:2], span=(-2, 3), points=6, tokens=[word], tolerance=0, chat=False
    )
    (token,) = found.tokens
    assert (token.token, token.id, token.ids) == (word, ids[0], tuple(ids))
    assert [tiny_tokenizer().decode([one]) for one in ids] == list(token.pieces)
    expected = []
    for dial in DIALS:
        each = []
        for prompt in PROMPTS[:2]:
            given = token_ids(prompt)
            first = len(given) - 1 if positions == "last" else 0
            p = 1.0
            for place, piece in enumerate(ids):
                op = steering.interventions[0].operator
                p *= float(plain_p(lm, [*given, *ids[:place]], op, dial, first)[piece])
            each.append(p)
        expected.append(sum(each) / 2)
    dials = found.dials.tolist()
    own = [float(token.delta_p[dials.index(dial)]) + token.base_p for dial in DIALS]
    assert own == pytest.approx(expected, rel=1e-4)
    assert token.base_p == pytest.approx(expected[1], rel=1e-4)
    assert max(own) > 1.2 * min(own)
    said = " ".join(read(found).lines())
    assert f"{word!r} is 3 tokens" in said
    assert found.as_json()["tokens"][0]["ids"] == ids


def test_what_continues_another_token_counts_once() -> None:
    lm, word = language_model("llama"), long_word()
    ids = pieces_of(word)
    found = curve(
        lm, sharp(lm), PROMPTS[:1], span=(-1, 1), points=3, tokens=[ids[0], word, 9], chat=False
    )
    first, sequence, other = (token.delta_p + token.base_p for token in found.tokens)
    assert (sequence < first).all()
    torch.testing.assert_close(found.target, first + other)


def test_log_odds_of_a_sequence_are_the_sum_over_its_tokens() -> None:
    lm, word = language_model("llama"), long_word()
    ids = pieces_of(word)
    texts = {"positive": ["Today I feel happy", "A good day"], "negative": ["It was sad"]}
    source = tt.Contrast.from_texts(texts["positive"], texts["negative"])
    found = curve(
        lm, sharp(lm), PROMPTS[:1], span=(-1, 1), points=3, tokens=[word], contrast=source,
        chat=False,
    )  # fmt: skip
    means = {}
    for side, own in texts.items():
        sums = []
        for text in own:
            given = token_ids(text)
            logits = plain_logits(lm.model, [*given, *ids])[len(given) - 1 : -1]
            log_p = logits.double().log_softmax(-1)
            sums.append(float(log_p[range(3), ids].sum()))
        means[side] = sum(sums) / len(sums)
    assert found.tokens[0].log_odds == pytest.approx(
        means["positive"] - means["negative"], abs=1e-4
    )
    assert token_log_odds(lm, source).shape == (400,)


def test_a_sequence_that_does_not_fit_is_refused() -> None:
    lm, word = language_model("llama"), long_word()
    room = lm.max_length
    prompt = "the " * 1000
    ids = tiny_tokenizer()(prompt, add_special_tokens=False).input_ids
    text = tiny_tokenizer().decode(ids[: room - 2])
    assert room - 2 < len(token_ids(text)) <= room
    refused_in_one_line(
        lambda: curve(lm, sharp(lm), [text], span=(-1, 1), points=3, tokens=[word], chat=False),
        "2 pieces of a token exceed",
    )


# -- those that are chosen ------------------------------------------------------------------------


def test_the_tokens_that_gain_most_within_the_bounds() -> None:
    lm = language_model("llama")
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(4)
    steering, dials = sharp(lm, size=1.0), [i / 2 for i in range(-20, 21)]
    options: Any = {"span": (-10, 10), "points": 41, "tolerance": 0, "chat": False}
    found = curve(lm, steering, PROMPTS, tokens=4, **options)
    op = steering.interventions[0].operator
    p = torch.stack(
        [torch.stack([plain_p(lm, token_ids(t), op, d) for d in dials]) for t in PROMPTS]
    )  # [prompts, dials, vocabulary]
    base = p[:, 20][:, None]
    kl = (base * (base.log() - p.log())).sum(-1).mean(0)
    entropy = -(p * p.log()).sum(-1).mean(0)
    share = entropy / entropy[20]
    last = 20
    while last < 40 and kl[last + 1] <= 1 and 0.5 <= share[last + 1] <= 1.5:
        last += 1
    assert 20 < last < 40  # the curve goes beyond
    gains = p.mean(0)[20 : last + 1].amax(0) - p.mean(0)[20]
    assert [token.id for token in found.tokens] == gains.topk(4).indices.tolist()
    assert f"gain most from 0 to {dials[last]:.4g}" in found.chosen
    assert found.chosen in read(found).lines()
    at_end = curve(lm, steering, PROMPTS, tokens=4, choose="end", **options)
    assert [token.id for token in at_end.tokens] == p.mean(0)[-1].topk(4).indices.tolist()
    assert at_end.chosen == ""
    assert [token.id for token in at_end.tokens] != [token.id for token in found.tokens]


def test_the_far_end_may_be_the_lower_one() -> None:
    lm = language_model("llama")
    found = curve(
        lm, sharp(lm), PROMPTS[:1], span=(-3, 0), points=4, tokens=3, choose="end", chat=False
    )
    op = sharp(lm).interventions[0].operator
    p = plain_p(lm, token_ids(PROMPTS[0]), op, -3.0)
    assert [token.id for token in found.tokens] == p.topk(3).indices.tolist()


def test_where_none_gains_within_the_bounds_it_is_said() -> None:
    lm = language_model("llama")
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(5)
    found = curve(
        lm, sharp(lm), PROMPTS[:1], span=(-40, 40), points=5, tokens=3, chat=False,
        bounds=Bounds(max_kl=1e-6),
    )  # fmt: skip
    assert "most probable at 40, the far end: none gains" in found.chosen
    foreign = replace(sharp(lm), dial=replace(sharp(lm).dial, unit="°"))
    one = curve(lm, foreign, PROMPTS[:1], span=(10, 40), points=3, tokens=3, chat=False)
    assert "40°, the far end: the steering does nothing at no dial of the curve" in one.chosen
