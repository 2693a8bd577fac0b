"""A run as one page of HTML that needs no network: what was found, tables, pictures, caveats,
flips, how to repeat it; light and dark, wide and narrow. Its tables and pictures lie beside it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from trimtab.contrasts import last_message
from trimtab.figures import words_for
from trimtab.files import make_directory, write_whole
from trimtab.reports.run import TABLE_MARK, Run
from trimtab.reports.tables import Table, number_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Flips that are shown in full; all of them are in the records.
_MOST_FLIPS = 100

_INTERVALS = (
    "Intervals are 95 %: Wilson for shares, bootstrap over examples for other means, paired "
    "bootstrap for differences. Of shares, values are in % and differences in points (hundredths)."
)
#: Where a name such as layers.12.ffn_out or runs/joy.safetensors@12 may go on in the next line; a
#: number's point is no such place.
_JOINTS = re.compile(r"(?<=[^\W\d])[.](?=\w)|[.](?=[^\W\d])|(?<=\w)[/@](?=\w)")


@dataclass(frozen=True)
class Picture:
    """A figure; `name` is that of its files, `alt` says in words what it shows."""

    title: str
    name: str
    figure: Figure
    alt: str
    note: str = ""


@dataclass(frozen=True)
class Passage:
    """A text in pieces, each with its shade from -1 to 1 (what is beyond counts as that) and the
    number that it stands for."""

    title: str
    pieces: Sequence[tuple[str, float, float]]


@dataclass(frozen=True)
class Coloured:
    """Texts whose pieces are coloured by a number."""

    title: str
    passages: Sequence[Passage]
    note: str = ""


#: What a page is made of.
Block = Table | Picture | Coloured
#: Colours of shades above and below 0, as CSS has them.
_ABOVE, _BELOW = "0 114 178", "213 94 0"


def run_page(
    run: Run,
    environment: dict[str, Any],
    title: str,
    subtitle: str,
    blocks: Sequence[Block],
    *,
    summary: str = "",
    notes: Sequence[str] = (),
    flips: Sequence[tuple[dict[str, Any], dict[str, Any]]] = (),
) -> str:
    """The page of a run; where it has a directory, its tables and pictures lie there as files,
    which the page names."""
    if run.path is not None:
        save_blocks(blocks, run.path)
    return render_page(
        title,
        subtitle,
        blocks,
        run.config,
        environment,
        summary=summary,
        notes=notes,
        flips=flips,
        linked=run.path is not None,
    )


def render_page(
    title: str,
    subtitle: str,
    blocks: Sequence[Block],
    config: dict[str, Any],
    environment: dict[str, Any],
    *,
    summary: str = "",
    notes: Sequence[str] = (),
    flips: Sequence[tuple[dict[str, Any], dict[str, Any]]] = (),
    linked: bool = False,
) -> str:
    """The page; `summary` is the sentence that says what was found, `flips` are (unsteered,
    steered) records whose rating changed; `linked` names the files that `save_blocks` wrote."""
    names = _file_names(blocks) if linked else [""] * len(blocks)
    page: str = _template("report.html.jinja").render(
        title=title,
        summary=summary,
        subtitle=f"{subtitle}; {environment['date'][:10]}",
        blocks=[_shown(block, name) for block, name in zip(blocks, names, strict=True)],
        intervals=_INTERVALS,
        notes=notes,
        flips=[_flip(before, after) for before, after in flips[:_MOST_FLIPS]],
        flips_shown=min(len(flips), _MOST_FLIPS),
        flips_all=len(flips),
        config=json.dumps(config, indent=1, ensure_ascii=False),
        environment=json.dumps(environment, indent=1, ensure_ascii=False),
    )
    return page


def tables_html(tables: Sequence[Table], summary: str = "") -> str:
    """Tables as the page has them, for a notebook."""
    blocks = [_shown(table) for table in tables]
    return str(_template("notebook.html.jinja").render(summary=summary, blocks=blocks))


def save_blocks(blocks: Sequence[Block], directory: Path) -> None:
    """Each picture as pictures/NAME.png and .svg, each table as tables/NAME.csv and .tex."""
    from trimtab.reports.charts import save_figure  # matplotlib takes a second to import

    for block, name in zip(blocks, _file_names(blocks), strict=True):
        if isinstance(block, Picture):
            make_directory(directory / "pictures")
            save_figure(block.figure, directory / "pictures", name)
            continue
        if isinstance(block, Coloured):
            continue
        make_directory(directory / "tables")
        for kind, text in (("csv", block.to_csv()), ("tex", TABLE_MARK + block.to_latex())):
            file = directory / "tables" / f"{name}.{kind}"
            write_whole(file, text.encode(errors="replace"), overwrite=True)


def model_line(model: dict[str, Any]) -> str:
    """A model in a few words, from the configuration of a run."""
    precision = model["dtype"].removeprefix("torch.")
    return f"{model['architecture']}, {model['layers']} layers, {precision}"


def _template(name: str) -> Any:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=PackageLoader("trimtab", "data")
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template(name)


def _breakable(value: Any) -> Markup:
    """A cell's text, in which a long name may be broken at its joints and nowhere else."""
    parts = []
    begin = 0
    text = str(value)
    for found in _JOINTS.finditer(text):
        parts.append(escape(text[begin : found.end()]))
        begin = found.end()
    return Markup("<wbr>").join([*parts, escape(text[begin:])])


