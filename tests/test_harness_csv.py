"""lm-eval's tables of features: its own reader finds in them what is added here, and what it reads
is what acts here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trimtab as tt
from autoencoders import CONTRAST, FEATURES, library, tiny_lm
from autoencoders import autoencoder as autoencoder
from exchanged import imported, logits, what
from helpers import refused_in_one_line
from trimtab.steering import Clamp

sae_lens = pytest.importorskip("sae_lens")
hf_steered = pytest.importorskip("lm_eval.models.hf_steered")

RELEASE, NAMES = "tiny-release", ("layer_1", "layer_2")
HEAD = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id"


@pytest.fixture
def released(autoencoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens knows a release of two autoencoders; nothing is fetched."""
    from sae_lens.loading import pretrained_saes_directory

    paths = {
        name: autoencoder("jumprelu", hook=f"blocks.{layer}.hook_resid_post", seed=layer)
        for layer, name in enumerate(NAMES, 1)
    }
    known = {RELEASE: SimpleNamespace(saes_map=dict.fromkeys(NAMES), conversion_func=None)}
    monkeypatch.setattr(pretrained_saes_directory, "get_pretrained_saes_directory", lambda: known)

    def pretrained(release: str, sae_id: str, **options: Any) -> Any:
        assert release == RELEASE
        return library(paths[sae_id])

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", staticmethod(pretrained))


@pytest.fixture
def steering(released: None) -> tt.Steering:
    method = tt.SAE(sae=f"{RELEASE}:layer_1", features=7, a_max=2.5, strength=1)
    return method.fit(tiny_lm(), CONTRAST, measure=False)


def table(path: Path, *rows: str, head: str = HEAD) -> Path:
    path.write_text("\n".join((head, *rows)) + "\n")
    return path


def derived(path: Path) -> dict[str, Any]:
    """What lm-eval's own reader makes of a table."""
    with pytest.warns(DeprecationWarning, match="Indexing SAE objects"):
        found: dict[str, Any] = hf_steered.SteeredModel.derive_steer_config(str(path))
    return found


def test_lm_evals_reader_finds_what_is_added(steering: tt.Steering, tmp_path: Path) -> None:
    lm, path = tiny_lm(), tmp_path / "x.csv"
    with pytest.warns(tt.TrimtabWarning, match="refuses the rows of a .csv that add"):
        done = tt.export(lm, steering.at(3), "lm-eval", path)
    assert done.files == (path,)
    ((hook, found),) = derived(path).items()
    assert (hook, found["action"]) == ("layers.1", "add")
    added = found["steering_coefficient"] * found["steering_vector"]
    expected = what(steering.at(3))["layers.1.resid"]
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-6)
    assert expected.norm() > 1
    # And there and back.
    back = imported(path, lm)
    torch.testing.assert_close(what(back)["layers.1.resid"], expected, rtol=1e-5, atol=1e-6)


def test_both_read_a_table_alike(released: None, tmp_path: Path) -> None:
    lm = tiny_lm()
    path = table(
        tmp_path / "x.csv",
        f"sae_lens,clamp,{RELEASE},layers.1,30,2.5,,layer_1",
        f"sae_lens,clamp,{RELEASE},layers.2,4,-1.0,,layer_2",
    )
    found, steering = derived(path), imported(path, lm)
    assert all(isinstance(each.operator, Clamp) for each in steering.interventions)
    hooks = {}
    for hook, each in found.items():
        direction = each["steering_vector"] / each["steering_vector"].norm()
        hooks[hook] = lambda acts, d=direction, e=each: hf_steered.SteeredModel.clamp(
            acts, d, e["steering_coefficient"], None, e["bias"]
        )
    ids = torch.tensor([[5, 60, 90, 20, 7]])
    with torch.no_grad(), hf_steered.steer(lm.model, hooks):
        theirs = lm.model(ids).logits
    with torch.no_grad(), lm.steered(steering):
        ours = lm.model(ids).logits
    with torch.no_grad():
        assert (theirs - lm.model(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_that_adds(released: None, tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", f"sae_lens,add,{RELEASE},layers.2,4,10.0,,layer_2")
    (found,) = derived(path).values()
    steering = imported(path, tiny_lm())
    expected = (10 * found["steering_vector"]).detach()
    torch.testing.assert_close(what(steering)["layers.2.resid"], expected, rtol=1e-6, atol=1e-6)
    assert steering.dial.default == 10
    assert not torch.equal(logits(tiny_lm(), steering), logits(tiny_lm()))


def test_what_a_table_may_not_say(released: None, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    good = f"sae_lens,add,{RELEASE},layers.1,30,10.0,,layer_1"
    bad = {
        "its loader is sparsify": good.replace("sae_lens", "sparsify"),
        "derive_steer_config": good.replace("sae_lens", ""),
        "no release": good.replace(RELEASE, "someone/repository"),
        "no release tiny-release with": good.replace("layer_1", "../../etc"),
        "has no hookpoint": good.replace("layers.1", ""),
        "is no module": good.replace("layers.1", "layers.77"),
        f"has 0 to {FEATURES - 1}": good.replace("30", "40"),
        "feature_index is -1": good.replace("30", "-1"),
        "no number": good.replace("10.0", "much"),
        "is NaN": good.replace("10.0", "nan"),
        "for one head": good.replace("10.0,", "10.0,2"),
        "not add or clamp": good.replace("add", "multiply"),
        "is for layers.1 again": f"{good}\n{good}",
        "more or fewer entries": f"{good},1",
    }
    for says, rows in bad.items():
        table(path, rows)
        refused_in_one_line(lambda: imported(path, tiny_lm()), says)
    table(path, "layers.1,3", head="hookpoint,feature_index")
    refused_in_one_line(lambda: imported(path, tiny_lm()), "has no column sparse_model")
    table(path)
    refused_in_one_line(lambda: imported(path, tiny_lm()), "has 0 rows")


def test_what_a_table_cannot_name(
    steering: tt.Steering, autoencoder: Callable[..., Path], tmp_path: Path
) -> None:
    lm, path = tiny_lm(), tmp_path / "x.csv"

    def refused(one: Any, says: str) -> None:
        refused_in_one_line(lambda: tt.export(lm, one, "lm-eval", path), says)
        assert not path.exists()

    def fitted(**options: Any) -> tt.Steering:
        options = {"sae": f"{RELEASE}:layer_1", "features": 7, "a_max": 2.5, **options}
        return tt.SAE(strength=1, **options).fit(lm, CONTRAST, measure=False)

    refused(tt.CAA(layer=1).fit(lm, CONTRAST, measure=False), "caa is no addition of a feature")
    refused(fitted(features=(7, 8), a_max=(2.0, 1.0)), "adds 2 features")
    refused(fitted(sae=str(autoencoder("jumprelu"))), "no RELEASE:ID")
    refused(tt.Steerings((steering, fitted(features=9))), "two features act at one site")
    # Of a clamp there is no vector; lm-eval's reads no encoder.
    refused(fitted(do="clamp"), "adds no vector")
    other = copy.deepcopy(steering)
    other.tables["feature"][0] = 8
    refused(other, "not the row of feature 8")
