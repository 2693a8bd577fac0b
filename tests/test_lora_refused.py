"""What an adapter cannot carry: each is refused in a line, or left out and said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from adapters import IDS, attached, one, peft_model
from every_architecture import build
from helpers import basis, language_model, plain_logits, refused_in_one_line, relative, steer
from tiny import tiny_tokenizer
from trimtab.exchange import FORMATS
from trimtab.steering import (
    Ablate,
    Add,
    Affine,
    Clamp,
    Condition,
    Gate,
    LinearDefaults,
    Respond,
    Shift,
)

Make = Callable[[tt.LanguageModel], tt.Steering]


def at(site: str, make: Callable[[int], Any], **options: Any) -> Make:
    return lambda lm: steer(lm, (site, make(lm.anatomy.width(site))), **options)


def random(width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True, eq=False)
class Doubled(LinearDefaults):
    """A linear operator of another package that mixes units."""

    width: int
    size: int

    identity, linear = 0.0, True

    def linear_part(self, x: torch.Tensor, dial: float) -> torch.Tensor:
        return x + dial * x.flip(-1)

    def check(self) -> None: ...

    def bind(self, dial: Any, device: Any = "cpu") -> Any:
        return lambda x: self.linear_part(x, dial)


HEADS = "layers.1.heads"
#: A name, the model, the steering, and what is said of it.
REFUSED: dict[str, tuple[str, Make, str]] = {
    "a scope": (
        "llama",
        at(HEADS, lambda w: Ablate(basis(w, 0, 1)[0]), positions="last"),
        r"Ablate at layers.1.heads: it acts on the scope 'last', and weights act on all "
        r"tokens alike; attach it, or give it the scope all \(--scope all\)",
    ),
    "a gate": (
        "llama",
        lambda lm: one(lm, HEADS, "Ablate").gated(Gate((Condition("embed", random(48), 0.0),))),
        "an adapter cannot carry the gate of .*; attach it, or take the gate away",
    ),
    "Turn": ("llama", lambda lm: one(lm, HEADS, "Turn"), "Turn.* is not linear .*; attach it$"),
    "Scale of |x|": (
        "llama", lambda lm: one(lm, HEADS, "Absolute"), r"\|x\| is not linear .*; attach it$",
    ),
    "a bounded Clamp": (
        "llama", at(HEADS, lambda w: Clamp(basis(w, 0, 1)[0], low=0.1)), "stops at a bound",
    ),
    "Respond": (
        "llama",
        at(HEADS, lambda w: Respond(random(w), random(w), 0.0)),
        "adds where its reader fires, is not linear .*; attach it$",
    ),
    "an Add that keeps the norm": (
        "llama", at(HEADS, lambda w: Add(random(w), "always")), "keeps the norm is not linear",
    ),
    "Add in the stream": (
        "llama",
        at("layers.1.resid", lambda w: Add(random(w))),
        "Add at layers.1.resid: it adds a constant, and an adapter has none; bake it, write it as "
        "a control vector, or attach it",
    ),
    "Add elsewhere": (
        "llama", at(HEADS, lambda w: Add(random(w))), "a constant.*; bake it where there is room",
    ),
    "a Clamp to a number": (
        "llama", at(HEADS, lambda w: Clamp(basis(w, 0, 1)[0], 2.0, 2.0)), "adds a constant",
    ),
    "Affine with c": (
        "llama",
        at(HEADS, lambda w: Affine(random(w)[:, None], random(w)[:, None], random(w))),
        "adds a constant",
    ),
    "Shift with shifts": (
        "llama",
        at(HEADS, lambda w: Shift(torch.arange(2), torch.ones(2), torch.ones(2), w)),
        "adds a constant",
    ),
    "the stream": (
        "llama",
        lambda lm: one(lm, "layers.1.resid", "Ablate"),
        "Ablate at layers.1.resid: the norms that read it divide by its length, so that no weights "
        "do it; fit it at ffn_out, or attach it",
    ),
    "before a norm": (
        "llama", lambda lm: one(lm, "layers.1.ffn_norm_in", "Add"), "length.*; attach it$",
    ),
    "the embedding": (
        "llama", lambda lm: one(lm, "embed", "Ablate"), "looked up there.*; bake it, or attach it$",
    ),
    "behind a norm, a Scale": (
        "gemma2", lambda lm: one(lm, "layers.1.ffn_post_norm"), "a norm writes it.*; bake it, or",
    ),
    "behind a norm, a mixture of units": (
        "gemma2",
        lambda lm: one(lm, "layers.1.ffn_post_norm", "Rotate"),
        "a norm writes it, and no linear map stands behind it; attach it$",
    ),
    "a tied head": (
        "gemma2", lambda lm: one(lm, "final_norm"), "the embedding table.*; bake it, or attach it$",
    ),
    "a bias": (
        "gpt2", lambda lm: one(lm, "layers.1.ffn_out"), "a bias along the change.*; bake it, or",
    ),
    "inside of experts": (
        "qwen3_moe",
        lambda lm: one(lm, "layers.1.ffn_in", "Ablate"),
        "the router weighs each expert's part of it anew for each token; attach it$",
    ),
    "an operator of another package": (
        "llama", at(HEADS, lambda w: Doubled(w, w)), "what rank its change is, is not known; bake",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_cannot_carry(case: str, tmp_path: Path) -> None:
    name, make, says = REFUSED[case]
    lm = language_model(name)
    steering = make(lm)
    for split in (False, True):  # of nothing no part fits
        refused_in_one_line(
            lambda split=split: tt.export(lm, steering, "lora", tmp_path / "a", split=split), says
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_said_to_work_does(case: str) -> None:
    """Baked where that is said, and attached in any case."""
    name, make, says = REFUSED[case]
    lm = language_model(name)
    steering = make(lm)
    expected = attached(lm, steering)
    assert not torch.equal(expected, plain_logits(lm.model, IDS))
    if "bake it" in says or "; bake" in says:
        assert relative(plain_logits(tt.bake(lm, steering).model, IDS), expected) < 1e-4


def test_weights_of_experts_that_lie_one_below_the_other(tmp_path: Path) -> None:
    model = build("dbrx")
    lm = tt.wrap(model, tiny_tokenizer(), "dbrx")
    steering = one(lm, "layers.0.ffn_out", "Ablate")
    refused_in_one_line(
        lambda: tt.export(lm, steering, "lora", tmp_path / "a"), "one below the other.*; bake it"
    )


# -- a part of it ----------------------------------------------------------------------------------


def test_split_writes_the_rest_and_says_what_is_left(tmp_path: Path) -> None:
    lm = language_model("llama")
    fits = one(lm, HEADS, "Scale").interventions[0]
    adds = one(lm, "layers.2.resid", "Add").interventions[0]
    steering = replace(one(lm, HEADS), interventions=(adds, fits))
    refused_in_one_line(
        lambda: tt.export(lm, steering, "lora", tmp_path / "a"),
        r"an adapter cannot carry Add at layers.2.resid: .*attach it \(--split writes the rest\)$",
    )
    exported = tt.export(lm, steering, "lora", tmp_path / "a", split=True)
    (left,) = exported.left_out
    assert left.startswith("Add at layers.2.resid: it adds a constant")
    assert exported.record["left_out"] == [left]
    rest = tt.Steering.load(tmp_path / "a/trimtab/left-1.safetensors")
    assert [each.site for each in rest.interventions] == ["layers.2.resid"]
    model = tt.wrap(peft_model("llama", tmp_path / "a"), lm.tokenizer)
    fitting = replace(steering, interventions=(fits,))
    assert relative(plain_logits(model.model, IDS), attached(lm, fitting)) < 1e-4
    with model.steered(rest, force=True):
        assert relative(plain_logits(model.model, IDS), attached(lm, steering)) < 1e-4


@pytest.mark.parametrize("kind", ["heads", "attn_out"])
@pytest.mark.parametrize("order", ["SAS", "ASS", "SSA", "A"])
def test_split_keeps_the_order_at_a_site(kind: str, order: str, tmp_path: Path) -> None:
    """What a map reads changes after what is attached there, what it writes before."""
    lm = language_model("llama")
    site = f"layers.1.{kind}"
    chain = tuple(
        one(lm, site, "Add" if letter == "A" else "Ablate", seed=number).interventions[0]
        for number, letter in enumerate(order)
    )
    other = one(lm, "layers.2.heads").interventions[0]
    steering = replace(one(lm, site), interventions=(*chain, other), value=2.0)
    exported = tt.export(lm, steering, "lora", tmp_path / "a", split=True)
    kept = {"heads": len(order.rpartition("A")[2]), "attn_out": len(order.partition("A")[0])}[kind]
    assert len(exported.left_out) == len(order) - kept
    assert sum("which is left out" in left for left in exported.left_out) == (len(order) - kept - 1)
    lm2 = tt.wrap(peft_model("llama", tmp_path / "a"), lm.tokenizer)
    rest = tt.Steering.load(tmp_path / "a/trimtab/left-1.safetensors")
    with lm2.steered(rest, force=True):
        found = plain_logits(lm2.model, IDS)
    assert relative(found, attached(lm, steering)) < 1e-4


# -- models and options ----------------------------------------------------------------------------


def test_models_with_adapters_and_quantised_ones_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = language_model("llama")
    model = peft.get_peft_model(lm.model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted = tt.wrap(model, lm.tokenizer, "mine")
    refused_in_one_line(
        lambda: tt.export(adapted, one(adapted, HEADS), "lora", tmp_path / "a"),
        "mine carries an adapter.*merge it.*or attach",
    )


def test_formats_dials_and_names_that_are_wrong(tmp_path: Path) -> None:
    lm = language_model("llama")
    steering, out = one(lm, HEADS), tmp_path / "a"
    a_file = tmp_path / "file"
    a_file.write_text("mine")
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "notes.txt").write_text("mine")
    wrong: dict[str, Callable[[], Any]] = {
        "format is 'lorra': known are lora": lambda: tt.export(lm, steering, "lorra", out),
        "lora takes no shape, and no other does": lambda: tt.export(
            lm, steering, "lora", out, shape=1
        ),
        "precision is 'int4': known are float32": lambda: tt.export(
            lm, steering, "lora", out, precision="int4"
        ),
        "several dials are for one steering": lambda: tt.export(
            lm, steering + steering, "lora", out, dials=[1, 2]
        ),
        "the dial alpha cannot be inf": lambda: tt.export(
            lm, steering, "lora", out, dials=[float("inf")]
        ),
        "test alpha=0 does nothing.*turn the dial": lambda: tt.export(
            lm, steering.at(0), "lora", out
        ),
        "there is no steering to export": lambda: tt.export(lm, tt.Steerings(), "lora", out),
        "file exists": lambda: tt.export(lm, steering, "lora", a_file),
        "file holds other files": lambda: tt.export(lm, steering, "lora", a_file, overwrite=True),
        "filled holds other files": lambda: tt.export(lm, steering, "lora", filled, overwrite=True),
        "there is no directory": lambda: tt.export(lm, steering, "lora", tmp_path / "no/a"),
        "was made for": lambda: tt.export(language_model("llama", seed=1), steering, "lora", out),
    }
    for says, run in wrong.items():
        refused_in_one_line(run, says)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "filled"]
    assert FORMATS
    assert tt.export(language_model("llama", seed=1), steering, "lora", out, force=True).files


def test_what_is_not_exact_after_all_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapted model is compared with the steered one before anything is written."""
    lm = language_model("llama")
    monkeypatch.setattr("trimtab.exchange.changes.ChangedMap.apply", lambda self, scale: None)
    refused_in_one_line(
        lambda: tt.export(lm, one(lm, HEADS), "lora", tmp_path / "a"), "logits differ"
    )
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_overwritten_whole(tmp_path: Path) -> None:
    lm = language_model("llama")
    tt.export(lm, one(lm, HEADS, "Ablate"), "lora", tmp_path / "a")
    refused_in_one_line(lambda: tt.export(lm, one(lm, HEADS), "lora", tmp_path / "a"), "exists")
    tt.export(lm, one(lm, HEADS), "lora", tmp_path / "a", overwrite=True, dials=[1, 2.5])
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["1", "2.5"]
    tt.export(lm, one(lm, HEADS), "lora", tmp_path / "a", overwrite=True)
    names = ["adapter_config.json", "adapter_model.safetensors", "trimtab", "trimtab.json"]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == names
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
