"""Run directories that were damaged or edited: each ends in the figures of the undamaged run, or is
refused in one line. Never in other figures, never in another error.

The damages are drawn with a seed; those that a forger would make, who computes checksums anew, are
not among them.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from helpers import add, few_quick, language_model, refused_in_one_line, steer, write_pairs
from trimtab.evaluation.evaluation import evaluate
from trimtab.papers.rotations.dials import dial
from trimtab.reports import run as runs_module
from trimtab.reports.run import Run
from trimtab.sweeps.compare_methods import Candidate, compare
from trimtab.sweeps.sweep_method import sweep

WORDS = ["happy", "sad", "good", "bad", "map", "ship", "rain", "wheel", "king", "daughter", "fire"]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes most of the time and is not looked at here."""
    monkeypatch.setattr(runs_module, "environment", dict)
    monkeypatch.setattr("trimtab.evaluation.evaluation.evaluation_page", lambda *arguments: "")
    monkeypatch.setattr("trimtab.sweeps.sweep_page.sweep_page", lambda *arguments: "")


def write_requests(path: Path, rows: int = 6) -> str:
    lines = [json.dumps({"id": str(i), "prompt": f"Tell {WORDS[i]}"}) for i in range(rows)]
    path.write_text("\n".join(lines))
    return f"coherence:{path}"


# -- the damages ----------------------------------------------------------------------------------

#: What is written in place of a value.
VALUES: list[Any] = [
    None, True, "", "0", "copa", [], {}, -1, 0, 1, 2, 9999, 10**30, 0.5, 1e300, float("nan"),
    float("inf"), float("-inf"), [[[[]]]],
]  # fmt: skip
GARBAGE = [
    b"",
    b"\n",
    b"\n\n\n",
    b"\0" * 100,
    b"\xff\xfe\x00garbage\n",
    b"null\n",
    b"5\n",
    b"[]\n",
    b"{}\n",
    b"NaN\n",
    b"[" * 20_000 + b"\n",
    b'{"a":' * 20_000 + b"\n",
    b'{"task": "copa"}\n',
    b"1" * 6000 + b"\n",
]


def damage_lines(content: bytes, draw: random.Random) -> bytes:
    """A file of JSON lines with something wrong in its lines."""
    lines = content.split(b"\n")[:-1]
    if not lines:
        return draw.choice(GARBAGE)
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.choice(
        ["delete", "double", "swap", "shuffle", "cut", "cut in a line", "value", "value", "value",
         "key", "index", "nested", "byte", "garbage", "other line", "reversed"]
    )  # fmt: skip
    if kind == "delete":
        del lines[i]
    elif kind == "double":
        lines.insert(j, lines[i])
    elif kind == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == "shuffle":
        draw.shuffle(lines)
    elif kind == "reversed":
        lines.reverse()
    elif kind == "cut":
        lines = lines[:i]
    elif kind == "cut in a line":
        return content[: draw.randrange(len(content))]
    elif kind == "garbage":
        lines[i] = draw.choice(GARBAGE).strip(b"\n")
    elif kind == "other line":
        lines[i] = lines[j]
    elif kind == "byte":
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    else:
        lines[i] = damage_object(lines[i], kind, draw)
    return b"".join(line + b"\n" for line in lines)


def damage_object(line: bytes, kind: str, draw: random.Random) -> bytes:
    """A JSON object with one of its values or keys changed."""
    found = json.loads(line)
    inside = found
    if kind == "nested":
        nested = [value for value in found.values() if isinstance(value, dict) and value]
        inside = draw.choice(nested) if nested else found
    if not inside:
        return b"{}x"
    key = "index" if kind == "index" and "index" in found else draw.choice(list(inside))
    if kind == "key":
        value = inside.pop(key)
        if draw.random() < 0.5:
            inside[key + "x"] = value
    else:
        inside[key] = draw.choice(VALUES)
    return json.dumps(found).encode()


def damage_json(content: bytes, draw: random.Random) -> bytes:
    kind = draw.choice(["value", "nested", "key", "garbage", "byte", "cut"])
    if kind == "garbage":
        return draw.choice(GARBAGE)
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    if kind == "byte":
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    return damage_object(content, kind, draw)


