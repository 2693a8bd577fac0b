"""Affine maps, subspaces, shifts and clamps attached and baked; gains of norms after branches."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

import trimtab as tt
from baking import AFTER_A_NORM, NO_BIAS, REFUSED
from helpers import (
    PROMPTS,
    SITES,
    language_model,
    one_line,
    plain_logits,
    refused_in_one_line,
    relative,
    steer,
    token_ids,
)
from operator_formulas import formula, random_operator
from plain_sites import plain_edit, plain_sites
from reference import reference
from tiny import TINY, tiny_model, tiny_tokenizer
from tiny_curated import CURATED, curated_model
from trimtab import strength
from trimtab.anatomy import Anatomy
from trimtab.dials import Turning
from trimtab.steering.operators import Ablate, Add, Affine, Clamp, Scale, Shift, orthonormal

#: Linear operators beside Scale, Add, Ablate and Rotate, and those that are not.
LINEAR = ("Ablate3", "Affine", "Constant", "Shift", "SetTo")
OTHERS = ("Interval", "Clamp", "AtLeast", "Kept", "Capped")
#: Linear ones that add something, and those that mix units.
ADDS, MIXES = ("Constant", "Shift", "SetTo"), ("Ablate3", "Affine", "Constant", "SetTo")
#: What only the comparison that ends a bake finds: Gemma 4 reads the embedding twice.
UNFORESEEN = ("gemma4", "embed")
#: Curated models of the quick run, with one operator at each kind of site.
QUICK = ("deepseek_v3", "glm4", "gpt_oss", "granite")

_wrapped = cache(language_model)


@cache
def _curated(name: str) -> tt.LanguageModel:
    return tt.wrap(curated_model(name), tiny_tokenizer(), name)


def _steering(lm: tt.LanguageModel, site: str, op: str) -> tt.Steering:
    """At a dial at which it shows."""
    width = lm.anatomy.width(site)
    seed = 7 * (width + 1) + width // 2  # half of the units, where some are chosen
    return steer(lm, (site, random_operator(op, seed, width))).at(0.75)


def _refusal(name: str, kind: str, op: str) -> str | None:
    """Why it does not bake: what keeps a map of its kind, or an added vector, from it."""
    alike = "Ablate" if op in MIXES else "Scale"
    reason = REFUSED.get((name, kind, alike))
    if reason is None and op in ADDS:
        reason = REFUSED.get((name, kind, "Add"))
        if (name, kind) == ("gpt2", "final_norm") and op in MIXES:
            return NO_BIAS  # the norm's bias takes a vector only where its gain takes the rest
    return reason


def _cases(ops: tuple[str, ...]) -> list[object]:
    """Every operator at every kind of site, of which the quick run has one at each."""
    return [
        pytest.param(name, kind, op, marks=() if ops[i % len(ops)] == op else pytest.mark.slow)
        for i, (name, kind) in enumerate(SITES)
        for op in ops
    ]


@pytest.mark.parametrize(("name", "kind", "op"), _cases(LINEAR))
def test_baked_equals_attached_or_is_refused_with_the_reason(name: str, kind: str, op: str) -> None:
    lm = _wrapped(name)
    steering = _steering(lm, lm.anatomy.sites(kind)[-1], op)
    reason = _refusal(name, kind, op)
    if reason is not None:
        with pytest.raises(tt.TrimtabError, match=reason) as caught:
            tt.bake(lm, steering)
        assert "attach" in one_line(caught)
        return
    attached = lm.logits(PROMPTS[:1], steering=steering)
    assert relative(tt.bake(lm, steering).logits(PROMPTS[:1]), attached) < 1e-4
    assert relative(attached, lm.logits(PROMPTS[:1])) > 1e-3


@pytest.mark.parametrize(("name", "kind", "op"), _cases((*LINEAR, *OTHERS)))
def test_attached_is_the_formula_by_hand(name: str, kind: str, op: str) -> None:
    lm, ids = _wrapped(name), token_ids(PROMPTS[0])
    site = lm.anatomy.sites(kind)[-1]
    steering = _steering(lm, site, op)
    change = partial(formula, steering.interventions[0].operator, dial=steering.setting)
    _, expected = reference(name, lm.model, ids, {site: change})
    found = lm.logits(PROMPTS[:1], steering=steering)[0]
    assert relative(found, expected[-1]) < 1e-4


@pytest.mark.parametrize("op", OTHERS)
def test_what_is_not_linear_says_so(op: str) -> None:
    lm = _wrapped("llama")
    steering = _steering(lm, "layers.1.ffn_out", op)
    with pytest.raises(tt.TrimtabError, match="is not linear in the activation") as caught:
        tt.bake(lm, steering)
    assert "attach it instead" in one_line(caught)


def _check_curated(name: str, every: bool) -> None:
    """Attached as plain hooks at a site of each kind; baked as attached, or refused before
    anything is compared."""
    lm, ids = _curated(name), token_ids(PROMPTS[0])
    of_kinds = {site.split(".")[-1]: site for site in plain_sites(name)}
    ops = (*LINEAR, *OTHERS)
    for number, site in enumerate(of_kinds.values()):
        for op in ops if every else (ops[number % len(ops)],):
            steering = _steering(lm, site, op)
            change = partial(formula, steering.interventions[0].operator, dial=steering.setting)
            with plain_edit(lm.model, name, site, lambda x, by=change: by(x).to(x.dtype)):  # type: ignore[misc]
                expected = plain_logits(lm.model, ids)[-1]
            attached = lm.logits(PROMPTS[:1], steering=steering)
            assert relative(attached[0], expected) < 1e-4, (site, op)
            try:
                baked = tt.bake(lm, steering)
            except tt.TrimtabError as error:
                message = str(error)
                assert "cannot bake" in message, (site, op)
                assert ("is not linear" in message) == (op in OTHERS), (site, op)
                unforeseen = (name, site) == UNFORESEEN and op in LINEAR
                assert ("differ from the steered" in message) == unforeseen, (site, op)
                continue
            assert relative(baked.logits(PROMPTS[:1]), attached) < 1e-4, (site, op)


@pytest.mark.parametrize("name", QUICK)
def test_curated_models_bake_or_refuse(name: str) -> None:
    _check_curated(name, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CURATED)
def test_every_curated_model_bakes_or_refuses_everything(name: str) -> None:
    _check_curated(name, every=True)


# -- the gain of a norm after a branch --------------------------------------------------------

#: What the gain is beyond the weight, by transformers' code, and the norms after the branches.
_GEMMA_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
GAINS: dict[str, tuple[float, tuple[str, str]]] = {
    "gemma2": (1.0, _GEMMA_NORMS),
    "gemma3": (1.0, _GEMMA_NORMS),
    "olmo2": (0.0, _GEMMA_NORMS),
    "exaone4": (0.0, _GEMMA_NORMS),
    "gemma4": (0.0, _GEMMA_NORMS),
    "gemma4_moe": (0.0, _GEMMA_NORMS),
    "glm4": (0.0, ("post_self_attn_layernorm", "post_mlp_layernorm")),
    "olmo3": (0.0, _GEMMA_NORMS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", GAINS)
def test_scaling_after_a_norm_is_another_gain_of_it(name: str, dtype: torch.dtype) -> None:
    model = (tiny_model if name in TINY else curated_model)(name, dtype=dtype)
    lm = tt.wrap(model, tiny_tokenizer(), name)
    added, norms = GAINS[name]
    units = torch.randperm(lm.anatomy.hidden_size, generator=torch.Generator().manual_seed(1))[:9]
    slope = torch.linspace(-1, 2, 9)
    for kind, norm in zip(("attn_post_norm", "ffn_post_norm"), norms, strict=True):
        if not lm.anatomy.has(kind):
            continue
        width = lm.anatomy.hidden_size
        shift = Shift(units, slope, torch.zeros(9), width)
        for made in (Scale(units, slope - 1, width), shift):
            steering = steer(lm, (f"layers.1.{kind}", made)).at(0.5)
            baked = tt.bake(lm, steering)
            factors = torch.ones(width).double().index_copy(0, units, 0.5 + 0.5 * slope.double())
            path = f"model.layers.1.{norm}.weight"
            old = lm.model.state_dict()[path].double()
            expected = (factors * (added + old) - added).to(dtype)
            assert torch.equal(baked.model.state_dict()[path], expected)
            changed = [
                key
                for key, value in lm.model.state_dict().items()
                if not torch.equal(value, baked.model.state_dict()[key])
            ]
            assert changed == [path]
            if dtype == torch.float32:
                attached = lm.logits(PROMPTS[:1], steering=steering)
                assert relative(baked.logits(PROMPTS[:1]), attached) < 1e-5


def test_what_does_not_go_into_a_gain_is_refused_with_the_reason() -> None:
    lm = _wrapped("gemma3")
    width = lm.anatomy.hidden_size
    direction = orthonormal(torch.randn(1, width))[0].float()
    for made, why in (
        (Add(direction), "it has no bias, so that nothing can be added"),
        (Clamp(direction, 0.0, 0.0), "units cannot be mixed"),
    ):
        says = f"{AFTER_A_NORM}, and .*{why}; attach"
        steering = steer(lm, ("layers.1.ffn_post_norm", made))
        refused_in_one_line(lambda one=steering: tt.bake(lm, one), says)  # type: ignore[misc]


class Reversed(torch.nn.Module):
    """A norm whose gain is what is taken off its weight."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.inner = norm.weight, norm

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = x / x.norm(dim=-1, keepdim=True)
        return inner * (3 - self.weight)


