"""What every method's steering has in common, on every architecture: one body of tests.

A new method gets all of it with its defaults, and with other settings by being listed in
`method_settings.SETTINGS`. The oracle for what a steering does is
`reference.py`, with the operators applied by hand at their sites.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from adapters import peft_model
from helpers import (
    PROMPTS,
    by_hand,
    language_model,
    operator,
    plain_logits,
    relative,
    steer,
    token_ids,
)
from method_settings import CASES, setting_of
from reference import reference
from tiny import TINY
from trimtab.methods.contents import describe, explain


@cache
def _wrapped(name: str, **options: Any) -> tt.LanguageModel:
    return language_model(name, **options)


@cache
def _fitted(case: str, name: str) -> tt.Steering:
    setting = setting_of(case)
    return setting.make(_wrapped(name)).fit(_wrapped(name), setting.contrast)


@cache
def _plain(name: str) -> Tensor:
    """Logits after each of the prompts without steering."""
    logits: Tensor = _wrapped(name).logits(PROMPTS)
    return logits


@cache
def _alone(case: str, name: str) -> Tensor:
    """Steered logits after the first prompt, run by itself: the shorter ones are padded beside."""
    logits: Tensor = _wrapped(name).logits(PROMPTS[:1], steering=_fitted(case, name))[0]
    return logits


def _edits(steerings: list[tt.Steering], tokens: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What the steerings do to a text of so many tokens, all of them prompt, as plain formulas."""
    chains: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    for steering in steerings:
        for intervention in steering.interventions:
            change = by_hand(intervention.operator, intervention.dial_at(steering.setting))
            # Of a prompt, `last` is its last token, and all and `prompt` the whole.
            ends = [*range(min(5, tokens)), *range(max(5, tokens - 5), tokens)]
            rows = {"last": [tokens - 1], "prompt[:5] | prompt[-5:]": ends}.get(
                str(intervention.scope), list(range(tokens))
            )

            def at_positions(x: Tensor, change: Any = change, rows: list[int] = rows) -> Tensor:
                changed = x.clone()
                changed[rows] = change(x[rows])
                return changed

            chains.setdefault(intervention.site, []).append(at_positions)

    def chained(chain: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            for change in chain:
                x = change(x)
            return x

        return edit

    return {site: chained(chain) for site, chain in chains.items()}


def _expected(name: str, steerings: list[tt.Steering], prompt: str = PROMPTS[0]) -> Tensor:
    """Logits after a prompt, by hand in float64."""
    ids = token_ids(prompt)
    _, logits = reference(name, _wrapped(name).model, ids, _edits(steerings, len(ids)))
    return logits[-1]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("case", CASES)
class TestConformance:
    def test_fit_and_file(self, case: str, name: str, tmp_path: Path) -> None:
        steering = _fitted(case, name)
        assert steering.method == case.partition(":")[0]
        assert steering.interventions
        path = steering.save(tmp_path / "one.safetensors")
        loaded = tt.Steering.load(path)
        assert path.read_bytes() == loaded.save(tmp_path / "two.safetensors").read_bytes()
        assert loaded.label == steering.label
        assert describe(loaded) == describe(steering)
        assert explain(loaded) == explain(steering)
        assert loaded.tables.keys() == steering.tables.keys()
        assert all(torch.equal(loaded.tables[key], steering.tables[key]) for key in loaded.tables)
        logits = _wrapped(name).logits(PROMPTS[:1], steering=loaded)[0]
        assert torch.equal(logits, _alone(case, name))

    def test_attached_is_the_formula_by_hand(self, case: str, name: str) -> None:
        logits = _alone(case, name)
        assert relative(logits, _expected(name, [_fitted(case, name)])) < 1e-4
        assert relative(logits, _plain(name)[0]) > 1e-3

    def test_the_identity_is_bit_identical(self, case: str, name: str) -> None:
        lm, steering, dial = _wrapped(name), _fitted(case, name), setting_of(case).identity
        plain = _plain(name)
        if dial is None:
            assert not torch.equal(lm.logits(PROMPTS, steering=steering.at(0)), plain)
            return
        assert torch.equal(lm.logits(PROMPTS, steering=steering.at(dial)), plain)
        # Beside rows that are steered it is computed, and still nothing changes. (Experts add up
        # in another order when the rows beside choose others.)
        both = lm.logits(PROMPTS, steering=[steering, steering.at(dial), steering])
        if name == "qwen3_moe":
            assert relative(both[1], plain[1]) < 1e-5
        else:
            assert torch.equal(both[1], plain[1])
        assert not torch.equal(both[0], plain[0])

    def test_padding_and_rows(self, case: str, name: str) -> None:
        """In a batch each row is what it is alone, with its own steering or without one."""
        lm, steering, alone = _wrapped(name), _fitted(case, name), _alone(case, name)
        turned = steering.at(steering.setting / 2)
        together = lm.logits(PROMPTS, steering=steering)
        assert relative(together[0], alone) < 1e-4
        mixed = lm.logits(PROMPTS, steering=[steering, None, turned])
        assert relative(mixed[0], alone) < 1e-4
        assert relative(mixed[1], _plain(name)[1]) < 1e-4
        assert relative(mixed[2], lm.logits(PROMPTS[2:], steering=turned)[0]) < 1e-4
        assert relative(mixed[2], together[2]) > 1e-3

    def test_generation_with_and_without_cache(self, case: str, name: str) -> None:
        """A row of a padded batch with a cache writes what the text alone does without one."""
        lm, steering = _wrapped(name), _fitted(case, name)
        ids = token_ids(PROMPTS[1])
        with lm.steered(steering):
            whole = lm.model.generate(
                torch.tensor([ids]), max_new_tokens=3, do_sample=False, use_cache=False
            )
        done = lm.generate(PROMPTS[:2], max_new_tokens=3, chat=False, steering=[None, steering])
        assert list(done[1].tokens) == whole[0, len(ids) :].tolist()
        assert done[1].steering == (steering.label,)

    def test_bfloat16(self, case: str, name: str) -> None:
        steering = _fitted(case, name)  # made in float32: the signs of weights are the same
        half = _wrapped(name, dtype=torch.bfloat16).logits(PROMPTS, steering=steering)
        expected = _wrapped(name).logits(PROMPTS, steering=steering)
        errors = [relative(one, other) for one, other in zip(half, expected, strict=True)]
        # The median, because rounding may take one text past a threshold: to another expert, or
        # to the other side of AAS's condition.
        assert sorted(errors)[1] < 0.15

    def test_bake(self, case: str, name: str) -> None:
        lm, steering, setting = _wrapped(name), _fitted(case, name), setting_of(case)
        if setting.bakes is None:
            with suppress(tt.TrimtabError):
                baked = tt.bake(lm, steering).logits(PROMPTS[:1])[0]
                assert relative(baked, _alone(case, name)) < 1e-4
            return
        if name not in setting.bakes:
            with pytest.raises(tt.TrimtabError, match=setting.reason) as caught:
                tt.bake(lm, steering)
            assert "attach" in str(caught.value)
            return
        baked = tt.bake(lm, steering).logits(PROMPTS[:1])[0]
        assert relative(baked, _alone(case, name)) < 1e-4

    def test_export(self, case: str, name: str, tmp_path: Path) -> None:
        """An adapter and what it leaves out are the attached steering, or there is no adapter."""
        lm, steering = _wrapped(name), _fitted(case, name)
        try:
            tt.export(lm, steering, "lora", tmp_path / "a", split=True)
        except tt.TrimtabError as error:
            said = str(error)
            assert re.fullmatch("an adapter cannot carry .*attach it.*", said)
            return
        model = peft_model(name, tmp_path / "a")
        rest = [tt.Steering.load(file) for file in sorted(tmp_path.glob("a/trimtab/left-*"))]
        with tt.wrap(model, lm.tokenizer, name).steered(*rest, force=True):
            logits = plain_logits(model, token_ids(PROMPTS[0]))[-1]
        assert relative(logits, _alone(case, name)) < 1e-4

    def test_together_with_another(self, case: str, name: str) -> None:
        """a + b and b + a at one site, each in its order."""
        lm, a = _wrapped(name), _fitted(case, name)
        site = a.interventions[0].site
        b = steer(lm, (site, operator("Add", lm.anatomy.width(site))), alpha=0.5)
        for both in (a + b, b + a):
            logits = lm.logits(PROMPTS[:1], steering=both)[0]
            assert relative(logits, _expected(name, list(both))) < 1e-4

    def test_another_model_is_refused(self, case: str, name: str) -> None:
        steering, other = _fitted(case, name), _wrapped(name, seed=1)
        with pytest.raises(tt.TrimtabError, match="force"):
            other.logits(PROMPTS[:1], steering=steering)
        with pytest.raises(tt.TrimtabError, match="force"):
            tt.bake(other, steering)
        with other.steered(steering, force=True):
            pass
        smaller = _wrapped(name, num_hidden_layers=2)
        with pytest.raises(tt.TrimtabError, match="sizes do not fit"):
            smaller.logits(PROMPTS[:1], steering=steering, force=True)


def test_force_steers_another_model() -> None:
    """What it does there is the same formula."""
    name, case = "llama", "caa: answer"
    other = _wrapped(name, seed=1)
    found = other.logits(PROMPTS[:1], steering=_fitted(case, name), force=True)[0]
    ids = token_ids(PROMPTS[0])
    _, logits = reference(name, other.model, ids, _edits([_fitted(case, name)], len(ids)))
    assert relative(found, logits[-1]) < 1e-4
