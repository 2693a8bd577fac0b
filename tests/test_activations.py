"""Streaming statistics against a loop that runs one text at a time with hooks of its own."""

from __future__ import annotations

import gc
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import trimtab as tt
from helpers import relative
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.fitting.activations import Statistics, UnitLength, Want, collect
from trimtab.fitting.statistics import Active, Means, Samples, Sides, SignCounts
from trimtab.model.packing import batches
from trimtab.steering.operators import to_tensors

TALK = [{"role": "user", "content": "What is the best way to learn a language?"}]
PAIRS: list[tuple[Any, str, str]] = [
    ("She looked at the map and asked where they were going.", " He said: I do not know.", " No."),
    ("The answer is", " yes", " no"),
    ("Today I feel", " happy.", " happy. I love this film, it was wonderful."),
    ("What is the capital of France?", " It is Paris, as everybody knows.", " It is Paris"),
    ("Nothing more to say", "", ", and so nothing more was said."),
    ("When the rain ca", "me, the children ran into the house", "n be heard, the king is old"),
    (
        "",
        "Sure, I love this film.",
        "I hate this film, and the actors were bad and boring and old.",
    ),
    (TALK, "Read, write, listen and speak every day.", "I cannot help you with that request."),
    *(
        (f"There are {n} numbers here, and the {who} said that", " it is right.", " it is wrong!")
        for n in range(4)
        for who in ("king", "mother", "children")
    ),
]
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


def _language_model(name: str, **options: Any) -> tt.LanguageModel:
    return tt.wrap(tiny_model(name, **options), tiny_tokenizer(), name)


def _sites(language_model: Any, kinds: Sequence[str]) -> list[str]:
    return [site for kind in kinds for site in language_model.anatomy.sites(kind)]


