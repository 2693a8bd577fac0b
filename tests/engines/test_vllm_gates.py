"""Gates over vLLM: of each kind, on many prompts at once, beside what has none: what is written and
what is told of the gates is what `generate` makes of each prompt alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from vllm_server import PYTHON, Served, asked, served, tiny_llama

import trimtab as tt
from helpers import steer, steer_at
from operator_formulas import random_operator
from trimtab.model.gate_scores import score_prompts
from trimtab.steering import READS_LAST, Condition, Gate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

SHARED = "The notes below were written over a long summer by the sea, and they do not all agree. "
PROMPTS = [
    "She looked at the map and asked", "Today I feel sad because of", "What is the best way",
    *(SHARED + end for end in ("Read them", "She said that", "Dear sir", "It is late")),
]  # fmt: skip
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return tiny_llama()


def at_median(lm: tt.LanguageModel, site: str, seed: int, **options: Any) -> Condition:
    """A condition that holds for about half of the prompts."""
    direction = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    made = Condition(site, direction, 0.0, score="projection", **options)
    chat = "user" in str(made.reads)
    texts = lm.encode(lm.prompts(CHATS if chat else PROMPTS, chat))
    scores = score_prompts(lm.anatomy, lm.marks, Gate((made,), "two-pass"), texts)[0]
    ordered = scores.sort().values
    threshold = float((ordered[2] + ordered[3]) / 2)
    return Condition(site, direction, threshold, score="projection", **options)


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    push = steer_at(lm, "resid", layer=2, seed=2).at(9)
    turn = steer(
        lm, *((f"layers.{i}.ffn_norm", random_operator("Turn", 6, 64)) for i in (1, 2, 3)),
        alpha=140.0,
    )  # fmt: skip
    mean = at_median(lm, "layers.3.resid", 1)
    last = at_median(lm, "layers.0.resid", 2, reads=READS_LAST)
    low = at_median(lm, "layers.1.attn_out", 3)
    user = at_median(lm, "layers.1.resid", 4, reads="user")
    word = Condition("layers.1.resid", mean.direction, 0.0, score="projection", fires="below")
    return {
        "free": steer_at(lm, "resid", layer=1, seed=7).scoped("generated").at(6),
        "twice": push.gated(Gate((mean, last), "two-pass", ("or", 0, ("not", 1)))),
        "asked": turn.gated(Gate((user,), "two-pass")),
        "late": push.scoped("generated").gated(Gate((low,), "latched")),
        "ending": push.scoped("last").gated(Gate((last,), "latched")),
        "word": push.gated(Gate((word,), "token")),
        "words": turn.scoped("generated").gated(Gate((last, low), "token", ("or", 0, 1))),
        "below": steer_at(lm, "resid", layer=0, seed=8).at(3),
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["one engine", "two replicas"])
def running(
    request: pytest.FixtureRequest,
    lm: tt.LanguageModel,
    steerings: dict[str, tt.Steering],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    options = ["--vllm", "max_num_batched_tokens=64"]
    options += ["--vllm", f"data_parallel_size={request.param}"]
    with served(lm, steerings, folder, *options) as server:
        yield server


STACKS = [
    [], ["free"], ["twice"], ["late"], ["ending"], ["word"], ["words"], ["free", "late"],
    ["twice", "word"], ["below", "word"], ["below", "twice"], ["late", "words", "free"],
]  # fmt: skip


def test_gates_of_each_kind(
    running: Served, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    cases = [(prompt, names) for prompt in PROMPTS for names in STACKS]
    cases += [(chat, names) for chat in CHATS for names in (["asked"], ["asked", "word"])]
    random.Random(0).shuffle(cases)

    def ask(case: tuple[Any, list[str]]) -> tuple[str, list[Any]]:
        prompt, names = case
        model = "+".join(["base", *names])
        if isinstance(prompt, str):
            path, body = "completions", asked(prompt, model=model)
        else:
            path, body = "chat/completions", asked(None, model=model, messages=prompt)
            del body["prompt"]
        answer = running.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        text = choice["text"] if isinstance(prompt, str) else choice["message"]["content"]
        return text, [one.get("gate") for one in choice["steering"]]

    fired = dict[str, set[bool]]()
    for _ in range(2):  # from nothing, and from cached blocks
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(ask, cases))
        for (prompt, names), (text, gates) in zip(cases, found, strict=True):
            stack = [steerings[name] for name in names]
            (done,) = lm.generate(
                [prompt], chat=not isinstance(prompt, str), steering=[stack], max_new_tokens=10
            )
            assert text == done.text, (prompt, names)
            told = [gate for gate in gates if gate is not None]
            assert len(told) == len(done.gates)
            whose = [name for name in names if steerings[name].gate is not None]
            for name, gate, expected in zip(whose, told, done.gates, strict=True):
                assert gate["kind"] == expected.kind
                if expected.kind == "token":
                    assert gate["fired"] == bool(expected.prompt_tokens), (prompt, names)
                else:
                    assert gate["fired"] == expected.fired, (prompt, names)
                assert gate["scores"] == pytest.approx(list(expected.scores), abs=1e-3)
                fired.setdefault(name, set()).add(gate["fired"])
    assert all(len(fired[name]) == 2 for name in ("twice", "late", "ending", "asked")), fired
    texts = {names: {text for (_, of), (text, _) in zip(cases, found, strict=True) if of == [names]}
             for names in ("twice", "word", "late")}  # fmt: skip
    assert all(len(of) > 2 for of in texts.values())


def test_what_gates_cannot_do_here(running: Served) -> None:
    for model, said in (("base+below+ending", "two-pass"), ("base+asked", "no turn of a chat")):
        answer = running.client.post("completions", json=asked("She looked", model=model))
        assert answer.status_code == 400, answer.text
        assert said in answer.json()["error"]["message"]
    assert running.client.post("completions", json=asked("a", model="base+word")).status_code == 200
    assert running.health == 200
