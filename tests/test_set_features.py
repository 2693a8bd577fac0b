"""SetFeatures: what is kept, what is changed and what is undone, against whole autoencoders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoders import FEATURES, KINDS, autoencoder, library, random_autoencoder
from helpers import refused_in_one_line
from operator_formulas import random_operator
from trimtab.reading.autoencoders import FeatureRows, load_features
from trimtab.steering.operators import Add, SetFeatures, apply

__all__ = ["autoencoder"]  # fixtures, which pytest finds by their names here

SOME = torch.tensor([3, 0, 17])


def _x(rows: int = 64, width: int = 48, seed: int = 5) -> Tensor:
    return 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double()


def _setting(rows: FeatureRows, mode: Any, level: Tensor | None = None) -> SetFeatures:
    operator = SetFeatures(*vars(rows).values(), mode, level)
    operator.check()
    return operator


def _gated(path: Path) -> Path:
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    about = SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post")
    sae = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=48, d_sae=FEATURES, metadata=about))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    sae.save_model(path)
    return path


# -- reading a few features as the library reads all of them --------------------------------------


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "unsubtracted", "gated"])
def test_rows_read_what_the_library_encodes(
    autoencoder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    if kind == "gated":
        path = _gated(tmp_path / "gated")
    elif kind == "unsubtracted":
        path = autoencoder("standard", apply_b_dec_to_input=False)
    else:
        path = autoencoder(kind)
    sae, x = library(path), _x(400)
    rows = load_features(str(path)).rows(SOME)
    lengths = sae.W_dec.detach().norm(dim=-1)[SOME]
    expected = (
        sae.encode(x.float())[:, SOME].detach() * lengths
    )  # the decoder's length moves into them
    found = _setting(rows, "scale").active(x.float())
    assert 0.05 < float((expected > 0).float().mean()) < 0.95
    assert torch.equal(found > 0, expected > 0)  # below its threshold a feature is 0, exactly
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.max())
    assert float((rows.decoder.norm(dim=-1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["topk", "topk_raw"])
def test_a_cutoff_stands_for_the_largest_of_all(
    autoencoder: Callable[..., Path], kind: str
) -> None:
    path = autoencoder(kind)
    sae, features, x = library(path), load_features(str(path)), _x(1).float()
    active = sae.encode(x).detach()
    least = float(active[active > 0].min())
    every = torch.arange(FEATURES)
    # Of the one activation whose least this is, all agree but the least, which is not above itself.
    found = _setting(features.rows(every, 0.999 * least), "scale").active(x)
    expected = active * features.decoder.norm(dim=-1)
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.max())
    refused_in_one_line(lambda: features.rows(every), "needs a cutoff")


def test_kinds_that_cannot_be_read_by_row_are_refused(autoencoder: Callable[..., Path]) -> None:
    rescaling = load_features(str(autoencoder("standard", normalize_activations="layer_norm")))
    refused_in_one_line(lambda: rescaling.rows(SOME), "rescales what it reads")
    plain = load_features(str(autoencoder("standard")))
    plain.sae.cfg.__class__ = type(  # a kind that is not known here
        "Other", (type(plain.sae.cfg),), {"architecture": classmethod(lambda cls: "temporal")}
    )
    refused_in_one_line(lambda: plain.rows(SOME), "of the kind temporal")


# -- the algebra ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:2])
def test_what_is_not_explained_is_kept(kind: str) -> None:
    """h + dec(f') - dec(f) with the whole autoencoder in float64 is the edit of two rows."""
    sae = random_autoencoder(kind, 48, "blocks.1.hook_resid_post", 0, dtype="float64").double()
    x, level = _x(), torch.tensor([1.5, 0.25, 4.0])
    lengths = sae.W_dec.detach().norm(dim=-1)
    threshold = getattr(sae, "threshold", torch.zeros(FEATURES).double()).detach()
    # Rows that are exact in float64, as the operator's arithmetic is; a file's are float32.
    operator = SetFeatures(
        (sae.W_enc.detach().T * lengths[:, None])[SOME],
        ((sae.b_enc - sae.b_dec @ sae.W_enc).detach() * lengths)[SOME],
        (threshold * lengths)[SOME],
        (sae.W_dec.detach() / lengths[:, None])[SOME],
        "clamp",
        level.double(),
    )
    with torch.no_grad():
        f = sae.encode(x)
        wanted = f.clone()
        wanted[:, SOME] = 0.7 * level.double() / lengths[SOME]
        expected = x + sae.decode(wanted) - sae.decode(f)
        changed = apply(operator, x, 0.7)
        error = x - sae.decode(f)
        kept = changed - sae.decode(wanted)
    assert float((changed - expected).abs().max()) < 1e-12
    assert float((kept - error).abs().max()) < 2e-13 * float(error.abs().max())
    assert float(error.abs().max()) > 1  # which dec(f') in the place of h would lose


def test_clamping_to_what_a_feature_is_changes_nothing() -> None:
    operator = replace(random_operator("features clamp", 3), level=torch.tensor([1.0, 0.0, 0.0]))
    x = _x(8, 12)
    first = SetFeatures(
        operator.encoder[:1], operator.bias[:1], operator.threshold[:1], operator.decoder[:1],
        "clamp", torch.ones(1),
    )  # fmt: skip
    f = first.active(x)
    assert 0 < int((f > 0).sum()) < len(x)
    assert torch.equal(apply(first, x, f[:, 0]), x)  # to the bit, each token at its own dial
    moved = apply(first, x, f[:, 0] + 0.5)
    assert torch.equal((moved != x).any(-1), torch.ones(len(x), dtype=torch.bool))


def test_adding_is_clamping_to_more() -> None:
    operator = random_operator("features clamp", 4)
    one = SetFeatures(
        operator.encoder[:1], operator.bias[:1], operator.threshold[:1], operator.decoder[:1],
        "clamp", torch.ones(1),
    )  # fmt: skip
    x = _x(16, 12)
    added = apply(Add(operator.decoder[0]), x, 1.0)
    clamped = apply(one, x, one.active(x)[:, 0] + 1)
    assert float((added - clamped).abs().max()) < 1e-14


def test_where_a_feature_is_large_enough_at_least_does_nothing() -> None:
    operator, x = random_operator("features at_least", 6), _x(40, 12)
    enough = (operator.active(x) >= 0.5 * operator.level).all(-1)
    changed = apply(operator, x, 0.5)
    assert enough.any()
    assert not enough.all()
    assert torch.equal((changed == x).all(-1), enough)
    assert torch.equal(apply(operator, x, -3.0), x)


def test_ablating_is_clamping_to_nothing_and_leaves_something_to_read() -> None:
    """One feature: what its encoder reads after f d is taken away is f (1 - <e, d>)."""
    clamp = random_operator("features clamp", 9)
    encoder, decoder = clamp.encoder[:1] / 6, clamp.decoder[:1]
    one = SetFeatures(encoder, torch.zeros(1), torch.zeros(1), decoder, "ablate")
    x = _x(64, 12)
    ablated, f = apply(one, x, 1.0), one.active(x)
    cleared = apply(SetFeatures(*vars(one).values()), x, 1.0)
    assert torch.equal(cleared, ablated)
    assert torch.equal(apply(replace(one, mode="clamp", level=torch.ones(1)), x, 0.0), ablated)
    assert torch.equal(apply(replace(one, mode="scale"), x, -1.0), ablated)
    left = f * (1 - float(encoder[0].double() @ decoder[0].double()))
    assert float((one.active(ablated) - torch.where(f > 0, left, 0.0)).abs().max()) < 1e-6
    again = apply(one, ablated, 1.0)
    assert float((again - ablated).abs().max()) > 0.01  # so that it is not idempotent


def test_a_half_precision_token_comes_back_as_it_was() -> None:
    x = _x(32, 12).bfloat16()
    for mode in ("at_least", "ablate", "scale"):
        operator = random_operator(f"features {mode}", 2)
        silent = (operator.active(x) == 0).all(-1)
        changed = apply(operator, x, 1.0)
        assert changed.dtype == torch.bfloat16
        if mode != "at_least":
            assert silent.any()
            assert torch.equal(changed[silent], x[silent])
        near = apply(operator, x.double(), 1.0)
        assert float((changed.double() - near).abs().max()) <= 2**-7 * float(near.abs().max())


def test_the_dial_has_its_derivative() -> None:
    operator, x = random_operator("features at_least", 6), _x(10, 12)
    for mode in ("clamp", "at_least", "ablate", "scale"):
        level = operator.level if mode in ("clamp", "at_least") else None
        one, dial = replace(operator, mode=mode, level=level), torch.tensor([[0.8]]).double()

        def steered(t: Tensor, one: Any = one) -> Tensor:
            return apply(one, x[None], t)

        _, slope = torch.func.jvp(steered, (dial,), (torch.ones_like(dial),))
        step = (steered(dial + 1e-6) - steered(dial - 1e-6)) / 2e-6
        assert float(step.abs().max()) > 0
        assert float((slope - step).abs().max()) < 1e-6


# -- what is refused ------------------------------------------------------------------------------

ROWS = dict.fromkeys(("encoder", "decoder"), torch.eye(2, 4)) | dict.fromkeys(
    ("bias", "threshold"), torch.zeros(2)
)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"encoder": torch.eye(3, 4)}, "encoder of shape [3, 4] and a decoder of shape [2, 4]"),
        ({"bias": torch.zeros(3)}, "a bias of shape [3], not [2]"),
        ({"mode": "clamp"}, "has no level, and mode clamp has one"),
        ({"level": torch.ones(2)}, "has a level, and mode scale has none"),
        ({"mode": "add"}, "known are clamp, at_least, ablate, scale"),
        ({"decoder": 2 * torch.eye(2, 4)}, "not of length 1"),
        ({"bias": torch.tensor([0.0, torch.inf])}, "NaN or infinity"),
        ({"threshold": torch.zeros(2).double()}, "torch.float64"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], says: str) -> None:
    fields: dict[str, Any] = {**ROWS, "mode": "scale", **given}
    refused_in_one_line(SetFeatures(**fields).check, re.escape(says))
