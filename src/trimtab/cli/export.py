"""`trimtab export`: steerings in other tools' formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json, read_steerings
from trimtab.cli.options import Force, Json, OpenedOnCpu, Overwrite, Steered
from trimtab.files import check_output
from trimtab.terminal import status


def export(
    *files: Annotated[
        str, Parameter(help="FILE or FILE@DIAL; more of them, or --steer, act after it.")
    ],
    opened: OpenedOnCpu,
    steered: Steered = Steered(),
    to: Annotated[str, Parameter(name="--to", help="The format: lora.")],
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="What to write.")],
    split: Annotated[
        bool,
        Parameter(
            help="Write the part that the format can carry, and say what is left.", negative=()
        ),
    ] = False,
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write steerings in a format that other programs read.

    `lora` is a directory with an adapter that PEFT, vLLM, SGLang and others load. What a format
    cannot carry exactly is refused with the reason and with what does work.

    Example: `trimtab export joy.safetensors@12 --model smollm2-135m-instruct --to lora -o joy/`
    """
    from trimtab.exchange import export as written_as
    from trimtab.steering import Steerings

    check_output(output, overwrite)
    steerings = Steerings(read_steerings(replace(steered, steer=(*files, *steered.steer))))
    language_model = open_model(opened)
    with status(f"writing {output}"):
        exported = written_as(
            language_model, steerings, to, output, overwrite=overwrite, split=split, force=force
        )
    if as_json:
        print_json(exported.record)
        return
    for file in exported.files:
        console.print(f"Saved {file}")
    for left in exported.left_out:
        console.print(f"Left out: {left}")
