"""AcT: maps by their formula, one after the other as a loop of plain passes fits them, and what the
paper's properties say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, language_model, refused_in_one_line, relative
from trimtab.contrasts import Contrast
from trimtab.methods.act import line
from trimtab.steering import Shift

PAIRS = [
    ("Today I feel", " happy and light.", " sad."),
    ("The answer to the question is", " yes", " not known"),
    ("I think that this film was", " wonderful.", " boring and long."),
    ("She said that the day was", " good", " bad"),
    ("The captain stood at the wheel and", " sang.", " slept."),
]
CONTRAST = Contrast.from_pairs(PAIRS)


def by_hand(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and shift of each unit, by a loop."""
    slopes, shifts = [], []
    for unit in range(a.shape[1]):
        x, y = np.sort(a[:, unit]), np.sort(b[:, unit])
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        slopes.append(slope)
        shifts.append(y.mean() - slope * x.mean())
    return np.array(slopes), np.array(shifts)


def draw(seed: int = 0, n: int = 12, units: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, units, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, 2 * b + 3


def test_the_line_is_that_of_a_loop() -> None:
    a, b = draw()
    slope, shift = line(a, b, False, False)
    expected = by_hand(a.numpy(), b.numpy())
    assert np.allclose(slope.numpy(), expected[0])
    assert np.allclose(shift.numpy(), expected[1])


def test_properties_of_the_line() -> None:
    a, b = draw()
    slope, shift = line(a, b, False, False)
    assert bool((slope >= 0).all())
    assert torch.allclose(slope * a.mean(0) + shift, b.mean(0))
    ratio = b.std(0, correction=0) / a.std(0, correction=0)
    assert bool((slope <= ratio + 1e-12).all())
    # The order of the texts does not matter, on either side.
    order = torch.randperm(12)
    for x, y in ((a[order], b), (a, b[order])):
        again = line(x, y, False, False)
        assert torch.allclose(again[0], slope)
        assert torch.allclose(again[1], shift)
    same = line(a, a[order], False, False)
    assert torch.allclose(same[0], torch.ones(7, dtype=torch.float64))
    assert torch.allclose(same[1], torch.zeros(7, dtype=torch.float64))
    # One affine map of both sides keeps the slope: k beta + s (1 - omega).
    moved = line(3 * a + 5, 3 * b + 5, False, False)
    assert torch.allclose(moved[0], slope)
    assert torch.allclose(moved[1], 3 * shift + 5 * (1 - slope))
    # A unit that is the same at every text is only shifted.
    a[:, 2] = 4.0
    constant = line(a, b, False, False)
    assert constant[0][2] == 1
    assert torch.isclose(constant[1][2], b[:, 2].mean() - 4)


def test_a_shift_is_of_all_texts_where_one_side_has_more() -> None:
    a, b = draw(n=5)[0], draw(1, n=12)[1]
    slope, shift = line(a, b, True, False)
    assert bool((slope == 1).all())
    assert torch.allclose(shift, b.mean(0) - a.mean(0))


def test_slopes_are_drawn_towards_one() -> None:
    a, b = draw(n=400)
    plain, drawn = line(a, b, False, False)[0], line(a, b, False, True)[0]
    assert bool(((drawn - 1).abs() <= (plain - 1).abs() + 1e-12).all())
    assert bool((drawn > 1.5).all()), "what is clear stays"
    noise = torch.randn(2, 400, 50, generator=torch.Generator().manual_seed(1)).double()
    alike = line(noise[0], noise[1], False, True)[0]
    assert float((alike == 1).double().mean()) > 0.5


def test_one_is_the_mean_difference_that_caa_adds() -> None:
    lm = language_model("llama")
    caa = tt.CAA(layer=1, token="mean").fit(lm, CONTRAST, measure=False)
    act = tt.AcT(site="resid", layer=1, slope="one").fit(lm, CONTRAST, measure=False)
    for dial in (0.5, 1.0, 1.7):
        found, expected = (lm.logits(PROMPTS, steering=one.at(dial)) for one in (act, caa))
        assert relative(found, expected) < 1e-5


@contextmanager
def hooks(functions: dict[Any, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in functions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_order_by_hand(
    lm: tt.LanguageModel, module: Callable[[int], Any], texts: Sequence[tuple[str, bool]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maps one after the other: a whole pass for each text and site, with those before it on."""
    maps: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in range(3):
        means: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for text, positive in texts:
            seen: list[Tensor] = []

            def see(m: Any, a: Any, x: Any, seen: list[Tensor] = seen) -> None:
                seen.append(x[0] if isinstance(x, tuple) else x)

            functions: dict[Any, Callable[..., Any]] = {module(layer): see}
            for before, (slope, shift) in enumerate(maps):

                def carry(m: Any, a: Any, x: Any, w: Any = slope, b: Any = shift) -> Any:
                    scale, more = torch.from_numpy(w).float(), torch.from_numpy(b).float()
                    if isinstance(x, tuple):
                        return (x[0] * scale + more, *x[1:])
                    return x * scale + more

                functions[module(before)] = carry
            ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
            with torch.no_grad(), hooks(functions):
                lm.model(ids, use_cache=False)
            means[positive].append(seen[0][0].double().mean(0).numpy())
        maps.append(by_hand(np.stack(means[False]), np.stack(means[True])))
    return maps


@pytest.mark.parametrize("site", ["attn_out", "ffn_out", "resid"])
def test_maps_that_see_those_before_them_are_those_of_plain_passes(site: Any) -> None:
    lm = language_model("llama")
    layers = lm.model.model.layers
    module = {
        "attn_out": lambda i: layers[i].self_attn.o_proj,
        "ffn_out": lambda i: layers[i].mlp,
        "resid": lambda i: layers[i],
    }[site]
    texts = [
        (prompt + side, toward)
        for prompt, *sides in PAIRS
        for side, toward in zip(sides, (True, False), strict=True)
    ]
    expected = in_order_by_hand(lm, module, texts)
    found = tt.AcT(site=site).fit(lm, CONTRAST, measure=False)
    at_once = tt.AcT(site=site, causal=False).fit(lm, CONTRAST, measure=False)
    for i, (slope, shift) in enumerate(expected):
        operator = found.interventions[i].operator
        assert isinstance(operator, Shift)
        assert relative(operator.slope, torch.from_numpy(slope)) < 1e-3
        assert relative(operator.shift, torch.from_numpy(shift)) < 1e-3
    first, last = (
        relative(found.interventions[i].operator.slope, at_once.interventions[i].operator.slope)  # type: ignore[attr-defined]
        for i in (0, 2)
    )
    assert first < 0.01 < last, "the first map sees none before it"


def test_what_is_inside_is_counted_and_the_rest_left_alone() -> None:
    lm = language_model("llama")
    steering = tt.AcT(site="ffn_out", layer=1, support=True).fit(lm, CONTRAST, measure=False)
    (one,) = steering.interventions
    operator = one.operator
    assert isinstance(operator, Shift)
    seen: list[Tensor] = []
    inside = total = 0
    for prompt, _, negative in PAIRS:
        ids = torch.tensor([lm.tokenizer(prompt + negative)["input_ids"]])
        with torch.no_grad(), hooks({lm.model.model.layers[1].mlp: lambda m, a, x: seen.append(x)}):
            lm.model(ids, use_cache=False)
        x = seen[-1][0]
        inside += int(((x > operator.low) & (x < operator.high)).sum())
        total += x.numel()
    assert steering.findings["inside"] == {one.site: pytest.approx(inside / total)}
    x = torch.cat([each[0] for each in seen])
    carried = operator.bind(1.0)(x)
    out = (x <= operator.low) | (x >= operator.high)
    assert torch.equal(carried[out], x[out])
    line_of_it = x * operator.slope + operator.shift
    assert torch.allclose(carried[~out], line_of_it[~out], atol=1e-5)


def test_unpaired_texts_of_different_numbers_and_mistakes() -> None:
    lm = language_model("llama")
    texts = Contrast.from_texts([p + a for p, a, _ in PAIRS], [p + b for p, _, b in PAIRS[:3]])
    for causal in (True, False):
        found = tt.AcT(site="ffn_out", causal=causal).fit(lm, texts, measure=False)
        assert len(found.interventions) == 3
    refused_in_one_line(lambda: tt.AcT(token="answer").fit(lm, texts), "for pairs")
    refused_in_one_line(lambda: tt.AcT(layer=9).fit(lm, texts), "layer")
    refused_in_one_line(lambda: tt.AcT(site="embed"), "site")  # type: ignore[arg-type]
