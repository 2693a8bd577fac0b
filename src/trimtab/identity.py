"""Which model it is: digests of its weights, which follow the weights when they change.

`Weights` digests a model once and keeps the values that it looked at; as long as the model has the
same tensors with the same values at these places, the digests stand. So weights that are trained,
loaded or replaced after a model was wrapped give it a new identity, whoever changed them and how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

#: How many values of each tensor tell one model from another.
_SAMPLES = 512
#: How many values of an embedding table, the only large tensors that stay as they are when a model
#: is quantised.
_TABLE_SAMPLES = 1 << 16


class Weights:
    """The digests of a model's weights, computed anew when these have changed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._places: list[Any] = []
        self._looked_at: list[Tensor] = []
        self._values: list[Tensor] = []
        self._digests = ("", "")

    def digests(self) -> tuple[str, str]:
        """The digest of all weights, and the one of those that stay whole when it is quantised."""
        places = _places(self._model)
        values = _joined(self._looked_at)
        if places != self._places or not _same(values, self._values):
            self._looked_at = []
            self._digests = (self._digest(), self._plain_digest())
            # Views: what is written into the weights is seen through them.
            self._places, self._values = places, _joined(self._looked_at)
        return self._digests

    def _digest(self) -> str:
        """SHA-256 over names, shapes and the signs of some weights of every tensor.

        Signs are the same in every dtype, so a steering made in float32 is at home in bfloat16;
        512 of each tensor tell models and fine-tunes apart, and take no time. Adapters that are
        switched on and off, or set to another strength, count with what they are set to.
        """
        digest = hashlib.sha256()
        offloaded = dict(_offloaded(self._model))
        for name, tensor in sorted(self._model.state_dict().items()):
            if tensor.is_meta:
                tensor = offloaded.get(name, tensor)
            if not tensor.is_floating_point() or tensor.is_meta:
                continue
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(self._signs(tensor, _SAMPLES))
        for setting in _adapter_settings(self._model):
            digest.update(repr(setting).encode())
        return digest.hexdigest()

    def _plain_digest(self) -> str:
        """SHA-256 over the tensors that quantising leaves as they are: norms and embeddings.

        It is the same for a model and its copy in 4 or 8 bits, and tells both from other models.
        """
        digest = hashlib.sha256()
        table = self._model.get_input_embeddings()
        of_table = {id(parameter) for parameter in table.parameters()}
        offloaded = dict(_offloaded(self._model))
        for name, tensor in sorted(self._model.named_parameters()):
            in_table = id(tensor) in of_table
            if tensor.is_meta:
                tensor = offloaded.get(name, tensor)
            if tensor.is_meta or not tensor.is_floating_point():
                continue
            if in_table or (tensor.dim() == 1 and name.endswith("weight")):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(self._signs(tensor, _TABLE_SAMPLES))
        return digest.hexdigest()

    def _signs(self, tensor: Tensor, samples: int) -> bytes:
        flat = tensor.detach().reshape(-1)
        chosen = flat[:: max(1, len(flat) // samples)][:samples]
        if chosen.element_size() == 1:  # float8, which knows no arithmetic
            chosen = chosen.float()
        elif chosen.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            self._looked_at.append(chosen)
        signs: bytes = torch.signbit(chosen).cpu().numpy().tobytes()
        return signs


def _places(model: Any) -> list[Any]:
    """What differs when a tensor is replaced, moved or cast, or an adapter is set otherwise."""
    tensors = chain(model.parameters(), model.buffers())
    return [*map(_place, tensors), *_adapter_settings(model)]


def _place(tensor: Tensor) -> tuple[int, torch.dtype]:
    try:
        return tensor.data_ptr(), tensor.dtype
    except (RuntimeError, NotImplementedError):  # a tensor of several others has no one place
        return id(tensor), tensor.dtype


def _joined(views: list[Tensor]) -> list[Tensor]:
    """The values of all views, one tensor for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for view in views:
        groups.setdefault((view.device, view.dtype), []).append(view)
    return [torch.cat(group) for group in groups.values()]


def _same(values: list[Tensor], before: list[Tensor]) -> bool:
    return len(values) == len(before) and all(map(torch.equal, values, before))


def _offloaded(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that accelerate keeps on disk or in memory and brings in for each pass."""
    for path, module in model.named_modules():
        for hook in _hooks(module):
            kept = getattr(hook, "weights_map", None)
            if kept is None:
                continue
            for name, _ in chain(
                module.named_parameters(recurse=hook.place_submodules),
                module.named_buffers(recurse=hook.place_submodules),
            ):
                try:
                    yield (f"{path}.{name}" if path else name), kept[name]
                except KeyError:  # a buffer that was not offloaded
                    continue


def _hooks(module: Any) -> list[Any]:
    """accelerate's hooks on a module, of which there may be several in a sequence."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook] if hook is not None else []))


def is_offloaded(model: Any) -> bool:
    """Whether some weights are not in place, but brought in for each pass."""
    return any(parameter.is_meta for parameter in model.parameters())


def _adapter_settings(model: Any) -> list[Any]:
    """Which adapters act in a model with layers of peft, and how strongly."""
    found = []
    for module in model.modules():
        if hasattr(type(module), "active_adapters") and hasattr(type(module), "disable_adapters"):
            strength = dict(getattr(module, "scaling", {}) or {})
            active, off = list(module.active_adapters), module.disable_adapters
            found.append((active, off, strength, list(module.merged_adapters)))
    return found
