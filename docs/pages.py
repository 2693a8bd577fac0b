"""What mkdocs asks for while it builds the site (`make docs`): the pages that are made from the
code and from other pages, so that nothing is written twice.

README is the first page. Each method has a page: its section of methods.md, what its operators do
as pictures, what was measured, its options. Commands come from their help, public names from their
docstrings. Links that lead from one file of the repository to another lead to their pages.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import posixpath
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import operator_pictures  # noqa: E402

log = logging.getLogger("mkdocs.hooks.pages")

#: Files of the repository outside docs/ that are pages, by their path.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
#: What each method does to activations; tests compare it with what methods fit.
OPERATORS_OF: dict[str, tuple[str, ...]] = {
    "actadd": ("Add",),
    "caa": ("Add",),
    "iti": ("Add",),
    "sadi": ("Scale",),
    "sta": ("Add",),
    "sae": ("Add", "SetFeatures"),
    "ablation": ("Ablate",),
    "sas": ("Turn",),
    "aas": ("Turn",),
    "ss": ("Rotate",),
    "austeer": ("Add", "Scale"),
    "act": ("Shift",),
    "alphasteer": ("Affine",),
    "probe": ("Ablate", "Add", "Clamp"),
    "steermoe": ("Add", "Force"),
    "ssv": ("Add",),
    "bipo": ("Add",),
    "reps": ("Add", "Clamp"),
    "reft": ("Add",),
    "loreft": ("Affine",),
    "psr": ("Respond",),
}
_HEADING = re.compile(r"^(#{1,6}) (.+?)\s*$")
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]*)(#[^)\s]*)?(?=\))")


# -- Markdown -------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site have it."""
    plain = re.sub(r"`|\*", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def headings(text: str) -> Iterator[tuple[int, int, str]]:
    """Line, level and words of each heading that is not inside a block of code."""
    fenced = False
    for number, line in enumerate(text.split("\n")):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and (found := _HEADING.match(line)):
            yield number, len(found[1]), found[2]


def sections(text: str) -> dict[str, str]:
    """The `##` sections of a page: their text with its heading, by their anchors."""
    lines = text.split("\n")
    starts = [(number, words) for number, level, words in headings(text) if level == 2]
    ends = [number for number, _ in starts[1:]] + [len(lines)]
    return {
        slug(words): "\n".join(lines[start:end]).strip()
        for (start, words), end in zip(starts, ends, strict=True)
    }


def rows_of_table(text: str, first_head: str) -> list[list[str]]:
    """The rows of the table whose first column has that head; the first row are the heads."""
    lines = iter(text.split("\n"))
    for line in lines:
        if line.startswith(f"| {first_head} |"):
            rows = [line, *list(_until_blank(lines))[1:]]
            return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]
    return []


def _until_blank(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- where a link leads ---------------------------------------------------------------------------


def relinked(text: str, page: str, source: str, moved: dict[str, str]) -> str:
    """A text of the file `source` (its path in the repository) as it stands on `page`: its links
    lead to pages. `moved` are the anchors of methods.md that have pages of their own."""

    def target(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path or source))
        there = source if not path else there
        uri = OUTSIDE.get(there, there.removeprefix("docs/"))
        uri = re.sub(r"\.ipynb$", ".md", uri)
        if there == "docs/methods.md" and anchor[1:] in moved:
            uri = moved[anchor[1:]]
            anchor = "" if PurePosixPath(uri).stem == anchor[1:] else anchor
        if uri == page and anchor:
            return anchor
        return posixpath.relpath(uri, posixpath.dirname(page) or ".") + anchor

    pieces = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(
        piece if piece.startswith("```") else _LINK.sub(target, piece) for piece in pieces
    )


