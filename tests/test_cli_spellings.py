"""`--layer` and `--layers` are one option, wherever there is either of them; and a command names
only files that are there."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from commands import Command, home, refused, trimtab, work
from helpers import few_quick
from trimtab.cli.compare import read_candidate
from trimtab.cli.fit import read_method
from trimtab.cli.tables import show
from trimtab.methods import METHODS
from trimtab.reports import Table

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

#: The word of each method that has one of the two.
WORDS = {
    name: item.name
    for name, method in METHODS.items()
    for item in fields(method)  # type: ignore[arg-type]
    if item.name in ("layer", "layers")
}
OTHER = {"layer": "layers", "layers": "layer"}


def test_both_words_are_among_the_methods() -> None:
    assert set(WORDS.values()) == {"layer", "layers"}


@pytest.mark.parametrize("name", few_quick(WORDS, "caa", "act", "ssv"))
def test_either_word_in_each_command(trimtab: Command, work: Path, name: str) -> None:
    field = WORDS[name]
    found: dict[str, Any] = {}
    for word in ("layer", "layers"):
        helped = trimtab(f"fit {name} --help").text + trimtab(f"sweep {name} --help").text
        assert helped.count(f"--{word} ") >= 2
        needed = {"alphasteer": " protect=builtin:facts"}.get(name, "")
        found[word] = read_method(f"{name} {word}=1{needed}")
        candidate = read_candidate(f"{name} {word}=1,2{needed}")
        assert field in {**candidate.space, **candidate.fixed}
        assert OTHER[field] not in {**candidate.space, **candidate.fixed}
    assert found["layer"] == found["layers"]


def test_either_word_fits_the_same(trimtab: Command, work: Path) -> None:
    line = "--model model --contrast pairs.jsonl"
    for method in ("caa", "austeer --k 3"):
        files = [f"{method[:3]}-{word}.safetensors" for word in ("layer", "layers")]
        for word, file in zip(("layer", "layers"), files, strict=True):
            trimtab(f"fit {method} {line} --{word} 1 -o {file}").text  # noqa: B018
        one, other = (tt.Steering.load(file) for file in files)
        assert one.digest == other.digest
        assert one.hyperparameters == other.hyperparameters
    trimtab(f'fit many "caa layers=1" "austeer k=3 layer=1" {line} -o many').text  # noqa: B018
    refused(trimtab(f"fit caa {line} --layerz 1 -o x.safetensors"), "--layerz")


def test_either_word_in_an_analysis(trimtab: Command, work: Path) -> None:
    line = "analyse tokens --model model --raw --site ffn_in --units 3 --strengths 1 --json"
    one, other = (trimtab(f"{line} --{word} 1").json for word in ("layer", "layers"))
    assert one["site"] == other["site"] == "layers.1.ffn_in"


def test_curve_has_a_number_of_layers_and_no_layer(trimtab: Command, work: Path) -> None:
    line = "strength curve --model model --steer caa.safetensors --raw Hi --contrast pairs.jsonl"
    refused(trimtab(f"{line} --layer 1"), "--layer")


def test_only_files_that_are_there_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").touch()
    show([Table("T", ["a"], [[1]])], [], tmp_path)
    assert capsys.readouterr().out.rstrip().endswith(f"{tmp_path}: report.html")
    (tmp_path / "best.safetensors").touch()
    show([Table("T", ["a"], [[1]])], [], tmp_path)
    assert "report.html, best.safetensors" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("fit caa --layer 3 --layer 5 --contrast pairs.jsonl -o x.safetensors", "--layer"),
        ("fit ablation --layers 0 --layer 1 --contrast pairs.jsonl -o x.safetensors", "--layer"),
        ("sweep caa --alpha 1 --alpha 2 --task copa", "--alpha"),
        ("evaluate --task copa --limit 3 --limit 4", "--limit"),
        ("generate -m model Hello", "--model"),
        ("compare 'caa layer=0 layer=1' --task copa", "layer"),
        ("fit many 'caa layer=0 layers=1' --contrast pairs.jsonl -o x", "layer"),
    ],
)
def test_an_option_that_says_two_things_is_refused(
    trimtab: Command, work: Path, line: str, option: str
) -> None:
    """None of the two is taken silently."""
    assert f"{option} is given twice" in refused(trimtab(f"{line} --model model"))
    assert not list(work.glob("x*"))


def test_what_may_be_there_twice(trimtab: Command, work: Path) -> None:
    """Switches say the same twice; lists gather what is given one at a time."""
    listed = trimtab("evaluate --list --json --json --debug --debug").json
    assert listed["tasks"]
    found = trimtab(
        "evaluate --model model --task perplexity:first.txt --task perplexity:second.txt --json"
    )
    assert "first" in refused(found)
    several = trimtab(
        "fit sae --sae first --sae second --model model --contrast pairs.jsonl -o x.safetensors"
    )
    assert "first" in refused(several)
