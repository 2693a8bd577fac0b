"""Attaching: which rows and tokens are steered, in which order, and that nothing stays behind."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import trimtab as tt
from helpers import (
    OPERATORS,
    PROMPTS,
    SITES,
    TELLING,
    Change,
    add,
    block,
    by_hand,
    greedy_by_hand,
    hand_hooked,
    language_model,
    left_padded,
    logits_of,
    operator,
    plain_logits,
    raw_greedy,
    relative,
    scale,
    seen_before_and_after,
    site_kinds,
    steer,
    steer_at,
    token_ids,
    traces,
)
from reference import reference
from tiny import TINY
from trimtab.steering.artifact import POSITIONS, Positions
from trimtab.steering.operators import Ablate, Rotate, Scale, Turn

IDS = token_ids(PROMPTS[0])

#: For tests that leave the model as it is.
shared = cache(language_model)

#: A plain architecture, one with experts, one with norms after the branches.
FEW = ("llama", "qwen3_moe", "gemma3")

# -- what is done, at every site of every architecture ----------------------------------------


def turned(steering: tt.Steering, op: str, times: float = 1.0) -> tt.Steering:
    """At a dial at which its operator shows; degrees are beyond alpha's range, so not by `at`."""
    return replace(steering, value=times * TELLING[op])


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
    none = tt.AUSteer(site="ffn_out", k=0, alpha=8).fit(lm, tt.Contrast.from_pairs(pairs))
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


# -- order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_different_operators_at_one_site_and_at_others_act_in_their_order(name: str) -> None:
    """At one site as given; elsewhere in the order in which a token comes by."""
    lm = language_model(name)
    chain = ["Rotate", "Absolute", "Ablate", "Add", "Turn", "Scale"]
    ops = {op: operator(op, lm.anatomy.hidden_size, seed) for seed, op in enumerate(chain)}
    later, earlier = operator("Adaptive", lm.anatomy.hidden_size, 9), add(lm.anatomy.hidden_size, 8)
    elsewhere = [
        steer(lm, ("layers.2.ffn_norm", later)).at(90.0),
        steer(lm, ("layers.0.attn_out", earlier)).at(2.0),
    ]
    results = []
    for order in (chain, chain[::-1]):
        at_one = [turned(steer(lm, ("layers.1.resid", ops[op])), op) for op in order]

        def one_after_another(x: Tensor, order: list[str] = order) -> Tensor:
            for op in order:
                x = by_hand(ops[op], TELLING[op])(x)
            return x

        edits = {
            "layers.1.resid": one_after_another,
            "layers.2.ffn_norm": by_hand(later, 90.0),
            "layers.0.attn_out": by_hand(earlier, 2.0),
        }
        _, expected = reference(name, lm.model, IDS, edits)
        with lm.steered(elsewhere[0], *at_one, elsewhere[1]):
            attached = plain_logits(lm.model, IDS)
        assert relative(attached, expected) < 5e-5
        # All on one row beside a row with none of them, and as a sum.
        total = elsewhere[0] + at_one[0]
        for steering in (*at_one[1:], elsewhere[1]):
            total = total + steering
        rows = lm.logits([PROMPTS[0]] * 2, steering=[total, None])
        assert relative(rows[0], expected[-1]) < 5e-5
        assert relative(rows[1], plain_logits(lm.model, IDS)[-1]) < 1e-5
        results.append(attached)
    assert relative(results[0], results[1]) > 1e-3


def test_steerings_at_one_site_act_in_the_order_given() -> None:
    lm = language_model("llama")
    first, second = scale(48, 1), add(48, 2, size=1.0)
    a, b = (steer(lm, ("layers.1.resid", op)) for op in (first, second))
    layer, change, move = block(lm.model, 1), by_hand(first), by_hand(second)
    with lm.steered(a, b):
        a_then_b = logits_of(lm)
    with lm.steered(b, a):
        b_then_a = logits_of(lm)
    with hand_hooked(layer, lambda x: move(change(x))):
        assert relative(a_then_b, logits_of(lm)) < 1e-5
    with hand_hooked(layer, lambda x: change(move(x))):
        assert relative(b_then_a, logits_of(lm)) < 1e-5
    assert relative(a_then_b, b_then_a) > 0.01


def test_interventions_of_one_steering_act_in_their_order() -> None:
    lm = language_model("llama")
    first, second = scale(48, 1), add(48, 2, size=1.0)
    a, b = (steer(lm, ("layers.1.resid", op)) for op in (first, second))
    joint = steer(lm, ("layers.1.resid", first), ("layers.1.resid", second))
    with lm.steered(a, b):
        expected = logits_of(lm)
    with lm.steered(joint):
        assert torch.equal(logits_of(lm), expected)


