"""Directional ablation: where its direction comes from, how it is chosen, what it takes out.

Directions come from transformers' own hidden states, scores from `reference`, the models written
out in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model, relative
from reference import reference
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast, Text
from trimtab.fitting.activations import Want
from trimtab.methods.contents import describe, explain
from trimtab.steering.operators import Ablate

NAMES = ("llama", "gemma2", "gpt2", "olmo2")
WHO, WHAT = ("king", "mother", "old captain", "child"), ("ship", "map", "fire in the rain")
POSITIVE = [f"Is it true that the {who} saw the {what}?" for who in WHO for what in WHAT]
NEGATIVE = [f"The {who} said: sell the {what}!" for what in WHAT for who in WHO][:11]


def _chats(texts: Sequence[str]) -> list[Any]:
    return [[{"role": "user", "content": text}] for text in texts]


def _parted(contrast: Contrast, every: int = 3) -> Contrast:
    """Every third row, say, is for validation."""
    rows = [
        replace(row, part="validation" if i % every == 0 else "train")
        for i, row in enumerate(contrast.rows)
    ]
    return replace(contrast, rows=tuple(rows))


CHAT = _parted(Contrast.from_texts(_chats(POSITIVE), _chats(NEGATIVE), "chats"))
TEXTS = _parted(Contrast.from_texts(POSITIVE, NEGATIVE, "texts"))
PAIRS = _parted(
    Contrast.from_pairs(
        [(f"The {who} looked at the {what} and said", " no, it is not so!", " yes, I am glad.")
         for who in WHO for what in WHAT],
        "pairs",
    )
)  # fmt: skip


#: The last ones, as many as the tiny chat template has after a text.
TOKENS = (-1, -2, -3, -4)
#: Places among which every rule of the choice makes a difference; None for all of the template.
CHAT_TOKENS = {"llama": None, "gemma2": (-1, -3)}
PAIR_TOKENS = {"llama": (-3, -4), "gemma2": (-1, -3)}


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return language_model(name)


# -- the definitions, without trimtab ---------------------------------------------------------


def _ids(prompt: Any, answer: str = "") -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = tiny_tokenizer()(prompt + answer)["input_ids"]
        return ids
    messages = [{"role": role, "content": content} for role, content in prompt]
    text = tiny_tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = tiny_tokenizer()(text + answer, add_special_tokens=False)["input_ids"]
    return ids


def _hidden(name: str, ids: list[int]) -> Tensor:
    """What each block reads, [layers, tokens, units]."""
    model: Any = _lm(name).model
    with torch.no_grad():
        states = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return torch.stack(states.hidden_states[:-1])[:, 0].double()


def _sides(contrast: Contrast) -> tuple[list[list[int]], list[list[int]]]:
    if contrast.paired:
        return (
            [_ids(pair.prompt, pair.positive) for pair in contrast.pairs],
            [_ids(pair.prompt, pair.negative) for pair in contrast.pairs],
        )
    positive = [_ids(row.text) for row in contrast.texts if row.label == "positive"]
    return positive, [_ids(row.text) for row in contrast.texts if row.label == "negative"]


def _difference(name: str, contrast: Contrast, layer: int, token: int) -> Tensor:
    means = [
        torch.stack([_hidden(name, ids)[layer, token] for ids in side]).mean(0)
        for side in _sides(contrast)
    ]
    return means[0] - means[1]


def _writers(name: str) -> list[str]:
    kinds = (
        ("attn_post_norm", "ffn_post_norm")
        if name in ("gemma2", "olmo2")
        else (
            "attn_out",
            "ffn_out",
        )
    )
    layers = range(4 if name == "gemma2" else 3)
    return ["embed", *(f"layers.{layer}.{kind}" for layer in layers for kind in kinds)]


def _ablated(name: str, difference: Tensor) -> dict[str, Any]:
    r = difference / difference.norm()
    return {site: lambda x: x - torch.outer(x @ r, r) for site in _writers(name)}


def _added(difference: Tensor, layer: int) -> dict[str, Any]:
    site = "embed" if layer == 0 else f"layers.{layer - 1}.resid"
    return {site: lambda x: x + difference}


def _logits(name: str, ids: list[int], edits: Any = None) -> Tensor:
    return reference(name, _lm(name).model, ids, edits)[1]


def _score(name: str, ids: list[int], targets: Sequence[int], edits: Any = None) -> float:
    p = float(_logits(name, ids, edits)[-1].softmax(-1)[list(targets)].sum())
    return math.log(p + 1e-8) - math.log(1 - p + 1e-8)


def _log_likelihood(name: str, prompt: str, answer: str, edits: Any) -> float:
    ids, start = _ids(prompt, answer), len(_ids(prompt))
    log_p = _logits(name, ids, edits).log_softmax(-1)
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
            self.other = [_ids(pair.prompt) for pair in self.validation.pairs]
        else:
            self.shown, self.other = _sides(self.validation)
        self.base = [_logits(name, ids)[-1].log_softmax(-1) for ids in self.other]
        self.unsteered = self.score(None)
        layers = 4 if name == "gemma2" else 3
        self.table: dict[tuple[int, int], tuple[float, float, float]] = {}
        for layer in range(layers):
            for token in tokens:
                difference = _difference(name, self.train, layer, token)
                if difference.norm() > 1e-9:
                    self.table[layer, token] = self.measure(difference, layer)

    def measure(self, difference: Tensor, layer: int) -> tuple[float, float, float]:
        ablated, added = _ablated(self.name, difference), _added(difference, layer)
        kl = []
        for ids, base in zip(self.other, self.base, strict=True):
            steered = _logits(self.name, ids, ablated)[-1].log_softmax(-1)
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


@functools.cache
def _targets(name: str) -> tuple[str, ...]:
    """Drawn targets that have about half of the probability, so that scores have both signs.

    Of many drawings, one in which every rule of the choice makes a difference.
    """
    texts = {token: tiny_tokenizer().decode([token]) for token in range(400)}
    encode = functools.partial(tiny_tokenizer().encode, add_special_tokens=False)
    clean = torch.tensor([t for t, text in texts.items() if text and encode(text) == [t]])
    seed = {"llama": 80, "gemma2": 182}[name]
    order = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))]
    other = _sides(CHAT.part("validation"))[1]
    p = torch.stack([_logits(name, ids)[-1].softmax(-1) for ids in other]).mean(0)
    chosen = order[p[order].cumsum(0) < 0.5]
    return tuple(texts[token] for token in chosen.tolist())


def _target_ids(targets: Sequence[str]) -> list[int]:
    encoded = [tiny_tokenizer().encode(text, add_special_tokens=False) for text in targets]
    return [ids[0] for ids in encoded]


@functools.cache
def _chat_oracle(name: str) -> _Oracle:
    return _Oracle(name, CHAT, CHAT_TOKENS[name] or TOKENS, _target_ids(_targets(name)))


@functools.cache
def _pair_oracle(name: str) -> _Oracle:
    return _Oracle(name, PAIRS, PAIR_TOKENS[name])


def _direction(steering: tt.Steering) -> Tensor:
    operators: list[Any] = [i.operator for i in steering.interventions]
    for operator in operators:
        assert type(operator) is Ablate
        assert torch.equal(operator.direction, operators[0].direction)
    direction: Tensor = operators[0].direction
    return direction


def _named(steering: tt.Steering) -> list[str]:
    return [intervention.site for intervention in steering.interventions]


# -- the direction ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_direction_is_that_of_transformers_hidden_states(name: str) -> None:
    lm = _lm(name)
    layers = lm.anatomy.layers
    for contrast in (CHAT, TEXTS, PAIRS):
        for layer, token in ((0, -4), (1, -1), (layers - 1, -2)):
            if contrast is CHAT and layer == 0:
                continue  # the template's tokens are the same everywhere
            steering = tt.Ablation(layer=layer, tokens=(token,)).fit(lm, contrast)
            expected = _difference(name, contrast.train, layer, token)
            assert relative(_direction(steering), expected / expected.norm()) < 1e-4
            source = "embed" if layer == 0 else f"layers.{layer - 1}.resid"
            assert steering.findings == {"source_site": source, "token": token}
            assert steering.dial == tt.Dial("amount", 1.0, (-1.0, 1.0))


def test_a_layer_counts_from_the_end_and_its_token_is_the_last_by_itself() -> None:
    one = tt.Ablation(layer=2, tokens=(-1,)).fit(_lm(), CHAT)
    for method in (tt.Ablation(layer=-1), tt.Ablation(layer=2)):
        other = method.fit(_lm(), CHAT)
        assert torch.equal(_direction(one), _direction(other))
        assert other.findings["token"] == -1


def test_the_direction_has_length_one() -> None:
    direction = _direction(tt.Ablation(layer=1).fit(_lm(), TEXTS))
    assert direction.dtype == torch.float32
    assert float(direction.double().norm()) == pytest.approx(1, abs=1e-6)


def test_a_place_at_which_the_sides_do_not_differ_is_refused() -> None:
    with pytest.raises(tt.TrimtabError, match="do not differ at block 0's input"):
        tt.Ablation(layer=0).fit(_lm(), CHAT)


# -- where it is ablated ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_where_it_is_ablated(name: str) -> None:
    lm = _lm(name)
    layers = range(lm.anatomy.layers)
    norms = [f"layers.{n}.{norm}" for n in layers for norm in ("attn_norm", "ffn_norm")]
    for where, sites in (
        ("writers", _writers(name)),
        ("layer", ["layers.0.resid"]),
        ("norms", norms),
    ):
        method = tt.Ablation(layer=1, where=where, positions="prompt")  # type: ignore[arg-type]
        steering = method.fit(lm, TEXTS)
        assert _named(steering) == sites
        assert {i.positions for i in steering.interventions} == {"prompt"}
    assert _named(tt.Ablation(layer=0, where="layer").fit(lm, PAIRS)) == ["embed"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_the_stream_is_along_the_direction(name: str) -> None:
    lm, prompt = _lm(name), "She looked at the map"
    steering = tt.Ablation(layer=1).fit(lm, TEXTS)
    r = _direction(steering).double()
    plain = _hidden(name, _ids(prompt))
    with lm.steered(steering):
        ablated = _hidden(name, _ids(prompt))
    assert float((plain @ r).abs().max()) > 1e-2
    assert float((ablated @ r).abs().max()) < 1e-5 * float(plain.abs().max())
    # At -1 the embedding has twice as much of it.
    with lm.steered(steering.at(-1)):
        doubled = _hidden(name, _ids(prompt))
    assert relative(doubled[0] @ r, 2 * (plain[0] @ r)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_steered_model_is_the_formula_at_every_writer(name: str) -> None:
    lm, prompt = _lm(name), "Today I feel sad because of the rain"
    steering = tt.Ablation(layer=2).fit(lm, TEXTS)
    expected = _logits(name, _ids(prompt), _ablated(name, _direction(steering).double()))
    assert relative(lm.logits([prompt], steering=steering)[0], expected[-1]) < 1e-4


# -- which tokens -----------------------------------------------------------------------------


def test_by_default_a_chat_is_read_at_all_tokens_that_the_template_ends_with() -> None:
    # Of the tiny template: end of text, line break, the assistant's mark, line break.
    lm = _lm()
    chat = tiny_tokenizer().decode(_ids((("user", "so"),)))
    assert chat.endswith("so</s>\n<|assistant|>\n")
    wants = tt.Ablation(targets=("I",)).wants(lm, CHAT)
    assert [want.token for want in wants] == [-1, -2, -3, -4] * 2  # depth 0.8 of 3 blocks: two
    for contrast in (TEXTS, PAIRS):
        wants = tt.Ablation(targets=("I",)).wants(lm, contrast)
        assert [want.token for want in wants] == [-1, -1]
    wants = tt.Ablation(targets=("I",), tokens=(-2, -5)).wants(lm, CHAT)
    assert [want.token for want in wants] == [-2, -5] * 2


def test_a_template_without_an_end_of_text_is_read_at_its_own_tokens() -> None:
    lm = tt.wrap(_lm().model, _Tokenizer(), "other")
    wants = tt.Ablation(targets=("I",), depth=0.3).wants(lm, CHAT)
    assert [want.token for want in wants] == [-1, -2, -3]


class _Tokenizer:
    """The tiny tokenizer with another chat template."""

    def __init__(self) -> None:
        self._tokenizer = tiny_tokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return f"<s>{messages[-1]['content']}\n<|assistant|>\n"


def test_sources_by_layer_and_depth() -> None:
    def sources(**options: Any) -> list[str]:
        return [want.site for want in tt.Ablation(**options).wants(_lm("gemma2"), PAIRS)]

    four = ["embed", "layers.0.resid", "layers.1.resid", "layers.2.resid"]
    assert sources() == four[:3]  # below 0.8 * 4 = 3.2
    assert sources(depth=1) == four
    assert sources(depth=0.5) == four[:2]
    assert sources(depth=0.01) == four[:1]
    assert sources(layer=3, depth=0.5) == four[3:]


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
    expected = _difference(oracle.name, oracle.train, layer, token)
    assert relative(_direction(steering), expected / expected.norm()) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_choice_from_unpaired_chats(name: str) -> None:
    oracle, count = _chat_oracle(name), 8 if name == "gemma2" else 12
    free, passed = oracle.best()
    # Without the rule that adding must cause the behaviour, it is another: the rule bites.
    assert oracle.best(induced=-math.inf)[0] != free
    method = tt.Ablation(targets=_targets(name), kl=1e9, depth=1, tokens=CHAT_TOKENS[name])
    _check_choice(method.fit(_lm(name), CHAT), oracle, free, passed, count)
    # Just below its KL: the next one.
    bound = oracle.table[free][1] * 0.999
    place, passed = oracle.best(kl=bound)
    assert place != free
    _check_choice(replace(method, kl=bound).fit(_lm(name), CHAT), oracle, place, passed, count)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_choice_from_pairs(name: str) -> None:
    oracle, layers = _pair_oracle(name), 4 if name == "gemma2" else 3
    free, passed = oracle.best()
    assert oracle.best(induced=-math.inf)[0] != free
    method = tt.Ablation(kl=1e9, depth=1, tokens=PAIR_TOKENS[name])
    _check_choice(method.fit(_lm(name), PAIRS), oracle, free, passed, 2 * layers)
    bound = oracle.table[free][1] * 0.999
    place, passed = oracle.best(kl=bound)
    assert place != free
    _check_choice(
        replace(method, kl=bound).fit(_lm(name), PAIRS), oracle, place, passed, 2 * layers
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
    _check_choice(method.fit(_lm(), swapped), oracle, place, passed, 3)
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
    method = tt.Ablation(targets=_targets(name), kl=1e9, depth=deep / 4, tokens=tokens)
    steering = method.fit(_lm(name), CHAT if contrast == "chats" else PAIRS)
    _check_choice(steering, oracle, place, passed, len(tokens) * deep)


def test_the_choice_is_made_where_it_is_ablated() -> None:
    """With another `where` other sites are edited when a direction is tried."""
    oracle = _Oracle("llama", CHAT, (), _target_ids(_targets("llama")))
    steering = tt.Ablation(targets=_targets("llama"), kl=1e9, depth=1, where="layer").fit(
        _lm(), CHAT
    )
    layer, token = steering.findings["chosen"]["layer"], steering.findings["token"]
    difference = _difference("llama", CHAT.train, layer, token)
    r = difference / difference.norm()
    edits = {f"layers.{layer - 1}.resid": lambda x: x - torch.outer(x @ r, r)}
    assert steering.findings["chosen"]["score"] == pytest.approx(oracle.score(edits), abs=2e-3)
    assert _named(steering) == [f"layers.{layer - 1}.resid"]


@pytest.mark.parametrize("contrast", [CHAT, PAIRS])
def test_no_direction_that_passes_is_an_error(contrast: Contrast) -> None:
    targets = _targets("llama")
    for options in ({"kl": 1e-9}, {"kl": -1.0}):
        with pytest.raises(tt.TrimtabError, match=r"none of \d+ directions will do: \d+ change"):
            tt.Ablation(targets=targets, **options).fit(_lm(), contrast)  # type: ignore[arg-type]


def test_a_direction_that_never_causes_the_behaviour_is_an_error() -> None:
    # Two rare targets: their score stays below 0, whatever is added.
    with pytest.raises(tt.TrimtabError, match="none of .* directions"):
        tt.Ablation(targets=("z", "Q"), kl=1e9).fit(_lm(), CHAT)


def test_a_score_that_is_no_number_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.methods.ablation as module

    for what in ("kl", "induced"):
        with monkeypatch.context() as patch:
            patch.setattr(module._Scored, what, lambda self, steering: math.nan)
            with pytest.raises(tt.TrimtabError, match="none of .* directions"):
                tt.Ablation(targets=_targets("llama"), kl=1e9, depth=1).fit(_lm(), CHAT)


def test_targets_count_by_their_first_token_and_each_once() -> None:
    from trimtab.methods.ablation import _scores

    longer = [" ships and maps", " map!", " mazes"]  # of many tokens each
    prompts = [CHAT.texts[0].text, CHAT.texts[-1].text]
    ids = sorted({*_target_ids(longer)})
    assert len(ids) == 2
    expected = [_score("llama", _ids(prompt), ids) for prompt in prompts]
    assert _scores(_lm(), prompts, longer).tolist() == pytest.approx(expected, abs=1e-3)


def test_targets_that_are_all_there_is_have_a_finite_score() -> None:
    """Rounded to float32, probabilities may sum to more than 1."""
    texts = {tiny_tokenizer().decode([token]) for token in range(400)}
    method = tt.Ablation(targets=tuple(sorted(texts - {""})), kl=1e9, depth=1)
    steering = method.fit(_lm(), CHAT)
    ids = sorted(set(_target_ids(method.targets or ())))
    expected = _mean([_score("llama", i, ids) for i in _sides(CHAT.part("validation"))[0]])
    assert math.isfinite(expected)
    assert steering.findings["unsteered_score"] == pytest.approx(expected, abs=0.01)


def test_a_certain_target_has_a_finite_score(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.methods.ablation import _scores

    logits = torch.randn(200, 400, generator=torch.Generator().manual_seed(0))
    logits[:, 65:70] += 60
    monkeypatch.setattr(tt.LanguageModel, "logits", lambda self, prompts, **options: logits)
    ids = [tiny_tokenizer().decode([token]) for token in range(65, 70)]
    scores = _scores(_lm(), [""] * 200, ids)
    # eps is all that is left of 1 - P.
    assert scores == pytest.approx(-math.log(1e-8), abs=1e-6)


# -- typical texts only -----------------------------------------------------------------------


def _typical(contrast: Contrast, targets: Sequence[int]) -> Contrast:
    rows = tuple(
        row
        for row in contrast.texts
        if (row.label == "positive") == (_score("llama", _ids(row.text), targets) > 0)
    )
    return replace(contrast, rows=rows)


def test_typical_texts_are_those_that_the_model_itself_treats_as_labelled() -> None:
    targets = _targets("llama")
    ids = _target_ids(targets)
    train, validation = CHAT.train, CHAT.part("validation")
    kept, kept_validation = _typical(train, ids), _typical(validation, ids)
    assert 2 < len(kept) < len(train)
    assert {row.label for row in kept.texts} == {"positive", "negative"}
    method = tt.Ablation(layer=2, typical=True, targets=targets)
    expected = _difference("llama", kept, 2, -1)
    steering = method.fit(_lm(), CHAT)
    assert relative(_direction(steering), expected / expected.norm()) < 1e-4
    everything = _difference("llama", train, 2, -1)
    assert relative(_direction(steering), everything / everything.norm()) > 1e-2
    # The choice, too, is made on typical texts.
    assert len(kept_validation) < len(validation)
    assert {row.label for row in kept_validation.texts} == {"positive", "negative"}
    oracle = _Oracle("llama", CHAT, TOKENS, ids, kept, kept_validation)
    place, passed = oracle.best()
    method = tt.Ablation(typical=True, targets=targets, kl=1e9, depth=1)
    _check_choice(method.fit(_lm(), CHAT), oracle, place, passed, 12)


def test_typical_without_a_text_of_one_side_is_refused() -> None:
    with pytest.raises(tt.TrimtabError, match="treats no text of one side as labelled"):
        tt.Ablation(layer=1, typical=True, targets=("z",)).fit(_lm(), CHAT)


def test_typical_needs_unpaired_texts_and_targets() -> None:
    for method, contrast in (
        (tt.Ablation(layer=1, typical=True), CHAT),
        (tt.Ablation(layer=1, typical=True, targets=("I",)), PAIRS),
    ):
        with pytest.raises(tt.TrimtabError, match="typical needs an unpaired contrast"):
            method.fit(_lm(), contrast)


# -- what it needs ----------------------------------------------------------------------------


def test_the_choice_needs_validation_rows_and_for_unpaired_texts_targets() -> None:
    bare = replace(CHAT, rows=tuple(replace(row, part=None) for row in CHAT.rows))
    with pytest.raises(tt.TrimtabError, match="ablation chooses on validation rows"):
        tt.Ablation(targets=("I",)).fit(_lm(), bare)
    with pytest.raises(tt.TrimtabError, match="--targets"):
        tt.Ablation().fit(_lm(), CHAT)
    tt.Ablation(layer=1).fit(_lm(), bare)  # neither is needed with a layer


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"where": "everywhere"}, "where is 'everywhere'"),
        ({"positions": "some"}, "positions"),
        ({"amount": math.nan}, "amount"),
        ({"kl": math.inf}, "kl must be a finite"),
        ({"depth": 0.0}, "depth must lie"),
        ({"depth": 1.5}, "depth must lie"),
        ({"depth": math.nan}, "depth must lie"),
        ({"tokens": ()}, "must name some"),
        ({"targets": ()}, "must name some"),
        ({"tokens": (0,)}, "counted from the end"),
        ({"tokens": (-1, "mean")}, "counted from the end"),
        ({"targets": "Sorry"}, "write \\('Sorry',\\)"),
        ({"layer": 1, "tokens": (-1, -2)}, "with a layer, tokens must name one"),
    ):
        with pytest.raises(tt.TrimtabError, match=message):
            tt.Ablation(**options)  # type: ignore[arg-type]
    with pytest.raises(tt.TrimtabError, match="a target is empty"):
        tt.Ablation(targets=("I", "")).fit(_lm(), CHAT)
    for layer in (3, -4):
        with pytest.raises(tt.TrimtabError, match="out of range"):
            tt.Ablation(layer=layer).fit(_lm(), CHAT)


def test_a_text_too_short_for_a_token_is_named() -> None:
    short = Contrast((Text("I", "positive"), Text("No, I did not say so", "negative")), "short")
    with pytest.raises(tt.TrimtabError, match="row 1.* has 2 tokens,? .*none at -5"):
        tt.Ablation(layer=1, tokens=(-5,)).fit(_lm(), short)


# -- the artifact -----------------------------------------------------------------------------


def test_what_was_found_is_kept_in_the_file(tmp_path: Path) -> None:
    steering = tt.Ablation(targets=_targets("llama"), kl=1e9, depth=1).fit(_lm(), CHAT)
    read = tt.Steering.load(steering.save(tmp_path / "a.safetensors"))
    assert read.findings == steering.findings
    assert describe(read)["findings"] == steering.findings
    assert read.hyperparameters["targets"] == list(_targets("llama"))
    words = " ".join(explain(read))
    assert f"{steering.findings['chosen']['kl']:.3f} nats" in words


def test_the_same_candidates_are_read_once_for_several_methods() -> None:
    methods = [tt.Ablation(layer=1), tt.Ablation(layer=1, where="norms")]
    wants: set[Want] = {want for method in methods for want in method.wants(_lm(), TEXTS)}
    assert len(wants) == 1
    one, other = tt.fit(methods, _lm(), TEXTS)
    assert torch.equal(_direction(one), _direction(other))
