"""SSV, BiPO and RePS: their losses, their algebra, and what comes out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid

import trimtab as tt
from effects_by_hand import fresh, in_float64
from helpers import block, hand_hooked, language_model, refused_in_one_line
from test_identity import quantised
from training_by_hand import CONTRAST, PAIRS, log_p, loss_of, minimum, plus
from trimtab import contrasts
from trimtab.fitting import Effect, Effects, Slope, Want
from trimtab.fitting.activations import collect
from trimtab.methods.bipo import BothWays
from trimtab.methods.reps import BothKinds
from trimtab.methods.ssv import Likelihood
from trimtab.steering import Clamp
from trimtab.training import Objective, Run, Text, Texts, Training, numbered, texts_of, train
from trimtab.training.objective import Steered

SITE = "layers.1.resid"
FACTORS = (2.0, 3.0)
#: Fewer than a training would have, with dials of both signs.
ROWS = 3


def objective(kind: str, lm: tt.LanguageModel, **more: Any) -> Objective:
    widths, positions = {SITE: lm.anatomy.hidden_size}, more.pop("positions", "all")
    if kind == "ssv":
        return Likelihood(widths, positions)
    if kind == "bipo":
        return BothWays(0.1, widths, positions)
    return BothKinds(FACTORS, more.pop("whole", False), widths, positions)


def drawn(own: Objective, lm: tt.LanguageModel, seed: int = 1) -> list[list[Run]]:
    generator = torch.Generator().manual_seed(seed)
    return own.draw(texts_of(lm, CONTRAST).rows[:ROWS], generator)


def a_vector(width: int, size: float = 0.1) -> Tensor:
    return size * torch.randn(width, generator=torch.Generator().manual_seed(3))


def suppressed(v: Tensor) -> Any:
    return lambda x: x - ((x @ v.to(x)).relu() / v.to(x).square().sum())[..., None] * v.to(x)


# -- the losses, in plain loops ---------------------------------------------------------------


@pytest.mark.parametrize("dial", [1.0, -1.0])
def test_bipo_by_hand(dial: float) -> None:
    lm = language_model("llama")
    own, v = objective("bipo", lm), a_vector(lm.anatomy.hidden_size)
    figures, _ = loss_of(
        lm, own, {SITE: v}, [[Run(2 * i, dial), Run(2 * i + 1, dial)] for i in range(ROWS)]
    )
    for row in range(ROWS):
        gains = [
            log_p(lm, PAIRS[row], side, plus(v, dial))[0] - log_p(lm, PAIRS[row], side, None)[0]
            for side in (0, 1)
        ]
        expected = -logsigmoid(0.1 * dial * (gains[0] - gains[1]))
        assert figures["loss"][row].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_reps_by_hand(whole: bool) -> None:
    lm = language_model("llama")
    own, v = objective("reps", lm, whole=whole), a_vector(lm.anatomy.hidden_size)
    runs = drawn(own, lm)
    figures, _ = loss_of(lm, own, {SITE: v}, runs)
    seen = set()
    for row, (winner, loser, *taken) in enumerate(runs):
        assert [run.role for run in taken] == ["suppressed"] * 2
        seen |= {winner.dial, loser.dial}
        losses = []
        for first, dials, changes in (
            (0, (winner.dial, loser.dial), None),
            (1, (1.0, 1.0), suppressed(v)),
        ):
            scores, plain = [], []
            for side, dial in zip((first, 1 - first), dials, strict=True):
                own_p, tokens = log_p(lm, PAIRS[row], side, changes or plus(v, dial))
                if whole:
                    text = PAIRS[row][0] + PAIRS[row][1 + side]
                    tokens = len(lm.encode([text])[0])
                scores.append(own_p / tokens)
                plain.append(log_p(lm, PAIRS[row], side, None)[0])
            beta = max(1.0, (plain[1] - plain[0]).item())
            losses.append(-logsigmoid(beta * scores[0] - scores[1]).item())
        assert figures["loss"][row].item() == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert seen == set(FACTORS)


def test_reps_is_simpo_where_the_model_has_no_preference() -> None:
    """Of equal texts on both sides, and wherever the gap is at most 1: SimPO with gamma 0."""
    lm = language_model("llama")
    own, v = objective("reps", lm), a_vector(lm.anatomy.hidden_size)
    texts = texts_of(lm, CONTRAST)
    small = [i for i, pair in enumerate(PAIRS) if _gap(lm, pair) <= 1]
    assert small
    generator = torch.Generator().manual_seed(0)
    runs = own.draw([texts.rows[i] for i in small], generator)
    figures, _ = loss_of(lm, own, {SITE: v}, runs)
    for row, i in enumerate(small):
        means = []
        for side, run in enumerate(runs[row][:2]):
            found, tokens = log_p(lm, PAIRS[i], side, plus(v, run.dial))
            means.append(found / tokens)
        assert figures["margin_add"][row].item() == pytest.approx(
            (means[0] - means[1]).item(), rel=1e-3
        )


def _gap(lm: tt.LanguageModel, pair: tuple[str, str, str]) -> float:
    with torch.no_grad():
        positive, negative = (log_p(lm, pair, side, None)[0] for side in (0, 1))
    return float(negative - positive)


# -- gradients ----------------------------------------------------------------------------------


def test_bipo_begins_at_log_2_and_goes_along_the_effect() -> None:
    """The gradient is -(beta / 2) that of the margin, whatever the dial; this is what effects
    are read from."""
    lm = fresh("llama")
    own, start = objective("bipo", lm), {SITE: torch.zeros(lm.anatomy.hidden_size)}
    want = Want(SITE, Effect("all"), Effects, Slope())
    effect = collect(lm, CONTRAST, [want])[want].mean
    for dial in (1.0, -1.0):
        runs = [[Run(text, dial) for text in row] for row in texts_of(lm, CONTRAST).rows]
        figures, slopes = loss_of(lm, own, start, runs)
        assert figures["loss"].tolist() == pytest.approx([math.log(2)] * len(PAIRS), abs=1e-9)
        torch.testing.assert_close(slopes[SITE], -0.05 * effect.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("kind", ["ssv", "bipo", "reps"])
def test_gradients_are_those_of_finite_differences(name: str, kind: str) -> None:
    lm = fresh(name)
    own = objective(kind, lm, positions="all[1:]")
    v, runs = a_vector(lm.anatomy.hidden_size), drawn(own, lm)
    with in_float64():
        _, slopes = loss_of(lm, own, {SITE: v}, runs)
        for unit in (0, 7, 31):
            step = 2.0**-13
            moved = [v.clone(), v.clone()]
            moved[0][unit] += step
            moved[1][unit] -= step
            up, down = (
                loss_of(lm, own, {SITE: each}, runs)[0]["loss"].mean().item() for each in moved
            )
            wide = float(moved[0][unit].double() - moved[1][unit].double())
            found = slopes[SITE][unit].item()
            assert found == pytest.approx((up - down) / wide, rel=1e-3, abs=1e-6)


def test_sub_leaves_nothing_along_the_vector() -> None:
    lm = language_model("llama")
    own, v = objective("reps", lm), a_vector(lm.anatomy.hidden_size)
    x = torch.randn(2, 5, len(v), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, 5)
    at = Steered((Run(0, 1.0, "suppressed"), Run(1, 2.0)), (), ones, ones.bool())
    changed = own.change({SITE: v}, SITE, x, at)
    assert (changed[0] @ v).max() <= 1e-5
    before = x[0] @ v
    assert before.max() > 0 > before.min()
    assert torch.equal(changed[0][before <= 0], x[0][before <= 0])
    torch.testing.assert_close(changed[1], x[1] + 2 * v)
    (one,) = tt.RePS(use="suppress", positions="all").interventions({SITE: v})
    torch.testing.assert_close(one.operator.bind(1.0, "cpu")(x[0]), changed[0], atol=1e-6, rtol=0)


# -- trainings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [tt.BiPO(layer=1, steps=6, batch=5)])
def test_swapped_answers_and_negated_dials_train_the_negative(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: the start is zero, and AdamW is odd. A batch holds all rows, since the order in
    which rows of one length are added up may not change."""
    lm = language_model("llama")
    draw = BothWays.draw
    vector = method.fit(lm, CONTRAST).interventions[0].operator.vector
    assert vector.any()

    def negated(self: Any, rows: Any, generator: Any) -> list[list[Run]]:
        runs = draw(self, rows, generator)
        # Positive texts first in a pass, as before.
        return [[replace(run, dial=-run.dial) for run in row] for row in runs]

    monkeypatch.setattr(BothWays, "draw", negated)
    swapped = tt.Contrast.from_pairs([(prompt, b, a) for prompt, a, b in PAIRS])
    other = method.fit(lm, swapped).interventions[0].operator.vector
    torch.testing.assert_close(other, -vector, rtol=1e-4, atol=1e-6)


