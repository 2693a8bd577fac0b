"""Steerings by trimtab's plugin in vLLM's own command, as far as no engine is needed: what a
request comes to, and what is refused."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

import trimtab as tt
from helpers import language_model, steer_at
from trimtab.engines import extra_args, places_of, wanted_of
from trimtab.serving import Carried, Library, inside_flags
from trimtab.serving.placing import acts_of
from trimtab.serving.stock_inside import Before, InsideEndpoint, Named
from trimtab.steering import Condition, Gate


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    joy = steer_at(lm, "resid", seed=2)
    direction = joy.interventions[0].operator.vector  # type: ignore[attr-defined]
    gate = Gate((Condition("layers.0.resid", direction, 0.0, score="projection"),), "two-pass")
    return {
        "joy": joy.at(3),
        "calm": steer_at(lm, "heads", "Scale", seed=3).at(2),
        "user": steer_at(lm, "resid", seed=4).scoped("user"),
        "gated": joy.gated(gate),
        "late": steer_at(lm, "ffn_out", layer=0),
    }


@pytest.fixture(scope="module")
def named(
    lm: tt.LanguageModel,
    steerings: dict[str, tt.Steering],
    tmp_path_factory: pytest.TempPathFactory,
) -> Named:
    folder, library = tmp_path_factory.mktemp("files"), Library(lm, refusal=lambda steering: "")
    for name, steering in steerings.items():
        library.add(name, steering.save(folder / f"{name}.safetensors").read_bytes())
    sites = ["layers.1.resid", "layers.1.heads"]
    return Named(["base", "also"], lm, library, Carried(lm.anatomy, sites=sites))


def carried(lm: tt.LanguageModel, *steerings: tt.Steering) -> dict[str, str] | None:
    """What a request with steerings carries, as `trimtab serve` has it."""
    return extra_args([wanted_of(one, partial(acts_of, lm)) for one in steerings])


def test_each_way_of_naming_is_the_same(
    named: Named, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    wanted = carried(lm, steerings["joy"].at(12), steerings["calm"])
    fields = [{"name": "joy", "dial": 12}, {"name": "calm"}]
    for body in (
        {"model": "base+joy@12+calm"},
        {"model": "also+joy@12+calm"},
        {"model": "base", "steering": fields},
        {"model": "base", "vllm_xargs": {"steering": "joy@12+calm"}},
        {"vllm_xargs": {"steering": json.dumps(fields)}},
    ):
        found = named.put({**body, "prompt": "a"})
        assert found == {"model": "base", "prompt": "a", "vllm_xargs": wanted}
    scoped = named.put({"steering": [{"name": "joy", "scope": "generated[:4]"}]})
    assert scoped["vllm_xargs"] == carried(lm, steerings["joy"].scoped("generated[:4]"))
    kept = named.put({"model": "base+joy", "vllm_xargs": {"other": 3}})
    assert kept["vllm_xargs"] == {"other": 3, **(carried(lm, steerings["joy"]) or {})}


def test_what_is_not_steered_stays_as_it_is(named: Named) -> None:
    for body in ({"model": "base"}, {"model": "other+joy"}, {"model": 3}, {"prompt": "a"},
                 {"model": "base", "steering": []}, {"model": "base", "vllm_xargs": {"other": 1}},
                 {"model": "base", "vllm_xargs": "odd"}, {}, {"sampling_params": 3},
                 {"sampling_params": {"extra_args": {"other": 1}}}):  # fmt: skip
        assert named.put(body) is body


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"model": "base+nobody"}, "no steering is called"),
        ({"model": "base+joy@2.0"}, "take base.joy@2"),
        ({"model": "base+joy@kl=0.1"}, "kl"),
        ({"model": "base+joy@clear"}, "not calibrated"),
        ({"model": "base+user"}, "turns of a chat"),
        ({"model": "base+gated"}, "gate"),
        ({"model": "base+late"}, "--hook ffn_out"),
        ({"model": "base+joy", "steering": [{"name": "joy"}]}, "name steerings once"),
        ({"model": "other", "steering": [{"name": "joy"}]}, "no model 'other'"),
        ({"model": "base", "steering": "joy"}, "list"),
        ({"model": "base", "steering": [{"name": "joy", "more": 1}]}, "Extra"),
        ({"model": "base", "steering": [{"name": "joy"}] * 9}, "8 steerings"),
        ({"model": "base", "steering": [{"name": "joy", "scope": "user"}]}, "turns of a chat"),
        ({"model": "base", "vllm_xargs": {"steering": 3}}, "a text"),
        ({"model": "base", "vllm_xargs": {"steering": "[" * 99999}}, "no JSON"),
        ({"model": "base", "vllm_xargs": {"steering": ""}}, "no name"),
        ({"model": "base", "vllm_xargs": {"trimtab": "[]"}}, "not for clients"),
        ({"model": "base", "vllm_xargs": {"trimtab_reading": "[]"}}, "not for clients"),
        ({"sampling_params": {"extra_args": {"trimtab_reading": ""}}}, "not for clients"),
        ({"sampling_params": {"extra_args": {"trimtab": "[]"}}}, "not for clients"),
        ({"model": "base+joy", "use_beam_search": True}, "beam search"),
    ],
)
def test_what_is_not_carried_is_refused(named: Named, body: dict[str, Any], said: str) -> None:
    with pytest.raises(tt.TrimtabError, match=said):
        named.put(body)


def test_flags_have_the_sites(lm: tt.LanguageModel, steerings: dict[str, tt.Steering]) -> None:
    flag, text = inside_flags(lm, list(steerings.values()), ["final_norm"])
    sites = ["layers.1.resid", "layers.1.heads", "layers.0.ffn_out", "final_norm"]
    expected = {site: list(place) for site, place in places_of(lm.anatomy, sites).items()}
    assert flag == "--additional-config"
    assert json.loads(text) == {"trimtab": {"places": expected}}


def test_flags_on_a_card_have_graphs_in_pieces(
    lm: tt.LanguageModel, steerings: dict[str, tt.Steering], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    *_, said = inside_flags(lm, list(steerings.values()))
    flag, _, text = said.partition("=")
    assert flag == "--compilation-config"
    assert json.loads(text) == {"cudagraph_mode": "PIECEWISE"}


def application(named: Named | None) -> TestClient:
    """What comes through to an application, and how long it was said to be."""
    app = FastAPI()

    @app.post("/{path:path}")
    async def every(path: str, request: Request) -> dict[str, Any]:
        content = await request.body()
        length = int(request.headers["content-length"])
        return {"said": content.decode("latin-1"), "whole": length == len(content)}

    endpoint = InsideEndpoint()
    endpoint.named = named
    app.add_middleware(Before, endpoint=endpoint)
    return TestClient(app)


def test_bodies_come_through_whole(named: Named) -> None:
    client = application(named)
    for route in ("v1/completions", "v1/chat/completions", "v1/responses", "root/v1/messages"):
        answer = client.post(f"/{route}", json={"model": "base+joy@12", "prompt": "é" * 100_000})
        body = json.loads(answer.json()["said"].encode("latin-1"))
        assert answer.json()["whole"]
        assert (body["model"], len(body["prompt"])) == ("base", 100_000)
        assert "trimtab" in body["vllm_xargs"]
    for odd in (b"", b"{", b"[1]", b'{"model": "base"}', b"\xff", b"[" * 99_999):
        assert client.post("/v1/completions", content=odd).json()["whole"]
    for body in ({"model": "base+joy@12"}, {"steering": [{"name": "joy"}]},
                 {"vllm_xargs": {"steering": "joy"}}):  # fmt: skip
        other = client.post("/v1/embeddings", json=body)
        assert other.status_code == 400
        assert "carries no steerings" in other.json()["error"]["message"]
    for name in ("base", "other+joy"):
        assert json.loads(client.post("/v1/embeddings", json={"model": name}).json()["said"])
    for name, status in (("base+nobody", 404), ("base+joy@2.0", 400)):
        refused = client.post("/v1/completions", json={"model": name})
        assert refused.status_code == status
        assert refused.json()["error"]["code"] == status


def test_nothing_is_changed_before_the_engine_has_started() -> None:
    answer = application(None).post("/v1/completions", json={"model": "base+joy"}).json()
    assert json.loads(answer["said"]) == {"model": "base+joy"}


def test_a_start_that_could_not_steer_is_refused(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is read: no directory, no sites."""
    envs = SimpleNamespace(VLLM_SKIP_MODEL_NAME_VALIDATION=False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(envs=envs))
    monkeypatch.delenv("TRIMTAB_STEERINGS", raising=False)

    def start(more: dict[str, Any]) -> None:
        client = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=more))
        args = SimpleNamespace(api_server_count=2)
        asyncio.run(InsideEndpoint().init_state(client, None, args))

    sites = {"trimtab": {"places": {"layers.1.resid": ["model.layers.1", "output"]}}}
    with pytest.raises(tt.TrimtabError, match="TRIMTAB_STEERINGS"):
        start(sites)
    monkeypatch.setenv("TRIMTAB_STEERINGS", str(tmp_path))
    with pytest.raises(tt.TrimtabError, match="--additional-config"):
        start({})
    with pytest.raises(tt.TrimtabError, match="--api-server-count 1"):
        start(sites)
    envs.VLLM_SKIP_MODEL_NAME_VALIDATION = True
    with pytest.raises(tt.TrimtabError, match="SKIP_MODEL_NAME"):
        start(sites)
