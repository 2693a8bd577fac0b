"""Draws the house: which folder of src/trimtab imports which, and what each is for.

python docs/house.py            writes docs/house.svg and the table in docs/architecture.md
python docs/house.py --check    says with exit status 1 that they are not those of the code
"""

from __future__ import annotations

import ast
import configparser
import sys
from pathlib import Path

import grimp
import matplotlib
import networkx

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "house"  # the same picture is the same file
matplotlib.rcParams["svg.fonttype"] = "none"
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "trimtab"
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "house.svg"
BEGIN, END = "<!-- rooms: from the code -->\n", "<!-- end of rooms -->\n"


def layers() -> list[list[str]]:
    """The rooms from the top of the house down, as .importlinter has them."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    lines = contracts["importlinter:contract:layers"]["layers"].split("\n")
    floors = [[room.strip().removeprefix("trimtab.") for room in line.split("|")] for line in lines]
    return [
        [room for room in floor if room and room != "lm_eval"] for floor in floors if any(floor)
    ]


def purpose(room: str) -> str:
    """The first sentence of a room's docstring."""
    folder = PACKAGE / room / "__init__.py"
    text = (folder if folder.is_file() else PACKAGE / f"{room}.py").read_text(encoding="utf-8")
    said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    return " ".join(said.split()).split(". ")[0].removesuffix(".")


def size(room: str) -> tuple[int, int]:
    """Files and lines."""
    folder = PACKAGE / room
    files = list(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]
    return len(files), sum(len(file.read_text(encoding="utf-8").split("\n")) - 1 for file in files)


def uses(rooms: list[str]) -> dict[str, set[str]]:
    """Which rooms each room imports from."""
    graph = grimp.build_graph("trimtab", cache_dir=None)
    room_of = {module: module.split(".")[1] for module in graph.modules if module.count(".") >= 1}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for module, room in room_of.items():
        for imported in graph.find_modules_directly_imported_by(module):
            other = room_of.get(imported)
            if room in found and other in found and other != room:
                found[room].add(other)
    return found


def table(floors: list[list[str]], used: dict[str, set[str]]) -> str:
    """The rooms in Markdown, from the top down."""
    order = [room for floor in floors for room in floor]
    lines = ["| room | what it is for | imports from |", "|---|---|---|"]
    for room in order:
        folder = "/" if (PACKAGE / room).is_dir() else ".py"
        below = ", ".join(other for other in order if other in used[room])
        lines.append(f"| `{room}{folder}` | {purpose(room)} | {below or '–'} |")
    return "\n".join(lines) + "\n"


def draw(used: dict[str, set[str]]) -> None:
    """The rooms, each as low as its imports allow, and an arrow for each import that no chain of
    arrows implies."""
    graph = networkx.DiGraph((room, other) for room, below in used.items() for other in below)
    floors = [sorted(floor) for floor in networkx.topological_generations(graph.reverse())][::-1]
    place = {
        room: ((i + 0.5) / len(floor), len(floors) - level)
        for level, floor in enumerate(floors)
        for i, room in enumerate(floor)
    }
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(floors) + 0.5))
    for room, other in sorted(networkx.transitive_reduction(graph).edges):
        (x, y), (u, v) = place[room], place[other]
        axes.annotate(
            "",
            xy=(u, v + 0.3),
            xytext=(x, y - 0.3),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#6a7f97",
                "linewidth": 1,
                "connectionstyle": f"arc3,rad={0.0 if y - v <= 1 else 0.25}",
            },
        )
    for room, (x, y) in place.items():
        files, lines = size(room)
        count = f"{files} files, {lines:,} lines" if files > 1 else f"{lines:,} lines"
        axes.text(x, y, room, ha="center", va="bottom", fontsize=11, fontweight="bold", zorder=3)
        axes.text(x, y - 0.05, count, ha="center", va="top", fontsize=8, color="#333333", zorder=3)
        wide = 0.19
        axes.add_patch(
            plt.Rectangle(
                (x - wide / 2, y - 0.28),
                wide,
                0.56,
                facecolor="#eef3fa",
                edgecolor="#56718f",
                zorder=2,
            )
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0.4, len(floors) + 0.6)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> int:
    """Write the picture and the table, or check the table."""
    floors = layers()
    used = uses([room for floor in floors for room in floor])
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    now = before + BEGIN + table(floors, used) + END + after
    if "--check" in sys.argv:
        if now != page:
            print("docs/architecture.md is not that of the code: make docs-house", file=sys.stderr)
        return int(now != page)
    PAGE.write_text(now, encoding="utf-8")
    draw(used)
    return 0


if __name__ == "__main__":
    sys.exit(main())
