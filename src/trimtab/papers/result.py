"""What an analysis found: data, tables, pictures, notes; and the directory that it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.reports import Picture, Run, Table, model_line, page, save_figure


@dataclass(frozen=True)
class Analysis:
    """`data` is ready for JSON; tables and pictures show the same to people."""

    name: str
    title: str
    data: dict[str, Any]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """What `trimtab analyse --json` prints."""
        return {
            "analysis": self.name,
            "title": self.title,
            **self.data,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def write(found: Analysis, run: Run) -> None:
    """results.json, report.html and pictures/ of a run directory."""
    if run.path is None:
        return
    run.begin()
    if found.pictures:
        save_pictures(found.pictures, run.path / "pictures")
    model = run.config["model"]

    def made(environment: dict[str, Any]) -> str:
        return page(
            found.title,
            f"{model['name']}; {model_line(model)}; {found.seconds:g} seconds",
            [*found.pictures, *found.tables],
            run.config,
            environment,
            notes=found.notes,
        )

    run.finish(found.as_json(), made)


def save_pictures(pictures: Sequence[Picture], directory: Path) -> None:
    """Each as NAME.png and NAME.svg."""
    directory.mkdir(exist_ok=True)
    for picture in pictures:
        save_figure(picture.figure, directory, picture.name)
