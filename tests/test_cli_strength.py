"""`trimtab strength` and `generate --kl` on a tiny model: what they print, write and refuse."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

import trimtab as tt
from commands import (
    Command,
    failing,
    home,
    listing,
    refused,
    save_model,
    trimtab,
    warnings_of,
    work,
)
from services import Reply, Request, serving
from trimtab.strength import budget, curve

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

CAA = "--model model --steer caa.safetensors --raw"
QUICK = f"strength curve {CAA} --points 21 --range -4:4 Hi"


@pytest.mark.parametrize("command", ["curve", "budget", "theory", "contrast"])
def test_help_has_an_example(trimtab: Command, command: str) -> None:
    said = trimtab(f"strength {command} --help").text
    assert f"trimtab strength {command}" in " ".join(said.split())
    assert "Example:" in said
    assert command in trimtab("strength --help").text


# -- curve ----------------------------------------------------------------------------------------


def test_curve_as_json(trimtab: Command, work: Path) -> None:
    found = trimtab(f"{QUICK} --token ' happy' --token ' sad' --json").json
    lm = tt.load("model", device="cpu")
    steering = tt.Steering.load("caa.safetensors")
    expected = curve(
        lm, steering, ["Hi"], span=(-4, 4), points=21, tokens=[" happy", " sad"], chat=False
    )
    assert set(found["curve"]) >= {"dials", "tokens", "kl", "entropy"}
    assert found["curve"]["dials"] == expected.dials.tolist()
    assert found["curve"]["kl"] == pytest.approx(expected.kl.tolist(), abs=1e-9)
    assert found["curve"]["entropy"] == pytest.approx(expected.entropy.tolist())
    for token, own in zip(found["curve"]["tokens"], expected.tokens, strict=True):
        assert token["token"] == own.token
        assert token["id"] == own.id
        assert token["delta_p"] == pytest.approx(own.delta_p.tolist(), abs=1e-9)
    assert found["model"] == vars(lm.identity)
    assert found["prompts"] == ["Hi"]
    assert found["cost"] is found["concept"] is found["accuracy"] is None
    assert found["pictures"] == []
    assert found["name"] == "caa at layers.1.resid"
    assert len(found["words"]) >= 3


def test_curve_for_people_and_in_files(trimtab: Command, work: Path) -> None:
    said = trimtab(f"{QUICK} --top 3 -o out").text
    assert said.startswith("caa at layers.1.resid\n21 of 21 dials run")
    assert "sweet spot" in said
    assert "picture  out/curve.png" in said
    assert {path.name for path in Path("out").iterdir()} - {".lock"} == {
        *("curve.json", "curve.png", "curve.svg", "config.json", "environment.json"),
        *("records", "report.html", "results.json"),
    }
    document = json.loads(Path("out/curve.json").read_text())
    assert len(document["curves"][0]["curve"]["tokens"]) == 3
    before = listing(work)
    refused(trimtab(f"{QUICK} -o out"), "out holds curve.json", "--overwrite")
    assert listing(work) == before
    trimtab(f"{QUICK} --top 2 -o out --overwrite").text  # noqa: B018
    document = json.loads(Path("out/curve.json").read_text())
    assert len(document["curves"][0]["curve"]["tokens"]) == 2


def test_everything_at_once(trimtab: Command, work: Path) -> None:
    Path("plain.txt").write_text("The ship left the harbour in the morning. " * 8)
    found = trimtab(
        f"{QUICK} --ce-text plain.txt --ce-tokens 60 --ce-points 5 --concept joy --samples 2 "
        "--max-new-tokens 3 --concept-points 5 --concept-range -2:2 --contrast pairs.jsonl "
        "--resamples 2 --seed 3 -o out --json"
    ).json
    assert found["cost"]["tokens"] == 60
    dials = found["cost"]["dials"]
    assert {-4.0, -2.0, 0.0, 2.0, 4.0} <= set(dials)
    assert sum(0 < abs(dial) < 1.5 for dial in dials) >= 6  # curvature is read there
    assert found["cost"]["delta_ce"][dials.index(0.0)] == 0
    assert found["reading"]["cost"]["curvature"] is not None
    assert found["concept"]["dials"] == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert found["concept"]["n"] == [2] * 5
    assert found["concept"]["judge"].startswith("lexicon of")
    tokens = found["curve"]["tokens"]
    assert all(len(token["sd"]) == 21 for token in tokens)
    assert all(token["log_odds"] is not None for token in tokens)
    assert found["pictures"] == ["out/curve.png", "out/curve.svg"]
    texts = [json.loads(line) for line in Path("out/texts.jsonl").read_text().splitlines()]
    assert len(texts) == 10
    assert set(texts[0]) == {"dial", "prompt", "text"}


def test_layers_and_several_steerings(trimtab: Command, work: Path) -> None:
    found = trimtab(f"{QUICK} --contrast pairs.jsonl --layers 3 --json").json
    assert [one["name"] for one in found["curves"]] == [
        f"caa at layers.{layer}.resid" for layer in (0, 1, 2)
    ]
    assert found["curve"] == found["curves"][0]["curve"]
    both = trimtab(f"{QUICK} --steer au.safetensors --json").json
    assert [one["name"].split(" at ")[0] for one in both["curves"]] == ["caa", "austeer"]


@pytest.mark.parametrize("method", ["ss", "sas", "ablation", "iti"])
def test_curves_of_other_methods(trimtab: Command, work: Path, method: str) -> None:
    found = trimtab(
        f"strength curve --model model --raw Hi --steer every/{method}.safetensors --points 5 "
        "-o out --json"
    ).json
    steering = tt.Steering.load(f"every/{method}.safetensors")
    dials = found["curve"]["dials"]
    assert found["curve"]["dial"] == {"name": steering.dial.name, "unit": steering.dial.unit}
    low, high = steering.dial.range
    if method in ("ss",):
        low, high = -180.0, 180.0
    assert (dials[0], dials[-1]) == (low, high)
    if method == "sas":
        assert any("at no dial" in line for line in found["words"])


def test_a_judge_behind_an_api(trimtab: Command, work: Path) -> None:
    def script(request: Request) -> Reply:
        return Reply({"choices": [{"message": {"role": "assistant", "content": "1"}}]})

    with serving(script) as service:
        found = trimtab(
            f"{QUICK} --concept joy --judge chat:m --judge-url {service.url}/v1 --samples 1 "
            "--max-new-tokens 2 --concept-points 2 --json"
        ).json
    assert found["concept"]["probability"] == [1.0, 1.0, 1.0]  # 0 is there too
    assert found["concept"]["judge"] == f"m at {service.url}/v1 on joy"


def test_a_local_judge_that_says_nothing_useful(trimtab: Command, work: Path) -> None:
    ran = trimtab(
        f"{QUICK} --concept joy --judge local:model --samples 1 --max-new-tokens 2 "
        "--concept-points 2"
    )
    refused(ran, "model on joy gave no label at alpha = -4", "must begin with 1 or 0")


def test_accuracy_of_a_task(trimtab: Command, work: Path, data_dir: Path) -> None:
    found = trimtab(
        f"{QUICK} --task copa --data {data_dir} --limit 4 --task-points 3 -o out --json"
    ).json["accuracy"]
    assert found["task"] == "copa"
    assert found["metric"] == "accuracy"
    assert found["dials"] == [-4.0, 0.0, 4.0]
    assert found["n"] <= 4
    assert found["value"][1] == found["unsteered"]
    assert all(low <= value <= high for value, (low, high) in zip(
        found["value"], found["ci95"], strict=True))  # fmt: skip
    assert (
        "copa, accuracy:"
        in trimtab(f"{QUICK} --task copa --data {data_dir} --limit 4 --task-points 2").text
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--range 3", ["--range '3'", "LOW:HIGH"]),
        ("--range a:b", ["--range 'a:b'", "LOW:HIGH"]),
        ("--range 2:1", ["LOW must be below HIGH"]),
        ("--range nan:1", ["LOW must be below HIGH"]),
        ("--concept joy --concept-range 2", ["--concept-range '2'"]),
        ("--steer au.safetensors --contrast pairs.jsonl --layers 2", ["one steering", "not 2"]),
        ("--steer none.safetensors", ["no such steering file: none.safetensors"]),
        ("--steer late.safetensors", ["generated tokens only"]),
        ("--concept formal", ["no lexicon for 'formal'", "words of your own"]),
        ("--concept joy --words a --judge local:model", ["choose one of --words and --judge"]),
        ("--concept joy --words ,", ["a lexicon needs words"]),
        ("--concept joy --judge chat:x", ["--judge chat:x", "--judge-url"]),
        ("--concept joy --judge local:", ["--judge local:"]),
        ("--concept joy --judge magic", ["--judge magic"]),
        ("--words a", ["--words and --judge are for a --concept"]),
        ("--judge local:model", ["--words and --judge are for a --concept"]),
        ("--ce-text none.txt", ["cannot read none.txt"]),
        ("--ce-text pairs.jsonl", ['JSONL rows {"text": TEXT}']),
        ("--ce-text model", ["cannot read model"]),
        ("--ce --ce-tokens 1", ["2 tokens or more, not 1"]),
        ("--ce --ce-points 1", ["2 points or more"]),
        ("--resamples 3", ["--resamples and --layers fit anew", "--contrast"]),
        ("--layers 2", ["--resamples and --layers fit anew", "--contrast"]),
        ("--layers 0", ["--layers"]),
        ("--resamples 1 --contrast pairs.jsonl", ["2 resamples or more"]),
        ("--contrast none.jsonl", ["none.jsonl"]),
        ("--points 1", ["2 points or more"]),
        ("--top 0", ["1 token or more"]),
        ("--token ''", ["has no token"]),
        ("--tolerance -1", ["tolerance"]),
        ("--max-kl 0", ["bound on KL"]),
        ("--max-entropy inf", ["entropy is bounded"]),
        ("--chat", ["choose one of --raw and --chat"]),
        ("--task nothing", ["unknown task 'nothing'"]),
        ("--task copa --data nowhere", ["nowhere"]),
        ("--samples 0 --concept joy", ["1 sample or more"]),
    ],
)
def test_what_a_curve_refuses(trimtab: Command, work: Path, options: str, words: list[str]) -> None:
    before = listing(work)
    base = QUICK.replace("--range -4:4 ", "") if options.startswith("--range") else QUICK
    base = re.sub(r"--points \S+", "", base) if options.startswith("--points") else base
    refused(trimtab(f"{base} {options} -o out"), *words)
    assert listing(work) == before


def test_a_curve_needs_a_steering_a_prompt_and_a_place(trimtab: Command, work: Path) -> None:
    refused(trimtab("strength curve --model model --raw Hi"), "name a steering: --steer FILE")
    refused(trimtab("strength curve --model model --steer caa.safetensors"), "there is no prompt")
    refused(trimtab(f"{QUICK} -o pairs.jsonl"), "cannot write to pairs.jsonl", "is a file")
    refused(trimtab(f"{QUICK} -o pairs.jsonl/deep"), "cannot write to", "is a file")
    refused(trimtab("strength curve --model other --steer caa.safetensors --raw Hi"), "--force")


def test_a_disk_that_is_full(trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = failing(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "replace", full)
    refused(trimtab(f"{QUICK} -o out"), "out/environment.json", "No space left on device")
    assert not any(path.is_file() for path in Path("out").rglob("*") if path.name != ".lock")


# -- budget ---------------------------------------------------------------------------------------


def test_budget_as_json(trimtab: Command, work: Path) -> None:
    found = trimtab(f"strength budget {CAA} --kl 0.02 'Today I feel' 'Hi' --json").json
    lm = tt.load("model", device="cpu")
    steering = tt.Steering.load("caa.safetensors")
    expected = budget(lm, steering, ["Today I feel", "Hi"], 0.02, chat=False)
    own = found["budget"]
    assert own["kl"] == 0.02
    assert own["dial"] == pytest.approx(expected.dial)
    assert own["worst5_dial"] == pytest.approx(expected.worst5_dial)
    assert [row["prompt"] for row in own["per_prompt"]] == ["Today I feel", "Hi"]
    for row, wanted in zip(own["per_prompt"], expected.per_prompt, strict=True):
        assert row["dial"] == pytest.approx(wanted.dial)
        assert row["kl"] == pytest.approx(0.02, rel=0.02)
    assert own["negative"]["dial"] < 0 < own["dial"]
    one = trimtab(f"strength budget {CAA} --kl 0.02 --side positive Hi --json").json["budget"]
    assert "negative" not in one


def test_budget_for_people(trimtab: Command, work: Path) -> None:
    said = trimtab(f"strength budget {CAA} --kl 0.02 'Today I feel'").text
    assert "Today I feel" in said
    assert said.startswith("A budget of 0.02 nats allows a dial of ")
    assert "for half of the prompts and " in said
    assert "95 % of the prompts" in said


def test_a_calibration_is_saved_and_used(trimtab: Command, work: Path) -> None:
    said = trimtab(
        f"strength budget {CAA} --kl 0.01 --kl 0.05 'Today I feel' Hi --save calibrated.safetensors"
    ).text
    assert "calibrated on 2 prompts; steer with calibrated.safetensors@kl=" in said
    steering = tt.Steering.load("calibrated.safetensors")
    assert steering.calibration is not None
    assert steering.calibration.kl == (0.01, 0.05)
    dial = steering.at(kl=0.05).setting
    command = "generate --model model --raw 'Today I feel' --max-new-tokens 4 --json --steer"
    by_budget = trimtab(f"{command} calibrated.safetensors@kl=0.05").json["outputs"]
    by_number = trimtab(f"{command} caa.safetensors@{dial!r}").json["outputs"]
    assert by_budget[0]["tokens"] == by_number[0]["tokens"]
    refused(trimtab(f"{command} calibrated.safetensors@kl=9"), "calibrated up to 0.05 nats")
    refused(trimtab(f"{command} caa.safetensors@kl=0.05"), "is not calibrated")
    refused(trimtab(f"{command} caa.safetensors@kl=much"), "FILE@kl=NATS")
    before = listing(work)
    again = f"strength budget {CAA} Hi --kl 0.01 --save calibrated.safetensors"
    refused(trimtab(again), "calibrated.safetensors exists", "--overwrite")
    assert listing(work) == before
    shown = trimtab(f"{again} --overwrite --json").json
    assert shown["calibration"]["kl"] == [0.01]
    assert shown["steering"] == "calibrated.safetensors"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--kl 0", ["above 0 nats"]),
        ("--kl nan", ["above 0 nats"]),
        ("--kl 0.1 --kl 0.2", ["several --kl", "--save FILE"]),
        ("--side up", ["side is 'up'"]),
        ("--steer au.safetensors", ["one steering", "not 2"]),
        ("--chat", ["choose one of --raw and --chat"]),
        ("--save nowhere/x.safetensors", ["there is no directory nowhere"]),
    ],
)
def test_what_a_budget_refuses(
    trimtab: Command, work: Path, options: str, words: list[str]
) -> None:
    before = listing(work)
    refused(trimtab(f"strength budget {CAA} Hi {options}"), *words)
    assert listing(work) == before


def test_a_budget_of_an_angle_is_refused(trimtab: Command, work: Path) -> None:
    ran = trimtab("strength budget --model model --raw Hi --steer every/sas.safetensors")
    refused(ran, "sas steering does nothing at no dial")


# -- generate --kl --------------------------------------------------------------------------------


def test_generate_within_a_budget(trimtab: Command, work: Path) -> None:
    prompts = "'Today I feel' 'The answer is'"
    found = trimtab(f"generate {CAA} --kl 0.02 {prompts} --max-new-tokens 5 --json").json["outputs"]
    lm = tt.load("model", device="cpu")
    steering = tt.Steering.load("caa.safetensors")
    dials = budget(
        lm, steering, ["Today I feel", "The answer is"], 0.02, side="positive", chat=False
    ).per_prompt
    for output, one in zip(found, dials, strict=True):
        turned = replace(steering, value=one.dial)
        (plain,) = lm.generate([output["prompt"]], steering=turned, chat=False, max_new_tokens=5)
        assert output["tokens"] == list(plain.tokens)
        assert output["steering"] == [turned.label]
    assert found[0]["steering"] != found[1]["steering"]
    said = trimtab(f"generate {CAA} --kl 0.02 {prompts} --max-new-tokens 5").text
    assert found[0]["steering"][0] in said
    both = trimtab(f"generate {CAA} --kl 0.02 {prompts} --max-new-tokens 5 --compare --json").json
    assert [output["steering"] for output in both["outputs"][:2]] == [[], []]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--raw Hi --kl 0.1", ["name one steering, not 0"]),
        ("--raw Hi --kl 0.1 -s caa.safetensors -s au.safetensors", ["name one steering, not 2"]),
        ("--raw Hi --kl 0 -s caa.safetensors", ["above 0 nats"]),
        ("--raw Hi --kl 0.1 -s every/sas.safetensors", ["does nothing at no dial"]),
    ],
)
def test_what_generate_refuses(
    trimtab: Command, work: Path, options: str, words: list[str]
) -> None:
    refused(trimtab(f"generate --model model {options}"), *words)


def test_a_budget_that_the_dial_cannot_use_up(trimtab: Command, work: Path) -> None:
    ran = trimtab(f"generate {CAA} --kl 50 Hi --max-new-tokens 2")
    (warning,) = warnings_of(ran)
    assert "1 of 1 prompts cost less than 50 nats" in warning


# -- theory and contrasts -------------------------------------------------------------------------


@pytest.mark.slow
def test_theory(trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trimtab("strength theory -o theory --json").json
    assert found["uniform"]["entropy"] == pytest.approx(1.3318, abs=1e-4)
    assert len(found["pictures"]) == 8
    assert json.loads(Path("theory/theory.json").read_text())["curvature"] == found["curvature"]
    before = listing(work)
    refused(trimtab("strength theory -o theory"), "theory holds theory.json", "--overwrite")
    assert listing(work) == before
    altered = {key: value for key, value in found.items() if key != "pictures"} | {"curvature": 1.0}
    monkeypatch.setattr("trimtab.strength.theory.facts", lambda: altered)
    said = trimtab("strength theory -o theory --overwrite").text
    assert json.loads(Path("theory/theory.json").read_text()) == altered
    assert "cost begins with 0.5000 α²" in said
    assert "entropy 1.331785 nats" in said
    assert "c (lower case, log-odds +3.914): rises with α" in said
    assert "b (lower case, log-odds +3.814): most probable at α = 17.3" in said
    assert "Greek: probability 0.9500, 0.0000 for α → -∞, 0.0000 for α → ∞" in said
    refused(trimtab("strength theory -o pairs.jsonl"), "is a file")


def test_contrast(trimtab: Command, work: Path) -> None:
    save_model(work / "long", name="llama", max_position_embeddings=2048)
    config = work / "long" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 2048}))
    command = "strength contrast --model long --concept joy --count 3 --max-new-tokens 6"
    found = trimtab(f"{command} -o joy.jsonl --seed 1 --json").json
    contrast = tt.Contrast.from_jsonl("joy.jsonl")
    assert found == {"contrast": "joy.jsonl", "rows": 6, "digest": contrast.digest}
    assert [row.label for row in contrast.texts].count("positive") == 3
    before = listing(work)
    refused(trimtab(f"{command} -o joy.jsonl"), "joy.jsonl exists", "--overwrite")
    refused(trimtab(f"{command} -o new.jsonl --negatives none"), "none")
    refused(trimtab(f"{command} -o new.jsonl --writer magic"), "--writer magic", "--writer-url")
    refused(trimtab(f"{command} -o new.jsonl --writer chat:x"), "--writer-url")
    assert listing(work) == before
    assert trimtab(f"{command} -o other.jsonl").text.startswith("other.jsonl: 6 texts")
    trimtab("fit caa --model long --contrast joy.jsonl --layer 1 -o joy.safetensors").text  # noqa: B018
