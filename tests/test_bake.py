"""Baking: the plain checkpoint does what the attached steering does, or there is a reason."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

import trimtab as tt
from helpers import (
    LINEAR,
    MISSING,
    OPERATORS,
    PROMPTS,
    SITES,
    TELLING,
    add,
    basis,
    by_hand,
    language_model,
    operator,
    plain_logits,
    relative,
    scale,
    site_kinds,
    steer,
    steer_at,
    token_ids,
)
from reference import reference
from tiny import TINY
from trimtab.steering.operators import Ablate, Rotate

#: What is not exact, and the words that say why. Everything else bakes.
NO_WEIGHTS = "divide by its length"  # the residual stream goes through norms only
BEFORE_A_NORM = "the norm that reads it divides by its length"
AFTER_A_NORM = "a norm writes it straight into the residual stream"
NORM_BETWEEN = "a norm stands between"
ACROSS_EXPERTS = "the router weighs each expert's part"
NO_BIAS = "(has no bias at|takes no bias)"
WITHOUT_MLP_BIAS = ("qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "olmo2")
REFUSED: dict[tuple[str, str, str], str] = {
    **{(name, "resid", op): NO_WEIGHTS for name in TINY for op in LINEAR if op != "Add"},
    **{(name, kind, op): BEFORE_A_NORM for name, kind in SITES for op in LINEAR
       if kind in ("attn_norm_in", "ffn_norm_in")},
    **{(name, kind, op): AFTER_A_NORM for name, kind in SITES for op in LINEAR
       if kind in ("attn_post_norm", "ffn_post_norm")},
    **{(name, kind, op): f"cannot bake test: {why} is not linear in the activation"
       for name, kind in SITES for op, why in (
           ("Absolute", r"a Scale that adds a multiple of \|x\|"),
           ("Turn", "Turn, which lays activations at an absolute angle,"),
           ("Adaptive", "Turn, which lays activations at an absolute angle,"))},
    **{(name, "final_norm", "Add"): NO_BIAS for name in TINY if name != "gpt2"},
    **{(name, "ffn_norm", "Add"): NO_BIAS for name in WITHOUT_MLP_BIAS},
    **{(name, "ffn_in", "Add"): NO_BIAS for name in WITHOUT_MLP_BIAS},
    **{(name, "ffn_out", "Add"): NO_BIAS for name in WITHOUT_MLP_BIAS},
    **{(name, "resid", "Add"): NO_BIAS for name in ("qwen3", "qwen3_moe", "phi3")},
    **{(name, "resid", "Add"): NORM_BETWEEN for name in ("gemma2", "gemma3", "olmo2")},
    ("qwen3_moe", "ffn_in", "Ablate"): ACROSS_EXPERTS,
    ("qwen3_moe", "ffn_in", "Rotate"): ACROSS_EXPERTS,
    ("phi3", "attn_norm", "Add"): NO_BIAS,
    ("phi3", "heads", "Add"): NO_BIAS,
    ("phi3", "attn_out", "Add"): NO_BIAS,
}  # fmt: skip


def check_same(
    lm: tt.LanguageModel, baked: tt.LanguageModel, *steerings: tt.Steering, new: int = 32
) -> None:
    """Attached and baked have the same logits, and write the same text."""
    prompts = PROMPTS[:2]
    every = list(steerings)
    with lm.steered(*every):
        attached = lm.logits(prompts, at="all")
        written = lm.generate(prompts, max_new_tokens=new, chat=False)
    for one, other in zip(attached, baked.logits(prompts, at="all"), strict=True):
        assert relative(other, one) < 1e-4
    plain = lm.logits(prompts, at="all")
    assert max(relative(one, other) for one, other in zip(plain, attached, strict=True)) > 1e-3
    # The baked model's next token after each prefix of the attached model's text is the next one
    # there, so its greedy text is the same. One pass over all prefixes instead of 32.
    for prompt, completion in zip(prompts, written, strict=True):
        assert len(completion.tokens) == new
        ids = [*token_ids(prompt), *completion.tokens]
        following = plain_logits(baked.model, ids).argmax(-1).tolist()
        assert following[-new - 1 : -1] == list(completion.tokens)


def snapshot(model: Any) -> dict[str, tuple[int, Tensor]]:
    """Every parameter and buffer: which object it is, and a copy of its numbers."""
    tensors = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors}


def check_untouched(model: Any, before: dict[str, tuple[int, Tensor]]) -> None:
    after = snapshot(model)
    assert list(after) == list(before)
    for name, (identity, tensor) in before.items():
        assert after[name][0] == identity, name
        assert torch.equal(after[name][1], tensor), name


# -- every architecture, every site kind, every operator --------------------------------------


def turned(steering: tt.Steering, op: str) -> tt.Steering:
    """At a dial at which its operator shows; degrees are beyond alpha's range, so not by `at`."""
    return replace(steering, value=TELLING[op])


@pytest.mark.parametrize(("name", "kind"), SITES)
def test_baked_equals_attached_or_is_refused_with_the_reason(name: str, kind: str) -> None:
    lm = language_model(name)
    before, config = snapshot(lm.model), lm.model.config.to_dict()
    for op in OPERATORS:
        steering = turned(steer_at(lm, kind, op), op)
        reason = REFUSED.get((name, kind, op))
        if reason is None:
            baked = tt.bake(lm, steering)
            check_same(lm, baked, steering, new=8)
            assert not any(module._forward_hooks for module in baked.model.modules())
        else:
            with pytest.raises(tt.TrimtabError, match=reason) as caught:
                tt.bake(lm, steering)
            message = str(caught.value)
            assert "\n" not in message
            assert "cannot bake" in message
            assert "attach" in message  # what to do instead
    check_untouched(lm.model, before)
    assert lm.model.config.to_dict() == config


