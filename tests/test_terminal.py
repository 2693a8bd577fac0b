"""The command line on streams that are narrow, closed, broken or looked at; numbers and paths that
cannot be; options of generation."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import trimtab as tt
from commands import FIT, GENERATE, Command, home, listing, refused, trimtab, warnings_of, work
from trimtab.cli import main
from trimtab.terminal import printable, progress

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

#: What a hostile file says: a title for the window, a cleared screen, a bell, a line that is
#: overwritten, text that reads backwards.
HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\rd\x9b31me\u202ef\u2028g"


def on_stream(
    monkeypatch: pytest.MonkeyPatch, command: str, encoding: str, terminal: bool = False
) -> tuple[Any, bytes, bytes]:
    """Exit status and both streams as bytes, of a command whose streams have an encoding."""

    class Stream(io.TextIOWrapper):
        def isatty(self) -> bool:  # of standard error it is not, or bars would be drawn there
            return terminal and self is streams[0]

    raw = [io.BytesIO(), io.BytesIO()]
    streams = [Stream(one, encoding=encoding, write_through=True) for one in raw]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command))
    return ended.value.code, raw[0].getvalue(), raw[1].getvalue()


# -- narrow streams ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_command_prints_on_a_narrow_terminal(
    work: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    (work / "every").mkdir(exist_ok=True)
    prompt = "Dürer \u4e2d 20\u00b0"
    for command in (
        "inspect every/ss.safetensors",  # its dial is in degrees
        f"{GENERATE} '{prompt}'",
        f"fit ss {FIT} --theta 30 -o new.safetensors",
        "inspect 'no such \u00b0\u4e2d file'",
    ):
        status, out, err = on_stream(monkeypatch, command, encoding)
        assert status == (2 if "no such" in command else 0), err
        assert b"internal error" not in err
        assert b"Traceback" not in out + err
        said = (out + err).decode(encoding)
        for character in "ü\u4e2d\u00b0":
            if character in command:
                escape = character.encode("unicode_escape").decode()
                narrow = character.encode(encoding, "ignore") == b""
                assert (escape if narrow else character) in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_any_encoding(
    work: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    prompt = "Dürer \u4e2d 20\u00b0 \U0001f600"
    status, out, err = on_stream(monkeypatch, f"{GENERATE} '{prompt}' --json", encoding)
    assert (status, err) == (0, b"")
    assert json.loads(out.decode(encoding))["outputs"][0]["prompt"] == prompt
    assert (prompt.encode() in out) is (encoding == "utf-8")
    status, out, _ = on_stream(monkeypatch, "inspect every/ss.safetensors --json", encoding)
    assert json.loads(out.decode(encoding))["dial"]["unit"] == "\u00b0"


# -- closed and broken streams ----------------------------------------------------------------


def shell(command: str, work: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = command.replace(
        "trimtab", f"'{sys.executable}' -c 'from trimtab.cli import main; main()'"
    )
    return subprocess.Popen(
        ["bash", "-c", line],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )


def test_output_that_nobody_reads_ends_the_command(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ("inspect au.safetensors", "inspect au.safetensors --json"):
        reader, writer = os.pipe()
        os.close(reader)
        with monkeypatch.context() as patch, os.fdopen(writer, "w") as nobody:
            patch.setattr(sys, "stdout", nobody)
            with pytest.raises(SystemExit) as ended:
                main(shlex.split(words))
        assert ended.value.code == 1
        assert capsys.readouterr().err == ""


def test_output_that_cannot_be_written_is_said(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, Path("/dev/full").open("w") as full:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            main(["inspect", "au.safetensors", "--json"])
    assert ended.value.code == 2
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdin", "stdout", "stderr"]])
def test_streams_that_are_closed_are_nobody(
    work: Path, monkeypatch: pytest.MonkeyPatch, closed: list[str]
) -> None:
    for words, status in (("inspect au.safetensors", 0), ("inspect no.safetensors", 2)):
        with monkeypatch.context() as patch:
            for name in closed:
                patch.setattr(sys, name, None)
            with pytest.raises(SystemExit) as ended:
                main(shlex.split(words))
        assert ended.value.code == status


def test_prompts_from_a_closed_standard_input(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    refused(trimtab(f"{GENERATE} -"), "there is no prompt")


@pytest.mark.slow
def test_streams_of_a_shell_that_are_closed_or_broken(work: Path) -> None:
    """Each in a process of its own, as a shell starts it; PIPESTATUS is the command's own."""
    inspect = "trimtab inspect au.safetensors"
    done = "; echo ${PIPESTATUS[0]} >&3"
    cases = {
        f"{inspect} | (exec <&-; sleep 0.1)": "1",
        f"{inspect} --json | (exec <&-; sleep 0.1)": "1",
        "trimtab fit --help | (exec <&-; sleep 0.1)": "1",
        f"{inspect} >&-": "0",
        f"{inspect} >&- 2>&- <&-": "0",
        "trimtab inspect missing 2>&-": "2",
        f"{inspect} > /dev/full": "2",
        "trimtab generate --model model - <&-": "2",
    }
    running = {}
    for number, case in enumerate(cases):
        left = work / f"status{number}"
        running[case] = (left, shell(f"exec 3>{left}; {case}{done}", work))
    for case, status in cases.items():
        left, process = running[case]
        out, err = process.communicate(timeout=300)
        assert left.read_text().strip() == status, (case, out, err)
        assert b"Traceback" not in err, (case, err)
        assert b"Exception ignored" not in err, (case, err)
        assert b"internal error" not in err, (case, err)
        assert err.count(b"\n") <= 1, (case, err)
    assert b"there is no prompt" in err
    leftover = running[f"{inspect} > /dev/full"]
    assert leftover[1].returncode == 0


