"""Baking: the plain checkpoint does what the attached steering does, or there is a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import trimtab as tt
from baking import REFUSED, ablated, check_same, check_untouched, snapshot
from helpers import (
    MISSING,
    OPERATORS,
    PROMPTS,
    SITES,
    TELLING,
    add,
    basis,
    by_hand,
    language_model,
    plain_logits,
    relative,
    scale,
    site_kinds,
    steer,
    steer_at,
    token_ids,
    turned,
)
from reference import reference
from tiny import TINY
from trimtab.steering.operators import Ablate, Rotate

# -- every architecture, every site kind, every operator --------------------------------------


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
