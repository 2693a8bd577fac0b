"""Gates on a running model: every way to cut texts into passes decides what plain loops over whole
texts decide by the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import trimtab as tt
from gates_by_hand import BY_HAND, adding, prompt_score, token_scores, written
from helpers import (
    PROMPTS,
    few_quick,
    language_model,
    left_padded,
    raw_greedy,
    refused_in_one_line,
    relative,
    steer,
    token_ids,
    with_range,
)
from tiny import TINY, tiny_model, tiny_tokenizer
from tiny_curated import CURATED, curated_model
from trimtab.dials import within
from trimtab.model import decisions
from trimtab.model.versions import cache_argument
from trimtab.reading import log_odds, next_tokens, prompt_reading
from trimtab.steering import Add, Condition, Gate

READ, STEERED, DIAL, NEW = 0, 1, 4.0, 6
SCOPE_OF = {"token": "all", "latched": "last", "two-pass": "all"}
TEXTS = [*PROMPTS, "the ship turns", "Dear Sir, I am writing to you about the rudder"]


def vector(lm: tt.LanguageModel, seed: int = 5) -> Tensor:
    width = lm.anatomy.width("layers.1.resid")
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def scores_by_hand(lm: tt.LanguageModel, kind: str, score: str, reads: str) -> list[list[float]]:
    """Of each text its scores, token by token or one."""
    found = []
    for text in TEXTS:
        ids = token_ids(text)
        if kind == "token":
            found.append(token_scores(lm.model, ids, READ, score, vector(lm, 7)))
        else:
            read = None if reads == "last" else range(1, len(ids))
            found.append([prompt_score(lm.model, ids, READ, score, vector(lm, 7), read)])
    return found


def between(values: Sequence[float]) -> float:
    """A threshold with as many values above as below, far from the next ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    places = range(max(1, middle - 2), min(len(ordered), middle + 3))
    widest = max(places, key=lambda i: ordered[i] - ordered[i - 1])
    return (ordered[widest] + ordered[widest - 1]) / 2


def gate_for(
    lm: tt.LanguageModel, kind: Any, score: Any = "cosine", reads: str = "all[1:]", **more: Any
) -> Gate:
    values = [x for row in scores_by_hand(lm, kind, score, reads) for x in row]
    condition = Condition(
        f"layers.{READ}.resid",
        vector(lm, 7),
        between(values),
        score=score,
        bias=0.25 if score == "probe" else 0.0,
        reads=reads,  # type: ignore[arg-type]
        **more,
    )
    return Gate((condition,), kind)


def gated(lm: tt.LanguageModel, gate: Gate, scope: str | None = None) -> tt.Steering:
    plain = steer(lm, (f"layers.{STEERED}.resid", Add(vector(lm))))
    return plain.scoped(scope or SCOPE_OF[gate.kind]).at(DIAL).gated(gate)


def fires_by_hand(lm: tt.LanguageModel, gate: Gate, ids: list[int], prompt: int) -> list[bool]:
    """Where a gate of one condition fires in a text, by a plain loop."""
    (condition,) = gate.conditions
    score, v = condition.score, vector(lm, 7)
    sign = 1 if condition.fires == "above" else -1
    if gate.kind == "token":
        values = token_scores(lm.model, ids, READ, score, v)
        return [sign * value > sign * condition.threshold for value in values]
    read = None if str(condition.reads) == "last" else range(1, prompt)
    value = prompt_score(lm.model, ids[:prompt], READ, score, v, read)
    fired = sign * value > sign * condition.threshold
    start = prompt - 1 if gate.kind == "latched" else 0
    return [fired and i >= start for i in range(len(ids))]


def by_hand(lm: tt.LanguageModel, gate: Gate, text: str, new: int = NEW) -> list[int]:
    ids = token_ids(text)
    return written(
        lm.model,
        ids,
        new,
        lambda now: fires_by_hand(lm, gate, now, len(ids)),
        STEERED,
        DIAL * vector(lm),
    )


