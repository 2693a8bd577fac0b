"""The trainer: steps, batches, budgets, checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

import trimtab as tt
from helpers import language_model, refused_in_one_line, traces
from seeing import seeing
from test_images_run import contrast as about_images
from training_by_hand import CONTRAST, PAIRS, log_p, plus
from trimtab.contrasts import Pair
from trimtab.methods.ssv import Likelihood
from trimtab.reading import log_odds
from trimtab.training import Training, texts_of, train
from trimtab.training.passes import Passes
from trimtab.training.trainer import _Trainer

SITE = "layers.1.resid"
#: Two rows are held out.
PARTS = tt.Contrast(
    tuple(Pair(*pair, part="validation" if i > 2 else "train") for i, pair in enumerate(PAIRS))
)
SETTINGS = Training(steps=8, batch=2, learning_rate=0.05, check_every=2)


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def vector_of(lm: tt.LanguageModel, positions: Any = "all") -> Likelihood:
    return Likelihood({SITE: lm.anatomy.hidden_size}, positions)


def learnt(lm: tt.LanguageModel, settings: Training = SETTINGS, **more: Any) -> Any:
    contrast = more.pop("contrast", PARTS)
    return train(lm, vector_of(lm), texts_of(lm, contrast), settings, **more)


def same(one: Any, other: Any) -> None:
    """To the bit, and in all that is told but the seconds."""
    assert one.parameters.keys() == other.parameters.keys()
    for name, tensor in one.parameters.items():
        assert torch.equal(tensor, other.parameters[name])
    assert {**one.findings, "seconds": 0} == {**other.findings, "seconds": 0}


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_steps_are_those_of_a_plain_loop(name: str) -> None:
    """One row in a step, so that the order of rows is all that is drawn."""
    lm = language_model(name)
    settings = Training(steps=5, batch=1, learning_rate=0.05)
    texts = texts_of(lm, CONTRAST)
    drawn = _Trainer(lm, vector_of(lm), texts, settings, None, None)
    order = [texts.rows.index(row) for step in range(5) for row in drawn._rows_of(step)]
    assert sorted(order) == list(range(5))
    v = torch.full((lm.anatomy.hidden_size,), 0.01, requires_grad=True)
    adam = torch.optim.AdamW([v], lr=0.05, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(adam, 0, 5)
    losses = []
    for row in order:
        found, tokens = log_p(lm, PAIRS[row], 0, plus(v))
        losses.append(-found / tokens)
        adam.zero_grad()
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_([v], 1.0)
        adam.step()
        schedule.step()
    made = train(lm, vector_of(lm), texts, settings)
    torch.testing.assert_close(made.parameters[SITE], v.detach(), rtol=1e-3, atol=1e-5)
    assert made.findings["loss"]["first"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert made.findings["loss"]["last"] == pytest.approx(losses[-1].item(), rel=1e-4)


def test_neither_padding_nor_parts_of_a_batch_change_a_step(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = learnt(lm, replace(SETTINGS, steps=3, batch=5), contrast=CONTRAST)
    monkeypatch.setattr(tt.LanguageModel, "batch_tokens", 1)  # every row by itself
    apart = learnt(lm, replace(SETTINGS, steps=3, batch=5), contrast=CONTRAST)
    for figure in ("first", "last"):
        one, other = together.findings["loss"][figure], apart.findings["loss"][figure]
        assert one == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(
        together.parameters[SITE], apart.parameters[SITE], rtol=1e-3, atol=1e-4
    )


def test_blocks_below_the_site_run_once_a_text(lm: tt.LanguageModel) -> None:
    lm = language_model("llama")
    below: list[bool] = []
    above: list[bool] = []
    blocks = lm.anatomy.blocks
    with torch.no_grad():
        passes = Passes(lm, vector_of(lm), ())  # what is asked of a model is asked
    handles = [
        block.mlp.register_forward_hook(lambda m, a, x, kept=kept: kept.append(x.requires_grad))
        for block, kept in ((blocks[1], below), (blocks[2], above))
    ]
    learnt(lm, replace(SETTINGS, steps=12))
    for handle in handles:
        handle.remove()
    assert passes.reference.numel() == 0
    assert len(below) <= len(texts_of(lm, PARTS).texts)
    assert not any(below)
    assert len(above) > 12
    assert any(above)


def test_the_model_is_left_as_it_was(lm: tt.LanguageModel) -> None:
    lm = language_model("llama")
    before = traces(lm.model)
    weights = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    with torch.inference_mode():  # from which trained numbers come out whole
        made = learnt(lm)
    assert not made.parameters[SITE].is_inference()
    assert traces(lm.model) == before
    for name, weight in lm.model.named_parameters():
        assert weight.requires_grad
        assert weight.grad is None
        assert torch.equal(weight, weights[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The model in its own type; what is learnt, and the loss, in float32."""
    exact = learnt(language_model("llama"))
    rounded = learnt(language_model("llama", dtype=dtype))
    vector = rounded.parameters[SITE]
    assert vector.dtype == torch.float32
    assert not torch.equal(vector, vector.to(dtype).float())
    first = exact.findings["loss"]["first"]
    assert rounded.findings["loss"]["first"] == pytest.approx(first, rel=0.01)
    cosine = torch.nn.functional.cosine_similarity(vector, exact.parameters[SITE], dim=0)
    assert cosine > 0.95


