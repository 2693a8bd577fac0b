"""CAA and ActAdd against differences, components and choices worked out with transformers alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, plain_logits, read_sites, refused_in_one_line, side_texts, token_ids
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast, Pair, Text
from trimtab.methods.caa import _first_component
from trimtab.steering.operators import Add

PAIRS = [
    (f"The {who} looked at the {what} and said that it was", " right.", " wrong, and left!")
    for who in ("king", "mother", "captain")
    for what in ("ship", "map", "fire")
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")
#: Differences that point many ways.
VARIED = [
    ("Today I feel", " happy", " sad because of the rain"),
    ("The answer to the question is", " yes", " no, it is not"),
    *PAIRS[:2],
    ("I cannot help you", " with that.", ", sure"),
    ("She was the", " clever daughter", " third, and old"),
]
TWO = Contrast.from_pairs(PAIRS[:2])

POSITIVE = ["I love this film", "It is true", "The wind was good and the day was long"]
NEGATIVE = ["I hate it", "No.", "False, and wrong", "The actors were bad"]
UNPAIRED = Contrast.from_texts(POSITIVE, NEGATIVE, "mine")


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return tt.wrap(tiny_model(name), tiny_tokenizer(), name)


# -- the oracle: one text at a time, nothing of trimtab ----------------------------------------


def _stand_ins(name: str, pairs: list[tuple[str, str, str]], token: Any) -> tuple[Tensor, Tensor]:
    """What stands for the texts of both sides at every block's output, [pairs, layers, units]."""
    sides = []
    for side in side_texts(pairs):
        rows = []
        for x, pair in zip(read_sites(_lm(name).model, "resid", side), pairs, strict=True):
            if isinstance(token, int):
                rows.append(x[:, token])
                continue
            start = {"last": x.shape[1] - 1, "mean": 0, "answer": len(token_ids(pair[0]))}[token]
            rows.append(x[:, start:].mean(1))
        sides.append(torch.stack(rows))
    return sides[0], sides[1]


def _means(name: str, texts: list[str], token: str) -> Tensor:
    """The mean over texts of what stands for them, [layers, units]."""
    read = read_sites(_lm(name).model, "resid", texts)
    return torch.stack([x[:, -1] if token == "last" else x.mean(1) for x in read]).mean(0)


def _vectors(steering: tt.Steering) -> dict[str, Tensor]:
    """Site -> the vector that it adds at alpha 1."""
    found = {}
    for intervention in steering.interventions:
        assert isinstance(intervention.operator, Add)
        assert intervention.operator.vector.dtype is torch.float32
        found[intervention.site] = intervention.operator.vector.double()
    assert len(found) == len(steering.interventions)
    return found


def _vector(steering: tt.Steering) -> Tensor:
    (vector,) = _vectors(steering).values()
    return vector


