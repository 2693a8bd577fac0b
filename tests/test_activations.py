"""Streaming statistics against a loop that runs one text at a time with hooks of its own."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from activation_loop import (
    PAIRS,
    TALK,
    Counting,
    batches_of,
    counted,
    fresh_counting,
    hooks_on,
    rows_run,
    sites_of,
    wrapped,
)
from helpers import relative
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.fitting.activations import Statistics, UnitLength, Want, collect
from trimtab.fitting.statistics import Active, Means, Samples, SignCounts
from trimtab.reading.packing import batches, encode_contrast

__all__ = ["fresh_counting"]  # fixtures, which pytest finds by their names here

TOKENS = ("last", "mean", "answer")

#: Kind of site -> path of a module in a block, and whether its input or its output is the site.
LLAMA = {
    "heads": ("self_attn.o_proj", "input"),
    "ffn_in": ("mlp.down_proj", "input"),
    "ffn_out": ("mlp", "output"),
    "resid": ("", "output"),
}
GPT2 = {
    "heads": ("attn.c_proj", "input"),
    "ffn_in": ("mlp.c_proj", "input"),
    "ffn_out": ("mlp", "output"),
    "resid": ("", "output"),
}


# -- the loop, without trimtab ----------------------------------------------------------------


def _tokens(tokenizer: Any, prompt: Any, answer: str) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt + answer).input_ids
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + answer, add_special_tokens=False).input_ids


def _one_by_one(
    model: Any, tokenizer: Any, texts: Iterable[tuple[Any, str]], sites: Iterable[str]
) -> dict[tuple[str, str], Tensor]:
    """(site, token) -> what stands for each text in float64, [texts, units]."""
    names, blocks = (
        (GPT2, "transformer.h") if model.config.model_type == "gpt2" else (LLAMA, "model.layers")
    )
    seen: dict[str, Tensor] = {}
    handles = []
    for site in sites:
        _, layer, kind = site.split(".")
        path, side = names[kind]
        module = model.get_submodule(f"{blocks}.{layer}{'.' if path else ''}{path}")
        if side == "input":
            hook = lambda m, args, site=site: seen.update({site: args[0][0]})  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            hook = lambda m, args, out, site=site: seen.update({site: out[0]})  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    rows: dict[tuple[str, str], list[Tensor]] = {}
    for prompt, answer in texts:
        tokens = _tokens(tokenizer, prompt, answer)
        start = 0
        for a, b in zip(_tokens(tokenizer, prompt, ""), tokens, strict=False):
            if a != b:
                break
            start += 1
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1)
        for site, x in seen.items():
            x = x.double()
            rows.setdefault((site, "last"), []).append(x[-1])
            rows.setdefault((site, "mean"), []).append(x.mean(0))
            # Without an answer, what stands for it is where it would begin: the last token.
            rows.setdefault((site, "answer"), []).append(x[min(start, len(x) - 1) :].mean(0))
    for handle in handles:
        handle.remove()
    return {key: torch.stack(found) for key, found in rows.items()}


def _close_calls(positive: Tensor, negative: Tensor) -> Tensor:
    """How many pairs of each unit are too near to a tie to call in float32: [units]."""
    scale = torch.cat([positive, negative]).abs().amax(0)
    return ((positive - negative).abs() < 1e-5 * scale).sum(0)


def _check_counts(found: SignCounts, positive: Tensor, negative: Tensor) -> int:
    """Compare sign counts with the loop's; returns how many calls were too close."""
    close = _close_calls(positive, negative)
    momentum = positive - negative
    assert found.pairs == len(momentum)
    assert ((found.larger - (momentum > 0).sum(0)).abs() <= close).all()
    assert ((found.smaller - (momentum < 0).sum(0)).abs() <= close).all()
    return int(close.sum())


def _check_means(found: Means, positive: Tensor, negative: Tensor, tolerance: float = 1e-5) -> None:
    for mean, texts in ((found.positive, positive), (found.negative, negative)):
        assert mean.dtype is torch.float64
        assert (mean - texts.mean(0)).abs().max() <= tolerance * texts.abs().max()
    assert torch.equal(found.difference, found.positive - found.negative)


