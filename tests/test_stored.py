"""A pass kept on disk: equal to one that is not, and only what is missing is run.

What the model is run for is counted at its body, so that no result can come from a second look.
"""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model, steer_at
from stored_passes import (
    PAIRS,
    SITES,
    UNIT,
    Run,
    check_equal,
    check_same,
    contrast_of,
    small_batches,
    some_wants,
    tensors,
    watched,
)
from trimtab.fitting.activations import Statistics, Want, collect
from trimtab.fitting.statistics import Means, SecondMoment, SignCounts

__all__ = ["small_batches"]  # fixtures, which pytest finds by their names here


def _rooms(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} if cache.exists() else set()


# -- with a cache as without ------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_equal_to_a_pass_that_is_not_kept(name: str, paired: bool, tmp_path: Path) -> None:
    lm, contrast, wants = language_model(name), contrast_of(paired), some_wants(paired)
    plain = collect(lm, contrast, wants)
    with watched(lm) as run:
        first = collect(lm, contrast, wants, cache=tmp_path / "a" / "b")
    assert run.rows == len(contrast)
    assert len(run.batches) > 3
    with watched(lm) as run:
        second = collect(lm, contrast, wants, cache=str(tmp_path / "a" / "b"))
    assert not run.modules
    check_equal(first, plain)
    check_equal(second, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    lm, contrast, wants = language_model("llama", dtype=dtype), contrast_of(), some_wants()
    plain = collect(lm, contrast, wants)
    for _ in range(2):
        check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)


def test_methods_with_a_cache(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), contrast_of()
    methods = [
        tt.ActAdd(layer=1, pairs=3),
        tt.CAA(layer=1, variant="pca", token="last"),
        tt.SADI(k=3),
        tt.SAS(),
        tt.AUSteer(k=4, site="ffn_out", direction="paper"),
    ]
    plain = tt.fit(methods, lm, contrast)
    check_same(tt.fit(methods, lm, contrast, cache=tmp_path), plain)
    with watched(lm) as run:
        check_same(tt.fit(methods, lm, contrast, cache=tmp_path), plain)
        check_same([methods[1].fit(lm, contrast, cache=tmp_path)], [plain[1]])
    assert not run.modules


def test_no_cache_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    collect(language_model("llama"), contrast_of(), some_wants())
    assert not list(tmp_path.iterdir())


# -- only what is missing is run --------------------------------------------------------------


def test_other_sites_and_tokens_of_the_same_pass(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), contrast_of()
    low, high = Want("layers.0.resid", "last", Means), Want("layers.2.resid", "last", Means)
    middle = Want("layers.1.ffn_out", "last", SignCounts)
    collect(lm, contrast, [high], cache=tmp_path)

    def run_for(*wants: Want) -> Run:
        plain = collect(lm, contrast, wants)
        with watched(lm) as run:
            check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)
        return run

    # The site above is there: nothing beyond the missing one is run for it.
    run = run_for(low, high)
    assert run.rows == len(contrast)
    assert run.modules["model.layers.0"] == len(run.batches)
    assert run.modules["model.layers.1"] == 0
    run = run_for(low, middle, high)
    assert run.rows == len(contrast)
    assert run.modules["model.layers.1.mlp"] == len(run.batches)
    assert run.modules["model.layers.2"] == 0
    assert run_for(low, middle, high).rows == 0
    # Another statistic of what is there needs no pass; another token or form of it does.
    assert run_for(Want("layers.2.resid", -1, SecondMoment)).rows == 0
    for other in (
        Want("layers.2.resid", "mean", Means),
        Want("layers.2.resid", "answer", Means),
        Want("layers.2.resid", -2, Means),
        Want("layers.2.resid", "last", Means, read=UNIT),
    ):
        assert run_for(other).rows == len(contrast)
    assert len(_rooms(tmp_path)) == 1


def _a_weight_larger(lm: tt.LanguageModel) -> tt.LanguageModel:
    with torch.no_grad():
        weight = lm.model.get_parameter("model.layers.0.mlp.down_proj.weight")
        weight[5, 3] *= 1.5  # its sign stays
    return lm


def _two_weights_swapped(lm: tt.LanguageModel) -> tt.LanguageModel:
    with torch.no_grad():
        weight = lm.model.get_parameter("model.layers.0.mlp.down_proj.weight").view(-1)
        for first, second in ((10, 12), (21, 41)):
            kept = weight[first].clone()
            weight[first] = weight[second]
            weight[second] = kept
    return lm


OTHER_MODELS: dict[str, Callable[[], tt.LanguageModel]] = {
    "weights": lambda: language_model("llama", seed=1),
    "one weight": lambda: _a_weight_larger(language_model("llama")),
    "order of weights": lambda: _two_weights_swapped(language_model("llama")),
    "dtype": lambda: language_model("llama", dtype=torch.bfloat16),
    "configuration": lambda: language_model("llama", rms_norm_eps=0.1),
    "baked": lambda: _baked(language_model("llama")),
}


