"""SteerMoE: how often each side uses an expert, counted again with transformers' own routers, and
what moving and forcing experts does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, language_model, refused_in_one_line, relative, token_ids
from method_settings import PAIRED, PAIRS, UNPAIRED
from test_routers import MIXTURES, chosen_by, lm_of
from trimtab.methods import describe, explain
from trimtab.steering import Add, Force

ONE = tt.Contrast.from_pairs([PAIRS[0]])


def counted(name: str, contrast: tt.Contrast, answers: bool) -> Tensor:
    """By a plain loop over texts, layers and tokens: at which share of each side's tokens an expert
    is among the two of the largest logits, [2, layers, experts] in float64."""
    lm, model = lm_of(name), lm_of(name).model
    counts, tokens = torch.zeros(2, lm.anatomy.layers, 4), [0, 0]
    for row in contrast.train.rows:
        if contrast.paired:
            texts = [(0, row.prompt, row.positive), (1, row.prompt, row.negative)]
        else:
            texts = [(int(row.label == "negative"), "", row.text)]
        for side, prompt, answer in texts:
            ids = token_ids(prompt + answer)
            first = len(token_ids(prompt)) if answers else 0
            with torch.no_grad():
                out: Any = model(torch.tensor([ids]), output_router_logits=True, use_cache=False)
            for layer, logits in enumerate(out.router_logits):
                for scores in logits[first:]:
                    for expert in scores.argsort()[-2:].tolist():
                        counts[side, layer, expert] += 1
            tokens[side] += len(ids) - first
    return counts.double() / torch.tensor(tokens)[:, None, None]


def table_of(steering: tt.Steering, layers: int) -> tuple[Tensor, Tensor]:
    """RD, and both sides' rates, of every expert that is moved."""
    found, rates = torch.zeros(layers, 4), torch.zeros(2, layers, 4)
    for each in describe(steering)["experts"]:
        place = each["layer"], each["expert"]
        found[place], rates[0][place], rates[1][place] = each["score"], each["r_pos"], each["r_neg"]
    return found.double(), rates.double()


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("contrast", [PAIRED, UNPAIRED], ids=["pairs", "texts"])
def test_experts_are_counted_as_a_plain_loop_counts_them(name: str, contrast: Any) -> None:
    lm = lm_of(name)
    steering = tt.SteerMoE(strength=1).fit(lm, contrast, measure=False)
    rates = counted(name, contrast, contrast.paired)
    difference = rates[0] - rates[1]
    found, both = table_of(steering, lm.anatomy.layers)
    assert float((found - difference).abs().max()) < 1e-6
    used = difference != 0
    assert float((both - rates)[:, used].abs().max()) < 1e-6
    scores = [abs(each["score"]) for each in describe(steering)["experts"]]
    assert scores == sorted(scores, reverse=True)
    for each in steering.interventions:
        operator: Any = each.operator
        layer = int(each.site.split(".")[1])
        assert type(operator) is Add
        assert relative(operator.vector, difference[layer] / difference.abs().max()) < 1e-5


@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_counted_is_where_tokens_go(name: str) -> None:
    """Behind sigmoids, biases and groups, too: what the last mixture's experts are called with."""
    lm = lm_of(name)
    contrast = tt.Contrast.from_pairs([("Today", " I am glad and light.", " I feel sad.")])
    steering = tt.SteerMoE(strength=1, token="all").fit(lm, contrast, measure=False)
    last = lm.anatomy.layers - 1
    while f"layers.{last}.router" not in lm.anatomy.sites("router"):
        last -= 1
    rates = []
    for answer in (" I am glad and light.", " I feel sad."):
        routed = chosen_by(lm, text=token_ids("Today" + answer))
        assert all(len(experts) == 2 for experts in routed)
        rates.append([sum(e in some for some in routed) / len(routed) for e in range(4)])
    found, _ = table_of(steering, lm.anatomy.layers)
    expected = torch.tensor(rates[0]).double() - torch.tensor(rates[1]).double()
    assert float((found[last] - expected).abs().max()) < 1e-6