# -- what would steer a terminal --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\r\nc", "a\\rb\r\nc"),
        ("\x07\x00\x7f\x9b", "\\x07\\x00\\x7f\\x9b"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\ud800", "\\ud800"),
        ("tab\tline\nend", "tab\tline\nend"),
        ("\u00e9 \u4e2d \U0001f469\u200d\U0001f4bb \u00a0\u3000 \u05d0 \\x1b", None),
    ],
)
def test_only_what_a_terminal_obeys_is_escaped(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)


def obeyed(stream: bytes) -> list[str]:
    """Characters of a stream that a terminal would obey, but for rich's own styles."""
    text = stream.decode()
    for style in ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[3m", "\x1b[1;2m"):
        text = text.replace(style, "")
    return [c for c in text if c in "\x1b\x07\r\x9b\u202e\u2028"]


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_of_a_file_or_model_steers_the_terminal(
    work: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with safe_open(work / "au.safetensors", "pt") as file:
        key, value = "trimtab", file.metadata()["trimtab"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    document = json.loads(value)
    document["model"]["name"] = HOSTILE
    document["dial"]["unit"] = HOSTILE
    save_file(tensors, work / "bad.safetensors", {key: json.dumps(document)})
    completion = tt.Completion(HOSTILE, HOSTILE, (1,))
    commands = [
        "inspect bad.safetensors",
        f"{GENERATE} --steer bad.safetensors Hi",
        f"inspect '{HOSTILE}'",
        f"generate --model '{HOSTILE}' Hi",
        f"fit caa {FIT} --layer '{HOSTILE}' -o x.safetensors",
        f"generate --model model '{HOSTILE}' --max-new-tokens 1",
    ]
    for command in commands:
        _, out, err = on_stream(monkeypatch, command, "utf-8", terminal)
        assert obeyed(out + err) == [], command
        assert b"\\x1b" in out + err or "--steer" in command
    monkeypatch.setattr(tt.LanguageModel, "generate", lambda *a, **o: [completion])
    _, out, err = on_stream(monkeypatch, f"{GENERATE} Hi", "utf-8", terminal)
    # Into a pipe or a file a model's text goes as it wrote it.
    assert obeyed(err) == []
    assert (HOSTILE.encode() in out) is not terminal
    assert (obeyed(out) == []) is terminal


def test_progress_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    seen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", seen)
    with progress("task\x1b]0;owned\x07[/bold]", 2) as advance:
        advance(1)
    assert "\x1b]0" not in seen.getvalue()
    assert "[/bold]" in seen.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    with progress("nobody looks on", 1) as advance:
        advance(1)


# -- numbers and paths ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{GENERATE} Hi --temperature 1e-320", ["temperature", "1e-320"]),
        (f"{GENERATE} Hi --temperature 1e300", ["temperature"]),
        (f"{GENERATE} Hi --temperature inf", ["temperature"]),
        (f"{GENERATE} Hi --steer caa.safetensors@1e300", ["1e+300"]),
        (f"{GENERATE} Hi --steer caa.safetensors@nan", ["nan"]),
        ("bake --model model --steer caa.safetensors@1e300 -o x", ["1e+300"]),
        (f"fit caa {FIT} --alpha 1e300 -o x.safetensors", ["--alpha", "1e+300", "float32"]),
        (f"fit caa {FIT} --alpha 1e-320 -o x.safetensors", ["--alpha", "float32"]),
        (f"fit many 'caa alpha=1e300' {FIT} -o x", ["caa: alpha", "float32"]),
        (f"fit ss {FIT} --theta 4e38 -o x.safetensors", ["--theta", "float32"]),
    ],
)
def test_numbers_beyond_float32_are_refused(
    trimtab: Command, work: Path, command: str, words: list[str]
) -> None:
    before = listing(work)
    refused(trimtab(command), *words)
    assert listing(work) == before


@pytest.mark.parametrize(
    ("dial", "words"),
    [
        ("1e308:-1e308:-1e306", ["1e+308", "float32"]),
        ("0:1:1e-320", ["float32"]),
        ("0:1e38:1e-37", ["names 1e+75 dials; 1000 are the most"]),
        ("-3e38:3e38:1", ["names 6e+38 dials"]),
        ("0:1000:1", ["names 1001 dials"]),
        ("1e300", ["float32"]),
        ("nan:1:1", ["finite"]),
    ],
)
def test_grids_of_dials_are_counted_before_they_are_built(
    trimtab: Command, dial: str, words: list[str]
) -> None:
    command = "evaluate --model model --steer caa.safetensors --task contrast:pairs.jsonl"
    refused(trimtab(*shlex.split(command), f"--dial={dial}", "-o", "x"), *words)


@pytest.mark.parametrize(
    "command",
    [
        "generate --model ~nosuchuser/model Hi",
        "evaluate --model model --task perplexity:~nosuchuser/text.txt -o x",
        "evaluate --model model --task copa --data ~nosuchuser -o x",
        "evaluate --model model --task refusal:~nosuchuser/p.jsonl -o x",
        f"fit sta {FIT} --sae ~nosuchuser/sae -o x.safetensors",
    ],
)
def test_a_home_directory_that_is_not_there(trimtab: Command, command: str) -> None:
    refused(trimtab(command), "nosuchuser", "no home directory")


def test_points_of_a_curve_are_counted(trimtab: Command) -> None:
    command = "strength curve --model model --steer caa.safetensors --points 100000000 -o x Hi"
    refused(trimtab(command), "10000 points at most")


# -- options of generation --------------------------------------------------------------------


def test_options_reach_generation(trimtab: Command) -> None:
    lm = tt.load("model", device="cpu")
    given = "--option repetition_penalty=1.8 --option suppress_tokens=[9,10] --option num-beams=2"
    found = trimtab(f"{GENERATE} 'Today I feel' {given} --json").json["outputs"][0]
    same = lm.generate(
        ["Today I feel"], max_new_tokens=6, repetition_penalty=1.8, suppress_tokens=[9, 10],
        num_beams=2,
    )  # fmt: skip
    assert found["tokens"] == list(same[0].tokens)
    assert found["tokens"] != list(lm.generate(["Today I feel"], max_new_tokens=6)[0].tokens)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("repetition_penalty", ["write NAME=VALUE"]),
        ("=1", ["write NAME=VALUE"]),
        ("temperature=1", ["it is an option by itself, --temperature"]),
        ("max-new-tokens=1", ["--max-new-tokens"]),
        ("steering=1", ["by itself"]),
        ("self=1", ["by itself"]),
        ("repetition_penality=1", ["did you mean repetition_penalty"]),
        ("repetition_penalty=high", ["must be a number"]),
        ("repetition_penalty=NaN", ["must be a number"]),
        ("num_return_sequences=2", ["each prompt as often"]),
        ("bad_words_ids=[[", ["transformers does not take bad_words_ids='[['"]),
    ],
)
def test_options_that_cannot_be(trimtab: Command, option: str, words: list[str]) -> None:
    refused(trimtab(*shlex.split(GENERATE), "Hi", "--option", option), *words)
    twice = ["--option", "min_p=0.1"] * 2
    refused(trimtab(*shlex.split(GENERATE), "Hi", *twice), "given twice")


