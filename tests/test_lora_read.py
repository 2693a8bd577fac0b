"""Adapters on disk: what they say of themselves, as models, on the command line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab as tt
from adapters import IDS, attached, one
from commands import Command, home, listing, refused, trimtab, work  # noqa: F401
from helpers import PROMPTS, language_model, plain_logits, refused_in_one_line, relative
from tiny import tiny_model, tiny_tokenizer
from trimtab.exchange import lora

HEADS = "layers.1.heads"


@pytest.fixture
def exported(tmp_path: Path) -> tuple[tt.LanguageModel, tt.Steering, Path]:
    lm = language_model("llama")
    steering = replace(
        one(lm, HEADS, "Ablate", alpha=2.0), contrast={"name": "pairs", "rows": 3, "digest": "0a"}
    )
    tt.export(lm, steering, "lora", tmp_path / "a")
    return lm, steering, tmp_path / "a"


def turn(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# -- read again ------------------------------------------------------------------------------------


def test_the_steering_comes_back(exported: Any) -> None:
    _, steering, folder = exported
    assert lora.recognises(folder)
    (found,) = lora.read(folder)
    assert found.digest == steering.digest
    assert found.setting == steering.setting == 2.0
    assert found.contrast == steering.contrast
    assert found.model == steering.model
    turn(folder, lora_alpha=-12)  # of r = 8
    (found,) = lora.read(folder)
    assert found.setting == -1.5


def test_several_come_back_in_their_order(tmp_path: Path) -> None:
    lm = language_model("llama")
    both = one(lm, HEADS).at(1.5) + one(lm, HEADS, "Ablate").at(-0.5)
    tt.export(lm, both, "lora", tmp_path / "a")
    found = lora.read(tmp_path / "a")
    assert [each.digest for each in found] == [each.digest for each in both]
    assert [each.setting for each in found] == [1.5, -0.5]
    assert relative(attached(lm, *found), attached(lm, *both)) < 1e-6
    turn(tmp_path / "a", lora_alpha=3)
    refused_in_one_line(lambda: lora.read(tmp_path / "a"), "lora_alpha of 3 .*no dial of its")


def test_several_dials_are_adapters_of_their_own(tmp_path: Path) -> None:
    lm = language_model("llama")
    steering = one(lm, HEADS)
    made = tt.export(lm, steering, "lora", tmp_path / "a", dials=[-1, 2.5, 10])
    assert made.files == tuple(tmp_path / "a" / name for name in ("-1", "2.5", "10"))
    assert [each["lora_alpha"] / each["rank"] for each in made.record["adapters"]] == [-1, 2.5, 10]
    for file, dial in zip(made.files, (-1, 2.5, 10), strict=True):
        (found,) = lora.read(file)
        assert found.setting == dial
        assert found.digest == steering.digest


def test_what_split_wrote_is_what_comes_back(tmp_path: Path) -> None:
    lm = language_model("llama")
    adds = one(lm, "layers.2.resid", "Add").interventions
    steering = one(lm, HEADS)
    steering = replace(steering, interventions=(*steering.interventions, *adds))
    tt.export(lm, steering, "lora", tmp_path / "a", split=True)
    (found,) = lora.read(tmp_path / "a")
    assert [each.site for each in found.interventions] == [HEADS]


def foreign(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})


def changed(folder: Path) -> None:
    from safetensors import safe_open

    weights = folder / "adapter_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights, metadata)


def another(folder: Path) -> None:
    lm = language_model("llama")
    one(lm, HEADS).save(folder / "trimtab/1.safetensors", overwrite=True)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another program's": (foreign, "not exported from a steering.*use it as a model"),
    "changed": (changed, "changed after it was exported"),
    "another steering": (another, "holds another steering than test alpha=2"),
    "no steering": (lambda a: shutil.rmtree(a / "trimtab"), "no such steering file"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "cannot be read"),
    "no configuration": (lambda a: (a / "adapter_config.json").unlink(), "cannot read"),
    "no JSON": (lambda a: (a / "adapter_config.json").write_text("{"), "is not JSON"),
    "no rank": (lambda a: turn(a, r=0), "r is no number"),
    "no alpha": (lambda a: turn(a, lora_alpha="8"), "lora_alpha is no number"),
    "huge": (lambda a: turn(a, lora_alpha=1e300), "cannot be"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_no_adapter_of_a_steering_is_one_line(case: str, exported: Any) -> None:
    _, _, folder = exported
    damage, says = DAMAGE[case]
    damage(folder)
    refused_in_one_line(lambda: lora.read(folder), says)


def test_damaged_files_are_one_line_or_still_the_steering(exported: Any) -> None:
    _, steering, folder = exported
    generator = random.Random(0)
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    whole = {file: file.read_bytes() for file in files}
    said: list[str] = []
    for _ in range(400):
        file = generator.choice(files)
        content = bytearray(whole[file])
        for _ in range(generator.choice([1, 1, 3])):
            content[generator.randrange(len(content))] = generator.randrange(256)
        file.write_bytes(bytes(content[: generator.choice([len(content), len(content) // 2])]))
        try:
            (found,) = lora.read(folder)
            assert found.digest == steering.digest
        except tt.TrimtabError as error:
            said.append(str(error))
        file.write_bytes(whole[file])
    assert len(said) > 200
    assert not any("\n" in line for line in said)


# -- as a model ------------------------------------------------------------------------------------


def test_experts_with_an_adapter_are_loaded(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    lm = tt.load(tmp_path / "m", device="cpu")
    steering = one(lm, "layers.1.ffn_in", alpha=0.5)
    tt.export(lm, steering, "lora", tmp_path / "a")
    adapted = tt.load(tmp_path / "a", device="cpu")
    assert relative(plain_logits(adapted.model, IDS), attached(lm, steering)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_an_exported_adapter_is_loaded_steered_and_baked(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    lm = tt.load(tmp_path / "m", device="cpu")
    steering = one(lm, HEADS, "Ablate", alpha=0.5)
    tt.export(lm, steering, "lora", tmp_path / "a")
    adapted = tt.load(tmp_path / "a", device="cpu")
    once = attached(lm, steering)
    assert relative(plain_logits(adapted.model, IDS), once) < 1e-5
    assert adapted.identity.digest != lm.identity.digest
    assert relative(plain_logits(tt.bake(adapted).model, IDS), once) < 1e-5
    # The same steering on top acts a second time, as two of them do.
    twice = attached(lm, steering, steering)
    with (
        pytest.warns(tt.TrimtabWarning, match="is baked into .* already.*acts a second time"),
        adapted.steered(steering, force=True),
    ):
        assert relative(plain_logits(adapted.model, IDS), twice) < 1e-5
    own = one(adapted, "layers.2.attn_norm", "Rotate", alpha=50.0)
    baked = tt.bake(adapted, own)
    assert relative(plain_logits(baked.model, IDS), attached(adapted, own)) < 1e-4
    # Merged it is a model of its own, from which adapters can be exported.
    baked.save_pretrained(tmp_path / "merged")
    merged = tt.load(tmp_path / "merged", device="cpu")
    again = one(merged, HEADS)
    tt.export(merged, again, "lora", tmp_path / "b")
    second = tt.load(tmp_path / "b", device="cpu")
    assert relative(plain_logits(second.model, IDS), attached(merged, again)) < 1e-5


def test_a_model_of_peft_is_fitted_on(tmp_path: Path) -> None:
    """A steering of the adapted model is at home there, and not on the model without adapter."""
    peft = pytest.importorskip("peft")
    lm = language_model("llama")
    tt.export(lm, one(lm, "layers.0.heads"), "lora", tmp_path / "a")
    model = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a")
    adapted = tt.wrap(model, tiny_tokenizer(), "adapted")
    contrast = tt.Contrast.from_pairs(
        [("Today I feel", " happy.", " sad."), ("The answer is", " yes.", " no.")] * 3
    )
    steering = tt.CAA(layer=1, alpha=2.0).fit(adapted, contrast)
    plain = tt.CAA(layer=1, alpha=2.0).fit(lm, contrast)
    assert steering.digest != plain.digest
    folded = tt.wrap(model.merge_and_unload(), tiny_tokenizer(), "merged")
    of_merged = tt.CAA(layer=1, alpha=2.0).fit(folded, contrast)
    vectors = [each.interventions[0].operator.vector for each in (steering, of_merged)]
    assert relative(*vectors) < 1e-4
    refused_in_one_line(lambda: lm.logits(PROMPTS, steering=steering), "was made for adapted")


# -- the command line ------------------------------------------------------------------------------


def test_export_as_a_command(trimtab: Command, work: Path) -> None:  # noqa: F811
    found = trimtab("export au.safetensors@2 --model model --to lora -o a --json").json
    assert found.keys() >= {"format", "files", "exact", "left_out"}
    assert (found["format"], found["files"], found["exact"]) == ("lora", ["a"], True)
    assert found["left_out"] == []
    prompt = "--raw 'Today I feel' --max-new-tokens 8 --json"
    adapted = trimtab(f"generate --model a {prompt}").json["outputs"]
    steered = trimtab(f"generate --model model --steer au.safetensors@2 {prompt}").json["outputs"]
    plain = trimtab(f"generate --model model {prompt}").json["outputs"]
    assert [each["text"] for each in adapted] == [each["text"] for each in steered]
    assert [each["text"] for each in adapted] != [each["text"] for each in plain]
    assert "austeer alpha=2" in trimtab("inspect a").text
    said = trimtab("export -m model -s au.safetensors@2 --to lora -o b --dial 1,2.5").text
    assert said.split("\n")[:2] == ["Saved b/1", "Saved b/2.5"]


def test_export_refuses_in_one_line(trimtab: Command, work: Path) -> None:  # noqa: F811
    before = listing(work)
    for command, says in {
        "export caa.safetensors -m model --to lora -o a": "cannot carry Add at layers",
        "export au.safetensors -m model --to gguff -o a": "format is 'gguff'",
        "export -m model --to lora -o a": "no steering to export",
        "export au.safetensors -m other --to lora -o a": "--force",
        "export au.safetensors -m model --to lora -o pairs.jsonl": "exists",
        "export au.safetensors -m model --to lora -o a --precision 4bit": "precision",
        "export au.safetensors caa.safetensors -m model --to lora -o a --dial 1,2": "one steering",
    }.items():
        refused(trimtab(command), says)
    assert listing(work) == before
    split = "export au.safetensors caa.safetensors -m model --to lora -o a --split"
    assert "Left out: Add at layers" in trimtab(split).text
    assert trimtab(f"{split} --overwrite --json").json["left_out"]


# -- a real model ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("op", ["Scale", "Ablate", "Rotate"])
def test_greedy_tokens_on_smollm2(smollm2: tt.LanguageModel, op: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    site = {"Scale": "ffn_in", "Ablate": "attn_out", "Rotate": "attn_norm"}[op]
    parts = tuple(
        one(smollm2, f"layers.{layer}.{site}", op, seed=layer).interventions[0]
        for layer in range(4, 24, 2)
    )
    dial = {"Scale": 0.15, "Ablate": 20.0, "Rotate": 12.0}[op]
    steering = replace(one(smollm2, HEADS), interventions=parts, value=dial)
    tt.export(smollm2, steering, "lora", tmp_path / "a")
    prompts = ["The weather today is", "Dear sir, I", "She told me that", "Once upon a time"]
    options = {"chat": False, "max_new_tokens": 24}
    expected = [out.tokens for out in smollm2.generate(prompts, steering=steering, **options)]
    plain = [out.tokens for out in smollm2.generate(prompts, **options)]
    adapted = tt.load("smollm2-135m-instruct", device="cpu", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(adapted.model, tmp_path / "a")
    adapted = tt.wrap(model, adapted.tokenizer, "adapted")
    assert [out.tokens for out in adapted.generate(prompts, **options)] == expected
    assert expected != plain
