"""`trimtab demo`: steer a real model and measure it, in about three minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import demonstration
from trimtab.cli.common import Device, Dtype, Json, console, open_model, print_json
from trimtab.evaluation import load_contrast

Output = Annotated[Path, typer.Option("--output", "-o", help="Directory for what it makes.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="A pack, directory or hub id.")]
ContrastSource = Annotated[
    str, typer.Option("--contrast", "-c", help="A contrast with train, validation and test parts.")
]


def demo(
    model: ModelName = "smollm2-135m-instruct",
    contrast: ContrastSource = f"builtin:{demonstration.CONTRAST}",
    output: Output = Path("trimtab-demo"),
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Steer a real model with a few dozen of its units; show what it gains and what it costs.

    Example: `trimtab demo`
    """
    texts = load_contrast(contrast)
    language_model = open_model(model, dtype, device)

    def say(line: str) -> None:
        if not as_json:
            console.print(line)

    numbers = demonstration.run(language_model, texts, output, say)
    if as_json:
        print_json(numbers)
