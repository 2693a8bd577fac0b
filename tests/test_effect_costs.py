"""What units cost on plain text: the Fisher information, by every token of the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import trimtab as tt
from effects_by_hand import fresh, known
from helpers import refused_in_one_line, relative, steer, steer_at, token_ids
from stored_passes import watched
from trimtab.anatomy import hooked
from trimtab.fitting import Costs, predicted_kl, unit_costs
from trimtab.fitting import costs as module
from trimtab.steering import Scale

F32 = torch.float32
TEXTS = [
    "The ship left the harbour in the morning, and the captain stood at the wheel.",
    "When the rain came, the children ran into the house.",
    "Today I feel happy. Today I feel sad.",
]
#: Positions before this one are not measured.
FROM = 8


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The texts that are read, of each its first tokens."""
    monkeypatch.setattr(module, "plain_texts", lambda: TEXTS)
    monkeypatch.setattr(module, "_TOKENS", 12)
    return [token_ids(text)[:12] for text in TEXTS]


def log_p_at(lm: tt.LanguageModel, site: str, ids: list[int], gains: Tensor) -> Tensor:
    """log p of every token at the positions that are measured, [rows, positions, vocabulary], with
    the units of a site times 1 + gains [rows, units]."""
    edits: Any = {lm.anatomy.point(site): lambda x: x * (1 + gains[:, None]).to(x)}
    tokens = torch.tensor([ids]).expand(len(gains), -1)
    with torch.no_grad(), hooked(lm.anatomy.body, edits):
        logits = lm.model(input_ids=tokens, use_cache=False).logits
    return logits[:, FROM:].double().log_softmax(-1)


def fisher(lm: tt.LanguageModel, site: str, ids: list[int]) -> Tensor:
    """Of a text: the mean over positions of sum_y p(y) u_y u_y', [units, units], with slopes u of
    log p(y) from central differences."""
    width, step = lm.anatomy.width(site), 1e-4
    steps = step * torch.eye(width, dtype=torch.float64)
    u = (log_p_at(lm, site, ids, steps) - log_p_at(lm, site, ids, -steps)) / (2 * step)
    p = log_p_at(lm, site, ids, torch.zeros(1, width, dtype=torch.float64))[0].exp()
    return torch.einsum("ty,ity,jty->ij", p, u, u) / len(p)


# -- what they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_costs_are_the_fisher_information(name: str, short_texts: list[list[int]]) -> None:
    lm = known(name)
    sites = ["layers.1.attn_out", "layers.2.heads"]
    for site, costs in zip(sites, unit_costs(lm, sites, draws=150), strict=True):
        exact = torch.stack([fisher(lm, site, ids) for ids in short_texts]).mean(0)
        # Of these very texts: draws are all that differs.
        error = Costs(costs.samples).error
        away = (costs.mean - exact.diagonal()) / error
        assert away.abs().max() < 4.5
        assert away.abs().mean() < 1.5
        assert relative(costs.mean, exact.diagonal()) < 0.3
        gain = torch.randn(len(exact), generator=torch.Generator().manual_seed(0)).double()
        together = 0.5 * float(gain @ exact @ gain)
        assert predicted_kl([costs], [gain]) == pytest.approx(together, rel=0.3)


def test_errors_are_as_texts_differ() -> None:
    samples = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Costs(samples).mean, samples.double().square().mean(0))
    alike = samples.repeat_interleave(4, 0)  # four draws of a text that say the same
    assert relative(Costs(alike, 4).error, Costs(samples).error) < 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_predicted_costs_are_real_ones(name: str) -> None:
    lm = known(name, F32)
    sites = ["layers.0.ffn_in", "layers.1.ffn_in"]
    costs = unit_costs(lm, sites, draws=16)
    chosen = {site: each.mean.topk(6).indices for site, each in zip(sites, costs, strict=True)}
    gains = []
    for site in sites:
        gain = torch.zeros(lm.anatomy.width(site))
        gain[chosen[site]] = torch.tensor([1.0, -1.0] * 3)
        gains.append(gain)
    scales = [
        (site, Scale(gain.nonzero()[:, 0], gain[gain != 0], len(gain)))
        for site, gain in zip(sites, gains, strict=True)
    ]
    rows = module._neutral(lm)
    alpha, measured = 0.02, []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.tokens])
            before = lm.model(ids).logits[0, FROM:].double().log_softmax(-1)
            with lm.steered(steer(lm, *scales, alpha=alpha)):
                after = lm.model(ids).logits[0, FROM:].double().log_softmax(-1)
            measured.append(float((before.exp() * (before - after)).sum(-1).mean()))
    along = sum(
        each.samples.double() @ gain.double() for each, gain in zip(costs, gains, strict=True)
    )
    assert isinstance(along, Tensor)
    error = float(0.5 * along.square().std() / len(along) ** 0.5)
    real = sum(measured) / len(measured) / alpha**2
    assert abs(predicted_kl(costs, gains) - real) < 3 * error + 0.02 * real
    assert error < 0.2 * real


