"""The form of golden files: what is left out, how it is written, and when two of them are equal.

Words, whole numbers and keys are exact; other numbers are equal within a small tolerance, because
processors and numbers of threads round differently, also where a number stands within a text.
"""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

#: Log-odds are of a size of 20, and their means near zero: another processor moves these by 2e-5,
#: ends of bootstrap intervals by a little more than 1e-4 of them, and what is given to four places
#: by one in the last.
RELATIVE, ABSOLUTE = 2e-4, 1.1e-4
#: Of a list of numbers, in which small ones are differences of large ones: a share of the largest.
OF_LARGEST = 2e-6
#: What differs from run to run and from machine to machine; `sha256` is that of rounded numbers.
LEFT_OUT = "(not compared)"
_KEYS = {
    *("seconds", "date", "versions", "trimtab_sha256", "checksum", "environment"),
    *("installed", "location", "bytes_on_disk", "peak_bytes"),
}
#: Columns of pages with times, and with the memory that a run needs.
_TIMED = re.compile(r"\b(seconds|time|memory|ms)\b")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


# -- what is recorded -----------------------------------------------------------------------------


def settled(value: Any, key: str = "") -> Any:
    """What comes of JSON, without what is not compared; numbers to seven digits."""
    if key in _KEYS:
        return LEFT_OUT
    if isinstance(value, dict):
        if {"label", "dial", "sha256"} <= value.keys():  # a steering: of numbers, not of words
            value = {**value, "sha256": LEFT_OUT}
        return {name: settled(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [settled(one) for one in value]
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return f"{value[:16]}..."
    return float(f"{value:.7g}") if isinstance(value, float) else value


def lines(text: str) -> list[str]:
    """A text for people: its words, without the width of columns, lines between them, times and
    dates."""
    dated = re.sub(r"\b\d{4}-\d\d-\d\d\b", "DATE", text)
    words = (" ".join(line.split()) for line in dated.splitlines())
    return [re.sub(r"\b[\d.]+ s\b", "N s", line) for line in words if line.strip("─━┄ ")]


def tensor_summary(tensor: Tensor, samples: int = 12) -> list[Any]:
    """What tells a tensor from another: its form, two norms, all values or some at even distances.

    Norms, because sums of either sign are lost to rounding.
    """
    flat = tensor.double().flatten()
    chosen = flat[:: max(1, len(flat) // samples)][:samples].tolist()
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    return [kind, *settled([float(flat.norm()), float(flat.abs().sum()), *chosen])]


def tensor_file(path: Path, samples: int = 12) -> dict[str, Any]:
    """The tensors of a safetensors file, and what it says of itself."""
    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
        tensors = {name: tensor_summary(file.get_tensor(name), samples) for name in names}
        about = {name: _read(text) for name, text in sorted((file.metadata() or {}).items())}
    return {"metadata": settled(about), "tensors": tensors}


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def run_directory(path: Path, printed: Any) -> dict[str, Any]:
    """The files that a command left: their names, and what is in those that are read again."""
    files = {
        str(file.relative_to(path)): file
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }
    found: dict[str, Any] = {"names": list(files)}
    parts = 0
    for name, file in files.items():
        if file.suffix == ".json" and file.name != "environment.json":
            content = settled(json.loads(file.read_text(encoding="utf-8")))
            found[name] = _beside(settled(printed), content) if name == "results.json" else content
        elif file.suffix == ".jsonl":
            records = [settled(json.loads(line)) for line in file.open(encoding="utf-8")]
            found[name] = [_brief(record) for record in records] if parts else records
            parts += 1
        elif file.suffix == ".safetensors":
            found[name] = tensor_file(file, 4)
        elif file.suffix == ".html":
            found[name] = outline(file.read_text(encoding="utf-8"))
    return found


def _beside(printed: Any, kept: Any) -> Any:
    """The results of a run, where they are not those that were printed."""
    if all(printed[key] == kept[key] for key in printed.keys() & kept.keys()):
        return {"as printed": True, "keys": list(kept)}
    return kept


def _brief(record: Any) -> Any:
    """What the records of a part have of their own: the texts are those of the first part."""
    keys = ("index", "id", "steering", "output", "prediction", "values")
    return {"keys": " ".join(record)} | {key: record[key] for key in keys if key in record}


class _Outline(HTMLParser):
    """Collects headings, paragraphs, and the rows of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._text = ""
        self._cells: list[str] = []
        self._heads: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag == "img":
            self.found.append(f"picture: {dict(attributes).get('alt')}")
        if tag == "tr":
            self._cells = []
        if tag not in ("a", "wbr"):  # these are within a text
            self._text = ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            return
        text = " ".join(self._text.split())
        if tag in ("th", "td"):
            self._cells.append(text)
        elif tag == "tr":
            self.found.append(self._row())
        elif tag in ("h1", "h2", "p", "li", "summary"):
            dated = re.sub(r"\d{4}-\d\d-\d\d", "DATE", text)
            self.found.append(f"{tag}: " + re.sub(r"[\d.e-]+ seconds", "N seconds", dated))
        self._text = ""

    def _row(self) -> str:
        if self.get_starttag_text() is not None and self.lasttag == "th":
            self._heads = self._cells
            return " | ".join(self._cells)
        timed = [_TIMED.search(name) is not None for name in self._heads]
        pairs = zip(self._cells, timed, strict=True)
        return " | ".join("N" if is_time and cell else cell for cell, is_time in pairs)


def outline(page: str) -> list[str]:
    """The words of a page: headings, paragraphs and tables, without the times."""
    parser = _Outline()
    parser.feed(page)
    return parser.found


# -- comparing ------------------------------------------------------------------------------------


def differences(expected: Any, actual: Any, where: str = "") -> list[str]:
    """Every place at which two recordings differ."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        found = [f"{where}: {name} is gone" for name in expected if name not in actual]
        found += [f"{where}: {name} is new" for name in actual if name not in expected]
        if not found and list(expected) != list(actual):
            found = [f"{where}: the keys are in another order, {', '.join(actual)}"]
        for name in (name for name in expected if name in actual):
            found += differences(expected[name], actual[name], f"{where}.{name}")
        return found
    if isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            return [f"{where}: {len(actual)} instead of {len(expected)}"]
        sizes = [abs(x) for x in expected if isinstance(x, float) and math.isfinite(x)]
        floor = OF_LARGEST * max(sizes, default=0.0)
        found = []
        for i, (old, new) in enumerate(zip(expected, actual, strict=True)):
            if not (_both_numbers(old, new) and abs(old - new) <= floor):
                found += differences(old, new, f"{where}[{i}]")
        return found
    return [] if _equal(expected, actual) else [f"{where}: {actual!r} instead of {expected!r}"]


def _both_numbers(old: Any, new: Any) -> bool:
    return isinstance(old, float) and isinstance(new, float)


def _equal(old: Any, new: Any) -> bool:
    if type(old) is not type(new):
        return False
    if isinstance(old, float):
        return math.isclose(old, new, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    if isinstance(old, str):
        return old == new or _same_text(old, new)
    return bool(old == new)


def _same_text(old: str, new: str) -> bool:
    """Whether two texts have the same words, and numbers that may be rounded differently."""
    if _NUMBER.sub("#", old) != _NUMBER.sub("#", new):
        return False
    pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
    return all(a == b or _rounded_alike(a, b) for a, b in pairs)


def _rounded_alike(old: str, new: str) -> bool:
    if "." not in old + new:  # a whole number
        return False
    finest = min(_last_place(old), _last_place(new))
    return abs(float(old) - float(new)) <= max(1.5 * finest, RELATIVE * abs(float(old)))


def _last_place(number: str) -> float:
    """What one more in the last digit is worth."""
    digits, _, exponent = number.partition("e")
    return float(10.0 ** (int(exponent or 0) - len(digits.partition(".")[2])))


# -- writing --------------------------------------------------------------------------------------

_WIDTH = 100


def pretty(value: Any, indent: int = 0) -> str:
    """JSON for people: what is short stands on one line, and many numbers on few."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) + indent <= _WIDTH or not isinstance(value, dict | list):
        return text
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}: {pretty(v, indent + 1)}" for k, v in value.items()]
    elif all(isinstance(one, float | int) or one is None for one in value):
        parts = _filled([json.dumps(one) for one in value], _WIDTH - indent)
    else:
        parts = [pretty(one, indent + 1) for one in value]
    ends = "{}" if isinstance(value, dict) else "[]"
    inside = f",\n{pad}".join(parts)
    return f"{ends[0]}\n{pad}{inside}\n{' ' * indent}{ends[1]}"


def _filled(items: list[str], width: int) -> list[str]:
    rows = [""]
    for item in items:
        if rows[-1] and len(rows[-1]) + len(item) + 2 > width:
            rows.append(item)
        else:
            rows[-1] += f", {item}" if rows[-1] else item
    return rows