def test_nested_blocks_act_from_the_outside_in() -> None:
    lm = language_model("gemma3")
    a, b = steer_at(lm, "resid", "Scale"), steer_at(lm, "resid", "Add", seed=1)
    plain = logits_of(lm)
    with lm.steered(a):
        alone = logits_of(lm)
        with lm.steered(b):
            nested = logits_of(lm)
        assert torch.equal(logits_of(lm), alone)
    assert torch.equal(logits_of(lm), plain)
    with lm.steered(a, b):
        assert torch.equal(logits_of(lm), nested)
    with lm.steered(b, a):
        assert relative(logits_of(lm), nested) > 1e-3


def test_nested_blocks_on_experts() -> None:
    lm = language_model("qwen3_moe")
    a, b = steer_at(lm, "ffn_in", "Scale"), steer_at(lm, "ffn_in", "Add", seed=1)
    plain = logits_of(lm)
    with lm.steered(a):
        with lm.steered(b):
            nested = logits_of(lm)
        with lm.steered(a, b):
            pass  # not run: a steering that meets no pass is no error
        alone = logits_of(lm)
    with lm.steered(a, b):
        assert torch.equal(logits_of(lm), nested)
    with lm.steered(a):
        assert torch.equal(logits_of(lm), alone)
    assert torch.equal(logits_of(lm), plain)
    assert relative(nested, alone) > 1e-3


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
                        lambda m, args: note(args[0]), prepend=True
                    )
                logits_of(lm)
                handle.remove()
        assert len(held) == 2
        for x, copy in zip(held, copies, strict=True):
            assert torch.equal(x, copy), kind


# -- prompt and generated tokens --------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", TINY)
def test_generate_equals_a_loop_by_hand_with_and_without_cache(
    name: str, positions: Positions
) -> None:
    """Raw generate inside the block; left-padded rows of different lengths, each its own dial."""
    lm = language_model(name)
    steering = steer_at(lm, "resid", positions=positions, seed=2)
    change = steering.interventions[0].operator
    dials, new = [4.0, -4.0], 8
    with lm.steered([steering.at(dial) for dial in dials]):
        cached = raw_greedy(lm, PROMPTS[:2], new)
        uncached = raw_greedy(lm, PROMPTS[:2], new, use_cache=False)
    for row, dial in enumerate(dials):
        prompt = token_ids(PROMPTS[row])
        expected = greedy_by_hand(lm.model, prompt, new, by_hand(change, dial), positions)
        assert cached[row] == expected
        assert uncached[row] == expected


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_equals_a_loop_by_hand_at_every_position(
    op: str, positions: Positions
) -> None:
    """Rows of different lengths: each with its own dial, and one that is not steered at all."""
    lm = language_model("gemma3" if op in ("Turn", "Absolute") else "gpt2")
    steering = steer_at(lm, "resid", op, positions=positions, seed=2)
    made, new = steering.interventions[0].operator, 6
    steering = turned(steering, op, 2.0 if op in ("Ablate", "Add") else 1.0)
    rows = [steering, None, replace(steering, value=-steering.setting)]
    with lm.steered(rows):
        cached = raw_greedy(lm, PROMPTS, new)
        uncached = raw_greedy(lm, PROMPTS, new, use_cache=False)
    for row, given in enumerate(rows):
        change = (lambda x: x) if given is None else by_hand(made, given.setting)
        expected = greedy_by_hand(lm.model, token_ids(PROMPTS[row]), new, change, positions)
        assert cached[row] == expected
        assert uncached[row] == expected


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("op", OPERATORS)
def test_a_step_of_decoding_is_steered_as_the_whole_text_is(op: str, positions: Positions) -> None:
    """By logits, which show what a greedy text may hide; cached, one token at a time."""
    lm = language_model("llama")
    # With this seed the generated tokens are not all on the side that Adaptive leaves.
    steering = turned(steer_at(lm, "ffn_norm_in", op, positions=positions, seed=1), op)
    made = by_hand(steering.interventions[0].operator, steering.setting)
    end = len(IDS) - 3
    first = {"all": 0, "prompt": 0, "generated": end, "last": end - 1}[positions]
    stop = end if positions == "prompt" else len(IDS)

    def edit(x: Tensor) -> Tensor:
        return torch.cat((x[:first], made(x[first:stop]), x[stop:]))

    _, expected = reference("llama", lm.model, IDS, {"layers.1.ffn_norm_in": edit})
    with torch.no_grad(), lm.steered([steering, None]):
        cache, seen = None, []
        for new in (IDS[:end], *([token] for token in IDS[end:])):
            output = lm.model(torch.tensor([new, new]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            seen.append(output.logits)
    both = torch.cat(seen, dim=1)
    assert relative(both[0], expected) < 1e-5
    assert relative(both[1], plain_logits(lm.model, IDS)) < 1e-5
    assert relative(both[0], both[1]) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_positions_differ_from_each_other(name: str) -> None:
    """Else the test above could not tell them apart."""
    lm = language_model(name)
    written = []
    for positions in POSITIONS:
        steering = steer_at(lm, "resid", positions=positions, seed=2).at(4)
        written.append(lm.generate(PROMPTS, max_new_tokens=20, chat=False, steering=steering))
    texts = [tuple(one.tokens for one in completions) for completions in written]
    assert len(set(texts)) == 4


def test_a_scale_at_heads_equals_a_loop_by_hand() -> None:
    """The plainest case written out: no helper of this file, no operator of trimtab's."""
    lm = language_model("llama")
    units, factors = torch.tensor([3, 17, 40]), torch.tensor([4.0, -2.0, 0.0])
    op = Scale(units, factors - 1, 64)
    with lm.steered(steer(lm, ("layers.1.heads", op))):
        steered = lm.model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False)

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., units] *= factors
        return (x,)

    handle = lm.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(hook)
    ids = list(IDS)
    for _ in range(12):
        ids.append(int(plain_logits(lm.model, ids)[-1].argmax()))
    handle.remove()
    assert steered[0].tolist() == ids
    assert lm.model.generate(torch.tensor([IDS]), max_new_tokens=12).tolist() != steered.tolist()