def test_logits_are_made_again_where_they_are_many(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learnt(lm)
    monkeypatch.setattr("trimtab.training.passes._LOGITS", 1)
    monkeypatch.setattr("trimtab.fitting.gradients.asks_for_memory", lambda *a: True)
    torch.testing.assert_close(learnt(lm).parameters[SITE], whole.parameters[SITE])


# -- how good it is ------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "all[1:]", "generated ~ 0.5"])
def test_the_gain_is_that_of_the_steering(lm: tt.LanguageModel, positions: str) -> None:
    """Trained under the very hook that it is attached by: log-odds say the same."""
    method = tt.SSV(layer=1, steps=4, learning_rate=0.1, positions=positions, patience=0, alpha=1)
    steering = method.fit(lm, PARTS)
    told = steering.findings["training"]
    gains = told["validation_gain"]
    held_out = PARTS.part("validation")
    gain = (log_odds(lm, held_out, steering) - log_odds(lm, held_out)).mean()
    assert float(gain) == pytest.approx(gains[str(told["best_step"])], abs=1e-4)
    assert max(gains.values()) == gains[str(told["best_step"])]
    assert told["validation_rows"] == 2


def test_texts_with_images(tmp_path: Path) -> None:
    lm, pairs = seeing(), about_images(tmp_path).pairs
    parts = [replace(row, part="train" if i else "validation") for i, row in enumerate(pairs)]
    steering = tt.BiPO(layer=1, steps=2, alpha=1).fit(lm, tt.Contrast(tuple(parts)))
    told = steering.findings["training"]
    held_out = tt.Contrast(tuple(parts[:1]))
    gain = (log_odds(lm, held_out, steering) - log_odds(lm, held_out)).mean()
    assert float(gain) == pytest.approx(told["validation_gain"][str(told["best_step"])], abs=1e-4)


def test_it_ends_when_the_gain_grows_no_more(lm: tt.LanguageModel) -> None:
    wild = replace(SETTINGS, steps=60, learning_rate=3.0, check_every=1, patience=2)
    made = learnt(lm, wild)
    told = made.findings
    steps = [int(step) for step in told["validation_gain"]]
    assert told["ended"] == "patience"
    assert told["steps"] == steps[-1] == told["best_step"] + 2 < 60
    # The numbers of the best step are those that a training of so many steps ends with.
    passes = Passes(lm, vector_of(lm), texts_of(lm, PARTS).texts)
    rows = texts_of(lm, PARTS).held_out
    with torch.no_grad():
        runs = [vector_of(lm).judged(text) for row in rows for text in row]
        outcome = passes.run(made.parameters, runs, len(rows), referring=True)
    gained = outcome.by_row(outcome.log_p - outcome.reference)
    best = told["validation_gain"][str(told["best_step"])]
    assert float((gained[:, 0] - gained[:, 1]).mean()) == pytest.approx(best, abs=1e-4)


def test_minutes_end_it(lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("trimtab.training.trainer.time.monotonic", lambda: next(clock))
    told = learnt(lm, replace(SETTINGS, steps=500, minutes=1)).findings
    assert told["ended"] == "minutes"
    assert told["steps"] < 10
    assert str(told["steps"]) in told["validation_gain"]


def test_without_validation_rows_the_last_step_counts(lm: tt.LanguageModel) -> None:
    told = learnt(lm, contrast=CONTRAST).findings
    assert told["validation_rows"] == 0
    assert "validation_gain" not in told
    assert told["ended"] == "steps"


def test_a_loss_that_is_not_finite() -> None:
    lm = language_model("gpt2")
    refused_in_one_line(
        lambda: learnt(lm, replace(SETTINGS, learning_rate=1e30)), "smaller learning rate"
    )


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.training.trainer._KEPT_EVERY", 0.0)


class _Stopped(BaseException):
    """As when a process is told to end."""


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Steps before which the training is broken off, once each."""
    steps: list[int] = []
    own = _Trainer._step

    def step(self: _Trainer) -> None:
        if self._standing.step in steps:
            steps.remove(self._standing.step)
            raise _Stopped
        own(self)

    monkeypatch.setattr(_Trainer, "_step", step)
    yield steps
    assert not steps


@pytest.mark.parametrize("method", [tt.SSV(layer=1, steps=7), tt.RePS(layer=1, steps=7, batch=2)])
@pytest.mark.usefixtures("kept_at_once")
def test_interrupted_is_uninterrupted(method: Any, tmp_path: Path, stopping: list[int]) -> None:
    """Also where models, and all that was kept in memory, are new."""
    method = replace(method, patience=6)
    whole = method.fit(language_model("llama"), PARTS)
    stopping += [3, 4, 6]
    for _ in range(3):
        with pytest.raises(_Stopped):
            method.fit(language_model("llama"), PARTS, cache=tmp_path)
    resumed = method.fit(language_model("llama"), PARTS, cache=tmp_path)
    vectors = [one.interventions[0].operator.vector for one in (whole, resumed)]
    assert torch.equal(*vectors)
    told = [{**one.findings["training"], "seconds": 0} for one in (whole, resumed)]
    assert told[0] == told[1]


def test_a_finished_training_is_read(lm: tt.LanguageModel, tmp_path: Path) -> None:
    first = learnt(lm, cache=tmp_path)
    seen: list[Tensor] = []
    handle = lm.anatomy.blocks[2].register_forward_hook(lambda m, a, x: seen.append(x))
    again = learnt(lm, cache=tmp_path)
    handle.remove()
    same(first, again)
    assert not seen
    # More minutes are no other training: what they ended goes on.
    ended = learnt(lm, replace(SETTINGS, minutes=1e-9), cache=tmp_path / "b")
    assert ended.findings["steps"] == 1
    assert learnt(lm, cache=tmp_path / "b").findings["steps"] == 8


def test_checkpoints_of_others_are_refused(lm: tt.LanguageModel, tmp_path: Path) -> None:
    learnt(lm, cache=tmp_path)
    (kept,) = tmp_path.rglob("state.safetensors")
    others = {
        "settings": (lm, replace(SETTINGS, seed=1), PARTS),
        "another model": (language_model("llama", seed=1), SETTINGS, PARTS),
        "another contrast": (lm, SETTINGS, CONTRAST),
    }
    for what, (model, settings, contrast) in others.items():
        # A room of its own for each; what lies in the wrong one is not taken for its own.
        learnt(model, settings, contrast=contrast, cache=tmp_path / what)
        (own,) = (tmp_path / what).rglob("state.safetensors")
        assert own.parent.name != kept.parent.name
        shutil.copy(kept, own)
        refused_in_one_line(
            lambda model=model, settings=settings, contrast=contrast, what=what: learnt(
                model, settings, contrast=contrast, cache=tmp_path / what
            ),
            "of other settings, another model or another contrast",
        )
    kept.write_bytes(kept.read_bytes()[:100])
    refused_in_one_line(lambda: learnt(lm, cache=tmp_path), "no checkpoint of a training")


def test_a_steered_model_keeps_nothing(lm: tt.LanguageModel, tmp_path: Path) -> None:
    steering = tt.CAA(layer=0, alpha=1).fit(lm, CONTRAST)
    with lm.steered(steering):
        refused_in_one_line(lambda: learnt(lm, cache=tmp_path), "leave the cache out")
