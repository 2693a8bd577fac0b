"""Every curated architecture: sites, edits, positions and bakes equal plain hooks by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import (
    IDS,
    LINEAR,
    PROMPTS,
    TELLING,
    by_hand,
    left_padded,
    operator,
    relative,
    steer,
    token_ids,
)
from plain_sites import at_positions, plain_capture, plain_edit, plain_sites
from tiny import TINY, tiny_model, tiny_tokenizer
from tiny_curated import CURATED, curated_model
from trimtab.anatomy import KINDS, hooked, site_order
from trimtab.steering import POSITIONS, Positions

#: The kinds of sites at which most methods steer.
MAIN = ("resid", "heads", "ffn_in", "ffn_out")
OPS = ("Add", "Scale", "Rotate")


@cache
def _lm(name: str) -> tt.LanguageModel:
    """A tiny model that never ends a text. Shared: what a test does to it ends with its block."""
    model = tiny_model(name) if name in TINY else curated_model(name)
    lm = tt.wrap(model, tiny_tokenizer(), name)
    lm.model.generation_config.eos_token_id = None
    return lm


def _site_of(name: str, kind: str) -> str | None:
    """A site of a kind: that of the middle layer that has one."""
    found = [site for site in plain_sites(name) if site.split(".")[-1] == kind]
    return found[len(found) // 2] if found else None


def _kinds(name: str) -> list[str]:
    return list(dict.fromkeys(site.split(".")[-1] for site in plain_sites(name)))


def _steering(name: str, site: str, op: str, positions: Positions = "all") -> tt.Steering:
    """A random operator at a site, at a dial at which it shows."""
    lm = _lm(name)
    made = operator(op, lm.anatomy.width(site), seed=1)
    return replace(steer(lm, (site, made), positions=positions), value=TELLING[op])


def _change(steering: tt.Steering) -> Callable[[Tensor], Tensor]:
    return by_hand(steering.interventions[0].operator, steering.setting)


@torch.no_grad()
def _plain(name: str, ids: list[int]) -> Tensor:
    return _lm(name).model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def _edited(name: str, site: str, change: Callable[[Tensor], Tensor], ids: list[int]) -> Tensor:
    """Logits of one sequence with a plain hook on a site, [tokens, vocabulary]."""
    with plain_edit(_lm(name).model, name, site, change):
        return _plain(name, ids)


# -- sites ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TINY, *CURATED])
def test_there_are_the_sites_that_the_code_has_and_no_others(name: str) -> None:
    places = _lm(name).anatomy
    found = [site for kind in KINDS if places.has(kind) for site in places.sites(kind)]
    assert sorted(found, key=site_order) == sorted(plain_sites(name), key=site_order)


@pytest.mark.parametrize("name", [*TINY, *CURATED])
def test_every_site_is_what_a_plain_hook_sees(name: str) -> None:
    lm, seen = _lm(name), {}
    edits = {lm.anatomy.point(site): partial(seen.__setitem__, site) for site in plain_sites(name)}
    with torch.no_grad(), hooked(lm.anatomy.body, edits):
        logits = _plain(name, IDS)
    expected = plain_capture(lm.model, name, IDS)
    assert relative(logits, expected.pop("logits")) < 1e-5
    for site, value in expected.items():
        assert seen[site].shape == (1, len(IDS), lm.anatomy.width(site)), site
        assert relative(seen[site][0], value) < 1e-5, site


# -- edits ------------------------------------------------------------------------------------


def _rows(steering: tt.Steering) -> list[tt.Steering | None]:
    """One for each prompt: steered, not steered, steered the other way."""
    return [steering, None, replace(steering, value=-steering.setting)]


def _check_rows(name: str, site: str, op: str) -> None:
    """A padded batch, each row by itself, equals the rows one by one."""
    steering = _steering(name, site, op)
    rows = _rows(steering)
    batch = _lm(name).logits(PROMPTS, steering=rows, at="all")
    for prompt, given, logits in zip(PROMPTS, rows, batch, strict=True):
        ids = token_ids(prompt)
        change = (lambda x: x) if given is None else _change(given)
        assert relative(logits, _edited(name, site, change, ids)) < 1e-4, (site, op)
    # A norm that follows may not feel a change of length, but feels these.
    assert relative(batch[0], _plain(name, token_ids(PROMPTS[0]))) > 1e-4, (site, op)


@pytest.mark.parametrize("name", CURATED)
def test_an_edit_at_each_kind_of_site_equals_plain_hooks(name: str) -> None:
    for number, kind in enumerate(_kinds(name)):
        site = _site_of(name, kind)
        assert site is not None
        _check_rows(name, site, OPS[number % len(OPS)])


@pytest.mark.slow
@pytest.mark.parametrize("name", CURATED)
def test_every_edit_at_every_site_equals_plain_hooks(name: str) -> None:
    for site in plain_sites(name):
        for op in OPS:
            _check_rows(name, site, op)


# -- generated text ---------------------------------------------------------------------------


@torch.no_grad()
def _written(name: str, rows: Sequence[tt.Steering | None], use_cache: bool, new: int) -> Any:
    """Greedy text of a padded batch by transformers' own generate: tokens [rows, new], and the
    logits of each of them [rows, new, vocabulary]."""
    lm = _lm(name)
    with lm.steered(list(rows)):
        out = lm.model.generate(
            **left_padded(lm, PROMPTS),
            do_sample=False,
            max_new_tokens=new,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, -new:], torch.stack(out.logits, dim=1)


def _check_text(
    name: str,
    rows: Sequence[tt.Steering | None],
    new: int = 3,
    caches: Sequence[bool] = (True, False),
) -> None:
    """Text that is written with a cache, and without, is steered as the whole of it is in one pass
    over prompt and text, with a plain hook on it."""
    for use_cache in caches:
        written, logits = _written(name, rows, use_cache, new)
        for prompt, given, tokens, seen in zip(PROMPTS, rows, written, logits, strict=True):
            end = len(token_ids(prompt))
            ids = [*token_ids(prompt), *tokens.tolist()]
            if given is None:
                expected = _plain(name, ids)
            else:
                one = given.interventions[0]
                change = at_positions(_change(given), str(one.scope), end)
                expected = _edited(name, one.site, change, ids)
                assert relative(expected, _plain(name, ids)) > 1e-4, given
            # The prompt's last token and those after it, but for the last, are what is read.
            assert relative(seen, expected[end - 1 : -1]) < 1e-4, (given, use_cache)


@pytest.mark.parametrize("name", CURATED)
def test_text_with_and_without_a_cache_is_steered_as_the_whole_of_it_is(name: str) -> None:
    for kind, op in zip(MAIN, ("Add", "Rotate", "Scale", "Add"), strict=True):
        if (site := _site_of(name, kind)) is not None:
            caches = (True, False) if kind == "resid" else (True,)
            _check_text(name, _rows(_steering(name, site, op)), caches=caches)


@pytest.mark.parametrize("name", CURATED)
def test_positions_are_counted_as_the_text_grows(name: str) -> None:
    site = _site_of(name, "attn_out")
    assert site is not None
    _check_text(name, [_steering(name, site, "Add", one) for one in POSITIONS if one != "all"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CURATED)
def test_text_is_steered_by_every_operator_at_every_position(name: str) -> None:
    for kind in MAIN:
        if (site := _site_of(name, kind)) is not None:
            for op in OPS:
                _check_text(name, _rows(_steering(name, site, op)), new=5)
                each = [_steering(name, site, op, one) for one in POSITIONS if one != "all"]
                _check_text(name, each, new=5)


# -- baking -----------------------------------------------------------------------------------


def _bake(name: str, site: str, op: str) -> bool:
    """Whether it bakes; then it equals plain hooks, else one line says why not."""
    steering, refusal = _steering(name, site, op), None
    try:
        baked = tt.bake(_lm(name), steering)
    except tt.TrimtabError as error:
        refusal = str(error)
    if refusal is not None:
        assert "cannot bake" in refusal, (site, op)
        assert "\n" not in refusal
        return False
    expected = _edited(name, site, _change(steering), IDS)
    with torch.no_grad():
        logits = baked.model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    assert relative(logits, expected) < 1e-4, (site, op)
    attached = _lm(name).logits([PROMPTS[0]], steering=steering, at="all")[0]
    assert relative(baked.logits([PROMPTS[0]], at="all")[0], attached) < 1e-4, (site, op)
    assert relative(logits, _plain(name, IDS)) > 1e-4, (site, op)
    return True


def _sites_to_bake(name: str) -> Iterator[str]:
    """Where one map of weights reads or writes, so that scaling units is an edit of its weights."""
    for kind in ("heads", "attn_out", "ffn_in", "ffn_out"):
        if (site := _site_of(name, kind)) is not None:
            yield site


@pytest.mark.parametrize("name", CURATED)
def test_scaling_bakes_where_maps_of_weights_are(name: str) -> None:
    for site in _sites_to_bake(name):
        assert _bake(name, site, "Scale"), site


@pytest.mark.parametrize("name", CURATED)
def test_adding_bakes_or_is_refused_with_the_reason(name: str) -> None:
    for kind in ("embed", "ffn_norm", "ffn_out", "resid"):
        if (site := _site_of(name, kind)) is not None:
            _bake(name, site, "Add")


@pytest.mark.slow
@pytest.mark.parametrize("name", CURATED)
def test_every_bake_equals_attached_or_is_refused_with_the_reason(name: str) -> None:
    done: dict[str, Any] = {}
    for site in plain_sites(name):
        for op in LINEAR:
            done[f"{site} {op}"] = _bake(name, site, op)
    assert any(done.values())
    assert not all(done.values())
