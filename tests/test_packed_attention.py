"""Texts are read in packed rows, whose masks flash attention does not take: another attention is
used for that, said once, and put back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import trimtab as tt
from helpers import PROMPTS, relative, scale, steer
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.reading.likelihood import cross_entropy, log_odds
from trimtab.reading.reader import plan, prompt_reading, run_batches

PAIRS = [
    (f"The {who} looked at the {what} and said that it was", " right.", " wrong, and left!")
    for who in ("king", "mother", "captain")
    for what in ("ship", "map", "fire")
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")

#: Names under which attention without masks of four dimensions goes.
NAMES = ("flash_attention_2", "flash_attention_3", "flex_attention", "kernels-community/flash-attn")


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
) -> tuple[Tensor, None]:
    """What flash attention computes, with a window and a cap, for masks that it takes."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise IndexError("too many indices: the mask has four dimensions")  # as when it unpads
    rows, seen = key.shape[0], key.shape[2]
    place = torch.arange(seen)
    visible = place <= place[-query.shape[2] :, None]
    if more.get("sliding_window"):
        visible &= place > place[-query.shape[2] :, None] - more["sliding_window"]
    visible = visible.expand(rows, 1, -1, -1)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, -seen:].bool()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * more["scaling"]
    if more.get("softcap") is not None:
        scores = more["softcap"] * torch.tanh(scores / more["softcap"])
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.fixture(autouse=True)
def _attention(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(AttentionInterface._global_mapping, name, _flash)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)


def _lm(name: str, attention: str) -> tt.LanguageModel:
    model = tiny_model(name)
    model.config._attn_implementation = attention
    model.generation_config.eos_token_id = None
    return tt.wrap(model, tiny_tokenizer(), f"my {name}")


def _masked(name: str) -> tt.LanguageModel:
    """The same model with attention that takes any mask; only eager caps scores (Gemma 2)."""
    return _lm(name, "eager")


def _operators(steering: tt.Steering) -> list[Any]:
    return [intervention.operator for intervention in steering.interventions]


@pytest.mark.parametrize("name", TINY)
def test_fit_reads_the_same(name: str) -> None:
    lm = _lm(name, "flash_attention_2")
    instead = "eager" if name == "gemma2" else "sdpa"
    with pytest.warns(tt.TrimtabWarning) as said:
        found = tt.CAA(layer=2, token="mean").fit(lm, CONTRAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said of this model
        tt.AUSteer(k=3, site="ffn_out", direction="paper").fit(lm, CONTRAST)
        log_odds(lm, CONTRAST)
    (warning,) = said
    assert str(warning.message) == (
        f"my {name} runs with flash_attention_2, which takes no masks of packed texts: texts are "
        f"read with {instead}"
    )
    assert lm.model.config._attn_implementation == "flash_attention_2"
    expected = tt.CAA(layer=2, token="mean").fit(_masked(name), CONTRAST)
    assert relative(_operators(found)[0].vector, _operators(expected)[0].vector) < 1e-4


@pytest.mark.parametrize("attention", NAMES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2"])
@pytest.mark.filterwarnings("ignore::trimtab.errors.TrimtabWarning")
def test_figures_are_the_same(name: str, attention: str) -> None:
    lm, masked = _lm(name, attention), _masked(name)
    width = lm.anatomy.width("layers.1.ffn_in")
    for steering in (None, steer(lm, ("layers.1.ffn_in", scale(width)))):
        found, expected = (log_odds(each, CONTRAST, steering) for each in (lm, masked))
        assert relative(found, expected) < 1e-4
        found, expected = (cross_entropy(each, PROMPTS, steering)[0] for each in (lm, masked))
        assert relative(found, expected) < 1e-4
        assert lm.model.config._attn_implementation == attention
        # What needs no packed rows runs with the model's own attention.
        readings = [prompt_reading(tokens) for tokens in lm.encode(PROMPTS)]
        both = [
            [int(token) for _, some in run_batches(each, readings, plan(readings, 512), steering)
             for one in some for token in one.best]
            for each in (lm, masked)
        ]  # fmt: skip
        assert both[0] == both[1]
        texts = [
            [each.tokens for each in every.generate(PROMPTS, max_new_tokens=6, steering=steering)]
            for every in (lm, masked)
        ]
        assert texts[0] == texts[1]


def test_attention_is_put_back_after_an_error() -> None:
    lm = _lm("llama", "flash_attention_2")
    lm.model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.nan)
    for action in (
        lambda: tt.CAA(layer=1, token="last").fit(lm, CONTRAST),
        lambda: log_odds(lm, CONTRAST),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tt.TrimtabWarning)
            with pytest.raises(tt.TrimtabError, match="not finite"):
                action()
        assert lm.model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_takes_masks_stays(attention: str) -> None:
    lm, used = _lm("llama", attention), set()
    lm.model.model.layers[0].self_attn.register_forward_hook(
        lambda *_: used.add(lm.model.config._attn_implementation)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tt.CAA(layer=1, token="last").fit(lm, CONTRAST)
        log_odds(lm, CONTRAST)
    assert used == {attention}