def test_nothing_costs_nothing() -> None:
    assert predicted_kl([], []) == 0
    assert predicted_kl([Costs(torch.randn(5, 3))], [torch.zeros(3)]) == 0


# -- how they are drawn ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "lfm2"])
def test_batches_make_no_difference(
    name: str, short_texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = known(name, F32)
    sites = ["layers.0.ffn_in", "layers.1.resid"]
    monkeypatch.setattr(module, "_kept", lambda *about: None)
    whole = unit_costs(lm, sites)
    for tokens in (1, 30):
        monkeypatch.setattr(tt.LanguageModel, "batch_tokens", tokens)
        for one, two in zip(unit_costs(lm, sites), whole, strict=True):
            assert relative(one.samples, two.samples) < 1e-4
    for one, two in zip(unit_costs(lm, sites[::-1]), whole[::-1], strict=True):
        assert relative(one.samples, two.samples) < 1e-4


def test_blocks_that_run_again_draw_the_same(
    short_texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = known("qwen3_moe", F32)
    sites = ["layers.0.heads", "layers.1.ffn_in"]
    monkeypatch.setattr(module, "_kept", lambda *about: None)
    plain = unit_costs(lm, sites)
    monkeypatch.setattr("trimtab.fitting.gradients.asks_for_memory", lambda *a: True)
    for one, two in zip(unit_costs(lm, sites), plain, strict=True):
        assert relative(one.samples, two.samples) < 1e-5


def test_a_model_of_few_positions_is_refused() -> None:
    lm = fresh("gpt2", F32)
    lm.anatomy.config.n_positions = 8
    refused_in_one_line(lambda: unit_costs(lm, ["layers.0.heads"]), "at most 8 tokens")


# -- kept ------------------------------------------------------------------------------------------


def test_costs_are_kept_for_a_model_and_its_weights(short_texts: list[list[int]]) -> None:
    lm = fresh("llama", F32)
    first, second = "layers.0.heads", "layers.1.heads"
    (one,) = unit_costs(lm, [first])
    with watched(lm) as run:
        both = unit_costs(lm, [second, first, second])
    assert run.rows == len(TEXTS)
    assert torch.equal(both[1].samples, one.samples)
    assert torch.equal(both[0].samples, both[2].samples)
    again = fresh("llama", F32)
    with watched(again) as run:
        kept = unit_costs(again, [first, second])
    assert not run.modules
    assert torch.equal(kept[1].samples, both[0].samples)
    with torch.no_grad():
        again.model.lm_head.weight[50] *= 1.5
    with watched(again) as run:
        (changed,) = unit_costs(again, [first])
    assert run.rows == len(TEXTS)
    assert not torch.equal(changed.samples, one.samples)
    with watched(lm) as run:
        unit_costs(lm, [first], draws=2)
    assert run.rows == len(TEXTS)


def test_costs_of_a_steered_model_are_its_own_and_not_kept(
    short_texts: list[list[int]], own_cache: Path
) -> None:
    lm = fresh("llama", F32)
    site = "layers.1.heads"
    with lm.steered(steer_at(lm, "resid", layer=0)):
        (steered,) = unit_costs(lm, [site])
    assert not list(own_cache.rglob("*.safetensors"))
    (plain,) = unit_costs(lm, [site])
    assert relative(steered.mean, plain.mean) > 0.01
    with lm.steered(steer_at(lm, "resid", layer=0)):
        (again,) = unit_costs(lm, [site])
    assert torch.equal(again.samples, steered.samples)


def test_damaged_files_are_drawn_again(short_texts: list[list[int]], own_cache: Path) -> None:
    lm = known("llama", F32)
    site = "layers.1.heads"
    (whole,) = unit_costs(lm, [site])
    (file,) = own_cache.rglob("*.safetensors")
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"x" * len(content)):
        file.write_bytes(damaged)
        (again,) = unit_costs(lm, [site])
        assert torch.equal(again.samples, whole.samples)
    save_file({"samples": whole.samples[:, :5].contiguous()}, file)
    (again,) = unit_costs(lm, [site])
    assert torch.equal(again.samples, whole.samples)
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_no_error(
    short_texts: list[list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path / "file")
    assert len(unit_costs(known("llama", F32), ["layers.1.heads"])) == 1
