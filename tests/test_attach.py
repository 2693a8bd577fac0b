"""Attaching: which rows are steered, that it is said when nothing is, and that nothing stays
behind."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import (
    IDS,
    OPERATORS,
    PROMPTS,
    SITES,
    TELLING,
    add,
    block,
    by_hand,
    greedy_by_hand,
    language_model,
    left_padded,
    logits_of,
    operator,
    plain_logits,
    raw_greedy,
    relative,
    site_kinds,
    steer,
    steer_at,
    token_ids,
    traces,
    turned,
)
from reference import reference
from tiny import TINY
from trimtab.steering.operators import Scale, Turn

#: For tests that leave the model as it is.
shared = cache(language_model)

#: A plain architecture, one with experts, one with norms after the branches.
FEW = ("llama", "qwen3_moe", "gemma3")


# -- what is done, at every site of every architecture ----------------------------------------


@pytest.mark.parametrize(("name", "kind"), SITES)
def test_steered_logits_are_those_of_the_formulas(name: str, kind: str) -> None:
    lm = shared(name)
    plain = plain_logits(lm.model, IDS)
    site = lm.anatomy.sites(kind, (1,))[0]
    for op in OPERATORS:
        made = operator(op, lm.anatomy.width(site))
        if op == "Adaptive":  # on the side of b1 on which more of the tokens are
            inside = reference(name, lm.model, IDS)[0][site] @ made.basis[0].double()
            made = Turn(made.basis * inside.sum().sign(), adaptive=True)
        with lm.steered(turned(steer(lm, (site, made)), op)):
            attached = plain_logits(lm.model, IDS)
        _, expected = reference(name, lm.model, IDS, {site: by_hand(made, TELLING[op])})
        assert relative(attached, expected) < 5e-5, op  # float32 against float64
        assert relative(attached, plain) > 1e-3, op


@pytest.mark.parametrize(("name", "kind"), [pair for pair in SITES if pair[0] in FEW])
def test_each_row_of_a_padded_batch_is_that_of_the_formulas(name: str, kind: str) -> None:
    """Rows of different lengths, each with its own dial, and one without the steering."""
    lm = shared(name)
    plain, site = logits_of(lm), lm.anatomy.sites(kind, (1,))[0]
    for op in OPERATORS:
        made = operator(op, lm.anatomy.width(site))
        one = turned(steer(lm, (site, made)), op)
        other = replace(one, value=-0.4 * one.setting)
        with lm.steered([one, None, other]):
            together = logits_of(lm)
        for row, given in ((0, one), (2, other)):
            ids = token_ids(PROMPTS[row])
            _, expected = reference(name, lm.model, ids, {site: by_hand(made, given.setting)})
            assert relative(together[row, -len(ids) :], expected) < 5e-5, (op, row)
        # Rows share the matrix products of an expert, whose sizes follow the routing.
        assert relative(together[1], plain[1]) < (1e-6 if name == "qwen3_moe" else 1e-30), op


def test_positions_in_a_single_pass() -> None:
    """A text that is only read is all prompt; `last` is its last token."""
    lm = language_model("llama")
    op = add(48)
    change = by_hand(op)

    def at_the_end(x: Tensor) -> Tensor:
        return torch.cat((x[:-1], change(x[-1:])))

    for positions, edit in (("prompt", change), ("last", at_the_end)):
        with lm.steered(steer(lm, ("layers.1.resid", op), positions=positions)):
            attached = plain_logits(lm.model, IDS)
        assert relative(
            attached, reference("llama", lm.model, IDS, {"layers.1.resid": edit})[1]
        ) < (1e-5)


@pytest.mark.parametrize("name", TINY)
def test_a_dial_of_zero_changes_no_bit(name: str) -> None:
    lm = language_model(name)
    before = logits_of(lm)
    for kind in site_kinds(lm):
        idle = [op for op in OPERATORS if op not in ("Turn", "Adaptive")]
        with lm.steered(*(steer_at(lm, kind, op).at(0) for op in idle)):
            assert torch.equal(logits_of(lm), before), kind


def test_an_angle_of_zero_is_not_nothing_for_turn() -> None:
    """It lays all that is in the plane on b1, and must not be left out as idle."""
    lm = language_model("llama")
    before = plain_logits(lm.model, IDS)
    for op in ("Turn", "Adaptive"):
        steering = steer_at(lm, "resid", op).at(0)
        made = steering.interventions[0].operator
        _, expected = reference("llama", lm.model, IDS, {"layers.1.resid": by_hand(made, 0.0)})
        for rows in (steering, [steering, steering.at(0)], [steering, None], [steering, None]):
            with lm.steered(rows):
                together = logits_of(lm, [PROMPTS[0]] * 2)
            assert relative(together[0], expected) < 1e-5
        assert relative(together[1], before) < 1e-6  # the row without it
        assert relative(together[0], before) > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_no_units_change_no_bit(name: str) -> None:
    lm = language_model(name)
    pairs = [(f"The {word} cat", " sleeps", " runs") for word in ("red", "big", "old")]
    none = tt.AUSteer(site="ffn_out", k=0, alpha=8, direction="paper").fit(
        lm, tt.Contrast.from_pairs(pairs)
    )
    units, width = torch.tensor([], dtype=torch.long), lm.anatomy.hidden_size
    empty = steer(lm, ("layers.1.ffn_out", Scale(units, units.float(), width)))
    before = logits_of(lm)
    for steering in (none, empty):
        with lm.steered(steering):
            assert torch.equal(logits_of(lm), before)


# -- rows of a batch --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_row_steers_no_other_row(name: str) -> None:
    lm = language_model(name)
    plain, real = logits_of(lm), left_padded(lm, PROMPTS)["attention_mask"][1].bool()
    for kind in site_kinds(lm):
        for op in ("Scale", "Turn"):  # a dial that does nothing, and a mask of rows
            steering = turned(steer_at(lm, kind, op), op)
            with lm.steered([None, steering, None]):
                one = logits_of(lm)
            with lm.steered(steering):
                every = logits_of(lm)
            if name == "qwen3_moe":
                # Rows share the matrix products of an expert, whose sizes follow the routing.
                assert relative(one[[0, 2]], plain[[0, 2]]) < 1e-6, (kind, op)
            else:
                assert torch.equal(one[[0, 2]], plain[[0, 2]]), (kind, op)
            assert relative(one[1][real], every[1][real]) < 1e-5, (kind, op)
            assert relative(one[1][real], plain[1][real]) > 1e-3, (kind, op)


@pytest.mark.parametrize("name", TINY)
def test_each_row_has_its_own_dial(name: str) -> None:
    lm = language_model(name)
    for kind, op in (("heads", "Scale"), ("resid", "Add"), ("ffn_in", "Rotate"), ("embed", "Turn")):
        steering = steer_at(lm, kind, op)
        dials = [90.0, -45.0, 10.0] if op in ("Rotate", "Turn") else [2.0, -1.0, 0.5]
        together = lm.logits(PROMPTS, steering=[steering.at(dial) for dial in dials])
        for row, dial in enumerate(dials):
            alone = lm.logits([PROMPTS[row]], steering=steering.at(dial))
            assert relative(together[row], alone[0]) < 1e-5
        assert relative(together[0], lm.logits(PROMPTS, steering=steering)[0]) > 1e-3


def test_each_row_has_its_own_steerings_in_its_own_order() -> None:
    lm = language_model("llama")
    a, b = steer_at(lm, "resid", "Scale"), steer_at(lm, "resid", "Add", seed=3)
    c = steer_at(lm, "heads", "Add", layer=2)
    rows: list[Any] = [(a, b), (b, a), None, (c, a.at(2), b), c]
    prompts = [PROMPTS[0]] * len(rows)
    together = lm.logits(prompts, steering=rows)
    seen = [lm.logits([PROMPTS[0]], steering=[row])[0] for row in rows]
    for row, alone in enumerate(seen):
        assert relative(together[row], alone) < 1e-5
        for other in seen[:row]:
            assert relative(alone, other) > 1e-3


def test_the_same_steering_twice_on_a_row_acts_twice() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", "Add")
    twice = lm.logits(PROMPTS[:1], steering=[(steering, steering)])
    assert relative(twice, lm.logits(PROMPTS[:1], steering=steering.at(2))) < 1e-5


def test_rows_that_do_not_divide_the_batch_are_refused() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid")
    with (
        pytest.raises(tt.TrimtabError, match="given for 2 rows, but the batch has 3"),
        lm.steered([steering, None]),
    ):
        logits_of(lm)
    with pytest.raises(tt.TrimtabError, match="2 steerings for 3 prompts"):
        lm.generate(PROMPTS, steering=[steering, None])
    with pytest.raises(tt.TrimtabError, match="2 steerings for 3 prompts"):
        lm.logits(PROMPTS, steering=[steering, None])
    assert not any(any(trace) for trace in traces(lm.model).values())


def test_what_is_no_steering_is_refused() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid")
    for wrong in (["joy.safetensors"], [[steering, 3.0]]):
        with pytest.raises(tt.TrimtabError, match="is not a steering"), lm.steered(wrong):
            pass
    with (
        pytest.raises(tt.TrimtabError, match="one list of rows"),
        lm.steered([steering], steering),
    ):
        pass


@pytest.mark.parametrize("returned", [1, 2])
def test_beams_repeat_a_rows_steering_in_place(returned: int) -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid")
    rows = [steering.at(2), None, steering.at(-2)]
    options = {"num_beams": 3, "num_return_sequences": returned, "length_penalty": 0.0}
    with lm.steered(rows):
        together = raw_greedy(lm, PROMPTS, 8, **options)
    assert len(together) == 3 * returned
    unsteered = raw_greedy(lm, PROMPTS, 8, **options)
    for i, row in enumerate(rows):
        with lm.steered(row):
            alone = raw_greedy(lm, [PROMPTS[i]], 8, **options)
        chosen = slice(i * returned, (i + 1) * returned)
        assert together[chosen] == alone
        assert (together[chosen] == unsteered[chosen]) == (row is None)


def test_several_samples_of_a_prompt_share_its_steering() -> None:
    lm = language_model("gpt2")
    steering = steer_at(lm, "resid")
    # top_k = 1 samples what greedy search finds, so that each sample has a known text.
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    with lm.steered([steering.at(2), None, steering.at(-2)]):
        together = raw_greedy(lm, PROMPTS, 8, **options)
    for i, dial in enumerate((2, 0, -2)):
        alone = greedy_by_hand(
            lm.model, token_ids(PROMPTS[i]), 8, by_hand(steering.interventions[0].operator, dial)
        )
        assert together[2 * i] == together[2 * i + 1] == alone


# -- nothing stays behind ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_hooks_are_gone_after_the_block_however_it_ends(name: str) -> None:
    lm = language_model(name)
    before = traces(lm.model)
    steerings = [steer_at(lm, kind, op) for kind in site_kinds(lm) for op in OPERATORS]
    positioned = steer_at(lm, "resid", positions="last")
    plain = logits_of(lm)
    with lm.steered(*steerings, positioned):
        assert traces(lm.model) != before
        logits_of(lm)
    assert traces(lm.model) == before
    with pytest.raises(ZeroDivisionError), lm.steered(*steerings, positioned):
        lm.model.generate(torch.tensor([IDS]), max_new_tokens=2)
        1 / 0  # noqa: B018
    assert traces(lm.model) == before

    def broken(module: Any, args: Any, output: Any) -> None:
        raise RuntimeError("a forward pass that fails")

    handle = block(lm.model, 2).register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="fails"), lm.steered(*steerings):
        logits_of(lm)
    handle.remove()
    assert traces(lm.model) == before
    assert torch.equal(logits_of(lm), plain)


def test_a_generate_that_somebody_else_put_there_comes_back() -> None:
    lm = language_model("llama")
    calls = []

    def foreign(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return type(lm.model).generate(lm.model, *args, **kwargs)

    lm.model.generate = foreign
    with lm.steered(steer_at(lm, "resid")):
        lm.model.generate(torch.tensor([IDS]), max_new_tokens=2)
        with lm.steered(steer_at(lm, "heads")):
            lm.model.generate(torch.tensor([IDS]), max_new_tokens=2)
    assert vars(lm.model)["generate"] is foreign
    assert len(calls) == 2


def test_other_hooks_of_the_user_stay() -> None:
    lm = language_model("llama")
    seen: list[Tensor] = []
    handle = block(lm.model, 1).register_forward_hook(lambda m, a, output: seen.append(output))
    with lm.steered(steer_at(lm, "resid")):
        logits_of(lm)
    logits_of(lm)
    assert len(seen) == 2
    handle.remove()


@pytest.mark.parametrize("op", OPERATORS)
def test_activations_are_never_changed_in_place(op: str) -> None:
    lm = language_model("llama")
    for kind in site_kinds(lm):
        steering = steer_at(lm, kind, op)
        point = lm.anatomy.point(steering.interventions[0].site)
        held: list[Tensor] = []
        copies: list[Tensor] = []

        def note(x: Tensor) -> None:
            held.append(x)
            copies.append(x.clone())

        for rows in (steering, [steering, None, steering.at(2)]):
            with lm.steered(rows):
                if point.side == "output":  # a hook that runs before the steering's
                    handle = point.module.register_forward_hook(
                        lambda m, a, output: note(output), prepend=True
                    )
                else:
                    handle = point.module.register_forward_pre_hook(
                        lambda m, args, named: note(args[0] if args else named["hidden_states"]),
                        prepend=True,
                        with_kwargs=True,
                    )
                logits_of(lm)
                handle.remove()
        assert len(held) == 2
        for x, copy in zip(held, copies, strict=True):
            assert torch.equal(x, copy), kind


# -- loud when not applied --------------------------------------------------------------------


def test_a_steering_that_touches_nothing_is_an_error() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions="generated")
    with pytest.raises(tt.TrimtabError, match=r"touched nothing at layers\.1\.resid") as caught:
        lm.logits(PROMPTS, steering=steering)
    assert "\n" not in str(caught.value)
    with pytest.raises(tt.TrimtabError, match="touched nothing"):
        lm.generate(PROMPTS, max_new_tokens=1, chat=False, steering=steering)
    lm.generate(PROMPTS, max_new_tokens=2, chat=False, steering=steering)


def test_one_of_several_that_touches_nothing_is_an_error_too() -> None:
    lm = language_model("llama")
    idle, busy = steer_at(lm, "resid", positions="generated"), steer_at(lm, "resid")
    with pytest.raises(tt.TrimtabError, match=r"touched nothing at layers\.1\.resid"):
        lm.logits(PROMPTS, steering=[(busy, idle)] * 3)


def test_a_module_that_the_model_goes_round_is_an_error() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "ffn_out", layer=2)
    # A block that computes without calling its FFN module, as fused kernels do.
    lm.model.model.layers[2].forward = lambda hidden_states, **kwargs: hidden_states
    with (
        pytest.raises(tt.TrimtabError, match=r"touched nothing at layers\.2\.ffn_out"),
        lm.steered(steering),
    ):
        logits_of(lm)


def test_a_block_without_a_pass_is_no_error() -> None:
    lm = language_model("llama")
    with lm.steered(steer_at(lm, "resid", positions="generated")):
        pass


def test_a_text_that_ends_at_once_is_no_error() -> None:
    """The first new token may be the end of the text: then there is nothing left to steer."""
    lm = language_model("llama")
    first = lm.generate(PROMPTS[:1], max_new_tokens=1, chat=False)[0].tokens[0]
    lm.model.generation_config.eos_token_id = first
    steering = steer_at(lm, "resid", positions="generated")
    done = lm.generate(PROMPTS[:1], max_new_tokens=8, chat=False, steering=steering)
    assert done[0].tokens == ()
