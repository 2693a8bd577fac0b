"""ITI: probes, ranking and shifts against scikit-learn on activations read with plain hooks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

import trimtab as tt
from helpers import (
    PROMPTS,
    plain_logits,
    read_last,
    refused_in_one_line,
    relative,
    side_texts,
    token_ids,
)
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast, Text
from trimtab.steering.operators import Add

HEADS = 4  # of every tiny model; the key and value heads are fewer in most
PAIRS = [
    (
        f"The {who} looked at the {what} and said that it was",
        " " + ("right", "good", "true", "wonderful", "kind")[(i + j) % 5],
        " " + ("wrong", "bad", "false", "boring", "old")[(i * j) % 5],
    )
    for i, who in enumerate(("king", "mother", "captain", "daughter"))
    for j, what in enumerate(("ship", "map", "fire", "door", "light"))
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return tt.wrap(tiny_model(name), tiny_tokenizer(), name)


# -- the oracle --------------------------------------------------------------------------------


@functools.cache
def _heads(name: str) -> tuple[Tensor, Tensor]:
    """Both sides' last-token activations, [pairs, layers, heads, units] in float64."""
    positive, negative = (
        read_last(_lm(name).model, "heads", texts).unflatten(-1, (HEADS, -1))
        for texts in side_texts(PAIRS)
    )
    return positive, negative


def _held_out(count: int, rows: int, seed: int = 0) -> list[int]:
    """Which rows are held out: the first of a permutation."""
    return sorted(np.random.default_rng(seed).permutation(rows)[:count].tolist())


def _probe(positive: Tensor, negative: Tensor, held: list[int]) -> tuple[float, Tensor]:
    """Accuracy on the held-out pairs, and weights; from [pairs, units] of one head."""
    kept = [row for row in range(len(positive)) if row not in held]
    texts = torch.cat([positive[kept], negative[kept]]).numpy()
    with threadpool_limits(1, "blas"):
        probe = LogisticRegression(max_iter=1000).fit(texts, [1] * len(kept) + [0] * len(kept))
    right = (probe.predict(positive[held].numpy()) == 1).sum()
    right += (probe.predict(negative[held].numpy()) == 0).sum()
    return right / (2 * len(held)), torch.from_numpy(probe.coef_[0])


def _shift(positive: Tensor, negative: Tensor, theta: Tensor) -> tuple[Tensor, float]:
    """sigma theta of one head, and sigma: the population's deviation over all texts."""
    along = (torch.cat([positive, negative]) @ theta).tolist()
    mean = sum(along) / len(along)
    sigma = (sum((x - mean) ** 2 for x in along) / len(along)) ** 0.5
    return sigma * theta, sigma


def _ranked(steering: tt.Steering) -> list[tuple[int, int]]:
    tables = steering.tables
    return list(zip(tables["layer"].tolist(), tables["head"].tolist(), strict=True))


def _vectors(steering: tt.Steering) -> dict[tuple[int, int], Tensor]:
    """(layer, head) -> what is added to it at alpha 1, where it is not zero."""
    found = {}
    for intervention in steering.interventions:
        assert isinstance(intervention.operator, Add)
        layer, kind = intervention.site.split(".")[1:]
        assert kind == "heads"
        for head, vector in enumerate(intervention.operator.vector.unflatten(0, (HEADS, -1))):
            if vector.any():
                found[int(layer), head] = vector.double()
    return found


# -- probes and ranking ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_heads_are_ranked_by_scikit_learns_accuracy(name: str) -> None:
    lm, (positive, negative) = _lm(name), _heads(name)
    held = _held_out(4, 20)
    every = lm.anatomy.layers * HEADS
    accuracy = {
        (layer, head): _probe(positive[:, layer, head], negative[:, layer, head], held)[0]
        for layer in range(lm.anatomy.layers)
        for head in range(HEADS)
    }
    steering = tt.ITI(k=every).fit(lm, CONTRAST)
    found = dict(zip(_ranked(steering), steering.tables["accuracy"].tolist(), strict=True))
    assert found == pytest.approx(accuracy, abs=1e-6)
    # Eighths, so there are ties: the lower layer, then the lower head goes first.
    ranking = sorted(accuracy, key=lambda place: (-accuracy[place], place))
    assert _ranked(steering) == ranking
    assert len(set(accuracy.values())) < every