def test_the_optimum_of_a_linear_model_is_the_logistic_one() -> None:
    """At what the LM head reads, log-odds of two tokens are linear in the vector: of n pairs one
    way and m the other BiPO ends where beta times what it adds to them is log(n / m)."""
    lm = language_model("llama")
    one, other = (Text((1, 20, 30, token), 3) for token in (40, 50))
    rows = [(one, other)] * 3 + [(other, one)]
    own = BothWays(0.5, {"final_norm": lm.anatomy.hidden_size}, "all")
    settings = Training(steps=150, batch=4, learning_rate=0.2)
    v = train(lm, own, numbered(rows), settings).parameters["final_norm"]
    head = lm.model.get_output_embeddings().weight.detach()
    assert 0.5 * float((head[40] - head[50]) @ v) == pytest.approx(math.log(3), abs=0.01)


def test_gains_have_the_signs_that_were_asked_for() -> None:
    lm = language_model("llama")
    for method in (tt.BiPO(layer=1, steps=30), tt.RePS(layer=1, steps=30), tt.SSV(layer=1)):
        steering = method.fit(lm, CONTRAST)
        size = 5.0 if steering.method == "reps" else 1.0
        base = tt.log_odds(lm, CONTRAST).mean()
        assert tt.log_odds(lm, CONTRAST, steering.at(size)).mean() > base + 0.05
        if steering.method == "bipo":
            assert tt.log_odds(lm, CONTRAST, steering.at(-size)).mean() < base - 0.05


