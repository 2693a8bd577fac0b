"""Writes steerings in other tools' formats.

A format is a function in `FORMATS` that takes a `Request` and, by name, the options that only some
formats know. What it cannot carry it refuses, with the reason and the way that does work; with
`split` it writes the part that fits and says what is left. It writes to a temporary place and
renames that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError, shown
from trimtab.exchange import (
    control_vectors,
    gguf_lora,
    harness,
    json_vectors,
    lora,
    pickled,
    steering_lite,
)
from trimtab.exchange.request import Exported, Request
from trimtab.model import LanguageModel, check_model
from trimtab.steering import Steering, Steerings, together

#: What writes each format.
FORMATS: dict[str, Callable[..., Exported]] = {
    "lora": lora.write,
    "gguf-lora": gguf_lora.write,
    "gguf": control_vectors.write_gguf,
    "repeng": control_vectors.write_repeng,
    "lm-eval": harness.write,
    "svec": json_vectors.write_svec,
    "steering-vectors": pickled.write_steering_vectors,
    "steering-lite": steering_lite.write,
    "vllm-lens": json_vectors.write_vllm_lens,
    "persona-vectors": pickled.write_persona,
}


def export(
    language_model: LanguageModel,
    steering: Steering | Steerings,
    format: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    split: bool = False,
    force: bool = False,
    **options: Any,
) -> Exported:
    """Write steerings, each at its dial, in a format that other programs read.

    lora    a directory with a LoRA adapter (Hu et al., 2106.09685) that PEFT, vLLM, SGLang, TGI
            and others load; `dials` makes several, each in a directory of its own, and `precision`
            says how numbers are stored: float32, float64, bfloat16, float16
    gguf    a control vector for llama.cpp; repeng the same for repeng
    lm-eval, svec, steering-vectors, steering-lite, vllm-lens, persona-vectors
            the file of that tool, for vectors that are added to every token

    What a format cannot carry exactly raises TrimtabError, with what does work; with `split` the
    rest is written, and `left_out` of the result says what is not. `force` allows a steering that
    was made for another model.
    """
    check_model(language_model)
    given = {name: value for name, value in options.items() if value is not None}
    writer = writer_of(format, given)
    steerings = together(steering)
    if not steerings:
        raise TrimtabError("there is no steering to export")
    for one in steerings:
        one.check_fits(language_model.anatomy, language_model.identity, force)
        language_model.warn_of(one)
    request = Request(language_model, steerings, Path(output), overwrite, split, force)
    return writer(request, **given)


def writer_of(format: str, given: Collection[str]) -> Callable[..., Exported]:
    """What writes a format; refused is one that there is none of, and an option that it lacks."""
    writer = FORMATS.get(format)
    if writer is None:
        raise TrimtabError(f"format is {shown(format)!r}: known are {', '.join(FORMATS)}")
    for name in given:
        if name not in _options(writer):
            others = [other for other, made in FORMATS.items() if name in _options(made)]
            whose = f"which is for {', '.join(others)}" if others else "and no other does"
            raise TrimtabError(f"{format} takes no {shown(name)}, {whose}")
    return writer


def _options(writer: Callable[..., Exported]) -> list[str]:
    parameters = inspect.signature(writer).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