@pytest.mark.parametrize("k", [0, 1, 5])
def test_the_k_best_heads_are_steered(k: int) -> None:
    every, best = (tt.ITI(k=count).fit(_lm(), CONTRAST) for count in (12, k))
    assert _ranked(best) == _ranked(every)[:k]
    assert set(_vectors(best)) == set(_ranked(best))
    assert all(len(column) == k for column in best.tables.values())
    # The probes' accuracies say something.
    assert len(set(every.tables["accuracy"].tolist())) >= 3


@pytest.mark.parametrize(("held_out", "count"), [(0.2, 4), (0.1, 2), (0.5, 10), (0.01, 1)])
@pytest.mark.parametrize("seed", [0, 7])
def test_which_rows_are_held_out(held_out: float, count: int, seed: int) -> None:
    positive, negative = _heads("gpt2")
    held = _held_out(count, 20, seed)
    steering = tt.ITI(k=12, held_out=held_out, seed=seed).fit(_lm("gpt2"), CONTRAST)
    found = dict(zip(_ranked(steering), steering.tables["accuracy"].tolist(), strict=True))
    for (layer, head), value in found.items():
        expected, _ = _probe(positive[:, layer, head], negative[:, layer, head], held)
        assert value == pytest.approx(expected, abs=1e-6)


class _Recorded(LogisticRegression):
    """A probe that remembers what it was trained and scored on."""

    seen: list[tuple[Any, Any]] = []  # noqa: RUF012, shared on purpose

    def fit(self, X: Any, y: Any) -> Any:
        self.seen.append((X, y))
        return super().fit(X, y)

    def score(self, X: Any, y: Any) -> Any:
        self.seen.append((X, y))
        return super().score(X, y)


def _splits(
    monkeypatch: pytest.MonkeyPatch, contrast: Contrast, **options: Any
) -> list[tuple[Any, Any]]:
    """(texts, labels) of each probe's training and of its scoring, in turn."""
    seen: list[tuple[Any, Any]] = []
    monkeypatch.setattr(_Recorded, "seen", seen)
    monkeypatch.setattr("sklearn.linear_model.LogisticRegression", _Recorded)
    tt.ITI(k=2, **options).fit(_lm(), contrast)
    return seen


def test_both_sides_of_a_pair_are_on_the_same_side_of_the_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    positive, negative = _heads("llama")
    seen = _splits(monkeypatch, CONTRAST)
    assert len(seen) == 2 * 12
    held = _held_out(4, 20)
    for number, ((train, labels), (test, test_labels)) in enumerate(
        zip(seen[::2], seen[1::2], strict=True)
    ):
        layer, head = divmod(number, HEADS)
        for texts, own, rows in (
            (train, labels, [row for row in range(20) if row not in held]),
            (test, test_labels, held),
        ):
            assert own.sum() == len(rows) == len(own) / 2
            for side, sign in ((positive, True), (negative, False)):
                expected = side[rows][:, layer, head].numpy()
                assert np.allclose(texts[own == sign], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(4))  # one split could come out so by chance
