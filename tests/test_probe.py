"""Probes: readers by plain loops and scikit-learn, what they do not depend on, lengths, bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

import trimtab as tt
from helpers import language_model, refused_in_one_line, relative
from method_settings import PAIRED, UNPAIRED
from trimtab.contrasts import Pair
from trimtab.figures import auroc_interval
from trimtab.methods import explain
from trimtab.methods.readers import Settings, direction_of, reader_of
from trimtab.steering import Ablate, Add, Clamp

ESTIMATORS = ("logistic", "lda", "lat", "mean")


def draw(rows: int, units: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations of texts that differ along some units, with correlated noise; the positive first
    of each pair."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, units, generator=generator, dtype=torch.float64)
    mix = torch.randn(units, units, generator=generator, dtype=torch.float64)
    positive = torch.arange(rows) % 2 == 0
    shift = torch.where(positive[:, None], 1.0, -1.0) * torch.linspace(-1, 1, units).double()
    return noise @ mix + shift, positive


def answers(lm: Any, contrast: Any, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean stream after a block over each side's answer, one text at a time."""
    rows, labels = [], []
    for pair in contrast.rows:
        assert isinstance(pair, Pair)
        start = len(lm.tokenizer(pair.prompt)["input_ids"])
        for side, label in ((pair.positive, True), (pair.negative, False)):
            ids = torch.tensor([lm.tokenizer(pair.prompt + side)["input_ids"]])
            seen: list[Tensor] = []
            hook = lm.model.model.layers[layer].register_forward_hook(
                lambda block, given, out, to=seen: to.append(out[0])
            )
            with torch.no_grad():
                lm.model(ids)
            hook.remove()
            rows.append(seen[0][start:].double().mean(0).numpy())
            labels.append(label)
    return np.stack(rows), np.array(labels)


def cosine(a: Any, b: Any) -> float:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float(a @ b / (a.norm() * b.norm()))


# -- estimators on numbers ------------------------------------------------------------------------


def test_discriminants_do_not_depend_on_coordinates_and_are_those_of_scikit_learn() -> None:
    x, positive = draw(80, 10)
    generator = torch.Generator().manual_seed(1)
    turn = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    move = torch.randn(10, generator=generator, dtype=torch.float64)
    plain = Settings(shrinkage=0.0)
    here = reader_of("lda", x, positive, plain).scores(x)
    there = x @ turn + move
    assert torch.allclose(reader_of("lda", there, positive, plain).scores(there), here, atol=1e-8)
    whole = LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy(), positive.numpy())
    assert np.allclose(whole.decision_function(x.numpy()), here.numpy(), atol=1e-8)


@pytest.mark.parametrize("rows", [16, 90])
def test_shrunk_discriminants_are_those_of_scikit_learn(rows: int) -> None:
    """In units of the spread within the sides; with fewer texts than units by another way."""
    x, positive = draw(rows, 40)
    within = x - torch.where(positive[:, None], x[positive].mean(0), x[~positive].mean(0))
    spread = within.square().mean(0).sqrt()
    found = reader_of("lda", x, positive, Settings(shrinkage=0.3))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3)
    theirs.fit((x / spread).numpy(), positive.numpy())
    assert np.allclose(found.direction * spread, theirs.coef_[0])
    assert np.allclose(found.bias, theirs.intercept_)
    automatic = reader_of("lda", x, positive, Settings())
    assert torch.isfinite(automatic.direction).all()
    full = reader_of("lda", x, positive, Settings(shrinkage=1.0))
    means = x[positive].mean(0) - x[~positive].mean(0)
    assert torch.allclose(full.direction, means / spread.square())


