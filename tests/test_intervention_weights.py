"""A weight for each intervention: one dial turns a kernel over layers, everywhere the same way."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import trimtab as tt
from helpers import (
    PROMPTS,
    language_model,
    refused_in_one_line,
    relative,
    steer,
    token_ids,
    traces,
    with_range,
)
from reference import reference
from trimtab import strength
from trimtab.dials.turning import Turning, dial_limits, idle_dial
from trimtab.methods import describe, explain
from trimtab.steering import chosen
from trimtab.steering.operators import Ablate, Add, Clamp, Operator, Rotate, Scale, orthonormal

#: One weight for each of three blocks.
KERNEL = (0.5, 1.0, 0.0)

_lm = cache(language_model)


def direction(seed: int = 0, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthonormal(torch.randn(1, width, generator=generator))[0].float()


def weighted(lm: tt.LanguageModel, operator: Operator, *weights: float) -> tt.Steering:
    """An operator at the FFN of each block, with these weights."""
    sites = [(f"layers.{i}.ffn_out", operator) for i in range(len(weights))]
    steering = steer(lm, *sites)
    pairs = zip(steering.interventions, weights, strict=True)
    return replace(
        steering, interventions=tuple(replace(each, weight=weight) for each, weight in pairs)
    )


def apart(lm: tt.LanguageModel, vector: Tensor, *weights: float) -> tt.Steering:
    """The same as added vectors, each as long as its weight says."""
    sites = [(f"layers.{i}.ffn_out", Add(weight * vector)) for i, weight in enumerate(weights)]
    return steer(lm, *sites)


def logits_by_hand(lm: tt.LanguageModel, vector: Tensor, dials: list[float]) -> Tensor:
    edits = {
        f"layers.{i}.ffn_out": lambda x, dial=dial: x - dial * (x @ vector)[..., None] * vector
        for i, dial in enumerate(dials)
    }
    return reference(lm.name, lm.model, token_ids(PROMPTS[0]), edits)[1][-1]


def test_each_block_is_turned_by_its_weight() -> None:
    lm, r = _lm("llama"), direction()
    steering = weighted(lm, Ablate(r), *KERNEL).at(0.8)
    expected = logits_by_hand(lm, r.double(), [0.4, 0.8, 0.0])
    assert relative(lm.logits(PROMPTS[:1], steering=steering)[0], expected) < 1e-4
    baked = tt.bake(lm, steering)
    assert relative(baked.logits(PROMPTS[:1])[0], expected) < 1e-4
    weights = [block.mlp.down_proj.weight for block in baked.model.model.layers]
    old = [block.mlp.down_proj.weight for block in lm.model.model.layers]
    assert [torch.equal(a, b) for a, b in zip(weights, old, strict=True)] == [False, False, True]


def test_a_block_of_no_weight_has_no_hook() -> None:
    lm = _lm("llama")
    steering = weighted(lm, Scale(torch.arange(48), torch.ones(48), 48), *KERNEL)
    before = traces(lm.model)
    with lm.steered(steering.at(2)):
        during = traces(lm.model)
    changed = {name for name in before if before[name] != during[name]}
    assert not any("layers.2." in name for name in changed)
    assert any("layers.1." in name for name in changed)


def test_rows_and_sums_are_weighted() -> None:
    lm, v = _lm("llama"), 2 * direction(1)
    one, same = weighted(lm, Add(v), *KERNEL), apart(lm, v, *KERNEL)
    other = weighted(lm, Rotate(torch.stack((direction(2), _right_angle(2)))), 1.0, -1.0)
    for rows, expected in (
        ([one.at(2), None, one.at(-1)], [same.at(2), None, same.at(-1)]),
        ([one + other.at(40), other.at(40) + one, None], None),
    ):
        found = lm.logits(PROMPTS, steering=rows)
        for i, row in enumerate(expected or rows):
            alone = lm.logits(PROMPTS[i : i + 1], steering=row)[0]
            assert relative(found[i], alone) < 1e-4
    by_hand = steer(
        lm,
        ("layers.0.ffn_out", Rotate(torch.stack((direction(2), _right_angle(2))))),
        ("layers.1.ffn_out", Rotate(torch.stack((_right_angle(2), direction(2))))),
    )
    assert (
        relative(
            lm.logits(PROMPTS, steering=other.at(40)), lm.logits(PROMPTS, steering=by_hand.at(40))
        )
        < 1e-4
    )


def _right_angle(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 100)
    return orthonormal(torch.stack((direction(seed), torch.randn(48, generator=generator))))[
        1
    ].float()


def test_dials_that_are_turned_or_found_are_weighted() -> None:
    lm, v = _lm("llama"), 2 * direction(1)
    one, same = (
        with_range(make) for make in (weighted(lm, Add(v), *KERNEL), apart(lm, v, *KERNEL))
    )
    texts, dials = [token_ids(prompt) for prompt in PROMPTS], [0.5, -1.0, 2.0]
    for (_, *found), (_, *expected) in zip(
        *(Turning(lm, each, texts).derivative([0, 1, 2], dials) for each in (one, same)),
        strict=True,
    ):
        for a, b in zip(found, expected, strict=True):
            assert relative(a, b) < 1e-4
    budgets = [strength.budget(lm, each, PROMPTS, kl=0.05) for each in (one, same)]
    found, expected = ([each.dial for each in budget.per_prompt] for budget in budgets)
    assert found == pytest.approx(expected, rel=1e-3)
    for scope in ("all", "all ~ 0.9"):
        written = []
        for each in (one, same):
            rule = tt.within(each.scoped(scope), kl=0.05)
            with lm.steered(rule):  # dials are found while the model runs
                written.append(lm.model(torch.tensor([texts[0]]), use_cache=False).logits)
        assert relative(*written) < 1e-4
    ends = [strength.limit(lm, each) for each in (one, same)]
    assert relative(*ends) < 1e-5


def test_what_is_known_of_the_dial() -> None:
    lm, plane = _lm("llama"), torch.stack((direction(2), _right_angle(2)))
    halved = with_range(weighted(lm, Rotate(plane), 0.5, -0.25), -1000, 1000)
    assert dial_limits(halved) == (-720, 720)
    assert idle_dial(halved) == 0.0
    assert idle_dial(weighted(lm, Clamp(direction(), 0.0), 2.0, 0.0)) == 0.0


def test_the_file_says_it_where_it_is_not_one(tmp_path: Path) -> None:
    lm = _lm("llama")
    plain, kernel = weighted(lm, Add(direction()), 1.0), weighted(lm, Add(direction()), -0.5)
    for steering, said in ((plain, [None]), (kernel, [-0.5])):
        path = steering.save(tmp_path / f"{said[0]}.safetensors")
        with safe_open(path, framework="pt") as file:
            document = json.loads(file.metadata()["trimtab"])
        assert [one.get("weight") for one in document["interventions"]] == said
        again = tt.Steering.load(path)
        assert [each.weight for each in again.interventions] == [said[0] or 1.0]
        assert again.digest == steering.digest
        assert path.read_bytes() == again.save(tmp_path / "again", overwrite=True).read_bytes()
    assert plain.digest != kernel.digest
    assert [one.get("weight") for one in describe(kernel)["interventions"]] == [-0.5]
    assert "weight" not in describe(plain)["interventions"][0]
    assert "Add (weight -0.5) on 48 units of layers.0.ffn_out" in explain(kernel)[0]


def test_a_weight_beyond_float32_is_refused(tmp_path: Path) -> None:
    steering = weighted(_lm("llama"), Add(direction()), 1e39)
    refused_in_one_line(lambda: steering.save(tmp_path / "no.safetensors"), "weight")
    assert not (tmp_path / "no.safetensors").exists()


def test_a_kernel_without_weight_does_nothing(tmp_path: Path) -> None:
    steering = weighted(_lm("llama"), Add(direction()), 0.0, 0.0)
    assert not steering.acts
    refused_in_one_line(lambda: steering.save(tmp_path / "no.safetensors"), "does nothing")


def test_the_gammas_of_units_are_weighted() -> None:
    lm = _lm("llama")
    scale = Scale(torch.tensor([3, 5]), torch.tensor([1.0, -1.0]), 48)
    steering = weighted(lm, scale, 0.5, 2.0)
    tables = {
        "layer": torch.tensor([0, 0, 1, 1]),
        "unit": torch.tensor([3, 5, 3, 5]),
        "gain": torch.tensor([1.0, -1.0, 1.0, -1.0]),
    }
    units = chosen(replace(steering, tables=tables, value=3.0))["units"]
    assert [unit["gamma"] for unit in units] == [1.5, -1.5, 6.0, -6.0]


@pytest.mark.parametrize("weight", ["image", float("nan"), float("inf"), None])
def test_a_weight_is_a_finite_number(weight: Any) -> None:
    with pytest.raises(tt.TrimtabError, match="weight.*layers.0.resid.*finite number"):
        tt.Intervention("layers.0.resid", Add(direction(1)), "all", weight)
