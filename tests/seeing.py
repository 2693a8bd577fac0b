"""A tiny random model that sees images, with its processor, and what transformers alone does with
both: what the tests of images are checked against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import trimtab as tt
from tiny import tiny_tokenizer

#: Tokens that an image is, beside the two around it.
IMAGE_LENGTH = 4

#: As those of models that see images: a message is text, or a list of parts.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<boi>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

COLOURS = ("red", "green", "blue", "white")


def tokenizer_with(
    tokens: dict[str, str], model_max_length: int, **options: Any
) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with special tokens of its own beside those that it has."""
    inner = tiny_tokenizer().backend_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(inner.to_str()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=model_max_length,
        extra_special_tokens=tokens,
        **options,
    )


@cache
def seeing_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with(
        {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        256,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


@cache
def seeing_processor() -> Gemma3Processor:
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        seeing_tokenizer(),
        chat_template=TEMPLATE,
        image_seq_length=IMAGE_LENGTH,
    )


def seeing_model(seed: int = 0) -> Gemma3ForConditionalGeneration:
    """A decoder of Gemma 3 behind a vision tower, of which images make a difference."""
    tokenizer = seeing_tokenizer()
    config = Gemma3Config(
        text_config={
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_size": 48,
            "intermediate_size": 80,
            "max_position_embeddings": 256,
            "vocab_size": len(tokenizer),
            "sliding_window": 8,
            "query_pre_attn_scalar": 1,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=IMAGE_LENGTH,
        tie_word_embeddings=False,  # or the model repeats its last token
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = Gemma3ForConditionalGeneration(config)
    _draw(model, torch.Generator().manual_seed(seed))
    model.generation_config.eos_token_id = None  # so that lengths are known
    return model.eval()


@torch.no_grad()
def _draw(model: Any, generator: torch.Generator) -> None:
    """Weights that are strong enough for every token to count, and norms that are not ones."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(0.2 * noise)
        else:
            parameter.copy_(noise * (0.1 if "embed" in name else 0.2))


def seeing(seed: int = 0) -> tt.LanguageModel:
    """The same as trimtab sees it."""
    return tt.wrap(seeing_model(seed), seeing_tokenizer(), "see", processor=seeing_processor())


def square(colour: str, size: tuple[int, int] = (24, 20)) -> Any:
    """A picture of one colour, with a black corner."""
    image = Image.new("RGB", size, colour)
    image.paste("black", (0, 0, size[0] // 3, size[1] // 3))
    return image


def saved(folder: Path, colours: Sequence[str] = COLOURS) -> list[str]:
    """Pictures as files, by the names of their colours."""
    for colour in colours:
        square(colour).save(folder / f"{colour}.png")
    return [str(folder / f"{colour}.png") for colour in colours]


def about(*parts: Any) -> list[dict[str, Any]]:
    """A user's message of texts, and of images (of PIL, or paths)."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str) and not part.endswith(".png")
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


# -- by transformers alone ------------------------------------------------------------------------


def inputs_alone(messages: list[dict[str, Any]], after: str = "") -> dict[str, Tensor]:
    """What the processor makes of one conversation, and of a text after it."""
    images, plain = [], []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            images += [part["image"] for part in content if part["type"] == "image"]
            content = [{"type": "image"} if part["type"] == "image" else part for part in content]
        plain.append({"role": message["role"], "content": content})
    images = [Image.open(one) if isinstance(one, str) else one for one in images]
    text = seeing_tokenizer().apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    made = seeing_processor()(
        text=[text + after],
        images=[images] if images else None,
        return_tensors="pt",
        add_special_tokens=False,
    )
    return dict(made)


@contextmanager
def by_hand(model: Any, layer: int, change: Any) -> Iterator[None]:
    """A plain hook on the output of a block: `change(hidden, ids)`, where ids are those that the
    whole model was given."""
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["ids"] = kwargs["input_ids"]

    def act(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = change(hidden, seen["ids"])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handles = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        model.model.language_model.layers[layer].register_forward_hook(act),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
