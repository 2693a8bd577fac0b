"""Directional ablation: where its direction comes from and what it takes out.

Directions come from transformers' own hidden states, what is left from the formulas.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from ablations import (
    CHAT,
    NEGATIVE,
    PAIRS,
    POSITIVE,
    ablating,
    difference_of,
    direction_of,
    hidden,
    ids_of,
    logits_of,
    named,
    parted,
    targets_of,
    tiny_lm,
    writers,
)
from helpers import relative
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast, Text
from trimtab.fitting.activations import Want
from trimtab.methods.contents import describe, explain

NAMES = ("llama", "gemma2", "gpt2", "olmo2")

TEXTS = parted(Contrast.from_texts(POSITIVE, NEGATIVE, "texts"))


# -- the direction ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_direction_is_that_of_transformers_hidden_states(name: str) -> None:
    lm = tiny_lm(name)
    layers = lm.anatomy.layers
    for contrast in (CHAT, TEXTS, PAIRS):
        for layer, token in ((0, -4), (1, -1), (layers - 1, -2)):
            if contrast is CHAT and layer == 0:
                continue  # the template's tokens are the same everywhere
            steering = tt.Ablation(layer=layer, tokens=(token,)).fit(lm, contrast)
            expected = difference_of(name, contrast.train, layer, token)
            assert relative(direction_of(steering), expected / expected.norm()) < 1e-4
            source = "embed" if layer == 0 else f"layers.{layer - 1}.resid"
            assert steering.findings == {"source_site": source, "token": token}
            assert steering.dial == tt.Dial("amount", 1.0, (-1.0, 1.0))


def test_a_layer_counts_from_the_end_and_its_token_is_the_last_by_itself() -> None:
    one = tt.Ablation(layer=2, tokens=(-1,)).fit(tiny_lm(), CHAT)
    for method in (tt.Ablation(layer=-1), tt.Ablation(layer=2)):
        other = method.fit(tiny_lm(), CHAT)
        assert torch.equal(direction_of(one), direction_of(other))
        assert other.findings["token"] == -1


def test_the_direction_has_length_one() -> None:
    direction = direction_of(tt.Ablation(layer=1).fit(tiny_lm(), TEXTS))
    assert direction.dtype == torch.float32
    assert float(direction.double().norm()) == pytest.approx(1, abs=1e-6)


def test_a_place_at_which_the_sides_do_not_differ_is_refused() -> None:
    with pytest.raises(tt.TrimtabError, match="do not differ at block 0's input"):
        tt.Ablation(layer=0).fit(tiny_lm(), CHAT)


# -- where it is ablated ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_where_it_is_ablated(name: str) -> None:
    lm = tiny_lm(name)
    layers = range(lm.anatomy.layers)
    norms = [f"layers.{n}.{norm}" for n in layers for norm in ("attn_norm", "ffn_norm")]
    for where, sites in (
        ("writers", writers(name)),
        ("layer", ["layers.0.resid"]),
        ("norms", norms),
    ):
        method = tt.Ablation(layer=1, where=where, positions="prompt")  # type: ignore[arg-type]
        steering = method.fit(lm, TEXTS)
        assert named(steering) == sites
        assert list(map(str, steering.scopes)) == ["prompt"]
    assert named(tt.Ablation(layer=0, where="layer").fit(lm, PAIRS)) == ["embed"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_the_stream_is_along_the_direction(name: str) -> None:
    lm, prompt = tiny_lm(name), "She looked at the map"
    steering = tt.Ablation(layer=1).fit(lm, TEXTS)
    r = direction_of(steering).double()
    plain = hidden(name, ids_of(prompt))
    with lm.steered(steering):
        ablated = hidden(name, ids_of(prompt))
    assert float((plain @ r).abs().max()) > 1e-2
    assert float((ablated @ r).abs().max()) < 1e-5 * float(plain.abs().max())
    # At -1 the embedding has twice as much of it.
    with lm.steered(steering.at(-1)):
        doubled = hidden(name, ids_of(prompt))
    assert relative(doubled[0] @ r, 2 * (plain[0] @ r)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_steered_model_is_the_formula_at_every_writer(name: str) -> None:
    lm, prompt = tiny_lm(name), "Today I feel sad because of the rain"
    steering = tt.Ablation(layer=2).fit(lm, TEXTS)
    expected = logits_of(name, ids_of(prompt), ablating(name, direction_of(steering).double()))
    assert relative(lm.logits([prompt], steering=steering)[0], expected[-1]) < 1e-4


# -- which tokens -----------------------------------------------------------------------------


def test_by_default_a_chat_is_read_at_all_tokens_that_the_template_ends_with() -> None:
    # Of the tiny template: end of text, line break, the assistant's mark, line break.
    lm = tiny_lm()
    chat = tiny_tokenizer().decode(ids_of((("user", "so"),)))
    assert chat.endswith("so</s>\n<|assistant|>\n")
    wants = tt.Ablation(targets=("I",)).wants(lm, CHAT)
    assert [want.token for want in wants] == [-1, -2, -3, -4] * 2  # depth 0.8 of 3 blocks: two
    for contrast in (TEXTS, PAIRS):
        wants = tt.Ablation(targets=("I",)).wants(lm, contrast)
        assert [want.token for want in wants] == [-1, -1]
    wants = tt.Ablation(targets=("I",), tokens=(-2, -5)).wants(lm, CHAT)
    assert [want.token for want in wants] == [-2, -5] * 2


def test_a_template_without_an_end_of_text_is_read_at_its_own_tokens() -> None:
    lm = tt.wrap(tiny_lm().model, _Tokenizer(), "other")
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
        return [want.site for want in tt.Ablation(**options).wants(tiny_lm("gemma2"), PAIRS)]

    four = ["embed", "layers.0.resid", "layers.1.resid", "layers.2.resid"]
    assert sources() == four[:3]  # below 0.8 * 4 = 3.2
    assert sources(depth=1) == four
    assert sources(depth=0.5) == four[:2]
    assert sources(depth=0.01) == four[:1]
    assert sources(layer=3, depth=0.5) == four[3:]


# -- what it needs ----------------------------------------------------------------------------


def test_the_choice_needs_validation_rows_and_for_unpaired_texts_targets() -> None:
    bare = replace(CHAT, rows=tuple(replace(row, part=None) for row in CHAT.rows))
    with pytest.raises(tt.TrimtabError, match="ablation chooses on validation rows"):
        tt.Ablation(targets=("I",)).fit(tiny_lm(), bare)
    with pytest.raises(tt.TrimtabError, match="--targets"):
        tt.Ablation().fit(tiny_lm(), CHAT)
    tt.Ablation(layer=1).fit(tiny_lm(), bare)  # neither is needed with a layer


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
        tt.Ablation(targets=("I", "")).fit(tiny_lm(), CHAT)
    for layer in (3, -4):
        with pytest.raises(tt.TrimtabError, match="out of range"):
            tt.Ablation(layer=layer).fit(tiny_lm(), CHAT)


def test_a_text_too_short_for_a_token_is_named() -> None:
    short = Contrast((Text("I", "positive"), Text("No, I did not say so", "negative")), "short")
    with pytest.raises(tt.TrimtabError, match="row 1.* has 2 tokens,? .*none at -5"):
        tt.Ablation(layer=1, tokens=(-5,)).fit(tiny_lm(), short)


# -- the artifact -----------------------------------------------------------------------------


def test_what_was_found_is_kept_in_the_file(tmp_path: Path) -> None:
    steering = tt.Ablation(targets=targets_of("llama"), kl=1e9, depth=1).fit(tiny_lm(), CHAT)
    read = tt.Steering.load(steering.save(tmp_path / "a.safetensors"))
    assert read.findings == steering.findings
    assert describe(read)["findings"] == steering.findings
    assert read.hyperparameters["targets"] == list(targets_of("llama"))
    words = " ".join(explain(read))
    assert f"{steering.findings['chosen']['kl']:.3f} nats" in words


def test_the_same_candidates_are_read_once_for_several_methods() -> None:
    methods = [tt.Ablation(layer=1), tt.Ablation(layer=1, where="norms")]
    wants: set[Want] = {want for method in methods for want in method.wants(tiny_lm(), TEXTS)}
    assert len(wants) == 1
    one, other = tt.fit(methods, tiny_lm(), TEXTS)
    assert torch.equal(direction_of(one), direction_of(other))
