"""An adapter that PEFT loads is the attached steering: every operator, site and architecture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from adapters import IDS, attached, linear_operators, one, peft_model, zeroed
from helpers import language_model, plain_logits, refused_in_one_line, relative, steer
from tiny import TINY, tiny_tokenizer
from tiny_curated import CURATED, curated_model

pytest.importorskip("peft")

#: Sites that linear maps read or write.
KINDS = ("attn_norm", "heads", "attn_out", "ffn_norm", "ffn_in", "ffn_out")
#: Models whose LM head is a map of its own, not the embedding table.
UNTIED = ("llama", "mistral", "qwen3_moe", "phi3", "olmo2")
CASES = [
    *((name, f"layers.1.{kind}") for name in TINY for kind in KINDS),
    *((name, "final_norm") for name in UNTIED),
    ("qwen3_moe", "layers.1.router"),
    *(("qwen3_moe", f"layers.0.{kind}") for kind in ("ffn_norm", "ffn_in", "ffn_out")),  # dense
]


def near(name: str) -> float:
    """How near float64 comes: norms that compute in float32 round what is next to equal apart."""
    return 1e-9 if name == "gpt2" else 1e-6


QUICK = ("llama", "qwen3_moe", "gpt2", "phi3")


@pytest.mark.parametrize(
    ("name", "site"),
    [pytest.param(*case, marks=[] if case[0] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_the_adapter_is_the_attached_steering(name: str, site: str, tmp_path: Path) -> None:
    lm = language_model(name, dtype=torch.float64)
    plain = plain_logits(lm.model, IDS)
    biased = name == "gpt2" and site.endswith("_out")
    experts = (name, site) == ("qwen3_moe", "layers.1.ffn_in")
    for case, (op, dials) in linear_operators(lm.anatomy.width(site)).items():
        steering = replace(steer(lm, (site, op)), dial=tt.Dial("dial", 1.0, (-180.0, 180.0)))
        if biased:  # with a bias of zero there is none along the change
            refused_in_one_line(
                lambda s=steering: tt.export(lm, s, "lora", tmp_path / "x"), "bias along the change"
            )
            continue
        if experts and case not in ("Scale", "clamped Scale", "Shift"):
            refused_in_one_line(
                lambda s=steering: tt.export(lm, s, "lora", tmp_path / "x"), "the router weighs"
            )
            continue
        files = tt.export(
            lm, steering, "lora", tmp_path / case, dials=dials, precision="float64"
        ).files
        for dial, folder in zip(dials, files, strict=True):
            found = plain_logits(peft_model(name, folder, dtype=torch.float64), IDS)
            expected = attached(lm, steering.at(dial))
            assert relative(found, expected) < near(name), (case, dial)
            assert relative(found, plain) > 1e-4, (case, dial)


@pytest.mark.parametrize("kind", ["attn_out", "ffn_out"])
def test_a_bias_of_zero_is_in_no_way(kind: str, tmp_path: Path) -> None:
    lm = language_model("gpt2")
    block = lm.model.transformer.h[1]
    with zeroed(block.attn.c_proj.bias, block.mlp.c_proj.bias):
        steering = one(lm, f"layers.1.{kind}", "Ablate", alpha=2.0)
        tt.export(lm, steering, "lora", tmp_path / "a")
        model = peft_model("gpt2", tmp_path / "a")
        other = model.get_base_model().transformer.h[1]
        maps = {"attn_out": other.attn.c_proj, "ffn_out": other.mlp.c_proj}
        for linear in (other.attn.c_proj, other.mlp.c_proj):
            torch.nn.init.zeros_(getattr(linear, "base_layer", linear).bias)
        assert hasattr(maps[kind], "lora_A")
        assert relative(plain_logits(model, IDS), attached(lm, steering)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", CURATED)
def test_architectures_beyond(name: str, tmp_path: Path) -> None:
    """Where there is an adapter it is the attached steering, in layers of every kind."""
    peft = pytest.importorskip("peft")
    lm = tt.wrap(curated_model(name), tiny_tokenizer(), name)
    sites = [
        site
        for kind in (*KINDS, "router")
        if lm.anatomy.has(kind)
        for site in {*lm.anatomy.sites(kind)[:1], *lm.anatomy.sites(kind)[-1:]}
    ]
    exported, refusals = 0, list[str]()
    for site in sites:
        for op, alpha in (("Scale", 1.5), ("Rotate", 70.0)):
            steering, folder = one(lm, site, op, alpha=alpha), tmp_path / f"{site} {op}"
            try:
                tt.export(lm, steering, "lora", folder)
            except tt.TrimtabError as error:
                refusals.append(str(error))
                continue
            exported += 1
            model = peft.PeftModel.from_pretrained(curated_model(name), folder).eval()
            found = plain_logits(model, IDS)
            assert relative(found, attached(lm, steering)) < 1e-4, (site, op)
    assert exported >= 8
    assert all("cannot carry" in each or "PEFT adds nothing" in each for each in refusals)


def everywhere(lm: tt.LanguageModel, name: str) -> tt.Steering:
    """Operators of all kinds in two blocks, of which several meet at most maps."""
    writers = () if name == "gpt2" else (("attn_out", "Ablate"), ("ffn_out", "Scale"))
    again = () if name == "gpt2" else (("ffn_out", "Ablate"),)
    kinds = (("attn_norm", "Ablate"), ("heads", "Scale"), ("ffn_norm", "Rotate"))
    kinds += (("ffn_in", "Scale"), ("attn_norm", "Scale"), *writers, *again)
    parts = [
        one(lm, f"layers.{layer}.{kind}", op, seed=layer).interventions[0]
        for layer in (1, 2)
        for kind, op in kinds
    ]
    return replace(one(lm, "layers.1.heads"), interventions=tuple(parts))


@pytest.mark.parametrize("name", TINY)
def test_what_meets_at_a_map_is_composed_and_merges(name: str, tmp_path: Path) -> None:
    lm = language_model(name)
    steering = everywhere(lm, name)
    exported = tt.export(lm, steering, "lora", tmp_path / "a")
    assert exported.exact
    assert exported.left_out == ()
    assert not exported.details["dial_in_alpha"]
    model = peft_model(name, tmp_path / "a")
    expected = attached(lm, steering)
    assert relative(plain_logits(model, IDS), expected) < 1e-4
    assert relative(plain_logits(model.merge_and_unload(), IDS), expected) < 1e-4


@pytest.mark.parametrize("kind", ["heads", "attn_out"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_order_at_a_site_is_kept(kind: str, turned: bool, tmp_path: Path) -> None:
    lm = language_model("llama")
    a = one(lm, f"layers.1.{kind}", "Scale", alpha=2.0)
    b = one(lm, f"layers.1.{kind}", "Ablate", seed=3, alpha=2.0)
    both = b + a if turned else a + b
    tt.export(lm, both, "lora", tmp_path / "a")
    found = plain_logits(peft_model("llama", tmp_path / "a"), IDS)
    assert relative(found, attached(lm, *both)) < 1e-4
    assert relative(found, attached(lm, *reversed(both))) > 1e-2


# -- two adapters ----------------------------------------------------------------------------------


def test_two_adapters_are_the_sum_where_they_do_not_meet(tmp_path: Path) -> None:
    lm = language_model("llama")
    a, b = one(lm, "layers.1.heads"), one(lm, "layers.2.ffn_norm", "Rotate", alpha=70.0)
    for steering, folder in ((a, "a"), (b, "b")):
        tt.export(lm, steering, "lora", tmp_path / folder)
    expected = attached(lm, a, b)
    model = peft_model("llama", tmp_path / "a", tmp_path / "b")
    model.base_model.set_adapter(["default", "other0"])
    assert relative(plain_logits(model, IDS), expected) < 1e-4
    names = (["default", "other0"], [1.0, 1.0], "both")
    model.add_weighted_adapter(*names, combination_type="cat")
    model.set_adapter("both")
    assert relative(plain_logits(model, IDS), expected) < 1e-4


def test_where_two_meet_one_adapter_is_both(tmp_path: Path) -> None:
    """Added they would lack what the one does to the other's."""
    lm = language_model("llama")
    a = one(lm, "layers.1.heads", alpha=2.0)
    b = one(lm, "layers.1.attn_out", "Ablate", alpha=2.0)
    for steering, folder in ((a, "a"), (b, "b"), (a + b, "both")):
        tt.export(lm, steering, "lora", tmp_path / folder)
    expected = attached(lm, a, b)
    fused = plain_logits(peft_model("llama", tmp_path / "both"), IDS)
    assert relative(fused, expected) < 1e-4
    added = peft_model("llama", tmp_path / "a", tmp_path / "b")
    added.base_model.set_adapter(["default", "other0"])
    assert relative(plain_logits(added, IDS), expected) > 1e-3