CASES = [
    ("token", "cosine", "last"),
    ("token", "projection", "last"),
    ("token", "probe", "last"),
    ("token", "compat", "last"),
    ("latched", "cosine", "all[1:]"),
    ("latched", "probe", "last"),
    ("latched", "compat", "all[1:]"),
    ("two-pass", "cosine", "all[1:]"),
    ("two-pass", "projection", "last"),
]


@pytest.mark.parametrize("case", CASES, ids="/".join)
@pytest.mark.parametrize("name", few_quick(TINY, "llama"))
def test_generate_is_a_loop_by_hand_alone_in_batches_with_and_without_cache(
    name: str, case: tuple[str, str, str]
) -> None:
    lm = language_model(name)
    gate = gate_for(lm, *case)
    one = gated(lm, gate)
    expected = [by_hand(lm, gate, text) for text in TEXTS]
    plain = raw_greedy(lm, TEXTS, NEW)
    always = raw_steered(lm, replace(one, gate=None))
    if gate.kind != "token":  # some rows fire and others do not, and that shows
        fired = [any(fires_by_hand(lm, gate, token_ids(t), len(token_ids(t)))) for t in TEXTS]
        assert set(fired) == {True, False}
        assert expected == [b if f else a for a, b, f in zip(plain, always, fired, strict=True)]
    else:
        assert expected not in (plain, always)
    with lm.steered(one):
        assert raw_greedy(lm, TEXTS, NEW) == expected
        assert raw_greedy(lm, TEXTS, NEW, use_cache=False) == expected
        for text, row in zip(TEXTS, expected, strict=True):
            assert raw_greedy(lm, [text], NEW) == [row]
    done = lm.generate(TEXTS, chat=False, max_new_tokens=NEW, steering=one, batch_size=3)
    assert [list(each.tokens) for each in done] == expected
    rows = lm.generate(
        TEXTS, chat=False, max_new_tokens=NEW, steering=[one, None, one, one.at(-DIAL), None]
    )
    assert [list(rows[i].tokens) for i in (0, 2)] == [expected[0], expected[2]]
    assert [list(rows[i].tokens) for i in (1, 4)] == [plain[1], plain[4]]


def raw_steered(lm: tt.LanguageModel, steering: tt.Steering) -> list[list[int]]:
    with lm.steered(steering):
        return raw_greedy(lm, TEXTS, NEW)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5], CASES[7]], ids="/".join)
@pytest.mark.parametrize("how", ["lookup", "assistant", "same assistant", "parts", "one by one"])
def test_guesses_and_parts_are_plain_decoding(how: str, case: tuple[str, str, str]) -> None:
    lm = language_model("llama")
    assistant = lm.model if how == "same assistant" else tiny_model("llama", seed=3)
    assistant.generation_config.eos_token_id = None
    options: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 4},
        "parts": {"prefill_chunk_size": 3},
        "one by one": {"prefill_chunk_size": 1},
    }.get(how, {"assistant_model": assistant})
    gate = gate_for(lm, *case)
    for text in TEXTS:
        expected = by_hand(lm, gate, text)
        with lm.steered(gated(lm, gate)):
            assert raw_greedy(lm, [text], NEW, **options) == [expected]


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids="/".join)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_beams_and_samples_follow_their_rows(options: Any, case: tuple[str, str, str]) -> None:
    """With a cache as without, where every pass reads whole texts."""
    lm = language_model("qwen2")
    one = gated(lm, gate_for(lm, *case))
    inputs = left_padded(lm, TEXTS)
    settings = {"max_new_tokens": NEW, "pad_token_id": 0, "num_return_sequences": 2, **options}
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        with lm.steered(one):
            found.append(lm.model.generate(**inputs, **settings, use_cache=cached).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids="/".join)
