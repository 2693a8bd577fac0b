"""`trimtab search`: steerings on the hub."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from trimtab.cli.common import print_json
from trimtab.cli.options import Json
from trimtab.cli.tables import show


def search(
    *words: Annotated[str, Parameter(help="Words of the repository's name.")],
    model: Annotated[
        str | None,
        Parameter(
            name=("--model", "-m"),
            help="Only steerings for this model: its id on the hub, or its name here.",
        ),
    ] = None,
    limit: Annotated[int, Parameter(help="How many to list at most.")] = 30,
    as_json: Json = False,
) -> None:
    """List steerings that others pushed to the hub, those that were changed last first.

    Example: `trimtab search joy --model HuggingFaceTB/SmolLM2-135M-Instruct`
    """
    from trimtab.exchange import search as search_hub

    found = search_hub(" ".join(words), model=model, limit=limit)
    if as_json:
        print_json(found.as_json())
        return
    show(found.tables() if found.found else (), (), None, summary=found.summary)
