"""STA, and reading sparse autoencoders: against sae-lens itself and plain hidden states.

What needs the library sae-lens is skipped where it is not installed.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trimtab as tt
from helpers import language_model, relative
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.fitting.autoencoders import load_features
from trimtab.methods.contents import describe, explain
from trimtab.steering.operators import Add

PAIRS = [
    (f"The {who} looked at the {what} and said that it was", good, bad)
    for who in ("king", "mother")
    for what, good, bad in (
        ("ship", " right, and he was happy.", " wrong!"),
        ("old map", " good.", " bad, and she did not like it at all!"),
        ("fire in the rain", " true.", " false!"),
    )
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")
TEXTS = Contrast.from_texts([p + a for p, a, _ in PAIRS], [p + b for p, _, b in PAIRS][:4], "texts")
#: Features and units of the tiny autoencoders; the models have 48 units, and OLMo 2 has 64.
FEATURES = 40
KINDS = ("standard", "jumprelu", "topk", "topk_raw")


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return language_model(name)


@pytest.fixture
def autoencoder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a random autoencoder in sae-lens's format: `autoencoder("topk", seed=1)` is its path.

    Decoder rows are far from length 1; "topk_raw" measures its activations along unit rows.
    """
    pytest.importorskip("sae_lens")
    made = 0

    def make(
        kind: str = "standard",
        width: int = 48,
        hook: Any = "blocks.1.hook_resid_post",
        seed: int = 0,
        path: Path | None = None,
        **options: Any,
    ) -> Path:
        nonlocal made
        made += 1
        directory = path or tmp_path / f"sae{made}"
        _random(kind, width, hook, seed, **options).save_model(directory)
        return directory

    return make


