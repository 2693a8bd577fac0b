"""Steerings as exact adapters of a stock `vllm serve`, made when they are first asked for.

Asked over HTTP by OpenAI's own client; what each variant writes is what `generate` writes of it
alone, and what is not carried is a 404.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from vllm_server import PYTHON, Served, asked, text_of, tiny_llama, written
from vllm_stock import ON, Case, alone, answers, free_port, vllm_serve, whole

import trimtab as tt
from adapters import one
from helpers import steer_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

PROMPTS = ["She looked at the map and asked", "Today I feel sad because of", "What is the best way"]
DIALS = (-1.5, 0.5, 2.0)
#: One place more than there are to be variants, because of vLLM 0.32 on a CPU.
VARIANTS = 16
STOCK = {"VLLM_PLUGINS": "trimtab_lora", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    return {
        "heads": one(lm, "layers.1.heads", seed=3).at(2),
        "inner": one(lm, "layers.2.ffn_in", seed=4).at(2),
        "taken": one(lm, "layers.2.ffn_out", "Ablate", seed=6).at(1),
        "joy": steer_at(lm, "resid"),
        "norm": one(lm, "layers.1.attn_norm", "Rotate", seed=5).at(90),
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
    (directory / "not a name.txt").write_text("")
    flags = ["--enable-lora", "--max-lora-rank", "64", "--max-loras", str(VARIANTS + 1)]
    flags += ["--lora-target-modules", "o_proj", "down_proj"]
    if request.param > 1:
        flags += ["--data-parallel-size", str(request.param), "--api-server-count", "1"]
    more = {"TRIMTAB_STEERINGS": str(directory), **STOCK}
    with vllm_serve(model, folder, more, *flags, port=free_port()) as server:
        yield server


def test_variants_beside_each_other_and_beside_nothing(
    running: Served, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    """Each at several dials, a stack, and the model alone, in the same batches."""
    draw = random.Random(0)
    cases: list[Case] = []
    for _ in range(60):
        names = draw.choice([[], *([name] for name in ("heads", "inner", "taken"))])
        cases.append((draw.choice(PROMPTS), [(name, draw.choice(DIALS)) for name in names]))
    cases.append((PROMPTS[0], [("heads", 2.0), ("taken", 1.0)]))
    found = answers(running, cases)
    assert found == alone(lm, steerings, cases)
    assert len(set(found)) > 15
    client = openai.OpenAI(base_url=running.address, api_key="none")
    listed = {model.id for model in client.models.list().data}
    assert {"base", "base+heads@2", "base+heads@2+taken@1"} <= listed
    told = running.client.get("steerings").json()["data"]
    assert [each["name"] for each in told] == sorted(steerings)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("base+joy@3", "adds a constant"),
        ("base+norm", "--lora-target-modules"),
        ("base+nobody", "no steering is called"),
        ("base+../steerings/heads", "no name of a steering"),
        ("base+/etc/passwd", "no name of a steering"),
        ("base+heads@2.0", "take base+heads@2"),
        ("base+heads@+2", "number"),
        ("base+heads@-0", "take base+heads@0"),
        ("base+heads@0", "does nothing"),
        ("base+heads@nan", "nan"),
        ("base+heads@1e999", "number"),
        ("base+heads@kl=0.1", "kl"),
        ("base+heads@3e38", "not finite"),
        ("other+heads@2", "does not exist"),
        ("heads@2", "does not exist"),
    ],
)
def test_what_is_not_carried_is_no_model(running: Served, model: str, said: str) -> None:
    for route in ("completions", "chat/completions"):
        body: dict[str, Any] = asked("a", model=model)
        if "chat" in route:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        answer = running.client.post(route, json=body)
        assert answer.status_code == 404, answer.text
        assert said in answer.json()["error"]["message"]


def test_nobody_loads_an_adapter_from_a_path(running: Served, tmp_path: Path) -> None:
    body = {"lora_name": "mine", "lora_path": str(tmp_path)}
    for path in ("v1/load_lora_adapter", "v1/unload_lora_adapter", "adapters"):
        answer = running.client.post(str(running.client.base_url.join(f"/{path}")), json=body)
        assert answer.status_code == 404
        assert "closed by trimtab" in answer.json()["error"]["message"]
    gone = running.client.delete(str(running.client.base_url.join("/adapters/base+heads@2")))
    assert "closed by trimtab" in gone.json()["error"]["message"]


def test_there_is_a_most_of_variants(
    running: Served, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    """The last that fits is right, the next is told of, and none before it is lost."""
    full = 0
    for number in range(VARIANTS + 2):
        body = asked("a", model=f"base+heads@3.{number}1")
        answer = running.client.post("completions", json=body)
        if answer.status_code == 404:
            assert "variants are served" in answer.json()["error"]["message"]
            full += 1
    assert full >= 2
    body = asked(PROMPTS[1], model="base+heads@2", **ON)
    answer = running.client.post("completions", json=body)
    expected = text_of(lm, PROMPTS[1], steerings["heads"].at(2))
    assert whole(answer.json()["choices"][0]["text"]) == whole(expected)
    answer = running.client.post("completions", json=asked(PROMPTS[1], **ON))
    assert whole(answer.json()["choices"][0]["text"]) == whole(text_of(lm, PROMPTS[1]))
