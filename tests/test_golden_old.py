"""Steering files and run directories of version 0.1.0, finished and interrupted, still open.

They lie under tests/golden/old as that version wrote them (pictures and pages are left out, and
databases are packed), with what its commands printed in printed.json. They are not written anew:
that they are old is what is tested. `make_old` says how they came about.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from golden_commands import FITS, PROMPTS, furnish, inside, run
from golden_form import differences, pretty, settled
from trimtab.sweeps.asking import UNSAID

OLD = Path(__file__).parent / "golden" / "old"
_CONTRAST = "--model model --task contrast:parts.jsonl --limit 3 --test-limit 4"
COMMANDS = {
    "evaluate": (
        "evaluate --model speaker --data data --task copa --task contrast:parts.jsonl --limit 5 "
        "--steer speaker.safetensors@12"
    ),
    "sweep": f"sweep caa {_CONTRAST} --layer 0,1 --alpha 1,8",
    "sweep-drawn": (
        f"sweep caa {_CONTRAST} --layer 0:2 --alpha 0.1:10:log --search tpe --trials 5 --seed 4"
    ),
    "compare": f"compare 'caa layer=0,1 alpha=4' 'sas theta=0,90' {_CONTRAST} --untimed --kl 0.01",
    "analyse": (
        "analyse dial --model model --task contrast:parts.jsonl --methods sas --step 120 --limit 3 "
        "--no-cost"
    ),
}
#: What notes say since.
SINCE = "could be luck", "of its values: no"
#: Passes of blocks for the texts that results show: 32 tokens through 3 blocks, unsteered and under
#: one or two steerings; of a comparison also what its budget of KL changes each of them by.
#: A model that is loaded is looked at: its layers run on a short text.
LOOKS = 12
TEXTS = {"sweep": 2 * 96, "sweep-drawn": 2 * 96, "compare": 3 * 96 + 12}
STEERED = {
    f"{name} {kind}": line
    for name in (*FITS, "calibrated")
    for kind, line in {
        "inspect": f"inspect {name}.safetensors --json",
        "generate": (
            f"generate --model model --raw --max-new-tokens 6 {PROMPTS} --json --steer "
            f"{name}.safetensors{'@kl=0.1' if name == 'calibrated' else ''}"
        ),
    }.items()
}


class Passes:
    """How often a block of the model ran for a command; beyond `allowed` it is interrupted as by
    Ctrl-C."""

    def __init__(self) -> None:
        self.count, self.allowed = 0, 10**9

    @contextmanager
    def counted(self, allowed: int = 10**9) -> Iterator[None]:
        from trimtab.model import is_asking

        self.count, self.allowed, forward = 0, allowed, LlamaMLP.forward

        def run_one(module: Any, *arguments: Any, **options: Any) -> Any:
            self.count += not is_asking()  # of the model itself, once
            if self.count > self.allowed:
                raise KeyboardInterrupt
            return forward(module, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", run_one)
            yield


def make_old(room: Path) -> None:
    """Write the files that are tested here; `room` has been furnished."""
    import sqlite3

    from trimtab import searching

    printed: dict[str, Any] = {}
    passes = Passes()
    with inside(room), pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "_machine", lambda: "a machine")
        for name, options in FITS.items():
            run(f"fit {options} --model model --contrast pairs.jsonl -o {name}.safetensors")
        run(
            f"strength budget --model model --steer caa.safetensors --raw {PROMPTS} --kl 0.01 "
            "--kl 0.1 --save calibrated.safetensors"
        )
        for name, line in STEERED.items():
            printed[name] = {"out": settled(json.loads(run(line).out))}
        for name, line in COMMANDS.items():
            with passes.counted():
                out = run(f"{line} -o whole/{name} --json").out
            many = passes.count
            with passes.counted(many * 3 // 5):
                ended = run(f"{line} -o half/{name} --json").status
            assert ended == 130, ended
            shutil.copytree(f"whole/{name}", f"again/{name}")
            with passes.counted():
                run(f"{line} -o again/{name} --json")
            printed[name] = {"passes": many, "again": passes.count, "out": settled(json.loads(out))}
        for folder in map(Path, ("whole", "half")):
            for file in sorted(folder.rglob("*")):
                if file.suffix in (".svg", ".png", ".html") or file.name == ".lock":
                    file.unlink()
                elif file.name == "environment.json":
                    about = json.loads(file.read_text())
                    file.write_text(json.dumps({**about, "platform": "Linux"}, indent=1) + "\n")
                elif file.suffix == ".db":
                    with sqlite3.connect(file) as database:
                        database.execute("PRAGMA page_size = 1024")
                    database.execute("VACUUM")
                    database.close()
            shutil.copytree(folder, OLD / folder)
        (OLD / "steerings").mkdir(parents=True)
        for name in (*FITS, "calibrated", "speaker"):
            shutil.copy(f"{name}.safetensors", OLD / "steerings")
    (OLD / "printed.json").write_text(pretty(printed) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A room with the models and texts that the old runs are of, and the old steerings."""
    folder = tmp_path_factory.mktemp("old") / "room"
    folder.mkdir()
    furnish(folder)
    for file in (OLD / "steerings").iterdir():
        shutil.copy(file, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with inside(folder):
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((OLD / "printed.json").read_text(encoding="utf-8"))
    return found


def _same_as_then(line: str, then: dict[str, Any]) -> None:
    ran = run(line)
    assert ran.status == 0, ran.err
    now = settled(json.loads(ran.out))
    where = differences(_results(then["out"]), _results(now))
    assert not where, "\n".join(where[:20])


def _without(found: Any, names: set[str]) -> Any:
    """The same without what has these names, at any depth."""
    if isinstance(found, dict):
        return {name: _without(each, names) for name, each in found.items() if name not in names}
    return [_without(each, names) for each in found] if isinstance(found, list) else found


def _results(found: dict[str, Any]) -> dict[str, Any]:
    """What was found, without what it took: less, where some was done already; and without what is
    said since: texts that runs show, scopes, which say what positions did, gates, prompts beside
    methods, shares of rows that moved the wrong way, and whether the best of a sweep could be luck,
    or lies at an end. There was one budget at most."""
    found = _without(
        found, {"samples", "scope", "gate", "wrong_way", "prompts", "drift", "axis_kl", "chosen_p"}
    )
    if "notes" in found:
        found["notes"] = [
            note
            for note in found["notes"]
            if note != UNSAID and not any(words in note for words in SINCE)
        ]
    if "trials" in found:
        found["difference"] = _without(found["difference"], {"p"})
    if "interventions" in found:
        acting = [{k: v for k, v in one.items() if k != "scope"} for one in found["interventions"]]
        found["interventions"] = acting
    if "methods" not in found:
        return found
    if "at_budget" in found:
        said = {"at_budgets" if k == "at_budget" else k: v for k, v in found.items()}
        found = {**said, "at_budgets": [found["at_budget"]]}
    methods = [{k: v for k, v in one.items() if k != "swept"} for one in found["methods"]]
    return {**found, "methods": methods}


def _records(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.jsonl")}


@pytest.mark.parametrize("name", STEERED)
def test_old_steerings_say_and_do_the_same(name: str, room: Path, printed: dict[str, Any]) -> None:
    _same_as_then(STEERED[name], printed[name])


def _gone_on(part: str, name: str, room: Path, printed: dict[str, Any]) -> tuple[Any, Any, int]:
    """A copy of an old run, whole or half, on which its command goes on: the records before and
    after it, and how often the model ran."""
    copy = room / part / name
    shutil.copytree(OLD / part / name, copy)
    before, passes = _records(copy), Passes()
    assert before
    with passes.counted():
        _same_as_then(f"{COMMANDS[name]} -o {part}/{name} --json", printed[name])
    return before, _records(copy), passes.count


@pytest.mark.parametrize("name", COMMANDS)
def test_an_old_finished_run_is_read_and_not_run_again(
    name: str, room: Path, printed: dict[str, Any]
) -> None:
    before, after, passes = _gone_on("whole", name, room, printed)
    assert passes <= printed[name]["again"] + TEXTS.get(name, 0) + LOOKS
    assert after == before


@pytest.mark.parametrize("name", COMMANDS)
def test_an_old_interrupted_run_goes_on_to_the_same_end(
    name: str, room: Path, printed: dict[str, Any]
) -> None:
    before, after, passes = _gone_on("half", name, room, printed)
    assert passes < printed[name]["passes"] + TEXTS.get(name, 0) + LOOKS
    assert after.keys() == _records(OLD / "whole" / name).keys()
    for file, content in before.items():  # what was there is kept as it was
        assert after[file].startswith(content), file
