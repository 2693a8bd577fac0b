"""Steerings by trimtab's plugin in a stock `vllm serve`, named as its model and in `vllm_xargs`.

Asked over HTTP by OpenAI's own client, many at once; what each writes is what `generate` writes of
it alone. The flags are those that `trimtab serve --check` prints.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from vllm_server import NEW, PYTHON, Served, asked, text_of, tiny_llama, written
from vllm_stock import ON, alone, free_port, vllm_serve, whole

import trimtab as tt
from helpers import steer, steer_at
from operator_formulas import random_operator
from trimtab.serving import inside_flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

SHARED = "The notes below were written over a long summer by the sea, and they do not all agree. "
PROMPTS = ["She looked at the map and asked", SHARED + "Read them", SHARED + "It is late"]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    turn = random_operator("Turn", 6, 64)
    return {
        "joy": steer_at(lm, "resid", seed=2).at(6),
        "calm": steer_at(lm, "heads", "Scale", seed=3).at(2),
        "late": steer_at(lm, "resid", layer=2, seed=5).scoped("generated[1:4]").at(9),
        "turn": steer(lm, *((f"layers.{i}.ffn_norm", turn) for i in range(4)), alpha=80.0),
        "user": steer_at(lm, "resid", seed=6).scoped("user").at(40),
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["one engine", "two replicas in one server"])
def running(
    request: pytest.FixtureRequest,
    lm: tt.LanguageModel,
    steerings: dict[str, tt.Steering],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("stock")
    model, directory = written(lm, steerings, folder)
    flags = inside_flags(lm, list(steerings.values()))
    flags += ["--data-parallel-size", str(request.param), "--api-server-count", "1"]
    flags += ["--enable-scale-out"]  # the route for token ids too
    more = {"TRIMTAB_STEERINGS": str(directory), "VLLM_PLUGINS": "trimtab"}
    with vllm_serve(model, folder, more, *flags, port=free_port()) as server:
        yield server


def test_each_is_what_it_is_alone(
    running: Served, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    """In each way of naming steerings, beside what is not steered, cold and from cached blocks."""
    client = openai.OpenAI(base_url=running.address, api_key="none")
    draw = random.Random(0)
    cases: list[tuple[str, list[tuple[str, float]], str]] = []
    for _ in range(60):
        names = draw.choice([[], ["joy"], ["calm"], ["late"], ["turn"], ["joy", "late"]])
        dials = [(name, draw.choice([-4.0, 3.0, 8.0])) for name in names]
        cases.append((draw.choice(PROMPTS), dials, draw.choice(["model", "xargs", "json"])))

    def ask(case: tuple[str, list[tuple[str, float]], str]) -> str:
        prompt, names, way = case
        said, model = "+".join(f"{name}@{dial:g}" for name, dial in names), "base"
        more: dict[str, Any] = {}
        if names and way == "model":
            model = f"base+{said}"
        elif names and way == "xargs":
            more = {"vllm_xargs": {"steering": said}}
        elif names:
            every = [{"name": name, "dial": dial} for name, dial in names]
            more = {"vllm_xargs": {"steering": json.dumps(every)}}
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=NEW, temperature=0, extra_body={**more, **ON}
        )
        return whole(answer.choices[0].text)

    expected = alone(lm, steerings, [(prompt, names) for prompt, names, _ in cases])
    for _ in range(2):
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(ask, cases)) == expected
    assert len(set(expected)) > 15


def test_chats_streams_and_scopes(
    running: Served, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    client = openai.OpenAI(base_url=running.address, api_key="none")
    messages: Any = [{"role": "user", "content": "Why?"}]
    more = {"steering": [{"name": "joy", "dial": 8, "scope": "generated"}]}
    stream = client.chat.completions.create(
        model="base", messages=messages, max_tokens=NEW, temperature=0, stream=True,
        extra_body={**more, **ON},
    )  # fmt: skip
    found = "".join(piece.choices[0].delta.content or "" for piece in stream if piece.choices)
    expected = text_of(lm, messages, steerings["joy"].at(8).scoped("generated"))
    assert whole(found) == whole(expected) != whole(text_of(lm, messages))


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (asked("a", model="base+nobody"), 404, "no steering is called"),
        (asked("a", model="base+joy@kl=0.1"), 400, "kl"),
        (asked("a", model="base+user"), 400, "turns of a chat"),
        (asked("a", model="base+joy", use_beam_search=True), 400, "beam search"),
        (asked("a", vllm_xargs={"trimtab": "[]"}), 400, "not for clients"),
        (asked("a", model="other+joy"), 404, "does not exist"),
    ],
)
def test_what_cannot_be_done_gets_a_line(
    running: Served, body: dict[str, Any], status: int, said: str
) -> None:
    answer = running.client.post("completions", json=body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]


def test_other_routes_leave_nothing_out(running: Served) -> None:
    """SageMaker's puts another name, or none, in the model's place; a batch is answered elsewhere
    than in the routes that carry steerings."""
    root = running.client.base_url
    closed = running.client.post(str(root.join("/invocations")), json=asked("a", model="base+joy"))
    assert closed.status_code == 404
    assert "closed by trimtab" in closed.json()["error"]["message"]
    params = {"extra_args": {"steering": "joy"}, "max_tokens": 1}
    told = running.client.post(
        str(root.join("/inference/v1/generate")), json={"token_ids": [5], "sampling_params": params}
    )
    assert told.status_code == 400, told.text
    assert "not carried on this route" in told.json()["error"]["message"]
    messages = [[{"role": "user", "content": "Why?"}]]
    for more in ({"model": "base+joy"}, {"model": "base", "vllm_xargs": {"steering": "joy"}}):
        answer = running.client.post("chat/completions/batch", json={"messages": messages, **more})
        assert answer.status_code == 400
        assert "carries no steerings" in answer.json()["error"]["message"]