def damage_study(file: Path, draw: random.Random) -> None:
    """An edit in one of Optuna's tables, or of the file's bytes."""
    kind = draw.choice(["edit"] * 8 + ["delete"] * 3 + ["bytes", "garbage", "cut", "gone"])
    content = bytearray(file.read_bytes())
    if kind == "gone":
        file.unlink()
    elif kind == "garbage":
        file.write_bytes(draw.choice(GARBAGE))
    elif kind == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "bytes":
        for _ in range(20):
            content[draw.randrange(len(content))] = draw.randrange(256)
        file.write_bytes(content)
    else:
        with closing(sqlite3.connect(file)) as database, database:
            damage_table(database, kind, draw)


def damage_table(database: sqlite3.Connection, kind: str, draw: random.Random) -> None:
    tables = ["trials"] * 3 + ["trial_values", "trial_user_attributes", "trial_params", "studies",
              "trial_system_attributes", "study_directions", "version_info"]  # fmt: skip
    table = draw.choice(tables)
    rows = database.execute(f"SELECT rowid FROM {table}").fetchall()
    if not rows:
        return
    row = draw.choice(rows)[0]
    if kind == "delete":
        database.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
        return
    columns = [one[1] for one in database.execute(f"PRAGMA table_info({table})")]
    column = draw.choice(columns)
    old = database.execute(f"SELECT {column} FROM {table} WHERE rowid = ?", (row,)).fetchone()[0]
    new = draw.choice([*VALUES, "WAITING", "RUNNING", "FAIL", "PRUNED", "COMPLETE", "BROKEN"])
    if isinstance(old, str) and old[:1] in "{[" and draw.random() < 0.7:
        outcome = json.loads(old)
        if isinstance(outcome, dict) and outcome:
            new = damage_object(old.encode(), draw.choice(["value", "nested", "key"]), draw)
            new = new.decode()
    if isinstance(old, int | float) and draw.random() < 0.5:
        new = old + draw.choice([1, -1, 0.25])
    if (
        isinstance(new, list | dict | int)
        and not -(2**63) <= (new if type(new) is int else 0) < 2**63
    ):
        new = str(new)
    new = json.dumps(new) if isinstance(new, list | dict) else new
    with suppress(sqlite3.IntegrityError):  # the database refuses it
        database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))


