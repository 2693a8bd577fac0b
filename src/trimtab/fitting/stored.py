"""A pass over a contrast kept on disk, so that it can be resumed and read again.

One directory holds the passes of any models and contrasts. In it a pass has a directory of its own,
named by a digest of the model's weights, its configuration and every token that is read, with two
files for each pick (a site, a token rule, a form):

    layers.3.heads.-1.f32     [rows, sides, units] float32, written at the rows that were read
    layers.3.heads.-1.crc     [rows] uint32: 0 where a row is not there yet, else its checksum

The effect on a pair is one number a unit, in place of two sides. A row counts only if its checksum
is right, which is over its number too: whatever moment a process is killed at, half a row is never
taken for a whole one, nor one row for another.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files import write_whole
from trimtab.model import LanguageModel
from trimtab.reading import Packed

#: Goes into every digest: to be raised when a site or a token rule changes its meaning.
_VERSION = 2

#: What a configuration says of where a model came from, not of what it computes.
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "architectures")

#: Words of 8 bytes of a tensor that are digested at a time.
_CHUNK = 1 << 20


class StoredPass:
    """The files of one model's pass over one contrast; `shapes` says of each pick how many sides
    and units there are.

    `count` of the rows are going to be read this time. An `engine` in place of transformers, which
    rounds otherwise, has passes of its own.
    """

    def __init__(
        self,
        cache: Path,
        language_model: LanguageModel,
        rows: Sequence[Packed],
        shapes: Mapping[Any, tuple[int, int]],
        count: int,
        engine: str = "",
    ) -> None:
        self._shapes = shapes
        self._count = count
        self._room = cache / digest_of(language_model, rows, engine)
        try:
            self._room.mkdir(parents=True, exist_ok=True)
            self._check_space()
            about = {
                "model": vars(language_model.identity),
                "dtype": str(language_model.dtype),
                "texts": len(rows) * len(rows[0].sides),
            }
            text = json.dumps(about, indent=1, ensure_ascii=False)
            write_whole(self._room / "pass.json", text.encode(), overwrite=True)
        except OSError as error:
            raise TrimtabError(f"cannot use the cache {cache}: {_reason(error)}") from error

    def read(self, indices: Tensor, device: torch.device) -> dict[Any, Tensor]:
        """The picks that are there for all of these rows: [rows, sides, units] each."""
        found = {}
        for pick in self._shapes:
            values = self._values(pick, indices.tolist())
            if values is not None:
                found[pick] = values.to(device)
        return found

    def write(self, indices: Tensor, found: Mapping[Any, Tensor]) -> None:
        """Keep what was read of these rows."""
        for pick, values in found.items():
            contents = [row.tobytes() for row in values.cpu().numpy()]
            try:
                # The checksums come after the rows: until then the rows do not count.
                _write_at(self._path(pick, "f32"), indices.tolist(), contents)
                sums = [
                    np.uint32(_checksum(place, content)).tobytes()
                    for place, content in zip(indices.tolist(), contents, strict=True)
                ]
                _write_at(self._path(pick, "crc"), indices.tolist(), sums)
            except OSError as error:
                where = f"cannot write to the cache {self._room}"
                raise TrimtabError(f"{where}: {_reason(error)}") from error

    def _values(self, pick: Any, indices: list[int]) -> Tensor | None:
        size = self._row_bytes(pick)
        try:
            contents = _read_at(self._path(pick, "f32"), indices, size)
            sums = _read_at(self._path(pick, "crc"), indices, 4)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TrimtabError(f"cannot read the cache {self._room}: {_reason(error)}") from error
        for place, content, checksum in zip(indices, contents, sums, strict=True):
            if len(content) < size or np.uint32(_checksum(place, content)).tobytes() != checksum:
                return None
        shape = (len(indices), *self._shapes[pick])
        # Through bytearray, because torch wants memory that may be written to.
        flat = np.frombuffer(bytearray(b"".join(contents)), dtype=np.float32)
        return torch.from_numpy(flat.reshape(shape))

    def _path(self, pick: Any, ending: str) -> Path:
        return self._room / f"{pick.name}.{ending}"

    def _row_bytes(self, pick: Any) -> int:
        sides, units = self._shapes[pick]
        return 4 * sides * units

    def _check_space(self) -> None:
        """Say at once that a pass does not fit on the disk, not after an hour."""
        wanted = sum(
            max(0, self._count * self._row_bytes(pick) - _bytes_on_disk(self._path(pick, "f32")))
            for pick in self._shapes
        )
        free = shutil.disk_usage(self._room).free
        if wanted > free:
            raise TrimtabError(
                f"the cache {self._room.parent} needs {wanted / 1e9:.1f} GB for this pass and the "
                f"disk has {free / 1e9:.1f} GB: name another directory, or fewer layers"
            )


def digest_of(language_model: LanguageModel, rows: Sequence[Packed], engine: str = "") -> str:
    """What a pass depends on: every weight, the configuration, every token with its place.

    A model's identity is not enough: it is the same in each dtype, and a baked model, or one that
    was trained a little, may share it.
    """
    model = language_model.model
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_COMPUTED}
    digest = hashlib.sha256(f"{_VERSION} {language_model.dtype}".encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    saved = set(model.state_dict())  # not the tables of angles that some models swap as they run
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in saved and not tensor.is_meta:
            about = f"{name} {tuple(tensor.shape)} {tensor.dtype} {_fingerprint(tensor)}"
            digest.update(about.encode())
    for row in rows:
        digest.update(repr((row.tokens, row.common, row.sides, row.answers)).encode())
        for text in row.seen:
            digest.update(repr(text.digests).encode())
    digest.update(engine.encode())
    return digest.hexdigest()[:32]


def _fingerprint(tensor: Tensor) -> int:
    """A number that a change of a tensor's bits changes; computed where the tensor lies."""
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(octets) % 8 or octets.storage_offset() % 8:
        octets = torch.nn.functional.pad(octets, (0, -len(octets) % 8))
    words = octets.view(torch.int64)
    # Integers wrap around, so a sum is the same in whatever order it is taken; times odd numbers,
    # so that every bit of every word counts.
    odd = 2 * torch.arange(min(_CHUNK, len(words)), device=words.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(_CHUNK):
        total = 3 * total + (chunk * odd[: len(chunk)]).sum()
    return int(total)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _checksum(place: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(str(place).encode())) or 1  # 0 is that there is no row


def _bytes_on_disk(path: Path) -> int:
    if not path.exists():
        return 0
    status = path.stat()
    return getattr(status, "st_blocks", status.st_size // 512) * 512  # the file may have holes


def _write_at(path: Path, places: list[int], contents: list[bytes]) -> None:
    """Put records of one size at their places in a file, which is made if it is not there."""
    path.touch()
    with path.open("r+b") as file:
        for place, content in zip(places, contents, strict=True):
            file.seek(place * len(content))
            file.write(content)


def _read_at(path: Path, places: list[int], size: int) -> list[bytes]:
    with path.open("rb") as file:
        found = []
        for place in places:
            file.seek(place * size)
            found.append(file.read(size))
        return found