def test_a_cache_whose_rows_move_takes_its_decisions_along(case: tuple[str, str, str]) -> None:
    lm = language_model("llama")
    gate = gate_for(lm, *case)
    ids = torch.tensor([token_ids(text)[:5] for text in TEXTS])
    # By a threshold that tells these beginnings apart.
    if gate.kind != "token":
        read = None if case[2] == "last" else range(1, 5)
        values = [
            prompt_score(lm.model, row, READ, case[1], vector(lm, 7), read) for row in ids.tolist()
        ]
        gate = replace(gate, conditions=(replace(gate.conditions[0], threshold=between(values)),))
    order = torch.tensor([4, 2, 0, 3, 1])
    name, new = cache_argument(lm.anatomy.body), torch.full((5, 1), 60)
    with torch.no_grad(), lm.steered(gated(lm, gate)):
        cache = DynamicCache(config=lm.model.config)
        lm.model(ids, use_cache=True, **{name: cache})
        cache.reorder_cache(order)
        moved = lm.model(new, **{name: cache}).logits[:, -1]
    for row, source in enumerate(order.tolist()):
        text = [*ids[source].tolist(), 60]
        where = fires_by_hand(lm, gate, text, 5)
        with torch.no_grad(), adding(lm.model, STEERED, where, DIAL * vector(lm)):
            expected = lm.model(torch.tensor([text]), use_cache=False).logits[0, -1]
        assert relative(moved[row], expected) < 1e-5


@pytest.mark.parametrize("reads", ["all[1:]", "last"])
def test_a_later_turn_is_decided_anew_on_the_cache_of_the_earlier_one(reads: str) -> None:
    lm = language_model("llama")
    first, second = token_ids(TEXTS[0]), token_ids(TEXTS[1])[1:]
    read = None if reads == "last" else range(1, len(first) + 2 + len(second))
    whole = [*first, 60, 61, *second]
    early = prompt_score(
        lm.model, first, READ, "cosine", vector(lm, 7), read and range(1, len(first))
    )
    late = prompt_score(lm.model, whole, READ, "cosine", vector(lm, 7), read)
    condition = Condition(
        f"layers.{READ}.resid", vector(lm, 7), (early + late) / 2,
        "above" if late > early else "below", reads=reads,  # type: ignore[arg-type]
    )  # fmt: skip
    name = cache_argument(lm.anatomy.body)
    options: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), lm.steered(gated(lm, Gate((condition,), "latched"))):
        cache = DynamicCache(config=lm.model.config)
        lm.model(torch.tensor([[*first, 60, 61]])[:, : len(first)], **{name: cache})
        lm.model(torch.tensor([[60]]), **{name: cache})
        lm.model(torch.tensor([[61]]), **{name: cache})
        found = lm.model.generate(torch.tensor([whole]), **{name: cache}, **options)
    end = len(whole)
    expected = written(
        lm.model, whole, 4, lambda now: [i >= end - 1 for i in range(len(now))], STEERED,
        DIAL * vector(lm),
    )  # fmt: skip
    assert found[0, end:].tolist() == expected


# -- the algebra ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["token", "latched", "two-pass"])
def test_an_endless_threshold_is_always_or_never_bit_by_bit(kind: Any) -> None:
    lm = language_model("llama")
    base = gate_for(lm, kind)

    def logits(threshold: float, fires: str) -> Tensor:
        condition = replace(base.conditions[0], threshold=threshold, fires=fires)
        one = gated(lm, Gate((condition,), kind))
        found: Tensor = lm.logits(TEXTS, steering=one)
        with lm.steered(one):
            raw = lm.model(**left_padded(lm, TEXTS)).logits[:, -1]
        # Some processors round products of another width otherwise.
        assert torch.equal(raw.float(), found) or relative(raw.float(), found) < 5e-6
        return found

    always = replace(gated(lm, base), gate=None)
    for threshold, fires in ((-torch.inf, "above"), (torch.inf, "below")):
        assert torch.equal(logits(threshold, fires), lm.logits(TEXTS, steering=always))
    for threshold, fires in ((torch.inf, "above"), (-torch.inf, "below")):
        assert torch.equal(logits(threshold, fires), lm.logits(TEXTS))


