"""Steerings on the hub: pushed, pulled, found, and all that goes wrong, against a hub on this
machine that the hub's own library talks to."""

from __future__ import annotations

import hashlib
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from hub_server import TOKEN, Hub, hub
from steerings import MODEL, equal_steerings, some_steering
from trimtab.exchange import fetched
from trimtab.exchange.card import CARD, STEERING

__all__ = ["hub"]

CLOSED = "http://127.0.0.1:9"  # where nobody listens


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return some_steering().save(tmp_path / "joy.safetensors")


def without_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")


def refusal(act: Any) -> str:
    """What is said of a refusal, in one line, with no token in it and nothing behind it."""
    with pytest.raises(tt.TrimtabError) as raised:
        act()
    said = str(raised.value)
    assert "\n" not in said
    assert "CANARY" not in "".join(traceback.format_exception(raised.value))
    errors, cause = [], raised.value
    while cause is not None:
        errors.append(cause)
        cause = cause.__cause__ or cause.__context__
    assert not any(hasattr(error, "request") for error in errors)  # which holds the token
    return said


# -- there and back -------------------------------------------------------------------------------


def test_what_is_pulled_is_what_was_pushed(hub: Hub, file: Path) -> None:
    done = tt.push(file, "me/joy")
    assert (done.repo, done.files) == ("me/joy", (STEERING, CARD))
    assert done.url == f"{hub.url}/me/joy"
    assert set(hub.repos["me/joy"].files) == {".gitattributes", STEERING, CARD}
    assert hub.repos["me/joy"].files[STEERING] == file.read_bytes()
    found = fetched("me/joy")
    assert found.content == file.read_bytes()
    assert found.commit == done.commit == hub.repos["me/joy"].commits[-1]
    assert found.sha256 == done.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    equal_steerings(tt.pull("me/joy"), tt.Steering.load(file))
    # The storage that large files go to and come from is another host, which sees no token.
    assert hub.asked("/storage/")
    assert all(each.token is None for each in hub.asked("/storage/"))
    assert all(each.token == TOKEN for each in hub.asked("/joy") + hub.asked("/api/repos"))


def test_a_steering_in_hand_and_a_dial_behind_the_file(hub: Hub, file: Path) -> None:
    steering = some_steering()
    tt.push(steering.at(3), "me/one", private=True)
    assert hub.repos["me/one"].private
    assert tt.pull("me/one").setting == 3
    tt.push(f"{file}@5", "me/two")
    assert tt.pull("me/two").setting == 5
    assert tt.Steering.load(file).setting == 8


def test_a_commit_comes_again(hub: Hub, file: Path) -> None:
    first = tt.push(file, "me/joy")
    assert fetched("me/joy", revision=first.commit).commit == first.commit
    said = refusal(lambda: tt.pull("me/joy", revision="nosuch"))
    assert said == "me/joy: the hub has no revision nosuch of it"


def test_only_the_one_file_is_fetched(hub: Hub, file: Path) -> None:
    hub.add("me/joy", {
        STEERING: file.read_bytes(), "../../evil.py": b"import os", "pytorch_model.bin": b"\x80",
        "config.json": b"{}",
    })  # fmt: skip
    tt.pull("me/joy")
    resolved = {each.path.partition("/resolve/")[2] for each in hub.asked("/resolve/")}
    assert {path.partition("/")[2] for path in resolved} == {STEERING}


# -- what is in the way ---------------------------------------------------------------------------


def test_a_repository_is_overwritten_only_where_that_is_said(hub: Hub, file: Path) -> None:
    tt.push(file, "me/joy")
    other = some_steering(method="caa")
    said = refusal(lambda: tt.push(other, "me/joy"))
    assert said == "me/joy exists on the hub: choose another name, or overwrite (--overwrite)"
    assert tt.pull("me/joy").method == "austeer"
    tt.push(other, "me/joy", overwrite=True)
    assert tt.pull("me/joy").method == "caa"
    assert b"caa" in hub.repos["me/joy"].files[CARD]
    hub.add("me/model", {"config.json": b"{}", "model.safetensors": b""})
    said = refusal(lambda: tt.push(file, "me/model", overwrite=True))
    assert "holds no steering, and overwriting replaces only those" in said
    # One that was made, and then the network broke.
    hub.add("me/empty", {})
    tt.push(file, "me/empty")


@pytest.mark.parametrize("name", ["joy", "a/b/c", "../joy", "me/..", "me/a--b", "", "me/jo y"])
def test_names_that_are_no_repository(hub: Hub, file: Path, name: str) -> None:
    for act in (lambda: tt.push(file, name), lambda: tt.pull(name)):
        assert "no repository of the hub: write OWNER/NAME" in refusal(act)
    assert not hub.seen