# -- equal to the loop ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_equal_to_one_text_at_a_time(name: str) -> None:
    language_model = wrapped(name)
    kinds = ["heads", "ffn_out", "resid"] + (["ffn_in"] if name != "qwen3_moe" else [])
    sites = sites_of(language_model, kinds)
    wants = [
        Want(s, token, kind) for s in sites for token in TOKENS for kind in (SignCounts, Means)
    ]
    statistics = collect(language_model, Contrast.from_pairs(PAIRS), wants)
    assert set(statistics) == set(wants)
    by_hand = [
        _one_by_one(
            language_model.model, tiny_tokenizer(), [(pair[0], pair[side]) for pair in PAIRS], sites
        )
        for side in (1, 2)
    ]
    calls = close = 0
    for site in sites:
        for token in TOKENS:
            positive, negative = (side[site, token] for side in by_hand)
            _check_means(statistics.of(site, token, Means), positive, negative)
            counts = statistics.of(site, token, SignCounts)
            close += _check_counts(counts, positive, negative)
            calls += positive.numel()
    # Or the comparison would allow everything.
    assert close < 0.01 * calls


@pytest.mark.parametrize("name", TINY)
def test_means_of_texts_that_are_not_pairs(name: str) -> None:
    language_model = wrapped(name)
    sites = sites_of(language_model, ["heads", "resid"])
    positive = [PAIRS[i][0] + PAIRS[i][1] for i in (0, 1, 2, 3, 8)] + [TALK]
    negative = [PAIRS[i][0] + PAIRS[i][2] for i in (0, 5)]
    contrast = Contrast.from_texts(positive, negative)
    wants = [Want(site, token, Means) for site in sites for token in ("last", "mean")]
    statistics = collect(language_model, contrast, wants)
    by_hand = [
        _one_by_one(language_model.model, tiny_tokenizer(), [(text, "") for text in texts], sites)
        for texts in (positive, negative)
    ]
    for want in wants:
        key = (want.site, want.token)
        _check_means(statistics[want], by_hand[0][key], by_hand[1][key])
        assert statistics[want].counts == [6, 2]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bfloat16(name: str) -> None:
    language_model = wrapped(name, dtype=torch.bfloat16)
    wide = tiny_model(name)
    sites = sites_of(language_model, ["heads", "ffn_out"])
    wants = [
        Want(s, token, kind) for s in sites for token in TOKENS for kind in (SignCounts, Means)
    ]
    # A method is handed float32 whatever the model's dtype is, and checks that it is so.
    own = [Want(site, token, Counting) for site in sites for token in TOKENS]
    statistics = collect(language_model, Contrast.from_pairs(PAIRS), [*wants, *own])
    by_hand = [
        _one_by_one(wide, tiny_tokenizer(), [(pair[0], pair[side]) for pair in PAIRS], sites)
        for side in (1, 2)
    ]
    for want in wants:
        positive, negative = (side[want.site, want.token] for side in by_hand)
        if want.statistic is Means:
            _check_means(statistics[want], positive, negative, tolerance=0.05)
        else:
            # Signs of differences that bfloat16's 8 bits can tell.
            scale = torch.cat([positive, negative]).abs().max()
            unclear = ((positive - negative).abs() < 0.1 * scale).sum(0)
            expected = (positive > negative).sum(0)
            assert ((statistics[want].larger - expected).abs() <= unclear).all()


# Every kind of site needs a forward pass of its own only in the loop.
KINDS = ("heads", "ffn_out")