@pytest.mark.parametrize("name", TINY)
def test_the_baked_weights_equal_the_formulas(name: str) -> None:
    """Not by way of attaching: the baked weights in the slow second implementation."""
    lm = language_model(name)
    ids = token_ids(PROMPTS[0])
    for kind in site_kinds(lm):
        for op in ("Scale", "Ablate", "Rotate"):
            if (name, kind, op) in REFUSED:
                continue
            steering = turned(steer_at(lm, kind, op), op)
            site, made = steering.interventions[0].site, steering.interventions[0].operator
            _, expected = reference(name, lm.model, ids, {site: by_hand(made, TELLING[op])})
            _, baked = reference(name, tt.bake(lm, steering).model, ids)
            assert relative(baked, expected) < 1e-5, (kind, op)


def test_the_first_layer_of_a_mixture_may_be_dense() -> None:
    lm = language_model("qwen3_moe")
    for kind in ("ffn_norm", "ffn_in", "ffn_out"):
        for op in ("Scale", "Rotate"):  # also at ffn_in, where experts forbid mixing units
            steering = turned(steer_at(lm, kind, op, layer=0), op)
            check_same(lm, tt.bake(lm, steering), steering, new=8)
    with pytest.raises(tt.TrimtabError, match="has no bias at"):
        tt.bake(lm, steer_at(lm, "ffn_out", "Add", layer=0))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_layer_at_once(name: str) -> None:
    lm = language_model(name)
    steerings = [
        steer_at(lm, kind, op, layer, seed=layer).at(0.5)
        for layer in range(lm.anatomy.layers)
        for kind, op in (("heads", "Scale"), ("ffn_out", "Scale"), ("ffn_norm", "Add"))
    ]
    check_same(lm, tt.bake(lm, *steerings), *steerings)


# -- AUSteer's two identities -----------------------------------------------------------------


def test_scaling_heads_is_an_edit_of_columns_of_the_output_projection() -> None:
    lm = language_model("llama", attention_bias=True)
    op = scale(64)
    projection = "model.layers.1.self_attn.o_proj"
    state = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    for unit, gain in zip(op.units.tolist(), op.gain.tolist(), strict=True):
        state[f"{projection}.weight"][:, unit] *= 1 + 4 * gain
    baked = tt.bake(lm, steer(lm, ("layers.1.heads", op)).at(4))
    for name, tensor in baked.model.state_dict().items():
        assert torch.allclose(tensor, state[name], atol=1e-6), name  # the bias among them
    edited = language_model("llama", attention_bias=True)
    edited.model.load_state_dict(state)
    attached = lm.logits(PROMPTS, steering=steer(lm, ("layers.1.heads", op)).at(4))
    assert relative(edited.logits(PROMPTS), attached) < 1e-5


def test_scaling_ffn_out_is_an_edit_of_rows_of_the_down_projection_and_its_bias() -> None:
    lm = language_model("llama", mlp_bias=True)
    op = scale(48)
    projection = "model.layers.1.mlp.down_proj"
    state = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    assert state[f"{projection}.bias"].any()
    for unit, gain in zip(op.units.tolist(), op.gain.tolist(), strict=True):
        state[f"{projection}.weight"][unit, :] *= 1 + 4 * gain
        state[f"{projection}.bias"][unit] *= 1 + 4 * gain
    baked = tt.bake(lm, steer(lm, ("layers.1.ffn_out", op)).at(4))
    for name, tensor in baked.model.state_dict().items():
        assert torch.allclose(tensor, state[name], atol=1e-6), name
    edited = language_model("llama", mlp_bias=True)
    edited.model.load_state_dict(state)
    attached = lm.logits(PROMPTS, steering=steer(lm, ("layers.1.ffn_out", op)).at(4))
    assert relative(edited.logits(PROMPTS), attached) < 1e-5


def test_scaling_ffn_in_is_an_edit_of_columns_of_the_down_projection() -> None:
    lm = language_model("gpt2")
    op = scale(96)
    expected = lm.model.transformer.h[1].mlp.c_proj.weight.detach().clone()
    expected[op.units, :] *= (1 + 4 * op.gain)[:, None]  # Conv1D: column i is row i here
    baked = tt.bake(lm, steer(lm, ("layers.1.ffn_in", op)).at(4))
    assert torch.allclose(baked.model.transformer.h[1].mlp.c_proj.weight, expected, atol=1e-6)


def test_adding_at_resid_is_an_edit_of_the_down_projections_bias() -> None:
    lm = language_model("gpt2")
    op = add(48)
    expected = lm.model.transformer.h[1].mlp.c_proj.bias + 4 * op.vector
    baked = tt.bake(lm, steer(lm, ("layers.1.resid", op)).at(4))
    assert torch.allclose(baked.model.transformer.h[1].mlp.c_proj.bias, expected, atol=1e-6)


