"""What a model is given of a batch of texts with images is what its processor makes of the batch,
whatever that is: each text is processed by itself, because many of them are kept, and put together
here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

import trimtab as tt
from seeing import about, seeing_processor, square, tokenizer_with
from trimtab.contrasts import images_in, read_prompt
from trimtab.model import extended
from trimtab.model.images import ImageText, image_inputs, processed


def tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    return tokenizer_with(tokens, 2560)


def image_processor(model: str, name: str, **sizes: Any) -> Any:
    """One that needs no torchvision."""
    found = importlib.import_module(f"transformers.models.{model}.image_processing_pil_{model}")
    return getattr(found, name)(**sizes)


def gemma3() -> tuple[Any, str]:
    return seeing_processor(), "<boi>"


#: How a message of Qwen writes an image.
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    kinds = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return tokenizer(**kinds, vision_start="<|vision_start|>", vision_end="<|vision_end|>")


def qwen_pixels() -> Any:
    sizes = {"shortest_edge": 64, "longest_edge": 4096}
    given = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    return image_processor("qwen2_vl", "Qwen2VLImageProcessorPil", size=sizes, **given)


def qwen2_5_vl() -> tuple[Any, str]:
    return transformers.Qwen2_5_VLProcessor(qwen_pixels(), qwen_tokenizer(), None), QWEN_IMAGE


def llava_next() -> tuple[Any, str]:
    pixels = image_processor(
        "llava_next",
        "LlavaNextImageProcessorPil",
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    given = {"patch_size": 8, "num_additional_image_tokens": 1}
    own = tokenizer(image_token="<image>")
    made = transformers.LlavaNextProcessor(
        pixels, own, vision_feature_select_strategy="default", **given
    )
    return made, "<image>"


def gemma4() -> tuple[Any, str]:
    pixels = image_processor("gemma4", "Gemma4ImageProcessorPil", patch_size=4, max_soft_tokens=70)
    kinds = {"image_token": "<|image|>", "audio_token": "<|audio|>", "video_token": "<|video|>"}
    around = {"boi_token": "<boi>", "eoi_token": "<eoi>", "boa_token": "<boa>"}
    own = tokenizer(**kinds, **around, eoa_token="<eoa>")
    return transformers.Gemma4Processor(None, pixels, own, None), "<|image|>"


@pytest.fixture(params=[gemma3, qwen2_5_vl, llava_next, gemma4], ids=lambda one: one.__name__)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    # Those that could read films want what reads them, which needs torchvision.
    monkeypatch.setattr(
        transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *arguments: None
    )
    make: Callable[[], tuple[Any, str]] = request.param
    try:
        return make()
    except (ImportError, AttributeError) as error:  # an older transformers
        pytest.skip(str(error))


TEXTS = ("Hello {0} you", "{0} and {0} Today I feel sad")
IMAGES = (
    [square("red", (24, 24))],
    [square("blue", (40, 16)), square("green", (16, 30))],
)


def made(processor: Any, mark: str) -> list[ImageText]:
    prompts = [read_prompt(about(*images), "here") for images in IMAGES]
    return [
        processed(processor, "tiny", text.format(mark), images_in(prompt))
        for text, prompt in zip(TEXTS, prompts, strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_what_the_processor_makes_of_it(processor: tuple[Any, str], side: Any) -> None:
    own, mark = processor
    expected = own(
        text=[text.format(mark) for text in TEXTS],
        images=[list(images) for images in IMAGES],
        padding=True,
        padding_side=side,
        return_tensors="pt",
        add_special_tokens=False,
    )
    found = image_inputs(own, "tiny", made(own, mark), side)
    assert set(found) == set(expected)
    there = expected["attention_mask"].bool()
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    for name, value in expected.items():
        if value.shape == there.shape:  # what is said of padding is of no account
            assert torch.equal(found[name][there], value[there]), name
        else:
            assert torch.equal(found[name], value), name


def test_what_was_written_after_images_is_text(processor: tuple[Any, str]) -> None:
    own, mark = processor
    first, second = made(own, mark)
    found = image_inputs(own, "tiny", [extended(first, (7, 8)), second], "right")  # type: ignore
    before = image_inputs(own, "tiny", [first, second], "right")
    end = len(first)
    assert found["input_ids"][0, : end + 2].tolist() == [*first, 7, 8]
    assert found["attention_mask"][0, : end + 2].tolist() == [1] * (end + 2)
    for name, value in found.items():
        if value.shape == found["input_ids"].shape and name not in ("input_ids", "attention_mask"):
            assert value[0, end:].tolist() == [0] * (value.shape[1] - end)
        elif value.shape != found["input_ids"].shape:
            assert torch.equal(value, before[name])


def test_a_processor_that_changes_is_noticed() -> None:
    own, mark = gemma3()
    (first, _) = made(own, mark)
    ids = [9, *list(first)[1:]]
    other = ImageText(ids, first.text, first.images)
    with pytest.raises(tt.TrimtabError, match="made other tokens of a text than before"):
        image_inputs(own, "tiny", [other], "left")