@pytest.fixture(scope="module", params=[("facts", 16), ("formality", 64)])
def real(
    smollm2: Any, request: pytest.FixtureRequest
) -> tuple[Contrast, list[dict[tuple[str, str], Tensor]], Statistics]:
    """Pairs on SmolLM2: the contrast, the loop's activations of each side, the statistics."""
    name, pairs = request.param
    contrast = Contrast.builtin(name).train.take(pairs)
    sites = sites_of(smollm2, KINDS)
    by_hand = [
        _one_by_one(smollm2.model, smollm2.tokenizer, texts, sites)
        for texts in (
            [(pair.prompt, pair.positive) for pair in contrast.pairs],
            [(pair.prompt, pair.negative) for pair in contrast.pairs],
        )
    ]
    statistics = collect(smollm2, contrast, [Want(site, "last", SignCounts) for site in sites])
    return contrast, by_hand, statistics


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_real_model(smollm2: Any, real: Any, kind: str) -> None:
    contrast, by_hand, statistics = real
    sites = sites_of(smollm2, [kind])
    close, scores = [], []
    for site in sites:
        positive, negative = (side[site, "last"] for side in by_hand)
        _check_counts(statistics.of(site, "last", SignCounts), positive, negative)
        close.append(_close_calls(positive, negative))
        momentum = positive - negative
        scores.append(torch.maximum((momentum > 0).sum(0), (momentum < 0).sum(0)))
    # Few of them are too close to call.
    assert sum(int(calls.sum()) for calls in close) < 0.01 * len(contrast) * 576 * 30
    by_rank = sorted(
        (-score, layer, unit)
        for layer, row in enumerate(scores)
        for unit, score in enumerate(row.tolist())
    )
    expected = [(layer, unit) for _, layer, unit in by_rank[:100]]
    method = tt.AUSteer(site=kind, k=100, direction="paper")
    tables = method.build(smollm2, contrast, statistics).tables
    found = list(zip(tables["layer"].tolist(), tables["unit"].tolist(), strict=True))
    # Units with a close call may stand elsewhere; without them the two rankings are one.
    clear = [[u for u in ranking if not close[u[0]][u[1]]] for ranking in (found, expected)]
    shared = min(map(len, clear))
    assert shared > 80
    assert clear[0][:shared] == clear[1][:shared]


# -- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_batches_and_order_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = wrapped(name)
    sites = sites_of(language_model, ["heads", "ffn_in", "resid"])
    wants = [
        Want(s, token, kind) for s in sites for token in TOKENS for kind in (SignCounts, Means)
    ]
    whole = collect(language_model, Contrast.from_pairs(PAIRS), wants)
    shuffled = random.Random(1).sample(PAIRS, len(PAIRS))
    for size in (1, 70, 400, 100_000):
        with batches_of(monkeypatch, size):
            other = collect(language_model, Contrast.from_pairs(shuffled), wants)
        changed = 0
        for want in wants:
            if want.statistic is Means:
                scale = whole[want].positive.abs().max()
                assert (whole[want].difference - other[want].difference).abs().max() < 1e-5 * scale
            else:
                assert whole[want].pairs == other[want].pairs == len(PAIRS)
                changed += int((whole[want].larger - other[want].larger).abs().sum())
        # Rounding may decide a pair that is all but equal; there are thousands of others.
        assert changed <= 20


