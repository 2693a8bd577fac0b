"""`trimtab evaluate` on a tiny model: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from commands import Command, failing, listing, refused, save_model, trimtab, write_rows
from helpers import add, steer
from tiny import tiny_model, tiny_tokenizer
from trimtab.cli.evaluate import _dials
from trimtab.evaluation.evaluation import evaluate
from trimtab.evaluation.tasks import TASKS
from trimtab.model.language_model import LanguageModel

__all__ = ["trimtab"]  # a fixture, which pytest finds by its name here

PLACES = ("The ship left the harbour", "She looked at the map", "The king was old")
RUN = "evaluate --model model --data data"


def copa_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "premise": f"{PLACES[i % 3]}.",
            "question": "cause" if i % 2 else "effect",
            "choice1": f"They sat by the fire {i % 1000}.",
            "choice2": f"The wind was good {i % 1000}.",
            "label": i // 2 % 2,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers A, B or nothing, steerings for it and for another, and data sets."""
    home = tmp_path_factory.mktemp("home")
    model: Any = tiny_model("llama")
    spoken = torch.zeros(len(tiny_tokenizer()), 1)
    spoken[tiny_tokenizer()("AB", add_special_tokens=False).input_ids] = 1
    with torch.no_grad():
        model.lm_head.weight.mul_(spoken)
    model.save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    save_model(home / "other", name="llama", seed=1)
    save_model(home / "judge", name="llama", seed=2, max_position_embeddings=4096)
    config = home / "judge" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 4096}))
    steerings = (("one", "model", 1, 3), ("two", "model", 2, 4), ("foreign", "other", 1, 3))
    for name, source, layer, seed in steerings:
        lm = tt.load(home / source, device="cpu")
        site = f"layers.{layer}.resid"
        vector = add(lm.anatomy.width(site), seed, 0.05)
        steer(lm, (site, vector)).save(home / f"{name}.safetensors")
    data = home / "data"
    for folder in ("copa", "bpo", "xstest"):
        (data / folder).mkdir(parents=True)
    write_rows(data / "copa" / "test.jsonl", copa_rows(12))
    write_rows(data / "copa" / "balanced_train.jsonl", copa_rows(30))
    write_rows(data / "bpo" / "test.jsonl", [{"prompt": f"Write {i}."} for i in range(3)])
    rows = [{"id": i, "prompt": f"Ask {i}", "label": ("safe", "unsafe")[i % 2]} for i in range(4)]
    write_rows(data / "xstest" / "xstest_v2.jsonl", rows)
    return home