def _baked(lm: tt.LanguageModel) -> tt.LanguageModel:
    return tt.bake(lm, steer_at(lm, "heads", "Scale", layer=0))


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_another_model_has_a_room_of_its_own(what: str, tmp_path: Path) -> None:
    contrast, wants = contrast_of(), [Want(site, "last", Means) for site in SITES]
    collect(language_model("llama"), contrast, wants, cache=tmp_path)
    lm = OTHER_MODELS[what]()
    plain = collect(lm, contrast, wants)
    with watched(lm) as run:
        check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)
    assert run.rows == len(contrast)
    assert len(_rooms(tmp_path)) == 2
    # And the first one's is as it was.
    first = language_model("llama")
    with watched(first) as run:
        kept = collect(first, contrast, wants, cache=tmp_path)
    assert not run.modules
    check_equal(kept, collect(first, contrast, wants))


def test_one_bit_of_any_weight_counts(tmp_path: Path) -> None:
    """Also the last ones of tensors whose size is no multiple of anything."""
    lm = language_model("gpt2", n_inner=97)
    contrast, wants = contrast_of(), [Want("embed", "last", Means)]
    collect(lm, contrast, wants, cache=tmp_path)
    seen = _rooms(tmp_path)
    parameters = list(lm.model.named_parameters())
    odd = [(name, tensor) for name, tensor in parameters if tensor.numel() % 2]
    assert odd
    for name, tensor in parameters[::9] + odd[:1]:
        bits = tensor.detach().view(-1).view(torch.int32)
        bits[-1] ^= 1
        collect(lm, contrast, wants, cache=tmp_path)
        assert len(_rooms(tmp_path)) == len(seen) + 1, name
        bits[-1] ^= 1
        shutil.rmtree(tmp_path / next(iter(_rooms(tmp_path) - seen)))
    with watched(lm) as run:
        collect(lm, contrast, wants, cache=tmp_path)
    assert not run.modules


def test_names_do_not_matter(tmp_path: Path) -> None:
    """The same weights under another name, and the same texts, are the same pass."""
    contrast, wants = contrast_of(), [Want("layers.1.resid", "last", Means)]
    collect(language_model("llama"), contrast, wants, cache=tmp_path)
    lm = language_model("llama")
    renamed = tt.wrap(lm.model, lm.tokenizer, "another name")
    with watched(renamed) as run:
        collect(renamed, replace(contrast, name="another"), wants, cache=tmp_path)
    assert not run.modules


def _with_pair(number: int, pair: tuple[str, str, str]) -> tt.Contrast:
    return tt.Contrast.from_pairs([*PAIRS[:number], pair, *PAIRS[number + 1 :]])


OTHER_TEXTS: dict[str, tt.Contrast] = {
    "prompt": _with_pair(3, (PAIRS[3][0] + ",", *PAIRS[3][1:])),
    "positive": _with_pair(3, (PAIRS[3][0], " maybe.", PAIRS[3][2])),
    "negative": _with_pair(17, (*PAIRS[17][:2], " maybe.")),
    "one token": _with_pair(3, (*PAIRS[3][:2], " no?")),
    "sides": _with_pair(3, (PAIRS[3][0], PAIRS[3][2], PAIRS[3][1])),
    "order": tt.Contrast.from_pairs([PAIRS[1], PAIRS[0], *PAIRS[2:]]),
    "fewer": tt.Contrast.from_pairs(PAIRS[:-1]),
    "answer": _with_pair(0, (PAIRS[0][0] + " yes", ", it is.", "!")),
}


@pytest.mark.parametrize("what", OTHER_TEXTS)
def test_other_texts_have_a_room_of_their_own(what: str, tmp_path: Path) -> None:
    lm = language_model("llama")
    wants = [Want("layers.1.resid", token, Means) for token in ("last", "answer")]
    collect(lm, contrast_of(), wants, cache=tmp_path)
    plain = collect(lm, OTHER_TEXTS[what], wants)
    with watched(lm) as run:
        check_equal(collect(lm, OTHER_TEXTS[what], wants, cache=tmp_path), plain)
    assert run.rows == len(OTHER_TEXTS[what])
    assert len(_rooms(tmp_path)) == 2


def test_only_where_the_answer_begins_is_different(tmp_path: Path) -> None:
    """The same tokens on both sides; the mean over the answer still is another."""
    lm = language_model("llama")
    wants = [Want("layers.1.resid", "answer", Means)]
    for pair in (("The answer", " is yes", " is no"), ("The answer is", " yes", " no")):
        contrast = tt.Contrast.from_pairs([pair])
        plain = collect(lm, contrast, wants)
        check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)
    assert len(_rooms(tmp_path)) == 2


