"""`trimtab pull`: a steering from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli.common import console, print_json, refuse_steering_path
from trimtab.cli.options import Json, Overwrite
from trimtab.errors import one_line
from trimtab.files import write_whole


def pull(
    repo: Annotated[str, Parameter(help="The repository, OWNER/NAME.")],
    /,
    *,
    output: Annotated[
        Path | None,
        Parameter(name=("--output", "-o"), help="The file to write (default: NAME.safetensors)."),
    ] = None,
    revision: Annotated[
        str | None, Parameter(help="Branch, tag or commit instead of the newest one.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fetch a steering from the hub: its one file, checked as any other, and nothing else.

    The commit that it is of is printed: with --revision the same one comes again.

    Example: `trimtab pull me/smollm2-joy -o joy.safetensors`
    """
    from trimtab.exchange import fetched

    place = Path(f"{repo.rpartition('/')[2]}.safetensors") if output is None else output
    refuse_steering_path(place, overwrite)
    found = fetched(repo, revision=revision)
    write_whole(place, found.content, overwrite)
    steering = found.steering
    if as_json:
        print_json(
            {
                "repo": found.repo,
                "commit": found.commit,
                "output": str(place),
                "sha256": found.sha256,
                "method": steering.method,
                "model": dict(vars(steering.model)),
                "digest": steering.digest,
            }
        )
        return
    console.print(f"Saved {place}: {one_line(steering.label)}, for {steering.model}")
    console.print(f"{found.repo} at commit {found.commit}", style="dim")
