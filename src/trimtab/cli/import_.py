"""`trimtab import`: a steering from another tool's file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json, refuse_steering_path
from trimtab.cli.options import Json, Overwrite, Read
from trimtab.cli.values import read_number
from trimtab.errors import TrimtabError, one_line
from trimtab.options import option

if TYPE_CHECKING:
    from trimtab.steering import Steering

#: Sites that are said one by one.
_FEW = 12


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the file is, and what of it acts."""

    heading = "Steerings"

    format: str | None = option(
        "lora, gguf, repeng, lm-eval, svec, steering-vectors, steering-lite, vllm-lens, "
        "persona-vectors, sae-ts, transformer-lens, neuronpedia or tensor, instead of what the "
        "file itself looks like.",
        None,
        flag="--from",
    )
    site: str | None = option(
        "Sites that act, with commas between them, of a file with several: layers.12.resid, or "
        "resid for all of a kind; and where a bare tensor belongs.",
        None,
    )
    features: str | None = option(
        "Of a file of SAE-TS: the features to raise, as in 14455, or 14455=1,77=-0.5 with weights.",
        None,
    )
    correction: float = option(
        "Of a file of SAE-TS: how much is taken away of what every steering does.", 1.0
    )
    measure: bool = option(
        "Measure the dial on plain text: its range, and the strengths gentle, clear and strong.",
        True,
    )


def import_(
    source: Annotated[Path, Parameter(help="The other tool's file, or an adapter's directory.")],
    /,
    *,
    opened: Read,
    output: Annotated[
        Path, Parameter(name=("--output", "-o"), help="The .safetensors file to write.")
    ],
    reading: Reading = Reading(),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a steering of another tool's file: of llama.cpp, repeng, lm-eval, steering-vectors,
    vLLM-Lens, Neuronpedia and others, of a bare tensor, or of an adapter that export wrote.

    It does what the other tool does with the file, and says at which sites: tools count layers each
    in its own way. Nothing in the file is run, and what does not fit the model is refused. The dial
    stands where the file says, or on 1.

    Example: `trimtab import vector.gguf --model smollm2-135m-instruct -o joy.safetensors`

    Example: `trimtab import direction.npy --site layers.12.resid --model smollm2-135m-instruct -o
    joy.safetensors`

    Example: `trimtab import adapter_2b_layer_12.pt --features 14455 --site layers.12.resid --model
    google/gemma-2-2b -o london.safetensors`
    """
    from trimtab.exchange import Target, import_steering
    from trimtab.methods import describe, explain

    refuse_steering_path(output, overwrite)
    if output.is_dir():
        raise TrimtabError(f"{output} is a directory: name a file")
    target = None
    if reading.features is not None:
        target = Target(_weights(reading.features), reading.correction)
    steering = import_steering(
        source,
        open_model(opened),
        format=reading.format,
        site=[name.strip() for name in (reading.site or "").split(",") if name.strip()],
        target=target,
        measure=reading.measure,
    )
    steering.save(output, overwrite)
    if as_json:
        print_json({**describe(steering), "output": str(output)})
        return
    console.print(f"It acts at {_sites(steering)}.")
    for line in explain(steering):
        console.print(one_line(line))
    console.print(
        f"Saved as {output}. Try: trimtab generate --model {opened.model} --steer {output} ..."
    )


def _weights(text: str) -> dict[int, float]:
    """`14455,77=-0.5` as features with their weights, 1 where none is given."""
    found: dict[int, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        number, equals, weight = part.partition("=")
        if not re.fullmatch(r"\d{1,9}", number) or int(number) in found:
            raise TrimtabError(
                f"--features {text}: write numbers, each once, as in 14455 or 14455=1,77=-0.5"
            )
        found[int(number)] = read_number("--features", weight) if equals else 1.0
    return found


def _sites(steering: Steering) -> str:
    """The sites that were chosen, one by one as far as there are few."""
    sites = [intervention.site for intervention in steering.interventions]
    return ", ".join(sites) if len(sites) <= _FEW else steering.where