@contextmanager
def _batch_tokens(monkeypatch: pytest.MonkeyPatch, size: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(tt.LanguageModel, "batch_tokens", size)
        yield


# -- equal to the loop ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_equal_to_one_text_at_a_time(name: str) -> None:
    language_model = _language_model(name)
    kinds = ["heads", "ffn_out", "resid"] + (["ffn_in"] if name != "qwen3_moe" else [])
    sites = _sites(language_model, kinds)
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
    language_model = _language_model(name)
    sites = _sites(language_model, ["heads", "resid"])
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
    language_model = _language_model(name, dtype=torch.bfloat16)
    wide = tiny_model(name)
    sites = _sites(language_model, ["heads", "ffn_out"])
    wants = [
        Want(s, token, kind) for s in sites for token in TOKENS for kind in (SignCounts, Means)
    ]
    # A method is handed float32 whatever the model's dtype is, and checks that it is so.
    own = [Want(site, token, _Counting) for site in sites for token in TOKENS]
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


@pytest.fixture(
    scope="module", params=[("facts", 16), pytest.param(("formality", 64), marks=pytest.mark.slow)]
)
def real(
    smollm2: Any, request: pytest.FixtureRequest
) -> tuple[Contrast, list[dict[tuple[str, str], Tensor]], Statistics]:
    """Pairs on SmolLM2: the contrast, the loop's activations of each side, the statistics."""
    name, pairs = request.param
    contrast = Contrast.builtin(name).train.take(pairs)
    sites = _sites(smollm2, KINDS)
    by_hand = [
        _one_by_one(smollm2.model, smollm2.tokenizer, texts, sites)
        for texts in (
            [(pair.prompt, pair.positive) for pair in contrast.pairs],
            [(pair.prompt, pair.negative) for pair in contrast.pairs],
        )
    ]
    statistics = collect(smollm2, contrast, [Want(site, "last", SignCounts) for site in sites])
    return contrast, by_hand, statistics


@pytest.mark.parametrize("kind", KINDS)
def test_real_model(smollm2: Any, real: Any, kind: str) -> None:
    contrast, by_hand, statistics = real
    sites = _sites(smollm2, [kind])
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
    method = tt.AUSteer(site=kind, k=100)
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
    language_model = _language_model(name)
    sites = _sites(language_model, ["heads", "ffn_in", "resid"])
    wants = [
        Want(s, token, kind) for s in sites for token in TOKENS for kind in (SignCounts, Means)
    ]
    whole = collect(language_model, Contrast.from_pairs(PAIRS), wants)
    shuffled = random.Random(1).sample(PAIRS, len(PAIRS))
    for size in (1, 70, 400, 100_000):
        with _batch_tokens(monkeypatch, size):
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


# -- nothing is run in vain -------------------------------------------------------------------


@contextmanager
def _counted(modules: dict[str, nn.Module]) -> Iterator[Counter[str]]:
    """How often each module begins a forward pass."""
    counts: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
        for name, module in modules.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", TINY)
def test_only_what_is_wanted_is_run(name: str) -> None:
    language_model = _language_model(name)
    model, anatomy = language_model.model, language_model.anatomy
    gpt2 = name == "gpt2"
    body = model.transformer if gpt2 else model.model
    blocks = list(body.h if gpt2 else body.layers)
    modules = {f"block {i}": block for i, block in enumerate(blocks)}
    modules |= {"body": body, "head": model.lm_head, "norm": body.ln_f if gpt2 else body.norm}
    modules |= {"ffn 1": blocks[1].mlp}
    contrast, top = Contrast.from_pairs(PAIRS), len(blocks) - 1

    def run(*sites: str) -> Counter[str]:
        with _counted(modules) as counts:
            collect(language_model, contrast, [Want(site, "last", Means) for site in sites])
        assert counts["head"] == 0
        return counts

    rows = len(list(batches(tt.packing.encode_contrast(language_model, contrast, None))))
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


@dataclass
class _Counting:
    """A statistic that counts what it is handed; `fail_at` is the update that raises."""

    needs_pairs: ClassVar[bool] = True
    fail_at: ClassVar[int | None] = None
    error: ClassVar[type[BaseException]] = RuntimeError
    updates: int = 0
    texts: int = 0

    def update(self, sides: Sides) -> None:
        assert sides.positive.shape == sides.negative.shape
        assert sides.positive.dtype is torch.float32
        self.updates += 1
        self.texts += len(sides.positive)
        if self.updates == self.fail_at:
            raise self.error("in the middle")


@pytest.fixture(autouse=True)
def _fresh_counting() -> None:
    _Counting.fail_at = None


def test_equal_wants_are_served_once() -> None:
    language_model = _language_model("llama")
    wants = [
        Want("layers.1.resid", "last", _Counting),
        Want("layers.0.heads", "last", _Counting),
        Want("layers.1.resid", "last", _Counting),
        Want("layers.1.resid", "mean", _Counting),
    ] * 2
    statistics = collect(language_model, Contrast.from_pairs(PAIRS), wants)
    assert len(statistics) == 3
    assert {found.texts for found in statistics.values()} == {len(PAIRS)}


def test_nothing_wanted_nothing_run() -> None:
    language_model = _language_model("llama")
    with _counted({"body": language_model.model.model}) as counts:
        assert collect(language_model, Contrast.from_pairs(PAIRS), []) == {}
    assert not counts


# -- many methods, one pass -------------------------------------------------------------------

MANY = (
    tt.ActAdd(layer=1),
    tt.CAA(layer=(0, 2)),
    tt.CAA(layer=1, variant="pca"),
    tt.ITI(k=3),
    tt.SADI(k=3),
    tt.SAS(),
    tt.AAS(candidates="output"),
    tt.SS(whole_blocks=False),
    tt.Ablation(layer=1, tokens=(-2,)),
    tt.AUSteer(k=5),
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


@contextmanager
def _rows_run(language_model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The tokens of each row that passes the model's body."""
    rows: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows.extend(map(tuple, kwargs["input_ids"].tolist()))

    body = language_model.anatomy.body
    handle = body.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_many_methods_in_one_pass(name: str, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Probes of a few steps are enough to see whether they are the same.
    short = lambda **_: LogisticRegression(tol=0.1)  # noqa: E731
    monkeypatch.setattr("trimtab.methods.iti.LogisticRegression", short)
    language_model = _language_model(name)
    contrast = Contrast.from_pairs(PAIRS)
    methods = list(MANY)
    if not paired:
        contrast = Contrast.from_texts(
            [prompt + " " + text for prompt, text, _ in PAIRS if isinstance(prompt, str)],
            [prompt + " " + text for prompt, _, text in PAIRS[:9] if isinstance(prompt, str)],
        )
        methods = [method for i, method in enumerate(MANY) if i not in NEED_PAIRS]
    with _batch_tokens(monkeypatch, 200):
        with _rows_run(language_model) as rows:
            together = tt.fit(methods, language_model, contrast)
        assert len(rows) == len(contrast)
        for method, steering in zip(methods, together, strict=True):
            with _rows_run(language_model) as rows:
                alone = method.fit(language_model, contrast)
            # ActAdd alone runs its own rows only, whose padding is then another.
            first = isinstance(method, tt.ActAdd)
            assert len(rows) == ((1 if paired else 2) if first else len(contrast))
            _check_same(steering, alone, 1e-5 if first else 0.0)
    # No method's result is another's.
    assert len({steering.label for steering in together}) >= 7


def test_many_methods_of_nothing() -> None:
    language_model = _language_model("llama")
    with _rows_run(language_model) as rows:
        assert tt.fit([], language_model, Contrast.from_pairs(PAIRS)) == []
    assert not rows


def test_one_method_twice() -> None:
    language_model = _language_model("llama")
    contrast = Contrast.from_pairs(PAIRS)
    weak, strong = tt.fit([tt.CAA(alpha=1), tt.CAA(alpha=2)], language_model, contrast)
    assert (weak.setting, strong.setting) == (1, 2)
    assert all(torch.equal(x, _tensors(strong)[name]) for name, x in _tensors(weak).items())


def test_a_cut_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = _language_model("llama")
    contrast = Contrast.from_pairs([(prompt, "yes", "no") for prompt, *_ in PAIRS])
    with (
        _batch_tokens(monkeypatch, 60),
        _rows_run(language_model) as rows,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        tt.fit(MANY[:3], language_model, contrast, max_length=12)
    assert max(map(len, rows)) <= 12 + 3  # the rest of the other side is in the same row
    (warning,) = caught
    assert warning.category is tt.TrimtabWarning
    assert "rows are longer than 12 tokens" in str(warning.message)


# -- which token, which form, which rows ------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("paired", [True, False])
def test_tokens_from_the_end(name: str, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = _language_model(name)
    # Sides that share all but their ends, so that -2 may lie in what they share.
    pairs = [("She looked at the map", " now.", "."), ("It", " is right, I think", " is"), *PAIRS]
    pairs = [pair for pair in pairs if isinstance(pair[0], str)]
    texts = [[prompt + side[i] for prompt, *side in pairs] for i in (0, 1)]
    contrast = Contrast.from_pairs(pairs) if paired else Contrast.from_texts(*texts)
    sites = ["layers.0.resid", "layers.2.heads"]
    wants = [Want(site, token, Samples) for site in sites for token in (-1, -2, -3)]
    with _batch_tokens(monkeypatch, 150):
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
    language_model = _language_model("llama")
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
    language_model = _language_model("llama")
    contrast = Contrast.from_pairs(PAIRS)
    read = _Wide()
    site = "layers.1.resid"
    wants = [Want(site, token, kind, read=read) for token in TOKENS for kind in (Means, Active)]
    plain = [Want(site, token, Means) for token in TOKENS]
    with _batch_tokens(monkeypatch, 200), _rows_run(language_model) as rows:
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
    return list(batches(tt.packing.encode_contrast(language_model, contrast, None), size))


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
    language_model = _language_model("llama")
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
    with _rows_run(language_model) as rows:
        found = collect(language_model, contrast, [some, others])
    assert len(rows) == len(chosen | other)
    with _rows_run(language_model) as rows:
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
    language_model = _language_model("llama")
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
        _rows_run(language_model) as rows,
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


# -- left as it was ---------------------------------------------------------------------------


def _hooks(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hook in (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *(["forward"] if "forward" in vars(module) else []),
        )
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_hooks_are_gone_after_an_exception(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = _language_model(name)
    contrast = Contrast.from_pairs(PAIRS)
    sites = _sites(language_model, ["heads", "ffn_in", "ffn_out", "resid"])
    wants = [Want(site, "last", _Counting) for site in sites]
    means = [Want(site, "last", Means) for site in sites]
    before = language_model.logits(["The answer is"])
    expected = collect(language_model, contrast, means)
    _Counting.fail_at, _Counting.error = 2, error
    with _batch_tokens(monkeypatch, 200), pytest.raises(error, match="in the middle"):
        collect(language_model, contrast, [*means, *wants])
    assert _hooks(language_model.model) == []
    assert torch.equal(language_model.logits(["The answer is"]), before)
    again = collect(language_model, contrast, means)
    assert all(torch.equal(again[want].difference, expected[want].difference) for want in means)
    assert _hooks(language_model.model) == []


def test_no_gradients_and_no_change() -> None:
    language_model = _language_model("llama")
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


def test_memory_does_not_grow_with_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = _language_model("llama")
    sites = _sites(language_model, ["heads", "resid"])
    wants = [Want(s, "last", kind) for s in sites for kind in (SignCounts, Means)]
    wants += [Want(s, "mean", Means) for s in sites] + [Want("layers.2.resid", "last", _Scales)]

    def peak(texts: int) -> int:
        _Scales.peaks = []
        # All of one length, so that all batches are alike.
        pairs = [(f"{i:04d} is", " yes", " no") for i in range(texts)]
        gc.collect()
        with _batch_tokens(monkeypatch, 100):
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
    language_model = _language_model("llama")
    collect(language_model, Contrast.from_pairs(PAIRS), [Want("layers.0.resid", "last", Means)])
    assert capsys.readouterr() == ("", "")


# -- bad wants --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "kind", "way_out"),
    [
        ("last", SignCounts, "positive and negative"),
        ("answer", Means, "mean or last\\), or give it pairs"),
    ],
)
def test_pairs_are_needed(token: Any, kind: Any, way_out: str) -> None:
    language_model = _language_model("llama")
    contrast = Contrast.from_texts(["a"], ["b"], name="mine")
    with (
        _counted({"body": language_model.model.model}) as counts,
        pytest.raises(tt.TrimtabError, match=f"^mine is unpaired.*{way_out}$"),
    ):
        collect(language_model, contrast, [Want("layers.0.resid", token, kind)])
    assert not counts


@pytest.mark.parametrize("site", ["layers.3.resid", "layers.0.mlp", "resid", "layers.-1.resid"])
def test_unknown_sites(site: str) -> None:
    language_model = _language_model("llama")
    with pytest.raises(tt.TrimtabError, match="unknown site|layers 0 to 2"):
        collect(language_model, Contrast.from_pairs(PAIRS), [Want(site, "last", Means)])
    assert _hooks(language_model.model) == []