def test_adding_at_heads_goes_through_the_output_projection() -> None:
    """ITI's fold: b + W c, not b + c."""
    lm = language_model("llama", attention_bias=True)
    op, projection = add(64), lm.model.model.layers[1].self_attn.o_proj
    expected = projection.bias + projection.weight @ (4 * op.vector)
    baked = tt.bake(lm, steer(lm, ("layers.1.heads", op)).at(4))
    assert torch.allclose(baked.model.model.layers[1].self_attn.o_proj.bias, expected, atol=1e-5)


# -- ablation at every writer -----------------------------------------------------------------

NO_POST_NORMS = [name for name in TINY if "ffn_post_norm" in MISSING[name]]


def ablated(lm: tt.LanguageModel, sites: list[str], direction: Tensor) -> tt.Steering:
    return steer(lm, *((site, Ablate(direction)) for site in sites))


@pytest.mark.parametrize("name", TINY)
def test_ablating_every_writer_leaves_nothing_in_the_stream(name: str) -> None:
    lm = language_model(name)
    direction, ids = basis(lm.anatomy.hidden_size, 5, 1)[0], token_ids(PROMPTS[0])
    r = direction.double()
    steering = ablated(lm, lm.anatomy.stream_writers, direction)
    edits = {site: by_hand(Ablate(direction)) for site in lm.anatomy.stream_writers}
    sites, logits = reference(name, lm.model, ids, edits)
    plain, unsteered = reference(name, lm.model, ids)
    with lm.steered(steering):
        attached = plain_logits(lm.model, ids)
    assert relative(attached, logits) < 1e-5
    assert relative(unsteered, logits) > 1e-3
    streams = [site for site in sites if site.endswith(("resid", "_norm_in", "embed"))]
    assert len(streams) >= 1 + lm.anatomy.layers
    for site in streams:
        assert float((sites[site] @ r).abs().max()) < 1e-6  # the direction is float32
        assert float((plain[site] @ r).abs().max()) > 0.01
    if name not in NO_POST_NORMS:
        with pytest.raises(tt.TrimtabError, match="a norm writes it straight.*attach"):
            tt.bake(lm, steering)
        return
    baked = tt.bake(lm, steering)
    check_same(lm, baked, steering, new=8)
    sites, logits = reference(name, baked.model, ids)
    assert relative(attached, logits) < 1e-5
    for site in streams:
        assert float((sites[site] @ r).abs().max()) < 1e-5


@pytest.mark.parametrize("name", NO_POST_NORMS)
def test_ablated_writers_are_an_edit_of_rows_by_hand(name: str) -> None:
    """W <- (1 - r r') W and b <- (1 - r r') b, and nothing else, in float64."""
    lm = language_model(name, dtype=torch.float64)
    width = lm.anatomy.hidden_size
    direction = torch.zeros(width)
    direction[[1, 4, 9, 30]] = torch.tensor([0.5, -0.5, 0.5, 0.5])  # of length 1 to the bit
    r = direction.double()
    left = torch.eye(width, dtype=torch.float64) - torch.outer(r, r)
    baked = tt.bake(lm, ablated(lm, lm.anatomy.stream_writers, direction)).model
    # Which parameters write to the stream, by their names; [in, out] or not, tables are rows.
    written = ("o_proj.", "down_proj", "embed_tokens.", ".c_proj.", "wte.", "wpe.")
    input_first = ("embed_tokens.weight", "c_proj.weight", "wte.weight", "wpe.weight")
    seen = 0
    after = dict(baked.named_parameters(remove_duplicate=False))
    for key, old in lm.model.named_parameters(remove_duplicate=False):
        new, expected = after[key].detach(), old.detach()
        if any(part in key for part in written):
            seen += 1
            if key.endswith(input_first) or key.endswith(".bias"):
                expected = expected @ left
                along = new @ r
            else:
                expected = left @ expected  # experts are one more dimension in front
                along = r @ new
            assert float(along.abs().max()) < 1e-14, key
        assert torch.allclose(new, expected, rtol=0, atol=1e-14), key
    biases = 2 * 3 if name == "gpt2" else 0
    assert seen == 1 + (name == "gpt2") + 2 * 3 + biases
    # The LM head, tied to the table or not, stays what it was.
    assert torch.equal(
        baked.get_output_embeddings().weight, lm.model.get_output_embeddings().weight
    )
    assert not baked.config.tie_word_embeddings
    assert lm.model.config.tie_word_embeddings == (name in ("qwen2", "qwen3", "gpt2"))


def test_ablating_at_a_norm_is_an_edit_of_columns() -> None:
    lm = language_model("llama")
    direction = basis(48, 5, 1)[0]
    left = torch.eye(48) - torch.outer(direction, direction)
    baked = tt.bake(lm, ablated(lm, ["layers.1.attn_norm"], direction)).model
    for letter in "qkv":
        name = f"model.layers.1.self_attn.{letter}_proj.weight"
        assert torch.allclose(
            baked.get_parameter(name), lm.model.get_parameter(name) @ left, atol=1e-6
        )


# -- rotation at the norms ---------------------------------------------------------------------


def rotation(width: int, degrees: float) -> tuple[Rotate, Tensor]:
    """A rotation and its matrix R: h -> R h, written out."""
    plane = basis(width, 6)
    b1, b2 = plane.double()
    turn = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    matrix = (
        torch.eye(width, dtype=torch.float64)
        + (turn.cos() - 1) * (torch.outer(b1, b1) + torch.outer(b2, b2))
        + turn.sin() * (torch.outer(b2, b1) - torch.outer(b1, b2))
    )
    return Rotate(plane), matrix


