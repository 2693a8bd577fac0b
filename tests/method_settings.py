"""Every method with settings for each kind of site and of operator that it can make.

`SETTINGS` says what to expect of a steering; the two conformance suites run all of it, on the
architectures of `tiny` and of `tiny_curated`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import trimtab as tt
from tiny import TINY
from trimtab.contrasts import Pair, Text
from trimtab.fitting.method import Method
from trimtab.methods import METHODS

PAIRS = [
    ("Today I feel", " happy and light.", " sad."),
    ("The answer to the question is", " yes", " not known"),
    ("I think that this film was", " wonderful.", " boring and long."),
    ("She said that the day was", " good", " bad"),
    ("The captain stood at the wheel and", " sang.", " slept."),
    ("It is", " true", " false"),
    ("The king had three daughters, and they were", " kind", " old"),
    ("When the rain came, the children", " ran into the house", " cried"),
    ("What is the best way to learn a language?", " Read and speak.", " I do not know."),
]
#: The last three are for what a method chooses itself.
PAIRED = tt.Contrast(
    tuple(
        Pair(*pair, part="validation" if number > 5 else "train")
        for number, pair in enumerate(PAIRS)
    ),
    "pairs",
)
UNPAIRED = tt.Contrast(
    tuple(
        Text(prompt + answer, label, part="validation" if number > 5 else "train")
        for number, (prompt, *answers) in enumerate(PAIRS)
        for answer, label in zip(answers, ("positive", "negative"), strict=True)
    ),
    "texts",
)

EVERY = frozenset(TINY)
NONE: frozenset[str] = frozenset()
#: A norm stands between a branch and the residual stream.
POST_NORM = frozenset({"gemma2", "gemma3", "olmo2"})
#: Their FFN can be given a bias, as its own (GPT-2), by configuration, or by becoming a Llama.
FFN_BIAS = frozenset({"llama", "mistral", "qwen2", "gpt2"})
#: Of the attention's output projection only Phi-3's cannot.
ATTENTION_BIAS = EVERY - {"phi3"}


@dataclass(frozen=True)
class Setting:
    """A method with its options, and what is to be expected of it."""

    make: Callable[[tt.LanguageModel], Method]
    bakes: frozenset[str] | None  # the architectures whose weights can take it; None: any or none
    reason: str = ""  # what the refusal says elsewhere
    contrast: tt.Contrast = PAIRED
    identity: float | None = 0.0  # the dial at which it does nothing


def _always(method: Method, *rest: Any, **more: Any) -> Setting:
    return Setting(lambda lm: method, *rest, **more)


#: Weights over depth, of which some are nothing.
_KERNELS: dict[str, Any] = {
    "attn_max": 1.2, "attn_position": 1.0, "attn_min": 0.5, "attn_distance": 1.0,
    "ffn_max": 0.9, "ffn_position": 2.0, "ffn_min": 0.0, "ffn_distance": 1.5,
}  # fmt: skip
_NO_FFN_BIAS = "no bias|cannot be given one|a norm stands between"
_POST = "a norm writes it straight into the residual stream"
_STREAM = "divide by its length"

#: Every method, with settings for each kind of site and of operator that it can make.
SETTINGS: dict[str, dict[str, Setting]] = {
    "actadd": {
        "one pair": _always(tt.ActAdd(alpha=2), FFN_BIAS, _NO_FFN_BIAS),
        "texts": _always(
            tt.ActAdd(layer=-1, pairs=3, token=-2), FFN_BIAS, _NO_FFN_BIAS, contrast=UNPAIRED
        ),
    },
    "caa": {
        "answer": _always(tt.CAA(layer=0, token="answer"), FFN_BIAS, _NO_FFN_BIAS),
        "layers": _always(
            tt.CAA(layer=(0, 2), variant="pca", token="last"), FFN_BIAS, _NO_FFN_BIAS
        ),
        "validation": _always(
            tt.CAA(layer="validation", alpha=2, token="last"), FFN_BIAS, _NO_FFN_BIAS
        ),
        "effect": _always(tt.CAA(layer="effect", token="answer"), FFN_BIAS, _NO_FFN_BIAS),
        "chance": _always(tt.CAA(layer=1, variant="random", draw=1), FFN_BIAS, _NO_FFN_BIAS),
        "last": _always(tt.CAA(alpha=-1, positions="last", token="last"), NONE, "the scope 'last'"),
    },
    "act": {
        "line": _always(tt.AcT(strength=0.7), ATTENTION_BIAS, "takes no bias|no bias at"),
        "at once": _always(
            tt.AcT(site="ffn_out", causal=False, layer=(0, 2)), FFN_BIAS, _NO_FFN_BIAS
        ),
        "one": _always(
            tt.AcT(site="ffn_out", slope="one", token="answer", layer=1), FFN_BIAS, _NO_FFN_BIAS
        ),
        "support": _always(tt.AcT(site="resid", support=True), NONE, "inside of an interval"),
    },
    "alphasteer": {
        "resid": _always(tt.AlphaSteer("builtin:facts", layer=1, strength=2), NONE, _STREAM),
        "ffn_out": _always(
            tt.AlphaSteer("builtin:facts", layer=(0, 2), site="ffn_out", ridge=0.1), EVERY
        ),
    },
    "probe": {
        "validation": _always(tt.Probe(alpha=2), FFN_BIAS, _NO_FFN_BIAS),
        "clamp": _always(
            tt.Probe(layer=1, read="logistic", operator="clamp"), NONE, "stops at a bound"
        ),
        "ablate": _always(
            tt.Probe("ffn_out", layer=(1, 2), read="mean", steer="lat", operator="ablate"), EVERY
        ),
    },
    "ssv": {
        "resid": _always(tt.SSV(layer=1, steps=3, alpha=1), FFN_BIAS, _NO_FFN_BIAS),
    },
    "bipo": {
        "ffn_out": _always(
            tt.BiPO(layer=(0, 2), site="ffn_out", steps=3, alpha=2), FFN_BIAS, _NO_FFN_BIAS
        ),
    },
    "reps": {
        "attn_out": _always(
            tt.RePS(layer=1, site="attn_out", steps=3), ATTENTION_BIAS, "takes no bias|no bias at"
        ),
        "suppress": _always(
            tt.RePS(layer=1, steps=3, use="suppress", alpha=1), NONE, "stops at a bound"
        ),
    },
    "reft": {"resid": _always(tt.ReFT(layer=1, steps=3), FFN_BIAS, _NO_FFN_BIAS)},
    "loreft": {
        "ends": _always(tt.LoReFT(layer=(0, 2), rank=2, steps=3), NONE, "the scope 'prompt"),
        "ffn_out": _always(
            tt.LoReFT(layer=1, rank=2, steps=3, site="ffn_out", positions="all", bias=False), EVERY
        ),
    },
    "psr": {
        "blocks": _always(
            tt.PSR(ask="Be glad.", steps=3, learning_rate=0.03), NONE, "the scope 'last'"
        )
    },
    "steermoe": {},  # for mixtures only: see test_steermoe.py
    "iti": {
        "mean": _always(tt.ITI(k=4, alpha=4), ATTENTION_BIAS, "takes no bias|no bias at"),
        "effect": _always(
            tt.ITI(k=4, alpha=4, locate="effect"), ATTENTION_BIAS, "takes no bias|no bias at"
        ),
        "last": _always(
            tt.ITI(k=3, direction="probe", scale=False, positions="last"), NONE, "the scope 'last'"
        ),
    },
    "sadi": {
        "head": _always(tt.SADI(k=3), EVERY),
        "neuron": _always(tt.SADI("neuron", k=40, delta=2), EVERY),
        "effect": _always(tt.SADI(k=3, locate="effect"), EVERY),
    },
    "sta": {
        "autoencoder": Setting(
            lambda lm: tt.STA(sae=_autoencoder(lm.anatomy.hidden_size)),
            FFN_BIAS,
            _NO_FFN_BIAS,
        ),
    },
    "sae": {
        "add": Setting(
            lambda lm: tt.SAE(_autoencoder(lm.anatomy.hidden_size), k=3), FFN_BIAS, _NO_FFN_BIAS
        ),
        "clamp": Setting(
            lambda lm: tt.SAE(
                _autoencoder(lm.anatomy.hidden_size), k=2, do="clamp", positions="all"
            ),
            NONE,
            "reads features of an autoencoder",
            identity=None,
        ),
        "scale": Setting(
            lambda lm: tt.SAE(
                _autoencoder(lm.anatomy.hidden_size), k=50, do="scale", strength=5, positions="all"
            ),
            NONE,
            "reads features of an autoencoder",
        ),
    },
    "ablation": {
        "writers": _always(tt.Ablation(layer=1), EVERY - POST_NORM, _POST),
        "norms": _always(tt.Ablation(layer=2, where="norms", amount=-1), EVERY),
        "layer": _always(tt.Ablation(layer=1, where="layer"), NONE, _STREAM),
        "embed": _always(tt.Ablation(layer=0, where="layer", amount=0.5), EVERY),
        "validation": _always(
            tt.Ablation(kl=100, depth=1, tokens=(-1, -2, -3)), EVERY - POST_NORM, _POST
        ),
        "kernels": _always(
            tt.Ablation(layer=1.5, project="biprojected", winsorise=0.95, **_KERNELS),
            EVERY - POST_NORM,
            _POST,
        ),
        "several": _always(
            tt.Ablation(layer=2, directions=3, basis="som", compose=True), EVERY - POST_NORM, _POST
        ),
        "cleaned": _always(
            tt.Ablation(layer=2, spare="builtin:facts", spare_groups=3), EVERY - POST_NORM, _POST
        ),
    },
    "sas": {
        "input": _always(tt.SAS(theta=30), NONE, "absolute angle", identity=None),
        "post norms": _always(
            tt.SAS(theta=-70, ss_compat=True), NONE, "absolute angle", identity=None
        ),
    },
    "aas": {
        "output": _always(
            tt.AAS(theta=120, candidates="output"), NONE, "absolute angle", identity=None
        ),
    },
    "ss": {
        "sites": _always(tt.SS(theta=50, whole_blocks=False), EVERY),
        "post norms": _always(
            tt.SS(theta=-40, whole_blocks=False, ss_compat=True, selection="norm"),
            EVERY - POST_NORM,
            _POST,
        ),
        "prompt": _always(
            tt.SS(theta=180, whole_blocks=False, positions="prompt"), NONE, "the scope 'prompt'"
        ),
    },
    "austeer": {
        "ffn_out": _always(tt.AUSteer(k=12, alpha=4, site="ffn_out", direction="paper"), EVERY),
        "heads": _always(tt.AUSteer("heads", k=20, alpha=3, direction="signed"), EVERY),
        "ffn_in": _always(
            tt.AUSteer("ffn_in", k=30, alpha=3, clamp_sign=True, direction="paper"), EVERY
        ),
        "resid": _always(tt.AUSteer("resid", k=6, alpha=2, direction="paper"), NONE, _STREAM),
        "absolute": _always(
            tt.AUSteer(k=12, change="absolute", alpha=2, site="ffn_out", direction="paper"),
            NONE,
            "multiple of |x|",
        ),
        "vector": _always(
            tt.AUSteer(k=40, change="vector", site="ffn_out", direction="paper"),
            FFN_BIAS,
            _NO_FFN_BIAS,
        ),
        "effect heads": _always(tt.AUSteer("heads", k=20, alpha=2, locate="effect"), EVERY),
        "effect attn_out": _always(
            tt.AUSteer("attn_out", k=20, alpha=20, locate="effect_per_nat"), EVERY
        ),
        "effect ffn_in": _always(
            tt.AUSteer("ffn_in", k=30, alpha=20, locate="effect_per_nat", strength="fixed"), EVERY
        ),
        "effect ffn_out": _always(
            tt.AUSteer("ffn_out", k=12, alpha=2, locate="effect", per_token=True), EVERY
        ),
        "effect resid": _always(
            tt.AUSteer("resid", k=6, alpha=2, locate="effect", first_token=False), NONE, _STREAM
        ),
    },
}

for _name, _method in METHODS.items():
    SETTINGS.setdefault(_name, {"default": Setting(lambda lm, made=_method: made(), None)})

CASES = [f"{method}: {name}" for method, own in SETTINGS.items() for name in own]


def setting_of(case: str) -> Setting:
    method, _, name = case.partition(": ")
    if method == "sta":
        pytest.importorskip("sae_lens")
    return SETTINGS[method][name]


#: Kept, because they are deleted when nobody holds them.
_ROOMS: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _autoencoder(width: int) -> str:
    """A random sparse autoencoder of the stream after block 1, in a directory of its own."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post")
    config = TopKTrainingSAEConfig(
        d_in=width, d_sae=200, k=20, dtype="float32", device="cpu", metadata=metadata
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = TopKTrainingSAE(config)
    room = tempfile.TemporaryDirectory()
    _ROOMS.append(room)
    autoencoder.save_inference_model(room.name)
    return room.name