@pytest.mark.parametrize("method", [tt.SSV, tt.BiPO, tt.RePS])
def test_at_dial_0_nothing_changes(method: Any) -> None:
    lm = language_model("llama")
    steering = method(layer=1, steps=2).fit(lm, CONTRAST)
    prompts = [pair[0] for pair in PAIRS]
    assert torch.equal(lm.logits(prompts, steering=steering.at(0)), lm.logits(prompts))
    assert steering.dial.name == "alpha"


# -- what they take -----------------------------------------------------------------------------


def test_what_suppresses_takes_all_out_unless_told_otherwise() -> None:
    lm = language_model("llama")
    steering = tt.RePS(layer=1, steps=3, use="suppress").fit(lm, CONTRAST)
    assert (steering.dial.default, steering.dial.range) == (1.0, (0.0, 1.0))
    operator = steering.interventions[0].operator
    assert isinstance(operator, Clamp)
    v = operator.direction
    x = torch.stack([3.0 * v, -3.0 * v])
    torch.testing.assert_close(operator.bind(steering.setting)(x) @ v, torch.tensor([0.0, -3.0]))
    assert tt.RePS(layer=1, steps=3).fit(lm, CONTRAST).dial.range[1] > 1  # what is added has no end


def test_contrasts_without_pairs() -> None:
    lm = language_model("llama")
    texts = tt.Contrast(
        tuple(
            contrasts.Text(prompt + answer, label)
            for prompt, *answers in PAIRS
            for answer, label in zip(answers, ("positive", "negative"), strict=True)
        )
    )
    for method in (tt.BiPO(layer=1), tt.RePS(layer=1)):
        refused_in_one_line(lambda method=method: method.fit(lm, texts), "give it rows with prompt")
    told = tt.SSV(layer=1, steps=4).fit(lm, texts).findings["training"]
    assert told["rows"] == len(PAIRS)
    assert told["loss"]["last"] < told["loss"]["first"]


def test_presets_and_what_wins_over_them() -> None:
    lm = language_model("llama")
    own = tt.RePS(preset="paper", steps=2).fit(lm, CONTRAST)
    options = own.hyperparameters
    assert options["learning_rate"] == 0.04
    assert options["batch"] == 6
    assert options["steps"] == 2
    assert options["positions"] == "all[1:]"
    texts = texts_of(lm, CONTRAST)
    paper = tt.BiPO(preset="paper").settled(lm, texts)
    settings = paper.training(len(texts.rows))
    assert paper.steps == 20 * 2  # five rows in batches of four
    assert settings.horizon == 100 * 2
    assert (settings.warmup, settings.schedule, settings.learning_rate) == (100, "cosine", 5e-4)
    small = tt.SSV().settled(lm, texts)
    assert small.steps == 60
    assert small.learning_rate == pytest.approx(0.02 * _median(lm), rel=1e-5)
    assert tt.SSV(learning_rate=0.5).settled(lm, texts).learning_rate == 0.5


def _median(lm: tt.LanguageModel) -> float:
    """The mean of the texts' medians at the output of block 1, tokens but the first."""
    medians = []
    for text in texts_of(lm, CONTRAST).texts:
        with torch.no_grad():
            states = lm.model(torch.tensor([text.tokens]), output_hidden_states=True).hidden_states
        medians.append(states[2][:, 1:].abs().median().item())
    return sum(medians) / len(medians)


def test_methods_that_differ_in_the_dial_share_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, count = language_model("llama"), []
    own = train
    monkeypatch.setattr(
        "trimtab.methods.trained.train",
        lambda *args, **more: (count.append(1), own(*args, **more))[1],
    )
    methods = [
        tt.SSV(1, steps=2, alpha=1),
        tt.SSV(1, steps=2, alpha=3),
        tt.CAA(1),
        tt.BiPO(1, steps=2),
    ]
    first, second, *_ = tt.fit(methods, lm, CONTRAST)
    assert len(count) == 2
    assert torch.equal(
        first.interventions[0].operator.vector, second.interventions[0].operator.vector
    )
    assert (first.dial.default, second.dial.default) == (1.0, 3.0)
    assert second.hyperparameters["alpha"] == 3.0


