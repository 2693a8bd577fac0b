"""`trimtab reproduce`: what it prints, leaves and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commands import Command, home, refused, trimtab, work
from services import Reply, serving
from test_steering_table import write_set
from trimtab.papers.recipe import recipes

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here


def test_help_has_an_example(trimtab: Command) -> None:
    said = trimtab("reproduce --help").text
    assert "Example:" in said
    assert "trimtab reproduce austeer-table12" in " ".join(said.split())


def test_list_as_json(trimtab: Command) -> None:
    found = trimtab("reproduce --list --json").json
    assert set(found) == {"recipes"}
    assert [set(row) for row in found["recipes"]] == [{"name", "paper", "item"}] * len(recipes())
    rows = {row["name"]: row for row in found["recipes"]}
    assert rows["austeer-table12"]["item"] == "Table 12"
    assert "2602.02712" in rows["strength-fig6"]["paper"]


def test_list_for_people(trimtab: Command) -> None:
    said = trimtab("reproduce --list").text
    for name in ("austeer-table1", "ss-controllability", "strength-fig6"):
        assert name in said


def test_a_theory_figure(trimtab: Command, work: Path) -> None:
    found = trimtab("reproduce strength-fig5 -o runs/five --json").json
    assert found["recipe"] == "strength-fig5"
    assert found["model"] is None
    assert found["scale"] == "smoke"
    theorem, fitted = (
        found["values"][f"quadratic coefficient, {one}"]["value"]["value"]
        for one in ("theorem", "fitted")
    )
    assert theorem == pytest.approx(fitted, rel=1e-3)
    left = {str(file.relative_to(work / "runs/five")) for file in (work / "runs/five").rglob("*.*")}
    assert left >= {
        "config.json", "environment.json", "results.json", "report.html",
        "pictures/figure-5.png", "pictures/figure-5.svg",
    }  # fmt: skip
    saved = json.loads((work / "runs/five/results.json").read_text(encoding="utf-8"))
    assert saved["values"] == found["values"]


def test_for_people(trimtab: Command) -> None:
    said = " ".join(trimtab("reproduce strength-training").text.split())
    assert "1.3317" in said
    assert "1.33178" in said
    assert "note:" in said
    assert "fewer rows" not in said  # theory is the same at every scale


def test_on_a_tiny_model(trimtab: Command, work: Path) -> None:
    line = "reproduce ss-plane --model model -o runs/plane --json"
    found = trimtab(line).json
    assert found["model"]["name"] == "model"
    assert "taken from" in found["values"]
    assert any("nothing is red-teamed" in note for note in found["notes"])
    assert (work / "runs/plane/report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("reproduce", ["name a recipe", "--list"]),
        ("reproduce austeer-tabel1 --model model", ["unknown recipe", "austeer-table1"]),
        ("reproduce austeer-fig1 --model model --scale huge", ["unknown scale", "smoke"]),
        ("reproduce austeer-fig1", ["runs on a model", "--model"]),
        ("reproduce austeer-fig1 --model nowhere.gguf", ["nowhere.gguf"]),
        ("reproduce austeer-table12 --model model --data .", ["needs copa/test.jsonl"]),
        ("reproduce ss-dial --model model --scale full", ["what you bring", "--prompts"]),
        (
            "reproduce ss-dial --model model --scale full --prompts none.jsonl --contrast a.jsonl",
            ["none.jsonl", "no such file"],
        ),
        (
            "reproduce austeer-fig1 --model model --judge local:model",
            ["austeer-fig1 at scale smoke has no use for --judge"],
        ),
        ("reproduce persona-curves --model model --judge magic", ["local:MODEL, chat:NAME"]),
        ("reproduce persona-curves --model model --judge chat:", ["local:MODEL, chat:NAME"]),
        ("reproduce persona-curves --model model --judge chat:j", ["needs --judge-url"]),
        (
            "reproduce persona-curves --model model --judge-url http://localhost:1",
            ["--judge-url is for a judge at an address"],
        ),
        (
            "reproduce persona-curves --model model --judge local:model --judge-timeout 3",
            ["--judge-timeout is for a judge at an address"],
        ),
    ],
)
def test_refused(trimtab: Command, line: str, words: list[str]) -> None:
    refused(trimtab(line), *words)


def test_hardware_is_checked_before_the_model_is_loaded(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = "reproduce austeer-fig1 --model meta-llama/Llama-2-7b-chat-hf"
    said = refused(trimtab(line), "16 GB of GPU memory", "LLaMA2-7B-Chat", "--force")
    assert "0 GB" in said


@pytest.mark.slow
def test_a_judge_at_an_address_rates_answers(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole recipe, with a judge who says 1 to everything; and with none."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = Path(write_set(work))
    for end in ("train", "eval"):
        file = data / "axbench" / f"tiny_{end}.jsonl"
        file.rename(file.with_name(f"concept10_prod_2b_l20_v1_{end}.jsonl"))
    line = f"reproduce axbench-steering --model model --data {data} -o runs/judged"
    names = ["unsteered", "Prompt", "DiffMean", "Probe", "Linear-AcT", "ReFT-r1", "RePS"]
    with serving(lambda _: Reply({"choices": [{"message": {"content": "1"}}]})) as service:
        found = trimtab(f"{line} --judge chat:j --judge-url {service.url} --json").json
        asked = len(service.requests)
    assert {name: found["values"][name]["value"]["value"] for name in names} == dict.fromkeys(
        names, pytest.approx(1.0)
    )
    assert asked > 30
    assert any(f"j at {service.url}" in note for note in found["notes"])
    refused(trimtab(line), "judge")  # another judge is another run
    offline = trimtab(f"{line.replace('judged', 'offline')} --json").json
    assert list(offline["values"]) == [f"{name} (offline judge)" for name in names]
    assert any("its figures are not the paper's" in note for note in offline["notes"])
