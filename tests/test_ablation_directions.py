"""What ablation takes out beside one mean difference: projected, winsorised, interpolated, several
directions, kernels over depth. Everything is computed again from transformers' hidden states."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from ablations import (
    CHAT,
    NEGATIVE,
    PAIRS,
    POSITIVE,
    difference_of,
    direction_of,
    hidden,
    ids_of,
    logits_of,
    named,
    parted,
    sides,
    targets_of,
    tiny_lm,
    writers,
)
from adapters import peft_model
from helpers import IDS, language_model, plain_logits, relative, token_ids
from trimtab.contrasts import Contrast
from trimtab.methods.ablation_directions import (
    Winsorised,
    centroids_of,
    cleaned,
    operators_of,
    outside,
)
from trimtab.methods.contents import describe, explain
from trimtab.methods.kernels import Kernel
from trimtab.methods.som import neurons

TEXTS = parted(Contrast.from_texts(POSITIVE, NEGATIVE, "texts"))
KERNELS: dict[str, Any] = dict(
    attn_max=1.2, attn_position=1.5, attn_min=0.25, attn_distance=1.5,
    ffn_max=0.8, ffn_position=2, ffn_min=0.5, ffn_distance=1,
)  # fmt: skip
NAME = "llama"


def states(contrast: Contrast, layer: int, token: int = -1) -> tuple[Tensor, Tensor]:
    """Both sides' activations at a block's input, [texts, units] each."""
    positive, negative = (
        torch.stack([hidden(NAME, ids)[layer, token] for ids in side]) for side in sides(contrast)
    )
    return positive, negative


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def basis_of(steering: tt.Steering) -> Tensor:
    operators: list[Any] = [each.operator for each in steering.interventions]
    assert all(torch.equal(each.direction, operators[0].direction) for each in operators)
    return operators[0].direction.double()


def projector(rows: Tensor) -> Tensor:
    q = torch.linalg.qr(rows.double().T).Q
    return q @ q.T


# -- projected --------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [TEXTS, PAIRS, CHAT], ids=lambda each: each.name)
def test_a_projected_direction_leaves_the_negative_mean_alone(contrast: Contrast) -> None:
    steering = tt.Ablation(layer=2, project="negative").fit(tiny_lm(NAME), contrast)
    r, mean = direction_of(steering).double(), states(contrast.train, 2)[1].mean(0)
    delta, g = unit(difference_of(NAME, contrast.train, 2, -1)), unit(mean)
    assert relative(r, unit(delta - (g @ delta) * g)) < 1e-4
    assert abs(float(unit(mean) @ r)) < 1e-4
    plain = direction_of(tt.Ablation(layer=2).fit(tiny_lm(NAME), contrast)).double()
    assert abs(float(unit(mean) @ plain)) > 1e-3  # which the plain one does not
    assert "left as it is" in " ".join(explain(steering))


def test_biprojected_is_also_outside_the_mean_of_each_block_that_is_edited() -> None:
    steering = tt.Ablation(layer=1, project="biprojected").fit(tiny_lm(NAME), TEXTS)
    assert named(steering) == writers(NAME)
    read = states(TEXTS.train, 1)[1].mean(0)
    seen = set()
    for each in steering.interventions:
        operator: Any = each.operator
        r = operator.direction.double()
        block = None if each.site == "embed" else int(each.site.split(".")[1])
        if block is not None and block + 1 >= tiny_lm(NAME).anatomy.layers:
            continue  # transformers' last hidden state is behind the last norm
        edited = states(TEXTS.train, 0 if block is None else block + 1)[1].mean(0)
        for mean in (read, edited):
            assert abs(float(unit(mean) @ r)) < 1e-4
        seen.add(tuple(r.tolist()))
    assert len(seen) == 3  # the embedding's, and those of two blocks


def test_taking_out_several_others_that_are_alike_takes_them_out_once() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(outside(x[:1], [x[1], x[1] * 3]), outside(x[:1], [x[1]]))
    with pytest.raises(tt.TrimtabError, match="leave project out"):
        outside(x[:1], [x[0]])


# -- cleaned ----------------------------------------------------------------------------------

SPARED = ["A cat sat on the mat", "Two and two are four", "The train left at noon"]


def spared_file(path: Path) -> str:
    file = path / "spared.txt"
    file.write_text("\n".join(SPARED), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("ridge", [1e-9, 0.1, 1.0, 1e9])
def test_a_cleaned_direction_by_the_spectrum_of_the_texts_to_spare(
    tmp_path: Path, ridge: float
) -> None:
    """As many groups as texts, so that the centroids are the texts; the ridge along each of their
    singular vectors."""
    options: dict[str, Any] = {"spare": spared_file(tmp_path), "spare_groups": 3}
    steering = tt.Ablation(layer=2, **options, spare_ridge=ridge).fit(tiny_lm(NAME), TEXTS)
    texts = torch.stack([hidden(NAME, token_ids(text))[2, -1] for text in SPARED]).double()
    centroids = torch.stack([unit(each) for each in texts])
    delta = unit(difference_of(NAME, TEXTS.train, 2, -1)).double()
    _, sizes, vectors = torch.linalg.svd(centroids, full_matrices=False)
    rest = delta.clone()
    for size, vector in zip(sizes, vectors, strict=True):
        rest -= size**2 / (size**2 + ridge) * (vector @ delta) * vector
    r = direction_of(steering).double()
    assert relative(r, unit(rest)) < 1e-4
    along = (centroids @ r).abs().max()
    if ridge < 1e-6:
        assert along < 1e-4
    if ridge > 1e6:
        assert relative(r, delta) < 1e-4
        assert along > 1e-3
    assert steering.findings["spared"]["texts"] == 3
    assert "3 groups of other texts" in " ".join(explain(steering))


def test_groups_of_texts_to_spare_are_those_that_are_alike() -> None:
    noise = torch.randn(20, 6, generator=torch.Generator().manual_seed(3)).double()
    middles = torch.eye(6).double()[[0, 2]] * 5
    texts = torch.cat([middles[i % 2][None] + 0.01 * noise[i][None] for i in range(20)])
    found = centroids_of(texts, 2, seed=0)
    wanted = torch.stack([unit(texts[i::2].mean(0)) for i in range(2)])
    order = (found @ wanted.T).argmax(0)
    assert torch.allclose(found[order], wanted)
    assert torch.equal(found, centroids_of(texts, 2, seed=0))
    with pytest.raises(tt.TrimtabError, match="5 groups of texts to spare are asked for, and 2"):
        centroids_of(texts[[0, 1, 0, 1, 0]], 5, seed=0)
    with pytest.raises(tt.TrimtabError, match="raise spare_ridge"):
        cleaned(middles[:1] / 5, middles[:1] / 5, 1e-9)


def test_a_projected_direction_is_outside_the_negative_mean_though_it_is_cleaned(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"spare": spared_file(tmp_path), "spare_groups": 2}
    steering = tt.Ablation(layer=2, project="negative", **options).fit(tiny_lm(NAME), TEXTS)
    mean = states(TEXTS.train, 2)[1].mean(0)
    assert abs(float(unit(mean) @ direction_of(steering).double())) < 1e-4
    several = tt.Ablation(layer=2, directions=2, **options).fit(tiny_lm(NAME), TEXTS)
    assert basis_of(several).shape == (2, 48)


# -- winsorised -------------------------------------------------------------------------------


def test_winsorised_means_clip_each_text_by_its_own_units() -> None:
    q = 0.9
    steering = tt.Ablation(layer=2, winsorise=q).fit(tiny_lm(NAME), TEXTS)
    means = []
    for side in states(TEXTS.train, 2):
        limit = torch.stack([row.abs().quantile(q) for row in side])[:, None]
        means.append(side.clamp(-limit, limit).mean(0))
    assert relative(direction_of(steering), unit(means[0] - means[1])) < 1e-4
    plain = tt.Ablation(layer=2).fit(tiny_lm(NAME), TEXTS)
    assert relative(direction_of(steering), direction_of(plain)) > 1e-3
    same = tt.Ablation(layer=2, winsorise=1.0).fit(tiny_lm(NAME), TEXTS)
    assert torch.equal(direction_of(same), direction_of(plain))


def test_winsorising_at_one_is_nothing_and_units_may_be_permuted() -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(Winsorised(1.0)(x), x)
    assert torch.equal(Winsorised(0.8)(x[:, order]), Winsorised(0.8)(x)[:, order])


# -- between layers, and each its own -----------------------------------------------------------


def test_an_index_between_two_layers_is_between_their_directions() -> None:
    lm = tiny_lm(NAME)
    low, high = (direction_of(tt.Ablation(layer=n).fit(lm, TEXTS)).double() for n in (1, 2))
    steering = tt.Ablation(layer=1.25).fit(lm, TEXTS)
    assert relative(direction_of(steering), unit(0.75 * low + 0.25 * high)) < 1e-5
    assert steering.findings["source_site"] == "layers.0.resid and layers.1.resid"
    whole = tt.Ablation(layer=1.0).fit(lm, TEXTS)
    assert torch.equal(direction_of(whole), low.float())
    assert whole.hyperparameters["layer"] == 1
    for layer in (-0.5, 2.5):
        with pytest.raises(tt.TrimtabError, match="out of range"):
            tt.Ablation(layer=layer).fit(lm, TEXTS)


def test_each_block_may_have_its_own_direction() -> None:
    steering = tt.Ablation(per_layer=True).fit(tiny_lm(NAME), TEXTS)
    assert named(steering) == writers(NAME)[1:]  # the embedding has none of its own
    for each in steering.interventions[:4]:
        operator: Any = each.operator
        expected = difference_of(NAME, TEXTS.train, int(each.site.split(".")[1]) + 1, -1)
        assert relative(operator.direction, unit(expected)) < 1e-4


# -- several directions -----------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [TEXTS, PAIRS], ids=lambda each: each.name)
def test_several_directions_are_the_span_that_holds_most_of_the_differences(
    contrast: Contrast,
) -> None:
    """Nothing of the size of k rows holds more: by the eigenvectors of the second moment."""
    lm = tiny_lm(NAME)
    positive, negative = states(contrast.train, 2)
    m = positive - (negative if contrast.paired else negative.mean(0))
    expected = torch.linalg.eigh(m.T @ m).eigenvectors[:, -3:].T
    steering = tt.Ablation(layer=2, directions=3).fit(lm, contrast)
    assert relative(projector(basis_of(steering)), projector(expected)) < 0.02  # read in half
    assert describe(steering)["interventions"][0]["directions"] == 3
    prompt, rows = "She looked at the map", basis_of(steering)
    edits = {site: lambda x: x - x @ rows.T @ rows for site in writers(NAME)}
    found = lm.logits([prompt], steering=steering)[0]
    assert relative(found, logits_of(NAME, ids_of(prompt), edits)[-1]) < 1e-4
    with lm.steered(steering):
        assert float((hidden(NAME, ids_of(prompt)) @ rows.T).abs().max()) < 1e-4
    assert len(explain(steering)[0].split("3 directions")) == 2


def test_any_basis_of_a_span_is_the_same_map_and_twice_is_once() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 32, generator=generator, dtype=torch.float64)
    mixed = torch.randn(3, 3, generator=generator, dtype=torch.float64) @ rows
    x = torch.randn(7, 32, generator=generator, dtype=torch.float64)
    (one,), (other,) = (operators_of(each, compose=False) for each in (rows, mixed))
    once = one.linear_part(x, 1.0)
    assert torch.allclose(once, other.linear_part(x, 1.0), atol=1e-5)
    assert torch.allclose(one.linear_part(once, 1.0), once, atol=1e-6)
    assert float((once @ rows.T).abs().max()) < 1e-5
    (single,) = operators_of(unit(rows[:1]), compose=False)
    assert torch.equal(single.direction, unit(rows[:1])[0].float())
    with pytest.raises(tt.TrimtabError, match="lies in the span"):
        operators_of(torch.stack((rows[0], rows[1], rows[0] + rows[1])), compose=False)


def test_one_after_the_other_leaves_some_and_less_each_time() -> None:
    """Four directions of mean cosine .82: about half of a unit along the others is left, and less
    when what is left goes through again."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(64, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    rows = torch.stack([unit(shared + 0.47 * each) for each in noise])
    cosines = (rows @ rows.T)[~torch.eye(4, dtype=torch.bool)]
    assert float(cosines.mean()) == pytest.approx(0.82, abs=0.03)
    operators = operators_of(rows, compose=True)
    map_of = torch.eye(64, dtype=torch.float64)
    for operator in operators:  # in the order in which a site has them
        map_of = operator.linear_part(map_of, 1.0)
    by_hand = torch.eye(64, dtype=torch.float64)
    for row in rows:  # the first one's map is the outermost
        by_hand = by_hand @ (torch.eye(64, dtype=torch.float64) - torch.outer(row, row))
    assert torch.allclose(map_of.T, by_hand, atol=1e-6)
    whole = torch.eye(64, dtype=torch.float64) - projector(rows)
    left = [
        float(torch.linalg.matrix_norm(torch.linalg.matrix_power(by_hand, n) - whole, 2))
        for n in (1, 2, 4, 8, 16)
    ]
    assert left[0] > 0.5
    assert all(a > b for a, b in itertools.pairwise(left))
    assert left[-1] < 0.2 * left[0]
    along = (by_hand @ rows.T).T @ rows.T  # what is left of each row along each
    assert float(along[:, 0].abs().max()) < 1e-9  # of the outermost nothing is
    assert float(along[:, 1:].abs().max()) > 0.2


