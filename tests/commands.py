"""What the tests of commands share: command lines run in this process, and what they left."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from every_architecture import build
from tiny import tiny_model, tiny_tokenizer
from trimtab.cli import main

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
    "caa": tt.CAA(layer=(0, 2), token="last"),
    "iti": tt.ITI(k=3, alpha=2),
    "sadi": tt.SADI("neuron", k=4),
    "ablation": tt.Ablation(layer=1),
    "sas": tt.SAS(theta=30),
    "aas": tt.AAS(theta=30),
    "act": tt.AcT(site="ffn_out", layer=1),
    "ss": tt.SS(theta=30, whole_blocks=False),
    "austeer": tt.AUSteer(k=4, site="ffn_out", direction="paper"),
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
    build("gemma3n_text").save_pretrained(home / "streams")
    tiny_tokenizer().save_pretrained(home / "streams")

    lm = tt.load(home / "model", device="cpu")
    contrast = tt.Contrast.from_pairs([tuple(pair.values()) for pair in PAIRS])
    methods = [
        tt.AUSteer(k=5, alpha=2.0, site="ffn_out", direction="paper"),
        tt.CAA(layer=1, token="last"),
        tt.CAA(layer=1, positions="generated", token="last"),
    ]
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


def with_other(command: str, options: str) -> str:
    """A command line with other values for some of its options, which may stand there only once."""
    words, others = shlex.split(command), shlex.split(options)
    for name in [other for other in others if other.startswith("-") and other in words]:
        place = words.index(name)
        del words[place : place + 2]
    return shlex.join([*words, *others])


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
    """Assert a refusal in one line that holds the words; warnings may come before it, and that the
    hub is asked."""
    assert ran.status == status, (ran.out, ran.err)
    assert ran.out == ""
    assert "Traceback" not in ran.err
    before = ("trimtab: warning: ", "trimtab: looking for ")
    lines = [line for line in ran.err.splitlines() if not line.startswith(before)]
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


def same_as_python(found: list[dict[str, Any]], labels: list[str], **options: Any) -> None:
    """Outputs equal those of the Python API."""
    lm = tt.load("model", device="cpu")
    expected = lm.generate([output["prompt"] for output in found], max_new_tokens=6, **options)
    for output, completion in zip(found, expected, strict=True):
        assert set(output) == {"prompt", "text", "tokens", "steering"}
        assert output["text"] == completion.text
        assert output["tokens"] == list(completion.tokens)
        assert output["steering"] == labels


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail
