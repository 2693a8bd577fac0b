"""Models that see images in other ways than Gemma 3 (positions in three dimensions, images that are
added to several blocks, images of any size), each with its own processor: what they write and read
is what transformers alone makes of it, unsteered and steered on tokens of a kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import trimtab as tt
from seeing import TEMPLATE, _draw, about, by_hand, square
from test_images_processors import (
    QWEN_IMAGE,
    gemma4,
    qwen2_5_vl,
    qwen_pixels,
    qwen_tokenizer,
)
from trimtab.model import frozen
from trimtab.reading import last_logits, run_lower, run_upper
from trimtab.steering import Add, Dial, Intervention, Scope, Steering

NEW = 5

_TEXT = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
}
_QWEN_TEXT = {
    **_TEXT,
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0
    },
}  # fmt: skip
_QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
#: Of each kind of model its text decoder and its vision tower.
_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        _QWEN_TEXT,
        {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        _QWEN_TEXT,
        {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
    "gemma4": (
        {
            **_TEXT,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 8,
        },
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 3,
        },
    ),
}


def qwen3_vl() -> tuple[Any, str]:
    return transformers.Qwen3VLProcessor(qwen_pixels(), qwen_tokenizer(), None), QWEN_IMAGE


_PROCESSORS = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "gemma4": gemma4}


def seeing(name: str) -> tt.LanguageModel:
    """A tiny model of a kind, with its processor."""
    processor, mark = _PROCESSORS[name]()
    own = processor.tokenizer
    own.chat_template = TEMPLATE.replace("<boi>", mark)
    text, vision = _CONFIGS[name]
    text = {**text, "vocab_size": len(own), "pad_token_id": own.pad_token_id}
    if name == "gemma4":
        text["vocab_size_per_layer_input"] = len(own)
    tokens = {
        f"{kind}_token_id": own.convert_tokens_to_ids(getattr(own, f"{kind}_token"))
        for kind in ("image", "video")
    }
    more = {"audio_config": None} if name == "gemma4" else {}
    config = AutoConfig.for_model(
        name, text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens, **more
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config)
    _draw(model, torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = None
    try:
        return tt.wrap(model.eval(), own, name, processor=processor)
    except tt.TrimtabError as error:
        if "unknown architecture" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=list(_CONFIGS))
def lm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tt.LanguageModel:
    # Those that could read films want what reads them, which needs torchvision.
    monkeypatch.setattr(
        transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *arguments: None
    )
    try:
        return seeing(request.param)
    except (ImportError, AttributeError) as error:  # an older transformers
        pytest.skip(str(error))


PROMPTS = [
    about("What? ", square("red", (24, 24)), " She looked"),
    about(square("blue", (40, 16)), square("green", (16, 16)), "They went"),
    [{"role": "user", "content": "Today I feel"}],
]


def alone(lm: tt.LanguageModel, prompt: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What the processor makes of a conversation, by transformers."""
    (content,) = (message["content"] for message in prompt)
    parts = [] if isinstance(content, str) else [p for p in content if p["type"] == "image"]
    if parts:
        shown = [{"type": "image"} if part["type"] == "image" else part for part in content]
        prompt = [{"role": "user", "content": shown}]
    text = lm.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    images = [[part["image"] for part in parts]] if parts else None
    made = lm.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    return dict(made)


def written(lm: tt.LanguageModel, prompt: Any) -> tuple[int, ...]:
    given = alone(lm, prompt)
    found = lm.model.generate(**given, max_new_tokens=NEW, do_sample=False)
    return tuple(found[0, given["input_ids"].shape[1] :].tolist())


def test_they_write_and_read_what_transformers_does(lm: tt.LanguageModel) -> None:
    found = lm.generate(PROMPTS, max_new_tokens=NEW)
    assert [one.tokens for one in found] == [written(lm, prompt) for prompt in PROMPTS]
    logits = lm.logits(PROMPTS, chat=True)
    for prompt, row in zip(PROMPTS, logits, strict=True):
        with torch.no_grad():
            expected = lm.model(**alone(lm, prompt), use_cache=False).logits[0, -1]
        assert torch.allclose(row, expected, atol=1e-4)
    assert (logits[:2] - lm.logits(_other_colours(), chat=True)).abs().amax(-1).min() > 0.01
    texts = [frozen(tokens) for tokens in lm.encode(lm.prompts(PROMPTS[:2], True))]
    assert torch.allclose(last_logits(lm, texts), logits[:2], atol=1e-4)
    for blocks in (1, 2):
        streams = run_lower(lm, texts, blocks)
        resumed, whole = run_upper(lm, texts, streams, blocks), run_upper(lm, texts, [], 0)
        for text, one, other in zip(texts, resumed, whole, strict=True):
            assert torch.allclose(one[: len(text)], other[: len(text)], atol=1e-4)


def _other_colours() -> list[Any]:
    return [
        about("What? ", square("white", (24, 24)), " She looked"),
        about(square("white", (40, 16)), square("red", (16, 16)), "They went"),
    ]


@pytest.mark.parametrize("tokens", ["text", "image", "all"])
def test_they_are_steered_on_tokens_of_a_kind(lm: tt.LanguageModel, tokens: Any) -> None:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1))
    added = Intervention("layers.0.resid", Add(vector), Scope.placed("all", tokens))
    steering = Steering("test", {}, (added,), Dial("alpha", 4.0, (-9.0, 9.0)), lm.identity)
    image = int(lm.model.config.image_token_id)

    def change(hidden: Tensor, ids: Tensor) -> Tensor:
        kinds = {"image": ids == image, "text": ids != image, "all": ids >= 0}
        return torch.where(kinds[tokens][..., None], hidden + 4 * vector, hidden)

    found = lm.generate(PROMPTS[:2], max_new_tokens=NEW, steering=steering)
    for prompt, one in zip(PROMPTS[:2], found, strict=True):
        with by_hand(lm.model, 0, change):
            assert one.tokens == written(lm, prompt)