@pytest.mark.parametrize("kind", ["attn_norm", "ffn_norm"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "olmo2", "qwen3_moe"])
def test_rotating_at_a_norm_turns_what_reads_it(name: str, kind: str) -> None:
    """W <- W R for q, k and v or gate and up, a change of rank 2; biases stay."""
    lm = language_model(name)
    op, matrix = rotation(lm.anatomy.hidden_size, 70.0)
    steering = steer(lm, (f"layers.1.{kind}", op)).at(70)
    baked = tt.bake(lm, steering).model
    readers = {
        "attn_norm": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
        "ffn_norm": ("gate_proj", "up_proj", "mlp.gate", "gate_up_proj"),
    }[kind]
    turned_ones = 0
    for key, old in lm.model.named_parameters():
        new = baked.get_parameter(key)
        if ".layers.1." in key and key.removesuffix(".weight").endswith(readers):
            turned_ones += 1
            assert torch.allclose(new.double(), old.double() @ matrix, atol=1e-6), key
            change = (new - old).detach().flatten(0, -2).double()
            assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2, key
        else:
            assert torch.equal(new, old), key
    assert turned_ones == {"phi3": 1}.get(name, 3 if kind == "attn_norm" else 2)


@pytest.mark.parametrize(
    ("kind", "reader"), [("attn_norm", "attn.c_attn"), ("ffn_norm", "mlp.c_fc")]
)
def test_rotating_gpt2_turns_the_transposed_weight(kind: str, reader: str) -> None:
    """Conv1D stores [in, out]: weight <- R' weight, the bias stays."""
    lm = language_model("gpt2")
    op, matrix = rotation(48, 70.0)
    baked = tt.bake(lm, steer(lm, (f"layers.1.{kind}", op)).at(70)).model
    old = lm.model.transformer.h[1].get_submodule(reader)
    new = baked.transformer.h[1].get_submodule(reader)
    assert torch.allclose(new.weight.double(), matrix.T @ old.weight.double(), atol=1e-6)
    assert torch.equal(new.bias, old.bias)


def test_a_rounded_basis_folds_as_it_is_attached() -> None:
    """Both make it orthonormal first."""
    lm = language_model("llama")
    for op in (
        Rotate(basis(48, 6).bfloat16().float()),
        Ablate(basis(48, 6, 1)[0].bfloat16().float()),
    ):
        steering = steer(lm, ("layers.1.ffn_norm", op)).at(70 if isinstance(op, Rotate) else 1)
        attached = lm.logits(PROMPTS, steering=steering)
        assert relative(tt.bake(lm, steering).logits(PROMPTS), attached) < 1e-5


# -- several steerings ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_different_operators_together_are_the_formulas_attached_and_baked(name: str) -> None:
    """In both orders at one site, which count, among others at other sites, which do not."""
    lm, ids = language_model(name), token_ids(PROMPTS[0])
    results = []
    for kind in ("heads", "ffn_out", "embed"):
        site = lm.anatomy.sites(kind, (1,))[0]
        chain = {op: operator(op, lm.anatomy.width(site), 3 + i) for i, op in enumerate(LINEAR)}
        bakes = [op for op in chain if (name, kind, op) not in REFUSED]
        other = lm.anatomy.sites("ffn_norm", (2,))[0]
        apart = {other: Rotate(basis(lm.anatomy.hidden_size, 1))}
        far = steer(lm, *apart.items()).at(40)
        for order in (bakes, bakes[::-1]):

            def one_after_another(x: Tensor, order: list[str] = order, ops: Any = chain) -> Tensor:
                for op in order:
                    x = by_hand(ops[op], TELLING[op])(x)
                return x

            edits = {site: one_after_another, other: by_hand(apart[other], 40.0)}
            _, expected = reference(name, lm.model, ids, edits)
            given = [far, *(turned(steer(lm, (site, chain[op])), op) for op in order)]
            with lm.steered(*given):
                assert relative(plain_logits(lm.model, ids), expected) < 5e-5, kind
            assert relative(plain_logits(tt.bake(lm, *given).model, ids), expected) < 5e-5, kind
            results.append(expected)
        assert relative(results[-1], results[-2]) > 1e-3, kind


def test_a_sum_bakes_as_its_parts_in_order() -> None:
    lm = language_model("llama")
    a, b = steer_at(lm, "heads", "Rotate").at(50), steer_at(lm, "heads", "Scale", seed=1).at(2)
    c = steer_at(lm, "ffn_out", "Ablate").at(1)
    baked = tt.bake(lm, a, b, c)
    for given in ((a + b + c,), (a + b, c), (a, b + c), (a + (b + c),)):
        again = tt.bake(lm, *given)
        assert again.identity.digest == baked.identity.digest
        assert again.name == baked.name
    assert tt.bake(lm, b + a + c).identity.digest != baked.identity.digest
    attached = lm.logits(PROMPTS, steering=a + b + c)
    assert relative(baked.logits(PROMPTS), attached) < 1e-5
    with pytest.raises(tt.TrimtabError, match="cannot bake test: Turn"):
        tt.bake(lm, a + steer_at(lm, "heads", "Turn"))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2"])
