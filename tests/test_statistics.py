"""Each statistic against its formula on whole matrices, and what `Samples` keeps in its file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model
from trimtab.contrasts import Contrast, Pair
from trimtab.fitting.activations import Want, collect
from trimtab.fitting.statistics import Active, Means, Samples, SecondMoment, Sides, SignCounts


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _sides(positive: Tensor, negative: Tensor, first: int = 0) -> Sides:
    """Rows of a paired contrast, or of an unpaired one, whose negatives then come last."""
    rows = torch.arange(first, first + len(positive))
    if len(positive) == len(negative):
        return Sides(positive, negative, rows, rows)
    return Sides(positive, negative, rows, torch.arange(len(negative)) + first + len(positive))


def _in_parts(positive: Tensor, negative: Tensor, size: int) -> Iterator[Sides]:
    for start in range(0, len(positive), size):
        stop = start + size
        yield _sides(positive[start:stop], negative[start:stop], start)


# -- by their formulas ------------------------------------------------------------------------


def test_equal_activations_count_for_neither() -> None:
    # Five from the end is a token of the first pair's prompt, which both of its sides share.
    pairs = (
        Pair("She said that it was not", " a", " b"),
        Pair("It is", " right at the end of the day", " wrong, and he left the house"),
    )
    contrast, want = Contrast(pairs), Want("layers.1.ffn_out", -5, SignCounts)
    counts = collect(language_model("llama"), contrast, [want])[want]
    assert counts.pairs == 2
    assert ((counts.larger + counts.smaller) == 1).all()
    r_pos, r_neg = counts.rates()
    assert r_pos.dtype is r_neg.dtype is torch.float64
    assert set(r_pos.tolist()) == set(r_neg.tolist()) == {0.0, 0.5}


def test_counts_and_means_by_hand() -> None:
    positive = torch.tensor([[1.0, 2.0, 0.0, -1.0], [1.0, -2.0, 0.0, -3.0], [1.0, 2.0, 0.0, 0.0]])
    negative = torch.tensor([[0.0, 3.0, 0.0, -2.0], [2.0, -3.0, 0.0, -4.0], [0.0, 2.0, -0.0, -9.0]])
    counts, means = SignCounts(), Means()
    for statistic in (counts, means):
        for sides in _in_parts(positive, negative, 2):
            statistic.update(sides)
    r_pos, r_neg = counts.rates()
    assert (3 * r_pos).tolist() == pytest.approx([2, 1, 0, 3])
    assert (3 * r_neg).tolist() == pytest.approx([1, 1, 0, 0])
    assert means.difference.tolist() == pytest.approx([1 / 3, 0, 0, 11 / 3])


def test_means_of_sides_of_different_size() -> None:
    positive, negative = _noise(7, 5), _noise(3, 5, seed=1)
    means = Means()
    means.update(_sides(positive[:6], negative[:1]))
    means.update(_sides(positive[6:], negative[:0]))  # a batch may have none of a side
    means.update(_sides(positive[:0], negative[1:]))
    assert means.counts == [7, 3]
    assert torch.allclose(means.positive, positive.double().mean(0), atol=1e-12)
    assert torch.allclose(means.negative, negative.double().mean(0), atol=1e-12)


def test_means_do_not_lose_small_parts() -> None:
    # Added up in float32, ones beside 2^25 would vanish.
    means = Means()
    means.update(_sides(torch.tensor([[2.0**25]]), torch.tensor([[0.0]])))
    for _ in range(7):
        means.update(_sides(torch.tensor([[1.0]]), torch.tensor([[1.0]])))
    assert means.positive.item() == (2**25 + 7) / 8
    assert means.negative.item() == 7 / 8


def test_second_moment_is_that_of_the_differences() -> None:
    positive, negative = _noise(9, 6) + 1, _noise(9, 6, seed=1)
    moment = SecondMoment()
    for sides in _in_parts(positive, negative, 4):
        moment.update(sides)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for p, n in zip(positive, negative, strict=True):
        expected += torch.outer((p - n).double(), (p - n).double())
    assert moment.sum.dtype is torch.float64
    assert torch.allclose(moment.sum, expected, rtol=0, atol=1e-12)


def test_second_moment_does_not_lose_small_parts() -> None:
    moment = SecondMoment()
    for value in (2.0**13, 1.0, 1.0, 1.0):
        moment.update(_sides(torch.tensor([[value]]), torch.tensor([[0.0]])))
    assert moment.sum.item() == 2**26 + 3


def test_active_counts_what_is_above_zero() -> None:
    positive = torch.tensor([[1.0, 0.0, -1.0, 2.0], [1.0, 0.0, 3.0, 2.0], [1e-30, -0.0, 3.0, 2.0]])
    negative = torch.tensor([[1.0, 1.0, 0.0, -2.0], [0.0, 1.0, 5.0, -2.0]])
    active = Active()
    active.update(_sides(positive[:1], negative))
    active.update(_sides(positive[1:], negative[:0]))
    assert [count.tolist() for count in active.counts] == [[3, 0, 2, 3], [1, 2, 1, 0]]
    assert active.difference.tolist() == [2, -2, 1, 3]
    assert not Active.needs_pairs


# -- samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-30, 70_000.0, 3e4, 32768.0, 1e9, 3e38, 2e-38])
def test_samples_keep_ten_bits_of_every_text(size: float) -> None:
    """Also beyond 65,504, where half precision ends, and far below its smallest number."""
    units = 2.0 ** -(torch.arange(30) % 20)  # some units are far smaller than others
    positive, negative = _noise(40, 30) * units, _noise(40, 30, seed=1) * units
    # The largest of each text is `size` times 2^-3 to 1, so that texts need scales of their own.
    sizes = size * 2.0 ** -(torch.arange(40) % 4)
    positive = positive / positive.abs().amax(-1, keepdim=True) * sizes[:, None]
    negative = negative / negative.abs().amax(-1, keepdim=True) * sizes.flip(0)[:, None]
    samples = Samples()
    for sides in _in_parts(positive, negative, 7):
        samples.update(sides)
    found, labels, _ = samples.texts()
    for kept, given in ((found[labels], positive), (found[~labels], negative)):
        error, given = (kept.double() - given.double()).abs(), given.double().abs()
        largest = given.amax(-1, keepdim=True)
        assert (error <= 2**-10 * torch.maximum(given, 2**-20 * largest)).all()


def test_a_text_of_zeros() -> None:
    samples = Samples()
    samples.update(_sides(torch.zeros(1, 4), torch.ones(1, 4)))
    found, labels, _ = samples.texts()
    assert found[labels].tolist() == [[0.0] * 4]
    assert found[~labels].tolist() == [[1.0] * 4]


@pytest.mark.parametrize("shuffled", [False, True])
def test_samples_of_pairs_in_the_order_of_rows(shuffled: bool) -> None:
    positive = torch.arange(6.0)[:, None] + torch.tensor([0.0, 100.0])
    negative = -positive - 1
    order = torch.tensor([4, 1, 5, 0, 2, 3]) if shuffled else torch.arange(6)
    samples = Samples()
    for rows in order.split(2):
        samples.update(Sides(positive[rows], negative[rows], rows, rows))
    found, labels, rows = samples.texts()
    assert rows.tolist() == [row for row in range(6) for _ in range(2)]
    assert labels.tolist() == [True, False] * 6
    assert torch.equal(found, torch.stack([positive, negative], dim=1).flatten(0, 1))
    # Asking again gives the same, and more may come after.
    assert torch.equal(samples.texts()[0], found)
    samples.update(_sides(torch.full((1, 2), 7.0), torch.full((1, 2), 8.0), first=6))
    assert samples.texts()[0][-2:].tolist() == [[7.0, 7.0], [8.0, 8.0]]


def test_samples_without_pairs() -> None:
    samples = Samples()
    one, two, none = torch.tensor([[1.0]]), torch.tensor([[2.0], [3.0]]), torch.zeros(0, 1)
    samples.update(Sides(two, none, torch.tensor([4, 0]), torch.tensor([], dtype=torch.long)))
    samples.update(Sides(none, one, torch.tensor([], dtype=torch.long), torch.tensor([2])))
    found, labels, rows = samples.texts()
    assert found.flatten().tolist() == [3.0, 1.0, 2.0]
    assert labels.tolist() == [True, False, True]
    assert rows.tolist() == [0, 2, 4]


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("batch", [1, 60, 100_000])
def test_samples_of_a_model(paired: bool, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run sorted by length; what comes out is in the contrast's order, each with its label."""
    monkeypatch.setattr(tt.LanguageModel, "batch_tokens", batch)
    lm = language_model("llama")
    texts = ["The sun", "She looked at the map and", "A day", "Rain came when we were out, and"]
    ends = (" was good and the day was long.", " is bad.")
    contrast: Contrast
    expected: list[tuple[str, bool, int]] = []
    if paired:
        contrast = Contrast.from_pairs([(text, *ends) for text in texts])
        for row, text in enumerate(texts):
            expected += [(text + ends[0], True, row), (text + ends[1], False, row)]
    else:
        contrast = Contrast.from_texts(texts[:3], [texts[3] + ends[0], texts[0] + ends[1]])
        contrast = Contrast((contrast.rows[4], *contrast.rows[:4]))  # a negative one comes first
        expected = [(row.text, row.label == "positive", i) for i, row in enumerate(contrast.texts)]
    want = Want("layers.1.heads", "last", Samples)
    found, labels, rows = collect(lm, contrast, [want])[want].texts()
    assert labels.tolist() == [label for _, label, _ in expected]
    assert rows.tolist() == [row for _, _, row in expected]
    for kept, (text, _, _) in zip(found, expected, strict=True):
        alone = _last_heads(lm, text)
        assert (kept - alone).abs().max() < 2**-10 * alone.abs().max()


def _last_heads(lm: Any, text: str) -> Tensor:
    seen: list[Tensor] = []
    projection = lm.model.model.layers[1].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    with torch.no_grad():
        lm.model(torch.tensor([lm.tokenizer(text).input_ids]), use_cache=False)
    handle.remove()
    return seen[0]
