"""Gates of several steerings at once, and what else may stand beside a gate: other steerings, a
dial that does nothing, models it does not fit, images, tokens that are no numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import trimtab as tt
from gates_by_hand import adding, prompt_score, token_scores
from helpers import language_model, raw_greedy, refused_in_one_line, relative, steer, token_ids
from seeing import about, seeing, square
from test_gates import DIAL, NEW, READ, SCOPE_OF, TEXTS, between, gate_for, gated, vector
from trimtab.model import decisions
from trimtab.model.versions import cache_argument
from trimtab.reading import log_odds, next_tokens, prompt_reading
from trimtab.steering import Add, Condition, Gate

KINDS: list[Any] = ["token", "latched", "two-pass"]


def adds(lm: tt.LanguageModel, layer: int, seed: int, scope: str) -> tt.Steering:
    one = steer(lm, (f"layers.{layer}.resid", Add(vector(lm, seed))))
    return one.scoped(scope).at(DIAL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_steering_at_a_dial_that_does_nothing_is_the_unsteered_model(kind: Any) -> None:
    lm = language_model("llama")
    one = gated(lm, gate_for(lm, kind))
    idle = one.at(0.0)
    assert torch.equal(lm.logits(TEXTS, steering=idle), lm.logits(TEXTS))
    with lm.steered(idle):
        found = raw_greedy(lm, TEXTS, NEW)
    assert found == raw_greedy(lm, TEXTS, NEW)
    done = lm.generate(TEXTS, chat=False, max_new_tokens=1, steering=idle)
    acting = lm.generate(TEXTS, chat=False, max_new_tokens=1, steering=one)
    assert [each.gates[0].scores for each in done] == [each.gates[0].scores for each in acting]
    for _, nexts in next_tokens(lm, [prompt_reading(token_ids(t)) for t in TEXTS], idle):
        assert all(len(each.gates) == 1 for each in nexts)


def test_two_steerings_under_one_latched_gate_decide_each_for_themselves() -> None:
    """The second one sees what the first did at the prompt's last token."""
    lm = language_model("llama")
    name = cache_argument(lm.anatomy.body)
    first, second = adds(lm, 0, 1, "last"), adds(lm, 1, 2, "last")
    ids = token_ids(TEXTS[0])
    plain = prompt_score(lm.model, ids, READ, "cosine", vector(lm, 7), None)
    last = [False] * (len(ids) - 1) + [True]
    with adding(lm.model, READ, last, DIAL * vector(lm, 1)):
        after = prompt_score(lm.model, ids, READ, "cosine", vector(lm, 7), None)
    # The first one fires, the second does not.
    gate = Gate(
        (
            Condition(
                f"layers.{READ}.resid", vector(lm, 7), (plain + after) / 2,
                "above" if plain > after else "below", reads="last",  # type: ignore[arg-type]
            ),
        ),
        "latched",
    )  # fmt: skip
    both = first.gated(gate) + second.gated(gate)
    with torch.no_grad(), lm.steered(both):
        cache = DynamicCache(config=lm.model.config)
        lm.model(torch.tensor([ids]), **{name: cache})
        found = lm.model(torch.tensor([[60]]), **{name: cache}).logits[0, -1]
    with torch.no_grad(), adding(lm.model, 0, [*last, True], DIAL * vector(lm, 1)):
        expected = lm.model(torch.tensor([[*ids, 60]]), use_cache=False).logits[0, -1]
    assert relative(found, expected) < 1e-5
    (done,) = lm.generate([TEXTS[0]], chat=False, max_new_tokens=2, steering=both)
    assert [each.fired for each in done.gates] == [True, False]
    assert done.gates[0].scores[0] == pytest.approx(plain, abs=1e-4)
    assert done.gates[1].scores[0] == pytest.approx(after, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_other_steerings_in_other_places_are_what_they_are_alone(kind: Any) -> None:
    lm = language_model("llama")
    gate, scope = gate_for(lm, kind), SCOPE_OF[kind]
    a, b = adds(lm, 0, 1, scope), adds(lm, 1, 2, scope)
    rows: list[Any] = [
        [a.gated(gate), b.gated(gate)],
        [b.gated(gate)],
        [a, b.gated(gate)],
        [b.gated(gate), a],
        None,
    ]
    together = lm.generate(TEXTS, chat=False, max_new_tokens=4, steering=rows)
    for text, row, each in zip(TEXTS, rows, together, strict=True):
        (alone,) = lm.generate([text], chat=False, max_new_tokens=4, steering=[row])
        assert alone.tokens == each.tokens
        for one, other in zip(alone.gates, each.gates, strict=True):
            assert replace(one, scores=()) == replace(other, scores=())
            assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_a_two_pass_gate_reads_the_unsteered_model_beside_a_steering_of_all_texts() -> None:
    lm = language_model("llama")
    one = gated(lm, gate_for(lm, "two-pass"))
    always = adds(lm, 0, 9, "all")
    done = lm.generate(TEXTS, chat=False, max_new_tokens=NEW, steering=always + one)
    alone = lm.generate(TEXTS, chat=False, max_new_tokens=NEW, steering=one)
    assert [each.gates for each in done] == [each.gates for each in alone]
    assert {each.gates[0].fired for each in done} == {True, False}
    expected = [list(each.tokens) for each in done]
    with lm.steered(always, one):
        assert raw_greedy(lm, TEXTS, NEW) == expected
    with lm.steered(always):
        with lm.steered(one):
            assert raw_greedy(lm, TEXTS, NEW) == expected
        inside = lm.generate(TEXTS, chat=False, max_new_tokens=NEW, steering=one)
    assert [list(each.tokens) for each in inside] == expected


def test_explain_shows_what_a_gate_makes_of_the_steerings_before_it() -> None:
    lm = language_model("llama")
    gate = gate_for(lm, "token")
    before = adds(lm, 0, 1, "all")
    found = lm.explain([before, gated(lm, gate)], TEXTS[0], chat=False, max_new_tokens=0)
    ids = token_ids(TEXTS[0])
    with adding(lm.model, 0, [True] * len(ids), DIAL * vector(lm, 1)):
        scores = token_scores(lm.model, ids, READ, "cosine", vector(lm, 7))
    expected = [score > gate.conditions[0].threshold for score in scores]
    plain = token_scores(lm.model, ids, READ, "cosine", vector(lm, 7))
    assert expected != [score > gate.conditions[0].threshold for score in plain]
    assert [bool(weight) for weight in found.fires[1].weights] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_steering_of_another_model_is_refused_whether_its_gate_fires_or_not(kind: Any) -> None:
    lm = language_model("llama")
    never = replace(gate_for(lm, kind).conditions[0], threshold=1e9)
    one = gated(lm, Gate((never,), kind))
    other = replace(one, model=replace(one.model, digest="0" * 64))
    wide = one.gated(Gate((Condition("layers.0.resid", torch.ones(5), 0.0),), kind))
    pairs = tt.Contrast.from_pairs([(text, " yes", " no") for text in TEXTS])
    for run in (
        lambda each: lm.logits(TEXTS, steering=each),
        lambda each: lm.generate(TEXTS, chat=False, max_new_tokens=1, steering=each),
        lambda each: list(next_tokens(lm, [prompt_reading(token_ids(TEXTS[0]))], each)),
        lambda each: log_odds(lm, pairs, each),
        lambda each: lm.explain(each, TEXTS[0], chat=False, max_new_tokens=0),
    ):
        refused_in_one_line(lambda run=run: run(other), "was made for llama")
        refused_in_one_line(lambda run=run: run(wide), "the gate has 5")
    gate = Gate((Condition("layers.0.resid", torch.ones(5), 0.0),), kind)
    refused_in_one_line(lambda: gate.check_fits(lm.anatomy, lm.identity), "the gate has 5")
    made = replace(gate_for(lm, kind), model=other.model)
    refused_in_one_line(lambda: made.check_fits(lm.anatomy, lm.identity), "gate was made for llama")


def test_a_token_gate_is_checked_by_the_score_of_the_last_token() -> None:
    """Whatever its conditions would read if it looked back."""
    lm = language_model("llama")
    gate = gate_for(lm, "token")
    assert str(gate.conditions[0].reads) == "all[1:]"
    done = lm.generate(TEXTS, chat=False, max_new_tokens=1, steering=gated(lm, gate))
    found = decisions(lm.anatomy, lm.marks, gate, [token_ids(text) for text in TEXTS])
    for one, other in zip(found, (each.gates[0] for each in done), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        assert one.prompt_tokens == other.prompt_tokens


@pytest.mark.parametrize("kind", ["latched", "two-pass"])
def test_a_gate_that_reads_turns_refuses_a_text_without_any(kind: Any) -> None:
    lm = language_model("llama")
    condition = Condition("layers.0.resid", vector(lm, 7), -2.0, reads="user")  # type: ignore[arg-type]
    one = gated(lm, Gate((condition,), kind))
    refused_in_one_line(lambda: lm.logits(TEXTS, steering=one), "no turn of a chat")
    refused_in_one_line(lambda: lm.logits(TEXTS, steering=[None, one, None, one, None]), "text 2|1")
    beside = [one, None]
    chat = [[{"role": "user", "content": "the ship"}], "raw"]
    (done, _) = lm.generate(chat, chat=False, max_new_tokens=1, steering=beside)
    assert done.gates[0].fired


def test_what_a_mean_leaves_out_may_be_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As padding is in some models, and first tokens where half precision overflows."""
    lm = language_model("llama")
    gate = gate_for(lm, "latched")
    texts = [token_ids(text) for text in TEXTS]
    expected = decisions(lm.anatomy, lm.marks, gate, texts)
    block = lm.anatomy.body.get_submodule(f"layers.{READ}")
    forward = block.forward

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        x = forward(*args, **kwargs)
        return torch.cat((torch.full_like(x[:, :1], torch.inf), x[:, 1:]), dim=1)

    monkeypatch.setattr(block, "forward", spoilt)
    found = decisions(lm.anatomy, lm.marks, gate, texts)
    assert [each.scores for each in found] == [each.scores for each in expected]


def test_tokens_of_a_beginning_that_texts_share_are_counted() -> None:
    lm = language_model("llama")
    start = "Dear Sir, I am writing to you about the rudder of the ship in the rain. "
    texts = [token_ids(start + end) for end in ("yes we can", "no", "the king", "fire", "sad")]
    values = token_scores(lm.model, texts[0], READ, "cosine", vector(lm, 7))
    condition = Condition(f"layers.{READ}.resid", vector(lm, 7), between(values))
    one = gated(lm, Gate((condition,), "token"))
    shared = []
    for batch, nexts in next_tokens(lm, [prompt_reading(text) for text in texts], one):
        shared.append(batch.shared)
        for row, each in zip(batch.rows, nexts, strict=True):
            scores = token_scores(lm.model, texts[row], READ, "cosine", vector(lm, 7))
            expected = sum(score > condition.threshold for score in scores)
            assert each.gates[0].prompt_tokens == expected
    assert max(shared) > 10


def test_a_gate_that_reads_by_itself_refuses_images() -> None:
    lm = seeing()
    prompt = about("What is this? ", square("red"))
    width = lm.anatomy.width("layers.0.resid")
    condition = Condition("layers.0.resid", torch.ones(width), -2.0)
    top = f"layers.{lm.anatomy.layers - 1}.resid"
    plain = steer(lm, (top, Add(torch.ones(width)))).scoped("last")
    two_pass, latched = (plain.gated(Gate((condition,), kind)) for kind in ("two-pass", "latched"))
    for refused in (
        lambda: lm.generate([prompt], max_new_tokens=1, steering=two_pass),
        lambda: lm.logits([prompt], chat=True, steering=two_pass),
        lambda: lm.explain(latched, prompt, max_new_tokens=0),
    ):
        refused_in_one_line(refused, "has an image")
    (done,) = lm.generate([prompt], max_new_tokens=1, steering=latched)
    assert done.gates[0].fired


def test_a_row_that_is_nothing_but_padding_fires_nowhere() -> None:
    lm = language_model("llama")
    one = gated(lm, gate_for(lm, "latched"))
    ids = torch.tensor([token_ids(TEXTS[1])] * 2)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with torch.no_grad(), lm.steered(one):
        found = lm.model(ids, attention_mask=mask).logits
        alone = lm.model(ids[:1]).logits
    assert relative(found[:1], alone) < 1e-6
    with torch.no_grad():
        assert torch.equal(found[1], lm.model(ids, attention_mask=mask).logits[1])