def test_ffn_out_and_resid_of_one_layer_in_either_order(name: str) -> None:
    """Both fold into the same weights, but the vector is not scaled, whichever was given first."""
    lm = language_model(name)
    units, vector = steer_at(lm, "ffn_out", "Scale").at(2), steer_at(lm, "resid", "Add").at(2)
    for steerings in ((units, vector), (vector, units)):
        check_same(lm, tt.bake(lm, *steerings), *steerings)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, kind in SITES
        if name in ("llama", "gpt2")
        if not any((name, kind, op) in REFUSED for op in ("Scale", "Add"))
    ],
)
def test_the_order_at_one_site_counts(name: str, kind: str) -> None:
    lm = language_model(name)
    a, b = steer_at(lm, kind, "Scale", seed=1), steer_at(lm, kind, "Add", seed=2).at(3)
    c = steer_at(lm, kind, "Scale", seed=3)
    a_then_b = lm.logits(PROMPTS, steering=[(a, b)] * 3)
    assert relative(lm.logits(PROMPTS, steering=[(b, a)] * 3), a_then_b) > 1e-3
    for order in ((a, b), (b, a), (a, b, c), (c, b, a), (b, b, a)):
        check_same(lm, tt.bake(lm, *order), *order, new=4)


def test_interventions_of_one_steering_at_one_site_keep_their_order() -> None:
    lm = language_model("llama")
    site, first, second = "layers.1.heads", scale(64, 1), add(64, 2, size=2.0)
    for pair in ((first, second), (second, first)):
        steering = steer(lm, *((site, op) for op in pair))
        check_same(lm, tt.bake(lm, steering), steering, new=4)


@pytest.mark.parametrize("name", TINY)
def test_all_that_bakes_together(name: str) -> None:
    lm = language_model(name)
    steerings = [
        steer_at(lm, kind, op, seed=number).at(0.5)
        for number, (kind, op) in enumerate(itertools.product(site_kinds(lm), ("Scale", "Add")))
        if (name, kind, op) not in REFUSED
    ]
    check_same(lm, tt.bake(lm, *reversed(steerings)), *reversed(steerings))


class Shuffle:
    """A linear operator that mixes units, as rotations will: it turns their order round, adds."""

    linear, identity = True, None

    def __init__(self, width: int) -> None:
        self.width = self.size = width
        self.shift = torch.randn(width, generator=torch.Generator().manual_seed(4)).double()

    def bind(self, dial: Any, device: Any) -> Any:
        return lambda x: (x.flip(-1) + self.shift).to(x.dtype)

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x.flip(-1)

    adjoint = linear_part

    def offset(self, dial: float) -> Tensor:
        return self.shift


@pytest.mark.parametrize("kind", ["embed", "attn_norm", "heads", "attn_out", "ffn_in", "ffn_out"])
def test_operators_that_mix_units_keep_their_order_too(kind: str) -> None:
    lm = language_model("gpt2")
    mixing = steer(lm, (f"layers.1.{kind}".replace("layers.1.embed", "embed"), Shuffle(48)))
    if kind == "ffn_in":
        mixing = steer(lm, ("layers.1.ffn_in", Shuffle(96)))
    one, other = steer_at(lm, kind, "Scale"), steer_at(lm, kind, "Add")
    for order in ((mixing, one, other), (other, mixing, one)):
        check_same(lm, tt.bake(lm, *order), *order, new=4)


def test_mixing_units_at_gpt2s_last_norm_is_refused_where_the_order_would_be_lost() -> None:
    lm = language_model("gpt2")
    mixing = Shuffle(48)
    with pytest.raises(tt.TrimtabError, match="has no bias at lm_head"):
        tt.bake(lm, steer(lm, ("final_norm", mixing)))
    mixing.shift.zero_()
    steering = steer(lm, ("final_norm", mixing))
    check_same(lm, tt.bake(lm, steering), steering, new=4)
    with pytest.raises(tt.TrimtabError, match="their order would be lost"):
        tt.bake(lm, steering, steer_at(lm, "final_norm", "Add"))


def test_baking_twice_is_baking_both() -> None:
    lm = language_model("llama")
    a, b = steer_at(lm, "ffn_out", "Scale"), steer_at(lm, "resid", "Add")
    once = tt.bake(lm, a)
    again = tt.bake(once, steer(once, ("layers.1.resid", b.interventions[0].operator)))
    check_same(lm, again, a, b)


def test_a_dial_of_zero_and_no_steering_bake_to_the_same_weights() -> None:
    lm = language_model("qwen2")
    idle = [op for op in OPERATORS if op not in ("Turn", "Adaptive")]
    zero = [steer_at(lm, kind, op).at(0) for kind in site_kinds(lm) for op in idle]
    for steerings in ([], zero):
        baked = tt.bake(lm, *steerings)
        assert baked.model is not lm.model
        assert torch.equal(baked.logits(PROMPTS), lm.logits(PROMPTS))
        assert baked.identity.digest == lm.identity.digest


# -- the user's model, and what the two share -------------------------------------------------


def shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_tied_embeddings_are_untied_only_when_needed(name: str) -> None:
    lm = language_model(name)
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    before = snapshot(lm.model)
    for kind, op in (("heads", "Scale"), ("ffn_out", "Scale"), ("attn_out", "Add")):
        baked = tt.bake(lm, steer_at(lm, kind, op)).model
        assert baked.config.tie_word_embeddings
        assert baked.get_output_embeddings().weight is baked.get_input_embeddings().weight
    if name == "gpt2":  # its last norm has a bias, and takes all that acts unit by unit
        for op in ("Scale", "Add"):
            assert tt.bake(lm, steer_at(lm, "final_norm", op)).model.config.tie_word_embeddings
    for kind in ("embed",) if name == "gpt2" else ("embed", "final_norm"):
        baked = tt.bake(lm, steer_at(lm, kind, "Scale")).model
        assert not baked.config.tie_word_embeddings
        table, head = baked.get_input_embeddings().weight, baked.get_output_embeddings().weight
        assert not torch.equal(table, head)
        untouched, changed = (head, table) if kind == "embed" else (table, head)
        original = lm.model.get_input_embeddings().weight
        assert torch.equal(untouched, original)
        assert not torch.equal(changed, original)
    check_untouched(lm.model, before)
    assert lm.model.config.tie_word_embeddings
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight


def test_weights_that_do_not_change_are_shared() -> None:
    for name, op in (("llama", "Scale"), ("qwen2", "Add"), ("gemma3", "Scale")):
        lm = language_model(name)
        before = snapshot(lm.model)
        baked = tt.bake(lm, steer_at(lm, "heads", op)).model
        changed = "model.layers.1.self_attn.o_proj.weight"
        for key, parameter in baked.named_parameters():
            if key.endswith("bias") and key not in dict(lm.model.named_parameters()):
                continue
            original = lm.model.get_parameter(key)
            assert shares(parameter, original) == (key != changed or op == "Add"), (name, key)
        check_untouched(lm.model, before)


def test_training_the_baked_model_would_need_its_own_weights() -> None:
    """Changing a changed weight of the baked model in place leaves the user's alone."""
    lm = language_model("llama")
    before = snapshot(lm.model)
    baked = tt.bake(lm, steer_at(lm, "heads", "Scale")).model
    with torch.no_grad():
        baked.model.layers[1].self_attn.o_proj.weight.zero_()
    check_untouched(lm.model, before)


def test_the_name_and_the_mode_of_a_baked_model() -> None:
    lm = language_model("llama")
    baked = tt.bake(lm, steer_at(lm, "heads", "Scale").at(3))
    assert "llama" in baked.name
    assert "test alpha=3" in baked.name
    assert not baked.model.training
    assert baked.tokenizer is lm.tokenizer


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_models_without_biases_become_llama_models(name: str) -> None:
    lm = language_model(name, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    lm.model.generation_config.temperature = 0.7
    lm.model.generation_config.do_sample = True
    steering = steer_at(lm, "resid", "Add")
    baked = tt.bake(lm, steering)
    assert type(baked.model).__name__ == "LlamaForCausalLM"
    assert type(lm.model).__name__ != "LlamaForCausalLM"
    assert baked.model.config.architectures == ["LlamaForCausalLM"]
    assert baked.model.config.tie_word_embeddings == lm.model.config.tie_word_embeddings
    assert baked.model.generation_config.temperature == 0.7
    check_same(lm, baked, steering)
    # Where no bias is missing they stay what they are.
    assert type(tt.bake(lm, steer_at(lm, "heads", "Scale")).model) is type(lm.model)


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_positions_other_than_all_are_refused(positions: Any) -> None:
    lm = language_model("llama")
    with pytest.raises(tt.TrimtabError, match=f"{positions!r} positions.*attach it instead"):
        tt.bake(lm, steer_at(lm, "ffn_out", "Scale", positions=positions))


def test_operators_that_are_not_linear_are_refused() -> None:
    lm = language_model("llama")

    class Clip:
        linear, identity, width, size = False, None, 48, 48

    with pytest.raises(tt.TrimtabError, match="Clip is not linear.*attach it instead"):
        tt.bake(lm, steer(lm, ("layers.1.ffn_out", Clip())))


def test_quantised_models_are_refused() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "ffn_out", "Scale")
    config = SimpleNamespace(quant_method="bitsandbytes")
    lm.model.hf_quantizer = SimpleNamespace(quantization_config=config)
    assert lm.quantised
    with pytest.raises(tt.TrimtabError, match="is quantised.*attach the steering instead"):
        tt.bake(lm, steering)
    lm.logits(PROMPTS, steering=steering)  # which is possible


def test_a_model_read_from_gguf_has_plain_weights_and_bakes(tmp_path: Path) -> None:
    """transformers keeps the mark of the file that it was read from, and refuses to save it."""
    lm = language_model("llama")
    steering = steer_at(lm, "ffn_out", "Scale")
    config = SimpleNamespace(quant_method="gguf")
    lm.model.hf_quantizer = SimpleNamespace(quantization_config=config)
    lm.model.is_quantized = True
    lm.model.config.quantization_config = config
    assert not lm.quantised
    baked = tt.bake(lm, steering)
    assert getattr(baked.model, "hf_quantizer", None) is None
    assert not hasattr(baked.model.config, "quantization_config")
    assert lm.model.config.quantization_config is config
    baked.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = token_ids(PROMPTS[0])
    assert torch.equal(plain_logits(again, ids), plain_logits(baked.model, ids))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_a_short_sliding_window_has_no_llama_that_computes_the_same(
    name: str, options: dict[str, Any]
) -> None:
    lm = language_model(name, **options)
    with pytest.raises(tt.TrimtabError, match="sliding window of 8 tokens.*attach the steering"):
        tt.bake(lm, steer_at(lm, "resid", "Add"))
    # Scaling needs no bias, so nothing has to move.
    steering = steer_at(lm, "heads", "Scale")
    check_same(lm, tt.bake(lm, steering), steering)