def _close(actual: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    assert (actual - expected).norm() <= within * expected.norm()


# -- CAA: mean differences ---------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("token", ["last", "mean", "answer", -2])
def test_caa_is_the_mean_difference(name: str, token: Any) -> None:
    """At all layers, so that one that is off by one would show."""
    layers = (0, 1, -1)
    steering = tt.CAA(layer=layers, token=token, alpha=3).fit(_lm(name), CONTRAST)
    positive, negative = _stand_ins(name, PAIRS, token)
    depth = positive.shape[1]
    found = _vectors(steering)
    assert list(found) == [f"layers.{layer % depth}.resid" for layer in layers]
    for layer in layers:
        expected = (positive - negative)[:, layer].mean(0)
        # The difference of means of larger numbers: as exact as those are.
        scale = torch.cat([positive, negative])[:, layer].norm(dim=-1).max()
        difference = found[f"layers.{layer % depth}.resid"] - expected
        assert difference.norm() < 1e-5 * scale
        assert expected.norm() > 0.01 * scale
    assert (steering.dial.name, steering.setting) == ("alpha", 3)


def test_minus_one_is_the_last_token() -> None:
    by_name, by_number, other = (
        _vector(tt.CAA(layer=1, token=token).fit(_lm(), CONTRAST))
        for token in ("last", -1, -2)  # type: ignore[arg-type]
    )
    assert torch.equal(by_name, by_number)
    assert not torch.allclose(by_name, other, atol=0.01)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_caa_adds_its_vectors(positions: Any) -> None:
    """To the residual stream after each of its blocks, alpha times."""
    lm = _lm()
    steering = tt.CAA(layer=(0, 2), alpha=2.0, positions=positions, token="last").fit(lm, CONTRAST)
    assert list(map(str, steering.scopes)) == [positions]
    vectors = {int(site.split(".")[1]): v.float() for site, v in _vectors(steering).items()}
    if positions == "all":
        with _added(lm.model, {layer: 2 * v for layer, v in vectors.items()}):
            expected = torch.stack([plain_logits(lm.model, token_ids(p))[-1] for p in PROMPTS])
        assert torch.allclose(lm.logits(PROMPTS, steering=steering), expected, atol=1e-4)
        assert not torch.allclose(lm.logits(PROMPTS), expected, atol=0.1)


@contextmanager
def _added(model: Any, vectors: dict[int, Tensor]) -> Iterator[None]:
    """Vectors added to the outputs of blocks by plain hooks."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handles = [
        blocks[layer].register_forward_hook(lambda m, args, out, v=vector: out + v)
        for layer, vector in vectors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
def test_default_layer(layers: int) -> None:
    lm = tt.wrap(tiny_model("llama", num_hidden_layers=layers), tiny_tokenizer())
    expected = f"layers.{[None, 0, 0, 1, None, 2, None, None, 3][layers]}.resid"
    for method in (tt.CAA(token="last"), tt.ActAdd()):
        assert [i.site for i in method.fit(lm, TWO).interventions] == [expected]


def test_a_layer_that_is_named_twice_is_steered_once() -> None:
    sites = [i.site for i in tt.CAA(layer=(2, 0, -1), token="last").fit(_lm(), TWO).interventions]
    assert sites == ["layers.2.resid", "layers.0.resid"]


@pytest.mark.parametrize("token", ["last", "mean"])
def test_caa_takes_texts_that_are_not_pairs(token: Any) -> None:
    steering = tt.CAA(layer=1, token=token).fit(_lm(), UNPAIRED)
    expected = _means("llama", POSITIVE, token) - _means("llama", NEGATIVE, token)
    _close(_vector(steering), expected[1])
    assert steering.contrast["rows"] == 7


def test_unit_norm() -> None:
    for variant in ("mean", "pca"):
        plain, unit = (
            _vectors(
                tt.CAA(layer=(0, 1), variant=variant, unit_norm=u, token="last").fit(
                    _lm(), CONTRAST
                )
            )  # type: ignore[arg-type]
            for u in (False, True)
        )
        for site, vector in plain.items():
            assert abs(float(unit[site].norm()) - 1) < 1e-6
            assert abs(float(vector.norm()) - 1) > 0.1
            _close(unit[site], vector / vector.norm(), 1e-6)


def test_equal_activations_have_no_direction() -> None:
    """Of two tokens before the last, both sides have the prompt's."""
    same_end = Contrast.from_pairs([("She said that it was not", " a", " b"), PAIRS[0]]).take(1)
    for unit_norm in (False, True):
        with pytest.raises(tt.TrimtabError, match=r"do not differ at layers\.1\.resid"):
            tt.CAA(unit_norm=unit_norm, token=-4).fit(_lm(), same_end)
    with pytest.raises(tt.TrimtabError, match="sides of every pair have equal activations"):
        tt.CAA(variant="pca", token=-4).fit(_lm(), same_end)


# -- CAA: the first principal component --------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("token", ["last", "mean", -2])
def test_pca_is_numpys(name: str, token: Any) -> None:
    """The first right singular vector of the uncentred differences, as long as their mean."""
    method = tt.CAA(layer=(0, 1, 2), variant="pca", token=token)
    steering = method.fit(_lm(name), Contrast.from_pairs(VARIED))
    positive, negative = _stand_ins(name, VARIED, token)
    of_means, of_centred = [], []
    for layer, found in enumerate(_vectors(steering).values()):
        differences = (positive - negative)[:, layer].numpy()
        mean = differences.mean(0)
        component = np.linalg.svd(differences)[2][0]
        component *= np.sign(component @ mean) * np.linalg.norm(mean)
        _close(found, torch.from_numpy(component), 1e-4)
        assert found.numpy() @ mean > 0
        length = np.linalg.norm(mean)
        of_means.append(component @ mean / length**2)
        of_centred.append(abs(np.linalg.svd(differences - mean)[2][0] @ component) / length)
    # It is neither the mean itself nor what centring would give.
    assert min(of_means) < 0.98
    assert min(of_centred) < 0.9


def test_a_direction_by_chance_is_as_long_and_means_nothing() -> None:
    """Of each site and draw one, whatever other sites there are."""
    means = _vectors(tt.CAA(layer=(0, 1, 2), token="last").fit(_lm(), CONTRAST))

    def drawn(layer: Any, draw: int = 0) -> dict[str, Tensor]:
        method = tt.CAA(layer=layer, variant="random", draw=draw, token="last")
        return _vectors(method.fit(_lm(), CONTRAST))

    found, other = drawn((0, 1, 2)), drawn((0, 1, 2), draw=1)
    for site, vector in found.items():
        assert float(vector.norm()) == pytest.approx(float(means[site].norm()), rel=1e-6)
    every = torch.stack([*found.values(), *other.values(), *means.values()])
    near = torch.nn.functional.cosine_similarity(every[:6, None], every, dim=-1)
    near[:, :6] -= torch.eye(6)
    assert float(near.abs().max()) < 0.7  # independent: around one by the root of the units
    assert torch.equal(drawn(1)["layers.1.resid"], found["layers.1.resid"])


def test_swapped_sides_flip_both_variants() -> None:
    swapped = Contrast.from_pairs([(prompt, no, yes) for prompt, yes, no in PAIRS])
    for variant in ("mean", "pca"):
        method = tt.CAA(variant=variant, token="last")  # type: ignore[arg-type]
        one, other = (_vector(method.fit(_lm(), contrast)) for contrast in (CONTRAST, swapped))
        _close(one, -other, 1e-6)


def test_one_pair_is_its_own_component() -> None:
    one = Contrast.from_pairs(PAIRS[:1])
    mean, component = (
        _vector(tt.CAA(variant=variant, token="last").fit(_lm(), one))  # type: ignore[arg-type]
        for variant in ("mean", "pca")
    )
    _close(component, mean, 1e-6)


def test_a_component_across_the_mean_has_a_sign_of_its_own() -> None:
    """It agrees with the mean no way, so its largest entry decides, and does so every time."""
    across, mean = torch.zeros(2, 48, dtype=torch.float64)
    across[3], across[5], mean[7] = -5, 2, 1
    differences = torch.stack([across + mean, mean - across])
    moment = differences.T @ differences
    for _ in range(4):
        found = _first_component(moment, differences.mean(0))
        _close(found, -across / across.norm(), 1e-9)


# -- CAA: the layer that does most on validation rows ------------------------------------------


def _parts(rows: Any) -> Contrast:
    """Half of the rows for training, a third for validation, the rest for test."""
    parts = itertools.cycle(("train", "validation", "train", "test", "validation", "train"))
    return Contrast(tuple(replace(row, part=next(parts)) for row in rows), "mine")


def _log_likelihood(model: Any, ids: list[int], start: int) -> float:
    log_p = plain_logits(model, ids).double().log_softmax(-1)
    return sum(float(log_p[place - 1, ids[place]]) for place in range(start, len(ids)))


def _preference(model: Any, contrast: Contrast) -> float:
    """In nats: per pair, or per token of unpaired texts."""
    if contrast.paired:
        odds = []
        for pair in contrast.pairs:
            start = len(token_ids(str(pair.prompt)))
            positive, negative = (
                _log_likelihood(model, token_ids(str(pair.prompt) + answer), start)
                for answer in (pair.positive, pair.negative)
            )
            odds.append(positive - negative)
        return float(np.mean(odds))
    means: dict[str, list[float]] = {"positive": [], "negative": []}
    for row in contrast.texts:
        ids = token_ids(str(row.text))
        means[row.label].append(_log_likelihood(model, ids, 1) / (len(ids) - 1))
    return float(np.mean(means["positive"]) - np.mean(means["negative"]))


MANY = [Pair(*pair) for pair in PAIRS]
TEXTS = [
    Text(text, label)  # type: ignore[arg-type]
    for texts in zip(POSITIVE * 2, NEGATIVE[:3] * 2, strict=True)
    for text, label in zip(texts, ("positive", "negative"), strict=True)
]
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "llama": ("llama", MANY, {"alpha": 0.5}),
    "mistral": ("mistral", MANY, {"alpha": 2.0}),
    "olmo2": ("olmo2", MANY, {"alpha": 1.0}),
    "backwards": ("llama", MANY, {"alpha": -0.5}),
    "mean": ("llama", MANY, {"alpha": 1.0, "token": "mean"}),
    "pca": ("llama", MANY, {"alpha": 1.0, "variant": "pca"}),
    "unit": ("qwen3", MANY, {"alpha": 4.0, "unit_norm": True}),
    "gemma2": ("gemma2", MANY, {"alpha": 0.5}),
    "gpt2": ("gpt2", MANY, {"alpha": 2.0, "token": "answer"}),
    "unpaired": ("llama", TEXTS, {"alpha": 0.7}),
    "unpaired mean": ("gpt2", TEXTS, {"alpha": 0.7, "token": "mean"}),
}


