"""One model, and replicas, over two machines by vLLM's own processes; the machines are two sets of
processes that know each other by address alone.

Blocks are not split over them here: on processors vLLM 0.32 dies of that at the first request, with
nothing of trimtab in it too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from vllm_server import PYTHON, Served, tiny_llama, written
from vllm_stock import Case, alone, answers, free_port, vllm_serve

import trimtab as tt
from helpers import steer_at
from trimtab.serving import inside_flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

PROMPTS = ["She looked at the map and asked", "Today I feel sad because of", "What is the best way"]
HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    return {
        "joy": steer_at(lm, "resid", seed=2).at(6),
        "calm": steer_at(lm, "heads", "Scale", seed=3).at(2),
        "late": steer_at(lm, "resid", layer=2, seed=5).scoped("generated[1:4]").at(9),
    }


def split(way: str) -> tuple[list[str], list[str]]:
    """The flags of the machine that listens, and of the other."""
    port = str(free_port())
    if way == "replicas":
        both = ["--data-parallel-size", "2", "--data-parallel-size-local", "1"]
        both += ["--data-parallel-address", HERE, "--data-parallel-rpc-port", port]
        return [*both, "--api-server-count", "1"], [*both, "--data-parallel-start-rank", "1"]
    both = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", HERE]
    both += ["--master-port", port]
    return [*both, "--node-rank", "0"], [*both, "--node-rank", "1"]


@pytest.fixture(scope="module", params=["replicas", "tensor"])
def running(
    request: pytest.FixtureRequest,
    lm: tt.LanguageModel,
    steerings: dict[str, tt.Steering],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("machines")
    model, directory = written(lm, steerings, folder)
    flags = inside_flags(lm, list(steerings.values()))
    first, second = split(request.param)
    more = {"TRIMTAB_STEERINGS": str(directory), "VLLM_PLUGINS": "trimtab"}
    with vllm_serve(
        model, folder, more, *flags, *first, port=free_port(), headless=[*flags, *second]
    ) as server:
        yield server


def test_each_is_what_it_is_alone(
    running: Served, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    """Many at once, under steerings of their own and under none."""
    draw = random.Random(0)
    cases: list[Case] = []
    for _ in range(24):
        names = draw.choice([[], ["joy"], ["calm"], ["late"], ["joy", "late"]])
        dials = [(name, draw.choice([-4.0, 3.0, 8.0])) for name in names]
        cases.append((draw.choice(PROMPTS), dials))
    expected = alone(lm, steerings, cases)
    assert answers(running, cases) == expected
    assert len(set(expected)) > 8
