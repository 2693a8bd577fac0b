"""Where a training stands, in a directory: what is learnt, and all that the next step depends on.

One directory holds the trainings of any models, contrasts and settings; each has a directory of its
own in it, named by a digest of all that it depends on, with one file, which is written whole or not
at all: tensors, and beside them a JSON document. Chance needs no record, because what is drawn for
a step is a function of the seed and of the step's number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files import make_directory, write_whole

#: To be raised when a step, or a file, changes its meaning.
VERSION = 1


class Checkpoint:
    """The file of one training; `key` is the digest of all that it depends on."""

    def __init__(self, cache: Path, key: str) -> None:
        self._key = key
        self.path = cache / f"training-{key[:32]}" / "state.safetensors"
        make_directory(self.path.parent)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and the document; None where nothing was kept yet."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                document = json.loads((file.metadata() or {})["training"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise TrimtabError(
                f"{self.path} is no checkpoint of a training: delete it, and it is made again"
            ) from error
        if not isinstance(document, dict) or document.get("key") != self._key:
            raise TrimtabError(
                f"{self.path} is of other settings, another model or another contrast: delete it, "
                "or name another cache"
            )
        return tensors, document

    def write(self, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Keep where the training stands."""
        text = json.dumps({**document, "key": self._key}, allow_nan=False)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self.path, save(whole, {"training": text}), overwrite=True)


def flat(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under a prefix, for a file."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a file that stand under a prefix."""
    start = f"{prefix}/"
    return {n.removeprefix(start): t.clone() for n, t in tensors.items() if n.startswith(start)}