def test_a_window_as_long_as_the_text_can_be_is_none() -> None:
    lm = language_model("mistral", sliding_window=256)
    steering = steer_at(lm, "resid", "Add")
    check_same(lm, tt.bake(lm, steering), steering)


def test_baking_inside_a_steered_block_is_refused() -> None:
    """The copy would carry the block's hooks with it, and stay steered for good."""
    lm = language_model("llama")
    for attached in (
        steer_at(lm, "ffn_out", "Scale"),
        steer_at(lm, "heads", "Scale"),
        steer_at(lm, "resid", positions="last"),
        steer_at(lm, "attn_norm_in", "Turn"),
    ):
        with (
            lm.steered(attached),
            pytest.raises(tt.TrimtabError, match="while it is steered.*after the block"),
        ):
            tt.bake(lm, steer_at(lm, "resid", "Add"))
    tt.bake(lm, steer_at(lm, "resid", "Add"))
    experts = language_model("qwen3_moe")
    with (
        experts.steered(steer_at(experts, "ffn_in", "Scale")),
        pytest.raises(tt.TrimtabError, match="while it is steered"),
    ):
        tt.bake(experts)


def test_another_models_steering_is_refused_unless_forced() -> None:
    lm, other = language_model("llama"), language_model("llama", seed=1)
    steering = steer_at(other, "ffn_out", "Scale")
    with pytest.raises(tt.TrimtabError, match="was made for"):
        tt.bake(lm, steering)
    baked = tt.bake(lm, steering, force=True)
    attached = lm.logits(PROMPTS, steering=steering, force=True)
    assert relative(baked.logits(PROMPTS), attached) < 1e-5


# -- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_bfloat16_baked_is_close_to_attached(name: str) -> None:
    lm = language_model(name, dtype=torch.bfloat16)
    exact = language_model(name)
    kinds = [("heads", "Scale"), ("ffn_out", "Scale"), ("attn_out", "Add"), ("embed", "Add")]
    for kind, op in kinds:
        steering = steer_at(lm, kind, op)
        baked = tt.bake(lm, steering)
        assert all(parameter.dtype is torch.bfloat16 for parameter in baked.model.parameters())
        attached = lm.logits(PROMPTS, steering=steering)
        # What rounding to 8 bits does to this model anyway, attached and in float32.
        rounding = relative(attached, exact.logits(PROMPTS, steering=steer_at(exact, kind, op)))
        assert relative(baked.logits(PROMPTS), attached) < max(0.03, 2 * rounding)
        assert relative(lm.logits(PROMPTS), attached) > 0.05


# -- saving -----------------------------------------------------------------------------------

#: Checkpoints that are saved and read by plain transformers: model and (kind, operator) pairs.
CHECKPOINTS: dict[str, tuple[str, Sequence[tuple[str, str]]]] = {
    "llama": ("llama", [("resid", "Add"), ("attn_norm", "Add"), ("ffn_out", "Scale")]),
    "qwen2": ("qwen2", [("resid", "Add"), ("heads", "Scale")]),  # becomes Llama, tied
    "qwen2-untied": ("qwen2", [("resid", "Add"), ("embed", "Add")]),  # Llama, untied
    "mistral": ("mistral", [("resid", "Add"), ("heads", "Add")]),  # becomes Llama
    "gemma3": ("gemma3", [("final_norm", "Scale"), ("ffn_out", "Scale")]),  # untied head
    "gemma3-tied": ("gemma3", [("ffn_out", "Scale"), ("attn_out", "Add")]),
    "gpt2": ("gpt2", [("resid", "Add"), ("ffn_in", "Scale"), ("final_norm", "Add")]),
    "gpt2-untied": ("gpt2", [("embed", "Add"), ("embed", "Scale"), ("final_norm", "Scale")]),
    "qwen3_moe": ("qwen3_moe", [("ffn_in", "Scale"), ("ffn_out", "Scale"), ("heads", "Add")]),
}

#: Reads every checkpoint in a process that has never heard of trimtab.
PLAIN_READER = """
import sys
from pathlib import Path

class OutOfReach:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "trimtab":
            raise ImportError("trimtab is out of reach")

sys.meta_path.insert(0, OutOfReach())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
room = Path(sys.argv[1])
found = {}
for folder in sorted(path for path in room.iterdir() if path.is_dir()):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), (folder.name, loading)
    ids = AutoTokenizer.from_pretrained(folder)(sys.argv[2], return_tensors="pt").input_ids
    with torch.no_grad():
        found[folder.name + ".logits"] = model.eval()(ids).logits[0].clone()
    found[folder.name + ".text"] = model.generate(ids, max_new_tokens=32, do_sample=False,
                                                  eos_token_id=None, pad_token_id=0)[0].clone()
save_file(found, room / "found.safetensors")
assert "trimtab" not in sys.modules
"""


