"""`trimtab make`: the command line, from a wish to a directory, and to the honest answer."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from commands import Command, home, refused, save_model, trimtab, work
from services import Reply, serving, tossing
from trimtab.wishes import asking, choosing
from trimtab.wishes.portfolio import Arm
from trimtab.writing import persona

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

WISH = shlex.quote("answers in one short sentence")


@pytest.fixture
def model(work: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(persona, "FEWEST", 1)
    monkeypatch.setattr(persona, "SEES", 0.0)
    monkeypatch.setattr(asking, "PROMPTS", 2)
    monkeypatch.setattr(asking, "NEW_TOKENS", 4)
    monkeypatch.setattr("trimtab.evaluation.per_token.PROMPTS", 2)
    monkeypatch.setattr(choosing, "RUNGS", (2, 4))
    arms = [Arm(tt.CAA(layer=1)), Arm(tt.CAA(layer=2)), Arm(tt.ITI(k=2))]
    monkeypatch.setattr("trimtab.wishes.making.portfolio", lambda *_: arms)
    save_model(work / "long", name="llama", max_position_embeddings=2048)
    config = work / "long" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 2048}))
    return "long"


SMALL = "--pairs 3 --questions 24 --max-new-tokens 5"


def test_from_a_wish_to_a_directory(trimtab: Command, model: str) -> None:
    with serving(tossing) as service:
        line = f"make {WISH} --model {model} {SMALL} --judge chat:j --judge-url {service.url}"
        text = trimtab(f"{line} --review -o short").text
        assert "plan, in all about" in text
        assert "Look at short/contrast.jsonl, edit it as you like" in text
        ran = trimtab(f"{line} -o short --json")
    found: dict[str, Any] = json.loads(ran.out)
    assert ran.err == ""
    contrast = tt.Contrast.from_jsonl("short/contrast.jsonl")
    assert contrast.made is not None
    assert contrast.made["wish"] == found["wish"] == "answers in one short sentence"
    assert found["contrast"]["digest"] == contrast.digest
    assert found["prompt_baseline"].keys() >= {"gain", "cost", "said", "better"}
    assert {one["method"] for one in found["methods"]} == {"caa", "iti"}
    # Answers of a model of random weights differ by chance: most times nothing works, which is
    # said and stops a line that would go on with the steering.
    assert (
        (ran.status == 0)
        == (found["chosen"] is not None)
        == Path("short/steering.safetensors").exists()
    )
    assert ran.status in (0, 1)
    if found["chosen"] is not None:
        needed = {"method", "params", "dial", "gain", "gain_ci95", "cost", "cost_ci95", "n"}
        assert found["chosen"].keys() >= needed
    else:
        assert found["why"]
        assert found["advice"]
    assert all(Path(file).exists() for file in found["files"])


def test_a_wish_that_no_answer_shows(trimtab: Command, model: str) -> None:
    """A judge who sees it nowhere leaves nothing to fit on; that is a result, and its status 1."""
    nothing = lambda request: Reply({"choices": [{"message": {"content": "0"}}]})  # noqa: E731
    with serving(nothing) as service:
        line = f"make {WISH} --model {model} {SMALL} --judge chat:j --judge-url {service.url}"
        ran = trimtab(f"{line} -o none --json")
    found = json.loads(ran.out)
    assert (ran.status, found["chosen"], found["contrast"]) == (1, None, None)
    assert "only 0 are kept" in found["why"][0]
    assert "trait" in found["why"][0]
    assert any("--opposite" in one for one in found["advice"])
    assert {Path(file).name for file in found["files"]} == {
        "samples.md", "next.md", "results.json", "report.html"
    }  # fmt: skip


def test_mistakes_are_one_line(trimtab: Command, model: str) -> None:
    refused(trimtab(f"make --model {model}"), "say what is wished for", "--contrast")
    refused(trimtab(f"make {WISH} --model {model} --contrast pairs.jsonl"), "or give")
    refused(trimtab(f"make --model {model} --contrast pairs.jsonl -o x"), "too few")
    refused(trimtab(f"make --model {model} --contrast nothing.jsonl -o x"), "nothing.jsonl")
    refused(trimtab(f"make {WISH} --model {model} --max-cost 0"), "max_cost")
    refused(trimtab(f"make {WISH} --model {model} --judge me -o x"), "--judge me")
    refused(trimtab(f"make {WISH} --model base -o x"), "no chat template", "--writer")
    assert not Path("x").exists()


def test_the_help_says_how(trimtab: Command) -> None:
    text = trimtab("make --help").text
    assert "Example: trimtab make" in text
    for option in ("--contrast", "--max-cost", "--minutes", "--train", "--review", "--json"):
        assert option in text
