"""SAS, AAS and SS against their definitions, computed from what plain hooks on the norms see."""

from __future__ import annotations

import cmath
import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model, relative
from reference import reference
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.fitting.activations import Statistics, Want, collect
from trimtab.fitting.statistics import Means, Sides
from trimtab.methods.contents import describe, explain
from trimtab.steering.operators import Rotate, Turn

#: The norms of a block by transformers' names and by their sites, in the order of the computation.
_GEMMA = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "attn_post_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "ffn_post_norm"),
]
NORMS = {
    "llama": [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")],
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gpt2": [("ln_1", "attn_norm"), ("ln_2", "ffn_norm")],
    # No norms before the branches: there the branch's own input is taken.
    "olmo2": [
        ("self_attn", "attn_norm"),
        ("post_attention_layernorm", "attn_post_norm"),
        ("mlp", "ffn_norm"),
        ("post_feedforward_layernorm", "ffn_post_norm"),
    ],
}
#: Texts of different lengths, so that batches are padded; the sides end differently.
WHO, WHAT = ("king", "mother", "old captain"), ("ship", "map", "fire in the rain")
POSITIVE = [f"The {who} saw the {what} and said: I love this" for who in WHO for what in WHAT]
NEGATIVE = [f"The {who} hates the {what}, and it was bad" for what in WHAT for who in WHO][:7]
CONTRAST = Contrast.from_texts(POSITIVE, NEGATIVE, "mine")
SWAPPED = Contrast.from_texts(NEGATIVE, POSITIVE, "swapped")
PROMPTS = ["She looked at the map and asked", "Today I feel sad because of the rain", "The answer"]


def _chat(texts: Sequence[str]) -> list[Any]:
    return [[{"role": "user", "content": text}] for text in texts]


CHAT = Contrast.from_texts(_chat(POSITIVE), _chat(NEGATIVE), "chats")


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return language_model(name)


# -- the definitions, without trimtab ---------------------------------------------------------


@functools.cache
def _seen(name: str, chat: bool = False) -> dict[str, dict[str, list[Tensor]]]:
    """By site, what each norm reads and puts out at each text's last token, [texts, units].

    {"layers.0.attn_norm": {"input": [positives, negatives], "output": [...]}}.
    """
    model: Any = _lm(name).model
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    now: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for layer, block in enumerate(blocks):
        for path, kind in NORMS[name]:

            def keep(
                module: Any, args: Any, kwargs: Any, output: Any, site: str, kind: str
            ) -> None:
                read = args[0] if args else kwargs["hidden_states"]
                bare = name == "olmo2" and not kind.endswith("_post_norm")
                now[site] = (read[0, -1].double(), (read if bare else output)[0, -1].double())

            handles.append(
                block.get_submodule(path).register_forward_hook(
                    functools.partial(keep, site=f"layers.{layer}.{kind}", kind=kind),
                    with_kwargs=True,
                )
            )
    found: dict[str, dict[str, list[Tensor]]] = {}
    for texts in (POSITIVE, NEGATIVE):
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for text in texts:
            with torch.no_grad():
                model(torch.tensor([_ids(text, chat)]), use_cache=False)
            for site, pair in now.items():
                rows.setdefault(site, []).append(pair)
        for site, pairs in rows.items():
            sides = found.setdefault(site, {"input": [], "output": []})
            for where, both in zip(("input", "output"), zip(*pairs, strict=True), strict=True):
                sides[where].append(torch.stack(both))
    for handle in handles:
        handle.remove()
    return found


def _ids(text: str, chat: bool) -> list[int]:
    if chat:
        messages = [{"role": "user", "content": text}]
        text = str(
            tiny_tokenizer().apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )
    ids: list[int] = tiny_tokenizer()(text, add_special_tokens=not chat)["input_ids"]
    return ids


def _sites(name: str, compat: bool) -> list[str]:
    kinds = [kind for _, kind in NORMS[name] if compat or not kind.endswith("_post_norm")]
    if name == "olmo2" and compat:
        kinds = ["attn_post_norm", "ffn_post_norm"]
    layers = 4 if name.startswith("gemma") else 3
    return [f"layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]


def _candidates(name: str, where: str, compat: bool = False, chat: bool = False) -> np.ndarray:
    """d_k of every site, [sites, units]: from outputs, or from inputs at unit length."""
    rows = []
    for site in _sites(name, compat):
        positive, negative = (side.numpy() for side in _seen(name, chat)[site][where])
        if where == "input":
            positive = positive / np.linalg.norm(positive, axis=1, keepdims=True)
            negative = negative / np.linalg.norm(negative, axis=1, keepdims=True)
        up, down = positive.mean(0), negative.mean(0)
        if where == "input":
            up, down = up / np.linalg.norm(up), down / np.linalg.norm(down)
        rows.append(up - down)
    return np.stack(rows)


def _plane(raw: np.ndarray, selection: str = "cosine") -> tuple[np.ndarray, int, float]:
    """The basis [2, units], which candidate b1 is, and its mean cosine to all of them."""
    lengths = [float(np.linalg.norm(row)) for row in raw]
    unit = [
        row / length if length > 1e-6 else 0 * row for row, length in zip(raw, lengths, strict=True)
    ]
    cosines = [sum(float(one @ other) for other in unit) / len(unit) for one in unit]
    ranking = cosines if selection == "cosine" else lengths
    best = max((k for k in range(len(raw)) if lengths[k] > 1e-6), key=lambda k: ranking[k])
    centred = np.stack(unit) - np.stack(unit).mean(0)
    # The eigenvector of the small matrix [sites, sites], carried over to units.
    component = centred.T @ np.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
    component = component / np.linalg.norm(component)
    second = component - (component @ unit[best]) * unit[best]
    second = second / np.linalg.norm(second)
    second = second * np.sign(second[np.abs(second).argmax()])
    return np.stack((unit[best], second)), best, cosines[best]


def _projections(name: str, site: str, basis: np.ndarray) -> list[np.ndarray]:
    """Mean of <h/|h|, b1> and <h/|h|, b2> over each side, [2] each; h is the norm's output."""
    means = []
    for side in _seen(name)[site]["output"]:
        h = side.numpy()
        means.append((h / np.linalg.norm(h, axis=1, keepdims=True)).mean(0) @ basis.T)
    return means


def _discriminative(name: str, basis: np.ndarray, whole: bool, compat: bool = False) -> list[str]:
    sites = _sites(name, compat)
    opposite = {}
    for site in sites:
        positive, negative = _projections(name, site, basis)
        opposite[site] = positive[0] * negative[0] < 0
    if not whole:
        return [site for site in sites if opposite[site]]
    return [
        site
        for site in sites
        if all(opposite[s] for s in sites if s.split(".")[1] == site.split(".")[1])
    ]


def _basis(steering: tt.Steering) -> Tensor:
    """The one basis that all interventions share."""
    operators: list[Any] = [intervention.operator for intervention in steering.interventions]
    for operator in operators:
        assert torch.equal(operator.basis, operators[0].basis)
    basis: Tensor = operators[0].basis
    return basis


def _named(steering: tt.Steering) -> list[str]:
    return [intervention.site for intervention in steering.interventions]


# -- the plane --------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("candidates", ["output", "input"])
@pytest.mark.parametrize("name", list(NORMS))
def test_the_plane_is_the_one_by_hand(name: str, candidates: Any, compat: bool) -> None:
    for selection in ("cosine", "norm"):
        method = tt.SAS(candidates=candidates, selection=selection, ss_compat=compat)  # type: ignore[arg-type]
        steering = method.fit(_lm(name), CONTRAST)
        basis, best, cosine = _plane(_candidates(name, candidates, compat), selection)
        assert steering.findings["source_site"] == _sites(name, compat)[best]
        assert steering.findings["mean_cosine"] == pytest.approx(cosine, abs=1e-4)
        assert relative(_basis(steering), torch.from_numpy(basis)) < 2e-4
        assert _named(steering) == _sites(name, compat)
        assert all(type(i.operator) is Turn for i in steering.interventions)


def test_the_two_selections_and_the_two_candidates_differ_here() -> None:
    planes = {
        (where, selection): _plane(_candidates("llama", where), selection)[:2]
        for where in ("output", "input")
        for selection in ("cosine", "norm")
    }
    assert planes["output", "cosine"][1] != planes["output", "norm"][1]
    assert np.abs(planes["output", "cosine"][0] - planes["input", "cosine"][0]).max() > 0.01


@pytest.mark.parametrize("name", list(NORMS))
def test_the_basis_is_orthonormal_and_its_sign_is_settled(name: str) -> None:
    for method in (tt.SAS(), tt.SS(whole_blocks=False)):
        basis = _basis(method.fit(_lm(name), CONTRAST))
        assert basis.dtype == torch.float32
        gram = basis.double() @ basis.double().T
        assert (gram - torch.eye(2).double()).abs().max() < 1e-6
        assert float(basis[1][basis[1].abs().argmax()]) > 0


def test_the_second_axis_of_a_wide_model_is_exact_and_the_same_every_time() -> None:
    # With many sites and units, sklearn by itself takes a randomised solver.
    lm = language_model("llama", num_hidden_layers=30)
    statistics, raw = Statistics(), []
    generator = torch.Generator().manual_seed(0)
    for layer in range(30):
        for kind in ("attn_norm", "ffn_norm"):
            sides = torch.randn(2, 3, 700, generator=generator)
            means = Means()
            means.update(_sides(sides[0], sides[1]))
            statistics[Want(f"layers.{layer}.{kind}", "last", Means)] = means
            raw.append((sides[0].double().mean(0) - sides[1].double().mean(0)).numpy())
    expected = torch.from_numpy(_plane(np.stack(raw))[0])
    first, second = (
        _basis(tt.SAS(candidates="output").build(lm, CONTRAST, statistics)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert relative(first, expected) < 1e-5


def _sides(positive: Tensor, negative: Tensor) -> Sides:
    rows = torch.arange(len(positive))
    return Sides(positive, negative, rows, rows)


@pytest.mark.parametrize("method", [tt.SAS(), tt.SAS(candidates="output"), tt.AAS()])
def test_swapping_the_sides_flips_the_first_axis_only(method: Any) -> None:
    one, other = (_basis(method.fit(_lm(), c)) for c in (CONTRAST, SWAPPED))
    assert relative(other[0], -one[0]) < 1e-5
    assert relative(other[1], one[1]) < 1e-4


# -- a site at which the sides do not differ --------------------------------------------------


@pytest.mark.parametrize("candidates", ["output", "input"])
@pytest.mark.parametrize("selection", ["cosine", "norm"])
def test_a_first_norm_that_reads_the_same_token_everywhere(candidates: Any, selection: Any) -> None:
    raw = _candidates("llama", candidates, chat=True)
    assert np.abs(raw[0]).max() < 1e-9 * np.abs(raw).max()  # that is how it is here
    method = tt.SAS(candidates=candidates, selection=selection)
    steering = method.fit(_lm(), CHAT)
    basis, best, _ = _plane(raw, selection)
    assert best != 0
    assert steering.findings["source_site"] == _sites("llama", False)[best]
    # The zero candidate is part of what is centred.
    assert relative(_basis(steering), torch.from_numpy(basis)) < 2e-4


@pytest.mark.parametrize("candidates", ["output", "input"])
def test_a_difference_by_rounding_is_no_direction(candidates: Any) -> None:
    method = tt.SAS(candidates=candidates)
    lm = _lm()
    statistics = collect(lm, CHAT, method.wants(lm, CHAT))
    clean = method.build(lm, CHAT, statistics)
    raw = _candidates("llama", candidates, chat=True)[1:]
    # The direction that would be chosen, and a size that float32 sums may be off by.
    towards = torch.from_numpy((raw / np.linalg.norm(raw, axis=1, keepdims=True)).mean(0))
    first = statistics[method.wants(lm, CHAT)[0]]
    first.sums[0] = first.sums[0] + 1e-6 * first.sums[0].norm() * towards / towards.norm()
    rounded = method.build(lm, CHAT, statistics)
    assert first.difference.any()
    assert rounded.findings["source_site"] == clean.findings["source_site"]
    assert torch.equal(_basis(rounded), _basis(clean))


def test_a_site_without_a_direction_is_not_chosen_even_when_the_others_cancel() -> None:
    statistics = Statistics()
    one, two, none = torch.eye(48)[0], torch.eye(48)[1], torch.zeros(48)
    directions = [none, two, one, -two, -one, one, -one, none]  # every mean cosine is 0
    for layer in range(4):
        for kind in ("attn_norm", "ffn_norm"):
            means = Means()
            means.update(_sides(directions.pop(0)[None] + 1, torch.ones(1, 48)))
            statistics[Want(f"layers.{layer}.{kind}", "last", Means)] = means
    steering = tt.SAS(candidates="output").build(_lm("gemma2"), CONTRAST, statistics)
    assert steering.findings["source_site"] == "layers.0.ffn_norm"
    assert torch.allclose(_basis(steering), torch.stack((two, one)))


def test_selective_steering_leaves_out_a_norm_without_a_difference() -> None:
    steering = tt.SS(whole_blocks=False, theta=10).fit(_lm(), CHAT)
    assert "layers.0.attn_norm" not in _named(steering)
    assert torch.isfinite(_basis(steering)).all()


def test_sides_that_never_differ_are_refused() -> None:
    # Labelled both ways: all means are equal.
    same = Contrast.from_texts(POSITIVE[:3], POSITIVE[:3], "same")
    for method in (tt.SAS(), tt.SAS(candidates="output"), tt.SS()):
        with pytest.raises(tt.TrimtabError, match="two sides do not differ"):
            method.fit(_lm(), same)


def test_candidates_on_one_line_are_refused() -> None:
    lm = language_model("llama")
    statistics = Statistics()
    for layer in range(3):
        for kind in ("attn_norm", "ffn_norm"):
            means = Means()
            means.update(_sides((1.0 + layer) * torch.ones(1, 48), torch.zeros(1, 48)))
            statistics[Want(f"layers.{layer}.{kind}", "last", Means)] = means
    with pytest.raises(tt.TrimtabError, match="lie on one line"):
        tt.SAS(candidates="output").build(lm, CONTRAST, statistics)


# -- where Selective Steering steers, and how far ---------------------------------------------


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("name", list(NORMS))
def test_discriminative_sites_are_those_by_hand(name: str, compat: bool) -> None:
    for candidates in ("output", "input"):
        for selection in ("cosine", "norm"):
            basis, _, _ = _plane(_candidates(name, candidates, compat), selection)
            for whole in (True, False):
                method = tt.SS(
                    candidates=candidates,  # type: ignore[arg-type]
                    selection=selection,  # type: ignore[arg-type]
                    whole_blocks=whole,
                    ss_compat=compat,
                )
                expected = _discriminative(name, basis, whole, compat)
                if not expected:
                    with pytest.raises(tt.TrimtabError, match="no site tells the two sides apart"):
                        method.fit(_lm(name), CONTRAST)
                    continue
                steering = method.fit(_lm(name), CONTRAST)
                assert _named(steering) == expected
                assert relative(_basis(steering), torch.from_numpy(basis)) < 2e-4
                turns = []
                for site in expected:
                    positive, negative = _projections(name, site, basis)
                    turns.append(complex(*positive) / complex(*negative))
                mean = sum(turn / abs(turn) for turn in turns)
                theta = math.degrees(cmath.phase(mean))
                assert steering.dial.default == pytest.approx(theta, abs=0.06)
                assert describe(steering)["layers"] == sorted(
                    {int(site.split(".")[1]) for site in expected}
                )


def test_some_sites_are_discriminative_here_and_some_blocks_only_in_part() -> None:
    """Or the test above would show little."""
    kinds = set()
    for name in NORMS:
        basis, _, _ = _plane(_candidates(name, "output"))
        alone, whole = (_discriminative(name, basis, flag) for flag in (False, True))
        kinds.add((bool(whole), len(whole) < len(alone), len(alone) < len(_sites(name, False))))
    assert {(True, True, True)} & kinds
    assert any(kind[2] for kind in kinds)


def test_no_site_to_steer_names_the_flag_that_may_help() -> None:
    failing = [
        name
        for name in NORMS
        if not _discriminative(name, _plane(_candidates(name, "output"))[0], whole=True)
    ]
    for name in failing:
        with pytest.raises(tt.TrimtabError, match="--no-whole-blocks"):
            tt.SS().fit(_lm(name), CONTRAST)


@pytest.mark.parametrize("name", list(NORMS))
def test_swapping_the_sides_changes_neither_sites_nor_angle(name: str) -> None:
    # b1 flips with the sides, and so do start and end of the angle between them.
    one, other = (tt.SS(whole_blocks=False).fit(_lm(name), c) for c in (CONTRAST, SWAPPED))
    assert _named(one) == _named(other)
    assert other.dial.default == pytest.approx(one.dial.default, abs=0.11)
    assert relative(_basis(other)[0], -_basis(one)[0]) < 1e-5


def test_the_default_angle_takes_the_negative_side_to_the_positive_one() -> None:
    steering = tt.SS(whole_blocks=False).fit(_lm(), CONTRAST)
    assert abs(steering.dial.default) > 10
    basis = _basis(steering).double().numpy()
    before, after = 0.0, 0.0
    turn = cmath.rect(1, math.radians(steering.dial.default))
    for site in _named(steering):
        positive, negative = (complex(*side) for side in _projections("llama", site, basis))
        before += math.cos(cmath.phase(positive / negative))
        after += math.cos(cmath.phase(positive / (negative * turn)))
    assert after > before
    assert after > 0


def test_an_angle_that_is_given_stays() -> None:
    for theta in (0.0, -30.0):
        steering = tt.SS(theta=theta, whole_blocks=False).fit(_lm(), CONTRAST)
        assert steering.dial.default == theta
    assert tt.SAS().fit(_lm(), CONTRAST).dial == tt.Dial("theta", 0.0, (-360.0, 360.0), "°")
    assert tt.AAS(theta=200).fit(_lm(), CONTRAST).dial.default == 200


def test_flipping_the_second_axis_turns_the_angle_around() -> None:
    lm = _lm()
    steering = tt.SS(whole_blocks=False).fit(lm, CONTRAST)
    flip = torch.tensor([[1.0], [-1.0]])
    flipped = replace(
        steering,
        interventions=tuple(
            replace(i, operator=Rotate(_basis(steering) * flip)) for i in steering.interventions
        ),
    )
    base = lm.logits(PROMPTS)
    one, other = (lm.logits(PROMPTS, steering=s) for s in (steering.at(70), flipped.at(-70)))
    assert relative(other, one) < 1e-5
    assert relative(lm.logits(PROMPTS, steering=flipped.at(70)), one) > 1e-3
    assert relative(one, base) > 1e-3


# -- what the model does ----------------------------------------------------------------------


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("name", list(NORMS))
def test_the_steered_model_is_the_formula_at_every_norm(name: str, compat: bool) -> None:
    lm, degrees = _lm(name), 130.0
    angle = math.radians(degrees)
    for method in (tt.SAS, tt.AAS, tt.SS):
        options: dict[str, Any] = {"whole_blocks": False} if method is tt.SS else {}
        steering = method(ss_compat=compat, **options).fit(lm, CONTRAST)
        b1, b2 = _basis(steering).double()

        def steered(h: Tensor) -> Tensor:
            x, y = h @ b1, h @ b2
            if method is tt.SS:
                cos, sin = math.cos(angle), math.sin(angle)
                new = (x * cos - y * sin, x * sin + y * cos)
            else:
                r = (x.square() + y.square()).sqrt()
                new = (r * math.cos(angle), r * math.sin(angle))
                if method is tt.AAS:
                    new = (torch.where(x > 0, new[0], x), torch.where(x > 0, new[1], y))
            return h + (new[0] - x)[:, None] * b1 + (new[1] - y)[:, None] * b2

        edits = {site: steered for site in _named(steering)}
        logits = lm.logits(PROMPTS, steering=steering.at(degrees))
        for prompt, row in zip(PROMPTS, logits, strict=True):
            _, expected = reference(name, lm.model, _ids(prompt, chat=False), edits)
            assert relative(row, expected[-1]) < 1e-4


def test_zero_degrees_does_nothing_in_selective_steering_only() -> None:
    lm = _lm()
    base = lm.logits(PROMPTS)
    selective = tt.SS(theta=0, whole_blocks=False).fit(lm, CONTRAST)
    assert relative(lm.logits(PROMPTS, steering=selective), base) < 1e-5
    for method in (tt.SAS(), tt.AAS()):
        steering = method.fit(lm, CONTRAST)
        assert relative(lm.logits(PROMPTS, steering=steering), base) > 1e-3


# -- the artifact -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [tt.SAS(), tt.AAS(), tt.SS(whole_blocks=False)])
def test_the_description_has_the_plane_and_the_layers(method: Any, tmp_path: Path) -> None:
    steering = method.fit(_lm(), CONTRAST)
    for read in (steering, tt.Steering.load(steering.save(tmp_path / "a.safetensors"))):
        described = describe(read)
        plane, basis = described["plane"], _basis(read).double()
        assert set(plane) == {"source_site", "basis_norms", "basis_dot"}
        assert plane["source_site"] == steering.findings["source_site"]
        assert plane["basis_norms"] == pytest.approx([float(b.norm()) for b in basis], abs=1e-12)
        assert plane["basis_norms"] == pytest.approx([1, 1], abs=1e-6)
        assert plane["basis_dot"] == pytest.approx(0, abs=1e-6)
        assert described["layers"] == sorted({int(s.split(".")[1]) for s in _named(read)})
        assert described["method"] == method.name
        assert described["dial"]["unit"] == "°"
        assert plane["source_site"] in " ".join(explain(read))


def test_one_pass_serves_all_three() -> None:
    methods = [tt.SAS(candidates="output"), tt.AAS(), tt.SS(whole_blocks=False)]
    together = tt.fit(methods, _lm(), CONTRAST)
    for method, steering in zip(methods, together, strict=True):
        alone = method.fit(_lm(), CONTRAST)
        assert torch.equal(_basis(steering), _basis(alone))
        assert _named(steering) == _named(alone)


def test_positions_reach_the_interventions() -> None:
    for method in (tt.SAS(positions="prompt"), tt.SS(positions="prompt", whole_blocks=False)):
        steering = method.fit(_lm(), CONTRAST)
        assert list(map(str, steering.scopes)) == ["prompt"]


@pytest.mark.parametrize("method", [tt.SAS, tt.AAS, tt.SS])
def test_bad_options_are_refused(method: Any) -> None:
    for options in (
        {"candidates": "outputs"},
        {"selection": "longest"},
        {"positions": "some"},
        {"theta": math.nan},
        {"theta": math.inf},
    ):
        with pytest.raises(tt.TrimtabError, match=f"{method.name}: {next(iter(options))}"):
            method(**options)


def test_only_train_rows_make_the_plane() -> None:
    rows = [replace(row, part="train") for row in CONTRAST.rows]
    extra = Contrast.from_texts(["He did not know."], ["The wind was good!"]).rows
    parted = Contrast((*rows, *(replace(row, part="test") for row in extra)), "parted")
    steering = tt.SS(whole_blocks=False).fit(_lm(), parted)
    alone = tt.SS(whole_blocks=False).fit(_lm(), CONTRAST)
    assert torch.equal(_basis(steering), _basis(alone))
    assert steering.dial == alone.dial


# -- a real model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_plane_of_a_real_model_is_the_same_every_time(smollm2: Any) -> None:
    contrast = replace(CHAT, rows=(*CHAT.rows[:2], *CHAT.rows[-2:]))
    one, other = (tt.SS(whole_blocks=False).fit(smollm2, contrast) for _ in range(2))
    assert torch.equal(_basis(one), _basis(other))
    # Its template's last token is the same for all rows, and nothing is to be seen at it yet.
    assert one.findings["source_site"] != "layers.0.attn_norm"
    assert "layers.0.attn_norm" not in _named(one)
    assert one.dial == other.dial