@functools.cache
def _chosen(case: str) -> tt.Steering:
    name, rows, options = CASES[case]
    return tt.CAA(layer="validation", **options).fit(_lm(name), _parts(rows))


@pytest.mark.parametrize("case", CASES)
def test_validation_picks_the_layer_that_a_loop_picks(case: str) -> None:
    name, rows, options = CASES[case]
    lm, contrast, alpha = _lm(name), _parts(rows), options["alpha"]
    # One steering per layer, fitted on the train rows alone, added by a plain hook.
    train, validation = (
        Contrast(tuple(replace(row, part=None) for row in contrast.rows if row.part == part))
        for part in ("train", "validation")
    )
    base, gains, vectors = _preference(lm.model, validation), [], []
    for layer in range(lm.anatomy.layers):
        vectors.append(_vector(tt.CAA(layer=layer, **options).fit(lm, train)))
        with _added(lm.model, {layer: alpha * vectors[-1].float()}):
            gains.append(_preference(lm.model, validation) - base)
    best = int(np.argmax(gains) if alpha > 0 else np.argmin(gains))
    steering = _chosen(case)
    (intervention,) = steering.interventions
    assert intervention.site == f"layers.{best}.resid"
    _close(_vector(steering), vectors[best], 1e-6)
    assert steering.findings["site"] == intervention.site
    found = steering.findings["validation_gain"]
    assert list(found) == [f"layers.{layer}.resid" for layer in range(lm.anatomy.layers)]
    assert list(found.values()) == pytest.approx(gains, abs=1e-3)
    assert steering.hyperparameters["layer"] == "validation"
    assert steering.contrast["digest"] == train.digest
    # The layers are far enough apart for the choice to mean something.
    assert max(gains) - min(gains) > 0.02