def _file_names(blocks: Sequence[Block]) -> list[str]:
    """The names of the blocks' files: a picture's own, a table's from its title, none of a text."""
    names: list[str] = []
    for block in blocks:
        if isinstance(block, Picture):
            names.append(block.name)
            continue
        if isinstance(block, Coloured):
            names.append("")
            continue
        name = re.sub(r"[^a-z0-9]+", "-", block.title.lower())[:60].strip("-") or "table"
        count = sum(re.fullmatch(rf"{name}(-\d+)?", other) is not None for other in names)
        names.append(f"{name}-{count + 1}" if count else name)
    return names


def _shown(block: Block, name: str = "") -> dict[str, Any]:
    """A block for the template; with a `name`, it also lies beside the page as files."""
    if isinstance(block, Table):
        files = [f"tables/{name}.{kind}" for kind in ("csv", "tex")] if name else []
        return {"kind": "table", "files": files, **vars(block)}
    if isinstance(block, Coloured):
        passages = [(each.title, list(map(_shaded, each.pieces))) for each in block.passages]
        return {"kind": "coloured", "files": [], **vars(block), "passages": passages}
    from trimtab.reports.charts import rendered
    from trimtab.reports.dark import dark

    light = rendered(block.figure, "svg", block.name)
    with dark(block.figure):
        on_dark = rendered(block.figure, "svg", block.name)
    files = [f"pictures/{name}.{kind}" for kind in ("svg", "png")] if name else []
    sources = {"light": _as_source(light), "dark": _as_source(on_dark)}
    return {"kind": "picture", "files": files, **sources, **vars(block)}


def _shaded(piece: tuple[str, float, float]) -> dict[str, str]:
    """A piece of a text for the template: its colour, and the number that it stands for."""
    text, shade, value = piece
    colour = _ABOVE if shade > 0 else _BELOW
    strength = 0.6 * min(1.0, abs(shade))  # text stays readable, in the dark too
    return {"text": text, "colour": f"rgb({colour} / {strength:.2f})", "value": f"{value:.4g}"}


def _as_source(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _flip(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    changes = (
        f"{words_for(metric)} {number_text(old)} to {number_text(new)}"
        for metric, new in after["values"].items()
        if None not in (new, old := before["values"].get(metric)) and old != new
    )
    return {
        "title": f"{after['task']} {after['id']}, {after['steering']}: {next(changes, '')}",
        "prompt": last_message(after.get("prompt", "")),
        "target": after.get("target"),
        "before": before.get("output"),
        "after": after.get("output"),
    }
