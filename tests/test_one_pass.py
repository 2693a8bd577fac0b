"""One pass over a contrast: nothing is run in vain, many methods share it, and the model and the
memory are left as they were."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import trimtab as tt
from activation_loop import (
    PAIRS,
    Counting,
    batches_of,
    counted,
    fresh_counting,
    hooks_on,
    rows_run,
    sites_of,
    wrapped,
)
from helpers import asked
from tiny import TINY
from trimtab.contrasts import Contrast
from trimtab.fitting.activations import Want, collect
from trimtab.fitting.statistics import Means, Sides, SignCounts
from trimtab.reading.packing import batches, encode_contrast
from trimtab.steering.operators import to_tensors

__all__ = ["fresh_counting"]  # fixtures, which pytest finds by their names here

# -- nothing is run in vain -------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_only_what_is_wanted_is_run(name: str) -> None:
    language_model = asked(wrapped(name))
    model, anatomy = language_model.model, language_model.anatomy
    gpt2 = name == "gpt2"
    body = model.transformer if gpt2 else model.model
    blocks = list(body.h if gpt2 else body.layers)
    modules = {f"block {i}": block for i, block in enumerate(blocks)}
    modules |= {"body": body, "head": model.lm_head, "norm": body.ln_f if gpt2 else body.norm}
    modules |= {"ffn 1": blocks[1].mlp}
    contrast, top = Contrast.from_pairs(PAIRS), len(blocks) - 1

    def run(*sites: str) -> Counter[str]:
        with counted(modules) as counts:
            collect(language_model, contrast, [Want(site, "last", Means) for site in sites])
        assert counts["head"] == 0
        return counts

    rows = len(list(batches(encode_contrast(language_model, contrast, None))))
    counts = run("layers.1.heads", "layers.0.resid")
    # Once over the contrast: a row per pair, not per text, and all sites in one pass.
    assert counts == {"body": rows, "block 0": rows, "block 1": rows}
    counts = run("layers.0.ffn_out", "layers.1.resid")
    assert counts == {"body": rows, "block 0": rows, "block 1": rows, "ffn 1": rows}
    counts = run("embed")  # which is read before the first block, or anybody's hook on it, runs
    assert counts == {"body": rows}
    counts = run(*anatomy.sites("resid"))
    assert counts[f"block {top}"] == rows
    assert counts["norm"] == 0
    assert run("final_norm", "embed")["norm"] == rows


def test_equal_wants_are_served_once() -> None:
    language_model = wrapped("llama")
    wants = [
        Want("layers.1.resid", "last", Counting),
        Want("layers.0.heads", "last", Counting),
        Want("layers.1.resid", "last", Counting),
        Want("layers.1.resid", "mean", Counting),
    ] * 2
    statistics = collect(language_model, Contrast.from_pairs(PAIRS), wants)
    assert len(statistics) == 3
    assert {found.texts for found in statistics.values()} == {len(PAIRS)}


def test_nothing_wanted_nothing_run() -> None:
    language_model = wrapped("llama")
    with counted({"body": language_model.model.model}) as counts:
        assert collect(language_model, Contrast.from_pairs(PAIRS), []) == {}
    assert not counts


# -- many methods, one pass -------------------------------------------------------------------

MANY = (
    tt.ActAdd(layer=1),
    tt.CAA(layer=(0, 2), token="last"),
    tt.CAA(layer=1, variant="pca", token="last"),
    tt.ITI(k=3),
    tt.SADI(k=3),
    tt.SAS(),
    tt.AAS(candidates="output"),
    tt.SS(whole_blocks=False),
    tt.Ablation(layer=1, tokens=(-2,)),
    tt.AUSteer(k=5, site="ffn_out", direction="paper"),
)
NEED_PAIRS = (2, 9)


def _tensors(steering: tt.Steering) -> dict[str, Tensor]:
    """All that a steering consists of, by name."""
    found = {f"table {name}": table for name, table in steering.tables.items()}
    for intervention in steering.interventions:
        for name, tensor in to_tensors(intervention.operator)[0].items():
            found[f"{intervention.site} {name}"] = tensor
    return found


def _check_same(one: tt.Steering, two: tt.Steering, tolerance: float = 0.0) -> None:
    assert one.method == two.method
    assert one.dial == two.dial
    assert one.findings == two.findings
    tensors, others = _tensors(one), _tensors(two)
    assert list(tensors) == list(others)
    assert tensors
    for name, tensor in tensors.items():
        assert tensor.shape == others[name].shape
        assert (tensor - others[name]).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_many_methods_in_one_pass(name: str, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Probes of a few steps are enough to see whether they are the same.
    short = lambda **_: LogisticRegression(tol=0.1)  # noqa: E731
    monkeypatch.setattr("sklearn.linear_model.LogisticRegression", short)
    language_model = asked(wrapped(name))
    contrast = Contrast.from_pairs(PAIRS)
    methods = list(MANY)
    if not paired:
        contrast = Contrast.from_texts(
            [prompt + " " + text for prompt, text, _ in PAIRS if isinstance(prompt, str)],
            [prompt + " " + text for prompt, _, text in PAIRS[:9] if isinstance(prompt, str)],
        )
        methods = [method for i, method in enumerate(MANY) if i not in NEED_PAIRS]
    with batches_of(monkeypatch, 200):
        with rows_run(language_model) as rows:
            together = tt.fit(methods, language_model, contrast)
        assert len(rows) == len(contrast)
        for method, steering in zip(methods, together, strict=True):
            with rows_run(language_model) as rows:
                alone = method.fit(language_model, contrast)
            # ActAdd alone runs its own rows only, whose padding is then another.
            first = isinstance(method, tt.ActAdd)
            assert len(rows) == ((1 if paired else 2) if first else len(contrast))
            _check_same(steering, alone, 1e-5 if first else 0.0)
    # No method's result is another's.
    assert len({steering.label for steering in together}) >= 7


def test_many_methods_of_nothing() -> None:
    language_model = wrapped("llama")
    with rows_run(language_model) as rows:
        assert tt.fit([], language_model, Contrast.from_pairs(PAIRS)) == []
    assert not rows


def test_one_method_twice() -> None:
    language_model = wrapped("llama")
    contrast = Contrast.from_pairs(PAIRS)
    weak, strong = tt.fit(
        [tt.CAA(alpha=1, token="last"), tt.CAA(alpha=2, token="last")], language_model, contrast
    )
    assert (weak.setting, strong.setting) == (1, 2)
    assert all(torch.equal(x, _tensors(strong)[name]) for name, x in _tensors(weak).items())


def test_a_cut_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = wrapped("llama")
    contrast = Contrast.from_pairs([(prompt, "yes", "no") for prompt, *_ in PAIRS])
    with (
        batches_of(monkeypatch, 60),
        rows_run(language_model) as rows,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        tt.fit(MANY[:3], language_model, contrast, max_length=12)
    assert max(map(len, rows)) <= 12 + 3  # the rest of the other side is in the same row
    (warning,) = caught
    assert warning.category is tt.TrimtabWarning
    assert "rows are longer than 12 tokens" in str(warning.message)


# -- left as it was ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_hooks_are_gone_after_an_exception(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = wrapped(name)
    contrast = Contrast.from_pairs(PAIRS)
    sites = sites_of(language_model, ["heads", "ffn_in", "ffn_out", "resid"])
    wants = [Want(site, "last", Counting) for site in sites]
    means = [Want(site, "last", Means) for site in sites]
    before = language_model.logits(["The answer is"])
    expected = collect(language_model, contrast, means)
    Counting.fail_at, Counting.error = 2, error
    with batches_of(monkeypatch, 200), pytest.raises(error, match="in the middle"):
        collect(language_model, contrast, [*means, *wants])
    assert hooks_on(language_model.model) == []
    assert torch.equal(language_model.logits(["The answer is"]), before)
    again = collect(language_model, contrast, means)
    assert all(torch.equal(again[want].difference, expected[want].difference) for want in means)
    assert hooks_on(language_model.model) == []


def test_no_gradients_and_no_change() -> None:
    language_model = wrapped("llama")
    before = {name: tensor.clone() for name, tensor in language_model.model.state_dict().items()}
    statistics = collect(
        language_model, Contrast.from_pairs(PAIRS), [Want("layers.1.resid", "mean", Means)]
    )
    after = language_model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    difference = statistics.of("layers.1.resid", "mean", Means).difference
    assert not difference.requires_grad
    # An ordinary tensor, that a user may go on to compute with.
    assert (difference.float() * torch.ones(48, requires_grad=True)).sum().requires_grad
    assert all(parameter.grad is None for parameter in language_model.model.parameters())


@dataclass
class _Scales:
    """How much memory tensors take while the statistics are gathered."""

    needs_pairs: ClassVar[bool] = True
    peaks: ClassVar[list[int]] = []

    def update(self, sides: Sides) -> None:
        alive = {id(x): x for x in gc.get_objects() if type(x) is Tensor}
        self.peaks.append(sum(x.numel() * x.element_size() for x in alive.values()))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = wrapped("llama")
    sites = sites_of(language_model, ["heads", "resid"])
    wants = [Want(s, "last", kind) for s in sites for kind in (SignCounts, Means)]
    wants += [Want(s, "mean", Means) for s in sites] + [Want("layers.2.resid", "last", _Scales)]

    def peak(texts: int) -> int:
        _Scales.peaks = []
        # All of one length, so that all batches are alike.
        pairs = [(f"{i:04d} is", " yes", " no") for i in range(texts)]
        gc.collect()
        with batches_of(monkeypatch, 100):
            statistics = collect(language_model, Contrast.from_pairs(pairs), wants)
        assert len(_Scales.peaks) > texts / 12
        for want, found in statistics.items():
            if want.statistic is SignCounts:
                assert found.larger.shape == found.smaller.shape == (found.larger.shape[-1],)
            elif want.statistic is Means:
                assert [total.dim() for total in found.sums] == [1, 1]
        return max(_Scales.peaks)

    # 300 texts more at one site would be 300 * 48 floats.
    assert peak(320) - peak(20) < 300 * 48


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    language_model = wrapped("llama")
    collect(language_model, Contrast.from_pairs(PAIRS), [Want("layers.0.resid", "last", Means)])
    assert capsys.readouterr() == ("", "")