# -- which token, which form, which rows ------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("paired", [True, False])
def test_tokens_from_the_end(name: str, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = wrapped(name)
    # Sides that share all but their ends, so that -2 may lie in what they share.
    pairs = [("She looked at the map", " now.", "."), ("It", " is right, I think", " is"), *PAIRS]
    pairs = [pair for pair in pairs if isinstance(pair[0], str)]
    texts = [[prompt + side[i] for prompt, *side in pairs] for i in (0, 1)]
    contrast = Contrast.from_pairs(pairs) if paired else Contrast.from_texts(*texts)
    sites = ["layers.0.resid", "layers.2.heads"]
    wants = [Want(site, token, Samples) for site in sites for token in (-1, -2, -3)]
    with batches_of(monkeypatch, 150):
        statistics = collect(language_model, contrast, wants)
    read = UnitLength()
    small = collect(language_model, contrast, [Want(sites[0], -2, Means, read=read)])
    by_hand = [_every_token(language_model.model, side, sites) for side in texts]
    for want in wants:
        found, labels, _ = statistics[want].texts()
        for side, positive in ((0, True), (1, False)):
            expected = torch.stack([x[want.token] for x in by_hand[side][want.site]])
            own = found[labels == positive]
            assert ((own - expected).abs().amax(-1) < 2e-3 * expected.abs().amax(-1)).all()
    unit = small.of(sites[0], -2, Means, read=read)
    for mean, side in ((unit.positive, by_hand[0]), (unit.negative, by_hand[1])):
        rows = [x[-2] / x[-2].norm() for x in side[sites[0]]]
        assert (mean - torch.stack(rows).mean(0)).abs().max() < 1e-6


def _every_token(model: Any, texts: Sequence[str], sites: Iterable[str]) -> dict[str, list[Tensor]]:
    """Each text's activations, [tokens, units] in float64, by a plain loop."""
    found: dict[str, list[Tensor]] = {}
    gpt2 = model.config.model_type == "gpt2"
    blocks = model.transformer.h if gpt2 else model.model.layers
    handles = []
    for site in sites:
        _, layer, kind = site.split(".")
        block = blocks[int(layer)]
        if kind == "resid":
            hook = lambda m, args, out, site=site: found.setdefault(site, []).append(  # noqa: E731
                out[0].double()
            )
            handles.append(block.register_forward_hook(hook))
        else:
            projection = block.attn.c_proj if gpt2 else block.self_attn.o_proj
            before = lambda m, args, site=site: found.setdefault(site, []).append(  # noqa: E731
                args[0][0].double()
            )
            handles.append(projection.register_forward_pre_hook(before))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tiny_tokenizer()(text).input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_last_is_the_first_from_the_end() -> None:
    language_model = wrapped("llama")
    contrast = Contrast.from_pairs(PAIRS)
    read = _Wide()
    last, first = (Want("layers.1.resid", token, Means, read=read) for token in ("last", -1))
    statistics = collect(language_model, contrast, [last, first])
    assert last.pick == first.pick
    assert statistics[last] is not statistics[first]
    assert torch.equal(statistics[last].difference, statistics[first].difference)
    assert read.calls == len(_batches(language_model, contrast, language_model.batch_tokens))


def test_a_form_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tokens however many averages want it, and of a single one; it may be wider than x."""
    language_model = wrapped("llama")
    contrast = Contrast.from_pairs(PAIRS)
    read = _Wide()
    site = "layers.1.resid"
    wants = [Want(site, token, kind, read=read) for token in TOKENS for kind in (Means, Active)]
    plain = [Want(site, token, Means) for token in TOKENS]
    with batches_of(monkeypatch, 200), rows_run(language_model) as rows:
        statistics = collect(language_model, contrast, [*wants, *plain])
        batch_count = read.calls
    assert len(rows) == len(contrast)
    batches = len(_batches(language_model, contrast, 200))
    assert batches > 1
    assert batch_count == 2 * batches  # "mean" and "answer" share one, "last" reads one token
    by_hand = [
        _one_by_one(
            language_model.model, tiny_tokenizer(), [(p[0], p[side]) for p in PAIRS], [site]
        )
        for side in (1, 2)
    ]
    for token in TOKENS:
        found = statistics.of(site, token, Means, read=read)
        assert found.positive.shape == (96,)
        # A linear map may be done before or after averaging tokens; this one is not linear.
        if token == "last":
            expected = [_Wide()(side[site, token]).mean(0) for side in by_hand]
            assert (found.positive - expected[0]).abs().max() < 1e-5
            assert (found.negative - expected[1]).abs().max() < 1e-5
            above = [(_Wide()(side[site, token]) > 0).sum(0) for side in by_hand]
            active = statistics.of(site, token, Active, read=read)
            assert (active.difference - (above[0] - above[1])).abs().sum() <= 2
        else:
            assert (found.positive >= 0).all()
            halves = found.positive[:48] - found.positive[48:]
            assert (halves - statistics.of(site, token, Means).positive).abs().max() < 1e-5


def _batches(language_model: Any, contrast: Contrast, size: int) -> list[Any]:
    return list(batches(encode_contrast(language_model, contrast, None), size))


class _Wide:
    """A form twice as wide as its site: what is above zero, then what is below."""

    name = "wide"
    width = 96

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, activation: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([activation.relu(), (-activation).relu()], dim=-1)


@pytest.mark.parametrize("paired", [True, False])
def test_some_rows_only(paired: bool) -> None:
    language_model = wrapped("llama")
    pairs = [pair for pair in PAIRS if isinstance(pair[0], str)]
    texts = [[prompt + side[i] for prompt, *side in pairs] for i in (0, 1)]
    contrast = Contrast.from_pairs(pairs) if paired else Contrast.from_texts(*texts)
    chosen = frozenset({1, 4, 2, len(contrast) - 1})
    other = frozenset({1, 0, len(contrast) - 2})
    smaller = Contrast(tuple(contrast.rows[i] for i in sorted(chosen)))
    site = "layers.1.resid"
    expected = collect(language_model, smaller, [Want(site, "last", Means)])
    some = Want(site, "last", Means, rows=chosen)
    others = Want(site, "last", Samples, rows=other)
    whole = Want(site, "last", Means)
    with rows_run(language_model) as rows:
        found = collect(language_model, contrast, [some, others])
    assert len(rows) == len(chosen | other)
    with rows_run(language_model) as rows:
        also = collect(language_model, contrast, [some, whole])
    assert len(rows) == len(contrast)
    for statistics in (found, also):
        mean, right = statistics[some], expected.of(site, "last", Means)
        assert mean.counts == right.counts
        assert relative(mean.difference, right.difference) < 1e-5
    assert set(found[others].texts()[2].tolist()) == other
    assert also[whole].counts == ([len(contrast)] * 2 if paired else [len(pairs)] * 2)
    assert not torch.equal(also[whole].difference, also[some].difference)


def test_a_text_too_short_for_its_token() -> None:
    language_model = wrapped("llama")
    # One side of the second pair is long enough.
    contrast = Contrast.from_pairs(
        [
            ("She looked at the map and", " where they were.", " asked."),
            ("A", " map and so on", "c"),
        ],
        name="mine",
    )
    want = Want("layers.0.resid", -4, Means)
    with (
        rows_run(language_model) as rows,
        pytest.raises(
            tt.TrimtabError, match="^mine, row 2: .* 3 tokens.* none at -4 from the end$"
        ),
    ):
        collect(language_model, contrast, [want])
    assert not rows  # the shortest rows come last, and nobody should wait for that
    # Where the row is not wanted it does not matter, even if it is run for something else.
    first = Want("layers.0.resid", -4, Means, rows=frozenset({0}))
    alone = collect(language_model, contrast, [first])
    both = collect(language_model, contrast, [first, Want("layers.0.resid", "last", Means)])
    assert alone[first].counts == [1, 1]
    assert relative(alone[first].difference, both[first].difference) < 1e-5
    # The one place that still is there.
    collect(language_model, contrast, [Want("layers.0.resid", -3, Means)])


# -- bad wants --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "kind", "way_out"),
    [
        ("last", SignCounts, "positive and negative"),
        ("answer", Means, "mean or last\\), or give it pairs"),
    ],
)
def test_pairs_are_needed(token: Any, kind: Any, way_out: str) -> None:
    language_model = wrapped("llama")
    contrast = Contrast.from_texts(["a"], ["b"], name="mine")
    with (
        counted({"body": language_model.model.model}) as counts,
        pytest.raises(tt.TrimtabError, match=f"^mine is unpaired.*{way_out}$"),
    ):
        collect(language_model, contrast, [Want("layers.0.resid", token, kind)])
    assert not counts


@pytest.mark.parametrize("site", ["layers.3.resid", "layers.0.mlp", "resid", "layers.-1.resid"])
def test_unknown_sites(site: str) -> None:
    language_model = wrapped("llama")
    with pytest.raises(tt.TrimtabError, match="unknown site|layers 0 to 2"):
        collect(language_model, Contrast.from_pairs(PAIRS), [Want(site, "last", Means)])
    assert hooks_on(language_model.model) == []