@pytest.mark.parametrize("kind", ["latched", "two-pass"])
def test_below_takes_the_rows_that_above_leaves(kind: Any) -> None:
    lm = language_model("llama")
    above = gate_for(lm, kind)
    below = Gate((replace(above.conditions[0], fires="below"),), kind)
    fired = [
        [each.gates[0].fired for each in lm.generate(
            TEXTS, chat=False, max_new_tokens=1, steering=gated(lm, gate)
        )]
        for gate in (above, below, ~above)
    ]  # fmt: skip
    assert fired[1] == fired[2] == [not each for each in fired[0]]
    assert set(fired[0]) == {True, False}


def test_rules_are_those_of_de_morgan() -> None:
    lm = language_model("llama")
    a, b = gate_for(lm, "token"), gate_for(lm, "token", "projection")
    scores = [torch.randn(4, 50), torch.randn(4, 50)]
    assert torch.equal((~(a & b)).decide(scores), (~a | ~b).decide(scores))
    assert torch.equal((~(a | b)).decide(scores), (~a & ~b).decide(scores))
    assert torch.equal((a & ~a).decide([scores[0]] * 2), torch.zeros(4, 50, dtype=torch.bool))
    scores[0][0] = torch.nan
    assert not (~a | b).decide(scores)[0].any(), "what cannot be scored does not fire"
    three = (a | b) & ~a
    assert three.rule == ("and", ("or", 0, 1), ("not", 2))
    assert three.decide([*scores, scores[0]]).equal(
        (a.decide(scores[:1]) | b.decide(scores[1:])) & ~a.decide(scores[:1]) & ~scores[0].isnan()
    )


def test_the_score_of_the_authors_has_no_sign() -> None:
    condition = Condition("layers.0.resid", torch.randn(32), 0.0, score="compat")
    x = torch.randn(20, 32)
    assert torch.allclose(condition.scores(x), condition.scores(-x))
    # Where nothing saturates it is the size of the cosine.
    cosine = replace(condition, score="cosine")
    assert torch.allclose(condition.scores(x * 1e-3), cosine.scores(x).abs(), atol=1e-4)


@pytest.mark.parametrize("score", BY_HAND)
def test_scores_are_their_formulas_whatever_the_batch(score: Any) -> None:
    x, v = torch.randn(3, 7, 48), torch.randn(48)
    bias = 0.25 if score == "probe" else 0.0
    condition = Condition("layers.0.resid", v, 0.0, score=score, bias=bias)
    found = condition.scores(x)
    for row in range(3):
        for token in range(7):
            expected = BY_HAND[score](x[row, token].double(), v.double())
            assert abs(float(found[row, token]) - expected) < 1e-4 * max(1, abs(expected))
            assert condition.scores(x[row, token]) == found[row, token]


# -- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids="/".join)
def test_generate_says_which_rows_fired_and_by_which_scores(case: tuple[str, str, str]) -> None:
    lm = language_model("llama")
    gate = gate_for(lm, *case)
    done = lm.generate(TEXTS, chat=False, max_new_tokens=NEW, steering=gated(lm, gate))
    for text, each in zip(TEXTS, done, strict=True):
        ids = token_ids(text)
        (said,) = each.gates
        where = fires_by_hand(lm, gate, [*ids, *each.tokens[:-1]], len(ids))
        assert said.fired == any(where)
        read = None if case[2] == "last" else range(1, len(ids))
        if gate.kind == "token":
            assert said.prompt_tokens == sum(where[: len(ids)])
            assert said.new_tokens == sum(where[len(ids) :])
            expected = token_scores(lm.model, ids, READ, case[1], vector(lm, 7))[-1]
        else:
            assert said.prompt_tokens is None
            expected = prompt_score(lm.model, ids, READ, case[1], vector(lm, 7), read)
        assert said.scores[0] == pytest.approx(expected, abs=1e-4)
        assert said.thresholds == (gate.conditions[0].threshold,)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids="/".join)
def test_explain_shows_where_it_acts(case: tuple[str, str, str]) -> None:
    lm = language_model("llama")
    gate = gate_for(lm, *case)
    for text in TEXTS[:3]:
        found = gated(lm, gate).explain(lm, text, chat=False, max_new_tokens=4)
        expected = fires_by_hand(lm, gate, list(found.ids), found.prompt)
        assert [bool(weight) for weight in found.fires[0].weights] == expected


