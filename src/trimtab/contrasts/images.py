"""Images in messages: files, and in Python images of PIL.

Each is looked at when it is read, so that what is no image, or one that would fill the memory, is
said before a model is loaded. It is opened again when a model sees it, so that many images need not
be held at once. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import TrimtabError, first_line, shown
from trimtab.files import user_path

#: Larger ones are refused: a small file may unpack to more than the memory holds.
MOST_PIXELS = 1 << 26
_MOST_BYTES = 1 << 28
#: What is decoded; other formats of PIL run other programs, or are hardly tested.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://|data:", re.ASCII)


class _Known(NamedTuple):
    path: str
    digest: str


class Image(_Known):
    """An image of a message: its file, and SHA-256 of what it holds.

    One that is in memory is `held`, and its path says how large it is.
    """

    held: Any = None

    def __str__(self) -> str:
        return f"[image {shown(self.path)}]"

    def seen_from(self, folder: Path) -> str:
        """The path as a file in another folder names it."""
        if self.held is not None:
            raise TrimtabError(f"{self} is in memory only: save it, and give the path of its file")
        path = user_path(self.path)
        return str(path) if path.is_absolute() else os.path.relpath(path, folder)

    def opened(self) -> Any:
        """The image of PIL, in RGB, the way up that it says of itself."""
        if self.held is not None:
            return self.held
        content = _content(self.path, str(self))
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise TrimtabError(f"{self} has changed since it was read: start anew")
        return _decoded(content, str(self))


def read_image(source: Any, where: str) -> Image:
    """A file by its path, or an image of PIL; whatever cannot be shown to a model is refused."""
    if isinstance(source, Image):
        return source
    if isinstance(source, str | Path):
        path = str(source)
        if is_address(path):
            raise TrimtabError(
                f"{where}: {shown(path, 60)} is an address, and nothing is fetched: download the "
                "image, and name the file"
            )
        content = _content(path, f"{where}: the image {shown(path)}")
        _decoded(content, f"{where}: {shown(path)}")
        return Image(path, hashlib.sha256(content).hexdigest())
    if callable(getattr(source, "tobytes", None)) and callable(getattr(source, "convert", None)):
        return _in_memory(source, where)
    raise TrimtabError(
        f"{where}: an image is {shown(repr(source), 60)}: write the path of a file, or give an "
        "image of PIL"
    )


def is_address(path: str) -> bool:
    """Whether a path is the address of something elsewhere."""
    return _ADDRESS.match(path) is not None


def _in_memory(source: Any, where: str) -> Image:
    _refuse_large(source, where)
    pixels = source.convert("RGB")
    size = f"{pixels.width}x{pixels.height}"
    image = Image(size, hashlib.sha256(size.encode() + pixels.tobytes()).hexdigest())
    image.held = pixels
    return image


def _content(path: str, what: str) -> bytes:
    """The bytes of a file that may be an image."""
    place = user_path(path)
    try:
        if place.exists() and not place.is_file():
            raise TrimtabError(f"{what} is not a file")
        if place.stat().st_size > _MOST_BYTES:
            raise TrimtabError(f"{what} is larger than {_MOST_BYTES >> 20} MiB: make it smaller")
        return place.read_bytes()
    except (OSError, ValueError) as error:  # a null byte in a name
        reason = getattr(error, "strerror", None) or error
        raise TrimtabError(f"{what} cannot be read: {reason}") from error


def _decoded(content: bytes, what: str) -> Any:
    from PIL import Image as Pillow
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images that are refused below, and odd metadata
            opened = Pillow.open(io.BytesIO(content), formats=_FORMATS)
            _refuse_large(opened, what)
            return ImageOps.exif_transpose(opened).convert("RGB")
    except TrimtabError:
        raise
    except Pillow.DecompressionBombError as error:
        raise _too_large(what) from error
    except Exception as error:  # a decoder fails at damaged files as it likes
        unknown = isinstance(error, Pillow.UnidentifiedImageError)
        reason = f"known are {', '.join(_FORMATS)}" if unknown else first_line(error)
        raise TrimtabError(f"{what} is no image that can be read: {reason}") from error


def _refuse_large(image: Any, what: str) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise _too_large(what)


def _too_large(what: str) -> TrimtabError:
    most = round(MOST_PIXELS / 1e6)
    return TrimtabError(f"{what} has more than {most} million pixels: make it smaller")