def _random(kind: str, width: int, hook: Any, seed: int, **options: Any) -> Any:
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    classes: dict[str, tuple[Any, Any]] = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "topk_raw": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
    }
    make, config = classes[kind]
    if kind.startswith("topk"):
        options = {"k": 6, "rescale_acts_by_decoder_norm": kind == "topk_raw", **options}
    about = {"model_name": "tiny"} | ({} if hook is None else {"hook_name": hook})
    options = {"metadata": SAEMetadata(**about), "device": "cpu", "dtype": "float32", **options}
    sae = make(config(d_in=width, d_sae=FEATURES, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.abs_()
        sae.W_dec.mul_(torch.rand(FEATURES, 1, generator=generator) * 3 + 0.2)
    return sae


def _library(path: Path) -> Any:
    """The autoencoder as sae-lens reads it."""
    from sae_lens import SAE

    return SAE.load_from_disk(path, dtype="float32")


def _edit(path: Path, **changes: Any) -> Path:
    """Change cfg.json; None takes an entry out."""
    file = path / "cfg.json"
    config = {**json.loads(file.read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(kept))
    return path


def _stream(name: str, ids: list[int], state: int) -> Tensor:
    """transformers' hidden state number `state` (0: the embedding), [tokens, units]."""
    model: Any = _lm(name).model
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


def _vector(steering: tt.Steering) -> Tensor:
    (intervention,) = steering.interventions
    operator: Any = intervention.operator
    assert type(operator) is Add
    vector: Tensor = operator.vector
    return vector


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
    sae = _library(path)
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
    steering = tt.STA(sae=str(path), token=token).fit(_lm(), CONTRAST)
    assert relative(_vector(steering), vector) < 1e-4
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
    path = autoencoder("topk", width=_lm(name).anatomy.hidden_size)
    sae = _library(path)
    positive, up, negative, down = _read(sae, name, 2, "answer")
    amplitude = positive.mean(0) - negative.mean(0)
    frequency = (positive > 0).sum(0) - (negative > 0).sum(0)
    kept = torch.tensor(_kept_by_hand(amplitude.tolist(), frequency.tolist(), 0.2))
    vector = (amplitude * kept) @ sae.W_dec.detach().double()
    vector = vector * ((up.mean(0) - down.mean(0)).norm() / vector.norm())
    steering = tt.STA(sae=str(path), p=0.2).fit(_lm(name), CONTRAST)
    assert relative(_vector(steering), vector) < 1e-3


def test_it_is_as_long_as_the_vector_of_caa(autoencoder: Callable[..., Path]) -> None:
    sta, caa = tt.fit(
        [tt.STA(sae=str(autoencoder()), token="last"), tt.CAA(layer=1, token="last")],
        _lm(),
        CONTRAST,
    )
    assert sta.interventions[0].site == caa.interventions[0].site
    assert float(_vector(sta).norm()) == pytest.approx(float(_vector(caa).norm()), rel=1e-5)


def test_the_stream_before_a_block_is_the_one_after_the_block_before(
    autoencoder: Callable[..., Path],
) -> None:
    after = tt.STA(sae=str(autoencoder(hook="blocks.1.hook_resid_post"))).fit(_lm(), CONTRAST)
    before = tt.STA(sae=str(autoencoder(hook="blocks.2.hook_resid_pre"))).fit(_lm(), CONTRAST)
    assert before.interventions[0].site == after.interventions[0].site == "layers.1.resid"
    assert torch.equal(_vector(before), _vector(after))
    first = tt.STA(sae=str(autoencoder(hook="blocks.0.hook_resid_pre"))).fit(_lm(), CONTRAST)
    assert first.interventions[0].site == "embed"


def test_unpaired_texts(autoencoder: Callable[..., Path]) -> None:
    path = autoencoder()
    steering = tt.STA(sae=str(path), token="mean").fit(_lm(), TEXTS)
    sae = _library(path)
    positive, _, negative, _ = _read(sae, "llama", 2, "mean")
    amplitude = positive.mean(0) - negative[:4].mean(0)
    frequency = (positive > 0).sum(0) - (negative[:4] > 0).sum(0)
    kept = _kept_by_hand(amplitude.tolist(), frequency.tolist(), 0.35)
    assert sorted(steering.tables["feature"].tolist()) == [i for i in range(FEATURES) if kept[i]]
    with pytest.raises(tt.TrimtabError, match="unpaired"):
        tt.STA(sae=str(path)).fit(_lm(), TEXTS)


def test_a_path_is_as_good_as_its_text(autoencoder: Callable[..., Path], tmp_path: Path) -> None:
    path: Any = autoencoder()
    steering = tt.STA(sae=path).fit(_lm(), CONTRAST)
    read = tt.Steering.load(steering.save(tmp_path / "a.safetensors"))
    assert read.hyperparameters["sae"] == str(path)


def test_alpha_and_positions(autoencoder: Callable[..., Path]) -> None:
    path = str(autoencoder())
    steering = tt.STA(sae=path, alpha=2.5, positions="last").fit(_lm(), CONTRAST)
    assert steering.dial == tt.Dial("alpha", 2.5, (-20.0, 20.0))
    assert steering.interventions[0].positions == "last"
    assert torch.equal(_vector(steering), _vector(tt.STA(sae=path).fit(_lm(), CONTRAST)))


def test_sides_that_do_not_differ_are_refused(autoencoder: Callable[..., Path]) -> None:
    same = Contrast.from_texts([TEXTS.texts[0].text], [TEXTS.texts[0].text], "same")
    with pytest.raises(tt.TrimtabError, match="the two sides do not differ"):
        tt.STA(sae=str(autoencoder()), token="mean").fit(_lm(), same)


def test_dead_features_change_nothing(autoencoder: Callable[..., Path]) -> None:
    """A feature whose decoder row is zero, where activations are measured along unit rows."""
    path = autoencoder("topk_raw")
    _weights(path, lambda weights: weights["W_dec"][:30].zero_())
    features = load_features(str(path))
    assert torch.isfinite(features.decoder).all()
    assert not features.decoder[:30].any()
    steering = tt.STA(sae=str(path), p=1).fit(_lm(), CONTRAST)
    assert torch.isfinite(_vector(steering)).all()
    assert min(steering.tables["feature"].tolist()) >= 30


def test_features_that_add_up_to_nothing_are_refused(autoencoder: Callable[..., Path]) -> None:
    path = autoencoder()
    _weights(path, lambda weights: weights["W_dec"].zero_())
    with pytest.raises(tt.TrimtabError, match="add up to nothing"):
        tt.STA(sae=str(path)).fit(_lm(), CONTRAST)


# -- reading autoencoders ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_librarys(
    autoencoder: Callable[..., Path], kind: str, options: dict[str, Any]
) -> None:
    path = autoencoder(kind, **options)
    sae, features = _library(path), load_features(str(path))
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = sae.encode(x)
        assert torch.equal(features(x), expected)
        assert features(x.bfloat16()).dtype == torch.float32
        origin = sae.decode(torch.zeros(FEATURES))
        for i, one in enumerate(torch.eye(FEATURES)):
            assert torch.allclose(sae.decode(one) - origin, features.decoder[i], atol=1e-5)
    assert (expected > 0).any()
    assert (features.width, features.site) == (FEATURES, "layers.1.resid")
    assert not features.decoder.requires_grad
    lengths = features.decoder.norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(FEATURES)) == (kind == "topk_raw")


def test_a_directory_that_has_changed_is_read_again(
    autoencoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = autoencoder(seed=1)
    fitted = []
    for seed in (1, 2):
        autoencoder(seed=seed, path=path)
        fitted.append(_vector(tt.STA(sae=str(path)).fit(_lm(), CONTRAST)))
    assert relative(fitted[1], fitted[0]) > 0.1
    fresh = _vector(tt.STA(sae=str(autoencoder(seed=2))).fit(_lm(), CONTRAST))
    assert torch.equal(fitted[1], fresh)
    # Nor is another directory's taken that a relative path now means.
    other = autoencoder(seed=3)
    names = []
    for directory in (path, other):
        place = directory.parent / f"in_{directory.name}"
        place.mkdir()
        shutil.copytree(directory, place / "same")
        monkeypatch.chdir(place)
        names.append(load_features("same").name)
    assert names[0] != names[1]


def test_what_has_not_changed_is_read_once(
    autoencoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trimtab.fitting.autoencoders as module

    path, calls = str(autoencoder()), []
    load = module._load
    monkeypatch.setattr(module, "_load", lambda source: calls.append(source) or load(source))
    tt.STA(sae=path).fit(_lm(), CONTRAST)
    load_features(path)
    assert calls == [path]


def test_another_configuration_of_the_same_weights_has_another_name(
    autoencoder: Callable[..., Path], tmp_path: Path
) -> None:
    """Or a cache on disk would serve one's features to the other."""
    path = autoencoder("topk")
    few = tt.STA(sae=str(path)).fit(_lm(), CONTRAST, cache=tmp_path / "cache")
    name = load_features(str(path)).name
    _edit(path, k=20)
    assert load_features(str(path)).name != name
    many = tt.STA(sae=str(path)).fit(_lm(), CONTRAST, cache=tmp_path / "cache")
    assert torch.equal(_vector(many), _vector(tt.STA(sae=str(path)).fit(_lm(), CONTRAST)))
    assert relative(_vector(many), _vector(few)) > 1e-2
    # The same one elsewhere has the same name, and its pass need not run again.
    moved = tmp_path / "moved"
    shutil.copytree(path, moved)
    assert load_features(str(moved)) == load_features(str(path))


def _weights(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the weights' file."""
    from safetensors.torch import load_file, save_file

    file = path / "sae_weights.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(weights)
    file.unlink()
    save_file(weights, file)
    return path


def _refused(source: Any, *parts: str) -> None:
    """The reason is one line with these parts, and it is a TrimtabError."""
    with pytest.raises(tt.TrimtabError) as caught:
        tt.STA(sae=str(source)).fit(_lm(), CONTRAST)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        ("blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out"),
        ("blocks.1.attn.hook_z", "hook_z"),
        ("blocks.1.hook_resid_mid", "hook_resid_mid"),
        ("xblocks.1.hook_resid_post", "xblocks"),
        (None, "None"),
    ],
)
def test_other_sites_are_refused(
    autoencoder: Callable[..., Path], hook: str | None, named: str
) -> None:
    _refused(autoencoder(hook=hook), named, "hook_resid_post")


def test_another_models_autoencoder_is_refused(autoencoder: Callable[..., Path]) -> None:
    _refused(autoencoder(width=32), "reads 32 units", "layers.1.resid of llama has 48")
    _refused(autoencoder(hook="blocks.3.hook_resid_post"), "layer 3 is out of range")


def test_damaged_weights_are_refused(autoencoder: Callable[..., Path]) -> None:
    def first(value: float, name: str) -> Callable[[dict[str, Tensor]], None]:
        return lambda weights: weights[name].view(-1)[0].fill_(value)

    for name in ("W_dec", "W_enc", "b_enc", "b_dec"):
        for value in (math.nan, math.inf):
            _refused(_weights(autoencoder(), first(value, name)), f"NaN or infinity in {name}")
    path = _weights(autoencoder(), lambda weights: weights.pop("W_enc"))
    _refused(path, "cannot load the autoencoder", str(path))
    path = autoencoder()
    file = path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    _refused(path, "cannot load the autoencoder")


def test_damaged_configurations_are_refused(autoencoder: Callable[..., Path]) -> None:
    for changes in (
        {"architecture": "none"},
        {"architecture": None},
        {"d_in": 32},
        {"d_sae": 7},
        {"k": 100},  # more than there are: shows in use only
        {"metadata": "text"},
    ):
        _refused(_edit(autoencoder("topk"), **changes), "autoencoder")
    for text in ("{nope", "[]", "{}", ""):
        path = autoencoder()
        (path / "cfg.json").write_text(text)
        _refused(path, "cannot load the autoencoder")


def test_missing_files_are_refused(autoencoder: Callable[..., Path], tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "cannot load the autoencoder", "nowhere")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "cannot load the autoencoder")
    (tmp_path / "file").write_text("text")
    _refused(tmp_path / "file", "cannot load the autoencoder")
    for name in ("cfg.json", "sae_weights.safetensors"):
        path = autoencoder()
        (path / name).unlink()
        _refused(path, "cannot load the autoencoder", name)


@pytest.mark.parametrize("scale", ["expected_average_only_in", "covariance_whitening"])
def test_activations_that_must_be_rescaled_beforehand_are_refused(
    autoencoder: Callable[..., Path], scale: str
) -> None:
    _refused(_edit(autoencoder(), normalize_activations=scale), scale, "fold")


def test_a_transcoder_is_refused(autoencoder: Callable[..., Path]) -> None:
    path = autoencoder()
    about = json.loads((path / "cfg.json").read_text())["metadata"]
    changed = {**about, "hook_name_out": "blocks.1.hook_mlp_out"}
    _refused(_edit(path, metadata=changed), "residual stream")


def test_weights_that_were_rewritten_for_training_are_warned_of(
    autoencoder: Callable[..., Path],
) -> None:
    path = autoencoder()
    about = json.loads((path / "cfg.json").read_text())["metadata"]
    options = {"center_writing_weights": True}
    _edit(path, metadata={**about, "model_from_pretrained_kwargs": options})
    with pytest.warns(tt.TrimtabWarning, match="center_writing_weights") as caught:
        load_features(str(path))
    assert len(caught) == 1  # the library's own, of several lines, is not shown


def test_pickled_releases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sae_lens = pytest.importorskip("sae_lens")

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", never)
    _refused("goodfire-llama-3.1-8b-instruct:layer_19", "pickled", "does not read it")


def test_unknown_releases_are_refused() -> None:
    pytest.importorskip("sae_lens")
    _refused("no-such-release:layer_1", "no-such-release", "RELEASE:ID")


def test_no_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    asked = []

    def offline(release: str, name: str, **options: Any) -> None:
        asked.append((release, name, options.get("dtype")))
        raise OSError("no connection")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", offline)
    _refused("gemma-scope-2b-pt-res:layer_12/width_16k", "OSError: no connection")
    assert asked == [("gemma-scope-2b-pt-res", "layer_12/width_16k", "float32")]


def test_without_the_library_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)  # an import of it fails
    _refused(tmp_path, "need the extra sae", "pip install 'trimtab[sae]'")


