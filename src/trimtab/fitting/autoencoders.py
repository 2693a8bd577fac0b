"""Sparse autoencoders in the SAELens format, loaded through the sae-lens library (extra `sae`).

One is named by a local directory (cfg.json and sae_weights.safetensors) or as RELEASE:ID, as in
`gemma-scope-2-270m-pt-res:layer_12_width_16k_l0_big`. It must belong to the residual stream.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from trimtab.errors import TrimtabError, TrimtabWarning, first_line
from trimtab.files import user_path

#: Loaders of sae-lens that read safetensors, npz without pickles, JSON and YAML only. The others
#: unpickle, which trimtab never does.
_SAFE_LOADERS = (
    "sae_lens", "gemma_2", "gemma_3", "llama_scope", "llama_scope_r1_distill", "sparsify",
    "temporal",
)  # fmt: skip

#: The files of a local directory.
_FILES = ("cfg.json", "sae_weights.safetensors")
#: Parts of the configuration that do not change what the features are.
_NOT_FEATURES = ("device", "dtype", "metadata")

#: What reading damaged files may raise: sae-lens checks little itself.
_BAD_FILES = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError
)  # fmt: skip


@dataclass(frozen=True)
class Features:
    """Reads a residual stream as the features of a sparse autoencoder; `name` tells it from others.

    `decoder` [features, units] on the CPU: what a feature adds to the stream at activation 1.
    """

    name: str
    site: str
    sae: Any = field(compare=False, repr=False)
    decoder: Tensor = field(compare=False, repr=False)

    @property
    def width(self) -> int:
        return int(self.decoder.shape[0])

    @property
    def plain(self) -> bool:
        """Whether it reads activations as they are, so that a feature adds its decoder's row times
        its activation to the stream."""
        return bool(self.sae.cfg.normalize_activations == "none")

    def __call__(self, activation: Tensor) -> Tensor:
        """Activations of the features, [..., features] in float32."""
        encoded: Tensor = self.sae.to(activation.device).encode(activation.float())
        return encoded.float()


@dataclass(frozen=True)
class FeatureEffects:
    """Reads the effect of scaling what each feature adds to the stream: its activation times its
    decoder's row. A feature that is off has none."""

    features: Features

    @property
    def name(self) -> str:
        return f"{self.features.name}.effects"

    @property
    def width(self) -> int:
        return self.features.width

    def __call__(self, activation: Tensor, gradient: Tensor) -> Tensor:
        active = self.features(activation).to(gradient)
        return active * (gradient @ self.features.decoder.to(gradient).T)


def load_features(source: str) -> Features:
    """Load and check an autoencoder; raises TrimtabError with the reason if it cannot be used.

    The last ones are kept in memory; a directory whose files have changed is read again.
    """
    return _load_features(source, _stamp(source))


def _stamp(source: str) -> tuple[Any, ...]:
    """Where the files of a local directory are and when they were written."""
    stamp = []
    for name in _FILES:
        path = user_path(source).absolute() / name
        try:
            status = path.stat()
        except OSError:
            continue
        times = (status.st_mtime_ns, status.st_ctime_ns)
        stamp.append((str(path), status.st_ino, status.st_size, *times))
    return tuple(stamp)


@lru_cache(maxsize=2)
def _load_features(source: str, stamp: tuple[Any, ...]) -> Features:
    try:
        sae = _load(source)
        # Damage that shows only in use shows here.
        sae.encode(torch.zeros(1, int(sae.cfg.d_in)))
    except TrimtabError:
        raise
    except _BAD_FILES as error:
        reason = first_line(error)
        raise TrimtabError(
            f"cannot load the autoencoder {source!r}: {type(error).__name__}: {reason} (a "
            "directory with cfg.json and sae_weights.safetensors, or RELEASE:ID)"
        ) from error
    sae.eval().requires_grad_(False)
    if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise TrimtabError(
            f"the autoencoder {source!r} expects activations that were rescaled beforehand "
            f"({sae.cfg.normalize_activations}): fold the scale into its weights and save it again"
        )
    if getattr(sae.cfg.metadata, "model_from_pretrained_kwargs", None):
        warnings.warn(
            f"the autoencoder {source!r} was trained on a model with rewritten weights "
            f"({sae.cfg.metadata.model_from_pretrained_kwargs}): its features may be off",
            TrimtabWarning,
            stacklevel=2,
        )
    about = {key: value for key, value in sae.cfg.to_dict().items() if key not in _NOT_FEATURES}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        if not torch.isfinite(tensor).all():
            raise TrimtabError(f"the autoencoder {source!r} holds NaN or infinity in {name}")
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    decoder = sae.W_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # Its activations are measured along decoder rows of length 1; a dead feature's row is 0.
        decoder = torch.nn.functional.normalize(decoder, dim=-1)
    return Features(f"sae{digest.hexdigest()[:12]}", _site(sae, source), sae, decoder)


def _load(source: str) -> Any:
    try:
        from transformers.utils import logging

        level = logging.get_verbosity()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from sae_lens import SAE
            from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name
        logging.set_verbosity(level)  # a library that sae-lens imports turns it down
    except ImportError as error:
        raise TrimtabError(
            f"autoencoders need the extra sae: pip install 'trimtab[sae]' ({error})"
        ) from error
    with warnings.catch_warnings():
        # load_features says it in one line.
        warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        return _read(source, SAE, get_conversion_loader_name)


def _read(source: str, SAE: Any, get_conversion_loader_name: Any) -> Any:
    path = user_path(source)
    if path.exists() or ":" not in source:
        return SAE.load_from_disk(path, dtype="float32")
    release, _, name = source.partition(":")
    loader = get_conversion_loader_name(release)
    if loader not in _SAFE_LOADERS:
        raise TrimtabError(
            f"the release {release!r} comes as pickled files or is no autoencoder of one site "
            f"({loader}): trimtab does not read it"
        )
    return SAE.from_pretrained(release, name, dtype="float32")


def _site(sae: Any, source: str) -> str:
    """Where the stream that it reads is, as a site."""
    hook = str(getattr(sae.cfg.metadata, "hook_name", None))
    match = re.fullmatch(r"blocks\.([0-9]{1,5})\.hook_resid_(post|pre)", hook)
    elsewhere = getattr(sae.cfg.metadata, "hook_name_out", None)
    if match is None or elsewhere or "transcoder" in sae.cfg.architecture():
        raise TrimtabError(
            f"the autoencoder {source!r} reads {hook}: STA needs one of the residual stream, "
            "blocks.N.hook_resid_post or hook_resid_pre"
        )
    block = int(match[1]) - (match[2] == "pre")
    return "embed" if block < 0 else f"layers.{block}.resid"
