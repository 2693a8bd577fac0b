"""`trimtab export`: steerings in other tools' formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json, read_steerings
from trimtab.cli.options import Force, Json, OpenedOnCpu, Overwrite, Steered
from trimtab.files import check_output
from trimtab.options import option
from trimtab.terminal import status


@dataclass(frozen=True, kw_only=True)
class Format:
    """What is written; options after `split` are for some formats only."""

    heading = "Format"

    to: str = option(
        "lora, gguf, gguf-lora, repeng, lm-eval, svec, steering-vectors, steering-lite, vllm-lens "
        "or persona-vectors."
    )
    split: bool = option(
        "Write the part that the format can carry, and say what is left.", False, flag="--split"
    )
    dial: Sequence[float] = option(
        "lora: several adapters, one for each of these dials, as in 5,10,20.", ()
    )
    precision: str | None = option(
        "lora: how numbers are stored: float32 (default), bfloat16, float16 or float64.", None
    )

    @property
    def own(self) -> dict[str, Any]:
        """What only some formats know, as far as it is given."""
        given = {"dials": self.dial or None, "precision": self.precision}
        return {name: value for name, value in given.items() if value is not None}


def export(
    *files: Annotated[
        str, Parameter(help="FILE or FILE@DIAL; more of them, or --steer, act after it.")
    ],
    opened: OpenedOnCpu,
    written: Format,
    steered: Steered = Steered(),
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="What to write.")],
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write steerings in a format that other programs read.

    `lora` is a directory with an adapter that PEFT, vLLM, SGLang and others load, and `gguf-lora`
    the same adapter as a file for llama.cpp; `gguf` is a control vector for llama.cpp, and the
    others are the files of the tools of those names, all for vectors that are added to every token.
    What a format cannot carry exactly is refused with the
    reason and with what does work.

    Example: `trimtab export joy.safetensors@12 --model smollm2-135m-instruct --to lora -o joy/`
    """
    from trimtab.exchange import export as export_as
    from trimtab.exchange import writer_of
    from trimtab.steering import Steerings

    check_output(output, overwrite)
    writer_of(written.to, written.own)
    steerings = Steerings(read_steerings(replace(steered, steer=(*files, *steered.steer))))
    language_model = open_model(opened)
    with status(f"writing {output}"):
        exported = export_as(
            language_model,
            steerings,
            written.to,
            output,
            overwrite=overwrite,
            split=written.split,
            force=force,
            **written.own,
        )
    if as_json:
        print_json(exported.record)
        return
    for file in exported.files:
        console.print(f"Saved {file}")
    for left in exported.left_out:
        console.print(f"Left out: {left}")
    if exported.use:
        console.print("Use it as in", *(f"    {line}" for line in exported.use), sep="\n")