def test_not_every_case_picks_the_same_layer() -> None:
    assert len({_chosen(case).findings["site"] for case in CASES}) >= 2


def test_validation_at_last_positions() -> None:
    """The prompt's last token and the answer's, as they stand in a text that is read at once."""
    lm, contrast = _lm(), _parts(MANY)
    method = tt.CAA(layer="validation", alpha=0.5, positions="last", token="last")
    found = method.fit(lm, contrast).findings["validation_gain"]
    gains = []
    validation = contrast.part("validation")
    for layer in range(3):
        vector = 0.5 * _vector(tt.CAA(layer=layer, token="last").fit(lm, contrast)).float()
        odds = []
        for pair in validation.pairs:
            start = len(token_ids(str(pair.prompt)))
            shift = torch.zeros(200, len(vector))
            shift[start - 1 :] = vector

            def hook(module: Any, args: Any, out: Tensor, by: Tensor = shift) -> Tensor:
                return out + by[: out.shape[1]]

            handle = lm.model.model.layers[layer].register_forward_hook(hook)
            sides = [token_ids(str(pair.prompt) + a) for a in (pair.positive, pair.negative)]
            positive, negative = (_log_likelihood(lm.model, ids, start) for ids in sides)
            handle.remove()
            odds.append(positive - negative)
        gains.append(float(np.mean(odds)) - _preference(lm.model, validation))
    assert list(found.values()) == pytest.approx(gains, abs=1e-3)
    everywhere = tt.CAA(layer="validation", alpha=0.5, token="last").fit(lm, contrast)
    assert everywhere.findings["validation_gain"] != pytest.approx(found, abs=1e-3)