# -- methods --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """The methods that share a section of methods.md: its anchor and text, and of each method its
    row of the overview."""

    anchor: str
    section: str
    rows: dict[str, list[str]]

    @property
    def uri(self) -> str:
        return f"methods/{self.anchor}.md"

    @property
    def title(self) -> str:
        return self.section.split("\n")[0].removeprefix("## ")


@cache
def families() -> list[Family]:
    """The methods in the order of the overview."""
    from trimtab.methods import METHODS

    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    parts = sections(text)
    classes = {method.__name__.lower(): name for name, method in METHODS.items()}
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows_of_table(text, "method")[1:]:
        label = re.match(r"\[(.+)\]\(#(.+)\)", row[0])
        if label is None or label[2] not in parts:
            raise ValueError(f"docs/methods.md: {row[0]} leads to no section of its own")
        for words in label[1].split(", "):
            name = re.sub(r"-r1$", "", words.lower())
            found.setdefault(label[2], {})[classes.get(name, name)] = row
    return [Family(anchor, parts[anchor], rows) for anchor, rows in found.items()]


def moved_anchors(known: Sequence[Family]) -> dict[str, str]:
    """The anchors of methods.md that lie on pages of methods, and these pages."""
    return {slug(words): family.uri for family in known for _, _, words in headings(family.section)}


def method_page(family: Family, page: str) -> str:
    """The page of a method, or of some that share a section; links are those of methods.md."""
    body = family.section.split("\n", 1)[1].strip()
    body = re.sub(r"^###", "##", body, flags=re.M)
    heads = rows_of_table(page, "method")[0][1:]
    ways = [[" / ".join(_words_of(family, row)), *row[1:]] for row in _different(family)]
    blocks = [f"# {family.title}", table(["method", *heads], ways), body, _pictures(family)]
    blocks += [_measured(family, page), *(_options(name) for name in family.rows)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _different(family: Family) -> list[list[str]]:
    """The rows of the overview, each once."""
    return list({id(row): row for row in family.rows.values()}.values())


def _words_of(family: Family, row: list[str]) -> list[str]:
    return [f"`{name}`" for name, other in family.rows.items() if other is row]


def _pictures(family: Family) -> str:
    """What the operators of a family do, each drawn and said."""
    from trimtab import steering

    names = dict.fromkeys(name for one in family.rows for name in OPERATORS_OF.get(one, ()))
    shown = []
    for name in names:
        formula = (getattr(steering, name).__doc__ or "").split("\n\n")[0].strip()
        formula = " ".join(formula.split())
        words = operator_pictures.says(name)
        shown.append(
            f"**{name}**: {formula}\n\n![{name}: {words}](../operators/{name}.svg)\n\n{words}"
        )
    if not shown:
        return ""
    about = "Activations of two units, before (dots) and after (heads of arrows), at two dials."
    return "\n\n".join(["## What it does to activations", about, *shown])


def _measured(family: Family, page: str) -> str:
    """The rows of the tables of methods.md that are about a family, and a fit as it was printed."""
    blocks = []
    for heading, first in (("what-they-do-on-one-contrast", "method"), ("defaults", "setting")):
        (heads, *rows) = rows_of_table(sections(page)[heading], first)
        kept = [row for row in rows if _is_about(row[0], family)]
        if kept:
            where = f"[all methods, and how it was measured](#{heading})"
            width = len(heads)
            full = [row + [""] * (width - len(row)) for row in kept]
            blocks.append(f"{_ABOUT[heading]} ({where}):\n\n{table(heads, full)}")
    runs = json.loads((DOCS / "measured.json").read_text(encoding="utf-8"))
    for name in family.rows:
        if name in runs:
            said = runs[name]["output"].rsplit("Saved as", 1)[0].strip()
            blocks.append(
                f"As it comes, on pairs of formal and casual English:\n\n```text\n"
                f"{runs[name]['command']}\n```\n\n```text\n{said}\n```"
            )
    return "\n\n".join(["## Measured", *blocks]) if blocks else ""


_ABOUT = {
    "what-they-do-on-one-contrast": "On formality, within a cost of 0.1 nats per token of plain "
    "text, gain in nats per pair and cost in nats per token",
    "defaults": "By default, over three contrasts, as a share of what the best method gains",
}


def _is_about(label: str, family: Family) -> bool:
    words = re.split(r"[\s,`]+", label.strip("`"))
    return words[0].lower() in {one.lower() for one in family.rows}


def _options(name: str) -> str:
    """The fields of a method's class."""
    from trimtab.methods import METHODS

    if name not in METHODS:
        raise ValueError(f"docs/methods.md: {name} is no method")
    method: Any = METHODS[name]
    rows = [
        [f"`{item.name}`", _default(item), " ".join(item.metadata.get("help", "").split())]
        for item in fields(method)
    ]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return (
        f"## Options of `{name}`\n\nIn Python `tt.{method.__name__}(...)`, on the command line "
        f"[`trimtab fit {name}`](../reference/commands/fit.md#fit-{name}).\n\n"
        + table(["option", "default", "what it does"], cells)
    )