def test_rates_differ_between_minus_one_and_one_and_sum_to_nothing_in_a_layer() -> None:
    lm = lm_of("mixtral")
    found, rates = table_of(tt.SteerMoE(strength=1).fit(lm, ONE, measure=False), 3)
    assert float(found.abs().max()) <= 1
    assert float(found.sum(-1).abs().max()) < 1e-6
    swapped = [(prompt, negative, positive) for prompt, positive, negative in PAIRS[:1]]
    other = tt.SteerMoE(strength=1).fit(lm, tt.Contrast.from_pairs(swapped), measure=False)
    assert torch.equal(table_of(other, 3)[0], -found)
    assert torch.equal(table_of(other, 3)[1], rates.flip(0))


def test_batches_and_caches_count_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, method = lm_of("mixtral"), tt.SteerMoE(strength=1)
    plain = method.fit(lm, PAIRED, measure=False)
    others = [method.fit(lm, PAIRED, measure=False, cache=tmp_path) for _ in range(2)]
    monkeypatch.setattr(tt.LanguageModel, "batch_tokens", 1)  # a text at a time
    others.append(method.fit(lm, PAIRED, measure=False))
    for other in others:
        for column, numbers in plain.tables.items():
            assert torch.equal(other.tables[column], numbers)


# -- what it does -----------------------------------------------------------------------------


def logits(lm: tt.LanguageModel, steering: Any = None) -> Tensor:
    found: Tensor = lm.logits(PROMPTS, steering=steering)
    return found


def test_nothing_is_done_at_zero_and_with_no_expert() -> None:
    lm = lm_of("olmoe")
    soft = tt.SteerMoE(strength=1).fit(lm, PAIRED, measure=False)
    assert torch.equal(logits(lm, soft.at(0)), logits(lm))
    assert not torch.equal(logits(lm, soft.at(2)), logits(lm))
    for nothing in (
        tt.SteerMoE(variant="force", activate=0).fit(lm, PAIRED),
        tt.SteerMoE(activate=0, deactivate=0).fit(lm, PAIRED),
    ):
        assert nothing.interventions == ()
        assert torch.equal(logits(lm, nothing), logits(lm))
        assert "nothing is changed" in explain(nothing)[0]
    forced = tt.SteerMoE(variant="force", activate=1, deactivate=1).fit(lm, PAIRED, measure=False)
    assert torch.equal(logits(lm, forced.at(0)), logits(lm))


def test_a_soft_steering_multiplies_odds() -> None:
    """At the first router, whose input is untouched: odds of an expert against another are times
    e to d (RD_e - RD_other) / max|RD|."""
    lm, d = lm_of("mixtral"), 1.7
    steering = tt.SteerMoE(strength=d).fit(lm, PAIRED, measure=False)
    ids = torch.tensor([token_ids(PROMPTS[0])])

    def probabilities(*steerings: Any) -> Tensor:
        with torch.no_grad(), lm.steered(*steerings):
            out: Any = lm.model(ids, output_router_logits=True, use_cache=False)
        return out.router_logits[0].double().softmax(-1)

    plain, moved = probabilities(), probabilities(steering)
    operator: Any = steering.interventions[0].operator
    expected = torch.exp(d * (operator.vector - operator.vector[0]).double())
    odds = (moved / moved[:, :1]) / (plain / plain[:, :1])
    assert relative(odds, expected.expand_as(odds)) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_forced_experts_are_always_chosen_and_those_off_never(name: str) -> None:
    lm = lm_of(name)
    steering = tt.SteerMoE(variant="force", activate=2, deactivate=1).fit(
        lm, UNPAIRED, measure=False
    )
    last = lm.anatomy.sites("router")[-1]
    records = describe(steering)["experts"]
    assert sum(record["score"] > 0 for record in records) == 2
    on = {r["expert"] for r in records if r["site"] == last and r["score"] > 0}
    off = {r["expert"] for r in records if r["site"] == last and r["score"] < 0}
    for text in (token_ids(prompt) for prompt in PROMPTS):
        for experts in chosen_by(lm, steering, text=text):
            assert on <= experts
            assert not off & experts