@pytest.mark.parametrize("name", TINY)
def test_a_left_padded_batch_equals_each_prompt_alone(name: str) -> None:
    lm = language_model(name)
    rows = [
        steer_at(lm, "heads", "Scale").at(2),
        None,
        (steer_at(lm, "ffn_out", "Scale"), steer_at(lm, "resid", positions="last")),
    ]
    together = lm.logits(PROMPTS, steering=rows)
    texts = lm.generate(PROMPTS, max_new_tokens=8, chat=False, steering=rows)
    for row, (prompt, steering) in enumerate(zip(PROMPTS, rows, strict=True)):
        assert relative(together[row], lm.logits([prompt], steering=[steering])[0]) < 1e-4
        alone = lm.generate([prompt], max_new_tokens=8, chat=False, steering=[steering])
        assert texts[row].tokens == alone[0].tokens


def test_right_padded_rows_end_where_their_last_token_is() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions="last")
    inputs = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad(), lm.steered(steering):
        together = lm.model(**inputs, use_cache=False).logits
        for row, prompt in enumerate(PROMPTS):
            ids = token_ids(prompt)
            alone = plain_logits(lm.model, ids)
            assert relative(together[row, : len(ids)], alone) < 1e-5
    plain = plain_logits(lm.model, token_ids(PROMPTS[1]))
    last = len(plain) - 1
    assert torch.allclose(together[1, :last], plain[:-1], atol=1e-5)
    assert relative(together[1, last], plain[-1]) > 0.01


def by_hand_of(steering: tt.Steering) -> Change:
    change: Change = by_hand(steering.interventions[0].operator, steering.setting)
    return change


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_users_own_loop_with_a_cache(positions: Positions) -> None:
    lm = language_model("qwen2")
    steering = steer_at(lm, "resid", positions=positions, seed=2).at(2)
    expected = greedy_by_hand(lm.model, IDS, 10, by_hand_of(steering), positions)
    with torch.no_grad(), lm.steered(steering):
        for _ in range(2):  # the second text begins anew in the same block
            ids, cache = list(IDS), None
            for _ in range(10):
                new = ids if cache is None else ids[-1:]
                output = lm.model(torch.tensor([new]), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                ids.append(int(output.logits[0, -1].argmax()))
            assert ids[len(IDS) :] == expected


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("options", ["twice", "static", "chunks", "lookup", "embeds"])
def test_other_ways_to_generate(positions: Positions, options: str) -> None:
    """Positions mean the same however generate cuts a text into passes."""
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions=positions, seed=2).at(4)
    expected = greedy_by_hand(lm.model, IDS, 12, by_hand_of(steering), positions)
    settings: dict[str, Any] = {
        "static": {"past_key_values": StaticCache(lm.model.config, max_cache_len=64)},
        "chunks": {"prefill_chunk_size": 5},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "embeds": {"inputs_embeds": lm.model.model.embed_tokens(torch.tensor([IDS]))},
    }.get(options, {})
    inputs = {} if options == "embeds" else {"input_ids": torch.tensor([IDS])}
    with lm.steered(steering):
        if options == "twice":  # a text of another length before it, with and without a cache
            for use_cache in (True, False):
                raw_greedy(lm, PROMPTS[1:2], 3, use_cache=use_cache)
            settings = {"use_cache": False}
        for _ in range(2 if options == "twice" else 1):
            output = lm.model.generate(**inputs, max_new_tokens=12, do_sample=False, **settings)
            assert output[0, -12:].tolist() == expected