# -- texts that are read --------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids="/".join)
def test_next_tokens_and_log_odds_are_read_under_the_gate(case: tuple[str, str, str]) -> None:
    lm = language_model("llama")
    gate = gate_for(lm, *case)
    one = gated(lm, gate)
    readings = [prompt_reading(token_ids(text)) for text in TEXTS]
    found = {}
    for batch, nexts in next_tokens(lm, readings, one):
        found |= dict(zip(batch.rows, nexts, strict=True))
    for i, text in enumerate(TEXTS):
        assert int(found[i].best[0]) == by_hand(lm, gate, text, 1)[0]
        ids = token_ids(text)
        assert found[i].gates[0].fired == any(fires_by_hand(lm, gate, ids, len(ids)))
    pairs = tt.Contrast.from_pairs([(text, " yes", " no way") for text in TEXTS])
    odds = log_odds(lm, pairs, one)
    for i, text in enumerate(TEXTS):
        prompt, sides = token_ids(text), [token_ids(text + end) for end in (" yes", " no way")]
        sums = []
        for side in sides:
            where = fires_by_hand(lm, gate, side, len(prompt))
            with torch.no_grad(), adding(lm.model, STEERED, where, DIAL * vector(lm)):
                logits = lm.model(torch.tensor([side]), use_cache=False).logits[0].double()
            log_p = logits.log_softmax(-1)
            sums.append(sum(float(log_p[j - 1, side[j]]) for j in range(len(prompt), len(side))))
        assert float(odds[i]) == pytest.approx(sums[0] - sums[1], abs=1e-4)


@pytest.mark.parametrize("kind", ["token", "latched", "two-pass"])
def test_a_budget_is_kept_where_the_gate_fires(kind: Any) -> None:
    """The dial is that of the steering without its gate; rows that do not fire are unsteered."""
    lm = language_model("llama")
    one = with_range(gated(lm, gate_for(lm, kind), "last"))
    plain = raw_greedy(lm, TEXTS, NEW)
    free = lm.generate(
        TEXTS, chat=False, max_new_tokens=NEW, steering=within(replace(one, gate=None), kl=0.5)
    )
    kept = lm.generate(TEXTS, chat=False, max_new_tokens=NEW, steering=within(one, kl=0.5))
    with lm.steered(within(one, kl=0.5)):
        raw = raw_greedy(lm, TEXTS, NEW)
    assert [list(each.tokens) for each in kept] == raw
    for i, each in enumerate(kept):
        if kind != "token":
            expected = list(free[i].tokens) if each.gates[0].fired else plain[i]
            assert raw[i] == expected
    assert raw != plain


# -- what is refused ------------------------------------------------------------------------------


def test_what_could_not_decide_in_time_is_refused() -> None:
    lm = language_model("llama")
    above = Condition("layers.2.resid", vector(lm), 0.0)
    plain = steer(lm, ("layers.1.resid", Add(vector(lm))))
    for kind in ("token", "latched"):
        refused_in_one_line(
            lambda kind=kind: plain.scoped("last").gated(Gate((above,), kind)), "reads below"
        )
    plain.gated(Gate((above,), "two-pass"))
    low = Gate((Condition("layers.0.resid", vector(lm), 0.0),), "latched")
    refused_in_one_line(lambda: plain.gated(low), "acts on earlier ones")
    late = plain.scoped("generated[:4]").gated(low)
    refused_in_one_line(lambda: late.scoped("all"), "acts on earlier ones")
    refused_in_one_line(lambda: tt.bake(lm, late), "cannot bake a gated")
    wide = Gate((Condition("layers.0.resid", torch.ones(5), 0.0),), "token")
    refused_in_one_line(lambda: lm.logits(TEXTS, steering=plain.gated(wide)), "the gate has 5")
    refused_in_one_line(lambda: plain.gated("low.safetensors"), "Gate.load")  # type: ignore[arg-type]
    other = replace(low, model=replace(plain.model, digest="0" * 64))
    refused_in_one_line(lambda: plain.scoped("last").gated(other), "was made for")


