"""Every method's steering on the curated architectures: plain hooks by hand are the oracle.

What `test_conformance` holds of the architectures that `reference.py` writes out, here without it:
each intervention of a steering is a plain hook on the architecture's own modules
(`plain_sites`), with the operator's formula by hand at the tokens that its positions name.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, add, by_hand, left_padded, one_line, relative, scale, steer, token_ids
from method_settings import CASES, SETTINGS, setting_of
from plain_sites import Change, at_positions, plain_edit, plain_sites
from tiny import tiny_tokenizer
from tiny_curated import CURATED, curated_model
from trimtab.steering import POSITIONS, Positions, Scope, chosen

#: Three things are added to the stream in each block, or in some: embeddings for each layer, a
#: state space beside attention, a mixture beside an FFN.
_THREE = ("falcon_h1", "gemma4", "gemma4_wrapper", "granitemoehybrid")

#: Of Gemma 4's mixture: dense FFN and experts read norms of their own, and a norm reads their sum.
_NO_FFN_NORM = {"gemma4_moe": "no layers.0.ffn_norm: .* not to be seen at a module"}
_NO_FFN_OUT = {"gemma4_moe": "no (layers.0.)?ffn_out: .* is no module's output"}
_NO_FFN_IN = {"gemma4_moe": "no ffn_in: no linear map, and no experts of a known layout"}

#: The architectures for which a method refuses to be fitted, and what the refusal says.
REFUSED: dict[str, dict[str, str]] = {
    **{
        f"ablation: {case}": dict.fromkeys(_THREE, "a branch without a site of its own")
        for case in ("writers", "validation", "kernels", "several")
    },
    "ablation: norms": _NO_FFN_NORM,
    # The mixture and the shared FFN read one norm, whose input is not the block's.
    "sas: input": _NO_FFN_NORM | {"granitemoehybrid": "is shared; take candidates"},
    "sas: post norms": _NO_FFN_OUT | {"granitemoehybrid": "is shared; take candidates"},
    "aas: output": _NO_FFN_NORM,
    "ss: sites": _NO_FFN_NORM,
    "ss: prompt": _NO_FFN_NORM,
    # Its activation function is no module.
    "sadi: neuron": _NO_FFN_IN | {"lfm2": "no module of its FFN is its activation function"},
    "austeer: ffn_in": _NO_FFN_IN,
    "austeer: ffn_out": _NO_FFN_OUT,
    "austeer: absolute": _NO_FFN_OUT,
    "austeer: vector": _NO_FFN_OUT,
    "austeer: effect ffn_in": _NO_FFN_IN,
    "austeer: effect ffn_out": _NO_FFN_OUT,
}

#: What they scale is written or read by maps of weights, which can take it.
BAKES = (
    *("sadi: head", "sadi: neuron", "austeer: heads", "austeer: ffn_in", "austeer: ffn_out"),
    *(f"austeer: effect {site}" for site in ("heads", "attn_out", "ffn_in", "ffn_out")),
)

#: Gemma 4 reads the embeddings again, in its embeddings for each layer.
UNFORESEEN = ("gemma4", "ablation: embed")

#: Of the quick run: a state space beside attention, parallel blocks, experts with biases, linear
#: attention. Each of them has each method once, in another setting.
QUICK = ("falcon_h1", "gpt_neox", "gpt_oss", "qwen3_next")
#: And heads of several widths, or in one layer only, blocks of one branch, shared norms.
ALSO_QUICK = {
    ("gemma4", "iti: mean"),
    ("qwen3_next", "sadi: head"),
    ("nemotron_h", "ablation: norms"),
    ("gptj", "sas: post norms"),
}


def _quick(case: str, name: str) -> bool:
    if (name, case) in ALSO_QUICK:
        return True
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
def _lm(name: str, dtype: torch.dtype = torch.float32) -> tt.LanguageModel:
    """A tiny model that never ends a text."""
    lm = tt.wrap(curated_model(name, dtype=dtype), tiny_tokenizer(), name)
    lm.model.generation_config.eos_token_id = None
    return lm


@cache
def _fitted(case: str, name: str) -> tt.Steering:
    setting = setting_of(case)
    return setting.make(_lm(name)).fit(_lm(name), setting.contrast)


# -- by hand ----------------------------------------------------------------------------------


@torch.no_grad()
def _expected(
    name: str,
    steerings: Iterable[tt.Steering],
    ids: list[int],
    end: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits of one sequence whose prompt has `end` tokens, [tokens, vocabulary], in one pass."""
    model = _lm(name, dtype).model
    with ExitStack() as hooks:
        for site, change in _changes(steerings, end).items():
            hooks.enter_context(plain_edit(model, name, site, change))
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _changes(steerings: Iterable[tt.Steering], end: int) -> dict[str, Change]:
    """What happens at each site, in float32: one change after the other."""
    chains: dict[str, list[Change]] = {}
    for steering in steerings:
        for each in steering.interventions:
            change = by_hand(each.operator, each.dial_at(steering.setting))
            change = at_positions(change, str(each.scope), end)
            chains.setdefault(each.site, []).append(change)

    def chained(chain: list[Change]) -> Change:
        return lambda x: reduce(lambda y, change: change(y), chain, x.float()).to(x.dtype)

    return {site: chained(chain) for site, chain in chains.items()}


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
        expected = _expected(name, [] if given is None else [given], ids, len(ids))[-1]
        assert relative(logits, expected) < 1e-4
        if given is not None:
            assert relative(expected, _expected(name, [], ids, len(ids))[-1]) > 1e-3


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
        expected = _expected(name, [steering], ids, end)[end - 1 : -1]
        assert relative(seen, expected) < 1e-4, steering.interventions[0].scope


