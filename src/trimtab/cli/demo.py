"""`trimtab demo`: steer a real model and measure it, in about three minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json
from trimtab.cli.options import Json, Opened


def demo(
    *,
    opened: Opened = Opened(model="smollm2-135m-instruct"),
    contrast: Annotated[
        str,
        Parameter(
            name=("--contrast", "-c"),
            help="Pairs; where they name no parts, a fifth each is for validation and test.",
        ),
    ] = "builtin:formality",
    output: Annotated[
        Path, Parameter(name=("--output", "-o"), help="Directory for what it makes.")
    ] = Path("trimtab-demo"),
    as_json: Json = False,
) -> None:
    """Steer a real model with a few dozen of its units; show what it gains and what it costs.

    Example: `trimtab demo`
    """
    from trimtab.cli import demonstration
    from trimtab.evaluation import load_contrast

    texts = load_contrast(contrast).with_parts()
    language_model = open_model(opened)

    def say(line: str) -> None:
        if not as_json:
            console.print(line)

    if texts.drawn is not None:
        say(f"{texts.drawn_in_words}.")
    numbers = demonstration.run(language_model, texts, output, say)
    if as_json:
        print_json(numbers)