def test_what_is_no_steering_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04")
    assert "not a safetensors file" in refusal(lambda: tt.push(tmp_path / "x.safetensors", "me/x"))
    assert "no such steering file" in refusal(lambda: tt.push(tmp_path / "y.safetensors", "me/x"))
    assert "no name of a licence" in refusal(
        lambda: tt.push(some_steering(), "me/x", license="MIT\nx: y")
    )
    assert "OWNER/NAME" in refusal(lambda: tt.push(some_steering(), "me/x", base_model="gpt"))
    assert not hub.seen


# -- errors of the hub ----------------------------------------------------------------------------


def test_tokens_that_are_not_let_in(hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "hf_wrongCANARY"
    for act in (
        lambda: tt.push(file, "me/joy", token=wrong),
        lambda: tt.pull("me/joy", token=wrong),
        lambda: tt.search(token=wrong),
    ):
        said = refusal(act)
        assert "does not know this token: log in (hf auth login) or set HF_TOKEN" in said
    said = refusal(lambda: tt.push(file, "you/joy"))
    assert said.startswith("you/joy: the hub does not allow it: use a token that may do so")
    hub.add("me/hidden", {STEERING: file.read_bytes()}, private=True)
    without_token(monkeypatch)
    said = refusal(lambda: tt.pull("me/hidden"))
    assert said.startswith("me/hidden: the hub does not have it, or it is private")
    assert "log in (hf auth login)" in said
    assert "log in (hf auth login)" in refusal(lambda: tt.push(file, "me/joy"))
    assert set(hub.repos) == {"me/hidden"}


@pytest.mark.parametrize("token", ["hf_CANARY\n", "hf_CANARY\r\nX-Other: 1", "hf_CANARYé", "a b"])
def test_a_token_that_no_header_holds_is_not_repeated(hub: Hub, token: str) -> None:
    assert "copy it again" in refusal(lambda: tt.pull("me/joy", token=token))


def test_a_server_that_repeats_the_token(hub: Hub, file: Path) -> None:
    hub.faults, hub.says = {"/api/": 403}, "refused {token} of hf_otherCANARY"
    for act in (lambda: tt.push(file, "me/joy"), lambda: tt.pull("me/joy"), tt.search):
        assert "[token]" in refusal(act)
    for before in range(0, 200, 7):  # long messages lose their middle, wherever the token is
        hub.says = "." * before + "{token}" + "." * 200
        said = refusal(tt.search)
        assert not any(part in said for part in (TOKEN[3:9], TOKEN[-6:]))


def test_nothing_is_logged_of_a_token(
    hub: Hub, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_DEBUG", True)
    with caplog.at_level("DEBUG"):
        tt.push(file, "me/joy")
        tt.pull("me/joy")
        hub.faults = {"/api/": 500}
        refusal(lambda: tt.pull("me/joy"))
    assert caplog.text
    assert "CANARY" not in caplog.text
    assert "CANARY" not in hub.repos["me/joy"].files[CARD].decode()


@pytest.mark.parametrize("part", ["/api/models/", "/api/repos/create", "/preupload/", "/batch",
                                  "/storage/", "/commit/", "/validate-yaml"])  # fmt: skip
def test_a_server_that_fails(hub: Hub, file: Path, part: str) -> None:
    hub.faults, hub.says = {part: 503}, "out of order"
    said = refusal(lambda: tt.push(file, "me/joy"))
    assert said.startswith("me/joy: ")
    assert "run it again" in said
    assert STEERING not in getattr(hub.repos.get("me/joy"), "files", {})
    # What was begun is no obstacle.
    hub.faults = {}
    tt.push(file, "me/joy")
    assert fetched("me/joy").content == file.read_bytes()


@pytest.mark.parametrize(
    ("status", "words"),
    [(402, "wants to be paid"), (409, "has one of that name already"), (418, "error 418"),
     (429, "wait some minutes"), (500, "run it again later")],
)  # fmt: skip
def test_every_status_has_its_words(hub: Hub, status: int, words: str) -> None:
    hub.faults = {"/api/": status}
    for act in (lambda: tt.pull("me/joy"), tt.search):
        assert words in refusal(act)


def test_somebody_else_who_writes_meanwhile(hub: Hub, file: Path) -> None:
    tt.push(file, "me/joy")
    hub.faults = {"/commit/": 412}
    said = refusal(lambda: tt.push(some_steering(method="caa"), "me/joy", overwrite=True))
    assert said == "me/joy: the hub has it changed meanwhile: run it again"


def test_a_hub_that_does_not_know_xet(
    hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the library of that protocol says it, after a minute of trying.
    said = "Network error: Request error: HTTP status client error (404 Not Found), domain: "

    def upload(**given: Any) -> None:
        raise RuntimeError(f"{said}{hub.url}/api/models/me/joy/xet-write-token/main")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub._commit_api._upload_xet_files", upload)
    assert "set HF_HUB_DISABLE_XET=1" in refusal(lambda: tt.push(file, "me/joy"))


def test_no_network(file: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    for act in (
        lambda: tt.push(file, "me/joy", endpoint=CLOSED),
        lambda: tt.pull("me/joy", endpoint=CLOSED),
        lambda: tt.search(endpoint=CLOSED),
    ):
        said = refusal(act)
        assert "the hub cannot be reached (" in said
        assert "look at the network" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in refusal(lambda: tt.pull("me/joy"))
    secret = "http://user:CANARY@127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    refusal(lambda: tt.pull("me/joy", endpoint=secret))


# -- files that are not what they say -------------------------------------------------------------


def test_a_download_that_is_cut_off(hub: Hub, file: Path) -> None:
    hub.add("me/joy", {STEERING: file.read_bytes()})
    hub.cut = 10
    assert refusal(lambda: tt.pull("me/joy")) == (
        "me/joy: the file did not arrive whole: run it again"
    )


def test_hostile_files_are_refused_as_any_other(hub: Hub, file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    for name, content, words in (
        ("pickle", b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.", "is not a safetensors file"),
        ("empty", b"", "is not a safetensors file"),
        ("changed", bytes(whole), "is damaged"),
        ("short", bytes(whole[:-100]), "is not a safetensors file, or it is truncated"),
    ):
        hub.add(f"me/{name}", {STEERING: content})
        said = refusal(lambda: tt.pull(f"me/{name}"))
        assert said.startswith(f"me/{name}/{STEERING} ")
        assert words in said
    hub.add("me/other", {"model.safetensors": b""})
    assert "holds no steering of trimtab" in refusal(lambda: tt.pull("me/other"))


def test_a_file_that_is_too_large_is_not_fetched(
    hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/joy", {STEERING: file.read_bytes()})
    monkeypatch.setattr("trimtab.exchange.hub._LARGEST", 100)
    assert "steerings of up to" in refusal(lambda: tt.pull("me/joy"))
    assert not hub.asked("/resolve/")


# -- finding --------------------------------------------------------------------------------------


def test_steerings_are_found(hub: Hub, file: Path) -> None:
    on_hub = replace(MODEL, name="them/tiny@main")
    tt.push(file, "me/joy")
    tt.push(some_steering(method="caa", model=on_hub), "me/truth")
    hub.add("them/some-model", {"README.md": b"---\ntags: [trimtab]\n---\n"})
    found = tt.search()
    assert [one.repo for one in found.found] == ["me/joy", "me/truth"]
    joy, truth = found.found
    assert (joy.method, joy.dial, joy.model, joy.base_model) == ("austeer", "alpha", "tiny", "")
    assert (joy.likes, joy.downloads, joy.changed[:10]) == (3, 7, "2026-11-20")
    assert (truth.method, truth.base_model) == ("caa", "them/tiny")
    assert [one.repo for one in tt.search("truth").found] == ["me/truth"]
    assert [one.repo for one in tt.search(model="them/tiny").found] == ["me/truth"]
    assert [one.repo for one in tt.search(model="tiny").found] == ["me/joy"]
    assert not tt.search("nothing").found
    first = tt.search(limit=1)
    assert (len(first.found), first.more) == (1, True)
    assert first.summary == "the first 1 steering of more"
    assert found.tables()[0].rows[0][:4] == ["me/joy", "tiny", "austeer", "alpha"]
    assert found.as_json()["steerings"][1]["repo"] == "me/truth"


def test_what_cards_say_is_shown_and_not_obeyed(hub: Hub) -> None:
    card = (
        '---\ntags: [trimtab, steering-vector]\nbase_model: ["a/b", 3]\n'
        'trimtab: {method: "\\e[31mred\\n\\u202e", dial: [], model: {name: 7}}\n---\n'
    )
    hub.add("them/odd", {"README.md": card.encode()})
    (one,) = tt.search().found
    assert one.method.isprintable()
    assert (one.base_model, one.model, one.dial) == ("a/b", "", "")
