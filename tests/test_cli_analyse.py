"""`trimtab analyse` on tiny models: what it prints, writes and refuses, and that options are the
arguments of the analyses."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import trimtab.papers.analyses
from commands import Command, home, listing, refused, trimtab, work, write_rows
from trimtab.cli.app import build
from trimtab.contrasts import Contrast
from trimtab.papers.analyses import ANALYSES
from trimtab.papers.result import StudyResult
from trimtab.reports.tables import Table

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

WHO, WHAT = ("king", "mother", "captain"), ("ship", "map", "fire")
PARTS = ["train"] * 5 + ["validation"] * 2 + ["test"] * 2
PLANE = "analyse plane --model model --contrast parts.jsonl"
DIAL = "analyse dial --model model --task contrast:parts.jsonl --methods sas --step 180 --no-cost"


@pytest.fixture(autouse=True)
def _texts(work: Path) -> None:
    prompts = [f"The {who} saw the {what} and said:" for who in WHO for what in WHAT]
    write_rows(
        "parts.jsonl",
        [
            {"prompt": prompt, "positive": " I love it", "negative": " it was bad", "part": part}
            for prompt, part in zip(prompts, PARTS, strict=True)
        ],
    )


@pytest.mark.usefixtures("undrawn")
def test_one_object_with_json_and_tables_without(trimtab: Command) -> None:
    found = trimtab(f"{PLANE} --json").json
    assert found["analysis"] == "plane"
    assert found["sites"][1]["site"] == "layers.0.ffn_norm"
    assert found["contrast"]["digest"] == Contrast.from_jsonl("parts.jsonl").train.digest
    said = trimtab(PLANE).text
    assert found["title"] in said
    assert "mean cosine" in said
    assert "layers.2.ffn_norm" in said
    assert f"note: {found['notes'][0]}" in said


def test_the_run_directory_says_what_was_run(trimtab: Command) -> None:
    found = trimtab(f"{DIAL} --limit 0 --seed 3 -o out --json").json
    assert {path.name for path in Path("out").iterdir()} >= {
        "config.json", "environment.json", "results.json", "report.html", "pictures", "records",
    }  # fmt: skip
    assert json.loads(Path("out/results.json").read_text()) == found
    config = json.loads(Path("out/config.json").read_text())
    assert config["analysis"] == "dial"
    assert config["options"]["step"] == 180
    assert config["options"]["seed"] == 3
    assert config["options"]["limit"] is None
    assert config["options"]["methods"] == ["sas"]
    digest = Contrast.from_jsonl("parts.jsonl").digest
    assert config["contrasts"]["contrast"]["digest"] == digest
    assert config["task"]["test"]["rows"] == 2
    assert config["task"]["validation"]["rows"] == 2
    assert len(config["model"]["digest"]) == 64
    assert config["model"]["dtype"] == "torch.float32"
    svg = Path("out/pictures/dial.svg").read_text()
    assert ">log-odds" in svg
    assert Path("out/pictures/dial.png").stat().st_size > 10_000


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_of_rankings_is_kept_and_goes_on(trimtab: Command) -> None:
    line = (
        "analyse effect --model model --task contrast:parts.jsonl --k 2 --kl 0.05 --draws 1 "
        "--alone 1 -o out --json"
    )
    found = trimtab(line).json
    records = sorted(Path("out/records").iterdir())
    assert {"effect-z-k2.jsonl", "random-0-k2.jsonl"} <= {file.name for file in records}
    assert {path.stem for path in Path("out/pictures").iterdir()} == {
        "gain-by-k", "overlap", "predicted",
    }  # fmt: skip
    assert "Chosen on validation, reported on test" in Path("out/report.html").read_text()
    for file in records[::2]:
        file.unlink()
    again = trimtab(line).json
    assert again | {"seconds": 0} == found | {"seconds": 0}
    assert trimtab(f"{line} --overwrite").json["settings"] == found["settings"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("analyse plain --model model", ("plain",)),
        ("analyse plane --model model", ("--contrast",)),
        ("analyse plane --contrast parts.jsonl", ("--model",)),
        ("analyse plane --model model --contrast none.jsonl", ("none.jsonl",)),
        (f"{PLANE} --method caa", ("--method", "'ss', 'sas', 'aas'")),
        (f"{PLANE} --candidates-from both", ("--candidates-from", "'output', 'input'")),
        ("analyse norms --model model -c parts.jsonl --kinds resid,nose", ("nose",)),
        ("analyse norms --model model -c parts.jsonl --limit -1", ("--limit", "-1")),
        (DIAL.replace("180", "7"), ("step", "7")),
        (DIAL.replace("sas", "caa"), ("caa", "ss, sas, aas")),
        (f"{DIAL} --metric speed", ("speed", "log_odds")),
        ("analyse dial --model model --task nothing", ("unknown task", "nothing")),
        ("analyse dial --model model --task refusal:none.txt", ("none.txt",)),
        ("analyse masks --model model --task contrast:parts.jsonl --seeds x", ("--seeds", "x")),
        ("analyse overlap --model model -c parts.jsonl -c parts.jsonl", ("parts", "NAME=SOURCE")),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(
    trimtab: Command, line: str, words: tuple[str, ...]
) -> None:
    before = listing(Path())
    refused(trimtab(f"{line} -o out"), *words)
    assert listing(Path()) == before


@pytest.mark.usefixtures("undrawn")
def test_prompts_of_ones_own_need_something_to_fit_on(trimtab: Command) -> None:
    write_rows("asked.jsonl", [{"prompt": "She looked at the map"}])
    line = "analyse dial --model model --task refusal:asked.jsonl"
    refused(trimtab(line), "name a contrast")
    refused(trimtab(f"{line} -c parts.jsonl"), "asked.jsonl", "validation")
    more = "--part test --methods sas --step 180 --max-new-tokens 3 --no-cost --json"
    found = trimtab(f"{line} -c parts.jsonl {more}").json
    assert found["metric"] == "refusal"
    assert found["methods"][0]["violations"]["of"] == 2
    judged = "--judge phrases --metric attack_success"
    safe, harmful = (
        trimtab(f"{line} -c parts.jsonl {more} {judged} --better {way}").json
        for way in ("less", "more")
    )
    assert safe["metric"] == harmful["metric"] == "attack_success (phrases)"
    assert (safe["maximise"], harmful["maximise"]) == (False, True)
    refused(trimtab(f"{line} -c parts.jsonl {more} --judge oracle"), "--judge oracle: known are")


# -- options from arguments -----------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ANALYSES))
def test_every_analysis_has_help_with_an_example_and_all_its_options(
    trimtab: Command, name: str
) -> None:
    said = trimtab("analyse", name, "--help").text
    assert f"trimtab analyse {name} --model" in " ".join(said.replace("│", " ").split())
    own = {
        argument.name: argument
        for argument in build(["analyse", name])["analyse"][name].assemble_argument_collection()
        if argument.name.startswith("--")
    }
    taken = inspect.signature(ANALYSES[name]).parameters  # the fields of groups among them
    groups = {each.name for each in taken.values() if is_dataclass(each.default)}
    without = {"language_model", "run", "judges", "preference", *groups}
    flags = {f"--{argument.replace('_', '-')}" for argument in taken if argument not in without}
    assert flags - {"--contrasts"} <= own.keys()
    assert ("--contrast" in own) == bool({"contrast", "contrasts"} & taken.keys())
    assert all(argument.parameter.help for argument in own.values())
    assert ("--judge" in own) == ("judges" in taken)


def test_the_group_lists_them(trimtab: Command) -> None:
    said = trimtab("analyse --help").text
    assert all(f" {name} " in said for name in ANALYSES)


@pytest.fixture
def analysis(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], dict[str, Any]]:
    """Puts a function among the analyses; what it was given is in the dictionary that returns."""

    def put(function: Callable[..., Any]) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def called(language_model: Any, **given: Any) -> StudyResult:
            seen.update(given)
            return StudyResult(
                {"ok": True}, tables=[Table("T", ["n"], [[1]] * 40)], name="mine", title="Mine"
            )

        called.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        called.__annotations__ = inspect.get_annotations(function)
        called.__doc__ = "Says nothing."
        monkeypatch.setitem(trimtab.papers.analyses.ANALYSES, "mine", called)
        return seen

    import trimtab.papers.analyses

    return put


def test_the_same_again_is_made_again_and_another_configuration_is_refused(
    trimtab: Command, analysis: Callable[[Callable[..., Any]], dict[str, Any]]
) -> None:
    def mine(language_model: Any, contrast: Contrast | str, *, k: int = 1) -> StudyResult: ...

    seen = analysis(mine)
    line = "analyse mine --model model -c parts.jsonl -o out"
    trimtab(line).text  # noqa: B018
    trimtab(line).text  # noqa: B018
    before = listing(Path())
    refused(trimtab(f"{line} --k 2"), "another configuration", "options")
    refused(trimtab(f"{PLANE} -o out"), "another configuration", "analysis")
    refused(trimtab("analyse mine --model other -c parts.jsonl -o out"), "differs in model")
    refused(trimtab(f"{line} --dtype bfloat16"), "differs in model")
    write_rows("new.jsonl", [{"prompt": "I", "positive": " a", "negative": f" {i}"} for i in "bc"])
    changed = Path("parts.jsonl").read_text()
    Path("parts.jsonl").write_text(Path("new.jsonl").read_text())
    refused(trimtab(line), "another configuration", "contrasts")
    Path("new.jsonl").unlink()
    Path("parts.jsonl").write_text(changed)
    assert listing(Path()) == before
    trimtab(f"{line} --k 2 --overwrite").text  # noqa: B018
    assert seen["k"] == 2
    assert json.loads(Path("out/config.json").read_text())["options"]["k"] == 2


def test_a_new_analysis_gets_its_command(
    trimtab: Command, analysis: Callable[[Callable[..., Any]], dict[str, Any]]
) -> None:
    def mine(
        language_model: Any,
        contrasts: dict[str, Contrast | str],
        *,
        ks: Sequence[int] = (1, 2),
        some: Sequence[int | Literal["all"]] = (1, "all"),
        alpha: float | Sequence[float] = 8.0,
        names: Sequence[str] = ("a", "b"),
        kind: Literal["x", "y"] | None = None,
        layer: int | None = None,
        prompts: Sequence[Any] | None = None,
        chat: bool | None = False,
        deep: bool = True,
        limit: int | None = 100,
        test_limit: int | None = None,
        run: Any = None,
    ) -> StudyResult: ...

    seen = analysis(mine)
    line = "analyse mine --model model -c parts.jsonl -c other=parts.jsonl"
    assert trimtab(f"{line} --json").json["ok"] is True
    assert seen.pop("run").path is None
    assert seen == {
        "contrasts": {"parts": "parts.jsonl", "other": "parts.jsonl"},
        "ks": (1, 2),
        "some": (1, "all"),
        "alpha": (8.0,),
        "names": ("a", "b"),
        "kind": None,
        "layer": None,
        "prompts": None,
        "chat": False,
        "deep": True,
        "limit": 100,
        "test_limit": None,
    }
    write_rows("asked.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    more = (
        "--ks 3,5-7 --some 2,all --alpha 0.5,-1e3 --names resid --kind y --layer 2 "
        "--prompts asked.jsonl --chat --no-deep --limit 0 --test-limit 9 -o out"
    )
    said = trimtab(f"{line} {more}").text
    assert "30 of 40 rows; the report has all" in said
    assert "out: report.html, results.json" in said
    assert seen.pop("run").path == Path("out")
    assert seen == {
        "contrasts": {"parts": "parts.jsonl", "other": "parts.jsonl"},
        "ks": (3, 5, 6, 7),
        "some": (2, "all"),
        "alpha": (0.5, -1000.0),
        "names": ("resid",),
        "kind": "y",
        "layer": 2,
        "prompts": ["one", "two"],
        "chat": True,
        "deep": False,
        "limit": None,
        "test_limit": 9,
    }
    digests = json.loads(Path("out/config.json").read_text())["contrasts"]
    assert set(digests) == {"parts", "other"}
    refused(trimtab(f"{line} --alpha 1,x"), "--alpha", "x")
    refused(trimtab(f"{line} --some 1,every"), "--some", "all")


@pytest.mark.usefixtures("undrawn")
def test_an_analysis_that_fails_later_leaves_its_records(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.errors import TrimtabError
    from trimtab.sweeps.rows import TaskRows

    plain, calls = TaskRows.records, []

    def fails(self: Any, *given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise TrimtabError("the lights went out")
        return plain(self, *given, **named)

    monkeypatch.setattr(TaskRows, "records", fails)
    refused(trimtab(f"{DIAL} -o out"), "the lights went out")
    assert Path("out/config.json").exists()
    assert list(Path("out/records").iterdir())
    assert trimtab(f"{DIAL} -o out --json").json["analysis"] == "dial"
