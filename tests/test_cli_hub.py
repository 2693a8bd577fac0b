"""`trimtab push`, `pull` and `search`."""

from __future__ import annotations

from pathlib import Path

import pytest

import trimtab as tt
from commands import Command, home, listing, refused, trimtab, work
from hub_server import TOKEN, Hub, hub
from trimtab.exchange.card import CARD, STEERING

__all__ = ["home", "hub", "trimtab", "work"]


def test_there_and_back(trimtab: Command, hub: Hub, work: Path) -> None:
    found = trimtab("push au.safetensors me/joy --license mit --json").json
    assert set(found) == {"repo", "url", "commit", "files", "sha256"}
    assert found["files"] == [STEERING, CARD]
    assert hub.repos["me/joy"].files[STEERING] == Path("au.safetensors").read_bytes()
    pulled = trimtab("pull me/joy --json").json
    assert pulled["output"] == "joy.safetensors"
    assert (pulled["commit"], pulled["sha256"]) == (found["commit"], found["sha256"])
    assert Path("joy.safetensors").read_bytes() == Path("au.safetensors").read_bytes()
    assert not Path("joy.safetensors").is_symlink()
    said = trimtab("pull me/joy -o again.safetensors").text
    assert found["commit"] in said
    assert "Saved again.safetensors: austeer alpha=2, for " in said
    # It is used as any other, and refused for another model there.
    assert trimtab("generate --model model --steer joy.safetensors --max-new-tokens 2 Hi").text
    refused(trimtab("generate --model other --steer joy.safetensors Hi"), "this steering was made")


def test_what_is_found(trimtab: Command, hub: Hub) -> None:
    trimtab("push au.safetensors me/joy@home")
    trimtab("push au.safetensors me/joy --base-model them/model")
    trimtab("push caa.safetensors me/truth@1")
    trimtab("push caa.safetensors@1 me/truth --private")
    assert set(hub.repos) == {"me/joy", "me/truth"}
    found = trimtab("search --json").json
    assert [each["repo"] for each in found["steerings"]] == ["me/joy", "me/truth"]
    assert found["more"] is False
    said = trimtab("search joy -m them/model").text
    assert "1 steering" in said
    assert "them/model" in said
    assert trimtab("search nothing").text == "0 steerings\n"


def test_what_is_in_the_way(trimtab: Command, hub: Hub, work: Path) -> None:
    trimtab("push au.safetensors me/joy")
    before = dict(hub.repos["me/joy"].files)
    refused(trimtab("push caa.safetensors me/joy"), "me/joy exists on the hub", "--overwrite")
    assert hub.repos["me/joy"].files == before
    Path("joy.safetensors").write_text("mine")
    left = listing(work)
    refused(trimtab("pull me/joy"), "joy.safetensors exists", "--overwrite")
    refused(trimtab("pull me/joy --overwrite"), "joy.safetensors is not a steering")
    assert listing(work) == left
    assert not [each for each in hub.asked("/resolve/")]
    trimtab("push caa.safetensors me/joy --overwrite")
    assert hub.repos["me/joy"].files[STEERING] == Path("caa.safetensors").read_bytes()


def test_nothing_half_written_is_left(trimtab: Command, hub: Hub, work: Path) -> None:
    trimtab("push au.safetensors me/joy")
    left = listing(work)
    hub.cut = 5
    refused(trimtab("pull me/joy"), "did not arrive whole")
    hub.cut, hub.faults = 0, {"/resolve/": 503}
    refused(trimtab("pull me/joy"), "error 503")
    refused(trimtab("push no.safetensors me/joy"), "no such steering file")
    refused(trimtab("pull joy"), "OWNER/NAME")
    assert listing(work) == left


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429, 500])
def test_no_token_is_shown_even_with_debug(trimtab: Command, hub: Hub, status: int) -> None:
    hub.faults, hub.says = {"/api/": status}, "no {token}"
    for line in ("push au.safetensors me/joy", "pull me/joy", "search joy"):
        for ran in (trimtab(line), trimtab(f"--debug {line}")):
            assert ran.status == 2
            assert TOKEN not in ran.out + ran.err
            assert "CANARY" not in ran.out + ran.err
            assert "httpx" not in ran.err


def test_nothing_of_a_steering_is_obeyed_by_the_terminal(trimtab: Command, hub: Hub) -> None:
    from dataclasses import replace

    odd = replace(tt.Steering.load("au.safetensors"), method="\x1b[31mred\n[bold]x[/bold]")
    odd.save("odd.safetensors")
    trimtab("push odd.safetensors me/odd")
    for line in ("search", "pull me/odd -o x.safetensors"):
        assert "\x1b" not in trimtab(line).out