def damage(folder: Path, draw: random.Random) -> str:
    """Do one thing to a run directory."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    records = [p for p in files if p.suffix == ".jsonl"]
    kind = draw.choice(["lines"] * 5 + ["json", "swap", "gone", "garbage", "study", "study"])
    studies = [p for p in files if p.name == "study.db"]
    if kind == "study" and studies:
        damage_study(studies[0], draw)
        return f"study {studies[0]}"
    if kind == "swap" and len(records) > 1:
        one, other = draw.sample(records, 2)
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        if draw.random() < 0.5:
            other.write_bytes(first)
        return f"swap {one} {other}"
    if kind == "json":
        file = draw.choice([p for p in files if p.suffix == ".json"])
        file.write_bytes(damage_json(file.read_bytes(), draw))
    elif kind == "gone":
        file = draw.choice([p for p in files if p.name != "config.json"])
        file.unlink()
    elif kind == "garbage":
        file = draw.choice(files)
        file.write_bytes(draw.choice(GARBAGE))
    else:
        file = draw.choice(records)
        file.write_bytes(damage_lines(file.read_bytes(), draw))
    return f"{kind} {file}"


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check(
    whole: Path, room: Path, run: Callable[[Path], Any], expected: Any, seeds: range
) -> Counter[str]:
    """Damage copies of a directory and run again in them."""
    ends: Counter[str] = Counter()
    for seed in seeds:
        folder = room / str(seed)
        shutil.copytree(whole, folder)
        what = damage(folder, random.Random(seed))
        try:
            with quiet():
                found = run(folder)
        except tt.TrimtabError as error:
            ends["refused in one line" if "\n" not in str(error) else f"{seed}: {error}"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {what}: {error!r}") from error
        else:
            assert found == expected, (seed, what)
            ends["the same"] += 1
        shutil.rmtree(folder)
    assert set(ends) == {"refused in one line", "the same"}
    return ends


# -- evaluations ----------------------------------------------------------------------------------


class Evaluated:
    """An evaluation that can be run again, and its figures."""

    def __init__(self, lm: tt.LanguageModel, room: Path) -> None:
        self.lm = lm
        (room / "text.txt").write_text(" ".join(WORDS * 9))
        self.tasks = [
            write_pairs(room / "pairs.jsonl", rows=36),
            write_requests(room / "requests.jsonl"),
            f"perplexity:{room / 'text.txt'}",
        ]
        width = lm.anatomy.hidden_size
        self.steering = {"some": steer(lm, ("layers.1.resid", add(width, 0, 3.0)))}

    def __call__(self, output: Path | None) -> Any:
        found = evaluate(
            self.lm, self.tasks, steering=self.steering, output=output, max_new_tokens=3
        ).as_json()
        del found["seconds"]
        return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def evaluated(lm: tt.LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return Evaluated(lm, tmp_path_factory.mktemp("tasks"))


def check_evaluations(evaluated: Evaluated, room: Path, seeds: range) -> None:
    expected = evaluated(room / "whole")
    assert evaluated(None) == expected
    ends = check(room / "whole", room / "damaged", evaluated, expected, seeds)
    assert min(ends["refused in one line"], ends["the same"]) > len(seeds) / 8


def test_a_damaged_evaluation(evaluated: Evaluated, tmp_path: Path) -> None:
    check_evaluations(evaluated, tmp_path, range(80))


@pytest.mark.slow
def test_many_damaged_evaluations(evaluated: Evaluated, tmp_path: Path) -> None:
    check_evaluations(evaluated, tmp_path, range(1000, 2500))


def without_checksums(folder: Path) -> None:
    """A directory as it was before there were checksums."""
    (folder / "environment.json").write_text("{}")
    for file in folder.rglob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
        for row in rows:
            del row["checksum"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if (folder / "study.db").exists():
        with closing(sqlite3.connect(folder / "study.db")) as database, database:
            attributes = "trial_user_attributes"
            found = database.execute(f"SELECT rowid, value_json FROM {attributes}").fetchall()
            for row, text in found:
                value = json.loads(text)
                if isinstance(value, dict):
                    for name in ("checksum", "reached"):
                        value.pop(name, None)
                    change = f"UPDATE {attributes} SET value_json = ? WHERE rowid = ?"
                    database.execute(change, (json.dumps(value), row))


def edit(file: Path, number: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a record of a file."""
    lines = file.read_text().split("\n")
    record = json.loads(lines[number])
    change(record)
    lines[number] = json.dumps(record)
    file.write_text("\n".join(lines))


def test_an_evaluation_of_before_there_were_checksums(evaluated: Evaluated, tmp_path: Path) -> None:
    expected = evaluated(tmp_path / "run")
    without_checksums(tmp_path / "run")
    assert evaluated(tmp_path / "run") == expected
    file = tmp_path / "run" / "records.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join(lines[:20]) + b"\n")
    assert evaluated(tmp_path / "run") == expected  # goes on, with checksums from here
    assert b'"checksum"' not in file.read_bytes().split(b"\n")[19]
    assert b'"checksum"' in file.read_bytes().split(b"\n")[20]
    assert evaluated(tmp_path / "run") == expected
    whole = file.read_bytes()
    for change, says in (
        (lambda record: record.update(index=9999), "line 1 is damaged: .*index of no example"),
        (lambda record: record.update(index="0"), "line 1 is damaged"),
        (lambda record: record.update(id="other"), "line 1 is damaged: .*not of the example"),
        (lambda record: record.update(steering="other"), "line 1 is damaged: its steering"),
        (lambda record: record.update(task="copa"), "line 1 is damaged: its task"),
        (lambda record: record["values"].update(log_odds=None, more="1"), "line 1 is damaged"),
        (lambda record: record["values"].update(log_odds=float("nan")), "line 1 is damaged"),
    ):
        edit(file, 0, change)
        refused_in_one_line(lambda: evaluated(tmp_path / "run"), f"records.jsonl, {says}")
        file.write_bytes(whole)
    edit(file, 20, lambda record: record.pop("checksum"))
    evaluated(tmp_path / "run")  # at the border old and new cannot be told apart
    edit(file, 21, lambda record: record.pop("checksum"))
    evaluated(tmp_path / "run")
    edit(file, 23, lambda record: record.pop("checksum"))
    refused_in_one_line(lambda: evaluated(tmp_path / "run"), "line 24 is damaged: it has no check")