def test_a_discriminant_reads_better_than_the_difference_of_means() -> None:
    x, positive = draw(400, 12)
    apart = {}
    for estimator in ("lda", "mean"):
        scores = reader_of(estimator, x, positive, Settings()).scores(x)  # type: ignore[arg-type]
        a, b = scores[positive], scores[~positive]
        apart[estimator] = float((a.mean() - b.mean()) / ((a.var() + b.var()) / 2).sqrt())
    assert apart["lda"] > 1.5 * apart["mean"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_swapped_labels_negate(estimator: Any) -> None:
    x, positive = draw(60, 8)
    own, other = (reader_of(estimator, x, p, Settings()) for p in (positive, ~positive))
    assert torch.allclose(own.direction, -other.direction, atol=1e-4)
    assert own.bias == pytest.approx(-other.bias, abs=1e-4)
    assert cosine(*(direction_of(estimator, x, p, Settings()) for p in (positive, ~positive))) < 0


def test_differences_without_random_signs_lose_their_own_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.arange(200) % 2 == 0
    x = 0.3 * torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x[positive, 0] += 1  # what tells the sides apart
    x[:, 1] += torch.randn(200, generator=generator, dtype=torch.float64)  # what varies most
    axis = torch.eye(6, dtype=torch.float64)[0]
    x[:, 1] *= 0.5
    assert cosine(direction_of("lat", x, positive, Settings()), axis) > 0.9
    differences = (x[positive] - x[~positive]).numpy()
    _, _, v = np.linalg.svd(differences - differences.mean(0))
    assert abs(v[0][0]) < 0.3, "centred as they are"


def test_the_interval_of_an_auroc() -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.arange(60) < 25
    scores = torch.randn(60, generator=generator) + positive
    scores[:3] = scores[-3:]  # ties
    found = auroc_interval(scores, positive)
    assert found.value == pytest.approx(roc_auc_score(positive.numpy(), scores.numpy()))
    assert found.n == 60
    for end in found.ci95:  # where what was seen is 1.96 standard errors away
        q1, q2, more = end / (2 - end), 2 * end**2 / (1 + end), (25 + 35) / 2 - 1
        variance = (end * (1 - end) + more * (q1 - end**2 + q2 - end**2)) / (25 * 35)
        assert abs(found.value - end) == pytest.approx(1.96 * variance**0.5, rel=1e-4)
    assert 0.8 < auroc_interval(positive.double(), positive).low < 1
    assert auroc_interval(-positive.double(), positive).value == 0


# -- on a model -----------------------------------------------------------------------------------


def test_a_logistic_reader_is_a_plain_regression_on_plain_activations(tmp_path: Path) -> None:
    lm = language_model("llama")
    steering = tt.Probe(layer=1, read="logistic", l2=4).fit(lm, PAIRED)
    x, positive = answers(lm, PAIRED.train, 1)
    mean, spread = x.mean(0), x.std(0)
    plain = LogisticRegression(C=0.25, max_iter=2000).fit((x - mean) / spread, positive)
    expected = plain.decision_function((x - mean) / spread)
    steering.save(tmp_path / "probe.safetensors")
    condition = tt.Steering.load(tmp_path / "probe.safetensors").condition()
    assert (condition.site, condition.score) == ("layers.1.resid", "probe")
    assert np.allclose(condition.scores(torch.from_numpy(x)).numpy(), expected, atol=5e-3)
    # The writer is that of CAA.
    (one,), (other,) = (
        each.fit(lm, PAIRED).interventions for each in (tt.Probe(layer=1), tt.CAA(layer=1))
    )
    assert isinstance(one.operator, Add)
    assert relative(one.operator.vector, other.operator.added) < 2e-3
    assert steering.tables["writer.layers.1.resid"].equal(steering.interventions[0].operator.vector)  # type: ignore[attr-defined]


def test_the_block_is_chosen_by_auroc_and_figures_are_counted() -> None:
    lm = language_model("llama")
    steering = tt.Probe(read="mean").fit(lm, PAIRED)
    aurocs, apart = [], []
    for layer in range(3):
        x, positive = answers(lm, PAIRED.train, layer)
        m = x[positive].mean(0) - x[~positive].mean(0)
        held, labels = answers(lm, PAIRED.part("validation"), layer)
        aurocs.append(round(roc_auc_score(labels, held @ m), 9))
        a, b = held[labels] @ m, held[~labels] @ m
        apart.append(abs(a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2))
    best = max(range(3), key=lambda layer: (aurocs[layer], apart[layer]))
    site = f"layers.{best}.resid"
    assert [each.site for each in steering.interventions] == [site]
    assert steering.findings["site"] == site
    assert list(steering.findings["auroc"].values()) == pytest.approx(aurocs)
    said = steering.findings["probe"][site]
    assert said["auroc"]["value"] == pytest.approx(aurocs[best])
    held, labels = answers(lm, PAIRED.part("validation"), best)
    right = (steering.condition().scores(torch.from_numpy(held)).numpy() > 0) == labels
    assert said["accuracy"]["value"] == pytest.approx(right.mean())
    assert said["accuracy"]["n"] == 6
    low, high = said["accuracy"]["ci95"]
    assert low < said["accuracy"]["value"] < high or low == 0 or high == 1
    assert f"{100 * right.mean():.0f} %" in " ".join(explain(steering))


def test_the_axis_of_differences_is_that_of_caa_where_it_is_not_centred() -> None:
    lm = language_model("llama")
    lat = tt.Probe(layer=(0, 2), steer="lat", centred=False).fit(lm, PAIRED)
    pca = tt.CAA(layer=(0, 2), variant="pca").fit(lm, PAIRED)
    for one, other in zip(lat.interventions, pca.interventions, strict=True):
        assert cosine(one.operator.added, other.operator.added) > 0.9999
        assert float(one.operator.added.norm()) == pytest.approx(  # type: ignore[union-attr]
            float(other.operator.added.norm()),
            rel=1e-2,  # type: ignore[union-attr]
        )


@pytest.mark.parametrize("bound", ["floor", "ceiling", "both"])
def test_bounds_are_quantiles_and_lengths_spreads(bound: Any) -> None:
    lm = language_model("llama")
    made = tt.Probe(layer=1, operator="clamp", bound=bound, quantile=0.3).fit(lm, PAIRED)
    x, positive = answers(lm, PAIRED.train, 1)
    m = x[positive].mean(0) - x[~positive].mean(0)
    along = x @ m / np.linalg.norm(m)
    clamp = made.interventions[0].operator
    assert isinstance(clamp, Clamp)
    low, high = np.quantile(along[positive], 0.3), np.quantile(along[positive], 0.7)
    expected = {
        "floor": (low, None),
        "ceiling": (None, np.quantile(along[~positive], 0.7)),
        "both": (low, high),
    }[bound]
    for found, wanted in zip((clamp.low, clamp.high), expected, strict=True):
        assert found == (None if wanted is None else pytest.approx(wanted, abs=5e-3))
    assert (made.dial.default, made.dial.range) == (1.0, (0.0, 1.0))
    added = tt.Probe(layer=1, length="sigma").fit(lm, PAIRED).interventions[0].operator.added
    assert added is not None
    assert float(added.norm()) == pytest.approx(along.std(), rel=1e-2)


def test_a_reader_gates_what_a_writer_does() -> None:
    """Where the logit is below 0, the steering acts; where it is above, nothing is changed."""
    lm = language_model("llama")
    steering = tt.Probe(layer=1, read="mean").fit(lm, PAIRED).at(3)
    gate = tt.Gate((steering.condition(fires="below"),))
    texts = [pair.prompt + pair.positive for pair in PAIRED.pairs]
    scores = [
        steering.condition().scores(
            lm.model(
                torch.tensor([lm.tokenizer(text)["input_ids"]]), output_hidden_states=True
            ).hidden_states[2][0]
        )
        for text in texts
    ]
    plain, gated = lm.logits(texts), lm.logits(texts, steering=steering.gated(gate))
    for score, one, other in zip(scores, plain, gated, strict=True):
        assert bool((score < 0).any()) == (relative(other, one) > 1e-6)


def test_directions_of_other_steerings_as_conditions() -> None:
    lm = language_model("llama")
    caa = tt.CAA(layer=1).fit(lm, PAIRED)
    assert torch.equal(caa.condition().direction, caa.interventions[0].operator.added)  # type: ignore[arg-type]
    ablation = tt.Ablation(layer=2).fit(lm, PAIRED)
    operator = ablation.interventions[0].operator
    assert isinstance(operator, Ablate)
    condition = ablation.condition()
    assert condition.site == "layers.1.resid"  # the input of block 2, where it was read
    assert torch.equal(condition.direction, operator.direction)
    assert tt.SS(theta=30, whole_blocks=False).fit(lm, PAIRED).condition().site
    for steering, site, says in (
        (tt.CAA(layer=(0, 1)).fit(lm, PAIRED), None, "name a site, one of layers.0.resid"),
        (caa, "layers.0.resid", "no direction at layers.0.resid"),
        (tt.AUSteer(k=4).fit(lm, PAIRED), None, "it has none"),
    ):
        refused_in_one_line(lambda one=steering, at=site: one.condition(at), says)


def test_mistakes() -> None:
    lm = language_model("llama")
    whole = tt.Contrast.from_pairs([("Today I feel", " happy.", " sad."), ("It is", " so", " no")])
    for make, contrast, says in (
        (lambda: tt.Probe(), whole, "chooses on validation rows"),
        (lambda: tt.Probe(layer=()), PAIRED, "layer is empty"),
        (lambda: tt.Probe(read="svm"), PAIRED, "known are logistic, lda, lat, mean"),
        (lambda: tt.Probe(bound="both", quantile=0.5), PAIRED, "below 0.5"),
        (lambda: tt.Probe(layer=1, shrinkage=0.0), PAIRED, "leave shrinkage out"),
        (lambda: tt.Probe(layer=1, shrinkage=1.5), PAIRED, "between 0 and 1"),
        (lambda: tt.Probe(layer=1, l2=0), PAIRED, "above 0"),
        (lambda: tt.Probe(layer=9), PAIRED, "9"),
        (lambda: tt.Probe(layer=1, token="answer"), UNPAIRED, "unpaired"),
        (lambda: tt.Probe(layer=1, steer="lat"), whole.take(1), "give it more"),
    ):
        refused_in_one_line(lambda m=make, c=contrast: m().fit(lm, c), says)  # type: ignore[misc]
