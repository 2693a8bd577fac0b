"""Directional ablation: how the layer and the token of its direction are chosen.

Scores come from `reference`, the models written out in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from ablations import (
    CHAT,
    PAIRS,
    ablating,
    difference_of,
    direction_of,
    ids_of,
    logits_of,
    named,
    sides,
    targets_of,
    tiny_lm,
)
from helpers import few_quick, relative
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast

#: The last ones, as many as the tiny chat template has after a text.
TOKENS = (-1, -2, -3, -4)
#: Places among which every rule of the choice makes a difference; None for all of the template.
CHAT_TOKENS = {"llama": None, "gemma2": (-1, -3)}
PAIR_TOKENS = {"llama": (-3, -4), "gemma2": (-1, -3)}


# -- the definitions, without trimtab ---------------------------------------------------------


def _added(difference: Tensor, layer: int) -> dict[str, Any]:
    site = "embed" if layer == 0 else f"layers.{layer - 1}.resid"
    return {site: lambda x: x + difference}


def _score(name: str, ids: list[int], targets: Sequence[int], edits: Any = None) -> float:
    p = float(logits_of(name, ids, edits)[-1].softmax(-1)[list(targets)].sum())
    return math.log(p + 1e-8) - math.log(1 - p + 1e-8)


def _log_likelihood(name: str, prompt: str, answer: str, edits: Any) -> float:
    ids, start = ids_of(prompt, answer), len(ids_of(prompt))
    log_p = logits_of(name, ids, edits).log_softmax(-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class _Oracle:
    """Score, KL and induced score of every candidate on the validation rows."""

    def __init__(
        self,
        name: str,
        contrast: Contrast,
        tokens: Sequence[int],
        targets: Sequence[int] = (),
        train: Contrast | None = None,
        validation: Contrast | None = None,
    ) -> None:
        self.name, self.targets = name, targets
        self.train = train or contrast.train
        self.validation = validation or contrast.part("validation")
        if contrast.paired:
            self.other = [ids_of(pair.prompt) for pair in self.validation.pairs]
        else:
            self.shown, self.other = sides(self.validation)
        self.base = [logits_of(name, ids)[-1].log_softmax(-1) for ids in self.other]
        self.unsteered = self.score(None)
        layers = 4 if name == "gemma2" else 3
        self.table: dict[tuple[int, int], tuple[float, float, float]] = {}
        for layer in range(layers):
            for token in tokens:
                difference = difference_of(name, self.train, layer, token)
                if difference.norm() > 1e-9:
                    self.table[layer, token] = self.measure(difference, layer)

    def measure(self, difference: Tensor, layer: int) -> tuple[float, float, float]:
        ablated, added = ablating(self.name, difference), _added(difference, layer)
        kl = []
        for ids, base in zip(self.other, self.base, strict=True):
            steered = logits_of(self.name, ids, ablated)[-1].log_softmax(-1)
            kl.append(float((base.exp() * (base - steered)).sum()))
        if self.validation.paired:
            induced = self.score(added) - self.unsteered
        else:
            induced = _mean([_score(self.name, ids, self.targets, added) for ids in self.other])
        return self.score(ablated), _mean(kl), induced

    def score(self, edits: Any) -> float:
        if not self.validation.paired:
            return _mean([_score(self.name, ids, self.targets, edits) for ids in self.shown])
        return _mean(
            [
                _log_likelihood(self.name, str(pair.prompt), pair.positive, edits)
                - _log_likelihood(self.name, str(pair.prompt), pair.negative, edits)
                for pair in self.validation.pairs
            ]
        )

    def best(
        self, kl: float = math.inf, induced: float = 0.0, layers: int = 99
    ) -> tuple[tuple[int, int], int]:
        """The choice among what passes, and how many pass."""
        passed = {
            place: row[0]
            for place, row in self.table.items()
            if row[1] <= kl and row[2] >= induced and place[0] < layers
        }
        return min(passed, key=lambda place: passed[place]), len(passed)


def _target_ids(targets: Sequence[str]) -> list[int]:
    encoded = [tiny_tokenizer().encode(text, add_special_tokens=False) for text in targets]
    return [ids[0] for ids in encoded]


@functools.cache
def _chat_oracle(name: str) -> _Oracle:
    return _Oracle(name, CHAT, CHAT_TOKENS[name] or TOKENS, _target_ids(targets_of(name)))


@functools.cache
def _pair_oracle(name: str) -> _Oracle:
    return _Oracle(name, PAIRS, PAIR_TOKENS[name])


# -- the choice -------------------------------------------------------------------------------


def _check_choice(
    steering: tt.Steering, oracle: _Oracle, place: tuple[int, int], passed: int, candidates: int
) -> None:
    found = steering.findings
    assert (found["chosen"]["layer"], found["chosen"]["token"]) == place
    score, kl, induced = oracle.table[place]
    assert found["chosen"]["score"] == pytest.approx(score, abs=2e-3)
    assert found["chosen"]["kl"] == pytest.approx(kl, abs=1e-4)
    assert found["chosen"]["induced"] == pytest.approx(induced, abs=2e-3)
    assert found["unsteered_score"] == pytest.approx(oracle.unsteered, abs=2e-3)
    assert (found["passed"], found["candidates"]) == (passed, candidates)
    layer, token = place
    assert found["source_site"] == ("embed" if layer == 0 else f"layers.{layer - 1}.resid")
    assert found["token"] == token
    expected = difference_of(oracle.name, oracle.train, layer, token)
    assert relative(direction_of(steering), expected / expected.norm()) < 1e-4


@pytest.mark.parametrize("name", few_quick(["llama", "gemma2"], "llama"))
def test_the_choice_from_unpaired_chats(name: str) -> None:
    oracle, count = _chat_oracle(name), 8 if name == "gemma2" else 12
    free, passed = oracle.best()
    # Without the rule that adding must cause the behaviour, it is another: the rule bites.
    assert oracle.best(induced=-math.inf)[0] != free
    method = tt.Ablation(targets=targets_of(name), kl=1e9, depth=1, tokens=CHAT_TOKENS[name])
    _check_choice(method.fit(tiny_lm(name), CHAT), oracle, free, passed, count)
    # Just below its KL: the next one.
    bound = oracle.table[free][1] * 0.999
    place, passed = oracle.best(kl=bound)
    assert place != free
    _check_choice(replace(method, kl=bound).fit(tiny_lm(name), CHAT), oracle, place, passed, count)


@pytest.mark.parametrize("name", few_quick(["llama", "gemma2"], "gemma2"))
def test_the_choice_from_pairs(name: str) -> None:
    oracle, layers = _pair_oracle(name), 4 if name == "gemma2" else 3
    free, passed = oracle.best()
    assert oracle.best(induced=-math.inf)[0] != free
    method = tt.Ablation(kl=1e9, depth=1, tokens=PAIR_TOKENS[name])
    _check_choice(method.fit(tiny_lm(name), PAIRS), oracle, free, passed, 2 * layers)
    bound = oracle.table[free][1] * 0.999
    place, passed = oracle.best(kl=bound)
    assert place != free
    _check_choice(
        replace(method, kl=bound).fit(tiny_lm(name), PAIRS), oracle, place, passed, 2 * layers
    )


def test_swapped_pairs_are_scored_the_other_way_around() -> None:
    # Added, a swapped direction makes the old negatives likelier: which pass is another question.
    swapped = replace(
        PAIRS,
        rows=tuple(replace(p, positive=p.negative, negative=p.positive) for p in PAIRS.pairs),
    )
    oracle = _Oracle("llama", swapped, (-1,))
    place, passed = oracle.best()
    method = tt.Ablation(kl=1e9, depth=1, tokens=(-1,))
    _check_choice(method.fit(tiny_lm(), swapped), oracle, place, passed, 3)
    assert oracle.unsteered == pytest.approx(-_pair_oracle("llama").unsteered, abs=1e-6)


@pytest.mark.parametrize("contrast", ["chats", "pairs"])
def test_the_depth_limits_the_choice(contrast: str) -> None:
    name = "gemma2"
    oracle = _chat_oracle(name) if contrast == "chats" else _pair_oracle(name)
    (deep, _), _ = oracle.best()
    assert deep > 1
    place, passed = oracle.best(layers=deep)
    tokens = CHAT_TOKENS[name] if contrast == "chats" else PAIR_TOKENS[name]
    assert tokens
    method = tt.Ablation(targets=targets_of(name), kl=1e9, depth=deep / 4, tokens=tokens)
    steering = method.fit(tiny_lm(name), CHAT if contrast == "chats" else PAIRS)
    _check_choice(steering, oracle, place, passed, len(tokens) * deep)


def test_the_choice_is_made_where_it_is_ablated() -> None:
    """With another `where` other sites are edited when a direction is tried."""
    oracle = _Oracle("llama", CHAT, (), _target_ids(targets_of("llama")))
    steering = tt.Ablation(targets=targets_of("llama"), kl=1e9, depth=1, where="layer").fit(
        tiny_lm(), CHAT
    )
    layer, token = steering.findings["chosen"]["layer"], steering.findings["token"]
    difference = difference_of("llama", CHAT.train, layer, token)
    r = difference / difference.norm()
    edits = {f"layers.{layer - 1}.resid": lambda x: x - torch.outer(x @ r, r)}
    assert steering.findings["chosen"]["score"] == pytest.approx(oracle.score(edits), abs=2e-3)
    assert named(steering) == [f"layers.{layer - 1}.resid"]


@pytest.mark.parametrize("contrast", [CHAT, PAIRS])
def test_no_direction_that_passes_is_an_error(contrast: Contrast) -> None:
    targets = targets_of("llama")
    for options in ({"kl": 1e-9}, {"kl": -1.0}):
        with pytest.raises(tt.TrimtabError, match=r"none of \d+ directions will do: \d+ change"):
            tt.Ablation(targets=targets, **options).fit(tiny_lm(), contrast)  # type: ignore[arg-type]


def test_a_direction_that_never_causes_the_behaviour_is_an_error() -> None:
    # Two rare targets: their score stays below 0, whatever is added.
    with pytest.raises(tt.TrimtabError, match="none of .* directions"):
        tt.Ablation(targets=("z", "Q"), kl=1e9).fit(tiny_lm(), CHAT)


def test_a_score_that_is_no_number_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.methods.ablation_choice as module

    for what in ("kl", "induced"):
        with monkeypatch.context() as patch:
            patch.setattr(module.Scored, what, lambda self, steering: math.nan)
            with pytest.raises(tt.TrimtabError, match="none of .* directions"):
                tt.Ablation(targets=targets_of("llama"), kl=1e9, depth=1).fit(tiny_lm(), CHAT)


def test_targets_count_by_their_first_token_and_each_once() -> None:
    from trimtab.methods.ablation_choice import scores

    longer = [" ships and maps", " map!", " mazes"]  # of many tokens each
    prompts = [CHAT.texts[0].text, CHAT.texts[-1].text]
    ids = sorted({*_target_ids(longer)})
    assert len(ids) == 2
    expected = [_score("llama", ids_of(prompt), ids) for prompt in prompts]
    assert scores(tiny_lm(), prompts, longer).tolist() == pytest.approx(expected, abs=1e-3)


def test_targets_that_are_all_there_is_have_a_finite_score() -> None:
    """Rounded to float32, probabilities may sum to more than 1."""
    texts = {tiny_tokenizer().decode([token]) for token in range(400)}
    method = tt.Ablation(targets=tuple(sorted(texts - {""})), kl=1e9, depth=1)
    steering = method.fit(tiny_lm(), CHAT)
    ids = sorted(set(_target_ids(method.targets or ())))
    expected = _mean([_score("llama", i, ids) for i in sides(CHAT.part("validation"))[0]])
    assert math.isfinite(expected)
    assert steering.findings["unsteered_score"] == pytest.approx(expected, abs=0.01)


def test_a_certain_target_has_a_finite_score(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.methods.ablation_choice import scores

    logits = torch.randn(200, 400, generator=torch.Generator().manual_seed(0))
    logits[:, 65:70] += 60
    monkeypatch.setattr(tt.LanguageModel, "logits", lambda self, prompts, **options: logits)
    ids = [tiny_tokenizer().decode([token]) for token in range(65, 70)]
    found = scores(tiny_lm(), [""] * 200, ids)
    # eps is all that is left of 1 - P.
    assert found == pytest.approx(-math.log(1e-8), abs=1e-6)


# -- typical texts only -----------------------------------------------------------------------


def _typical(contrast: Contrast, targets: Sequence[int]) -> Contrast:
    rows = tuple(
        row
        for row in contrast.texts
        if (row.label == "positive") == (_score("llama", ids_of(row.text), targets) > 0)
    )
    return replace(contrast, rows=rows)


def test_typical_texts_are_those_that_the_model_itself_treats_as_labelled() -> None:
    targets = targets_of("llama")
    ids = _target_ids(targets)
    train, validation = CHAT.train, CHAT.part("validation")
    kept, kept_validation = _typical(train, ids), _typical(validation, ids)
    assert 2 < len(kept) < len(train)
    assert {row.label for row in kept.texts} == {"positive", "negative"}
    method = tt.Ablation(layer=2, typical=True, targets=targets)
    expected = difference_of("llama", kept, 2, -1)
    steering = method.fit(tiny_lm(), CHAT)
    assert relative(direction_of(steering), expected / expected.norm()) < 1e-4
    everything = difference_of("llama", train, 2, -1)
    assert relative(direction_of(steering), everything / everything.norm()) > 1e-2
    # The choice, too, is made on typical texts.
    assert len(kept_validation) < len(validation)
    assert {row.label for row in kept_validation.texts} == {"positive", "negative"}
    oracle = _Oracle("llama", CHAT, TOKENS, ids, kept, kept_validation)
    place, passed = oracle.best()
    method = tt.Ablation(typical=True, targets=targets, kl=1e9, depth=1)
    _check_choice(method.fit(tiny_lm(), CHAT), oracle, place, passed, 12)


def test_typical_without_a_text_of_one_side_is_refused() -> None:
    with pytest.raises(tt.TrimtabError, match="treats no text of one side as labelled"):
        tt.Ablation(layer=1, typical=True, targets=("z",)).fit(tiny_lm(), CHAT)


def test_typical_needs_unpaired_texts_and_targets() -> None:
    for method, contrast in (
        (tt.Ablation(layer=1, typical=True), CHAT),
        (tt.Ablation(layer=1, typical=True, targets=("I",)), PAIRS),
    ):
        with pytest.raises(tt.TrimtabError, match="typical needs an unpaired contrast"):
            method.fit(tiny_lm(), contrast)