# -- sweeps ---------------------------------------------------------------------------------------


class Swept:
    """A sweep that can be run again, and its figures."""

    def __init__(self, lm: tt.LanguageModel, room: Path, **options: Any) -> None:
        self.lm, self.task, self.options = lm, write_pairs(room / "pairs.jsonl", rows=36), options

    def __call__(self, output: Path | None) -> Any:
        found = sweep(self.lm, "caa", self.task, output=output, **self.options).as_json()
        for trial in found["trials"]:
            del trial["seconds"]
        del found["seconds"]
        return json.loads(json.dumps(found))


SPACE = {"layer": (0, 1), "alpha": (2.0, 30.0)}
SWEEPS: dict[str, dict[str, Any]] = {
    "grid": {"space": SPACE},
    "tpe": {"space": SPACE, "search": "tpe", "trials": 5, "max_cost": 3.0},
    "halving": {"space": SPACE, "search": "halving"},
}


def check_sweeps(lm: tt.LanguageModel, kind: str, room: Path, seeds: range) -> None:
    (room / "task").mkdir()
    swept = Swept(lm, room / "task", **SWEEPS[kind])
    expected = swept(room / "whole")
    ends = check(room / "whole", room / "damaged", swept, expected, seeds)
    assert min(ends["refused in one line"], ends["the same"]) > len(seeds) / 8


@pytest.mark.parametrize("kind", SWEEPS)
def test_a_sweep_of_before_there_were_checksums(
    lm: tt.LanguageModel, kind: str, tmp_path: Path
) -> None:
    swept = Swept(lm, tmp_path, **SWEEPS[kind])
    expected = swept(tmp_path / "run")
    without_checksums(tmp_path / "run")
    assert swept(tmp_path / "run") == expected
    best = expected["best"]["trial"]
    for number in sorted({best, 0 if kind != "halving" else best}):
        file = tmp_path / "run" / "records" / f"{number:05d}-validation.jsonl"
        whole = file.read_bytes()
        edit(file, 0, lambda record: record["values"].update(log_odds=99.0))
        refused_in_one_line(lambda: swept(tmp_path / "run"), "log_odds is .* and .* in the study")
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", few_quick(SWEEPS, "grid"))
def test_a_damaged_sweep(lm: tt.LanguageModel, kind: str, tmp_path: Path) -> None:
    check_sweeps(lm, kind, tmp_path, range(25))


# -- comparisons and analyses ---------------------------------------------------------------------


def without_times(found: Any) -> Any:
    if isinstance(found, dict):
        times = ("seconds", "fit", "swept")
        return {key: without_times(value) for key, value in found.items() if key not in times}
    return [without_times(one) for one in found] if isinstance(found, list) else found


def compared(lm: tt.LanguageModel, task: str, output: Path) -> Any:
    candidates = [Candidate("caa", {"layer": (0, 1)}), Candidate("iti", {"k": (1, 2)})]
    found = compare(lm, candidates, task, timed=False, output=output)
    return without_times(json.loads(json.dumps(found.as_json())))


def dialled(lm: tt.LanguageModel, task: str, output: Path) -> Any:
    run = Run(output, {"analysis": "dial", "model": {}})
    found = dial(lm, task, methods=("ss",), step=180, run=run)
    return without_times(json.loads(json.dumps(found.as_json())))


@pytest.mark.parametrize("work", few_quick([compared, dialled], dialled))
def test_a_damaged_comparison_or_analysis(
    lm: tt.LanguageModel, work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.sweeps.comparison_page.comparison_page", lambda *arguments: "")
    (tmp_path / "task").mkdir()
    task = write_pairs(tmp_path / "task" / "pairs.jsonl", rows=36)
    expected = work(lm, task, tmp_path / "whole")
    check(
        tmp_path / "whole",
        tmp_path / "damaged",
        lambda folder: work(lm, task, folder),
        expected,
        range(12),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", SWEEPS)
def test_many_damaged_sweeps(lm: tt.LanguageModel, kind: str, tmp_path: Path) -> None:
    check_sweeps(lm, kind, tmp_path, range(1000, 1500))
