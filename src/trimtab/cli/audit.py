"""`trimtab audit`: what differs between two checkpoints, and what of it known steerings explain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from trimtab.cli.common import console, print_json, read_steerings, trusting
from trimtab.cli.options import Force, Json, Overwrite, Steered
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.exchange import Stripped
    from trimtab.steering import Steering


def audit(
    base: Annotated[str, Parameter(help="A pack, a directory, a .gguf file or a hub id.")],
    other: Annotated[str, Parameter(help="The checkpoint that was made from it.")],
    /,
    *,
    steered: Steered = Steered(),
    strip: Annotated[
        str | None,
        Parameter(help="FILE or FILE@DIAL: take this steering out of OTHER, into --output."),
    ] = None,
    output: Annotated[
        Path | None,
        Parameter(name=("--output", "-o"), help="The directory to write OTHER to without it."),
    ] = None,
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints: which tensors differ, by how much, the rank of each difference, and
    which kind of edit it looks like. With --steer, how much of it these steerings explain, baked
    into BASE in the order given.

    --strip takes a steering out: BASE's tensors are put back where it alone explains them (with
    those of --steer beside it), else its inverse is baked in, if it has one.

    Example: `trimtab audit smollm2-135m-instruct joy-model/ --steer joy.safetensors@12`

    Example: `trimtab audit smollm2-135m-instruct joy-model/ --strip joy.safetensors@12 -o plain/`
    """
    from trimtab.exchange import audit as compare
    from trimtab.exchange import strip as take_out
    from trimtab.model import check_target, load, locations

    if (strip is None) is not (output is None):
        raise TrimtabError("--strip FILE@DIAL and --output DIR go together")
    if output is not None:
        check_target(output, [*locations(base), *locations(other)], overwrite)
    files = steered.steer if strip is None else (*steered.steer, strip)
    steerings = read_steerings(replace(steered, steer=files))
    sources: tuple[Any, Any] = base, other
    if steerings:  # once for both, BASE as OTHER is held
        held: dict[str, Any] = {"device": "cpu", "trust_remote_code": trusting.get()}
        second = load(other, dtype="checkpoint", **held)
        sources = load(base, dtype=second.dtype, **held), second
    found = compare(*sources, *steerings, force=force, trust_remote_code=trusting.get())
    if not as_json:
        show(found.tables(), found.notes, None, summary=found.summary)
    stripped = None
    if output is not None:
        *beside, last = steerings
        stripped = take_out(*sources, last, *beside, force=force)
        stripped.model.save_pretrained(output, overwrite)
    if as_json:
        print_json(found.as_json() | _record(stripped, output, steerings))
    elif stripped is not None:
        console.print(f"Saved {output} without {steerings[-1].label}: {stripped.summary}")


def _record(
    stripped: Stripped | None, output: Path | None, steerings: list[Steering]
) -> dict[str, Any]:
    if stripped is None:
        return {}
    return {
        "stripped": {
            "steering": steerings[-1].label,
            "output": str(output),
            "how": stripped.how,
            "exact": stripped.exact,
            "tensors": list(stripped.tensors),
        }
    }
