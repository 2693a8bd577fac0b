"""The command line as a whole: help, warnings, what is overwritten, full disks, Ctrl-C, a process
of its own."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import trimtab as tt
from commands import (
    FIT,
    GENERATE,
    Command,
    failing,
    home,
    listing,
    refused,
    same_as_python,
    trimtab,
    warnings_of,
    work,
)
from trimtab.cli import main
from trimtab.methods import METHODS

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

# -- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    ["", "demo", "make", "models", "models list", "models pull", "models remove", "fit", "fit many",
     "contrast", "contrast check", "contrast show", "contrast split",
     *(f"fit {method}" for method in METHODS), "generate", "inspect", "bake", "export", "push",
     "pull", "search", "audit"],
)  # fmt: skip
def test_help(trimtab: Command, words: str) -> None:
    text = trimtab(*words.split(), "--help").text
    assert "Usage: trimtab" in text
    if words not in ("", "fit"):  # which only lead on to commands
        assert "Example: trimtab" in " ".join(text.split())


@pytest.mark.parametrize("words", [[], ["fit"]])
def test_no_command_shows_help(
    words: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert "Usage: trimtab" in captured.out + captured.err
    assert "trimtab: " not in captured.err


# -- what is warned of, forced, overwritten ----------------------------------------------------


def test_dial_out_of_range_is_warned_of_and_works(trimtab: Command, home: Path) -> None:
    ran = trimtab(f"{GENERATE} 'Today I feel' --steer au.safetensors@150 --json")
    (warning,) = warnings_of(ran)
    assert "alpha = 150" in warning
    assert "0 to 100" in warning
    with pytest.warns(tt.TrimtabWarning):
        steering = tt.Steering.load(home / "au.safetensors").at(150)
    same_as_python(json.loads(ran.out)["outputs"], ["au.safetensors@150"], steering=steering)


def test_force_allows_another_models_steering(trimtab: Command) -> None:
    ran = trimtab("generate --model other --max-new-tokens 4 Hello --steer au.safetensors")
    line = refused(ran)
    for folder in ("model", "other"):  # both are named, with what tells them apart
        assert tt.load(folder, device="cpu").identity.digest[:8] in line
    assert trimtab("generate -m other --max-new-tokens 4 Hello -s au.safetensors --force").text
    assert trimtab("bake --model other --steer au.safetensors -o baked --force --json").json


def test_overwrite(trimtab: Command, work: Path) -> None:
    for command, output in (
        (f"fit caa {FIT} --alpha 1 -o out.st", "out.st"),
        ("bake --model model --steer caa.safetensors@1 -o out", "out"),
    ):
        assert trimtab(command).text
        before = listing(work)
        refused(trimtab(command), f"{output} exists", "--overwrite")
        assert listing(work) == before
        turned = command.replace("--alpha 1", "--alpha 3").replace("@1", "@3")
        assert trimtab(f"{turned} --overwrite").text
        after = listing(work)
        assert after.keys() == before.keys()
        assert any(after[name] != before[name] for name in after if name.startswith(output))
    assert tt.Steering.load("out.st").setting == 3


def test_no_permission_is_said_before_the_work(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Patched, because root may write everywhere.
    monkeypatch.setattr("trimtab.files.os.access", lambda path, mode: False)
    refused(trimtab(f"fit caa {FIT} -o new.st"), "cannot write new.st", "permission")
    refused(trimtab("bake -m model -s au.safetensors -o new"), "cannot write new", "permission")


# -- full disk, Ctrl-C, --debug ----------------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("overwrite", ["", "--overwrite"])
def test_full_disk_leaves_nothing_and_loses_nothing(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch, overwrite: str
) -> None:
    fit, bake = f"fit caa {FIT} -o out.st", "bake -m model -s caa.safetensors -o out"
    if overwrite:
        trimtab(fit)
        trimtab(bake)
    before = listing(work)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", failing(FULL))
        refused(trimtab(f"{fit} {overwrite}"), "out.st", "No space left")
        patch.setattr("tempfile.mkstemp", failing(FULL))
        refused(trimtab(f"{fit} {overwrite}"), "out.st", "No space left")
    assert listing(work) == before
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", half_saved(FULL))
        refused(trimtab(f"{bake} {overwrite}"), "out", "No space left")
    assert listing(work) == before


def half_saved(error: BaseException) -> Callable[..., Any]:
    """A save_pretrained that ends in the middle of its work."""

    def save(model: Any, folder: Any, **options: Any) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").write_text("{")
        raise error

    return save


@pytest.mark.parametrize("overwrite", ["", "--overwrite"])
def test_ctrl_c_leaves_nothing_and_loses_nothing(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch, overwrite: str
) -> None:
    fit, bake = f"fit caa {FIT} -o out.st", "bake -m model -s caa.safetensors -o out"
    if overwrite:
        trimtab(fit)
        trimtab(bake)
    before = listing(work)
    stop = KeyboardInterrupt()
    for target, command in (
        ("os.replace", fit),
        ("trimtab.fitting.activations._run", fit),
        ("trimtab.model.language_model.written", f"{GENERATE} Hello"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, failing(stop))
            options = overwrite if command == fit else ""
            refused(trimtab(f"{command} {options}"), "interrupted", status=130)
        assert listing(work) == before
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", half_saved(stop))
        refused(trimtab(f"{bake} {overwrite}"), "interrupted", status=130)
    assert listing(work) == before


def test_debug_shows_where_it_comes_from(trimtab: Command) -> None:
    for place in ("--debug inspect no.st", "inspect no.st --debug"):
        ran = trimtab(place)
        assert ran.status == 2
        assert ran.out == ""
        assert "Traceback" in ran.err
        assert ran.err.splitlines()[-1] == "trimtab: no such steering file: no.st"


def test_what_nobody_thought_of_is_one_line_too(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tt.LanguageModel, "generate", failing(ZeroDivisionError("by\nzero")))
    ran = trimtab(f"{GENERATE} Hello")
    said = "trimtab: internal error, ZeroDivisionError: by (run again with --debug)\n"
    assert (ran.status, ran.out, ran.err) == (2, "", said)


# -- as a process of its own -------------------------------------------------------------------


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from trimtab.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_as_a_process(work: Path) -> None:
    """Nothing but the object on standard output, and nothing at all on standard error."""
    arguments = shlex.split("generate --model model --max-new-tokens 4 Hello --json")
    ran = process(*arguments, "--steer", "au.safetensors@3")
    assert (ran.returncode, ran.stderr) == (0, "")
    (output,) = json.loads(ran.stdout)["outputs"]
    assert output["prompt"] == "Hello"


@pytest.mark.slow
def test_as_a_process_with_bad_input(work: Path) -> None:
    ran = process("bake", "--model", "nowhere/at/all", "--steer", "au.safetensors", "-o", "baked")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("trimtab: nowhere/at/all is not a model's directory")
    assert ran.stderr.count("\n") == 1
    assert not (work / "baked").exists()
