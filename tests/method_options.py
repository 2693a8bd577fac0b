"""Every option of every method, as a command line has it and as the method takes it."""

from __future__ import annotations

from typing import Any

#: Those of every trained method.
TRAINED: dict[str, list[tuple[str, Any]]] = {
    "layer": [("2", 2), ("1,3-4", (1, 3, 4))],
    "site": [("ffn_out", "ffn_out")],
    "alpha": [("2", 2.0)],
    "positions": [("last", "last")],
    "preset": [("paper", "paper")],
    "steps": [("7", 7)],
    "minutes": [("0.5", 0.5)],
    "learning_rate": [("0.1", 0.1)],
    "batch": [("3", 3)],
    "patience": [("0", 0)],
    "seed": [("5", 5)],
}

#: The numbers of ablation's two kernels.
KERNELS = [f"{p}_{n}" for p in ("attn", "ffn") for n in ("max", "position", "min", "distance")]
#: Of every method every option: how it is written, and the value that the method gets.
OPTIONS: dict[str, dict[str, list[tuple[str, Any]]]] = {
    "actadd": {
        "layer": [("2", 2), ("-1", -1)],
        "alpha": [("-2.5", -2.5)],
        "pairs": [("3", 3)],
        "token": [("last", "last"), ("-2", -2)],
        "positions": [("prompt", "prompt")],
    },
    "caa": {
        "layer": [("12", 12), ("-1", -1), ("10-14", (10, 11, 12, 13, 14)), ("3,-2", (3, -2)),
                  ("validation", "validation"), ("effect", "effect")],
        "alpha": [("2", 2.0)],
        "token": [("mean", "mean"), ("answer", "answer"), ("-2", -2)],
        "variant": [("pca", "pca"), ("random", "random")],
        "draw": [("3", 3)],
        "unit_norm": [("yes", True), ("no", False)],
        "positions": [("last", "last")],
    },
    "act": {
        "site": [("ffn_out", "ffn_out")],
        "layer": [("2", 2), ("1,3-4", (1, 3, 4))],
        "strength": [("0.5", 0.5)],
        "slope": [("one", "one")],
        "causal": [("no", False), ("yes", True)],
        "support": [("yes", True)],
        "shrink": [("yes", True)],
        "token": [("answer", "answer")],
        "positions": [("last", "last")],
    },
    "alphasteer": {
        "protect": [("texts.txt", "texts.txt")],
        "layer": [("2", 2), ("1,3-4", (1, 3, 4))],
        "site": [("ffn_out", "ffn_out")],
        "strength": [("0.5", 0.5)],
        "where": [("negative", "negative")],
        "share": [("0.25", 0.25)],
        "ridge": [("3", 3.0)],
        "positions": [("last", "last")],
    },
    "probe": {
        "site": [("heads", "heads")],
        "layer": [("2", 2), ("1,3-4", (1, 3, 4))],
        "read": [("logistic", "logistic"), ("lat", "lat")],
        "steer": [("lda", "lda")],
        "operator": [("clamp", "clamp"), ("ablate", "ablate")],
        "length": [("sigma", "sigma")],
        "alpha": [("2", 2.0)],
        "bound": [("ceiling", "ceiling"), ("both", "both")],
        "quantile": [("0.1", 0.1)],
        "token": [("mean", "mean"), ("-2", -2)],
        "l2": [("100", 100.0)],
        "shrinkage": [("0.5", 0.5)],
        "centred": [("no", False), ("yes", True)],
        "seed": [("3", 3)],
        "positions": [("last", "last")],
    },
    "ssv": TRAINED,
    "bipo": {**TRAINED, "beta": [("0.2", 0.2)]},
    "reft": {**TRAINED, "top": [("3", 3)], "penalty": [("0.1", 0.1)]},
    "loreft": {**TRAINED, "rank": [("2", 2)], "bias": [("no", False), ("yes", True)]},
    "psr": {**TRAINED, "ask": [("Be glad.", "Be glad.")]},
    "reps": {
        **TRAINED,
        "factors": [("2", (2.0,)), ("1,2.5", (1.0, 2.5))],
        "use": [("suppress", "suppress")],
        "compat": [("yes", True)],
    },
    "iti": {
        "k": [("7", 7)],
        "alpha": [("3", 3.0)],
        "direction": [("probe", "probe")],
        "scale": [("no", False), ("yes", True)],
        "locate": [("effect", "effect")],
        "held_out": [("0.4", 0.4)],
        "seed": [("5", 5)],
        "positions": [("generated", "generated")],
    },
    "sadi": {
        "variant": [("neuron", "neuron"), ("resid", "resid")],
        "locate": [("effect", "effect")],
        "k": [("3", 3)],
        "delta": [("0.5", 0.5)],
        "positions": [("last", "last")],
    },
    "sta": {
        "sae": [("other:sae/1", "other:sae/1")],
        "p": [("0.1", 0.1)],
        "locate": [("effect", "effect")],
        "k": [("4", 4)],
        "alpha": [("2", 2.0)],
        "token": [("mean", "mean"), ("-3", -3)],
        "positions": [("last", "last")],
    },
    "sae": {
        "sae": [("other:sae/1", "other:sae/1"), ("one,two", "one,two")],
        "features": [("131071", 131071), ("12,345", (12, 345))],
        "by": [("effect", "effect")],
        "k": [("3", 3)],
        "variant": [("pruned", "pruned")],
        "do": [("at_least", "at_least")],
        "strength": [("0.5", 0.5)],
        "level": [("mean", "mean")],
        "a_max": [("2.5", (2.5,))],
        "pool": [("mean", "mean")],
        "outcomes": [("rows.jsonl", "rows.jsonl")],
        "negative": [("yes", True)],
        "labels": [("labels.json", "labels.json")],
        "positions": [("last", "last")],
    },
    "ablation": {
        "layer": [("2", 2), ("-1", -1), ("1.5", 1.5)],
        "tokens": [("-1,-2", (-1, -2)), ("-3", (-3,))],
        "where": [("norms", "norms")],
        "targets": [("I,Sorry", ("I", "Sorry")), (" yes", (" yes",))],
        "kl": [("0.5", 0.5)],
        "depth": [("1", 1.0)],
        "typical": [("yes", True)],
        "amount": [("-1", -1.0)],
        "positions": [("prompt", "prompt")],
        "project": [("negative", "negative")],
        "directions": [("3", 3)],
        "basis": [("som", "som")],
        "compose": [("yes", True)],
        "winsorise": [("0.9", 0.9)],
        "spare": [("texts.txt", "texts.txt")],
        "spare_groups": [("3", 3)],
        "spare_ridge": [("0.5", 0.5)],
        "per_layer": [("yes", True)],
        "seed": [("5", 5)],
        **{name: [("0.5", 0.5)] for name in KERNELS},
    },
    "steermoe": {
        "variant": [("soft", "soft")],
        "activate": [("3", 3)],
        "deactivate": [("2", 2)],
        "strength": [("0.5", 0.5)],
        "token": [("all", "all")],
        "positions": [("last", "last")],
    },
    "sas": {
        "theta": [("-90", -90.0)],
        "candidates": [("output", "output")],
        "selection": [("norm", "norm")],
        "ss_compat": [("yes", True)],
        "positions": [("prompt", "prompt")],
    },
    "ss": {
        "theta": [("45", 45.0)],
        "candidates": [("input", "input")],
        "selection": [("norm", "norm")],
        "whole_blocks": [("no", False)],
        "ss_compat": [("yes", True)],
        "positions": [("prompt", "prompt")],
    },
    "austeer": {
        "site": [("ffn_in", "ffn_in")],
        "k": [("all", "all"), ("4", 4)],
        "alpha": [("0.5", 0.5)],
        "direction": [("signed", "signed")],
        "locate": [("difference", "difference"), ("effect_per_nat", "effect_per_nat")],
        "choose": [("least", "least")],
        "change": [("absolute", "absolute")],
        "strength": [("fixed", "fixed")],
        "per_token": [("yes", True)],
        "first_token": [("no", False)],
        "verify": [("8", 8)],
        "average": [("yes", True)],
        "interaction": [("fisher", "fisher"), ("blocks", "blocks")],
        "block": [("4", 4)],
        "basis": [("svd", "svd")],
        "clamp_sign": [("yes", True)],
        "layers": [("1,3-5,-1", (1, 3, 4, 5, -1)), ("2", (2,))],
        "seed": [("9", 9)],
        "positions": [("last", "last")],
    },
}  # fmt: skip
OPTIONS["aas"] = OPTIONS["sas"]
#: What a method cannot do without.
REQUIRED: dict[str, dict[str, Any]] = {
    "sta": {"sae": "mine"},
    "sae": {"sae": "mine"},
    "alphasteer": {"protect": "builtin:facts"},
}
#: What an option needs beside it.
NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    ("austeer", "choose"): {"alpha": 0.25},
    ("austeer", "block"): {"locate": "effect", "interaction": "blocks"},
    **{
        ("austeer", option): {"locate": "effect"}
        for option in ("per_token", "first_token", "verify", "average", "interaction", "basis")
    },
    ("sta", "k"): {"locate": "effect"},
    ("sae", "a_max"): {"features": 7},
    ("sae", "outcomes"): {"by": "correlation"},
    ("ablation", "spare_groups"): {"spare": "builtin:facts"},
    ("ablation", "spare_ridge"): {"spare": "builtin:facts"},
    ("ablation", "basis"): {"directions": 2},
    ("ablation", "compose"): {"directions": 2},
    **{
        ("ablation", name): {
            other: 1.0
            for other in KERNELS
            if other != name and other.partition("_")[0] == name.partition("_")[0]
        }
        for name in KERNELS
    },
}
