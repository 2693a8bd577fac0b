"""Runs the tests of what depends on transformers with the oldest and the newest version of it.

    python tests/both_ends.py [OPTIONS OF PYTEST ...]

Each version is installed into a directory of its own, `.venv/versions/VERSION`, which comes before
the other packages of `.venv`; the version that is installed already is used as it is. A table at
the end says what passed and failed at either end. Exits with 1 where something failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

#: transformers at either end, and a huggingface_hub that it takes.
ENDS = {"5.16.0": "1.29.0", "5.24.0": "2.4.0"}
#: Files of tests, by the beginnings of their names after `test_`.
FILES = {
    "versions": "versions",
    "tiny models": "tiny",
    "anatomy, hooks": "anatomy hooks",
    "attach": "attach",
    "bake": "bake",
    "operators": "operators",
    "passes, threads": "passes compiled threads resuming",
    "generate": "model decoding next_tokens packed_attention",
    "live budgets": "live_budgets",
    "load, save": "loading saving damaged_models gguf identity quantised",
    "wrap, adapters": "wrapping adapters",
    "conformance": "conformance",
}
#: What is run on a few models that stand for all; and without SAELens, whose datasets package takes
#: no huggingface_hub that the oldest transformers takes.
FEW = {"conformance": "(llama or gemma2 or qwen3_moe) and not autoencoder"}
TESTS = Path(__file__).resolve().parent
ROOMS = TESTS.parent / ".venv" / "versions"


def main(options: list[str]) -> int:
    results = {end: tested(end, options) for end in ENDS}
    print(f"\n{'':16}" + "".join(f"{f'transformers {end}':>34}" for end in results))
    for group in FILES:
        cells = (said(results[end].get(group, Counter())) for end in results)
        print(f"{group:16}" + "".join(f"{cell:>34}" for cell in cells))
    return 1 if any(each["failed"] for end in results.values() for each in end.values()) else 0


def said(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "nothing ran"


def tested(end: str, options: list[str]) -> dict[str, Counter[str]]:
    """For each group how many of its tests passed, failed and were skipped."""
    together = [file for group in FILES if group not in FEW for file in files(group)]
    counts = outcomes(end, together, options)
    for group, few in FEW.items():
        counts += outcomes(end, files(group), [*options, "-k", few])
    return {
        group: Counter(what for file, what in counts if file in {f.stem for f in files(group)})
        for group in FILES
    }


def files(group: str) -> list[Path]:
    begins = FILES[group].split()
    return [path for start in begins for path in sorted(TESTS.glob(f"test_{start}*.py"))]


def outcomes(end: str, paths: list[Path], options: list[str]) -> list[tuple[str, str]]:
    """The file of each test that was run, and what came of it."""
    print(f"transformers {end}", flush=True)
    places = [place for place in (room(end), os.environ.get("PYTHONPATH")) if place]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", f"--junit-xml={record}"]
        ended = subprocess.run(
            [*command, *options, *map(str, paths)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
            cwd=TESTS.parent,
        )
        if ended.returncode not in (0, 1):  # 1: tests failed
            raise SystemExit(ended.returncode)
        cases = list(ElementTree.parse(record).iter("testcase"))
    return [(case.get("classname", "").split(".")[1], outcome(case)) for case in cases]


def outcome(case: ElementTree.Element) -> str:
    children = {child.tag for child in case}
    if children & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in children else "passed"


def room(end: str) -> str:
    """Where this version is installed, "" where it is the one that is there already."""
    if version("transformers") == end:
        return ""
    place = ROOMS / end
    if not place.is_dir():
        print(f"installing transformers {end} into {place}", flush=True)
        ROOMS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOMS) as folder:  # a half one is never used
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            wanted = [f"transformers=={end}", f"huggingface_hub=={ENDS[end]}"]
            subprocess.run([*pip, "--target", f"{folder}/whole", *wanted], check=True)
            Path(folder, "whole").rename(place)
    return str(place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