def test_only_validation_rows_choose() -> None:
    """Other test rows choose nothing; other validation rows may."""
    lm, contrast = _lm(), _parts(MANY)
    method = tt.CAA(layer="validation", alpha=0.5, token="last")
    found = method.fit(lm, contrast)
    other = tuple(
        replace(row, positive=" yes", negative=" no") if row.part == "test" else row
        for row in contrast.pairs
    )
    again = method.fit(lm, Contrast(other, "mine"))
    assert again.findings == found.findings
    assert torch.equal(_vector(again), _vector(found))


def test_a_fixed_layer_has_no_findings() -> None:
    assert tt.CAA(layer=1, token="last").fit(_lm(), _parts(MANY)).findings == {}


# -- ActAdd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("layer", [0, -1])
def test_actadd_is_the_difference_of_one_pair(name: str, layer: int) -> None:
    lm = _lm(name)
    steering = tt.ActAdd(layer=layer, alpha=2).fit(lm, CONTRAST)
    positive, negative = _stand_ins(name, PAIRS[:1], "mean")
    _close(_vector(steering), (positive - negative)[0, layer])
    assert list(_vectors(steering)) == [f"layers.{layer % lm.anatomy.layers}.resid"]
    assert (steering.dial.name, steering.setting) == ("alpha", 2)


@pytest.mark.parametrize("token", ["mean", "last", "answer", -2])
@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_actadd_takes_the_first_pairs(pairs: int, token: Any) -> None:
    positive, negative = _stand_ins("llama", PAIRS[:pairs], token)
    found = _vector(tt.ActAdd(layer=1, pairs=pairs, token=token).fit(_lm(), CONTRAST))
    _close(found, (positive - negative)[:, 1].mean(0))


