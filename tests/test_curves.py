"""Curves of the next token over a dial, against plain passes of the same models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import (
    PROMPTS,
    add,
    basis,
    by_hand,
    language_model,
    operator,
    plain_logits,
    refused_in_one_line,
    scale,
    steer,
    token_ids,
)
from tiny import tiny_tokenizer
from trimtab.dials.turning import Turning
from trimtab.steering.operators import Add, Rotate, Turn
from trimtab.strength import Curve, curve, resampled, token_log_odds
from trimtab.strength.refitting import at_layers, method_of

ALL = list(range(len(tiny_tokenizer())))


def plain_p(model: Any, ids: list[int], layer: int, change: Any = None) -> Tensor:
    """The next token's probabilities [vocabulary], a block's output changed by hand."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    hook = blocks[layer].register_forward_hook(
        lambda module, args, out: out if change is None else change(out)
    )
    try:
        return plain_logits(model, ids)[-1].double().softmax(-1)
    finally:
        hook.remove()


def plain_curve(
    lm: tt.LanguageModel, text: str, layer: int, op: Any, dials: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [dials, vocabulary], KL and entropy [dials] by one plain pass per dial."""
    ids = token_ids(text)
    base = plain_p(lm.model, ids, layer)
    p = torch.stack([plain_p(lm.model, ids, layer, by_hand(op, dial)) for dial in dials])
    kl = (base * (base.log() - p.log())).sum(-1)
    return p, kl, -(p * p.log()).sum(-1)


def sharp(lm: tt.LanguageModel, layer: int = 1, size: float = 3.0) -> tt.Steering:
    """Adds so much that tokens overtake each other within a few dials."""
    return steer(lm, (f"layers.{layer}.resid", add(lm.anatomy.hidden_size, 5, size)))


# -- against plain passes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_curve_is_what_a_loop_of_plain_passes_finds(name: str) -> None:
    lm = language_model(name)
    steering = sharp(lm)
    found = curve(
        lm, steering, PROMPTS[:1], span=(-2, 3), points=11, tokens=ALL, tolerance=0, chat=False
    )
    dials = np.linspace(-2, 3, 11).tolist()
    assert found.dials.tolist() == pytest.approx(dials)
    p, kl, entropy = plain_curve(lm, PROMPTS[0], 1, steering.interventions[0].operator, dials)
    base = plain_p(lm.model, token_ids(PROMPTS[0]), 1)
    delta = torch.stack([token.delta_p for token in found.tokens], 1)
    torch.testing.assert_close(delta, p - base, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.kl, kl, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-5, rtol=1e-4)
    assert found.base_entropy == pytest.approx(float(-(base * base.log()).sum()), rel=1e-5)
    assert [token.base_p for token in found.tokens] == pytest.approx(base.tolist(), abs=1e-6)
    assert [token.id for token in found.tokens] == ALL
    # Over the whole vocabulary nothing is gained or lost.
    assert delta.sum(1).abs().max() < 1e-5
    torch.testing.assert_close(found.target, torch.ones(11, dtype=torch.float64), atol=1e-5, rtol=0)
    assert delta.abs().max() > 5e-3


@pytest.mark.parametrize("kind", ["Rotate", "Scale", "Turn", "Adaptive", "Ablate"])
def test_other_dials_than_additive_ones(kind: str) -> None:
    lm = language_model("llama")
    op = operator(kind, lm.anatomy.hidden_size, 3)
    dials = [-150.0, -20.0, 0.0, 70.0, 179.0] if "basis" in vars(op) else [-3.0, 0.0, 0.5, 2.0]
    found = curve(
        lm, steer(lm, ("layers.1.resid", op)), PROMPTS[:1], span=(dials[0], dials[-1]),
        points=2, tokens=ALL, tolerance=0, chat=False,
    )  # fmt: skip
    p, kl, _ = plain_curve(lm, PROMPTS[0], 1, op, found.dials.tolist())
    base = plain_p(lm.model, token_ids(PROMPTS[0]), 1)
    delta = torch.stack([token.delta_p for token in found.tokens], 1)
    torch.testing.assert_close(delta, p - base, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.kl, kl, atol=1e-5, rtol=1e-4)
    # A Turn does nothing at no dial, so that none has to be on its grid.
    assert (0.0 in found.dials.tolist()) is (kind not in ("Turn", "Adaptive"))


def test_nothing_changes_at_the_dial_that_does_nothing() -> None:
    lm = language_model("qwen2")
    for points in (10, 200):  # neither grid has 0 by itself
        found = curve(lm, sharp(lm), PROMPTS, span=(-1, 1), points=points, chat=False)
        place = found.dials.tolist().index(0.0)
        assert len(found.dials) == points + 1
        assert float(found.kl[place]) == 0
        assert max(abs(float(token.delta_p[place])) for token in found.tokens) < 1e-12
        assert float(found.entropy[place]) == pytest.approx(found.base_entropy, abs=1e-9)
        assert found.measured[place]
        assert float(found.kl[place - 1]) > 0
        assert float(found.kl[place + 1]) > 0


def test_a_token_that_only_one_prompt_knows_is_still_where_it_is_for_the_others() -> None:
    lm = language_model("llama")
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(3)
    options: Any = {"span": (-1, 1), "points": 5, "tokens": 6, "chat": False}
    found = curve(lm, sharp(lm), PROMPTS, tolerance=0.4, **options)
    exact = dense(lm, sharp(lm), token_ids(PROMPTS[0]), [0.0, 1.0])
    assert any(float(exact[:, token.id].max()) < 0.1 for token in found.tokens)
    for token in found.tokens:
        assert float(token.delta_p[2]) == pytest.approx(0, abs=1e-12)


def test_the_dial_that_does_nothing_replaces_one_that_differs_by_rounding() -> None:
    lm = language_model("llama")
    found = curve(lm, sharp(lm), PROMPTS[:1], span=(-0.9, 0.6), points=6, chat=False)
    assert np.linspace(-0.9, 0.6, 6)[3] != 0  # -1.1e-16
    assert found.dials.tolist() == pytest.approx([-0.9, -0.6, -0.3, 0.0, 0.3, 0.6])
    assert found.dials[3] == 0


def test_several_prompts_are_the_mean_of_single_ones() -> None:
    lm = language_model("llama")
    options: Any = {"span": (-1, 2), "points": 9, "tokens": [5, 300, 17], "chat": False}
    for tolerance in (0.0, 0.02):
        together = curve(lm, sharp(lm), PROMPTS, tolerance=tolerance, **options)
        single = [curve(lm, sharp(lm), [one], tolerance=0, **options) for one in PROMPTS]
        assert together.prompts == 3
        assert together.passes == 3 * 10  # 0 is on the grid too
        for place in range(3):
            mean = torch.stack([one.tokens[place].delta_p for one in single]).mean(0)
            torch.testing.assert_close(
                together.tokens[place].delta_p, mean, atol=tolerance + 1e-6, rtol=0
            )
        for name in ("kl", "entropy", "target"):
            mean = torch.stack([getattr(one, name) for one in single]).mean(0)
            torch.testing.assert_close(getattr(together, name), mean, atol=1e-5, rtol=1e-4)
        assert together.base_entropy == pytest.approx(
            sum(one.base_entropy for one in single) / 3, rel=1e-6
        )


def test_a_chat_goes_through_the_template() -> None:
    lm = language_model("llama")
    chat = curve(lm, sharp(lm), ["Hi"], span=(-1, 1), points=3, tokens=[7])
    ids = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )["input_ids"]
    assert chat.tokens[0].base_p == pytest.approx(float(plain_p(lm.model, ids, 1)[7]), rel=1e-4)
    raw = curve(lm, sharp(lm), ["Hi"], span=(-1, 1), points=3, tokens=[7], chat=False)
    expected = float(plain_p(lm.model, token_ids("Hi"), 1)[7])
    assert raw.tokens[0].base_p == pytest.approx(expected, rel=1e-4)


# -- few dials instead of many --------------------------------------------------------------------


def dense(lm: tt.LanguageModel, steering: tt.Steering, ids: list[int], dials: Any) -> Tensor:
    """Probabilities of the whole vocabulary at every dial, by the batched passes that
    test_turning compares with plain ones."""
    turning = Turning(lm, steering, [ids])
    p = torch.zeros(len(dials), turning.base.shape[-1], dtype=torch.float64)
    for places, log_p in turning.log_p([0] * len(dials), list(dials)):
        p[places] = log_p.double().exp()
    return p


def worst(found: Curve, exact: Tensor, base: Tensor) -> float:
    """How far the curve is off anywhere, in probability."""
    shown = torch.stack([token.delta_p + token.base_p for token in found.tokens], 1)
    assert len(found.tokens) == exact.shape[1]
    return float((shown - exact).abs().max())


@pytest.mark.parametrize(("size", "span"), [(1.0, 40.0), (3.0, 40.0), (0.3, 100.0)])
def test_adaptive_sampling_is_the_dense_grid(size: float, span: float) -> None:
    lm = language_model("llama")
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(5)  # one token is almost sure, and then another one
    steering = sharp(lm, size=size)
    found = curve(lm, steering, PROMPTS[:1], span=(-span, span), tokens=ALL, chat=False)
    exact = dense(lm, steering, token_ids(PROMPTS[0]), found.dials.tolist())
    assert len(found.dials) == 1025
    assert worst(found, exact, exact) < 1e-3
    # There is something to miss: tokens that come and go between two coarse dials.
    step = exact[::32].diff(dim=0).abs().max()
    assert step > 0.2
    base = exact[512]
    kl = (base * (base.log() - exact.log())).sum(-1)
    assert ((found.kl - kl).abs() <= torch.maximum(torch.tensor(0.02), 0.02 * kl)).all()
    assert int(found.measured.sum()) == found.passes < 500


def test_asking_for_tokens_beforehand_or_not_gives_one_curve() -> None:
    lm = language_model("llama")
    options: Any = {"span": (-20, 20), "points": 257, "chat": False}
    top = curve(lm, sharp(lm), PROMPTS, tokens=3, **options)
    asked = curve(lm, sharp(lm), PROMPTS, tokens=[one.id for one in top.tokens], **options)
    exact = torch.stack(
        [dense(lm, sharp(lm), token_ids(one), top.dials.tolist()) for one in PROMPTS]
    ).mean(0)
    for one, other in zip(top.tokens, asked.tokens, strict=True):
        assert one.token == other.token
        torch.testing.assert_close(one.delta_p, other.delta_p, atol=1e-3, rtol=0)
        assert float((one.delta_p + one.base_p - exact[:, one.id]).abs().max()) < 1e-3


def test_tolerance_zero_runs_the_model_at_every_dial() -> None:
    lm = language_model("llama")
    options: Any = {"span": (-10, 10), "points": 101, "chat": False}
    every = curve(lm, sharp(lm), PROMPTS[:2], tolerance=0, **options)
    assert every.measured.all()
    assert every.passes == 202
    few = curve(lm, sharp(lm), PROMPTS[:2], tolerance=0.05, **options)
    assert few.passes < 150
    short = curve(lm, sharp(lm), PROMPTS[:2], span=(-1, 1), points=60, chat=False)
    assert short.passes == 2 * 61  # a short curve is measured everywhere


def test_a_looser_tolerance_runs_fewer_dials() -> None:
    lm = language_model("llama")
    passes = [
        curve(lm, sharp(lm, size=1.0), PROMPTS[:1], span=(-40, 40), tolerance=t, chat=False).passes
        for t in (1e-4, 1e-3, 1e-2)
    ]
    assert passes[0] > passes[1] > passes[2] > 30


@pytest.mark.slow
@pytest.mark.parametrize("layer", [4, 15])
def test_adaptive_sampling_on_smollm2(smollm2: Any, layer: int) -> None:
    steering = tt.CAA(layer=layer, token="last").fit(smollm2, tt.Contrast.builtin("formality"))
    text = "She looked at the map and"
    exact = dense(
        smollm2, steering, smollm2.encode([text])[0], np.linspace(-200, 200, 1025).tolist()
    )
    live = (exact.amax(0) > 1e-4).nonzero().flatten().tolist()
    found = curve(smollm2, steering, [text], span=(-200, 200), tokens=live, chat=False)
    assert len(live) > 100
    assert worst(found, exact[:, live], exact[512]) < 1e-3
    assert found.passes < 300


# -- which tokens ---------------------------------------------------------------------------------


def test_the_tokens_that_are_most_probable_at_the_largest_dial() -> None:
    lm = language_model("llama")
    steering = sharp(lm)
    options: Any = {"span": (-2, 2), "points": 5, "tolerance": 0, "chat": False}
    found = curve(lm, steering, PROMPTS, tokens=4, choose="end", **options)
    op = steering.interventions[0].operator
    at_end = torch.stack(
        [plain_p(lm.model, token_ids(text), 1, by_hand(op, 2.0)) for text in PROMPTS]
    ).mean(0)
    assert [token.id for token in found.tokens] == at_end.topk(4).indices.tolist()
    torch.testing.assert_close(
        torch.stack([token.delta_p[-1] + token.base_p for token in found.tokens]),
        at_end.topk(4).values,
        atol=1e-5,
        rtol=1e-4,
    )
    shown = torch.stack([token.delta_p + token.base_p for token in found.tokens]).sum(0)
    torch.testing.assert_close(found.target, shown, atol=1e-6, rtol=0)


def test_tokens_by_text_and_by_id() -> None:
    lm = language_model("llama")
    tokenizer = tiny_tokenizer()
    (the,) = tokenizer(" the", add_special_tokens=False).input_ids
    found = curve(
        lm, sharp(lm), PROMPTS[:1], span=(-1, 1), points=3, tokens=[" the", 9, the], chat=False
    )
    assert [token.id for token in found.tokens] == [the, 9]  # once each
    assert [token.token for token in found.tokens] == [
        tokenizer.decode([the]),
        tokenizer.decode([9]),
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": [400]}, "there is no token 400: 400 are known"),
        ({"tokens": [-1]}, "there is no token -1"),
        ({"tokens": [""]}, "'' has no token"),
        ({"tokens": []}, "no token to show"),
        ({"tokens": " happy"}, "must be a list"),
        ({"tokens": 0}, "1 token or more, not 0"),
        ({"span": (1, 1)}, "lower to a higher dial"),
        ({"span": (2, 1)}, "lower to a higher dial"),
        ({"span": (0, float("nan"))}, "lower to a higher dial"),
        ({"span": (0, float("inf"))}, "lower to a higher dial"),
        ({"points": 1}, "2 points or more"),
        ({"tolerance": -0.1}, "tolerance must be 0 or more"),
        ({"tolerance": float("nan")}, "tolerance must be 0 or more"),
    ],
)
def test_what_bad_input_gets(options: Any, says: str) -> None:
    lm = language_model("llama")
    given = {"span": (-1, 1), "points": 3, "chat": False} | options
    refused_in_one_line(lambda: curve(lm, sharp(lm), PROMPTS[:1], **given), says)


def test_no_prompts_generated_positions_and_foreign_steerings_are_refused() -> None:
    lm = language_model("llama")
    refused_in_one_line(lambda: curve(lm, sharp(lm), []), "there is no prompt")
    late = steer(lm, ("layers.1.resid", add(lm.anatomy.hidden_size)), positions="generated")
    refused_in_one_line(lambda: curve(lm, late, PROMPTS), "generated tokens only")
    foreign = replace(sharp(lm), model=replace(lm.identity, digest="0" * 64))
    refused_in_one_line(lambda: curve(lm, foreign, PROMPTS), "fit one for this model")
    curve(lm, foreign, PROMPTS[:1], span=(-1, 1), points=3, force=True)


def test_an_overflow_is_said() -> None:
    lm = language_model("llama", dtype=torch.float16)
    steering = sharp(lm)
    refused_in_one_line(
        lambda: curve(lm, steering, PROMPTS[:1], span=(0, 1e30), points=3, chat=False),
        "overflow at dials like .*: try --dtype float32, or a smaller range",
    )


# -- log-odds -------------------------------------------------------------------------------------


def plain_odds(lm: tt.LanguageModel, positive: list[str], negative: list[str], cut: int) -> Tensor:
    def mean(texts: list[str]) -> Tensor:
        rows = [plain_logits(lm.model, token_ids(text)[:cut])[-1] for text in texts]
        return torch.stack([row.double().log_softmax(-1) for row in rows]).mean(0)

    return mean(positive) - mean(negative)


@pytest.mark.parametrize("cut", [100, 4])
def test_log_odds_are_a_plain_mean(cut: int) -> None:
    lm = language_model("gemma2")
    pairs = [("Today I feel", " happy.", " sad and old."), ("", "Yes, I would", "No")]
    positive = [prompt + one for prompt, one, _ in pairs]
    negative = [prompt + other for prompt, _, other in pairs]
    expected = plain_odds(lm, positive, negative, cut)
    paired = token_log_odds(lm, tt.Contrast.from_pairs(pairs), cut)
    torch.testing.assert_close(paired, expected, atol=1e-5, rtol=1e-4)
    # Sides of different number, and a row that is not for training.
    longer = [*negative, "There are ten numbers here"]
    unpaired = tt.Contrast.from_texts(positive, longer)
    torch.testing.assert_close(
        token_log_odds(lm, unpaired, cut), plain_odds(lm, positive, longer, cut), atol=1e-5,
        rtol=1e-4,
    )  # fmt: skip
    parts = replace(
        unpaired,
        rows=(
            *(replace(row, part="train") for row in unpaired.rows),
            replace(unpaired.rows[0], part="test"),
        ),
    )
    assert torch.equal(token_log_odds(lm, parts, cut), token_log_odds(lm, unpaired, cut))
    assert expected.abs().max() > 0.1


def test_a_curve_carries_log_odds() -> None:
    lm = language_model("llama")
    contrast = tt.Contrast.from_texts(["Today I feel happy"], ["The rain came"])
    options: Any = {"span": (-1, 1), "points": 3, "tokens": [8, 80], "chat": False}
    found = curve(lm, sharp(lm), PROMPTS[:1], contrast=contrast, **options)
    odds = token_log_odds(lm, contrast)
    assert [one.log_odds for one in found.tokens] == pytest.approx(
        [float(odds[8]), float(odds[80])]
    )
    assert curve(lm, sharp(lm), PROMPTS[:1], **options).tokens[0].log_odds is None


# -- error bars -----------------------------------------------------------------------------------

PAIRS = [
    ("Today I feel", " happy.", " sad."),
    ("The answer is", " yes.", " no."),
    ("I think that this film was", " wonderful.", " boring."),
    ("She said that the day was", " good", " bad"),
]


def test_error_bars_come_from_resampled_contrasts() -> None:
    lm, contrast = language_model("llama"), tt.Contrast.from_pairs(PAIRS)
    method = tt.CAA(layer=1, token="last")
    fitted = method.fit(lm, contrast)
    others = resampled(lm, method, contrast, 3, seed=1)
    options: Any = {"span": (-3, 3), "points": 7, "tokens": [8, 80], "chat": False}
    found = curve(lm, fitted, PROMPTS[:2], resamples=others, **options)
    alone = curve(lm, fitted, PROMPTS[:2], **options)
    singles = [curve(lm, other, PROMPTS[:2], **options) for other in others]
    for place, token in enumerate(found.tokens):
        assert torch.equal(token.delta_p, alone.tokens[place].delta_p)
        assert alone.tokens[place].runs is None
        runs = torch.stack([single.tokens[place].delta_p for single in singles])
        assert token.runs is not None
        torch.testing.assert_close(token.runs, runs, atol=1e-9, rtol=0)
        mean = sum(runs) / 3
        by_hand_sd = (sum((run - mean) ** 2 for run in runs) / 2) ** 0.5
        sd = torch.tensor(found.as_json()["tokens"][place]["sd"], dtype=torch.float64)
        torch.testing.assert_close(sd, by_hand_sd, atol=1e-9, rtol=1e-6)
        assert sd[0] > 1e-4
        assert sd[3] == pytest.approx(0, abs=1e-9)
    assert alone.as_json()["tokens"][0]["sd"] is None


def vectors(steerings: list[tt.Steering]) -> list[Tensor]:
    found = []
    for steering in steerings:
        op = steering.interventions[0].operator
        assert isinstance(op, Add)
        found.append(op.vector)
    return found


def test_resampling_repeats_by_its_seed() -> None:
    lm, contrast = language_model("llama"), tt.Contrast.from_pairs(PAIRS)
    first, again, another = (
        vectors(resampled(lm, tt.CAA(layer=1, token="last"), contrast, 3, seed))
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    six = [*first, *another]
    assert not any(torch.equal(six[i], six[j]) for i in range(6) for j in range(i))
    # A run is the plain fit of its resampled rows.
    own = tt.CAA(layer=1, token="last").fit(lm, contrast.resample(3))
    assert torch.equal(vectors([own])[0], another[0])
    refused_in_one_line(
        lambda: resampled(lm, tt.CAA(layer=1, token="last"), contrast, 1), "2 resamples or more"
    )


def test_resample_draws_train_rows_with_replacement() -> None:
    rows = [(f"Row {i} is", " yes", " no") for i in range(30)]
    contrast = tt.Contrast.from_pairs(rows).split(0.2, 0.1)
    found = contrast.resample(4)
    assert len(found) == 30
    assert found.name == contrast.name
    for part in ("validation", "test"):
        assert found.part(part).rows == contrast.part(part).rows  # type: ignore[arg-type]
    train, drawn = contrast.train.rows, found.train.rows
    assert len(drawn) == len(train) == 21
    assert set(drawn) < set(train)
    assert len(set(drawn)) < 21  # some twice
    assert found.rows == contrast.resample(4).rows
    assert found.rows != contrast.resample(5).rows
    # About 63 % of the rows are drawn, as with replacement from many.
    share = np.mean([len(set(contrast.resample(i).train.rows)) / 21 for i in range(200)])
    assert share == pytest.approx(1 - (1 - 1 / 21) ** 21, abs=0.02)


def test_resample_keeps_the_labels_of_an_unpaired_contrast() -> None:
    contrast = tt.Contrast.from_texts(
        [f"Up {i}" for i in range(5)], [f"Down {i}" for i in range(9)]
    )
    for seed in range(20):
        labels = [row.label for row in contrast.resample(seed).texts]
        assert labels.count("positive") == 5
        assert labels.count("negative") == 9
    twice = contrast.resample(0).resample(1)  # rows that are there twice are drawn as two
    assert len(twice) == 14


# -- methods and layers ---------------------------------------------------------------------------


def test_a_steering_knows_its_method() -> None:
    lm, contrast = language_model("llama"), tt.Contrast.from_pairs(PAIRS)
    methods: list[Any] = [
        tt.CAA(layer=(0, 2), token="last"),
        tt.AUSteer(k=4, site="ffn_out", direction="paper", strength="adaptive"),
        tt.SAS(theta=30),
    ]
    for method in methods:
        steering = method.fit(lm, contrast)
        assert method_of(steering) == method
    refused_in_one_line(lambda: method_of(sharp(lm)), "no method 'test'")
    wrong = replace(tt.CAA(layer=1, token="last").fit(lm, contrast), hyperparameters={"depth": 3})
    refused_in_one_line(lambda: method_of(wrong), "hyperparameters that the method does not")


def test_layers_from_the_first_to_the_last() -> None:
    lm, contrast = language_model("llama"), tt.Contrast.from_pairs(PAIRS)
    steering = tt.CAA(layer=1, token="last").fit(lm, contrast)
    for layers, count, expected in (
        (30, 4, [0, 9, 19, 29]), (12, 4, [0, 3, 7, 11]), (32, 3, [0, 15, 31]), (3, 5, [0, 1, 2]),
        (12, 1, [0]),
    ):  # fmt: skip
        found: list[Any] = at_layers(steering, layers, count)
        assert [method.layer for method in found] == expected
    refused_in_one_line(lambda: at_layers(steering, 12, 0), "1 layer or more")
    wide = tt.AUSteer(k=4, site="ffn_out", direction="paper").fit(lm, contrast)
    refused_in_one_line(lambda: at_layers(wide, 12, 3), "austeer has no layer")


def test_json_has_what_others_rely_on() -> None:
    lm = language_model("llama")
    found = curve(lm, sharp(lm), PROMPTS[:1], span=(-1, 1), points=3, tokens=[8], chat=False)
    document = found.as_json()
    assert document["dials"] == [-1.0, 0.0, 1.0]
    assert document["kl"] == found.kl.tolist()
    assert document["entropy"] == found.entropy.tolist()
    (token,) = document["tokens"]
    assert token["id"] == 8
    assert token["token"] == tiny_tokenizer().decode([8])
    assert token["delta_p"] == found.tokens[0].delta_p.tolist()


def test_a_rotation_comes_back_after_a_full_turn() -> None:
    lm = language_model("llama")
    steering = steer(lm, ("layers.1.resid", Rotate(basis(lm.anatomy.hidden_size))))
    found = curve(
        lm, steering, PROMPTS[:1], span=(-360, 360), points=5, tokens=[8], tolerance=0, chat=False
    )
    assert found.kl[0] == pytest.approx(0, abs=1e-6)
    assert found.kl[-1] == pytest.approx(0, abs=1e-6)
    assert found.kl[1] == pytest.approx(float(found.kl[3]), rel=1e-4)
    assert found.kl[1] > 1e-3
    assert isinstance(steer(lm, ("layers.1.resid", Turn(basis(8)))).interventions[0].operator, Turn)
    assert scale(8).size == 3
