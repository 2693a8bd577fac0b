"""`trimtab monitor`: what it does is what Python's does; files, exit statuses, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trimtab as tt
from commands import Command, home, trimtab, warnings_of, work
from test_gate_fit import planted
from test_monitor import CHAT, SHORT

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

FIT = "monitor fit --model model --steer probe.safetensors --contrast texts.jsonl"
CHECK = "monitor check watch.safetensors --model model --chats chats.jsonl"


@pytest.fixture
def watch(work: Path, trimtab: Command) -> tt.Monitor:
    """A monitor beside the chats that it is to read."""
    contrast = planted().with_parts()
    contrast.to_jsonl("texts.jsonl")
    lm = tt.load("model", device="cpu")
    tt.Probe(layer=1).fit(lm, contrast, measure=False).save("probe.safetensors")
    trimtab(f"{FIT} --false-alarms 0.2 -o watch.safetensors")
    rows = [
        {"messages": CHAT},
        {"messages": CHAT[:3]},
        {"prompt": SHORT[:1], "text": "yes"},
        {"text": "please please please"},
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tt.Monitor.load("watch.safetensors")


def test_a_monitor_is_fitted_and_chats_are_checked(trimtab: Command, watch: tt.Monitor) -> None:
    lm = tt.load("model", device="cpu")
    found = trimtab(f"{FIT} --threshold f1 --baseline plain -o other.st --json").json
    steering = tt.Steering.load("probe.safetensors")
    expected = tt.fit_monitor(lm, steering, planted(), false_alarms=0.2)
    assert watch.condition.threshold == pytest.approx(expected.condition.threshold, abs=1e-5)
    assert found["monitor"]["findings"]["monitor"]["chosen"]["by"] == "f1"
    assert found["monitor"]["findings"]["monitor"]["baseline"]["n"] == 18
    said = trimtab(f"{FIT} --false-alarms 0.01 -o third.st").text
    assert "On its test texts it fires at" in said
    assert "less than one of them" in said

    seen = trimtab(f"{CHECK} --json").json
    chats = [CHAT, CHAT[:3], tt.Answered((("user", "Hi"),), "yes"), "please please please"]
    turns = tt.monitor(lm, watch, chats).turns
    assert len(seen["turns"]) == len(turns) == 6
    for one, other in zip(seen["turns"], turns, strict=True):
        assert one["mean"] == pytest.approx(other.mean, abs=1e-4)
        assert one["prompt"] == pytest.approx(other.prompt, abs=1e-4)
        assert [each["text"] for each in one["tokens"]] == list(other.tokens)
        assert one["alarm"] == watch.alarms(other.mean)
    assert seen["alarms"] == sum(each["alarm"] for each in seen["turns"])
    assert f"{seen['alarms']} of 6 turns of 4 chats are alarms" in trimtab(CHECK).text


def test_a_chat_that_alarms_fails_where_it_is_asked(trimtab: Command, watch: tt.Monitor) -> None:
    for threshold, status in ((-1e6, 1), (1e6, 0)):
        condition = tt.Condition(
            watch.condition.site, watch.condition.direction, threshold, score="projection",
            reads="last",  # type: ignore[arg-type]
        )  # fmt: skip
        own = tt.Monitor(condition, watch.baseline, source=watch.source, model=watch.model)
        own.save("own.st", overwrite=True)
        line = CHECK.replace("watch.safetensors", "own.st")
        assert trimtab(f"{line} --fail").status == status
        assert trimtab(line).status == 0


def test_prompts_are_answered_and_read(trimtab: Command, watch: tt.Monitor, home: Path) -> None:
    line = "monitor check watch.safetensors --model model --json --max-new-tokens 4 Hi"
    plain = trimtab(line).json
    steered = trimtab(f"{line} --steer au.safetensors@40 --scope generated").json
    lm = tt.load("model", device="cpu")
    au = tt.Steering.load(home / "au.safetensors").scoped("generated").at(40)
    for found, steering in ((plain, None), (steered, au)):
        done = lm.generate(["Hi"], max_new_tokens=4, steering=steering)
        (turn,) = tt.monitor(lm, watch, done).turns
        assert found["turns"][0]["text"] == turn.text
        assert found["turns"][0]["mean"] == pytest.approx(turn.mean, abs=1e-4)


def test_a_steering_is_read_without_alarms(trimtab: Command, watch: tt.Monitor) -> None:
    line = CHECK.replace("watch.safetensors", "caa.safetensors")
    found = trimtab(f"{line} --json").json
    assert (found["monitor"], found["alarms"]) == (None, 0)
    assert "along the direction of caa at layers.1.resid" in trimtab(line).text
    # And a monitor is a gate, which lets a steering act where it alarms.
    trimtab("gate put late.safetensors watch.safetensors -o careful.st")
    assert "token gate" in trimtab("inspect careful.st").text


def test_a_run_has_a_page_with_coloured_tokens(trimtab: Command, watch: tt.Monitor) -> None:
    said = trimtab(f"{CHECK} -o runs/watched").text
    assert "report.html" in said
    page = Path("runs/watched/report.html").read_text()
    assert page.count('class="coloured"') == 5
    assert "background: rgb(" in page
    assert Path("runs/watched/pictures/projections.png").stat().st_size > 0
    assert json.loads(Path("runs/watched/results.json").read_text())["turns"][0]["tokens"]
    assert warnings_of(trimtab(f"{CHECK} -o runs/watched")) == []  # the same again
    assert trimtab(f"{CHECK} -o runs/watched --overwrite").status == 0


def test_mistakes_are_one_line(trimtab: Command, watch: tt.Monitor) -> None:
    Path("odd.jsonl").write_text('{"message": "Hi"}\n')
    Path("none.jsonl").write_text("\n")
    for line, says in (
        ("monitor check watch.safetensors --model model", "there is no chat to read"),
        (f"{CHECK} --steer au.safetensors", "prompts that are answered now"),
        (CHECK.replace("chats.jsonl", "odd.jsonl"), "odd.jsonl, row 1: write"),
        (CHECK.replace("chats.jsonl", "none.jsonl"), "none.jsonl"),
        (CHECK.replace("chats.jsonl", "gone.txt"), "cannot read chats from gone.txt"),
        (CHECK.replace("--model model", "--model other"), "made for"),
        (CHECK.replace("watch", "gone"), "gone.safetensors"),
        (CHECK.replace("watch", "caa") + " --fail", "no alarm to fail by"),
        (CHECK.replace("watch", "au"), "it has none"),
        (f"{FIT} -o watch.safetensors", "exists"),
        (f"{FIT} --at end -o new.st", "--at"),
        (f"{FIT} --site layers.9.resid -o new.st", "layers.9.resid"),
        (FIT.replace("probe", "gone") + " -o new.st", "gone.safetensors"),
    ):
        ran = trimtab(line)
        assert ran.status == 2, line
        assert says in ran.err
        assert len(ran.err.splitlines()) == 1
        assert not Path("new.st").exists()
