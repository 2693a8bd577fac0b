"""`trimtab push`: a steering to the hub, with a card."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli.common import console, print_json
from trimtab.cli.options import Json, Overwrite


def push(
    file: Annotated[str, Parameter(help="A steering, FILE or FILE@DIAL.")],
    repo: Annotated[str, Parameter(help="The repository, OWNER/NAME; it is made if need be.")],
    /,
    *,
    base_model: Annotated[
        str | None,
        Parameter(help="The model's id on the hub, where the file does not name it so."),
    ] = None,
    license: Annotated[
        str | None, Parameter(help="The licence that you give it: apache-2.0, mit ...")
    ] = None,
    private: Annotated[
        bool, Parameter(help="Only you, and whom you let in, see it.", negative=())
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a steering to a repository of the hub, with a card that says what was measured of it.

    The token is the one that `hf auth login` keeps, or HF_TOKEN. HF_ENDPOINT is another hub's
    address. With --overwrite the file and the card of a repository that holds a steering are
    replaced.

    Example: `trimtab push joy.safetensors me/smollm2-joy --base-model
    HuggingFaceTB/SmolLM2-135M-Instruct`
    """
    from trimtab.exchange import push as push_to_hub

    done = push_to_hub(
        file, repo, base_model=base_model, license=license, private=private, overwrite=overwrite
    )
    if as_json:
        print_json(asdict(done))
        return
    console.print(f"{done.url}: {', '.join(done.files)}, commit {done.commit[:12]}")
    console.print(f"trimtab pull {done.repo}", style="dim")
