"""The steering files of lm-evaluation-harness (`--model steered --model_args steer_path=FILE.pt`).

A .pt file is a dictionary by hook point, which is a module's name within the model's base model
(`layers.12`, `layers.12.mlp`); its output is changed at every token:

    add     x <- x + steering_coefficient * steering_vector
    clamp   x <- x + (steering_coefficient - v'(x - bias)) v,  v = steering_vector of length 1

A clamp sets what lies along v, which is a Clamp between two equal bounds. `head_index` is for
modules that put out one row a head, which sites are not.

A .csv file has no vectors: its rows name features of sparse autoencoders (harness_csv.py).

https://github.com/EleutherAI/lm-evaluation-harness (lm_eval/models/hf_steered.py)
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, TrimtabWarning, shown
from trimtab.exchange import harness_csv
from trimtab.exchange.containers import Container, as_floats, as_number
from trimtab.exchange.modules import module_names, sites_by_module
from trimtab.exchange.request import Exported, Request
from trimtab.exchange.vectors import Added, Fitting, Found, chosen, everywhere
from trimtab.files import write_whole
from trimtab.model import LanguageModel
from trimtab.steering import Add, Clamp, Intervention

_WHAT = "a steering file of lm-eval"
_KEYS = {"steering_vector", "steering_coefficient", "action", "bias", "head_index"}


def write(request: Request) -> Exported:
    """A .pt file, each vector with its coefficient, or a .csv that names features instead."""
    kind = request.output.suffix.lower()
    if kind not in (".pt", ".pth", ".csv"):
        raise TrimtabError(
            f"{shown(request.output, 150)}: lm-eval takes vectors from a file that ends in "
            ".pt, and features of released autoencoders from one in .csv: write -o FILE.pt"
        )
    lm = request.language_model
    names = module_names(lm, lm.model.base_model)

    def refusal(added: Added) -> str | None:
        if added.site in names:
            return None
        return f"{_WHAT} changes what a module puts out, and no module puts this out"

    fitting = everywhere(request, _WHAT, refusal)
    if kind == ".csv":
        file = harness_csv.write(request, fitting.added, names)
        warnings.warn(
            "lm-eval 0.4.13 refuses the rows of a .csv that add, which versions before it take: a "
            ".pt holds the same vector, and all of them read it",
            TrimtabWarning,
            stacklevel=4,
        )
        return _exported(lm, file, fitting)
    content = {
        names[one.site]: {
            "action": "add",
            "steering_vector": one.vector.cpu().contiguous().clone(),
            "steering_coefficient": one.coefficient,
            "bias": None,
            "head_index": None,
        }
        for one in fitting.added
    }
    return _exported(lm, write_whole(request.output, saved(content), request.overwrite), fitting)


def _exported(lm: LanguageModel, file: Path, fitting: Fitting) -> Exported:
    use = f"lm_eval --model steered --model_args pretrained={lm.name},steer_path={file} --tasks ..."
    return Exported("lm-eval", (file,), left_out=fitting.left_out, use=(use,))


def saved(content: Any) -> bytes:
    """What torch.save makes of plain tensors and dictionaries."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def is_lm_eval(container: Container) -> bool:
    """Whether a file is a dictionary of hook points, or the table that has no vectors."""
    if container.kind == "csv":
        return harness_csv.is_table(container.content)
    content = container.content
    return (
        container.kind == "pickle"
        and isinstance(content, Mapping)
        and bool(content)
        and all(
            isinstance(each, Mapping) and "steering_vector" in each for each in content.values()
        )
    )


def read(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """The additions and clamps of a .pt file, or of features that a .csv file names."""
    content = container.content
    if container.kind == "csv":
        content = harness_csv.entries(container)
    known = sites_by_module(lm, lm.model.base_model)
    there = {}
    for hook, entry in content.items():
        where = f"{container.named}: hook point {shown(hook, 60)}"
        site = known.get(hook) if isinstance(hook, str) else None
        if site is None:
            raise TrimtabError(
                f"{where} is no module of this {lm.anatomy.name} whose output is a site"
            )
        changed = _changed(site, entry, where)
        if changed is not None:
            if site in there:
                raise TrimtabError(f"{where} is {site}, which another hook point is, too")
            there[site] = changed
    picked = chosen(container, there, sites, together=True)
    return _together(list(picked.values()))


def _changed(site: str, entry: Any, where: str) -> tuple[Intervention, float] | None:
    """What one entry does, and its coefficient; None of a vector of zeros that is added."""
    unknown = sorted(str(key) for key in entry if key not in _KEYS)
    if unknown:
        raise TrimtabError(f"{where} has {shown(unknown[0], 40)}, which is not known here")
    if entry.get("head_index") is not None:
        raise TrimtabError(f"{where} is for one head of a module with a row a head: no site is")
    vector = as_floats(entry["steering_vector"], f"{where}, steering_vector", (1,))
    named = f"{where}, steering_coefficient"
    coefficient = as_number(entry.get("steering_coefficient", 1.0), named)
    bias = entry.get("bias")
    if bias is not None:
        bias = as_floats(bias, f"{where}, bias", (1,))
        if len(bias) != len(vector):
            raise TrimtabError(f"{where} has a bias of {len(bias)} units for {len(vector)}")
    if entry.get("action") == "add":
        if bias is not None:
            raise TrimtabError(f"{where} adds and has a bias, which lm-eval refuses")
        return (Intervention(site, Add(vector)), coefficient) if vector.any() else None
    if entry.get("action") == "clamp":
        return Intervention(site, _clamp(vector, coefficient, bias, where)), 1.0
    raise TrimtabError(f"{where}: action is {shown(entry.get('action'), 40)}, not add or clamp")


def _clamp(vector: Tensor, value: float, bias: Tensor | None, where: str) -> Clamp:
    length = vector.double().norm()
    if not length > 0:
        raise TrimtabError(f"{where} clamps along a vector of zeros")
    direction = vector.double() / length
    if bias is not None:  # measured from the bias on, and put back onto it
        value = as_number(value + float(direction @ bias.double()), f"{where}, its value")
    return Clamp(direction.float(), value, value)


def _together(changes: list[tuple[Intervention, float]]) -> Found:
    """One dial for all: the coefficient where it is that of all and nothing is clamped; else 1,
    with the coefficients as weights."""
    clamps = any(isinstance(each.operator, Clamp) for each, _ in changes)
    coefficients = {coefficient for _, coefficient in changes}
    if len(coefficients) == 1 and not clamps:
        return Found(tuple(each for each, _ in changes), coefficients.pop())
    weighted = [Intervention(each.site, each.operator, weight=by) for each, by in changes]
    return Found(tuple(weighted), share=clamps)
