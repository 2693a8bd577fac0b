"""The .safetensors files of steering-lite: tensors `layerN.v`, and a configuration as JSON in the
metadata.

At the output of block N, counted from 0, and at every token,

    mean_diff, pca          y <- y + coeff v            (several components: their sum)
    directional_ablation    y <- y - (v'y) v + coeff v  v of length 1

`dtype` is what the tensors are held in when they are attached, bfloat16 if nothing else is said;
written is float32. With `target_submodule` the state belongs to linear maps inside blocks, by name
(`sub::layers.5.mlp.down_proj::v`). The other methods are no additions and are not read.

https://github.com/wassname/steering-lite (src/steering_lite: vector.py, attach.py, variants/)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from safetensors.torch import save
from torch import Tensor

from trimtab.errors import shown
from trimtab.exchange.containers import Container, as_floats, as_layer, as_number, json_shown
from trimtab.exchange.request import Exported, Request
from trimtab.exchange.vectors import Found, adds, chosen, in_stream, one_coefficient
from trimtab.files import parse_json, write_whole
from trimtab.model import LanguageModel
from trimtab.steering import Clamp, Intervention

_KEY = re.compile(r"layer(0|[1-9][0-9]{0,5})\.([A-Za-z0-9_]{1,20})")
_ADDS = ("mean_diff", "pca")
_ABLATES = "directional_ablation"


def write(request: Request) -> Exported:
    """A Vector of steering-lite (Vector.load), whose coeff is the dial."""
    added, left_out = in_stream(request, "a vector of steering-lite")
    coefficient, vectors = one_coefficient(added)
    tensors = {f"layer{n}.v": vector.cpu().contiguous().clone() for n, vector in vectors.items()}
    configuration = {
        "method": "mean_diff",
        "layers": list(vectors),
        "target": "residual",
        "target_submodule": None,
        "coeff": coefficient,
        "dtype": "float32",
        "seed": 0,
        "normalize": False,
        "subtract_corpus_mean": False,
    }
    content = save(tensors, {"cfg": json.dumps(configuration)})
    file = write_whole(request.output, content, request.overwrite)
    use = f'with Vector.load("{file}")(model): ...'
    return Exported("steering-lite", (file,), left_out=left_out, use=(use,))


def is_steering_lite(container: Container) -> bool:
    """Whether a file has a configuration of steering-lite."""
    return container.kind == "safetensors" and "cfg" in container.metadata


def read(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """What a Vector adds or takes away."""
    configuration = parse_json(container.metadata.get("cfg", ""), f"{container.named}: cfg")
    if not isinstance(configuration, dict):
        raise container.refused("its configuration is no JSON object")
    method = configuration.get("method")
    if method not in (*_ADDS, _ABLATES):
        raise container.refused(
            f"its method is {shown(json_shown(method), 40)}: read are {', '.join(_ADDS)} and "
            f"{_ABLATES}, which add or take away a direction"
        )
    if configuration.get("target_submodule") is not None:
        raise container.refused("it is for linear maps inside blocks (target_submodule)")
    coefficient = as_number(configuration.get("coeff", 1.0), f"{container.named}: coeff")
    there = chosen(container, _by_site(container, lm), sites, together=True)
    if method != _ABLATES:
        return adds({site: (vector, coefficient) for site, vector in there.items()})
    clamps = [
        Intervention(site, _set_along(vector, coefficient, container))
        for site, vector in there.items()
    ]
    return Found(tuple(clamps), share=True)


def _by_site(container: Container, lm: LanguageModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in container.content.items():
        match = _KEY.fullmatch(name)
        if match is None or match[2] not in ("v", "V"):
            raise container.refused(f"such a vector has no tensor '{shown(name, 60)}'")
        layer = as_layer(match[1], lm.anatomy.layers, f"{container.named}: the layer of {name}")
        vector = as_floats(tensor, f"{container.named}: {name}", (1,) if match[2] == "v" else (2,))
        vector = vector if vector.dim() == 1 else vector.sum(0)
        site = f"layers.{layer}.resid"
        if site in found:
            raise container.refused(f"layer {layer} is there twice")
        if vector.any():
            found[site] = vector
    return found


def _set_along(vector: Tensor, value: float, container: Container) -> Clamp:
    """y - (v'y) v + value v for v of length 1: what lies along v is set to the value."""
    if abs(float(vector.double().norm()) - 1) > 1e-3:
        raise container.refused(f"{_ABLATES} takes away along a vector that is not of length 1")
    direction = vector.double() / vector.double().norm()
    return Clamp(direction.float(), value, value)
