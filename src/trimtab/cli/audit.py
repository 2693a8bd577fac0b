"""`trimtab audit`: what differs between two checkpoints, and what of it known steerings explain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trimtab.cli.common import console, print_json, read_steerings, trusting
from trimtab.cli.options import Force, Json, Overwrite, Steered
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError


def audit(
    base: Annotated[
        str,
        Parameter(
            help="A pack, a directory, a .gguf file or a hub id. Python code that comes with it "
            "runs only with `--trust-remote-code`."
        ),
    ],
    other: Annotated[str, Parameter(help="The checkpoint that was made from it.")],
    /,
    *,
    steered: Steered = Steered(),
    strip: Annotated[
        str | None,
        Parameter(
            help="FILE or FILE@DIAL: write OTHER without this steering to --output. It is one of "
            "--steer, or was baked after them."
        ),
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

    --strip takes a steering out: BASE's tensors are put back where the steerings that are named
    explain OTHER's, else its inverse is baked in, if it has one.

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
    files = [*steered.steer]
    if strip is not None and strip not in files:
        files.append(strip)
    steerings = read_steerings(replace(steered, steer=files))
    sources: tuple[Any, Any] = base, other
    if strip is not None:  # once for both, BASE as OTHER is held
        held: dict[str, Any] = {"device": "cpu", "trust_remote_code": trusting.get()}
        second = load(other, dtype="checkpoint", **held)
        sources = load(base, dtype=second.dtype, **held), second
    found = compare(*sources, *steerings, force=force, trust_remote_code=trusting.get())
    if not as_json:
        show(found.tables(), found.remarks, None, summary=found.summary)
    record = found.as_json()
    if strip is not None and output is not None:
        removed = steerings[files.index(strip)]
        stripped = take_out(*sources, removed, among=steerings, force=force)
        stripped.model.save_pretrained(output, overwrite)
        record["stripped"] = {
            "steering": removed.label,
            "output": str(output),
            "how": stripped.how,
            "exact": stripped.exact,
            "tensors": list(stripped.tensors),
        }
        if not as_json:
            console.print(f"Saved {output} without {removed.label}: {stripped.summary}")
    if as_json:
        print_json(record)
