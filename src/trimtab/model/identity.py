"""Which model it is: digests of its weights, which follow the weights when they change.

`Weights` digests a model once. As long as the model has the same tensors, which nobody wrote into,
the digests stand: torch counts what is written into a tensor, and what is written past its count
(`tensor.data`) shows in a few values of each. So weights that are trained, loaded or replaced after
a model was wrapped give it a new identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

#: How many values of each tensor tell one model from another.
_SAMPLES = 512
#: How many values of an embedding table, the only large tensors that stay as they are when a model
#: is quantised.
_TABLE_SAMPLES = 1 << 16
#: How many values of each tensor are compared to see whether it is still the same.
_WATCHED = 32


class Weights:
    """The digests of a model's weights, computed anew when these have changed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._places: list[Any] = []
        self._watched: list[Tensor] = []  # views: what is written into the weights shows in them
        self._values: list[Tensor] = []
        self._digests = ("", "")

    def digests(self) -> tuple[str, str]:
        """The digest of all weights, and the one of those that stay whole when it is quantised."""
        places = _places(self._model)
        if places != self._places or not _same(_joined(self._watched), self._values):
            self._digests = (self._digest(), self._plain_digest())
            self._watched = _views(self._model)
            self._places, self._values = places, _joined(self._watched)
        return self._digests

    def _digest(self) -> str:
        """SHA-256 over names, shapes and the signs of some weights of every tensor.

        Signs are the same in every dtype, so a steering made in float32 is at home in bfloat16;
        512 of each tensor tell models and fine-tunes apart, and take no time. Adapters that are
        switched on and off, or set to another strength, count with what they are set to.
        """
        digest = hashlib.sha256()
        elsewhere = dict(_offloaded(self._model))
        for name, tensor in sorted(self._model.state_dict().items()):
            if name in elsewhere:
                tensor = elsewhere[name]()
            if not tensor.is_floating_point() or tensor.is_meta:
                continue
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(_signs(tensor, _SAMPLES))
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
        elsewhere = dict(_offloaded(self._model))
        for name, tensor in sorted(self._model.named_parameters()):
            in_table = id(tensor) in of_table
            if not (in_table or (tensor.dim() == 1 and name.endswith("weight"))):
                continue
            if name in elsewhere:
                tensor = elsewhere[name]()
            if tensor.is_floating_point() and not tensor.is_meta:
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(_signs(tensor, _TABLE_SAMPLES))
        return digest.hexdigest()


def _signs(tensor: Tensor, samples: int) -> bytes:
    chosen = _spread(tensor, samples)
    if chosen.element_size() == 1:  # float8, which knows no arithmetic
        chosen = chosen.float()
    signs: bytes = torch.signbit(chosen).cpu().numpy().tobytes()
    return signs


def _spread(tensor: Tensor, samples: int) -> Tensor:
    """So many values at even distances, as a view of the tensor where it is in one piece."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "dequantize"):
        tensor = tensor.dequantize()  # torchao's and quanto's kinds know few operations
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // samples)][:samples]


def _tensors(model: Any) -> Iterator[Tensor]:
    """Parameters and buffers; the modules' own tables are faster to read than their methods."""
    for module in model.modules():
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                yield tensor


def _places(model: Any) -> list[Any]:
    """What differs when a tensor is written, replaced, moved or cast, or an adapter set anew."""
    return [*map(_place, _tensors(model)), *_adapter_settings(model)]


def _place(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    if tensor.is_meta:  # comes anew for each pass
        return 0, 0, tensor.dtype
    # Tensors that were made in inference mode count nothing; some of several parts have no place.
    writes = 0 if tensor.is_inference() else tensor._version
    try:
        return tensor.data_ptr(), writes, tensor.dtype
    except RuntimeError:  # which NotImplementedError is, too
        return id(tensor), writes, tensor.dtype


def _views(model: Any) -> list[Tensor]:
    """A few values of each tensor that holds floating-point numbers in one piece."""
    return [
        _spread(tensor, _WATCHED)
        for tensor in _tensors(model)
        if type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_floating_point()
        and tensor.is_contiguous()
        and tensor.element_size() > 1
        and not tensor.is_meta
    ]


def _joined(views: list[Tensor]) -> list[Tensor]:
    """The values of all views, one tensor for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for view in views:
        groups.setdefault((view.device, view.dtype), []).append(view)
    return [torch.cat(group) for group in groups.values()]


def _same(values: list[Tensor], before: list[Tensor]) -> bool:
    return len(values) == len(before) and all(map(torch.equal, values, before))


def _offloaded(model: Any) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The tensors that accelerate keeps on disk or in memory and brings in for each pass, each with
    what reads it."""
    for path, module in model.named_modules():
        for hook in _hooks(module):
            kept = getattr(hook, "weights_map", None)
            if kept is None:
                continue
            below = hook.place_submodules
            for name, tensor in chain(
                module.named_parameters(recurse=below), module.named_buffers(recurse=below)
            ):
                if tensor.is_meta:
                    yield (f"{path}.{name}" if path else name), partial(kept.__getitem__, name)


def _hooks(module: Any) -> list[Any]:
    """accelerate's hooks on a module, of which there may be several in a sequence."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook] if hook is not None else []))


def is_offloaded(model: Any) -> bool:
    """Whether some weights are not in place, but brought in for each pass."""
    return any(parameter.is_meta for parameter in model.parameters())


def _adapter_settings(model: Any) -> list[Any]:
    """Which adapters act in a model with layers of peft, and how strongly."""
    return [
        (
            list(layer.active_adapters),
            layer.disable_adapters,
            dict(getattr(layer, "scaling", {})),
            list(getattr(layer, "merged_adapters", [])),
        )
        for layer in adapter_layers(model)
    ]


def adapter_layers(model: Any) -> list[Any]:
    """The modules that peft put in place of a model's own."""
    return [module for module in model.modules() if is_adapter_layer(module)]


def has_adapters(model: Any) -> bool:
    """Whether a model carries adapters of peft, acting or switched off."""
    return any(map(is_adapter_layer, model.modules()))


def is_adapter_layer(module: Any) -> bool:
    # transformers' own models have methods of this name.
    return isinstance(getattr(type(module), "active_adapters", None), property)