def test_actadd_of_all_pairs_is_caa() -> None:
    every, caa = tt.fit([tt.ActAdd(pairs=9), tt.CAA(token="mean")], _lm(), CONTRAST)
    _close(_vector(every), _vector(caa), 1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_actadd_of_texts_that_are_not_pairs(count: int) -> None:
    """The first of each side, wherever they stand among the rows."""
    rows = [Text(text, "negative") for text in NEGATIVE[:3]]
    rows += [Text(POSITIVE[0], "positive"), Text(NEGATIVE[3], "negative")]
    rows += [Text(text, "positive") for text in POSITIVE[1:]]
    found = _vector(tt.ActAdd(layer=2, pairs=count).fit(_lm(), Contrast(tuple(rows))))
    positive, negative = (_means("llama", texts[:count], "mean") for texts in (POSITIVE, NEGATIVE))
    _close(found, (positive - negative)[2])


def test_actadd_counts_train_rows() -> None:
    """The first pair is the first of the train part, and so are the first texts."""
    parts = ["test", "validation", "train", "train"] + ["test"] * 5
    rows = tuple(replace(row, part=part) for row, part in zip(MANY, parts, strict=True))
    positive, negative = _stand_ins("llama", PAIRS[2:3], "mean")
    found = _vector(tt.ActAdd(layer=1).fit(_lm(), Contrast(rows)))  # type: ignore[arg-type]
    _close(found, (positive - negative)[0, 1])
    with pytest.raises(tt.TrimtabError, match="pairs is 3, but contrast has 2 pairs"):
        tt.ActAdd(pairs=3).fit(_lm(), Contrast(rows))  # type: ignore[arg-type]
    texts = [Text(POSITIVE[0], "positive", "test"), Text(NEGATIVE[0], "negative", "test")]
    texts += [Text(NEGATIVE[1], "negative", "train"), Text(NEGATIVE[2], "negative", "train")]
    texts += [Text(POSITIVE[1], "positive", "train"), Text(POSITIVE[2], "positive", "train")]
    found = _vector(tt.ActAdd(layer=1).fit(_lm(), Contrast(tuple(texts))))
    expected = _means("llama", POSITIVE[1:2], "mean") - _means("llama", NEGATIVE[1:2], "mean")
    _close(found, expected[1])


def test_actadd_among_others_still_takes_its_rows_only() -> None:
    """A pass that reads all rows for another method gives it the same."""
    methods: list[Any] = [tt.ActAdd(), tt.ActAdd(pairs=4), tt.CAA(token="mean"), tt.SADI(k=2)]
    for contrast in (CONTRAST, UNPAIRED):
        if not contrast.paired:
            methods = [tt.ActAdd(), tt.ActAdd(pairs=2), tt.CAA(token="mean")]
        for method, steering in zip(methods, tt.fit(methods, _lm(), contrast), strict=True):
            if isinstance(method, tt.ActAdd):
                _close(_vector(steering), _vector(method.fit(_lm(), contrast)), 1e-6)


def test_actadd_runs_only_the_rows_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tt.LanguageModel, "batch_tokens", 1)  # a pass a row
    lm, passes = _lm(), []
    handle = lm.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    tt.ActAdd(pairs=2).fit(lm, CONTRAST)
    handle.remove()
    assert len(passes) == 2


# -- what is recorded --------------------------------------------------------------------------

