"""`trimtab serve --engine vllm --tier lora`: exact adapters on a vLLM that takes nothing of ours.

Variants are made when they are asked for, more of them than the engine has places for, beside
requests that are not steered; what each writes is what `generate` writes of it alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm_server import CHANGE, PYTHON, Served, asked, served, text_of, tiny_llama

import trimtab as tt
from adapters import one
from helpers import steer_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

PROMPTS = ["She looked at the map and asked", "Today I feel sad because of", "What is the best way"]
DIALS = (-1.5, 0.5, 2.0, 3.0)


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    return {
        "heads": one(lm, "layers.1.heads", seed=3).at(2),
        "inner": one(lm, "layers.2.ffn_in", seed=4).at(2),
        "turned": one(lm, "layers.1.attn_norm", "Rotate", seed=5).at(90),
        "taken": one(lm, "layers.2.ffn_out", "Ablate", seed=6).at(1),
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def running(
    request: pytest.FixtureRequest,
    lm: tt.LanguageModel,
    steerings: dict[str, tt.Steering],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    options = ("--tier", "lora", "--vllm", "max_loras=3", "--variants", "12", "--rows", "8")
    options += ("--vllm", f"tensor_parallel_size={request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(request.param))))
        with served(lm, steerings, tmp_path_factory.mktemp("served"), *options) as server:
            yield server


def test_variants_beside_each_other_and_beside_nothing(
    running: Served, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    """More variants than the engine has places for, and than are kept; a stack; dial 0; base
    requests all along, which on this vLLM would be given the adapter of the last place."""
    draw = random.Random(0)
    cases: list[tuple[str, list[tuple[str, float]]]] = []
    for _ in range(60):
        names = draw.choice([[], [], *([name] for name in steerings), ["heads", "taken"]])
        cases.append((draw.choice(PROMPTS), [(name, draw.choice(DIALS)) for name in names]))
    cases.append((PROMPTS[0], [("heads", 0.0)]))

    def ask(case: tuple[str, list[tuple[str, float]]]) -> str:
        prompt, names = case
        model = "+".join(["base", *(f"{name}@{dial:g}" for name, dial in names)])
        answer = running.client.post("completions", json=asked(prompt, model=model))
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, cases))
    expected = [
        text_of(lm, prompt, *(steerings[name].at(dial) for name, dial in names))
        for prompt, names in cases
    ]
    assert found == expected
    assert len(set(found)) > 15


def test_adding_and_replacing(running: Served, lm: tt.LanguageModel, tmp_path: Path) -> None:
    def put(steering: tt.Steering) -> Any:
        file = steering.save(tmp_path / "new.safetensors", overwrite=True)
        return running.client.put("steerings/new", content=file.read_bytes(), headers=CHANGE)

    texts = []
    for seed in (11, 12):  # the second takes the name of the first
        steering = one(lm, "layers.1.heads", seed=seed).at(3)
        assert put(steering).status_code == 200
        answer = running.client.post("completions", json=asked(PROMPTS[2], model="base+new"))
        texts.append(answer.json()["choices"][0]["text"])
        assert texts[-1] == text_of(lm, PROMPTS[2], steering)
    assert len(set(texts)) == 2
    for steering, said in (
        (steer_at(lm, "resid"), "adds a constant"),
        (one(lm, "layers.1.heads").scoped("generated"), "all tokens alike"),
        (one(lm, "layers.1.ffn_norm", "Rotate"), "--hook ffn_norm"),
    ):
        refused = put(steering)
        assert refused.status_code == 400
        assert said in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (asked("a", steering=[{"name": "heads", "scope": "generated"}]), "all tokens alike"),
        (asked("a", model="base+heads@kl=0.1"), "kl"),
        (asked("a", model="base+heads@3e38"), "not finite"),
    ],
)
def test_what_an_adapter_cannot_do(running: Served, body: dict[str, Any], said: str) -> None:
    answer = running.client.post("completions", json=body)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]
    assert running.client.post("completions", json=asked("a")).status_code == 200
    assert running.health == 200
