"""Tiny models of every architecture: that they are built, and that most run on text alone."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import architectures_table
from every_architecture import NotBuilt, build, names
from every_size import VARIANTS


def _logits(model: PreTrainedModel, seed: int) -> Tensor:
    """Logits of eleven random tokens, [tokens, vocabulary]."""
    ids = torch.randint(3, 300, (1, 11), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0]


def _runs_on_text(model: PreTrainedModel) -> bool:
    try:
        first, second = _logits(model, 0), _logits(model, 1)
    except Exception:  # an encoder-decoder, or what cannot do without an image
        return False
    return len(first) == 11 and bool(first.isfinite().all()) and not torch.equal(first, second)


@pytest.mark.parametrize(
    "name",
    [
        "bamba",
        "dbrx",
        "deepseek_v3",
        "gemma4_moe",
        "gpt_neox_sequential",
        "llava",
        "mpt",
        "nemotron_h_latent",
        "qwen3_5_wrapper",
        "rwkv",
        "zamba2",
    ],
)
def test_small_and_repeatable(name: str) -> None:
    model, again = build(name), build(name)
    assert name in names()
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert not model.training
    assert _runs_on_text(model)
    assert torch.equal(_logits(model, 0), _logits(again, 0))


def test_hybrids_have_layers_of_both_kinds() -> None:
    for name in ("granitemoehybrid", "kimi_linear", "qwen3_next", "qwen3_5"):
        assert len(set(build(name).config.get_text_config().layer_types)) == 2, name


def test_wrappers_are_asked_for_by_name() -> None:
    assert type(build("qwen3_5")).__name__ == "Qwen3_5ForCausalLM"
    assert type(build("qwen3_5_wrapper")).__name__ == "Qwen3_5ForConditionalGeneration"


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(NotBuilt, match=r"^musicgen: \w+: .") as caught:
        build("musicgen")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_nearly_all_are_built_and_most_run_on_text() -> None:
    assert len(names()) == len(set(names())) >= 250
    assert len(VARIANTS) >= 18
    built, runs = [], []
    for name in names():
        try:
            model = build(name)
        except NotBuilt as reason:
            print(reason)
            continue
        built.append(name)
        if _runs_on_text(model):
            runs.append(name)
    print(f"{len(names())} names, {len(built)} built, {len(runs)} run on text")
    assert len(built) > 0.92 * len(names())
    assert len(runs) > 0.85 * len(names())


@pytest.mark.slow
def test_the_docs_say_what_is_found_in_every_architecture() -> None:
    found = architectures_table.rows(names())
    page = architectures_table.PAGE.read_text(encoding="utf-8")
    if f"transformers {version('transformers')}," in page:
        assert architectures_table.table(found) in page
    counts = Counter(kind for kind, _ in found.values())
    assert counts["complete"] + counts["hybrid"] >= 210
    # What must not be taken for a decoder with one stream.
    for name in ("diffusion_gemma", "gemma3n_text", "deepseek_v4", "t5", "hrm_text", "qwen4_exp"):
        assert found[name][0] in ("refused", "not built"), name