REST = {"draw": 0, "unit_norm": False, "positions": "all"}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            tt.CAA(layer=(0, -1), alpha=-2, token=-2, unit_norm=True, positions="prompt"),
            {"layer": [0, -1], "alpha": -2, "token": -2, "variant": "mean", **REST}
            | {"unit_norm": True, "positions": "prompt"},
        ),
        (
            tt.CAA(layer="validation", alpha=1, token="answer", variant="pca"),
            {"layer": "validation", "alpha": 1, "token": "answer", "variant": "pca", **REST},
        ),
        (
            tt.ActAdd(layer=2, alpha=0.5, pairs=3, token="last", positions="last"),
            {"layer": 2, "alpha": 0.5, "pairs": 3, "token": "last", "positions": "last"},
        ),
    ],
)
def test_saved_and_loaded(method: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    made = method.fit(_lm(), _parts(MANY))
    loaded = tt.Steering.load(made.save(tmp_path / "a.safetensors"))
    for steering in (made, loaded):
        assert steering.method == method.name
        assert steering.hyperparameters == expected
        assert steering.dial == tt.Dial("alpha", expected["alpha"], (-20.0, 20.0))
        assert list(map(str, steering.scopes)) == [expected["positions"]]
    assert loaded.findings == made.findings
    assert _vectors(loaded).keys() == _vectors(made).keys()
    assert all(torch.equal(v, _vectors(made)[site]) for site, v in _vectors(loaded).items())


# -- what bad input gets -----------------------------------------------------------------------

_NAN, _INF = float("nan"), float("inf")


def _made(method: Any, **options: Any) -> Callable[[], Any]:
    return lambda: method(**options)


def _fit(method: Any, contrast: Contrast = TWO, **options: Any) -> Callable[[], Any]:
    return lambda: method(**options).fit(_lm(), contrast)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "caa positions": (_made(tt.CAA, positions="first"), "positions is 'first': .*known are all"),
    "caa token": (_made(tt.CAA, token="first"), "token is 'first': known are last, mean, answer"),
    "caa token 0": (_made(tt.CAA, token=0), "token is 0: known are .* -1, -2"),
    "caa token 1": (_made(tt.CAA, token=1), "token is 1: known are"),
    "caa token true": (_made(tt.CAA, token=True), "token is True: known are"),
    "caa variant": (_made(tt.CAA, variant="svd"), "variant is 'svd': known are mean, pca"),
    "caa chance": (_made(tt.CAA, variant="random", layer="effect"), "is chosen by nothing"),
    "caa alpha": (_made(tt.CAA, alpha=_INF), "alpha must be a finite number"),
    "caa alpha nan": (_made(tt.CAA, alpha=_NAN), "alpha must be a finite number"),
    "caa no layer": (_made(tt.CAA, layer=()), "layer is empty"),
    "caa layer word": (_made(tt.CAA, layer="best"), "layer is 'best': known are validation"),
    "caa layer": (_fit(tt.CAA, layer=3), "layer 3 .* 0 to 2"),
    "caa negative layer": (_fit(tt.CAA, layer=-4), "layer -4 .* 0 to 2"),
    "caa one of the layers": (_fit(tt.CAA, layer=(1, 7)), "layer 7 .* 0 to 2"),
    "caa alpha 0": (_made(tt.CAA, layer="validation", alpha=0), "alpha is 0"),
    "caa no validation": (_fit(tt.CAA, layer="validation"), "none: name parts .*split"),
    "caa no validation part": (
        _fit(tt.CAA, Contrast((replace(MANY[0], part="train"),), "mine"), layer="validation"),
        "caa chooses on validation rows, and mine has none",
    ),
    "caa unpaired, last": (
        _fit(tt.CAA, _parts(TEXTS), layer="validation", positions="last"),
        "positions last changes nothing there",
    ),
    "caa unpaired, generated": (
        _fit(tt.CAA, _parts(TEXTS), layer="validation", positions="generated"),
        "positions generated changes nothing there",
    ),
    "caa unpaired answer": (_fit(tt.CAA, UNPAIRED, token="answer"), "mine is unpaired"),
    "caa unpaired pca": (_fit(tt.CAA, UNPAIRED, variant="pca"), "mine is unpaired"),
    "caa short": (_fit(tt.CAA, token=-99), r"row \d.* tokens.* there is none at -99"),
    "actadd positions": (_made(tt.ActAdd, positions="first"), "positions is 'first'"),
    "actadd token": (_made(tt.ActAdd, token="first"), "token is 'first'"),
    "actadd alpha": (_made(tt.ActAdd, alpha=_NAN), "alpha must be a finite number"),
    "actadd no pairs": (_made(tt.ActAdd, pairs=0), "pairs must be 1 or more, not 0"),
    "actadd layer": (_fit(tt.ActAdd, layer=3), "layer 3 .* 0 to 2"),
    "actadd pairs": (_fit(tt.ActAdd, pairs=3), "pairs is 3, but contrast has 2 pairs"),
    "actadd texts": (_fit(tt.ActAdd, UNPAIRED, pairs=4), "mine has 3 texts of each side"),
    "actadd unpaired answer": (_fit(tt.ActAdd, UNPAIRED, token="answer"), "mine is unpaired"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    refused_in_one_line(*BAD[name])


def test_missing_validation_rows_are_noticed_before_the_model_runs() -> None:
    lm, passes = _lm(), []
    handle = lm.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(tt.TrimtabError, match="validation"):
        tt.CAA(layer="validation", token="last").fit(lm, CONTRAST)
    handle.remove()
    assert not passes