def test_what_a_checkpoint_asks_for_is_said_once_and_not_done(trimtab: Command, work: Path) -> None:
    plain = trimtab(f"{GENERATE} Hi 'The ship' --json").json["outputs"]
    lm = tt.load("model", device="cpu")
    settings = {"repetition_penalty": 1.3, "top_p": 0.9, "do_sample": True, "max_length": 7}
    for name, value in settings.items():
        setattr(lm.model.generation_config, name, value)
    lm.model.generation_config.suppress_tokens = list(range(10, 390))
    lm.save_pretrained(work / "chatty")
    command = GENERATE.replace("--model model", "--model chatty")
    ran = trimtab(f"{command} Hi 'The ship' --compare --steer caa.safetensors --force --json")
    (said,) = warnings_of(ran)
    assert "the checkpoint asks for top_p=0.9, repetition_penalty=1.3, suppress_tokens=[" in said
    assert "not used; --option NAME=VALUE" in said
    assert len(said) < 300
    assert json.loads(ran.out)["outputs"][:2] == plain
    asked = f"{command} Hi --option repetition_penalty=1.3 --option suppress_tokens=null"
    (said,) = warnings_of(trimtab(f"{asked} --temperature 1 --top-p 0.9 --seed 0"))
    assert "repetition_penalty" not in said
    assert "top_p" not in said
