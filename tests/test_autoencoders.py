"""Reading sparse autoencoders: as sae-lens itself reads them, or refused in one line.

What needs the library sae-lens is skipped where it is not installed.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from autoencoders import (
    CONTRAST,
    FEATURES,
    KINDS,
    autoencoder,
    library,
    tiny_lm,
    vector_of,
    with_weights,
)
from helpers import relative
from trimtab.reading.autoencoders import load_features

__all__ = ["autoencoder"]  # fixtures, which pytest finds by their names here


def _edit(path: Path, **changes: Any) -> Path:
    """Change cfg.json; None takes an entry out."""
    file = path / "cfg.json"
    config = {**json.loads(file.read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(kept))
    return path


# -- reading autoencoders ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_librarys(
    autoencoder: Callable[..., Path], kind: str, options: dict[str, Any]
) -> None:
    path = autoencoder(kind, **options)
    sae, features = library(path), load_features(str(path))
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
        fitted.append(vector_of(tt.STA(sae=str(path)).fit(tiny_lm(), CONTRAST)))
    assert relative(fitted[1], fitted[0]) > 0.1
    fresh = vector_of(tt.STA(sae=str(autoencoder(seed=2))).fit(tiny_lm(), CONTRAST))
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
    import trimtab.reading.autoencoders as module

    path, calls = str(autoencoder()), []
    load = module._load
    monkeypatch.setattr(module, "_load", lambda source: calls.append(source) or load(source))
    tt.STA(sae=path).fit(tiny_lm(), CONTRAST)
    load_features(path)
    assert calls == [path]


def test_another_configuration_of_the_same_weights_has_another_name(
    autoencoder: Callable[..., Path], tmp_path: Path
) -> None:
    """Or a cache on disk would serve one's features to the other."""
    path = autoencoder("topk")
    few = tt.STA(sae=str(path)).fit(tiny_lm(), CONTRAST, cache=tmp_path / "cache")
    name = load_features(str(path)).name
    _edit(path, k=20)
    assert load_features(str(path)).name != name
    many = tt.STA(sae=str(path)).fit(tiny_lm(), CONTRAST, cache=tmp_path / "cache")
    assert torch.equal(vector_of(many), vector_of(tt.STA(sae=str(path)).fit(tiny_lm(), CONTRAST)))
    assert relative(vector_of(many), vector_of(few)) > 1e-2
    # The same one elsewhere has the same name, and its pass need not run again.
    moved = tmp_path / "moved"
    shutil.copytree(path, moved)
    assert load_features(str(moved)) == load_features(str(path))


def _refused(source: Any, *parts: str) -> None:
    """The reason is one line with these parts, and it is a TrimtabError."""
    with pytest.raises(tt.TrimtabError) as caught:
        tt.STA(sae=str(source)).fit(tiny_lm(), CONTRAST)
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
            _refused(with_weights(autoencoder(), first(value, name)), f"NaN or infinity in {name}")
    path = with_weights(autoencoder(), lambda weights: weights.pop("W_enc"))
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
