"""The site: pages that are made from the code hold what the code has, and links lead somewhere."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mkdocs.config import load_config

import trimtab as tt
from helpers import language_model
from method_settings import SETTINGS
from trimtab.cli.app import COMMANDS
from trimtab.methods import METHODS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import operator_pictures  # noqa: E402
import pages  # noqa: E402

SOURCES = [*(ROOT / source for source in pages.OUTSIDE), *sorted((ROOT / "docs").glob("*.md"))]


# -- links ----------------------------------------------------------------------------------------


def anchors(file: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    return {pages.slug(words) for _, _, words in pages.headings(text)}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_links_and_their_anchors_lead_somewhere(file: Path) -> None:
    outside_code = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    for path, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(#[^)\s]*)?\)", outside_code):
        target = (file.parent / path) if path else file
        assert target.exists(), f"{file.name}: {path}"
        if anchor and target.suffix == ".md":
            assert anchor[1:] in anchors(target), f"{file.name}: {path}{anchor}"


def test_links_lead_to_pages() -> None:
    moved = {"caa": "methods/caa.md", "other-directions": "methods/directional-ablation.md"}

    def led(text: str, page: str, source: str) -> str:
        return pages.relinked(text, page, source, moved)

    assert led("[a](docs/methods.md#caa)", "index.md", "README.md") == "[a](methods/caa.md)"
    assert led("[a](methods.md#defaults)", "x.md", "docs/x.md") == "[a](methods.md#defaults)"
    within = led("[a](#caa) [b](#defaults)", "methods/iti.md", "docs/methods.md")
    assert within == "[a](caa.md) [b](../methods.md#defaults)"
    same = led("[a](#other-directions)", "methods/directional-ablation.md", "docs/methods.md")
    assert same == "[a](#other-directions)"
    assert led("[a](../README.md)", "x.md", "docs/x.md") == "[a](index.md)"
    assert led("[a](https://b.c/d.md)", "x.md", "docs/x.md") == "[a](https://b.c/d.md)"
    assert led("```\n[a](b.md)\n```", "m/x.md", "docs/x.md") == "```\n[a](b.md)\n```"


# -- what is made from the code -------------------------------------------------------------------


def test_every_method_has_its_page() -> None:
    families = pages.families()
    assert [name for family in families for name in family.rows] != []
    assert {name for family in families for name in family.rows} == {
        name for name, method in METHODS.items() if method.__module__.startswith("trimtab.")
    }
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for family in families:
        page = pages.method_page(family, text)
        assert page.startswith(f"# {family.title}\n")
        for name in family.rows:
            for item in dataclasses.fields(METHODS[name]):
                assert f"| `{item.name}` |" in page, f"{name}: {item.name}"
    left = pages.overview(text, families)
    assert "\n## CAA\n" not in left
    assert "\n## Defaults\n" in left


def test_a_page_has_what_was_measured() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    caa = next(family for family in pages.families() if "caa" in family.rows)
    page = pages.method_page(caa, text)
    assert "| `caa layer=16 token=answer` |" in page
    assert "| CAA, PCA |" in page
    assert "actadd layer" not in page
    run = json.loads((ROOT / "docs" / "measured.json").read_text(encoding="utf-8"))["caa"]
    assert run["command"] in page
    assert "held out the log-odds of the positive side change by +" in page


def test_pictures_are_of_what_methods_do() -> None:
    assert pages.OPERATORS_OF.keys() == SETTINGS.keys()
    drawn = {*operator_pictures.OPERATORS, "Force"}
    assert {name for names in pages.OPERATORS_OF.values() for name in names} == drawn


@pytest.mark.parametrize("name", ["caa", "sadi", "ablation", "ss", "aas", "act", "alphasteer"])
def test_a_method_does_what_its_page_draws(name: str) -> None:
    lm = language_model("llama")
    setting = next(iter(SETTINGS[name].values()))
    steering = setting.make(lm).fit(lm, setting.contrast, measure=False)
    done = {type(one.operator).__name__ for one in steering.interventions}
    assert done <= set(pages.OPERATORS_OF[name])


@pytest.mark.parametrize(
    ("name", "dial", "point", "moved"),
    [
        # By hand: an activation of two units, and what becomes of it.
        ("Scale", 0.5, (1.0, 2.0), (1.5, 2.0)),
        ("Shift", 1.0, (2.0, 1.0), (1.7, 1.0)),
        ("Rotate", 90.0, (2.0, 1.0), (-1.0, 2.0)),
        ("Turn", 90.0, (3.0, 4.0), (0.0, 5.0)),
        ("Respond", 1.0, (1.0, -1.0), (1.0, -1.0)),
    ],
)
def test_pictures_are_drawn_by_the_operators(
    name: str, dial: float, point: tuple[float, float], moved: tuple[float, float]
) -> None:
    change = operator_pictures.OPERATORS[name].operator.bind(dial, "cpu")
    torch.testing.assert_close(change(torch.tensor(point)), torch.tensor(moved))


def test_pictures_are_the_same_each_time() -> None:
    drawn = operator_pictures.svg("Force")
    assert drawn.startswith(b"<?xml")
    assert drawn == operator_pictures.svg("Force")


def test_commands_have_their_pages() -> None:
    made = pages.made_pages()
    assert {f"reference/commands/{name}.md" for name in COMMANDS} <= made.keys()
    overview = made["reference/commands/index.md"][1]()
    assert all(f"[`trimtab {name}`]({name}.md)" in overview for name in COMMANDS)
    page = made["reference/commands/gate.md"][1]()
    assert page.startswith("# trimtab gate\n")
    assert "## gate fit" in page
    assert page.count("`--attn-implementation") == len(
        re.findall("(?m)^## gate (fit|check)$", page)
    )
    assert "[default: False]" not in page


def test_what_all_commands_of_a_group_take_is_said_once() -> None:
    body = "\n\n**Model**:\n\n* `--model`: M.\n* `--device`: D.\n\n**Own**:\n\n* `--{}`: x.\n"
    text = "# g\n\n" + "\n".join(f"## g {name}{body.format(name)}" for name in "abc")
    page = pages._said_once(text)
    assert page.count("`--model`") == 1
    assert page.index("## What all of them take") < page.index("`--model`")
    assert all(f"`--{name}`" in page for name in "abc")


def test_every_public_name_has_its_place() -> None:
    named = {name for names in pages.rooms().values() for name in names}
    assert named == set(tt.__all__)
    page = pages.room_page("methods", pages.rooms()["methods"])
    assert "::: trimtab.CAA" in page
    assert "::: trimtab.strength.budget" in pages.room_page("strength", ["strength", "within"])


def test_a_notebook_becomes_a_page() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# One\n", "two"]},
        {"cell_type": "code", "source": ["x = 1"]},
    ]
    assert pages.notebook_page({"cells": cells}) == "# One\ntwo\n\n```python\nx = 1\n```\n"


# -- the whole ------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation() -> None:
    config = pages.on_config(SimpleNamespace(nav=load_config(str(ROOT / "mkdocs.yml")).nav)).nav

    def uris(entries: list[object]) -> set[str]:
        found: set[str] = set()
        for entry in entries:
            under = next(iter(entry.values())) if isinstance(entry, dict) else entry
            found |= uris(under) if isinstance(under, list) else {str(under)}
        return found

    written = {file.name for file in (ROOT / "docs").glob("*.md")} | pages.made_pages().keys()
    assert uris(config) == written


@pytest.mark.slow
def test_the_site_is_built_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "search" / "search_index.js").is_file()
    loaded = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?:[^\" >]+)")
    for page in tmp_path.rglob("*.html"):
        addresses = [
            one for one in loaded.findall(page.read_text("utf-8")) if "canonical" not in one
        ]
        assert addresses == [], page
