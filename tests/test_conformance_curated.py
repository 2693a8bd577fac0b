"""Every method's steering on the curated architectures: plain hooks by hand are the oracle.

What `test_conformance` holds of the architectures that `reference.py` writes out, here without it:
each intervention of a steering is a plain hook on the architecture's own modules
(`plain_sites`), with the operator's formula by hand at the tokens that its positions name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, by_hand, left_padded, one_line, relative, token_ids
from method_settings import CASES, SETTINGS, setting_of
from plain_sites import plain_edit, plain_sites
from tiny import tiny_tokenizer
from tiny_curated import CURATED, curated_model
from trimtab.steering import POSITIONS, Positions, chosen

_SEVERAL = {"falcon_h1", "gemma4", "gemma4_moe", "gemma4_wrapper"} | {
    "granitemoehybrid",
    "granitemoehybrid_dense",
}
_NO_SITE = "has a branch without a site of its own"

#: The architectures for which a method refuses to be fitted, and what the refusal says.
REFUSED: dict[str, dict[str, str]] = {
    "ablation: writers": dict.fromkeys(_SEVERAL, _NO_SITE),
    "ablation: validation": dict.fromkeys(_SEVERAL, _NO_SITE),
}

#: A mixture of dense and linear maps writes or reads these sites alone, so that scaling bakes.
BAKES = ("sadi: head", "sadi: neuron", "austeer: heads", "austeer: ffn_in", "austeer: ffn_out")

#: Of the quick run: a state space beside attention, parallel blocks, experts with biases, linear
#: attention. Each of them has each method once, in another setting.
QUICK = ("falcon_h1", "gpt_neox", "gpt_oss", "qwen3_next")


def _quick(case: str, name: str) -> bool:
    settings = list(SETTINGS[case.partition(":")[0]])
    return name in QUICK and settings[QUICK.index(name) % len(settings)] == case.partition(": ")[2]


def _params(cases: list[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(name, case, marks=() if _quick(case, name) else pytest.mark.slow)
        for name, case in cases
    ]


_EVERY = [(name, case) for name in CURATED for case in CASES]
EVERY = _params(_EVERY)
FITTED = _params([(name, case) for name, case in _EVERY if name not in REFUSED.get(case, ())])


@cache
def _lm(name: str) -> tt.LanguageModel:
    """A tiny model that never ends a text."""
    lm = tt.wrap(curated_model(name), tiny_tokenizer(), name)
    lm.model.generation_config.eos_token_id = None
    return lm


@cache
def _fitted(case: str, name: str) -> tt.Steering:
    setting = setting_of(case)
    return setting.make(_lm(name)).fit(_lm(name), setting.contrast)


# -- by hand ----------------------------------------------------------------------------------


def _between(
    change: Callable[[Tensor], Tensor], first: int, stop: int
) -> Callable[[Tensor], Tensor]:
    """A change of some tokens of one sequence, [1, tokens, units] or [tokens, units]."""

    def edit(x: Tensor) -> Tensor:
        before, middle, after = x[..., :first, :], x[..., first:stop, :], x[..., stop:, :]
        return torch.cat((before, change(middle), after), dim=-2)

    return edit


@torch.no_grad()
def _expected(name: str, steering: tt.Steering | None, ids: list[int], end: int) -> Tensor:
    """Logits of one sequence whose prompt has `end` tokens, [tokens, vocabulary], in one pass."""
    model = _lm(name).model
    with ExitStack() as hooks:
        for each in () if steering is None else steering.interventions:
            first = {"all": 0, "prompt": 0, "generated": end, "last": end - 1}[str(each.positions)]
            stop = end if each.positions == "prompt" else len(ids)
            change = _between(by_hand(each.operator, steering.setting), first, stop)
            hooks.enter_context(plain_edit(model, name, each.site, change))
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


# -- what holds -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_fitted_and_kept_or_refused_with_the_reason(name: str, case: str, tmp_path: Path) -> None:
    if name in REFUSED.get(case, ()):
        with pytest.raises(tt.TrimtabError, match=REFUSED[case][name]) as caught:
            _fitted(case, name)
        one_line(caught)
        return
    steering = _fitted(case, name)
    sites = {each.site for each in steering.interventions}
    assert sites
    assert sites <= set(plain_sites(name))
    for kind, records in chosen(steering).items():
        if kind != "features":  # what the tables say was chosen is what is steered
            assert {record["site"] for record in records} == sites
    loaded = tt.Steering.load(steering.save(tmp_path / "one.safetensors"))
    logits = [_lm(name).logits(PROMPTS[:1], steering=one) for one in (steering, loaded)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(("name", "case"), FITTED)
def test_rows_of_a_batch_equal_plain_hooks(name: str, case: str) -> None:
    """Steered, not steered, and steered at another dial, padded beside each other."""
    lm, steering = _lm(name), _fitted(case, name)
    rows = [steering, None, replace(steering, value=steering.setting / 2)]
    batch = lm.logits(PROMPTS, steering=rows)
    for prompt, given, logits in zip(PROMPTS, rows, batch, strict=True):
        ids = token_ids(prompt)
        expected = _expected(name, given, ids, len(ids))[-1]
        assert relative(logits, expected) < 1e-4
        if given is not None:
            assert relative(expected, _expected(name, None, ids, len(ids))[-1]) > 1e-3


@pytest.mark.parametrize(("name", "case"), FITTED)
def test_text_at_positions_equals_plain_hooks(name: str, case: str) -> None:
    """Rows with positions of their own, written with a cache, are steered as the whole text is in
    one pass."""
    lm, new = _lm(name), 3
    rows = [_at(_fitted(case, name), one) for one in POSITIONS if one != "all"]
    with torch.no_grad(), lm.steered(rows):
        out = lm.model.generate(
            **left_padded(lm, PROMPTS),
            do_sample=False,
            max_new_tokens=new,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for i, (prompt, steering) in enumerate(zip(PROMPTS, rows, strict=True)):
        ids = token_ids(prompt)
        end = len(ids)
        ids += out.sequences[i, -new:].tolist()
        seen = torch.stack([logits[i] for logits in out.logits])
        # The prompt's last token and those after it, but for the last, are what is read.
        expected = _expected(name, steering, ids, end)[end - 1 : -1]
        assert relative(seen, expected) < 1e-4, steering.interventions[0].positions


def _at(steering: tt.Steering, positions: Positions) -> tt.Steering:
    moved = [replace(each, positions=positions) for each in steering.interventions]
    return replace(steering, interventions=tuple(moved))


@pytest.mark.parametrize(("name", "case"), FITTED)
def test_baked_equals_attached_or_is_refused_with_the_reason(name: str, case: str) -> None:
    lm, steering = _lm(name), _fitted(case, name)
    try:
        baked = tt.bake(lm, steering)
    except tt.TrimtabError as error:
        message = str(error)
        assert "\n" not in message
        assert "cannot bake" in message
        assert "attach" in message
        assert case not in BAKES, message
        return
    assert setting_of(case).bakes != frozenset()
    ids = token_ids(PROMPTS[0])
    with torch.no_grad():
        logits = baked.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert relative(logits, _expected(name, steering, ids, len(ids))) < 1e-4