# -- dial, rank, precision -------------------------------------------------------------------------


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize("op", ["Scale", "Ablate"])
def test_the_dial_is_turned_in_the_configuration(op: str, tmp_path: Path) -> None:
    lm = language_model("llama")
    steering = one(lm, "layers.1.heads", op, alpha=2.0)
    assert tt.export(lm, steering, "lora", tmp_path / "a").details["dial_in_alpha"]
    config = config_of(tmp_path / "a")
    assert config["lora_alpha"] == 2 * config["r"]
    config["lora_alpha"] = -0.5 * config["r"]
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    found = plain_logits(peft_model("llama", tmp_path / "a"), IDS)
    assert relative(found, attached(lm, steering.at(-0.5))) < 1e-4


def test_where_the_effect_is_not_linear_the_dial_is_in_the_numbers(tmp_path: Path) -> None:
    lm = language_model("llama")
    turned = one(lm, "layers.1.attn_norm", "Rotate", alpha=70.0)
    clamped = one(lm, "layers.1.heads", "Scale", alpha=2.0)
    only = clamped.interventions[0]
    clamped = replace(
        clamped, interventions=(replace(only, operator=replace(only.operator, clamp_sign=True)),)
    )
    for number, steering in enumerate((turned, clamped)):
        folder = tmp_path / str(number)
        assert not tt.export(lm, steering, "lora", folder).details["dial_in_alpha"]
        assert config_of(folder)["lora_alpha"] == config_of(folder)["r"]


