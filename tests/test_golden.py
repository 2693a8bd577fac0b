"""What trimtab gives, recorded: a rearrangement of the code must change none of it.

The files under tests/golden hold what commands print on tiny random models, the steerings and the
directories that they leave, and the options that they have. `python tests/test_golden.py --record`
writes them anew, for a change of results that is meant: read the difference before it is kept.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from golden_commands import COMMANDS, FITS, HELP, furnish, inside, run
from golden_form import differences, lines, pretty, run_directory, settled, tensor_file

#: One thread is fastest for tiny matrices; with more, sums are rounded in another order.
THREADS = int(os.environ.get("TRIMTAB_GOLDEN_THREADS", "1"))
GOLDEN = Path(__file__).parent / "golden"


def record(room: Path) -> dict[str, Any]:
    """Run everything once: what each command gives, by its name."""
    found: dict[str, Any] = {}
    with inside(room):
        for name, line in COMMANDS.items():
            ran = run(line)
            printed = json.loads(ran.out) if "--json" in line and ran.out else None
            found[name] = {"command": line, "status": ran.status, "err": lines(ran.err)}
            found[name]["out"] = lines(ran.out) if printed is None else settled(printed)
            found |= _left(line, printed)
        for command in HELP:
            found[f"help/{command or 'trimtab'}"] = _options(run(f"{command} --help").out)
    return found


def _left(line: str, printed: Any) -> dict[str, Any]:
    """The file or directory that a command wrote."""
    words = line.split()
    if "-o" not in words:
        return {}
    path = Path(words[words.index("-o") + 1])
    if path.suffix == ".safetensors" and path.exists():
        whole = path.stem in FITS
        content = tensor_file(path, 12 if whole else 4)
        return {f"steerings/{path.stem}": content if whole else content["tensors"]}
    if path.name.startswith("baked-"):
        weights = tensor_file(path / "model.safetensors", 3)
        return {f"runs/{path}": {"names": sorted(x.name for x in path.iterdir()), **weights}}
    return {f"runs/{path}": run_directory(path, printed)} if path.is_dir() else {}


def _options(said: str) -> list[str]:
    """The names of options in the help of a command."""
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", said)))


def _read() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(GOLDEN.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        found |= {f"{file.stem}/{name}": value for name, value in content.items()}
    return found


def _write(found: dict[str, Any]) -> None:
    GOLDEN.mkdir(exist_ok=True)
    groups: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        group, _, own = name.partition("/")
        groups.setdefault(group, {})[own] = value
    for group, content in groups.items():
        (GOLDEN / f"{group}.json").write_text(pretty(content) + "\n", encoding="utf-8")


EXPECTED = _read()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the code gives today."""
    room = tmp_path_factory.mktemp("golden") / "room"
    room.mkdir()
    furnish(room)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield record(room)
    torch.set_num_threads(threads)


def test_everything_that_is_run_is_recorded(found: dict[str, Any]) -> None:
    assert found.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", [name for name in EXPECTED if not name.startswith("help/")])
def test_nothing_changed(name: str, found: dict[str, Any]) -> None:
    assert name in found, "nothing was left"
    where = differences(EXPECTED[name], found[name], name)
    assert not where, "\n".join(where[:20])


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("help/")])
def test_every_option_is_still_there(name: str, found: dict[str, Any]) -> None:
    missing = set(EXPECTED[name]) - set(found[name])
    assert not missing, missing


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("write: python tests/test_golden.py --record")
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        own_room = Path(folder) / "room"
        own_room.mkdir()
        furnish(own_room)
        _write(record(own_room))
