"""STA against plain hidden states and sums by hand.

What needs the library sae-lens is skipped where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trimtab as tt
from autoencoders import (
    CONTRAST,
    FEATURES,
    KINDS,
    PAIRS,
    autoencoder,
    library,
    tiny_lm,
    vector_of,
    with_weights,
)
from helpers import relative
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.methods.contents import describe, explain
from trimtab.reading.autoencoders import load_features

__all__ = ["autoencoder"]  # fixtures, which pytest finds by their names here

TEXTS = Contrast.from_texts([p + a for p, a, _ in PAIRS], [p + b for p, _, b in PAIRS][:4], "texts")


def _stream(name: str, ids: list[int], state: int) -> Tensor:
    """transformers' hidden state number `state` (0: the embedding), [tokens, units]."""
    model: Any = tiny_lm(name).model
    with torch.no_grad():
        states = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    hidden: Tensor = states.hidden_states[state][0]
    return hidden


def _read(sae: Any, name: str, state: int, token: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each side: features [texts, features] and stream [texts, units] of what stands for it."""
    found: list[Tensor] = []
    for side in (1, 2):
        features, streams = [], []
        for pair in PAIRS:
            start = len(tiny_tokenizer()(pair[0])["input_ids"])
            ids = tiny_tokenizer()(pair[0] + pair[side])["input_ids"]
            stream = _stream(name, ids, state)
            kept = {"answer": slice(start, None), "mean": slice(None), -2: slice(-2, -1)}.get(
                token, slice(-1, None)
            )
            with torch.no_grad():
                features.append(sae.encode(stream)[kept].double().mean(0))
            streams.append(stream[kept].double().mean(0))
        found += [torch.stack(features), torch.stack(streams)]
    return found[0], found[1], found[2], found[3]


def _kept_by_hand(amplitude: Sequence[float], frequency: Sequence[int], p: float) -> list[bool]:
    """The authors' rule: a frequency counts where signs agree, and both sizes reach the value at
    rank int(p n)."""
    rank = min(int(p * len(amplitude)), len(amplitude) - 1)
    features = list(zip(amplitude, frequency, strict=True))
    agree = [(a > 0) - (a < 0) == (f > 0) - (f < 0) for a, f in features]
    counted = [f if same else 0 for (_, f), same in zip(features, agree, strict=True)]
    cuts = [sorted(map(abs, sizes), reverse=True)[rank] for sizes in (amplitude, counted)]
    return [
        same and abs(a) >= cuts[0] and abs(f) >= cuts[1] and a != 0
        for (a, f), same in zip(features, agree, strict=True)
    ]


# -- the choice of features -------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-4, 4).map(lambda a: a / 4), st.integers(-5, 5)),
        min_size=1,
        max_size=25,
    ),
    st.floats(0.01, 1),
)
def test_which_features_are_kept(sizes: list[tuple[float, int]], p: float) -> None:
    amplitude, frequency = zip(*sizes, strict=True)
    method = tt.STA(sae="none", p=p)
    kept = method._kept(torch.tensor(amplitude).double(), torch.tensor(frequency))
    assert kept.tolist() == _kept_by_hand(amplitude, frequency, p)


def test_ties_at_the_cut_off_are_kept_and_a_cut_off_of_zero_keeps_all() -> None:
    def kept(amplitude: list[float], frequency: list[int], p: float) -> list[int]:
        method = tt.STA(sae="none", p=p)
        chosen = method._kept(torch.tensor(amplitude).double(), torch.tensor(frequency))
        return chosen.nonzero().flatten().tolist()

    # The value at rank int(0.5 * 4) = 2, counted from 0, is 2.0, and it is there twice.
    assert kept([3.0, 2.0, 2.0, 1.0], [9, 9, 9, 9], 0.5) == [0, 1, 2]
    assert kept([3.0, 2.5, 2.0, 1.0], [9, 9, 9, 9], 0.5) == [0, 1, 2]
    # Few are not zero: the cut-off is 0, which all reach.
    assert kept([3.0, 0.0, 0.0, 0.0], [9, 0, 0, 0], 0.5) == [0]
    assert kept([3.0, -1.0, 0.5, 2.0], [9, 0, 0, 1], 0.5) == [0, 3]
    assert kept([3.0, -3.0, 3.0], [1, 1, -1], 1) == [0]  # signs must agree
    # A frequency whose sign is another takes no place among the largest.
    assert kept([1.0, 0.9, 0.8, -0.7], [2, -5, 1, -6], 0.5) == [0, 2]
    assert kept([5.0, 4.0, 3.0, 2.0, 1.0], [-9, -9, 1, 2, 3], 0.4) == [2]
    # None agrees: its cut-off is 0, and still there is none.
    assert kept([3.0, -2.0], [-1, 1], 0.5) == []


# -- the vector -------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["answer", -2, "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_vector_is_the_one_by_hand(
    autoencoder: Callable[..., Path], kind: str, token: Any
) -> None:
    path = autoencoder(kind)
    sae = library(path)
    positive, up, negative, down = _read(sae, "llama", 2, token)
    amplitude = positive.mean(0) - negative.mean(0)
    frequency = (positive > 0).sum(0) - (negative > 0).sum(0)
    kept = _kept_by_hand(amplitude.tolist(), frequency.tolist(), 0.35)
    assert 2 <= sum(kept) < FEATURES
    # What the library itself adds for a feature at activation 1.
    with torch.no_grad():
        origin = sae.decode(torch.zeros(FEATURES))
        rows = torch.stack([sae.decode(one) - origin for one in torch.eye(FEATURES)]).double()
    vector = sum(a * row for a, row, keep in zip(amplitude, rows, kept, strict=True) if keep)
    vector = vector * ((up.mean(0) - down.mean(0)).norm() / vector.norm())
    steering = tt.STA(sae=str(path), token=token).fit(tiny_lm(), CONTRAST)
    assert relative(vector_of(steering), vector) < 1e-4
    assert steering.interventions[0].site == "layers.1.resid"
    assert steering.findings["kept"] == sum(kept)
    assert steering.findings["features"] == FEATURES
    # The table: kept features, the one that moves the stream most first.
    table = steering.tables
    moves = amplitude.abs() * rows.norm(dim=-1)
    order = sorted((i for i in range(FEATURES) if kept[i]), key=lambda i: -float(moves[i]))
    assert table["feature"].tolist() == order
    assert table["amplitude"].tolist() == pytest.approx(amplitude[order].tolist(), rel=1e-3)
    assert table["frequency"].tolist() == frequency[order].tolist()


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "olmo2"])
def test_the_vector_on_other_architectures(autoencoder: Callable[..., Path], name: str) -> None:
    path = autoencoder("topk", width=tiny_lm(name).anatomy.hidden_size)
    sae = library(path)
    positive, up, negative, down = _read(sae, name, 2, "answer")
    amplitude = positive.mean(0) - negative.mean(0)
    frequency = (positive > 0).sum(0) - (negative > 0).sum(0)
    kept = torch.tensor(_kept_by_hand(amplitude.tolist(), frequency.tolist(), 0.2))
    vector = (amplitude * kept) @ sae.W_dec.detach().double()
    vector = vector * ((up.mean(0) - down.mean(0)).norm() / vector.norm())
    steering = tt.STA(sae=str(path), p=0.2).fit(tiny_lm(name), CONTRAST)
    assert relative(vector_of(steering), vector) < 1e-3


def test_it_is_as_long_as_the_vector_of_caa(autoencoder: Callable[..., Path]) -> None:
    sta, caa = tt.fit(
        [tt.STA(sae=str(autoencoder()), token="last"), tt.CAA(layer=1, token="last")],
        tiny_lm(),
        CONTRAST,
    )
    assert sta.interventions[0].site == caa.interventions[0].site
    assert float(vector_of(sta).norm()) == pytest.approx(float(vector_of(caa).norm()), rel=1e-5)


def test_the_stream_before_a_block_is_the_one_after_the_block_before(
    autoencoder: Callable[..., Path],
) -> None:
    after = tt.STA(sae=str(autoencoder(hook="blocks.1.hook_resid_post"))).fit(tiny_lm(), CONTRAST)
    before = tt.STA(sae=str(autoencoder(hook="blocks.2.hook_resid_pre"))).fit(tiny_lm(), CONTRAST)
    assert before.interventions[0].site == after.interventions[0].site == "layers.1.resid"
    assert torch.equal(vector_of(before), vector_of(after))
    first = tt.STA(sae=str(autoencoder(hook="blocks.0.hook_resid_pre"))).fit(tiny_lm(), CONTRAST)
    assert first.interventions[0].site == "embed"


def test_unpaired_texts(autoencoder: Callable[..., Path]) -> None:
    path = autoencoder()
    steering = tt.STA(sae=str(path), token="mean").fit(tiny_lm(), TEXTS)
    sae = library(path)
    positive, _, negative, _ = _read(sae, "llama", 2, "mean")
    amplitude = positive.mean(0) - negative[:4].mean(0)
    frequency = (positive > 0).sum(0) - (negative[:4] > 0).sum(0)
    kept = _kept_by_hand(amplitude.tolist(), frequency.tolist(), 0.35)
    assert sorted(steering.tables["feature"].tolist()) == [i for i in range(FEATURES) if kept[i]]
    with pytest.raises(tt.TrimtabError, match="unpaired"):
        tt.STA(sae=str(path)).fit(tiny_lm(), TEXTS)


def test_a_path_is_as_good_as_its_text(autoencoder: Callable[..., Path], tmp_path: Path) -> None:
    path: Any = autoencoder()
    steering = tt.STA(sae=path).fit(tiny_lm(), CONTRAST)
    read = tt.Steering.load(steering.save(tmp_path / "a.safetensors"))
    assert read.hyperparameters["sae"] == str(path)


def test_alpha_and_positions(autoencoder: Callable[..., Path]) -> None:
    path = str(autoencoder())
    steering = tt.STA(sae=path, alpha=2.5, positions="last").fit(tiny_lm(), CONTRAST)
    assert steering.dial == tt.Dial("alpha", 2.5, (-20.0, 20.0))
    assert str(steering.interventions[0].scope) == "last"
    assert torch.equal(vector_of(steering), vector_of(tt.STA(sae=path).fit(tiny_lm(), CONTRAST)))


def test_sides_that_do_not_differ_are_refused(autoencoder: Callable[..., Path]) -> None:
    same = Contrast.from_texts([TEXTS.texts[0].text], [TEXTS.texts[0].text], "same")
    with pytest.raises(tt.TrimtabError, match="the two sides do not differ"):
        tt.STA(sae=str(autoencoder()), token="mean").fit(tiny_lm(), same)


def test_dead_features_change_nothing(autoencoder: Callable[..., Path]) -> None:
    """A feature whose decoder row is zero, where activations are measured along unit rows."""
    path = autoencoder("topk_raw")
    with_weights(path, lambda weights: weights["W_dec"][:30].zero_())
    features = load_features(str(path))
    assert torch.isfinite(features.decoder).all()
    assert not features.decoder[:30].any()
    steering = tt.STA(sae=str(path), p=1).fit(tiny_lm(), CONTRAST)
    assert torch.isfinite(vector_of(steering)).all()
    assert min(steering.tables["feature"].tolist()) >= 30


def test_features_that_add_up_to_nothing_are_refused(autoencoder: Callable[..., Path]) -> None:
    path = autoencoder()
    with_weights(path, lambda weights: weights["W_dec"].zero_())
    with pytest.raises(tt.TrimtabError, match="add up to nothing"):
        tt.STA(sae=str(path)).fit(tiny_lm(), CONTRAST)


# -- the artifact -----------------------------------------------------------------------------


def test_the_description_lists_the_features(
    autoencoder: Callable[..., Path], tmp_path: Path
) -> None:
    steering = tt.STA(sae=str(autoencoder())).fit(tiny_lm(), CONTRAST)
    read = tt.Steering.load(steering.save(tmp_path / "a.safetensors"))
    for one in (steering, read):
        features = describe(one)["features"]
        assert [row["feature"] for row in features] == steering.tables["feature"].tolist()
        assert set(features[0]) == {"feature", "amplitude", "frequency"}
        assert f"sum of {len(features)} of {FEATURES} features" in " ".join(explain(one))
    assert torch.equal(vector_of(read), vector_of(steering))


def test_two_autoencoders_in_one_pass(autoencoder: Callable[..., Path]) -> None:
    paths = [str(autoencoder(seed=1)), str(autoencoder("topk", seed=2))]
    methods = [tt.STA(sae=path) for path in paths]
    together = tt.fit(methods, tiny_lm(), CONTRAST)
    for method, steering in zip(methods, together, strict=True):
        assert torch.equal(vector_of(steering), vector_of(method.fit(tiny_lm(), CONTRAST)))