def test_continuing_from_an_unsteered_cache_steers_the_rest() -> None:
    """The user's own cache of a prefix: the block's first pass begins in the middle of a text."""
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions="prompt").at(2)
    with torch.no_grad():
        cache = lm.model(torch.tensor([IDS[:5]]), use_cache=True).past_key_values
        with lm.steered(steering):
            rest = lm.model(torch.tensor([IDS[5:]]), past_key_values=cache).logits[0]

    def after_five(x: Tensor) -> Tensor:
        return torch.cat((x[:5], by_hand_of(steering)(x[5:])))

    _, expected = reference("llama", lm.model, IDS, {"layers.1.resid": after_five})
    assert relative(rest, expected[5:]) < 1e-5


def test_inference_mode() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", "Scale", positions="last").at(2)
    expected = greedy_by_hand(lm.model, IDS, 6, by_hand_of(steering), "last")
    with torch.inference_mode(), lm.steered(steering):
        output = lm.model.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)
    assert output[0, len(IDS) :].tolist() == expected


@pytest.mark.parametrize("op", OPERATORS)
def test_gradients_flow_after_a_pass_in_inference_mode(op: str) -> None:
    """What is computed once per block must not be an inference tensor in a later plain pass."""
    lm = language_model("llama")
    steering = steer_at(lm, "resid", op)
    for rows in (steering, [steering, None, steering.at(2)]):
        with lm.steered(rows):
            lm.logits(PROMPTS)
            lm.model(**left_padded(lm, PROMPTS)).logits.sum().backward()
        gradient = lm.model.model.embed_tokens.weight.grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any()


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


# -- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["Scale", "Add"])
def test_arithmetic_is_float32_and_cast_back(op: str, dtype: torch.dtype) -> None:
    lm = language_model("llama", dtype=dtype)
    made = scale(48) if op == "Scale" else add(48)
    steering = steer(lm, ("layers.1.resid", made))
    seen: list[Tensor] = []
    layer = block(lm.model, 1)
    dials = [3.7, 0.0, -1.3]
    for rows in (steering.at(3.7), [steering.at(dial) for dial in dials]):
        seen.clear()
        with lm.steered(rows), seen_before_and_after(layer, seen):
            logits_of(lm)
        x, y = seen
        assert y.dtype is dtype
        per_row = torch.tensor(dials if isinstance(rows, list) else [3.7] * 3)[:, None, None]
        if op == "Add":
            expected = x.float() + per_row * made.vector
            coarse = x + (per_row * made.vector).to(dtype)
        else:
            factors = torch.ones(3, 1, 48)
            factors[..., made.units] = 1 + per_row * made.gain
            expected = x.float() * factors
            coarse = x * factors.to(dtype)
        assert torch.equal(y, expected.to(dtype))
        assert not torch.equal(y, coarse)  # the test can tell the difference
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("op", ["Ablate", "Rotate", "Turn", "Adaptive"])
def test_planes_are_computed_in_float32_or_better_and_cast_back(
    op: str, dtype: torch.dtype
) -> None:
    lm = language_model("llama", dtype=dtype)
    plane = torch.zeros(2, 48)  # lengths and angle exact in float32 already
    plane[:, [0, 5, 20, 47]] = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, -0.5, 0.5]])
    made = {"Ablate": Ablate(plane[0]), "Rotate": Rotate(plane), "Turn": Turn(plane)}.get(
        op, Turn(plane, adaptive=True)
    )
    steering = turned(steer(lm, ("layers.1.resid", made)), op)
    seen: list[Tensor] = []
    rough = 1e-12 if dtype == torch.float64 else 1e-6
    layer = block(lm.model, 1)
    for rows in (steering, [steering, None, replace(steering, value=20.0)]):
        seen.clear()
        with lm.steered(rows), seen_before_and_after(layer, seen):
            logits_of(lm)
        x, y = seen
        dials = [row and row.setting for row in rows] if isinstance(rows, list) else []
        for row in range(3):
            dial = dials[row] if dials else steering.setting
            exact = x[row].double() if dial is None else by_hand(made, dial)(x[row].double())
            # One rounding at the end: half a step, and what the sums themselves round.
            half = torch.finfo(dtype).eps * exact.abs() / 2 + rough * exact.norm(dim=-1)[:, None]
            assert ((y[row].double() - exact).abs() <= half).all()


def test_rows_and_dials_in_bfloat16_leave_the_others_alone() -> None:
    lm = language_model("gemma2", dtype=torch.bfloat16)
    plain = logits_of(lm)
    with lm.steered([None, steer_at(lm, "resid", "Add"), None]):
        steered = logits_of(lm)
    assert torch.equal(steered[[0, 2]], plain[[0, 2]])
    assert not torch.equal(steered[1], plain[1])
