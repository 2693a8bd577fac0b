"""Random sparse autoencoders in sae-lens's format, and contrasts for the tiny models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model
from trimtab.contrasts import Contrast
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

#: Features and units of the tiny autoencoders; the models have 48 units, and OLMo 2 has 64.
FEATURES = 40
KINDS = ("standard", "jumprelu", "topk", "topk_raw")


@functools.cache
def tiny_lm(name: str = "llama") -> tt.LanguageModel:
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
        random_autoencoder(kind, width, hook, seed, **options).save_model(directory)
        return directory

    return make


def random_autoencoder(kind: str, width: int, hook: Any, seed: int, **options: Any) -> Any:
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


def library(path: Path) -> Any:
    """The autoencoder as sae-lens reads it."""
    from sae_lens import SAE

    return SAE.load_from_disk(path, dtype="float32")


def vector_of(steering: tt.Steering) -> Tensor:
    (intervention,) = steering.interventions
    operator: Any = intervention.operator
    assert type(operator) is Add
    vector: Tensor = operator.vector
    return vector


def with_weights(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the weights' file."""
    from safetensors.torch import load_file, save_file

    file = path / "sae_weights.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(weights)
    file.unlink()
    save_file(weights, file)
    return path