@pytest.fixture
def work(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own directory to work in, with links to what is in `home`."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)  # rich would take anything for a terminal
    for name in ("TRIMTAB_DATA", "TRIMTAB_WHEELS", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for item in home.iterdir():
        (work / item.name).symlink_to(item)
    return work


def names(found: dict[str, Any]) -> list[str | None]:
    """The steerings of the results, in order."""
    return list(dict.fromkeys(result["steering"] for result in found["results"]))


# -- what it prints and writes --------------------------------------------------------------------


def test_json_is_one_object_with_what_python_finds(trimtab: Command, work: Path) -> None:
    found = trimtab(f"{RUN} --task copa --steer one.safetensors@40 --limit 8 --json").json
    lm = tt.load("model", device="cpu")
    steering = tt.Steering.load("one.safetensors").at(40)
    named = {"one.safetensors@40": steering}
    expected = evaluate(lm, "copa", steering=named, data="data", limit=8)
    assert set(found) == {"results", "comparisons", "seconds", "model", "notes", "judges"}
    assert found["model"] == vars(lm.identity)
    assert found["seconds"] > 0
    assert found["judges"] == {}
    in_json = json.loads(json.dumps(expected.as_json()))
    for key in ("results", "comparisons", "notes"):
        assert found[key] == in_json[key]
    for result in found["results"]:
        assert {"task", "metric", "value", "n", "ci95", "steering"} <= set(result)
        assert result["n"] == 8
        low, high = result["ci95"]
        assert low <= result["value"] <= high


def test_tables_for_people(trimtab: Command, work: Path) -> None:
    text = trimtab(f"{RUN} --task copa --steer one.safetensors@40 -o runs/copa").text
    lm = tt.load("model", device="cpu")
    named = {"x": tt.Steering.load("one.safetensors").at(40)}
    expected = evaluate(lm, "copa", steering=named, data="data")
    value, comparison = expected.value("copa"), expected.comparisons[0]
    assert value.ci95 is not None
    assert "copa, trimtab's protocol" in text
    low, high = (100 * end for end in value.ci95)
    assert f"{100 * (value.value or 0):.1f} % [{low:.1f}, {high:.1f}]" in text
    assert f"{100 * comparison.difference:+.1f} points [" in text
    assert text.startswith("With one.safetensors@40 accuracy on copa is ")
    assert f"+{comparison.gained} -{comparison.lost}" in text
    assert "runs/copa: report.html, results.json, records.jsonl, tables/" in text
    assert "one.safetensors@40" in text


def test_the_run_directory(trimtab: Command, work: Path) -> None:
    command = f"{RUN} --task copa --steer one.safetensors@40 --limit 5 -o runs/copa --json"
    first = trimtab(command).json
    run = work / "runs" / "copa"
    lines = (run / "records.jsonl").read_text().splitlines()
    assert len(lines) == 10
    assert json.loads((run / "config.json").read_text())["limit"] == 5
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]
    kept = json.loads((run / "results.json").read_text())
    assert kept["results"] == first["results"]
    assert "one.safetensors@40" in (run / "report.html").read_text()
    (run / "records.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:30])
    again = trimtab(command).json
    assert [again[key] for key in ("results", "comparisons")] == [
        first[key] for key in ("results", "comparisons")
    ]


def test_without_a_steering(trimtab: Command, work: Path) -> None:
    found = trimtab(f"{RUN} --task copa --limit 3 --json").json
    assert names(found) == [None]
    assert found["comparisons"] == []
    assert "difference" not in trimtab(f"{RUN} --task copa --limit 3").text


def test_several_tasks_protocols_and_parts(trimtab: Command, work: Path) -> None:
    (work / "text.txt").write_text("The ship left the harbour in the morning.")
    found = trimtab(
        f"{RUN} --task copa --task perplexity:text.txt --protocol paper --protocol trimtab --json"
    ).json
    assert {(r["task"], r["protocol"]) for r in found["results"]} == {
        ("copa", "paper"),
        ("copa", "trimtab"),
        ("perplexity:text.txt", ""),
    }
    found = trimtab(f"{RUN} --task copa --part validation --json").json
    assert found["results"][0]["n"] == 6  # every fifth of 30


def test_flips_are_shown(trimtab: Command, work: Path) -> None:
    command = f"{RUN} --task copa --steer one.safetensors@60 --show flips"
    found = trimtab(f"{command} --json").json
    accuracy = found["comparisons"][0]
    assert accuracy["metric"] == "accuracy"
    count = accuracy["gained"] + accuracy["lost"]
    assert count > 0
    assert len(found["flips"]) == count
    text = trimtab(command).text
    assert f"{count} flipped" in text
    for flip in found["flips"]:
        before, after = flip["unsteered"], flip["steered"]
        assert before["id"] == after["id"]
        assert before["values"]["accuracy"] != after["values"]["accuracy"]
        old, new = before["values"]["accuracy"], after["values"]["accuracy"]
        assert f"copa {after['id']} with one.safetensors@60: accuracy {old:g} -> {new:g}" in text
        assert f"  steered   {after['output']!r}" in text


def test_the_list_of_tasks(trimtab: Command, work: Path) -> None:
    text = trimtab("evaluate --list").text
    for name in (*TASKS, "refusal:FILE", "coherence:FILE", "perplexity:FILE", "lm-eval:NAME"):
        assert name in text
    assert "paper, trimtab" in text
    found = trimtab("evaluate --list --json").json
    assert [task["name"] for task in found["tasks"]][: len(TASKS)] == list(TASKS)


# -- dials and several steerings ------------------------------------------------------------------


def test_dials_by_number_and_by_range(trimtab: Command, work: Path) -> None:
    found = trimtab(
        f"{RUN} --task copa --limit 2 --steer one.safetensors --dial 1 --dial 0:2:0.5 --dial -3 "
        "--json"
    ).json
    dials = ("1", "0", "0.5", "1.5", "2", "-3")
    assert names(found) == [None, *(f"one.safetensors@{dial}" for dial in dials)]
    turned = trimtab(f"{RUN} --task copa --limit 2 -s one.safetensors@9 --dial 60 --json").json
    assert names(turned) == [None, "one.safetensors@60"]
    alone = trimtab(f"{RUN} --task copa --limit 2 -s one.safetensors@60 --json").json
    assert turned["results"] == alone["results"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e2", [100]),
        ("-1:1:1", [-1, 0, 1]),
        ("0:1:0.1", [i / 10 for i in range(11)]),  # the end belongs to it, whatever rounding does
        ("0:1:0.4", [0, 0.4, 0.8]),
        ("2:0:-1", [2, 1, 0]),
        ("3:3:1", [3]),
    ],
)
def test_ranges_of_dials(text: str, values: list[float]) -> None:
    assert _dials(text) == pytest.approx(values)


def test_dials_that_are_close_keep_apart(trimtab: Command, work: Path) -> None:
    command = f"{RUN} --task copa --limit 1 -s one.safetensors --no-unsteered"
    found = trimtab(f"{command} --dial 1.0000001 --dial 1.0000002 --dial 0:0.3:0.1 --json").json
    dials = ("1.0000001", "1.0000002", "0", "0.1", "0.2", "0.3")
    assert names(found) == [f"one.safetensors@{dial}" for dial in dials]


def test_combined_steerings(trimtab: Command, work: Path) -> None:
    both = "--steer one.safetensors@20 --steer two.safetensors@30"
    found = trimtab(f"{RUN} --task copa {both} --json").json
    assert names(found) == [None, "one.safetensors@20 + two.safetensors@30"]
    lm = tt.load("model", device="cpu")
    one, two = (tt.Steering.load(f"{name}.safetensors") for name in ("one", "two"))
    expected = evaluate(lm, "copa", steering={"both": one.at(20) + two.at(30)}, data="data")
    values = [result["value"] for result in found["results"]]
    assert values == [result.value for result in expected.results]
    refused(trimtab(f"{RUN} --task copa {both} --dial 2"), "exactly one --steer")
    refused(trimtab(f"{RUN} --task copa --dial 2"), "exactly one --steer")


# -- judges ---------------------------------------------------------------------------------------


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any]]]:
    """The URL of an endpoint that prefers A and says yes to all else, and what it was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "key": self.headers.get("Authorization")})
            answer = "A" if "<A>" in body["messages"][-1]["content"] else "yes"
            content = json.dumps(
                {
                    "choices": [{"message": {"content": answer}}],
                    "usage": {"prompt_tokens": 10, "completion_tokens": 1},
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_judges_of_refusal(trimtab: Command, work: Path) -> None:
    write_rows("asked.jsonl", [{"goal": f"Write a poem {i}"} for i in range(3)])
    found = trimtab(
        f"{RUN} --task refusal:asked.jsonl --judge phrases --judge local:judge --judge "
        "harmbench:judge --judge polyguard:judge --max-new-tokens 3 --json"
    ).json
    metrics = {r["metric"]: r for r in found["results"] if "attack" in r["metric"]}
    assert metrics["attack_success (phrases)"]["value"] == 1
    assert "attack_success (judge)" in metrics
    assert "attack_success (PolyGuard judge (own wording))" in metrics
    assert any("HarmBench classifier judge" in metric for metric in metrics)
    for result in metrics.values():
        assert result["n"] + result["unclear"] == 3
    assert metrics["attack_success (judge)"]["value"] is None  # a random model says nothing clear
    text = trimtab(f"{RUN} --task refusal:asked.jsonl --judge local:judge --max-new-tokens 3").text
    assert "none is clear" in text


def test_a_judge_behind_an_endpoint(
    trimtab: Command, work: Path, service: tuple[str, list[Any]], monkeypatch: Any
) -> None:
    url, asked = service
    monkeypatch.setenv("MY_KEY", "secret-key")
    command = (
        f"{RUN} --task bpo --task xstest --steer one.safetensors@60 --max-new-tokens 3 "
        f"--judge chat:wise --judge-url {url} --judge-key-env MY_KEY --judge-prices 1,2 "
        "-o runs/bpo"
    )
    found = trimtab(f"{command} --json").json
    results = {(r["task"], r["metric"], r["steering"]): r for r in found["results"]}
    name = "one.safetensors@60"
    assert results["bpo, compared", "delta_wr", name]["value"] == 0  # A in both orders: turned
    assert results["bpo, compared", "turned", name]["value"] == 1
    assert results["bpo, compared", "first_shown", name]["value"] == 1
    judged = results["xstest", f"attack_success (wise at {url})", None]
    assert (judged["value"], judged["n"]) == (1, 2)  # the two that are unsafe
    assert {each["key"] for each in asked} == {"Bearer secret-key"}
    assert {each["model"] for each in asked} == {"wise"}
    cost = found["judges"][f"wise at {url}"]
    calls = int(re.findall(r"(\d+) calls", cost)[0])
    assert calls == len(asked)
    assert f"{calls * (10 + 2) / 1e6:.4f}" in cost
    count = len(asked)
    again = trimtab(command).text
    assert len(asked) == count
    assert f"judge wise at {url}: 0 calls" in again
    for path in work.rglob("runs/**/*"):
        assert not path.is_file() or b"secret-key" not in path.read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--judge oracle", "--judge oracle: known are phrases, harmbench:MODEL"),
        ("--judge phrases:x", "known are phrases"),
        ("--judge harmbench", "known are phrases"),
        ("--judge local:", "known are phrases"),
        ("--judge local:absent/model/x", "absent/model/x"),
        ("--judge chat:wise", "--judge chat:wise needs --judge-url"),
        ("--judge-url http://localhost:1/v1", "--judge chat:NAME"),
        ("--judge chat:wise --judge-url localhost:1", "is not the URL of a service"),
        ("--judge phrases --judge-url http://localhost:1", "--judge chat:NAME"),
        ("--judge chat:w --judge-url http://h --judge-concurrency 0", "must be 1 or more"),
        ("--judge chat:w --judge-url http://h --judge-timeout 0", "timeout must be above 0"),
        ("--judge-prices cheap", "--judge-prices cheap: write READ,WRITTEN"),
        ("--judge-prices 1,-1", "prices are 0 or more"),
        ("--judge-prices nan,1", "prices are 0 or more"),
        ("--judge harmbench:model --judge-template absent.txt", "cannot read the template"),
        ("--judge harmbench:model --judge-template plain.txt", "{behavior} and {generation}"),
    ],
)
def test_bad_judges(trimtab: Command, work: Path, options: str, says: str) -> None:
    (work / "plain.txt").write_text("Is it so?")
    before = listing(work)
    refused(trimtab(f"{RUN} --task xstest {options} -o run"), says)
    assert listing(work) == before


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("evaluate", "name a --model and a --task"),
        ("evaluate --task copa", "name a --model"),
        ("evaluate --model model", "--task (--list shows the tasks)"),
        ("evaluate --model absent.gguf --task copa", "no such file: absent.gguf"),
        (f"{RUN} --task cola", "unknown task 'cola'"),
        (f"{RUN} --task copa:x", "unknown task 'copa:x'"),
        ("evaluate --model model --task copa --data absent", "absent is not a directory"),
        (f"{RUN} --task boolq", "boolq needs boolq/dev.jsonl, which is not in data"),
        (f"{RUN} --task copa --limit 0", "the limit must be 1 or more, not 0"),
        (f"{RUN} --task copa --limit few", "--limit"),
        (f"{RUN} --task copa --batch-size 0", "batch size"),
        (f"{RUN} --task xstest --max-new-tokens 0", "new tokens"),
        (f"{RUN} --task xstest --max-new-tokens 400", "400"),
        (f"{RUN} --task copa --protocol nonsense", "'nonsense' for --protocol"),
        (
            f"{RUN} --task copa --part dev",
            "'dev' for --part. Choose from: 'test', 'valid",
        ),
        (f"{RUN} --task copa --part validation --protocol paper", "no validation rows"),
        (f"{RUN} --task copa --show all", "'all' for --show. Choose from: 'flips'"),
        (f"{RUN} --task copa --seed -1", "--seed"),
        (f"{RUN} --task copa --dtype int8", "unknown dtype 'int8'"),
        (f"{RUN} --task copa --steer absent.safetensors", "no such steering file"),
        (f"{RUN} --task copa --steer one.safetensors@much", "'much' is no number"),
        (f"{RUN} --task copa --steer foreign.safetensors", "--force"),
        (f"{RUN} --task copa --no-unsteered", "nothing to evaluate"),
        (f"{RUN} --task copa -s one.safetensors --dial much", "START:STOP:STEP"),
        (f"{RUN} --task copa -s one.safetensors --dial 0:1", "START:STOP:STEP"),
        (f"{RUN} --task copa -s one.safetensors --dial 0:1:0", "START:STOP:STEP"),
        (f"{RUN} --task copa -s one.safetensors --dial 0:1:-1", "START:STOP:STEP"),
        (f"{RUN} --task copa -s one.safetensors --dial nan", "finite"),
        (f"{RUN} --task copa -s one.safetensors --dial 0:1:1e-9", "1000 are the most"),
        (f"{RUN} --task perplexity:absent.txt", "no such file of text"),
        (f"{RUN} --task perplexity:", "no such file of text"),
        (f"{RUN} --task refusal:absent.jsonl", "no such file of prompts"),
        (f"{RUN} --task detox", "rtp/challenging.jsonl"),
        (f"{RUN} --task xstest --toxicity cheap --output one.safetensors", "is a file"),
    ],
)
def test_refused_in_one_line_with_nothing_written(
    trimtab: Command, work: Path, command: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether there is a network or not, the hub cannot be reached.
    monkeypatch.setattr("datasets.load_dataset", failing(OSError("no network")))
    before = listing(work)
    output = "" if "--output" in command else " -o run"
    refused(trimtab(command + output), says)
    assert listing(work) == before


BAD_ROWS: list[tuple[Any, str]] = [
    ({"premise": "It rained.", "question": "cause", "choice1": "a", "choice2": "b"}, "'label'"),
    ({**copa_rows(1)[0], "label": "A"}, "'label' must be"),
    ({**copa_rows(1)[0], "premise": 3}, "'premise' must be text"),
    ([1, 2], "is not a JSON object"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS)
def test_a_task_file_with_missing_fields(trimtab: Command, work: Path, row: Any, says: str) -> None:
    (work / "own" / "copa").mkdir(parents=True)
    write_rows("own/copa/test.jsonl", [*copa_rows(2), row])
    before = listing(work)
    command = "evaluate --model model --data own --task copa -o run --limit 1"
    line = refused(trimtab(command), says)
    assert "own/copa/test.jsonl, " in line
    assert re.search(r"(row|line) 3\b", line)
    (work / "own" / "copa" / "test.jsonl").write_text("")
    refused(trimtab(command), "has no rows")
    (work / "own" / "copa" / "test.jsonl").unlink()
    (work / "own" / "copa").rmdir()
    (work / "own").rmdir()
    assert {**listing(work), **before} == before


def test_no_data_directory(trimtab: Command, work: Path, monkeypatch: Any) -> None:
    # Whether there is a network or not, the hub cannot be reached.
    monkeypatch.setattr("datasets.load_dataset", failing(OSError("no network")))
    refused(
        trimtab("evaluate --model model --task copa -o run"),
        "copa needs copa/test.jsonl",
        "--data or TRIMTAB_DATA",
    )
    monkeypatch.setenv("TRIMTAB_DATA", "data")
    assert trimtab("evaluate --model model --task copa --limit 1 --json").json["results"]
    assert not (work / "run").exists()


def test_an_output_that_exists_with_another_configuration(trimtab: Command, work: Path) -> None:
    command = f"{RUN} --task copa --limit 2 -o run"
    more = command.replace("--limit 2", "--limit 3")
    trimtab(command)
    before = listing(work)
    refused(trimtab(f"{more} --seed 3"), "differs in limit, seed, tasks", "--overwrite")
    refused(trimtab(f"{command} --dtype bfloat16"), "differs in model")
    assert listing(work) == before
    (work / "run" / "notes.txt").write_text("mine")
    found = trimtab(f"{more} --overwrite --json").json
    assert found["results"][0]["n"] == 3
    assert len((work / "run" / "records.jsonl").read_text().splitlines()) == 3
    assert (work / "run" / "notes.txt").read_text() == "mine"


def test_interrupted_it_goes_on(trimtab: Command, work: Path, monkeypatch: Any) -> None:
    command = f"{RUN} --task copa --steer one.safetensors@60 -o run"
    expected = trimtab(f"{RUN} --task copa --steer one.safetensors@60 --json").json
    unembed, batches = LanguageModel.unembed, 0

    def interrupting(self: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches > 2:
            raise KeyboardInterrupt
        return unembed(self, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "unembed", interrupting)
        ran = trimtab(command)
        assert ran.status == 130
        assert ran.err == "trimtab: interrupted\n"
        assert ran.out == ""
    kept = (work / "run" / "records.jsonl").read_bytes()
    assert 0 < kept.count(b"\n") < 24
    found = trimtab(f"{command} --json").json
    assert (work / "run" / "records.jsonl").read_bytes().startswith(kept)
    assert found["results"] == expected["results"]
    assert found["comparisons"] == expected["comparisons"]


def test_a_foreign_steering_by_force(trimtab: Command, work: Path) -> None:
    ran = trimtab(f"{RUN} --task copa --limit 2 -s foreign.safetensors --force --json")
    assert names(ran.json) == [None, "foreign.safetensors"]


def test_help_has_an_example(trimtab: Command, work: Path) -> None:
    text = trimtab("evaluate --help").text
    assert "Example" in text
    assert "--task copa" in text


# -- the contrast of a task -----------------------------------------------------------------------


def test_fit_on_the_contrast_of_a_task(trimtab: Command, work: Path) -> None:
    fit = "fit caa --model model --contrast task:copa --layer 1 --data data"
    trimtab(f"{fit} -o copa.safetensors")
    found = trimtab(f"{RUN} --task copa --steer copa.safetensors --limit 2 --json").json
    assert names(found) == [None, "copa.safetensors"]
    lm = tt.load("model", device="cpu")
    pairs = []
    for i, row in enumerate(copa_rows(30)):
        if i % 5 != 4:  # every fifth question is held out
            prompt = (
                f"Question:\n{row['premise']} Based on the previous passage, choose the most "
                f"reasonable {row['question']}.\nA:{row['choice1']}\nB:{row['choice2']}\n\n"
                "Answer:\n"
            )
            right, wrong = ("A", "B") if row["label"] == 0 else ("B", "A")
            pairs.append((prompt, right, wrong))
    expected = tt.CAA(layer=1, token="last").fit(lm, tt.Contrast.from_pairs(pairs))
    fitted = tt.Steering.load("copa.safetensors")
    vectors: list[Any] = [s.interventions[0].operator for s in (fitted, expected)]
    assert torch.allclose(vectors[0].vector, vectors[1].vector, atol=1e-6)
    assert fitted.contrast["name"] == "task:copa"
    before = listing(work)
    refused(trimtab(f"{fit.replace('task:copa', 'task:cola')} -o x.st"), "unknown task 'cola'")
    refused(trimtab(f"{fit.replace('task:copa', 'task:xstest')} -o x.st"), "xstest has no contrast")
    assert listing(work) == before