def test_what_is_forced_is_the_surest_and_a_layer_takes_no_more_than_it_chooses() -> None:
    """As the authors' selection: the first of each sign by |RD|, and of a layer only so many on."""
    lm = lm_of("olmoe")
    rates = counted("olmoe", PAIRED, True)
    difference = rates[0] - rates[1]
    most = int((difference > 0).sum())
    steering = tt.SteerMoE(variant="force", activate=most, deactivate=2).fit(
        lm, PAIRED, measure=False
    )
    order = difference.flatten().abs().argsort(descending=True, stable=True).tolist()
    on = [e for e in order if difference.flatten()[e] > 0]
    kept: list[int] = []
    for e in on:
        if sum(other // 4 == e // 4 for other in kept) < 2:
            kept.append(e)
    off = [e for e in order if difference.flatten()[e] < 0][:2]
    found = [4 * r["layer"] + r["expert"] for r in describe(steering)["experts"]]
    assert found == [e for e in order if e in {*kept, *off}]
    assert steering.findings.get("dropped", 0) == len(on) - len(kept)
    operators: Sequence[Any] = [each.operator for each in steering.interventions]
    assert all(type(operator) is Force for operator in operators)
    assert sum(len(operator.on) for operator in operators) == len(kept)


def test_rows_are_independent_and_padding_changes_nothing() -> None:
    lm = lm_of("mixtral")
    soft, forced = (
        method.fit(lm, PAIRED, measure=False)
        for method in (
            tt.SteerMoE(strength=2),
            tt.SteerMoE(variant="force", activate=2, deactivate=1),
        )
    )
    together = lm.logits(PROMPTS, steering=[soft, None, forced])
    for i, own in enumerate((soft, None, forced)):
        assert relative(together[i], lm.logits(PROMPTS[i : i + 1], steering=own)[0]) < 1e-4


def test_it_is_kept_and_said(tmp_path: Path) -> None:
    steering = tt.SteerMoE(variant="force", activate=2, deactivate=1).fit(lm_of("gpt_oss"), PAIRED)
    read = tt.Steering.load(steering.save(tmp_path / "a.safetensors"))
    assert describe(read)["experts"] == describe(steering)["experts"]
    words = " ".join(explain(read))
    assert "forces 2 experts on and 1 off" in words
    assert "the positive side uses it at" in words
    assert read.dial == tt.Dial("strength", 1.0, (0.0, 1.0))
    soft = tt.SteerMoE().fit(lm_of("gpt_oss"), PAIRED)
    assert math.isfinite(soft.dial.default)
    assert "SteerMoE moves the routers' logits of" in explain(soft)[0]


def test_bad_settings_are_refused() -> None:
    lm = lm_of("mixtral")
    for method, model, says in (
        (tt.SteerMoE(), language_model("llama"), "llama has no router"),
        (tt.SteerMoE(variant="force", activate=100), lm, " activate is 100, and"),
        (tt.SteerMoE(variant="force", deactivate=100), lm, "deactivate is 100, and"),
        (tt.SteerMoE(token="answer"), lm, "have no answers: count all"),
    ):
        contrast = UNPAIRED if method.token else PAIRED
        refused_in_one_line(lambda m=method, lm=model, c=contrast: m.fit(lm, c), says)
    with pytest.raises(tt.TrimtabError, match="how many experts are forced"):
        tt.SteerMoE(variant="force")
    with pytest.raises(tt.TrimtabError, match="variant is 'hard'"):
        tt.SteerMoE(variant="hard")  # type: ignore[arg-type]
    with pytest.raises(tt.TrimtabError, match="layers.1.router, the logits"):
        lm.anatomy.point("layers.1.router_choice")


def test_so_many_off_that_too_few_are_free_is_refused() -> None:
    """A layer in which three of four experts are used more by the negative side."""
    lm = lm_of("mixtral")
    for pair in PAIRS:
        contrast = tt.Contrast.from_pairs([pair])
        steering = tt.SteerMoE(strength=1).fit(lm, contrast, measure=False)
        found, _ = table_of(steering, 3)
        if int((found < 0).sum(-1).max()) > 2:
            most = int((found < 0).sum())
            method = tt.SteerMoE(variant="force", deactivate=most)
            refused_in_one_line(lambda m=method, c=contrast: m.fit(lm, c), "chooses 2 of 4 experts")
            return
    pytest.fail("no such pair")