def test_texts_that_are_not_pairs_are_split_by_side(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of each side, although the sides are not of one size."""
    plus, minus = side_texts(PAIRS)
    contrast = Contrast.from_texts(plus[:10], minus)
    seen = _splits(monkeypatch, contrast, seed=seed)
    for (_, labels), (_, held) in zip(seen[::2], seen[1::2], strict=True):
        assert (labels.sum(), len(labels)) == (8, 24)
        assert (held.sum(), len(held)) == (2, 6)
    # And no text is in both parts.
    train, test = seen[0][0], seen[1][0]
    assert not any((train == row).all(-1).any() for row in test)


def test_fitting_twice_gives_the_same() -> None:
    one, again = (tt.ITI(k=6).fit(_lm(), CONTRAST) for _ in range(2))
    other = tt.ITI(k=6, seed=1).fit(_lm(), CONTRAST)
    for name, table in one.tables.items():
        assert torch.equal(table, again.tables[name])
    assert all(torch.equal(v, _vectors(again)[place]) for place, v in _vectors(one).items())
    assert not torch.equal(one.tables["accuracy"], other.tables["accuracy"])
    # What is added to a head does not depend on which rows rank it.
    for place in set(_vectors(one)) & set(_vectors(other)):
        assert torch.equal(_vectors(one)[place], _vectors(other)[place])


def test_probes_are_trained_once_for_all_k(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.methods import iti

    trained: list[int] = []
    train = iti._probe
    monkeypatch.setattr(iti, "_probe", lambda *given: trained.append(1) or train(*given))
    lm = _lm()
    methods = [tt.ITI(k=2), tt.ITI(k=5), tt.ITI(k=2, alpha=1.0), tt.ITI(k=2, direction="probe")]
    found = tt.fit(methods, lm, CONTRAST)
    assert len(trained) == 2 * lm.anatomy.layers * HEADS  # for each direction
    for method, steering in zip(methods, found, strict=True):
        alone = method.fit(lm, CONTRAST)
        assert steering.setting == alone.setting
        assert _vectors(steering).keys() == _vectors(alone).keys()
        assert all(
            torch.equal(v, _vectors(alone)[place]) for place, v in _vectors(steering).items()
        )


def test_chance_leaves_the_global_state_alone() -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.rand(), torch.rand(2)
    np.random.seed(3)
    torch.manual_seed(3)
    tt.ITI(k=2).fit(_lm(), CONTRAST)
    assert np.random.rand() == expected[0]
    assert torch.equal(torch.rand(2), expected[1])


def test_probes_are_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as that a probe did not converge
        tt.ITI(k=2).fit(_lm("gemma3"), CONTRAST)


# -- shifts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("scale", [True, False])
def test_theta_is_the_unit_mean_difference(name: str, scale: bool) -> None:
    positive, negative = _heads(name)
    steering = tt.ITI(k=7, scale=scale).fit(_lm(name), CONTRAST)
    vectors = _vectors(steering)
    assert len(vectors) == 7
    for place, found_sigma in zip(_ranked(steering), steering.tables["sigma"], strict=True):
        of = (slice(None), *place)
        mean = (positive[of] - negative[of]).mean(0)
        theta = mean / mean.norm()
        shift, sigma = _shift(positive[of], negative[of], theta)
        expected = shift if scale else theta
        assert (vectors[place] - expected).norm() < 2e-3 * expected.norm()
        assert float(found_sigma) == pytest.approx(sigma, rel=1e-3)


@pytest.mark.parametrize("scale", [True, False])
def test_theta_may_be_the_probes(scale: bool) -> None:
    """Its weights at length 1, which point to the positive side."""
    positive, negative = _heads("llama")
    steering = tt.ITI(k=5, direction="probe", scale=scale).fit(_lm(), CONTRAST)
    assert _ranked(steering) == _ranked(tt.ITI(k=5).fit(_lm(), CONTRAST))
    held, apart = _held_out(4, 20), []
    for place, vector in _vectors(steering).items():
        of = (slice(None), *place)
        _, weights = _probe(positive[of], negative[of], held)
        theta = weights / weights.norm()
        expected = _shift(positive[of], negative[of], theta)[0] if scale else theta
        assert (vector - expected).norm() < 5e-3 * expected.norm()
        mean = (positive[of] - negative[of]).mean(0)
        assert vector @ mean > 0
        apart.append(float(theta @ mean / mean.norm()))
    assert min(apart) < 0.95


def test_swapped_sides_flip_theta() -> None:
    swapped = Contrast.from_pairs([(prompt, no, yes) for prompt, yes, no in PAIRS])
    for direction in ("mean", "probe"):
        method = tt.ITI(k=12, direction=direction)  # type: ignore[arg-type]
        one, other = (_vectors(method.fit(_lm(), contrast)) for contrast in (CONTRAST, swapped))
        for place, vector in one.items():
            assert (vector + other[place]).norm() < 1e-3 * vector.norm()


@pytest.mark.parametrize("direction", ["mean", "probe"])
def test_unpaired_texts_give_the_same_shift(direction: Any) -> None:
    """The shift knows no pairs; only the split does."""
    plus, minus = side_texts(PAIRS)
    rows = [Text(text, "negative") for text in minus[:5]]
    rows += [Text(text, "positive") for text in plus]
    rows += [Text(text, "negative") for text in minus[5:]]
    unpaired = tt.ITI(k=12, direction=direction).fit(_lm(), Contrast(tuple(rows)))
    paired = tt.ITI(k=12, direction=direction).fit(_lm(), CONTRAST)
    apart = max(
        float((vector - _vectors(paired)[place]).norm() / vector.norm())
        for place, vector in _vectors(unpaired).items()
    )
    # Probes see other texts in training, so theirs are others.
    assert apart < 1e-3 if direction == "mean" else apart > 1e-2


# -- on the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_at_all_positions_it_is_a_bias_of_the_output_projection(name: str) -> None:
    """b += W_o (alpha sigma theta): with W_o, which a published script leaves out."""
    lm = _lm(name)
    steering = tt.ITI(k=5, alpha=1.5).fit(lm, CONTRAST)
    edited = tiny_model(name)
    gpt2 = name == "gpt2"
    blocks: Any = edited.transformer.h if gpt2 else edited.model.layers
    with torch.no_grad():
        for (layer, head), vector in _vectors(steering).items():
            block = blocks[layer]
            projection = block.attn.c_proj if gpt2 else block.self_attn.o_proj
            weight = projection.weight.T if gpt2 else projection.weight  # [hidden, heads * size]
            size = weight.shape[1] // HEADS
            assert len(vector) == size
            added = weight[:, head * size : (head + 1) * size] @ (1.5 * vector).float()
            if projection.bias is None:
                projection.bias = nn.Parameter(torch.zeros_like(added))
            projection.bias += added
    for prompt, found in zip(PROMPTS, lm.logits(PROMPTS, steering=steering, at="all"), strict=True):
        expected = plain_logits(edited, token_ids(prompt))
        assert relative(found, expected) < 1e-4
        assert relative(plain_logits(lm.model, token_ids(prompt)), expected) > 0.01
    if name in ("llama", "gpt2"):
        baked: Any = tt.bake(lm, steering).model
        ids = token_ids(PROMPTS[0])
        assert relative(plain_logits(baked, ids), plain_logits(edited, ids)) < 1e-4


def test_alpha_zero_changes_nothing() -> None:
    lm = _lm()
    steering = tt.ITI(k=12).fit(lm, CONTRAST).at(0)
    assert torch.equal(lm.logits(PROMPTS, steering=steering), lm.logits(PROMPTS))
    nothing = tt.ITI(k=0).fit(lm, CONTRAST)
    assert nothing.interventions == ()
    assert torch.equal(lm.logits(PROMPTS, steering=nothing), lm.logits(PROMPTS))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_heads_of_any_width_and_grouping(name: str) -> None:
    """Units of the projection's input, not of the model: 4 heads of 16 for 48 or 64."""
    lm = _lm(name)
    assert lm.anatomy.config.num_key_value_heads == 2
    steering = tt.ITI(k=4 * lm.anatomy.layers).fit(lm, CONTRAST)
    assert {i.operator.width for i in steering.interventions} == {64}
    assert {len(vector) for vector in _vectors(steering).values()} == {16}
    assert set(_ranked(steering)) == {(i, j) for i in range(lm.anatomy.layers) for j in range(4)}


# -- what is recorded, and what bad input gets -------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    method = tt.ITI(k=3, alpha=-4, direction="probe", scale=False, held_out=0.3, seed=5)
    made = replace(method, positions="last").fit(_lm(), CONTRAST)
    loaded = tt.Steering.load(made.save(tmp_path / "a.safetensors"))
    for steering in (made, loaded):
        assert steering.method == "iti"
        assert steering.hyperparameters == {
            "k": 3,
            "alpha": -4,
            "direction": "probe",
            "scale": False,
            "held_out": 0.3,
            "seed": 5,
            "locate": "accuracy",
            "positions": "last",
        }
        assert steering.dial == tt.Dial("alpha", -4, (-50.0, 50.0))
        assert list(map(str, steering.scopes)) == ["last"]
        assert steering.contrast == {"name": "mine", "digest": CONTRAST.digest, "rows": 20}
    assert loaded.tables.keys() == {"layer", "head", "accuracy", "sigma"}
    assert all(torch.equal(loaded.tables[name], made.tables[name]) for name in made.tables)
    assert _vectors(loaded).keys() == _vectors(made).keys()
    assert all(torch.equal(v, _vectors(made)[place]) for place, v in _vectors(loaded).items())


def test_only_train_rows_are_read() -> None:
    rows = tuple(
        replace(row, part="train" if number % 2 else "test")
        for number, row in enumerate(CONTRAST.pairs)
    )
    some = tt.ITI(k=12).fit(_lm(), Contrast(rows))
    alone = tt.ITI(k=12).fit(_lm(), Contrast.from_pairs(PAIRS[1::2]))
    assert _ranked(some) == _ranked(alone)
    assert all(torch.equal(v, _vectors(alone)[place]) for place, v in _vectors(some).items())


def test_the_fewest_rows() -> None:
    """Of two pairs one is held out, whatever share was asked for."""
    two = Contrast.from_pairs(PAIRS[:2])
    for held_out in (0.01, 0.5, 0.99):
        assert len(_vectors(tt.ITI(k=3, held_out=held_out).fit(_lm(), two))) == 3
    texts = Contrast.from_texts(["Yes.", "It is true"], ["No.", "It is false", "Bad"])
    assert len(_vectors(tt.ITI(k=3).fit(_lm(), texts))) == 3


def _made(**options: Any) -> Callable[[], Any]:
    return lambda: tt.ITI(**options)


def _fit(contrast: Contrast = CONTRAST, **options: Any) -> Callable[[], Any]:
    return lambda: tt.ITI(**{"k": 2, **options}).fit(_lm(), contrast)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "direction": (_made(direction="pca"), "iti: direction is 'pca': known are mean, probe"),
    "positions": (_made(positions="first"), "iti: positions is 'first': .*known are all"),
    "alpha": (_made(alpha=float("nan")), "iti: alpha must be a finite number"),
    "k": (_made(k=-1), "iti: k must be 0 or more, not -1"),
    "k with a point": (_made(k=1.5), "iti: k must be 0 or more, not 1.5"),
    "held_out": (_made(held_out=0), "held_out must lie between 0 and 1, not 0"),
    "held_out 1": (_made(held_out=1.0), "held_out must lie between 0 and 1, not 1"),
    "held_out nan": (_made(held_out=float("nan")), "held_out must lie between 0 and 1"),
    "seed": (_made(seed=-1), "seed must be 0 or more, not -1"),
    "more heads than there are": (_fit(k=13), "k is 13, but llama has 12 heads"),
    "default k": (lambda: tt.ITI().fit(_lm(), CONTRAST), "k is 48, but llama has 12 heads"),
    "one pair": (_fit(Contrast.from_pairs(PAIRS[:1])), "1 rows are too few .* 2 or more pairs"),
    "one text of a side": (
        _fit(Contrast.from_texts(["Yes.", "It is true"], ["No."])),
        "1 rows are too few .* of each side",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    refused_in_one_line(*BAD[name])
