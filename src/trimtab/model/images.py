"""Texts with images: what a model's processor makes of them, and which tokens stand for images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.contrasts import Image
from trimtab.errors import TrimtabError, first_line, shown
from trimtab.steering import Steering

#: What configurations call the tokens in whose places the vision tower's output is put.
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class ImageText(tuple[int, ...]):
    """Token ids of a text with images, each image being as many tokens as the processor gives it.

    It carries the text and the images that it was made of, because ids alone do not say what is to
    be seen, and the ids that were written after it; two are equal where ids and images are. A part
    of one is refused.
    """

    text: str
    images: tuple[Image, ...]
    written: tuple[int, ...]

    def __new__(
        cls,
        ids: Iterable[int],
        text: str = "",
        images: tuple[Image, ...] = (),
        written: tuple[int, ...] = (),
    ) -> ImageText:
        made = super().__new__(cls, ids)
        made.text, made.images, made.written = text, images, written
        return made

    @property
    def digests(self) -> tuple[str, ...]:
        """What its images hold."""
        return tuple(image.digest for image in self.images)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ImageText) and super().__eq__(other) and self.digests == other.digests
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.digests))

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, slice):
            return super().__getitem__(place)
        taken = range(len(self))[place]
        if not taken:
            return ()
        if taken == range(len(self)):
            return self
        raise TrimtabError(
            f"a text with images ({', '.join(map(str, self.images))}) of {len(self)} tokens "
            "cannot be read in part: shorten it, or take a smaller image"
        )


def frozen(tokens: Sequence[int]) -> tuple[int, ...]:
    """Token ids that stay as they are, with the images of a text that has some."""
    return tokens if isinstance(tokens, ImageText) else tuple(tokens)


def extended(tokens: Sequence[int], new: Sequence[int]) -> tuple[int, ...]:
    """A text and token ids that were written after it."""
    if isinstance(tokens, ImageText):
        return ImageText((*tokens, *new), tokens.text, tokens.images, (*tokens.written, *new))
    return (*tokens, *new)


def has_images(text: Sequence[int]) -> bool:
    return isinstance(text, ImageText)


def with_images(texts: Sequence[Sequence[int]]) -> list[bool]:
    """Which of the texts have images."""
    return [has_images(text) for text in texts]


def image_tokens(config: Any) -> frozenset[int]:
    """The tokens that stand for images (and frames of videos); none of a model of text."""
    found = (getattr(config, name, None) for name in _IMAGE_TOKENS)
    return frozenset(token for token in found if isinstance(token, int) and token >= 0)


def model_around(model: Any, body: nn.Module) -> nn.Module | None:
    """The model between a whole model and its transformer body, in which images become embeddings;
    None where the body is run by the whole model itself."""
    inner: Any = getattr(model, "base_model", model)
    inner = getattr(inner, "_orig_mod", inner)
    return None if inner is body or inner is model else inner


def refuse_bare(tokens: frozenset[int], texts: Sequence[Sequence[int]], name: str) -> None:
    """Refuse texts without images in which tokens stand for some: they would be read as words."""
    if tokens and any(not tokens.isdisjoint(text) for text in texts):
        raise TrimtabError(
            f"a text has tokens that stand for an image to {shown(name)}, and no image comes with "
            'it: give it as {"type": "image", "image": FILE} in a message'
        )


def refuse_unseen(rows: Sequence[Sequence[Steering]], texts: Sequence[Sequence[int]]) -> None:
    """Refuse a steering of image tokens none of whose texts (`rows` are those of each) has one."""
    seeing = {
        id(one) for row, text in zip(rows, texts, strict=True) for one in row if has_images(text)
    }
    for one in (one for row in rows for one in row):
        if id(one) not in seeing and any(scope.only_images for scope in one.scopes):
            raise TrimtabError(
                f"this {shown(one.method)} steering acts on image tokens, and no text that it is "
                "given for has an image"
            )


def processed(processor: Any, name: str, text: str, images: tuple[Image, ...]) -> ImageText:
    """A rendered text with its images as token ids."""
    ids = _inputs_of(processor, name, text, images)["input_ids"][0]
    return ImageText(ids.tolist(), text, images)


def image_inputs(
    processor: Any, name: str, texts: Sequence[ImageText], side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """All that a model is given of a batch of texts with images, padded on one side: whatever
    their processor makes of each."""
    made = [
        _with_written(_inputs_of(processor, name, text.text, text.images), text.written)
        for text in texts
    ]
    for text, one in zip(texts, made, strict=True):
        if one["input_ids"][0].tolist() != list(text):
            raise TrimtabError(
                f"the processor of {name} made other tokens of a text than before: it, or the chat "
                "template, was changed meanwhile"
            )
    of_token = set.intersection(*map(_of_token, made))
    width = max(map(len, texts))
    inputs = {}
    for key in made[0]:
        parts = [one[key] for one in made]
        if key in of_token:
            # Padding is a token that the row has anyway, as in texts without images.
            fill = [int(part[0, 0]) if key == "input_ids" else 0 for part in parts]
            parts = [_padded(part, width, side, f) for part, f in zip(parts, fill, strict=True)]
        inputs[key] = torch.cat(_of_one_size(parts))
    return inputs


def _of_token(made: Mapping[str, Tensor]) -> set[str]:
    """The names of what says something of each token."""
    return {name for name, value in made.items() if value.shape == made["input_ids"].shape}


def _with_written(made: Mapping[str, Tensor], written: Sequence[int]) -> dict[str, Tensor]:
    """The same with tokens after it that were written, which are text."""
    more = {"input_ids": torch.tensor([written]), "attention_mask": torch.ones(1, len(written))}
    added = dict(made)
    for name in _of_token(made) if written else ():
        own = more.get(name, torch.zeros(1, len(written)))
        added[name] = torch.cat([made[name], own.to(made[name].dtype)], dim=1)
    return added


def _padded(row: Tensor, width: int, side: str, fill: int) -> Tensor:
    missing = width - row.shape[1]
    where = (missing, 0) if side == "left" else (0, missing)
    return torch.nn.functional.pad(row, where, value=fill)


def _of_one_size(parts: Sequence[Tensor]) -> list[Tensor]:
    """Images of several sizes, filled up with zeros, as processors do; each size comes along."""
    sizes = [max(of_parts) for of_parts in zip(*(part.shape[1:] for part in parts), strict=True)]
    filled = []
    for part in parts:
        more = [(0, size - own) for size, own in zip(sizes, part.shape[1:], strict=True)]
        flat = [number for pair in reversed(more) for number in pair]
        filled.append(torch.nn.functional.pad(part, flat) if any(flat) else part)
    return filled


def _inputs_of(
    processor: Any, name: str, text: str, images: tuple[Image, ...]
) -> Mapping[str, Tensor]:
    """What the processor makes of one text and its images, the tensors of it."""
    opened = [image.opened() for image in images]
    try:
        made = processor(
            text=[text], images=[opened], return_tensors="pt", add_special_tokens=False
        )
        return {key: value for key, value in made.items() if isinstance(value, Tensor)}
    except Exception as error:  # processors fail as they like
        said = shown(first_line(error) or type(error).__name__, 300)
        raise TrimtabError(
            f"the processor of {name} refuses {' and '.join(map(str, images))} with its text: "
            f"{said}"
        ) from error