def test_weights_of_interventions_are_in_the_numbers(tmp_path: Path) -> None:
    lm = language_model("llama")
    steering = one(lm, "layers.1.heads", alpha=2.0)
    second = replace(one(lm, "layers.2.heads").interventions[0], weight=-0.5)
    steering = replace(steering, interventions=(*steering.interventions, second))
    assert tt.export(lm, steering, "lora", tmp_path / "a").details["dial_in_alpha"]
    found = plain_logits(peft_model("llama", tmp_path / "a"), IDS)
    assert relative(found, attached(lm, steering)) < 1e-4


def test_ranks_are_those_of_engines(tmp_path: Path) -> None:
    lm = language_model("llama")
    ranks = {
        "Ablate": 8,  # of 1
        "Rotate": 8,  # of 2
        "Scale": 32,  # of 22 units
    }
    for op, rank in ranks.items():
        folder = tmp_path / op
        tt.export(lm, one(lm, "layers.1.heads", op), "lora", folder)
        assert config_of(folder)["r"] == rank


def test_a_rank_beyond_those_of_engines_is_warned_of(tmp_path: Path) -> None:
    lm = language_model("llama", intermediate_size=1600)
    with pytest.warns(tt.TrimtabWarning, match="rank 534: vLLM takes no more than 512"):
        tt.export(lm, one(lm, "layers.1.ffn_in"), "lora", tmp_path / "a")


def test_precisions(tmp_path: Path) -> None:
    lm = language_model("llama")
    steering = one(lm, "layers.1.heads", alpha=2.0)
    expected, sizes = attached(lm, steering), {}
    for precision, within in (("float32", 1e-4), ("bfloat16", 5e-2), ("float16", 1e-2)):
        folder = tmp_path / precision
        exported = tt.export(lm, steering, "lora", folder, precision=precision)
        assert exported.exact is (precision == "float32")
        assert relative(plain_logits(peft_model("llama", folder), IDS), expected) < within
        sizes[precision] = (folder / "adapter_model.safetensors").stat().st_size
    assert max(sizes["bfloat16"], sizes["float16"]) < 0.7 * sizes["float32"]
    huge = one(lm, "layers.1.heads", "Ablate", alpha=1e9) + one(lm, "layers.1.attn_out")
    refused_in_one_line(
        lambda: tt.export(lm, huge, "lora", tmp_path / "x", precision="float16"),
        "infinite in float16: turn the dial down",
    )
    assert not (tmp_path / "x").exists()


def test_bfloat16_models_export(tmp_path: Path) -> None:
    lm = language_model("llama", dtype=torch.bfloat16)
    steering = one(lm, "layers.1.heads", "Ablate", alpha=2.0)
    tt.export(lm, steering, "lora", tmp_path / "a")
    found = plain_logits(peft_model("llama", tmp_path / "a", dtype=torch.bfloat16), IDS)
    assert relative(found, attached(lm, steering)) < 0.1
