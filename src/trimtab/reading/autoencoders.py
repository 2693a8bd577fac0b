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
from trimtab.model import LanguageModel

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

#: Kinds whose features each read an activation by themselves, as sae-lens calls them; and those of
#: which so many of all features are active, which is known only where all of them are read.
_BY_ROW = ("standard", "jumprelu", "gated")
_BY_RANK = ("topk",)
#: How many autoencoders are kept in memory.
_KEPT = 8

#: What reading damaged files may raise: sae-lens checks little itself.
_BAD_FILES = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError
)  # fmt: skip


@dataclass(frozen=True)
class Features:
    """Reads a residual stream as the features of a sparse autoencoder; `name` tells it from others.

    `decoder` [features, units] on the CPU: what a feature adds to the stream at activation 1.
    `source` is what it was loaded from.
    """

    name: str
    site: str
    sae: Any = field(compare=False, repr=False)
    decoder: Tensor = field(compare=False, repr=False)
    source: str = field(default="", compare=False)

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

    def check_plain(self) -> None:
        """Refuse one that rescales what it reads."""
        if not self.plain:
            raise TrimtabError(
                f"the autoencoder {self.source!r} rescales what it reads (normalize_activations "
                f"{self.sae.cfg.normalize_activations}), so that what a feature adds is not its "
                "activation times its decoder's row: take one that reads activations as they are"
            )

    def check_by_row(self) -> None:
        """Refuse a kind whose features cannot be read one by one."""
        kind = self.sae.cfg.architecture()
        if kind not in (*_BY_ROW, *_BY_RANK):
            raise TrimtabError(
                f"the autoencoder {self.source!r} is of the kind {kind}, whose features cannot be "
                f"read one by one (known are {', '.join((*_BY_ROW, *_BY_RANK))}): only add works"
            )

    @property
    def by_rank(self) -> bool:
        """Whether a feature is active where it is among the k largest (TopK), so that no feature
        can be read without all the others."""
        return self.sae.cfg.architecture() in _BY_RANK

    def rows(self, which: Tensor, cutoff: float | None = None) -> FeatureRows:
        """Some features, by number [k], as each can be read without the others, measured along
        decoder rows of length 1.

        Of an autoencoder that is `by_rank` a `cutoff` stands for the k-th largest activation: a
        feature above it is taken for one of them. Raises TrimtabError where features cannot be
        read row by row.
        """
        self.check_plain()
        self.check_by_row()
        sae, kind = self.sae, self.sae.cfg.architecture()
        if self.by_rank and cutoff is None:
            raise TrimtabError(f"the autoencoder {self.source!r} is {kind}: it needs a cutoff")
        decoder = self.decoder[which].double()
        lengths = decoder.norm(dim=-1)
        if not bool((lengths > 0).all()):
            dead = int(which[lengths == 0][0])
            raise TrimtabError(
                f"feature {dead} of the autoencoder {self.source!r} is dead: its decoder row is 0"
            )

        def of_rows(name: str) -> Tensor:
            weight: Tensor = getattr(sae, name).detach().cpu()
            return weight[which].double()

        encoder = sae.W_enc.detach().cpu()[:, which].double().T
        along = encoder @ (sae.b_dec.detach().cpu().double() * float(sae.cfg.apply_b_dec_to_input))
        larger, threshold = torch.ones_like(lengths), torch.zeros_like(lengths)
        if kind == "gated":
            # Active where e'x + b_gate > 0, and then exp(r) e'x + b_mag: a JumpReLU.
            larger, bias = of_rows("r_mag").exp(), of_rows("b_mag")
            threshold = bias - larger * of_rows("b_gate")
        else:
            bias = of_rows("b_enc")
        if kind == "jumprelu":
            threshold = of_rows("threshold")
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            larger = of_rows("W_dec").norm(dim=-1)
            bias = larger * bias
        if self.by_rank:
            threshold = torch.full_like(bias, cutoff or 0.0)
        return FeatureRows(
            # In the order in which a file holds it: products round by where numbers lie.
            encoder=((lengths * larger)[:, None] * encoder).float().contiguous(),
            bias=(lengths * (bias - larger * along)).float(),
            threshold=(lengths * threshold).float(),
            decoder=(decoder / lengths[:, None]).float().contiguous(),
        )


@dataclass(frozen=True)
class FeatureRows:
    """Some features of an autoencoder: f(x) = encoder x + bias where that is above threshold and
    above 0, else 0; each adds f times its decoder row, of length 1, to the stream. encoder and
    decoder [k, units], bias and threshold [k], float32."""

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor


@dataclass(frozen=True)
class Cutoff:
    """Reads the least activation that is still among the k largest of an autoencoder of that
    kind, one number."""

    features: Features

    width = 1

    @property
    def name(self) -> str:
        return f"{self.features.name}.cutoff"

    def __call__(self, activation: Tensor) -> Tensor:
        active = self.features(activation)
        return active.topk(int(self.features.sae.cfg.k), dim=-1).values[..., -1:]


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


def features_for(method: str, source: str, language_model: LanguageModel) -> Features:
    """An autoencoder that fits a model; `method` is who asks."""
    features = load_features(source)
    width = language_model.anatomy.width(features.site)  # refuses a layer out of range
    if features.decoder.shape[1] != width:
        raise TrimtabError(
            f"{method}: the autoencoder reads {features.decoder.shape[1]} units, {features.site} "
            f"of {language_model.name} has {width}: it was made for another model"
        )
    return features


def is_release(release: str, name: str) -> bool:
    """Whether SAELens has an autoencoder of this name in its list of releases."""
    try:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError as error:
        raise _no_extra(error) from error
    known = get_pretrained_saes_directory().get(release)
    return known is not None and name in known.saes_map


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


@lru_cache(maxsize=_KEPT)
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
    return Features(f"sae{digest.hexdigest()[:12]}", _site(sae, source), sae, decoder, source)


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
        raise _no_extra(error) from error
    with warnings.catch_warnings():
        # load_features says it in one line.
        warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        return _read(source, SAE, get_conversion_loader_name)


def _no_extra(error: ImportError) -> TrimtabError:
    return TrimtabError(f"autoencoders need the extra sae: pip install 'trimtab[sae]' ({error})")


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
            f"the autoencoder {source!r} reads {hook}: steering by features needs one of the "
            "residual stream, blocks.N.hook_resid_post or hook_resid_pre"
        )
    block = int(match[1]) - (match[2] == "pre")
    return "embed" if block < 0 else f"layers.{block}.resid"