def test_only_where_a_side_ends_is_different(tmp_path: Path) -> None:
    """One after the other, the two sides are the same tokens."""
    lm = language_model("llama")
    wants = [Want("layers.1.resid", "last", Means)]
    for pair in (("The answer is", " yes no", " it"), ("The answer is", " yes", " no it")):
        contrast = tt.Contrast.from_pairs([pair])
        plain = collect(lm, contrast, wants)
        check_equal(collect(lm, contrast, wants, cache=tmp_path), plain)
    assert len(_rooms(tmp_path)) == 2


def test_a_cut_has_a_room_of_its_own(tmp_path: Path) -> None:
    lm, contrast, wants = language_model("llama"), contrast_of(), [Want("embed", "mean", Means)]
    collect(lm, contrast, wants, cache=tmp_path)
    for limit, rows in ((20, len(contrast)), (21, len(contrast)), (20, 0), (10**6, 0)):
        with watched(lm) as run:
            if limit < 100:
                with pytest.warns(tt.TrimtabWarning, match="were cut"):
                    found = collect(lm, contrast, wants, cache=tmp_path, max_length=limit)
                with pytest.warns(tt.TrimtabWarning, match="were cut"):
                    plain = collect(lm, contrast, wants, max_length=limit)
            else:
                found = collect(lm, contrast, wants, cache=tmp_path, max_length=limit)
                plain = collect(lm, contrast, wants)
        assert run.rows == rows + len(contrast)  # the second one has no cache
        check_equal(found, plain)


def test_two_forms_of_one_width(tmp_path: Path) -> None:
    """Each has its name, and so its files."""
    lm, contrast = language_model("llama"), contrast_of()

    class Form(namedtuple("Form", ["name", "by"])):
        width = 24

        def __call__(self, activation: Tensor) -> Tensor:
            return activation[..., :24] * self.by

    wants = [
        Want("layers.0.resid", "last", Means, read=Form(f"by{by}", by)) for by in (2.0, 3.0, 0.5)
    ]
    plain = collect(lm, contrast, wants)
    assert torch.allclose(plain[wants[0]].difference * 1.5, plain[wants[1]].difference)
    for rows in (len(contrast), 0):
        for want in wants:
            with watched(lm) as run:
                found = collect(lm, contrast, [want], cache=tmp_path)
            assert run.rows == rows
            check_equal(found, Statistics({want: plain[want]}))


def test_some_rows_and_then_all(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), contrast_of()
    few, whole = tt.ActAdd(layer=1, pairs=2), tt.CAA(layer=1, token="mean")
    plain = tt.fit([few], lm, contrast), tt.fit([whole], lm, contrast)
    with watched(lm) as run:
        check_same(tt.fit([few], lm, contrast, cache=tmp_path), plain[0])
    assert run.rows == 2
    with watched(lm) as run:
        check_same(tt.fit([few], lm, contrast, cache=tmp_path), plain[0])
    assert run.rows == 0
    # Both rows are beside others in a batch now, which has to run as a whole.
    with watched(lm) as run:
        check_same(tt.fit([whole], lm, contrast, cache=tmp_path), plain[1])
    assert run.rows == len(contrast)
    # Of all, any are there.
    with watched(lm) as run:
        tt.fit([few, tt.ActAdd(layer=1, pairs=7)], lm, contrast, cache=tmp_path)
    assert not run.modules
    other = tmp_path / "other"
    tt.fit([whole], lm, contrast, cache=other)
    with watched(lm) as run:
        tt.fit([few], lm, contrast, cache=other)
    assert not run.modules


def test_some_texts_of_each_side_and_then_all(tmp_path: Path) -> None:
    lm, contrast = language_model("gpt2"), contrast_of(paired=False)
    few = tt.ActAdd(layer=0, token="last")
    plain = tt.CAA(layer=0, token="last").fit(lm, contrast)
    with watched(lm) as run:
        few.fit(lm, contrast, cache=tmp_path)
    assert run.rows == 2
    check_same([tt.CAA(layer=0, token="last").fit(lm, contrast, cache=tmp_path)], [plain])


def test_a_steered_model_is_not_kept(tmp_path: Path) -> None:
    """Its weights say nothing of the steering, and the next pass would be served with it."""
    lm, contrast = language_model("llama"), contrast_of()
    cache = tmp_path / "cache"
    method = tt.CAA(layer=2, token="last")
    with lm.steered(steer_at(lm, "resid", layer=0)):
        with pytest.raises(tt.TrimtabError, match="is steered.*leave the cache out") as error:
            method.fit(lm, contrast, cache=cache)
        assert "\n" not in str(error.value)
        steered = method.fit(lm, contrast)
    assert not cache.exists()
    unsteered = method.fit(lm, contrast, cache=cache)
    assert not torch.equal(tensors(steered)[0], tensors(unsteered)[0])
