"""Folds steerings into weights: a plain checkpoint that behaves as the steered model does.

An operator that is affine at a fixed dial, x -> A x + c, folds into the linear maps at its site:

    attn_norm, heads, ffn_norm, ffn_in, final_norm    into the maps that read the site: W A, b + W c
    attn_out, ffn_out, router                         into the map that writes it: A W, A b + c
    embed                                             into the embedding tables
    resid                                             an added vector only, with the FFN's output
    final_norm of GPT-2                               unit by unit into the norm, which has a bias
    attn_post_norm, ffn_post_norm                     unit by unit into the norm's gain g: f g, or
                                                      f (1 + g) - 1 where 1 + g is what multiplies
    attn_norm_in, ffn_norm_in                         not: a norm reads them

`c` needs a bias. Where an architecture has none, its configuration may allow it (Llama's
`attention_bias` and `mlp_bias`); Qwen2 and Mistral become Llama models, which compute the same
and take biases. What is not exact is refused with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, LinearMap, parse_site, site_order
from trimtab.errors import TrimtabError
from trimtab.model.folding import Fold, record_of, unlike
from trimtab.model.language_model import LanguageModel
from trimtab.model.plain import is_plain, plain_copy, untie
from trimtab.model.wrapping import check_model
from trimtab.steering import (
    Intervention,
    Steering,
    Steerings,
    fold_input,
    fold_output,
    no_steering,
)


def bake(
    language_model: LanguageModel, *steerings: Steering | Steerings, force: bool = False
) -> LanguageModel:
    """A new model with the steerings in its weights; the old one stays as it is.

    Weights that do not change are shared between the two. Raises TrimtabError with the reason
    where the result would not be exact.
    """
    check_model(language_model)
    if language_model.quantised:
        raise TrimtabError(
            f"{language_model.name} is quantised: baking would round the change away; attach the "
            "steering instead, or bake the unquantised model"
        )
    single: list[Steering] = []
    for given in steerings:
        single += given if isinstance(given, Steerings) else [given]
    for steering in single:
        if not isinstance(steering, Steering):
            raise no_steering(steering)
        language_model.warn_of(steering)
    folds: list[Fold] = []
    for steering in single:
        steering.check_fits(language_model.anatomy, language_model.identity, force)
        if steering.gate is not None:
            raise TrimtabError(
                f"cannot bake a gated {steering.method} steering: weights act on every text alike; "
                "attach it instead, or take its gate away (steering.gated(None), --gate none)"
            )
        for intervention in steering.interventions:
            if not intervention.idle_at(steering.setting):
                folds.append(_fold(intervention, steering))
    if language_model.image_tokens and any(fold.site == "embed" for fold in folds):
        raise TrimtabError(
            f"cannot bake at embed: {language_model.name} sees images, which do not come from the "
            "embedding table; attach the steering instead"
        )
    # Within a pass earlier sites act first; at one site the order given counts (sort is stable).
    folds.sort(key=lambda fold: site_order(fold.site))
    copied = plain_copy(language_model.model, language_model.name)
    # Adapters that were merged stood in the place of other modules.
    same = is_plain(language_model.model)
    anatomy = Anatomy(copied, like=language_model.anatomy if same else None)
    missing = _missing_biases(anatomy, folds)
    if missing:
        anatomy = Anatomy(_with_biases(anatomy, missing), like=anatomy)
    # W (A2 A1 x): what writes a site takes the operators in their order, what reads it the other
    # way round. Where one map does both the two do not meet: it changes its rows and its columns.
    reading = [fold for fold in folds if _maps(anatomy, fold)[0] == "input"]
    if len({_maps(anatomy, fold)[0] for fold in folds if fold.site == "final_norm"}) > 1:
        raise TrimtabError(
            "cannot bake steerings at final_norm of which one mixes units and another does not: "
            "they fold into different weights, and their order would be lost; attach them instead"
        )
    for fold in folds:
        if fold not in reading:
            _apply(anatomy, fold)
    for fold in reversed(reading):
        _apply(anatomy, fold)
    name = " + ".join([language_model.name, *(steering.label for steering in single)])
    form = language_model.chat_form
    baked = LanguageModel(anatomy.model.eval(), language_model.tokenizer, name, form, anatomy)
    if folds:
        _prove(language_model, single, baked, force)
    base = dict(vars(language_model.identity))
    baked.baked = (*language_model.baked, *(record_of(steering, base) for steering in single))
    baked.processor, baked.no_processor = language_model.processor, language_model.no_processor
    return baked


def _prove(
    language_model: LanguageModel, steerings: Sequence[Steering], baked: LanguageModel, force: bool
) -> None:
    """Compare the baked model's logits with the attached one's."""
    share = unlike(language_model, steerings, baked.model, force)
    if share is not None:
        raise TrimtabError(
            f"cannot bake into {language_model.name}: on a short text the baked model's logits "
            f"differ from the steered model's by {share:.2g} of the largest, so something else "
            "reads or writes there than is known; attach the steering instead"
        )


def _fold(intervention: Intervention, steering: Steering) -> Fold:
    operator: Any = intervention.operator
    if not intervention.scope.everywhere:
        raise TrimtabError(
            f"cannot bake {steering.method}: it acts on the scope '{intervention.scope}', and "
            "weights act on all tokens alike; attach it instead, or give it the scope all"
        )
    if not operator.linear:
        raise TrimtabError(
            f"cannot bake {steering.method}: {operator.description} is not linear in the "
            "activation, so no weights do it; attach it instead"
        )
    return Fold(intervention.site, operator, intervention.dial_at(steering.setting))


# -- which map takes which part of an operator ------------------------------------------------


def _maps(anatomy: Anatomy, fold: Fold) -> tuple[str, list[LinearMap]]:
    """How a fold is taken ("input", "output", "tables", "norm") and by which linear maps."""
    layer, kind = parse_site(fold.site)
    if kind == "embed":
        if not anatomy.tables:
            raise TrimtabError(
                f"cannot bake at embed: in {anatomy.name} a norm or a map stands between the "
                "embedding table and the first block; attach the steering instead"
            )
        return "tables", anatomy.tables
    if kind == "resid":
        assert layer is not None
        if not _only_adds(fold):
            raise TrimtabError(
                f"cannot bake at {fold.site}: the norms that read the residual stream divide by "
                "its length, so changing it by anything but an added vector is no change of "
                "weights (a linear map at all that writes the stream, the embedding included, is "
                "one, but acts at every depth); attach the steering, or fit it at ffn_out"
            )
        added = anatomy.added_to_resid(layer)
        if added is None:
            raise TrimtabError(
                f"cannot bake at {fold.site}: in {anatomy.name} a norm stands between the FFN's "
                "weights and the residual stream, so no bias adds a constant to it; attach the "
                "steering instead"
            )
        return "output", _writers(anatomy, added[0])
    if kind in ("attn_out", "ffn_out", "router"):
        return "output", _writers(anatomy, fold.site)
    if kind.endswith("_norm_in"):
        raise TrimtabError(
            f"cannot bake at {fold.site}: the norm that reads it divides by its length, so no "
            "change of weights is a change of what it reads; attach the steering instead"
        )
    if kind.endswith("_post_norm"):
        _refuse_beyond_gain(anatomy, fold)
        return "norm", []
    if kind == "final_norm" and fold.factors is not None:
        gain = anatomy.gain(fold.site)
        if gain is not None and gain.biased:
            return "norm", []
    readers = anatomy.readers(fold.site)
    if not readers:
        raise TrimtabError(
            f"cannot bake at {fold.site}: more than linear maps that are known reads it in "
            f"{anatomy.name}; attach the steering instead"
        )
    if any(reader.joint for reader in readers) and fold.factors is None:
        raise TrimtabError(
            f"cannot bake at {fold.site}: the router weighs each expert's part of it anew for "
            "each token, so mixing units of several experts is no change of weights; attach the "
            "steering instead"
        )
    return "input", readers


def _refuse_beyond_gain(anatomy: Anatomy, fold: Fold) -> None:
    """Refuse what does not go into the gain of the norm that writes a site, nor into its bias."""
    gain, reason = anatomy.gain(fold.site), ""
    if fold.factors is None:
        reason = "its gain takes each unit by itself, so that units cannot be mixed"
    elif gain is None:
        reason = "how its weights multiply what it returns is not known"
    elif fold.shifts and not gain.biased:
        reason = "it has no bias, so that nothing can be added"
    if reason:
        raise TrimtabError(
            f"cannot bake at {fold.site}: a norm writes it straight into the residual stream, and "
            f"{reason}; attach the steering instead"
        )


def _writers(anatomy: Anatomy, site: str) -> list[LinearMap]:
    writers = anatomy.writers(site)
    if not writers:
        raise TrimtabError(
            f"cannot bake at {site}: no linear maps that are known write it in {anatomy.name}; "
            "attach the steering instead"
        )
    return writers


def _part_of_offset(anatomy: Anatomy, fold: Fold) -> float:
    """What a constant at the site is divided by to be one in the bias of the map that takes it."""
    layer, kind = parse_site(fold.site)
    if kind == "resid":
        assert layer is not None
        added = anatomy.added_to_resid(layer)
        assert added is not None  # or _maps would have refused
        return added[1] * anatomy.writer_factor(added[0])
    if kind in ("attn_out", "ffn_out"):
        return anatomy.writer_factor(fold.site)
    if kind == "final_norm":
        return 1 / anatomy.final_factor
    return 1.0


def _only_adds(fold: Fold) -> bool:
    factors = fold.factors
    return factors is not None and bool((factors == 1).all())


def _apply(anatomy: Anatomy, fold: Fold) -> None:
    """Change the weights of one fold."""
    operator, dial = fold.operator, fold.dial
    how, maps = _maps(anatomy, fold)
    if how == "norm":
        _apply_to_norm(anatomy, fold)
        return
    if how == "tables":
        untie(anatomy.model)
        for place, table in enumerate(maps):
            last = place == len(maps) - 1
            weight = table.read()
            new, offset = fold_output(operator, dial, weight, None)
            # Every token takes one row of each table, so a constant belongs to one of them.
            new = new + (offset / anatomy.embedding_scale)[:, None] if last else new
            table.write(_parameter(new, weight, fold))
        return
    if fold.site == "final_norm":
        untie(anatomy.model)
    for linear_map in maps:
        weight = linear_map.read()
        old = getattr(linear_map.owner, linear_map.bias) if linear_map.bias else None
        transform = fold_input if how == "input" else fold_output
        known = None if old is None else old.detach()
        new, bias = transform(operator, dial, weight, known, _part_of_offset(anatomy, fold))
        if not torch.equal(new.to(weight.dtype), weight):
            linear_map.write(_parameter(new, weight, fold))
        if old is not None and linear_map.bias:
            setattr(linear_map.owner, linear_map.bias, _parameter(bias, old, fold))


def _apply_to_norm(anatomy: Anatomy, fold: Fold) -> None:
    """Multiply the gain of the norm that writes a site, and its bias; what is added goes there."""
    gain, factors = anatomy.gain(fold.site), fold.factors
    assert gain is not None  # or _maps would not have said "norm"
    assert factors is not None
    norm: Any = gain.owner
    weight = norm.weight.detach()
    factors = factors.to(weight.device)
    multiplied = factors * (gain.added + weight.double()) - gain.added
    norm.weight = _parameter(multiplied, weight, fold)
    if gain.biased:
        offset = fold.operator.offset(fold.dial).to(factors)
        norm.bias = _parameter(factors * norm.bias.detach().double() + offset, norm.bias, fold)


def _parameter(value: Tensor, old: Tensor, fold: Fold) -> nn.Parameter:
    """A new value in the dtype of the old one, which has to hold it."""
    value = value.to(old.dtype)
    if not torch.isfinite(value).all():
        raise TrimtabError(
            f"cannot bake at {fold.site}: with the dial at {fold.dial:g} weights are NaN or "
            f"infinite in {str(old.dtype).removeprefix('torch.')}; turn the dial down, or load the "
            "model with a larger dtype"
        )
    return nn.Parameter(value)


# -- biases that are not there yet ------------------------------------------------------------


def _missing_biases(anatomy: Anatomy, folds: list[Fold]) -> list[str]:
    """Names of the bias parameters that the folds need and the model lacks."""
    names = {id(module): name for name, module in anatomy.model.named_modules()}
    missing = []
    for fold in folds:
        how, maps = _maps(anatomy, fold)
        if not fold.shifts or how in ("tables", "norm"):
            continue
        for linear_map in maps:
            owner = linear_map.owner
            if not linear_map.constant:
                raise TrimtabError(
                    f"cannot bake an added vector at {fold.site}: the router weighs the bias of "
                    f"each of {names[id(owner)]} anew for each token; attach the steering instead"
                )
            if linear_map.bias is None or not hasattr(owner, linear_map.bias):
                raise TrimtabError(
                    f"cannot bake an added vector at {fold.site}: {names[id(owner)]} in "
                    f"{anatomy.name} takes no bias; attach the steering instead"
                )
            if getattr(owner, linear_map.bias) is None:
                missing.append(f"{names[id(owner)]}.{linear_map.bias}")
    return missing


def _with_biases(anatomy: Anatomy, wanted: list[str]) -> Any:
    """The same model with room for the wanted biases, which are zero at first."""
    model: Any = anatomy.model
    old_config = model.config
    rehoused = anatomy.llama_alike
    config = _llama_config(old_config) if rehoused else old_config
    model_type: Any = type(model)
    if rehoused:
        from transformers import LlamaForCausalLM

        model_type = LlamaForCausalLM
    text = config.get_text_config()  # of a multimodal model; else the configuration itself
    for flag, inside in (("attention_bias", "attn"), ("mlp_bias", "mlp")):
        needed = any(inside in name for name in wanted)
        present = any(inside in name and name.endswith(".bias") for name in model.state_dict())
        if hasattr(text, flag) and (needed or (rehoused and present)):
            setattr(text, flag, True)
    # Ask the architecture itself which parameters it has under this configuration.
    with torch.device("meta"):
        template = model_type(config)
    expected, state = template.state_dict(), model.state_dict()
    for name in wanted:
        if name not in expected:
            raise TrimtabError(
                f"cannot bake an added vector: {old_config.model_type} has no bias at {name} and "
                "cannot be given one; attach the steering instead"
            )
    biases = {
        name: torch.zeros(tensor.shape, dtype=model.dtype, device=model.device)
        for name, tensor in expected.items()
        if name not in state
    }
    if not rehoused:
        for name, value in biases.items():
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, nn.Parameter(value))
        return model
    template.load_state_dict({**state, **biases}, assign=True)
    if config.tie_word_embeddings:
        template.tie_weights()
    # Buffers that are computed, not stored, stayed on the meta device: compute them anew.
    rotary = template.model.rotary_emb
    template.model.rotary_emb = type(rotary)(config=config).to(model.device)
    template.generation_config = copy.deepcopy(model.generation_config)
    return template


def _llama_config(config: Any) -> Any:
    """The Llama configuration that computes what this Qwen2 or Mistral configuration does."""
    from transformers import LlamaConfig

    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    slides = "sliding_attention" in kinds if kinds else window is not None
    if slides and window is not None and window < config.max_position_embeddings:
        raise TrimtabError(
            f"cannot bake an added vector: {config.model_type} has no biases, and its sliding "
            f"window of {window} tokens keeps it from becoming a Llama model, which has; attach "
            "the steering instead"
        )
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings",
        "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
        "tie_word_embeddings", "rope_parameters", "attention_dropout", "head_dim", "dtype",
    )  # fmt: skip
    llama = LlamaConfig(**{name: getattr(config, name) for name in kept if hasattr(config, name)})
    llama._attn_implementation = config._attn_implementation
    llama._name_or_path = config._name_or_path
    llama.architectures = ["LlamaForCausalLM"]
    return llama
