"""`trimtab bake`: a plain checkpoint, or a GGUF file, with the steerings in its weights."""

from __future__ import annotations

from os.path import realpath
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from trimtab.cli.common import (
    console,
    open_model,
    print_json,
    read_steerings,
)
from trimtab.cli.options import AlwaysSteered, Force, Json, OpenedOnCpu, Overwrite
from trimtab.errors import TrimtabError
from trimtab.files import check_output
from trimtab.terminal import status


def bake(
    *,
    opened: OpenedOnCpu,
    steered: AlwaysSteered,
    output: Annotated[
        Path, Parameter(name=("--output", "-o"), help="The directory or GGUF file to write.")
    ],
    to: Annotated[
        Literal["checkpoint", "gguf"],
        Parameter(help="What is written: a directory for transformers, or a file for llama.cpp."),
    ] = "checkpoint",
    gguf_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        Parameter(help="gguf: how matrices are stored: f32 (default), f16, bf16 or q8_0."),
    ] = None,
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fold steerings into the weights: a checkpoint that plain transformers loads, or a GGUF file
    that llama.cpp runs.

    Beside the weights, trimtab.json and the model card (README.md) say what was baked; `trimtab
    inspect DIR` shows it.

    With --overwrite the files of a checkpoint that is there are replaced; a directory that holds
    anything else is refused, and so are the model's own, one inside it and one around it.

    Example: `trimtab bake --model smollm2-135m-instruct --steer joy.safetensors@12 -o joy-model/`

    Example: `trimtab bake --model smollm2-135m-instruct --steer joy.safetensors@12 --to gguf -o
    joy.gguf`
    """
    from trimtab.model import bake as bake_into

    _check(output, to, gguf_type, opened.model, overwrite)
    steerings = read_steerings(steered)
    language_model = open_model(opened)
    with status("folding the steerings into the weights"):
        baked = bake_into(language_model, *steerings, force=force)
    if to == "gguf":
        from trimtab.exchange import save_gguf

        with status(f"writing {output}"):
            save_gguf(baked, output, type=gguf_type or "f32", overwrite=overwrite)
    else:
        baked.save_pretrained(output, overwrite)
    if as_json:
        print_json(
            {
                "output": str(output),
                "model": dict(vars(language_model.identity)),
                "architecture": baked.anatomy.name,
                "steering": steered.steer,
            }
        )
        return
    if to == "gguf":
        console.print(f"Saved {output}. Run it with")
        console.print(f"    llama-cli -m {output}")
        return
    console.print(f"Saved {output}, a plain {type(baked.model).__name__} checkpoint. Load it with")
    console.print(f'    AutoModelForCausalLM.from_pretrained("{output}")')


def _check(output: Path, to: str, gguf_type: str | None, model: str, overwrite: bool) -> None:
    """Refuse what cannot be written before the model is loaded."""
    from trimtab.model import check_target, locations

    if to == "checkpoint":
        if gguf_type is not None:
            raise TrimtabError("--gguf-type is for GGUF files: add --to gguf")
        check_target(output, locations(model), overwrite)
    elif output.is_dir():
        raise TrimtabError(f"{output} is a directory: name a file, as in joy.gguf")
    elif realpath(output) in map(realpath, locations(model)):
        raise TrimtabError(f"{output} is where the model comes from: choose another name")
    check_output(output, overwrite)
