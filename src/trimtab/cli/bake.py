"""`trimtab bake`: a plain checkpoint with the steerings in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli.common import (
    console,
    open_model,
    print_json,
    read_steerings,
)
from trimtab.cli.options import AlwaysSteered, Force, Json, OpenedOnCpu, Overwrite
from trimtab.files import check_output
from trimtab.terminal import status


def bake(
    *,
    opened: OpenedOnCpu,
    steered: AlwaysSteered,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="The directory to write.")],
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fold steerings into the weights: a checkpoint that plain transformers loads.

    Beside the weights, trimtab.json and the model card (README.md) say what was baked; `trimtab
    inspect DIR` shows it.

    With --overwrite the files of a checkpoint that is there are replaced; a directory that holds
    anything else is refused, and so are the model's own, one inside it and one around it.

    Example: `trimtab bake --model smollm2-135m-instruct --steer joy.safetensors@12 -o joy-model/`
    """
    from trimtab.model import bake as bake_into
    from trimtab.model import check_target, locations

    check_target(output, locations(opened.model), overwrite)
    check_output(output, overwrite)
    steerings = read_steerings(steered)
    language_model = open_model(opened)
    with status("folding the steerings into the weights"):
        baked = bake_into(language_model, *steerings, force=force)
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
    console.print(f"Saved {output}, a plain {type(baked.model).__name__} checkpoint. Load it with")
    console.print(f'    AutoModelForCausalLM.from_pretrained("{output}")')