def checkpoint_parts(key: str) -> tuple[tt.LanguageModel, list[tt.Steering]]:
    name, parts = CHECKPOINTS[key]
    options = {"attention_bias": True} if key == "llama" else {}
    lm = language_model(name, **options)
    return lm, [steer_at(lm, kind, op) for kind, op in parts]


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Logits and texts of all saved checkpoints, as another process found them."""
    from safetensors.torch import load_file

    room = tmp_path_factory.mktemp("checkpoints")
    for key in CHECKPOINTS:
        lm, steerings = checkpoint_parts(key)
        tt.bake(lm, *steerings).save_pretrained(room / key)
    command = [sys.executable, "-I", "-c", PLAIN_READER, str(room), PROMPTS[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(room / "found.safetensors")


@pytest.mark.parametrize("key", CHECKPOINTS)
def test_a_saved_checkpoint_is_read_by_plain_transformers(
    read_elsewhere: dict[str, Tensor], key: str
) -> None:
    lm, steerings = checkpoint_parts(key)
    ids = token_ids(PROMPTS[0])
    with lm.steered(*steerings):
        attached = plain_logits(lm.model, ids)
        text = lm.model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0]
    assert relative(read_elsewhere[f"{key}.logits"], attached) < 1e-4
    assert relative(attached, plain_logits(lm.model, ids)) > 1e-3
    assert read_elsewhere[f"{key}.text"].tolist() == text.tolist()


def test_an_existing_directory_is_not_overwritten_unasked(tmp_path: Path) -> None:
    lm = language_model("llama")
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("mine")
    with pytest.raises(tt.TrimtabError, match=r"exists.*--overwrite"):
        tt.bake(lm).save_pretrained(target)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert tt.bake(lm).save_pretrained(target, overwrite=True) == target
    assert (target / "model.safetensors").is_file()
    assert (target / "tokenizer.json").is_file()
    assert (target / "config.json").read_text() != "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left on device"), SafetensorError("No space left on device")],
)
@pytest.mark.parametrize("part", ["model", "tokenizer"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, part: str, existing: bool
) -> None:
    """Real writes of safetensors raise their own error on a full disk."""
    lm = language_model("llama")
    target = tmp_path / "model"
    if existing:
        target.mkdir()
        (target / "config.json").write_text("mine")
    owner = type(lm.model if part == "model" else lm.tokenizer)

    def half(self: Any, folder: Path, **options: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "half.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(owner, "save_pretrained", half)
    with pytest.raises(tt.TrimtabError, match="cannot write .*No space left") as caught:
        lm.save_pretrained(target, overwrite=existing)
    assert "\n" not in str(caught.value)
    if existing:
        assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if existing else [])


def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model("llama")

    def interrupted(self: Any, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(lm.tokenizer), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_old_directory_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model("llama")
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("mine")
    rename = Path.rename

    def stubborn(self: Path, goal: Path) -> Any:
        if self.name == "model" and self != target:  # the new one
            raise OSError(5, "Input/output error")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(tt.TrimtabError, match="cannot write .*Input/output error"):
        lm.save_pretrained(target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    lm = language_model("llama")
    with pytest.raises(tt.TrimtabError, match="cannot write .*No such file or directory"):
        lm.save_pretrained(tmp_path / "missing" / "model")
    assert not list(tmp_path.iterdir())


# -- real models ------------------------------------------------------------------------------

REAL_PAIRS = [
    (f"{who} came home and said that the day was", good, bad)
    for who, good, bad in itertools.product(
        ("She", "He", "My brother", "The old captain"),
        (" wonderful.", " lovely, really."),
        (" terrible.", " awful, really."),
    )
]


def check_real(lm: tt.LanguageModel, *steerings: tt.Steering) -> None:
    """Attached and baked on real weights: logits of two prompts, and 32 greedy tokens of one."""
    prompts = ["She looked at the map and", "Today I feel"]
    baked = tt.bake(lm, *steerings)
    with lm.steered(*steerings):
        attached = lm.logits(prompts)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = lm.tokenizer(prompts[0], return_tensors="pt").input_ids
        text = lm.model.generate(ids, max_new_tokens=32, **options)[0].tolist()
    assert relative(baked.logits(prompts), attached) < 1e-4
    assert relative(lm.logits(prompts), attached) > 0.01
    following = plain_logits(baked.model, text).argmax(-1).tolist()
    assert following[-33:-1] == text[-32:]


METHODS = {
    "austeer-heads": tt.AUSteer(site="heads", k=20, alpha=4.0),
    "austeer-ffn_out": tt.AUSteer(site="ffn_out", k=20, alpha=4.0),
    "caa": tt.CAA(layer=12),
}


@pytest.fixture(scope="module")
def fitted(smollm2: tt.LanguageModel) -> dict[str, tt.Steering]:
    steerings = tt.fit(list(METHODS.values()), smollm2, tt.Contrast.from_pairs(REAL_PAIRS))
    return dict(zip(METHODS, steerings, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_smollm2_baked_equals_attached(
    smollm2: tt.LanguageModel, fitted: dict[str, tt.Steering], method: str
) -> None:
    check_real(smollm2, fitted[method])


@pytest.mark.slow
@pytest.mark.parametrize("site", ["heads", "ffn_out", "ffn_in"])
def test_gemma3_baked_equals_attached(gemma3: tt.LanguageModel, site: str) -> None:
    method = tt.AUSteer(site=site, k=20, alpha=4.0)
    check_real(gemma3, method.fit(gemma3, tt.Contrast.from_pairs(REAL_PAIRS)))