def test_importing_the_library_leaves_the_log_level_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What sae-lens imports turns transformers' level down; here a stand-in does."""
    from transformers.utils import logging

    package = tmp_path / "sae_lens"
    (package / "loading").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from transformers.utils import logging\n"
        "logging.set_verbosity_error()\n"
        "class SAE:\n"
        "    def load_from_disk(path, dtype):\n"
        "        raise OSError('a stand-in')\n"
    )
    (package / "loading" / "__init__.py").touch()
    (package / "loading" / "pretrained_sae_loaders.py").write_text(
        "get_conversion_loader_name = None\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "sae_lens"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        _refused(tmp_path / "nowhere", "OSError: a stand-in")
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
        for name in [name for name in sys.modules if name.split(".")[0] == "sae_lens"]:
            del sys.modules[name]  # monkeypatch brings the real ones back


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"p": 0.0}, "p must be above 0"),
        ({"p": 1.1}, "p must be above 0"),
        ({"p": math.nan}, "p must be above 0"),
        ({"alpha": math.inf}, "alpha"),
        ({"token": "first"}, "token"),
        ({"token": 0}, "token"),
        ({"positions": "some"}, "positions"),
    ):
        with pytest.raises(tt.TrimtabError, match=message):
            tt.STA(sae="none", **options)  # type: ignore[arg-type]


# -- the artifact -----------------------------------------------------------------------------


def test_the_description_lists_the_features(
    autoencoder: Callable[..., Path], tmp_path: Path
) -> None:
    steering = tt.STA(sae=str(autoencoder())).fit(_lm(), CONTRAST)
    read = tt.Steering.load(steering.save(tmp_path / "a.safetensors"))
    for one in (steering, read):
        features = describe(one)["features"]
        assert [row["feature"] for row in features] == steering.tables["feature"].tolist()
        assert set(features[0]) == {"feature", "amplitude", "frequency"}
        assert f"sum of {len(features)} of {FEATURES} features" in " ".join(explain(one))
    assert torch.equal(_vector(read), _vector(steering))


def test_two_autoencoders_in_one_pass(autoencoder: Callable[..., Path]) -> None:
    paths = [str(autoencoder(seed=1)), str(autoencoder("topk", seed=2))]
    methods = [tt.STA(sae=path) for path in paths]
    together = tt.fit(methods, _lm(), CONTRAST)
    for method, steering in zip(methods, together, strict=True):
        assert torch.equal(_vector(steering), _vector(method.fit(_lm(), CONTRAST)))
