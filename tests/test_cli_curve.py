"""`trimtab strength curve`: the page and the files that it leaves, the texts that it shows, the
tokens that it names."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import trimtab as tt
from commands import Command, home, listing, refused, trimtab, work
from tiny import tiny_tokenizer
from trimtab.strength import curve, read

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

CAA = "--model model --steer caa.safetensors --raw"
QUICK = f"strength curve {CAA} --points 21 --range -4:4 Hi"


def page(path: str = "out/report.html") -> str:
    """The words of a page."""
    text = re.sub(r"<(style|script).*?</\1>", " ", Path(path).read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_a_run_directory_with_a_page(trimtab: Command, work: Path) -> None:
    found = trimtab(f"{QUICK} Today --top 3 -o out --json").json
    config = json.loads(Path("out/config.json").read_text())
    assert config["model"]["name"] == "model"
    assert config["prompts"] == ["Hi", "Today"]
    assert config["options"]["points"] == 21
    assert config["options"]["top"] == 3
    assert config["steerings"][0]["sha256"] == tt.Steering.load("caa.safetensors").digest
    assert not {"data", "judge_url", "judge_key_env"} & set(config["options"])
    assert json.loads(Path("out/curve.json").read_text())["curves"][0]["curve"] == found["curve"]
    rows = [json.loads(line) for line in Path("out/records/dials.jsonl").read_text().splitlines()]
    assert [row["dial"] for row in rows] == found["curve"]["dials"]
    assert [row["kl"] for row in rows] == found["curve"]["kl"]
    for place, token in enumerate(found["curve"]["tokens"]):
        p = [delta + token["base_p"] for delta in token["delta_p"]]
        assert [row["p"][place] for row in rows] == p
    words = page()
    assert "Curves of caa at layers.1.resid" in words
    for line in found["words"]:
        assert " ".join(line.split()) in words
    for token in found["curve"]["tokens"]:
        assert repr(token["token"]) in words
    assert Path("out/report.html").read_text().count("<img") == 1
    for sample in found["samples"]:
        assert " ".join(sample["text"].split()) in words
    said = trimtab(f"{QUICK} Today --top 3 -o out --overwrite").text
    assert "out: report.html, curve.json" in said
    assert "texts.jsonl" not in said


def test_another_run_or_a_directory_of_something_else_is_refused(
    trimtab: Command, work: Path
) -> None:
    trimtab(f"{QUICK} --top 2 -o out").text  # noqa: B018
    Path("out/curve.json").unlink()
    before = listing(work)
    refused(trimtab(f"{QUICK} --top 3 -o out"), "another configuration", "options")
    assert listing(work) == before
    trimtab(f"{QUICK} --top 2 -o out").text  # noqa: B018
    assert Path("out/curve.json").exists()


def test_a_directory_from_before_there_were_pages_is_replaced(trimtab: Command, work: Path) -> None:
    Path("old").mkdir()
    Path("old/curve.json").write_text('{"curves": [], "model": {}}')
    Path("old/texts.jsonl").write_text('{"dial": 0, "prompt": "Hi", "text": "stale"}\n')
    refused(trimtab(f"{QUICK} -o old"), "old holds curve.json", "--overwrite")
    trimtab(f"{QUICK} -o old --overwrite").text  # noqa: B018
    assert Path("old/report.html").exists()
    assert not Path("old/texts.jsonl").exists()


def test_texts_unsteered_beside_steered(trimtab: Command, work: Path) -> None:
    found = trimtab(f"{QUICK} Today She --text-tokens 5 --json").json
    lm, steering = tt.load("model", device="cpu"), tt.Steering.load("caa.safetensors")
    spot: Any = read(curve(lm, steering, ["Hi", "Today", "She"], span=(-4, 4), points=21,
                           chat=False)).sweet_spot  # fmt: skip
    dials: list[float | None] = [None, steering.setting / 2, steering.setting]
    if spot is not None:
        dials = [None, spot.best / 2, spot.best]
    assert [sample["dial"] for sample in found["samples"]] == dials * 2  # two prompts of three
    assert [sample["prompt"] for sample in found["samples"]] == ["Hi"] * 3 + ["Today"] * 3
    assert found["samples"][0]["place"] == "unsteered"
    for sample in found["samples"]:
        turned = None if sample["dial"] is None else replace(steering, value=sample["dial"])
        (plain,) = lm.generate([sample["prompt"]], steering=turned, chat=False, max_new_tokens=5)
        assert sample["text"] == plain.text
    assert trimtab(f"{QUICK} --texts 0 --json").json["samples"] == []
    said = trimtab(f"{QUICK} --text-tokens 5").text
    assert found["samples"][0]["text"].strip() in said
    assert "  unsteered" in said


def test_a_token_of_several_pieces_is_said(trimtab: Command, work: Path) -> None:
    ids = tiny_tokenizer()(" qvzx", add_special_tokens=False).input_ids
    assert len(ids) > 1
    found = trimtab(f"{QUICK} --token ' qvzx' --json").json
    (token,) = found["curve"]["tokens"]
    assert (token["token"], token["ids"]) == (" qvzx", ids)
    assert any(f"' qvzx' is {len(ids)} tokens" in line for line in found["words"])


def test_tokens_that_nobody_named_are_explained(trimtab: Command, work: Path) -> None:
    found = trimtab(f"{QUICK} --top 3 --json").json
    assert "the tokens are the 3" in found["curve"]["chosen"]
    assert found["curve"]["chosen"] in found["words"]
    at_end = trimtab(f"{QUICK} --top 3 --choose end --json").json["curve"]
    assert at_end["chosen"] == ""
    refused(trimtab(f"{QUICK} --choose best"), "best")
