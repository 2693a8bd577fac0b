"""Two checkpoints compared: what baking wrote is explained to the bit and taken out again, and what
nobody wrote is a number."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab as tt
from baking import REFUSED
from helpers import (
    LINEAR,
    PROMPTS,
    SITES,
    language_model,
    operator,
    relative,
    steer,
    steer_at,
    turned,
)
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.exchange.inverse import inverse
from trimtab.steering import Ablate, Add, Affine, Intervention, Scale, Shift
from trimtab.steering.operators import apply


def noisy(lm: tt.LanguageModel, names: Any, size: float = 1e-3) -> tt.LanguageModel:
    """A copy with noise on some of its tensors."""
    model: Any = copy.deepcopy(lm.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise * parameter.norm() / parameter.numel() ** 0.5)
    return tt.wrap(model, lm.tokenizer, "noisy")


def baking(name: str, kind: str) -> list[tuple[str, tt.LanguageModel, tt.Steering]]:
    """What bakes at sites of a kind."""
    lm = language_model(name)
    return [
        (op, lm, turned(steer_at(lm, kind, op), op))
        for op in LINEAR
        if (name, kind, op) not in REFUSED
    ]


def few_sites() -> list[Any]:
    """All sites, of which the quick run has a few of each architecture, and all of one."""
    quick = [one for one in SITES if one[0] == "llama" or one[1] == "ffn_out"]
    return [one if one in quick else pytest.param(*one, marks=pytest.mark.slow) for one in SITES]


# -- every architecture -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), few_sites())
def test_what_was_baked_is_explained_and_what_was_not_is_a_number(name: str, kind: str) -> None:
    for op, lm, steering in baking(name, kind):
        baked = tt.bake(lm, steering)
        found = tt.audit(lm, baked, steering)
        assert found.exact, (op, found.summary)
        assert (found.explained, found.unexplained) == (1.0, 0.0)
        changed = [change.name for change in found.changes]
        state, before = baked.model.state_dict(), lm.model.state_dict()
        twice = {n for n in changed if n in before and torch.equal(before[n], state[n])}
        assert changed
        assert not twice
        # Independently of what the audit says: how much of the difference noise is.
        other = noisy(baked, changed)
        found = tt.audit(lm, other, steering)
        assert not found.fully_explained, op
        now, zero = other.model.state_dict(), torch.zeros(())
        noise = sum(float((now[n] - state[n]).double().square().sum()) for n in changed)
        whole = sum(float((now[n] - before.get(n, zero)).double().square().sum()) for n in changed)
        assert found.unexplained == pytest.approx((noise / whole) ** 0.5, rel=1e-4)
        # Another dial of the same steering explains less than all.
        if steering.setting != 0.5:
            assert not tt.audit(lm, baked, replace(steering, value=0.5)).fully_explained


@pytest.mark.parametrize(("name", "kind"), few_sites())
def test_a_baked_steering_is_taken_out_to_the_bit(name: str, kind: str) -> None:
    for op, lm, steering in baking(name, kind):
        baked = tt.bake(lm, steering)
        stripped = tt.strip(lm, baked, steering)
        assert (stripped.how, stripped.exact) == ("restored", True), op
        assert stripped.model.baked == ()
        assert type(stripped.model.model) is type(lm.model)
        assert stripped.model.identity.digest == lm.identity.digest
        assert not tt.audit(lm, stripped.model).changes


@pytest.mark.parametrize("name", TINY)
def test_what_an_edit_looks_like(name: str) -> None:
    lm = language_model(name)
    ones = lm.anatomy.width("layers.1.ffn_out")
    for op, kind in (("Scale", "scaled rows"), ("Ablate", "ablation"), ("Rotate", "rotation")):
        steering = turned(steer_at(lm, "ffn_out", op), op)
        (found,) = [
            change for change in tt.audit(lm, tt.bake(lm, steering)).changes
            if change.edit is not None and change.edit.rank is not None
        ]  # fmt: skip
        assert found.edit is not None
        assert (found.edit.kind, found.layer) == (kind, 1)
        if name != "qwen3_moe":
            assert found.site == "layers.1.ffn_out"
        if op == "Ablate":
            assert found.edit.numbers["strength"] == pytest.approx(3.0, rel=1e-4)
        if op == "Rotate":
            assert found.edit.numbers["degrees"] == pytest.approx(70.0, rel=1e-4)
        if op == "Scale":
            scale: Any = steering.interventions[0].operator
            assert found.edit.numbers["scaled"] == int((scale.gain != 0).sum())
            assert found.edit.numbers["of"] == ones


def test_ablations_of_one_direction_are_found_to_be() -> None:
    lm = language_model("llama")
    width = lm.anatomy.width("layers.0.ffn_out")
    r = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    r /= r.norm(dim=1, keepdim=True)
    sites = [f"layers.{i}.{kind}" for i in range(3) for kind in ("attn_out", "ffn_out")]
    steering = steer(lm, *((site, Ablate(r[0])) for site in sites[:5]), (sites[5], Ablate(r[1])))
    found = tt.audit(lm, tt.bake(lm, steering))
    first, second = found.directions
    assert (len(first.tensors), len(second.tensors)) == (5, 1)
    assert abs(float(first.direction @ r[0].double())) == pytest.approx(1, abs=1e-6)
    assert abs(float(second.direction @ r[1].double())) == pytest.approx(1, abs=1e-6)
    assert found.remarks == ("5 of the ablations are of one direction",)
    assert found.summary == "6 of 30 tensors differ (6 ablation)"
    (one, _) = found.as_json()["directions"]
    assert one["direction"] == first.direction.tolist()


# -- several, and what is beside ----------------------------------------------------------------


def test_several_steerings_and_one_of_them_taken_out() -> None:
    lm = language_model("llama")
    one, two, three = (
        steer_at(lm, "ffn_out", "Ablate"), steer_at(lm, "ffn_out", "Scale"),
        steer_at(lm, "heads", "Scale"),
    )  # fmt: skip
    baked = tt.bake(lm, one, two, three)
    assert tt.audit(lm, baked, one, two, three).exact
    assert not tt.audit(lm, baked, one, two).fully_explained
    assert not tt.audit(lm, baked, one, three).fully_explained
    found = tt.audit(lm, baked, three)
    (alone,) = [change for change in found.changes if change.how]
    assert (alone.name, alone.how) == ("model.layers.1.self_attn.o_proj.weight", "exact")
    # Where it acts alone it is put back whatever else was baked.
    stripped = tt.strip(lm, baked, three)
    assert tt.audit(lm, stripped.model, one, two).exact
    assert [record["label"] for record in stripped.model.baked] == [one.label, two.label]
    # Where others act they have to be named, or there must be a way back.
    with pytest.raises(tt.TrimtabError, match="leaves nothing along .*name what else was baked"):
        tt.strip(lm, baked, one)
    stripped = tt.strip(lm, baked, two, among=[one, two])
    assert (stripped.how, tt.audit(lm, stripped.model, one, three).exact) == ("restored", True)
    # Which came first is told by their order.
    stripped = tt.strip(lm, baked, one, among=[one, two])
    assert (stripped.how, tt.audit(lm, stripped.model, two, three).exact) == ("restored", True)
    stripped = tt.strip(lm, baked, two)
    assert stripped.how == "inverse"
    found = tt.audit(lm, stripped.model, one, three)
    assert found.unexplained is not None
    assert found.unexplained < 1e-6


def test_what_else_was_changed_stays(tmp_path: Path) -> None:
    lm = language_model("llama")
    for kind, op in (("heads", "Scale"), ("resid", "Add")):
        steering = turned(steer_at(lm, kind, op), op)
        baked = tt.bake(lm, steering)
        baked.model.config = copy.deepcopy(baked.model.config)
        baked.model.config.rms_norm_eps = 0.5
        baked.model.generation_config.temperature = 0.3
        baked.model.generation_config.do_sample = True
        stripped = tt.strip(lm, baked, steering)
        assert stripped.exact
        assert stripped.model.model.config.rms_norm_eps == 0.5
        assert stripped.model.model.generation_config.temperature == 0.3
        found = tt.audit(lm, stripped.model)
        assert not found.changes
        assert found.config["rms_norm_eps"] == (lm.model.config.rms_norm_eps, 0.5)


def test_a_steering_that_is_not_there_is_not_taken_out() -> None:
    lm = language_model("llama")
    there, other = steer_at(lm, "ffn_out", "Scale"), steer_at(lm, "heads", "Scale")
    baked = tt.bake(lm, there)
    found = tt.audit(lm, baked, other)
    assert found.unexplained is not None
    assert found.unexplained > 1
    absent = next(change for change in found.changes if change.edit is None)
    assert absent.looks_like == "not changed, though a steering would change it"
    for steering in (other, there.at(-there.setting)):
        with pytest.raises(tt.TrimtabError, match="does not hold"):
            tt.strip(lm, baked, steering)
    with pytest.raises(tt.TrimtabError, match="there is nothing to take out"):
        tt.strip(lm, baked, there.at(0))
    same = tt.audit(lm, lm, other)
    assert (same.unexplained, same.explained) == (float("inf"), None)
    assert "the steerings would change 1 of them" in same.summary
    json.dumps(same.as_json(), allow_nan=False)


def test_an_edit_on_top_is_kept_by_the_inverse() -> None:
    lm = language_model("llama")
    for kind, op in (("ffn_out", "Scale"), ("resid", "Add"), ("attn_norm", "Rotate"),
                     ("ffn_out", "Ablate"), ("heads", "Scale")):  # fmt: skip
        steering = turned(steer_at(lm, kind, op), op)
        baked = tt.bake(lm, steering)
        changed = [change.name for change in tt.audit(lm, baked).changes]
        other = noisy(baked, changed, 1e-2)
        stripped = tt.strip(lm, other, steering)
        assert stripped.how == "inverse"
        # Baked again it is the edited model again.
        again = tt.bake(stripped.model, replace(steering, model=stripped.model.identity))
        for one, two in zip(other.logits(PROMPTS, at="all"), again.logits(PROMPTS, at="all"),
                            strict=True):  # fmt: skip
            assert relative(two, one) < 1e-4, (kind, op)


# -- inverses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_inverses_undo_their_operators(seed: int) -> None:
    width = 32
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    units = torch.tensor([2, 5, 30])
    cases: list[tuple[Any, float]] = [(operator(op, width, seed), 0.7) for op in LINEAR]
    cases += [
        (Affine(0.2 * random(width, 3), random(width, 3), random(width)), 1.3),
        (Affine(0.2 * random(width, 2), random(width, 2)), -0.5),
        (Shift(units, 1 + 0.3 * random(3), random(3), width), 0.8),
        (Scale(units, random(3), width), 0.4),
    ]
    lm = language_model("llama")
    x = random(4, 7, width)
    for op, dial in cases:
        steering = replace(steer(lm, ("layers.1.ffn_out", op)), value=dial)
        (undone,) = inverse(steering).interventions
        back = apply(undone.operator, apply(op, x, dial), undone.dial_at(1.0))
        assert relative(back, x) < 1e-5, op


def test_what_has_no_inverse_says_why() -> None:
    lm = language_model("llama")
    width = lm.anatomy.width("layers.1.ffn_out")
    r = torch.zeros(width)
    r[3] = 1
    units = torch.tensor([1, 2])
    for op, words in (
        (Ablate(r), "leaves nothing along its directions"),
        (Scale(units, torch.tensor([-1.0, 2.0]), width), "multiplies 1 unit by zero"),
        (Scale(units, torch.tensor([-3.0, -2.0]), width, True), "multiplies 2 units by zero"),
        (Affine(-r[:, None], r[:, None]), "leaves nothing along a direction"),
        (Add(r, "always"), "is not linear"),
    ):
        with pytest.raises(tt.TrimtabError, match=words) as raised:
            inverse(steer(lm, ("layers.1.ffn_out", op)))
        assert "cannot be taken out" in str(raised.value)
    late = replace(
        steer(lm, ("layers.1.ffn_out", Add(r))),
        interventions=(Intervention("layers.1.ffn_out", Add(r), "generated"),),
    )
    with pytest.raises(tt.TrimtabError, match="which no weights do"):
        inverse(late)


# -- files --------------------------------------------------------------------------------------


def saved(lm: tt.LanguageModel, folder: Path) -> str:
    return str(lm.save_pretrained(folder))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "qwen3_moe", "gemma3"])
def test_directories_are_read_from_their_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model(name)
    steering = steer_at(lm, "heads", "Scale")
    base = saved(lm, tmp_path / "base")
    other = saved(tt.bake(lm, steering), tmp_path / "other")
    with_models = tt.audit(base, other, steering)
    assert with_models.exact
    monkeypatch.setattr("trimtab.exchange.weights.load", None)  # nothing is loaded
    found = tt.audit(base, other)
    assert len(found.changes) == len(with_models.changes) == 1
    (one,), (two,) = found.changes, with_models.changes
    assert (one.norm, one.relative, one.edit) == (two.norm, two.relative, two.edit)
    assert found.notes == ()


def test_an_untied_table_is_compared_with_the_tied_one(tmp_path: Path) -> None:
    lm = language_model("qwen2")
    assert lm.model.config.tie_word_embeddings
    steering = steer_at(lm, "final_norm", "Scale")
    base = saved(lm, tmp_path / "base")
    other = saved(tt.bake(lm, steering), tmp_path / "other")
    found = tt.audit(base, other)
    (change,) = found.changes
    assert (change.name, change.site) == ("lm_head.weight", "final_norm")
    assert found.config["tie_word_embeddings"] == (True, False)
    assert tt.audit(base, other, steering).exact


def test_an_added_bias_is_one(tmp_path: Path) -> None:
    lm = language_model("mistral")
    steering = steer_at(lm, "resid", "Add")
    base = saved(lm, tmp_path / "base")
    other = saved(tt.bake(lm, steering), tmp_path / "other")
    for found in (tt.audit(base, other), tt.audit(base, other, steering)):
        (change,) = found.changes
        assert change.looks_like == "a constant added"
        assert change.site == "layers.1.ffn_out"
        assert "BASE is a mistral model, OTHER a llama model" in found.notes
        op: Any = steering.interventions[0].operator
        assert change.norm == pytest.approx(float((steering.setting * op.vector).norm()), rel=1e-5)
        assert change.relative is None
    stripped = tt.strip(base, other, steering)
    saved(stripped.model, tmp_path / "plain")
    assert not tt.audit(base, tmp_path / "plain").changes
    assert json.loads((tmp_path / "plain/config.json").read_text())["model_type"] == "mistral"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    lm = tt.wrap(tiny_model("llama", dtype=dtype), tiny_tokenizer(), "half")
    steering = steer_at(lm, "ffn_out", "Ablate")
    base = saved(lm, tmp_path / "base")
    other = saved(tt.bake(lm, steering), tmp_path / "other")
    (change,) = tt.audit(base, other).changes
    assert change.edit is not None
    assert (change.edit.kind, change.edit.rank) == ("ablation", 1)
    assert tt.audit(base, other, steering).exact
    # Baked in float32, and rounded afterwards.
    wide = tt.wrap(tiny_model("llama"), tiny_tokenizer(), "wide")
    full = tt.bake(wide, replace(steering, model=wide.identity))
    rounded = saved(tt.wrap(full.model.to(dtype), tiny_tokenizer(), "x"), tmp_path / "rounded")
    found = tt.audit(base, rounded, steering)
    assert found.fully_explained
    assert found.unexplained is not None
    assert found.unexplained < 0.2
    assert tt.strip(base, rounded, steering).how == "restored"


def test_a_merged_adapter_is_told_from_a_steering(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = language_model("llama")
    base = saved(lm, tmp_path / "base")
    model = peft.get_peft_model(
        copy.deepcopy(lm.model),
        peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=16),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(str(tmp_path / "adapter"))
    adapter = tmp_path / "adapter/adapter_config.json"
    adapter.write_text(json.dumps({**json.loads(adapter.read_text()),
                                   "base_model_name_or_path": base}))  # fmt: skip
    merged = tt.wrap(model.merge_and_unload(), tiny_tokenizer(), "merged")
    steering = steer_at(lm, "heads", "Scale")
    both = tt.bake(merged, replace(steering, model=merged.identity))
    for other in (saved(merged, tmp_path / "merged"), str(tmp_path / "adapter")):
        found = tt.audit(base, other)
        assert {change.edit.kind for change in found.changes if change.edit} == {"low rank"}
        assert {change.edit.rank for change in found.changes if change.edit} == {4}
        assert len(found.changes) == 6
    found = tt.audit(base, saved(both, tmp_path / "both"), steering)
    assert [change.name for change in found.changes if change.how] == [
        "model.layers.1.self_attn.o_proj.weight"
    ]
    assert found.explained is not None
    assert 0 < found.explained < 1
    stripped = tt.strip(base, both, steering)
    assert (stripped.how, tt.audit(merged, stripped.model).changes) == ("restored", ())


# -- what does not go together ------------------------------------------------------------------


def test_checkpoints_of_two_kinds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = saved(language_model("llama"), tmp_path / "llama")
    cases = {
        "gpt2": saved(language_model("gpt2"), tmp_path / "gpt2"),
        "wide": saved(language_model("llama", intermediate_size=96), tmp_path / "wide"),
        "deep": saved(language_model("llama", num_hidden_layers=4), tmp_path / "deep"),
    }
    of_deep = steer_at(language_model("llama"), "heads", "Scale")
    with pytest.raises(tt.TrimtabError, match="tensors are in only one of them"):
        tt.audit(llama, cases["deep"], of_deep)
    load = tt.load
    for name, words in (
        ("gpt2", "the one is llama, the other gpt2"),
        ("wide", "is [48, 80] in the one and [48, 96] in the other"),
        ("deep", "tensors are in only one of them, model.layers.3."),
    ):
        # Sizes and names in the files are enough, where they leave no hope.
        loading = load if name == "deep" else None
        monkeypatch.setattr("trimtab.exchange.weights.load", loading)
        with pytest.raises(tt.TrimtabError) as raised:
            tt.audit(llama, cases[name])
        said = str(raised.value)
        assert "cannot be compared: " in said
        assert words in said, said
        assert "\n" not in said


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    lm = language_model("llama")
    base, other = saved(lm, tmp_path / "base"), saved(lm, tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(content))
    with pytest.raises(tt.TrimtabError, match="their tokenizers differ in 2 tokens"):
        tt.audit(base, other)


def test_damage_is_refused(tmp_path: Path) -> None:
    lm = language_model("llama")
    base, other = saved(lm, tmp_path / "base"), saved(lm, tmp_path / "other")
    file = tmp_path / "other/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(tt.TrimtabError, match=f"{name} of .*other holds NaN or infinity"):
        tt.audit(base, other)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(tt.TrimtabError, match="cannot read .*other: cannot read model.safetensors"):
        tt.audit(base, other)
    with pytest.raises(tt.TrimtabError, match="is no pack|is not a model's directory|cannot load"):
        tt.audit(base, tmp_path / "nowhere")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(tt.TrimtabError, match="is quantised, and its numbers stand for others"):
        tt.audit(base, base)


def test_another_models_steering_is_refused() -> None:
    lm, other = language_model("llama"), language_model("llama", seed=1)
    steering = steer_at(other, "heads", "Scale")
    with pytest.raises(tt.TrimtabError, match="this steering was made for"):
        tt.audit(lm, tt.bake(lm, steering, force=True), steering)
    assert tt.audit(lm, tt.bake(lm, steering, force=True), steering, force=True).exact


# -- how it shows itself ------------------------------------------------------------------------


def test_a_result_as_tables_and_as_json() -> None:
    lm = language_model("llama")
    steering = turned(steer_at(lm, "ffn_out", "Ablate"), "Ablate")
    baked = tt.bake(lm, steering)
    other = noisy(baked, ["lm_head.weight"])
    found = tt.audit(lm, other, steering)
    blocks, tensors = found.tables()
    assert [row[0] for row in blocks.rows] == [1, "outside"]
    assert [row[-1] for row in blocks.rows] == ["nothing", "100 %"]
    assert {row[0] for row in tensors.rows} == {
        "model.layers.1.mlp.down_proj.weight", "lm_head.weight",
    }  # fmt: skip
    assert repr(found).startswith("<Audit: 2 of 30 tensors differ (")
    record = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert (record["tensors"], record["differing"], record["exact"]) == (30, 2, False)
    first = record["changes"][0]
    assert first["edit"]["kind"] in ("ablation", "dense")
    assert {"name", "layer", "site", "norm", "relative", "explained", "left", "how"} <= set(first)
    assert "tensor" in found.to_csv(1)
    assert tt.audit(lm, lm).tables() == []
    assert tt.audit(lm, lm).summary == "all 30 tensors are the same"
    plain = tt.audit(lm, other)
    assert plain.explained is None
    assert "unexplained" not in plain.tables()[1].heads