def _default(item: Any) -> str:
    if item.default is MISSING:
        return "must be given"
    return "" if item.default is None or item.default == () else f"`{item.default}`"


def overview(page: str, known: Sequence[Family]) -> str:
    """methods.md without the sections that have pages of their own."""
    for family in known:
        page = page.replace(family.section + "\n", "")
    return re.sub(r"\n{3,}", "\n\n", page)


# -- commands -------------------------------------------------------------------------------------


def command_page(name: str) -> str:
    """The page of a command, from its help; what all commands of a group take is said once."""
    from trimtab.cli.app import build

    text: str = build([name])[name].generate_docs(usage_name=f"trimtab {name}")
    text = re.sub(r"^(trimtab .*) -m mkdocs", r"\1", text, flags=re.M)  # what runs us, not them
    text = re.sub(r"^## Table of Contents\n\n(?:[ ]*- .*\n)+\n", "", text, flags=re.M)
    text = re.sub(r" \*\[default: (False|\(\)|None)\]\*", "", text)
    text = re.sub(r", --empty-[\w-]+", "", text)
    text = re.sub(r"^# (.*)", rf"# trimtab {name}", text, count=1)
    return _said_once(_escaped(text))


def _escaped(text: str) -> str:
    """With < as it is read: in Markdown it would begin a tag."""
    return re.sub(r"<(?=[A-Za-z/])(?![^`\n]*`)", "&lt;", text)


def _said_once(text: str) -> str:
    """Groups of options that are the same in all commands of a group stand once, at the end."""
    begin = [number for number, level, _ in headings(text) if level == 2]
    lines = text.split("\n")
    if len(begin) < 3:
        return text
    bodies = ["\n".join(lines[a:b]) for a, b in zip(begin, [*begin[1:], len(lines)], strict=True)]
    group = re.compile(r"\*\*([^*\n]+)\*\*:\n\n(?:\* .*\n?)+")
    shared: list[str] = []
    for found in group.finditer(bodies[-1]):
        block = found[0].strip()
        if all(block in body for body in bodies):
            shared.append(block)
    for block in shared:
        bodies = [body.replace(block, "") for body in bodies]
    if not shared:
        return text
    more = "And what [all of them take](#what-all-of-them-take)."
    kept = [re.sub(r"\n{3,}", "\n\n", body).strip() + f"\n\n{more}" for body in bodies]
    every = "## What all of them take\n\n" + "\n\n".join(shared)
    return "\n\n".join(["\n".join(lines[: begin[0]]).strip(), *kept, every]) + "\n"


def commands_overview(names: Sequence[str]) -> str:
    """All commands, each with what it is for."""
    from keyword import iskeyword

    from trimtab.cli.app import GROUPS
    from trimtab.cli.making import summary

    rows = []
    for name in names:
        function = f"{name}_" if iskeyword(name) else name
        about = summary(f"trimtab.cli.{function}", "commands" if name in GROUPS else function)
        rows.append([f"[`trimtab {name}`]({name}.md)", about.replace("|", "\\|")])
    return (
        "# Commands\n\nEach takes `--help`; `--json` prints one JSON object on standard output, "
        "and mistakes end with one line and exit status 2.\n\n"
        + table(["command", "what it does"], rows)
        + "\n"
    )


# -- public names ---------------------------------------------------------------------------------


def rooms() -> dict[str, list[str]]:
    """The public names, by the room that they come from."""
    stub = (ROOT / "src" / "trimtab" / "__init__.pyi").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                room = alias.name if node.module is None else node.module.split(".")[0]
                found.setdefault(room, []).append(alias.name)
    return found


def room_page(room: str, names: Sequence[str]) -> str:
    """The page of a room: its public names with their docstrings."""
    module = importlib.import_module(f"trimtab.{room}")
    about = (module.__doc__ or "").split("\n\n")[0].strip()
    listed = [f"trimtab.{name}" for name in names if name != room]
    if room in names:  # a module that is public itself
        inside = {name for name, thing in vars(module).items() if _is_shown(name, thing)}
        listed += [f"trimtab.{room}.{name}" for name in sorted(inside - {*names})]
    shown = [f"::: {name}" for name in listed]
    return "\n\n".join([f"# {room}", about, *shown]) + "\n"


def _is_shown(name: str, thing: Any) -> bool:
    """Whether a name of a public module is one of its functions and classes."""
    return not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing))