def test_composed_directions_are_interventions_one_after_the_other() -> None:
    lm, prompt = tiny_lm(NAME), "Today I feel sad because of the rain"
    method = tt.Ablation(layer=2, directions=3, basis="som", compose=True)
    steering = method.fit(lm, TEXTS)
    assert named(steering) == [site for site in writers(NAME) for _ in range(3)]
    operators: list[Any] = [each.operator for each in steering.interventions[:3]]
    rows = [operator.direction.double() for operator in operators]

    def edit(x: Tensor) -> Tensor:
        for r in rows:
            x = x - torch.outer(x @ r, r)
        return x

    expected = logits_of(NAME, ids_of(prompt), dict.fromkeys(writers(NAME), edit))[-1]
    assert relative(lm.logits([prompt], steering=steering)[0], expected) < 1e-4
    assert relative(tt.bake(lm, steering).logits([prompt])[0], expected) < 1e-4


def test_a_map_has_its_neurons_where_texts_are() -> None:
    """Three far groups of texts: neurons that texts are nearest to are their means, by k-means of
    ten lines' worth of thought."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(3, 16, generator=generator, dtype=torch.float64)
    which = torch.arange(60) % 3
    texts = centres[which] + 0.01 * torch.randn(60, 16, generator=generator)
    found, hits = neurons(texts)
    assert int(hits.sum()) == 60
    for centre in centres:
        nearest = found[hits > 0].sub(centre).norm(dim=-1).min()
        assert float(nearest) < 0.1
    assert torch.equal(neurons(texts)[0], found)
    assert not torch.equal(neurons(texts, seed=1)[0], found)


# -- kernels ----------------------------------------------------------------------------------


def test_a_kernel_is_a_triangle_over_depth() -> None:
    kernel = Kernel(max=1.2, position=4, min=0.25, distance=2)
    assert [kernel.weight(layer) for layer in range(1, 8)] == pytest.approx(
        [0, 0.3, 0.75, 1.2, 0.75, 0.3, 0]
    )
    assert [Kernel(1.0, 2, 0.5, 0).weight(layer) for layer in range(4)] == [0, 0, 1, 0]
    assert Kernel(-0.2, 2, 1.0, 3).weight(2) == 0


def test_kernels_weigh_blocks_hooked_baked_and_as_an_adapter(tmp_path: Path) -> None:
    lm = language_model(NAME, dtype=torch.float64)
    for more in ({}, {"directions": 2}):
        steering = tt.Ablation(layer=2, **more, **KERNELS).fit(lm, TEXTS)
        weights = {each.site: each.weight for each in steering.interventions}
        assert weights == pytest.approx(
            {  # by hand: max (1 + |l - position| / distance (min - 1))
                "layers.0.attn_out": 1.2 * 0.25,
                "layers.1.attn_out": 1.2 * (1 - 0.75 / 3),
                "layers.2.attn_out": 1.2 * (1 - 0.75 / 3),
                "layers.1.ffn_out": 0.4,
                "layers.2.ffn_out": 0.8,
            }
        )
        rows = basis_of(steering).reshape(-1, lm.anatomy.hidden_size)

        def edit(weight: float, rows: Tensor = rows) -> Any:
            return lambda x: x - 0.9 * weight * x @ rows.T @ rows

        expected = logits_of(NAME, IDS, {site: edit(w) for site, w in weights.items()})
        with lm.steered(steering.at(0.9)):
            assert relative(plain_logits(lm.model, IDS), expected) < 1e-6
        baked = tt.bake(lm, steering.at(0.9))
        assert relative(plain_logits(baked.model, IDS), expected) < 1e-6
        folder = tmp_path / f"lora-{len(rows)}"
        tt.export(lm, steering.at(0.9), "lora", folder, precision="float64")
        adapted = peft_model(NAME, folder, dtype=torch.float64)
        assert relative(plain_logits(adapted, IDS), expected) < 1e-6


def test_a_kernel_may_hit_one_layer_and_none_is_refused() -> None:
    one = dict(attn_max=1, attn_position=1, attn_min=0, attn_distance=0)
    none = dict(ffn_max=0, ffn_position=1, ffn_min=0, ffn_distance=3)
    steering = tt.Ablation(layer=2, **one, **none).fit(tiny_lm(NAME), TEXTS)
    assert named(steering) == ["layers.1.attn_out"]
    assert steering.interventions[0].weight == 1
    beside = dict(one, attn_position=1.5)
    with pytest.raises(tt.TrimtabError, match="every block's weight is 0"):
        tt.Ablation(layer=2, **beside, **none).fit(tiny_lm(NAME), TEXTS)
    words = explain(tt.Ablation(layer=2, **KERNELS).fit(tiny_lm(NAME), TEXTS))[0]
    assert "0.30 to 0.90 of it, by block" in words


def test_the_choice_on_validation_rows_takes_all_of_it() -> None:
    options: Any = {"project": "negative", "winsorise": 0.95, "directions": 2}
    method = tt.Ablation(targets=targets_of(NAME), tokens=(-5,), kl=1e9, depth=1, **options)
    steering = method.fit(tiny_lm(NAME), CHAT)
    assert basis_of(steering).shape == (2, 48)
    chosen = steering.findings["chosen"]
    assert math.isfinite(chosen["score"])
    again = tt.Ablation(layer=chosen["layer"], tokens=(-5,), **options).fit(tiny_lm(NAME), CHAT)
    assert torch.equal(basis_of(again), basis_of(steering))


def test_what_does_not_go_together_is_refused() -> None:
    for options, message in (
        ({"layer": 1.5, "directions": 2}, "one direction, not several"),
        ({"layer": math.nan}, "finite"),
        ({"per_layer": True, "layer": 1}, "per_layer takes no layer"),
        ({"compose": True}, "for several directions"),
        ({"basis": "som"}, "for several directions"),
        ({"directions": 0}, "1 or more"),
        ({"winsorise": 0.0}, "above 0"),
        ({"spare_groups": 3}, "are for texts to spare"),
        ({"spare": "builtin:facts", "spare_ridge": 0.0}, "above 0"),
        ({"project": "both"}, "project is 'both'"),
        ({"attn_max": 1.0}, "a kernel needs attn_position too"),
        ({"where": "norms", "per_layer": True}, "where = writers"),
        ({"where": "layer", "project": "biprojected"}, "where = writers"),
        ({"where": "layer", **KERNELS}, "where = writers"),
        ({**KERNELS, "ffn_min": 1.5}, "between 0 and 1"),
        ({**KERNELS, "ffn_distance": -1.0}, "number of blocks"),
    ):
        with pytest.raises(tt.TrimtabError, match=message):
            tt.Ablation(**options)  # type: ignore[arg-type]
    with pytest.raises(tt.TrimtabError, match="ask for fewer"):
        tt.Ablation(layer=2, directions=30).fit(tiny_lm(NAME), TEXTS)
    with pytest.raises(tt.TrimtabError, match="do not differ at block 0"):
        tt.Ablation(layer=0, directions=2).fit(tiny_lm(NAME), CHAT)
