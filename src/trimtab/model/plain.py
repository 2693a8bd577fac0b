"""The plain model of transformers behind what a user holds.

`unwrap` takes off what stands around a model (torch.compile, DataParallel, peft); layers that peft
put into the model stay and act. `plain_copy` is what can be changed and written as an ordinary
checkpoint: a copy that shares its weights with the model, with such layers merged into them.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import KINDS, Anatomy, is_hooked
from trimtab.errors import TrimtabError, first_line
from trimtab.model.identity import adapter_layers, is_adapter_layer, is_offloaded

#: Largest difference of logits, as a share of the largest one, that merging adapters may make.
_MERGED_ALIKE = {torch.float64: 1e-6, torch.float32: 1e-3}
_MERGED_ALIKE_IN_HALF = 0.05


def unwrap(model: Any) -> Any:
    """The model inside torch.compile, DataParallel, DistributedDataParallel and peft's models."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, nn.Module) and hasattr(model, "peft_config"):
            inner = _inside_peft(model)
            if inner is model:
                return model
            model = inner
        else:
            return model


def _inside_peft(model: Any) -> Any:
    """The model that peft put its layers into; refused where the adapter acts elsewhere, too."""
    if not type(model).__module__.startswith("peft."):
        return model  # a model of transformers that carries adapters
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model.model
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}
    refusal = TrimtabError(
        f"cannot steer this peft model: its adapter ({', '.join(sorted(kinds))}) acts outside the "
        "layers of the model; wrap the model without it, or merge it first (merge_and_unload)"
    )
    try:
        alike = torch.equal(_some_logits(model.eval()), _some_logits(inner.eval()))
        anatomy = Anatomy(inner)
        for kind in KINDS:
            for site in anatomy.sites(kind) if anatomy.has(kind) else ():
                anatomy.point(site)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise refusal from error
    if not alike:
        raise refusal
    return inner


def is_quantised(model: Any) -> bool:
    """Whether weights are stored in fewer bits; a GGUF model has plain ones once loaded."""
    if getattr(model, "hf_quantizer", None) is not None:
        return not _marked_as_gguf(model)
    return any(map(_is_few_bits, model.modules()))


def _is_few_bits(module: Any) -> bool:
    """Whether a linear map keeps its weights in fewer bits, put there without transformers."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    if is_adapter_layer(module):  # what it stands around is looked at by itself
        return False
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(
        not tensor.is_floating_point()
        or tensor.element_size() == 1
        or type(tensor) not in (Tensor, nn.Parameter)
        for tensor in held
    )


def decompress(model: Any) -> None:
    """Have compressed-tensors unpack a model's weights now, not in the middle of its first pass.

    What is hooked and digested is then what stays. Some formats are unpacked to bfloat16 whatever
    the model's dtype is.
    """
    if not hasattr(model, "ct_decompress_hook"):
        return
    with redirect_stderr(io.StringIO()):  # bars that cannot be turned off
        model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            wide = weight.is_floating_point() and weight.element_size() > 1
            if name in ("weight", "bias") and wide and weight.dtype != model.dtype:
                delattr(module, name)  # setting it would write into the old one
                module.register_parameter(name, nn.Parameter(weight.detach().to(model.dtype)))


def is_plain(model: Any) -> bool:
    """Whether transformers writes the model as it is, as an ordinary checkpoint."""
    return not (_marked_as_gguf(model) or adapter_layers(model))


def _marked_as_gguf(model: Any) -> bool:
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    return quantizer is not None and "gguf" in str(method).lower()


def plain_copy(model: Any, name: str) -> Any:
    """A copy of a model for an ordinary checkpoint; refused where it would be another model.

    Its parameters are shared with the model: whoever changes one replaces it.
    """
    if is_hooked(model):
        raise TrimtabError(
            f"cannot copy {name} while it is steered: the copy would stay so, and its weights "
            "would not; do it after the block"
        )
    if is_offloaded(model):
        raise TrimtabError(
            f"cannot copy {name}: some of its weights are offloaded (device_map); load it whole"
        )
    adapted = adapter_layers(model)
    if adapted and is_quantised(model):
        raise _cannot_merge(name, "the weights are quantised, and rounding would change it")
    before = _some_logits(model) if adapted else None
    # Merging writes into the weights that an adapter stands at.
    apart = {id(parameter) for layer in adapted for parameter in layer.parameters()}
    shared = {id(p): p for p in model.parameters() if id(p) not in apart}
    copied: Any = copy.deepcopy(model, shared)
    if before is not None:
        _merge(copied, name)
        _check_merged(before, _some_logits(copied), name)
    # A model read from GGUF is marked as quantised although its weights are plain by now.
    if getattr(copied, "hf_quantizer", None) is not None:
        copied.hf_quantizer = None
        copied.is_quantized = False
        del copied.config.quantization_config
    return copied


def _merge(model: Any, name: str) -> None:
    """Fold the adapters that act into the layers that they stand at, and take them off."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(is_adapter_layer(end) for end in ends):
        untie(model)
    for parent, child, layer in list(_outermost(model)):
        acts = not layer.disable_adapters
        try:
            if hasattr(layer, "unload_and_optionally_merge_module"):
                plain = layer.unload_and_optionally_merge_module(acts, False, None)
            else:
                if acts:
                    layer.merge(safe_merge=False, adapter_names=None)
                plain = layer.get_base_layer()
        except Exception as error:  # every kind of adapter has reasons of its own
            reason = first_line(error) or type(error).__name__
            raise _cannot_merge(name, reason) from error
        setattr(parent, child, plain)
    if hasattr(model, "peft_config"):
        del model.peft_config
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
        model._weight_conversions = None  # the names of its tensors in the adapter's file


def _outermost(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The layers of peft that stand in no other one: parent, name, layer."""
    for name, child in module.named_children():
        if is_adapter_layer(child):
            yield module, name, child
        else:
            yield from _outermost(child)


def untie(model: Any) -> None:
    """From here on the embedding table and the LM head are two tensors."""
    table = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for inner in model.get_output_embeddings().modules():  # inside an adapter's layer, too
        weight = inner._parameters.get("weight")
        if weight is not None and id(weight) in table:
            inner.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False


def _check_merged(before: Tensor, after: Tensor, name: str) -> None:
    """Adapters of some kinds say that they can be merged, and change."""
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-30))
    if not difference <= _MERGED_ALIKE.get(before.dtype, _MERGED_ALIKE_IN_HALF):
        raise _cannot_merge(name, f"the merged model's logits differ by {difference:.1%}")


def _cannot_merge(name: str, reason: str) -> TrimtabError:
    return TrimtabError(
        f"cannot merge the adapter of {name} into its weights: {reason}; keep it as an adapter "
        "and attach the steering"
    )


@torch.no_grad()
def _some_logits(model: Any) -> Tensor:
    """Of eight tokens from all over the vocabulary."""
    vocabulary, device = model.config.get_text_config().vocab_size, next(model.parameters()).device
    ids = torch.linspace(0, vocabulary - 1, 8, device=device).long()[None]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