def test_a_gain_that_is_not_known_is_not_guessed() -> None:
    model = tiny_model("olmo2")
    block = model.model.layers[1]
    block.post_feedforward_layernorm = Reversed(block.post_feedforward_layernorm)
    anatomy = Anatomy(model)
    assert anatomy.gain("layers.1.ffn_post_norm") is None
    assert anatomy.gain("layers.0.ffn_post_norm") is not None
    assert anatomy.gain("layers.0.ffn_out") is None
    lm = tt.wrap(model, tiny_tokenizer(), "olmo2")
    steering = _steering(lm, "layers.1.ffn_post_norm", "Shift")
    refused_in_one_line(lambda: tt.bake(lm, steering), "multiply what it returns is not known")


def test_at_the_last_block_keeping_the_length_changes_nothing() -> None:
    """The final norm takes the length away; a block earlier it is felt through the skip path."""
    torch.manual_seed(2)
    for name in ("llama", "gemma2", "olmo2", "phi3"):
        lm = _wrapped(name)
        last = lm.anatomy.layers - 1
        vector = 3 * torch.randn(lm.anatomy.hidden_size)
        plain = lm.logits(PROMPTS[:1])
        for layer, alike in ((last, True), (last - 1, False)):
            added = [
                lm.logits(
                    PROMPTS[:1], steering=steer(lm, (f"layers.{layer}.resid", Add(vector, keeps)))
                )
                for keeps in ("no", "always", "cap")
            ]
            assert relative(added[0], plain) > 1e-2
            for kept in added[1:]:
                apart = relative(kept, added[0])
                assert apart < 1e-4 if alike else apart > 1e-4, (name, layer)