@pytest.mark.parametrize(("name", "case"), FITTED)
def test_the_identity_changes_nothing(name: str, case: str) -> None:
    lm, steering, dial = _lm(name), _fitted(case, name), setting_of(case).identity
    if dial is None:
        return  # an absolute angle
    still = replace(steering, value=dial)
    plain = lm.logits(PROMPTS)
    assert torch.equal(lm.logits(PROMPTS, steering=still), plain)
    # Experts add up in another order when the rows beside choose others.
    beside = lm.logits(PROMPTS, steering=[steering, still, steering])
    assert relative(beside[1], plain[1]) < 1e-5


@pytest.mark.parametrize(("name", "case"), FITTED)
def test_two_steerings_act_one_after_the_other(name: str, case: str) -> None:
    lm, one = _lm(name), _fitted(case, name)
    ids, site = token_ids(PROMPTS[0]), one.interventions[0].site
    other = steer(
        lm, ("final_norm", add(lm.anatomy.hidden_size)), (site, scale(lm.anatomy.width(site)))
    )
    for both in (one + other, other + one):
        logits = lm.logits(PROMPTS[:1], steering=both)[0]
        assert relative(logits, _expected(name, list(both), ids, len(ids))[-1]) < 1e-4


@pytest.mark.parametrize(("name", "case"), FITTED)
def test_bfloat16(name: str, case: str) -> None:
    """Computed in float32 and rounded, at each site."""
    steering, dtype = _fitted(case, name), torch.bfloat16
    errors = []
    for prompt in PROMPTS:
        ids = token_ids(prompt)
        expected = _expected(name, [steering], ids, len(ids), dtype)[-1]
        logits = _lm(name, dtype).logits([prompt], steering=steering)[0]
        errors.append(relative(logits, expected))
    # The median, because rounding may take one text past a threshold: to another expert, or to
    # the other side of AAS's condition.
    assert sorted(errors)[1] < 0.05


def _at(steering: tt.Steering, positions: Positions) -> tt.Steering:
    moved = [replace(each, scope=Scope.parse(positions)) for each in steering.interventions]
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
        # The comparison that ends a bake finds what is not known; all but this is known.
        assert ("differ from the steered" in message) == ((name, case) == UNFORESEEN), message
        return
    assert setting_of(case).bakes != frozenset()
    ids = token_ids(PROMPTS[0])
    with torch.no_grad():
        logits = baked.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert relative(logits, _expected(name, [steering], ids, len(ids))) < 1e-4