def test_on_quantised_weights() -> None:
    """What is differentiated are activations."""
    lm = quantised("llama")
    told = tt.SSV(layer=1, steps=8).fit(lm, CONTRAST).findings["training"]
    assert told["loss"]["last"] < told["loss"]["first"]


@pytest.mark.slow
def test_a_planted_vector_is_found_from_what_the_model_writes_under_it() -> None:
    lm = language_model("llama")
    planted = a_vector(lm.anatomy.hidden_size, 1.0)
    texts = numbered([(text,) for text in _sampled(lm, planted)])
    own = Likelihood({SITE: lm.anatomy.hidden_size}, "all")
    made = train(lm, own, texts, Training(steps=150, batch=64, learning_rate=0.05))
    assert cosine_similarity(made.parameters[SITE], planted, dim=0) > 0.9


@pytest.mark.slow
def test_a_planted_vector_is_found_from_preferences() -> None:
    """By BiPO, whose loss has its minimum there."""
    lm = language_model("llama")
    planted, rows = _preferred(lm)
    made = train(lm, BothWays(1.0, {"final_norm": len(planted)}, "all"), _texts(rows),
                 Training(steps=60, batch=200, learning_rate=0.1))  # fmt: skip
    assert cosine_similarity(made.parameters["final_norm"], planted, dim=0) > 0.9


@pytest.mark.slow
def test_reps_ends_where_its_own_loss_has_its_minimum() -> None:
    """Which is not the planted vector: the loss weights the two answers unequally, and asks what
    is left without the vector, too. The minimum is found by L-BFGS from the loss as it is written,
    over what the LM head reads; it is better than the planted vector by far."""
    lm = language_model("llama")
    planted, rows = _preferred(lm)
    made = train(lm, BothKinds((1.0,), False, {"final_norm": len(planted)}, "all"), _texts(rows),
                 Training(steps=150, batch=200, learning_rate=0.2))  # fmt: skip
    found = made.parameters["final_norm"].double()
    wins, loses = torch.tensor(rows).T
    head = lm.model.get_output_embeddings().weight.detach().double()
    with torch.no_grad():
        h = lm.model.model(torch.tensor([[1, 20, 30]])).last_hidden_state[0, -1].double()

    def kind(h: Tensor, first: Tensor, second: Tensor) -> Tensor:
        plain, log_p = ((x @ head.T).log_softmax(-1) for x in (before, h))
        beta = (plain[second] - plain[first]).clamp(min=1)
        return -logsigmoid(beta * log_p[first] - log_p[second]).mean()

    before = h

    def loss(v: Tensor) -> Tensor:
        without = before - (before @ v).relu() / v.square().sum() * v
        return (kind(before + v, wins, loses) + kind(without, loses, wins)) / 2

    minima = []
    for seed in (2, 3):
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(len(planted), generator=generator, dtype=torch.float64)
        minima.append(minimum(loss, v / v.norm()))
    best = min(minima, key=lambda v: float(loss(v)))
    assert float(loss(found)) == pytest.approx(float(loss(best)), rel=1e-3)
    assert cosine_similarity(found, best, dim=0) > 0.99
    assert float(loss(best)) < 0.8 * float(loss(planted.double()))
    assert cosine_similarity(best, planted.double(), dim=0) < 0.6


def _preferred(lm: tt.LanguageModel) -> tuple[Tensor, list[list[int]]]:
    """A vector at what the LM head reads, and pairs of tokens: of two the positive answer is the
    one that it makes the more probable one, as often as it does."""
    planted = a_vector(lm.anatomy.hidden_size, 1.0)
    head = lm.model.get_output_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(3, 160, (3000, 2), generator=generator)
    answers = answers[answers[:, 0] != answers[:, 1]]
    odds = (head[answers[:, 0]] - head[answers[:, 1]]) @ planted
    right = torch.rand(len(odds), generator=generator) < odds.sigmoid()
    return planted, torch.where(right[:, None], answers, answers.flip(1)).tolist()


def _texts(rows: list[list[int]]) -> Texts:
    return numbered([[Text((1, 20, 30, token), 3) for token in row] for row in rows])


@torch.no_grad()
def _sampled(
    lm: tt.LanguageModel, vector: Tensor, count: int = 256, tokens: int = 12
) -> list[Text]:
    """Texts that the model writes after prompts of a few tokens, under a vector."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (count, 4), generator=generator)
    for _ in range(tokens):
        with hand_hooked(block(lm.model, 1), plus(vector)):
            logits = lm.model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return [Text(tuple(row), 4) for row in ids.tolist()]