def python_overview(known: dict[str, list[str]]) -> str:
    """All public names."""
    rows = []
    for room, names in known.items():
        about = importlib.import_module(f"trimtab.{room}").__doc__ or ""
        rows.append([
            f"[{room}]({room}.md)",
            " ".join(about.split("\n\n")[0].split()),
            ", ".join(f"`{name}`" for name in names if name != room),
        ])  # fmt: skip
    return (
        "# Python\n\n`import trimtab as tt` has these names, and loads each when it is asked for."
        "\n\n" + table(["where it lives", "what that is for", "names"], rows) + "\n"
    )


# -- notebooks ------------------------------------------------------------------------------------


def notebook_of(file: Path) -> str:
    return notebook_page(json.loads(file.read_text(encoding="utf-8")))


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook's cells as a page."""
    shown = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        shown.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(shown) + "\n"


# -- what mkdocs calls ----------------------------------------------------------------------------


@cache
def made_pages() -> dict[str, tuple[str, Callable[[], str]]]:
    """The pages that are made, by their address: the file that their links start from, and how."""
    from trimtab.cli.app import COMMANDS

    made: dict[str, tuple[str, Callable[[], str]]] = {}
    for source, uri in OUTSIDE.items():
        made[uri] = (source, partial((ROOT / source).read_text, encoding="utf-8"))
    methods = (DOCS / "methods.md").read_text(encoding="utf-8")
    for family in families():
        made[family.uri] = ("docs/methods.md", partial(method_page, family, methods))
    made["reference/commands/index.md"] = ("", lambda: commands_overview(COMMANDS))
    for name in COMMANDS:
        made[f"reference/commands/{name}.md"] = ("", partial(command_page, name))
    known = dict(sorted(rooms().items()))
    made["reference/python/index.md"] = ("", lambda: python_overview(known))
    for room, names in known.items():
        made[f"reference/python/{room}.md"] = ("", partial(room_page, room, names))
    for file in sorted((ROOT / "examples").glob("*.ipynb")):
        made[f"examples/{file.stem}.md"] = (f"examples/{file.name}", partial(notebook_of, file))
    return made


def on_config(config: Any) -> Any:
    """The navigation, with the lists that are known only from the code."""
    lists = {
        "METHODS": [family.uri for family in families()],
        "COMMANDS": [uri for uri in made_pages() if uri.startswith("reference/commands/")],
        "NAMES": [uri for uri in made_pages() if uri.startswith("reference/python/")],
    }
    config.nav = _expanded(config.nav, lists)
    return config


def _expanded(entries: Sequence[Any], lists: dict[str, list[str]]) -> list[Any]:
    """Entries of the navigation. A page of ours that is not written yet is left out."""
    made: list[Any] = []
    for entry in entries:
        ((title, under),) = entry.items() if isinstance(entry, dict) else [(None, entry)]
        if isinstance(under, list):
            made.append({title: _expanded(under, lists)})
        elif under in lists:
            made += lists[under]
        elif under in made_pages() or (DOCS / under).is_file():
            made.append(entry)
        else:
            log.info(f"{under} is not written yet: left out of the navigation")
    return made


def on_files(files: Files, config: Any) -> Files:
    """The pages and pictures that are made, and the examples that pages lead to."""
    for uri, (_, content) in made_pages().items():
        files.append(File.generated(config, uri, content=content()))
    for name in [*operator_pictures.OPERATORS, "Force"]:
        content_of = operator_pictures.svg(name)
        files.append(File.generated(config, f"operators/{name}.svg", content=content_of))
    for folder in ("examples", "src", "benchmarks", "tests", "deploy"):
        for file in linked_files(folder):
            path = str(ROOT / file)
            files.append(File.generated(config, file, abs_src_path=path))
    return files


def linked_files(folder: str) -> list[str]:
    """The files of a folder of the repository that pages lead to."""
    pages = [*(ROOT / source for source in OUTSIDE), *DOCS.glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = set(re.findall(rf"\]\((?:\.\./)?({folder}/[\w./-]+\.\w+)\)", text))
    return sorted(file for file in found if (ROOT / file).is_file())


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they lead on the site; methods.md without what has its own pages."""
    uri = page.file.src_uri
    known = families()
    source = made_pages()[uri][0] if uri in made_pages() else f"docs/{uri}"
    if uri == "methods.md":
        markdown = overview(markdown, known)
    return relinked(markdown, uri, source, moved_anchors(known)) if source else markdown