@pytest.mark.parametrize("op", [*LINEAR, *OTHERS])
def test_the_derivative_that_budgets_use(op: str) -> None:
    """Against differences, through the model; bounds are met by some tokens only."""
    lm = _wrapped("llama", dtype=torch.float64)
    texts, dials = [token_ids(prompt) for prompt in PROMPTS], [0.4, -0.6, 0.9]
    turning = Turning(lm, _steering(lm, "layers.1.resid", op), texts)
    found = torch.empty(3, lm.model.config.vocab_size, dtype=torch.float64)
    for places, _, slopes in turning.derivative([0, 1, 2], dials):
        found[places] = slopes.double()
    step, ends = 1e-3, []
    for moved in (step, -step):
        rows = torch.empty_like(found)
        for places, logits, _ in turning.derivative([0, 1, 2], [dial + moved for dial in dials]):
            rows[places] = logits.double()
        ends.append(rows)
    assert relative(found, (ends[0] - ends[1]) / (2 * step)) < 1e-3


def test_where_the_dial_is_turned_without_end() -> None:
    """What only adds has an end, however it is written; of anything else it depends on the text."""
    lm = _wrapped("llama")
    width = lm.anatomy.hidden_size
    vector, none = torch.randn(width), torch.zeros(width, 1)
    end = strength.limit(lm, steer(lm, ("layers.1.resid", Add(vector))))
    for made in (
        Affine(none, none, vector),
        Shift(torch.arange(width), torch.ones(width), vector, width),
    ):
        assert torch.equal(strength.limit(lm, steer(lm, ("layers.1.resid", made))), end)
    direction = orthonormal(vector[None])[0].float()
    for other in (
        Add(vector, "always"),
        Affine(direction[:, None], direction[:, None], vector),
        Clamp(direction, 0.5, 0.5),
        Ablate(torch.stack((direction,))),
    ):
        steering = steer(lm, ("layers.1.resid", other))
        refused_in_one_line(
            lambda one=steering: strength.limit(lm, one),  # type: ignore[misc]
            "does more than add a vector",
        )


def test_the_dial_of_a_row_is_its_own() -> None:
    lm = _wrapped("llama")
    for op in (*LINEAR, *OTHERS):
        steering = _steering(lm, "layers.1.ffn_out", op)
        rows = [steering, None, replace(steering, value=-0.5)]
        together = lm.logits(PROMPTS, steering=rows)
        for prompt, row, logits in zip(PROMPTS, rows, together, strict=True):
            assert relative(logits, lm.logits([prompt], steering=row)[0]) < 1e-4
        still = replace(steering, value=0.0)
        plain = lm.logits(PROMPTS)
        assert torch.equal(lm.logits(PROMPTS, steering=still), plain)
        assert torch.equal(lm.logits(PROMPTS, steering=[steering, still, None])[1:], plain[1:])