def test_bad_conditions_and_rules_are_one_line() -> None:
    good = torch.ones(4)
    for make, says in (
        (lambda: Condition("layers.0.resid", torch.zeros(4), 0.0), "direction"),
        (lambda: Condition("layers.0.resid", good * torch.nan, 0.0), "direction"),
        (lambda: Condition("layers.0.resid", [1.0, 2.0], 0.0), "a tensor"),  # type: ignore[arg-type]
        (lambda: Condition("layers.0.resid", good, torch.nan), "threshold"),
        (lambda: Condition("layers.0.resid", good, 0.0, "over"), "fires"),  # type: ignore[arg-type]
        (lambda: Condition("layers.0.resid", good, 0.0, score="dot"), "score"),  # type: ignore[arg-type]
        (lambda: Condition("layers.0.resid", good, 0.0, bias=1.0), "bias"),
        (lambda: Condition("nowhere", good, 0.0), "unknown site"),
        (lambda: Condition("layers.0.resid", good, 0.0, reads="generated"), "cannot read"),  # type: ignore[arg-type]
        (lambda: Condition("layers.0.resid", good, 0.0, reads="prompt[-3:]"), "cannot read"),  # type: ignore[arg-type]
        (lambda: Gate(()), "1 to 256 conditions"),
        (lambda: Gate((Condition("layers.0.resid", good, 0.0),), rule=1), "no rule"),
        (lambda: Gate((Condition("layers.0.resid", good, 0.0),), rule=("xor", 0, 0)), "no rule"),
        (lambda: Gate((Condition("layers.0.resid", good, 0.0),), "once"), "kind"),  # type: ignore[arg-type]
    ):
        refused_in_one_line(make, says)


def test_a_cache_that_nobody_watched_is_refused() -> None:
    lm = language_model("llama")
    ids = torch.tensor([token_ids(TEXTS[0])])
    name = cache_argument(lm.anatomy.body)
    for kind in ("latched", "two-pass"):
        one = gated(lm, gate_for(lm, kind), "last")
        cache = lm.model(ids[:, :4], use_cache=True).past_key_values
        with lm.steered(one):
            refused_in_one_line(
                lambda cache=cache: lm.model(ids[:, 4:], **{name: cache}), "KV cache|whole prompts"
            )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token", "latched", "two-pass"])
@pytest.mark.parametrize("name", sorted(CURATED))
def test_every_curated_architecture_decides_alike_however_it_is_read(name: str, kind: Any) -> None:
    """Alone as in a batch, with a cache as without, in parts as at once."""
    lm = tt.wrap(curated_model(name), tiny_tokenizer(), name)
    lm.model.generation_config.eos_token_id = None
    width = lm.anatomy.width("layers.0.resid")
    direction = torch.randn(width, generator=torch.Generator().manual_seed(7))
    plain = steer(lm, (f"layers.{lm.anatomy.layers - 1}.resid", Add(4 * torch.ones(width))))
    ungated = Condition("layers.0.resid", direction, 0.0)
    texts = [list(lm.tokenizer(text)["input_ids"]) for text in TEXTS]
    scores = decisions(lm.anatomy, lm.marks, Gate((ungated,), "latched"), texts)
    limit = between([float(each.scores[0] or 0) for each in scores])
    gate = Gate((replace(ungated, threshold=limit),), kind)
    one = plain.scoped(SCOPE_OF[kind]).gated(gate)
    alone = []
    for text in TEXTS:
        with lm.steered(one):
            alone += raw_greedy(lm, [text], 4)
            assert raw_greedy(lm, [text], 4, use_cache=False) == alone[-1:]
    done = lm.generate(TEXTS, chat=False, max_new_tokens=4, steering=one)
    assert [list(each.tokens) for each in done] == alone
    if kind != "token":
        assert {each.gates[0].fired for each in done} == {True, False}
