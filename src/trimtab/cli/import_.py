"""`trimtab import`: a steering from another tool's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json, refuse_steering_path
from trimtab.cli.options import Json, Overwrite, Read
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
        "persona-vectors, transformer-lens, neuronpedia or tensor, instead of what the file itself "
        "looks like.",
        None,
        flag="--from",
    )
    site: str | None = option(
        "Sites that act, with commas between them, of a file with several: layers.12.resid, or "
        "resid for all of a kind; and where a bare tensor belongs.",
        None,
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
    """
    from trimtab.exchange import import_steering
    from trimtab.methods import describe, explain

    refuse_steering_path(output, overwrite)
    if output.is_dir():
        raise TrimtabError(f"{output} is a directory: name a file")
    steering = import_steering(
        source,
        open_model(opened),
        format=reading.format,
        site=[name.strip() for name in (reading.site or "").split(",") if name.strip()],
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


def _sites(steering: Steering) -> str:
    """The sites that were chosen, one by one as far as there are few."""
    sites = [intervention.site for intervention in steering.interventions]
    return ", ".join(sites) if len(sites) <= _FEW else steering.where
