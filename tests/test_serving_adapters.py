"""Steerings as adapters of an engine, as far as no engine is needed: what is refused and why, what
is made once, and that nothing is deleted that may still be read."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trimtab as tt
from adapters import one
from helpers import language_model, plain_logits, steer_at, token_ids
from trimtab.serving import Adapted, Adapters, making
from trimtab.serving.jobs import FullError
from trimtab.serving.making import Maker, digest_of, refuse_unlike


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture
def heads(lm: tt.LanguageModel) -> tt.Steering:
    return one(lm, "layers.1.heads", seed=3).at(2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda lm: steer_at(lm, "resid"), "adds a constant"),
        (lambda lm: one(lm, "layers.1.attn_norm", "Turn"), "not linear"),
        (lambda lm: one(lm, "layers.1.heads").scoped("generated"), "all tokens alike"),
        (lambda lm: one(lm, "layers.1.resid", "Rotate"), "fit it at ffn_out, or attach it"),
        (lambda lm: one(lm, "layers.1.heads"), ""),
        (lambda lm: one(lm, "layers.1.heads").at(0), ""),
    ],
)
def test_what_adapters_carry(lm: tt.LanguageModel, make: Any, said: str) -> None:
    reason = Adapted(lm)(make(lm))
    assert said in reason
    assert bool(reason) == bool(said)


def test_what_the_engine_would_leave_out_is_refused(
    lm: tt.LanguageModel, heads: tt.Steering
) -> None:
    carried = Adapted(lm)
    carried.start([heads], ["ffn_norm"], None)
    assert carried.modules == ["gate_proj", "o_proj", "up_proj"]
    assert not carried(heads)
    assert not carried(one(lm, "layers.0.ffn_norm", "Rotate"))
    assert "--hook attn_norm" in carried(one(lm, "layers.0.attn_norm", "Rotate"))
    small = Adapted(lm)
    small.start([one(lm, "layers.1.ffn_norm", "Rotate")], ["heads"], None)
    assert small.rank == 8
    assert "--vllm max_lora_rank=32" in small(heads)
    with pytest.raises(tt.TrimtabError, match="need 32"):
        Adapted(lm).start([heads], [], 8)
    with pytest.raises(tt.TrimtabError, match="--hook heads"):
        Adapted(lm).start([], [], None)


def test_a_variant_is_known_by_what_it_does(lm: tt.LanguageModel, heads: tt.Steering) -> None:
    other = one(lm, "layers.1.heads", seed=4).at(2)
    said = [
        digest_of([heads], "base"),
        digest_of([other], "base"),
        digest_of([heads], "another"),
        digest_of([heads.at(2.5)], "base"),
        digest_of([heads, other], "base"),
        digest_of([other, heads], "base"),
    ]
    assert len(set(said)) == len(said)
    assert digest_of([heads.at(2)], "base") == digest_of([heads.at(2.0)], "base") == said[0]


def test_an_adapter_that_is_left_out_shows(lm: tt.LanguageModel, heads: tt.Steering) -> None:
    ids = token_ids("She looked at the map")

    def expects(*steerings: tt.Steering) -> torch.Tensor:
        with lm.steered(*steerings):
            return plain_logits(lm.model, ids)[-1].float().log_softmax(-1)

    plain, steered = expects(), expects(heads.at(6))
    half = expects(heads.at(3))
    likeliest = steered.topk(20).indices.tolist()

    def told(by: torch.Tensor) -> dict[int, float]:
        return {token: float(by[token]) for token in likeliest}

    refuse_unlike(told(steered + 1e-4), plain, steered, torch.float32, "else")
    for wrong in (plain, half, steered * torch.nan):
        with pytest.raises(tt.TrimtabError, match="off by .*; serve it baked"):
            refuse_unlike(told(wrong), plain, steered, torch.float32, "serve it baked")


# -- with an engine that only keeps an account ----------------------------------------------------


@dataclass
class Account:
    """Stands for an engine: what it was given, and whether a directory was gone too early."""

    device: str = "cpu"
    held: dict[int, Path] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)

    @property
    def vllm_config(self) -> Any:
        lora = SimpleNamespace(max_loras=2, max_lora_rank=32)
        device = SimpleNamespace(device_type=self.device)
        return SimpleNamespace(device_config=device, lora_config=lora)

    async def add_lora(self, request: Any) -> bool:
        assert (Path(request.path) / "adapter_config.json").is_file()
        assert request.lora_int_id not in self.numbers
        self.numbers.append(request.lora_int_id)
        self.held[request.lora_int_id] = Path(request.path)
        return True

    async def remove_lora(self, number: int) -> bool:
        await asyncio.sleep(0)
        assert self.held.pop(number).is_dir()  # it leaves memory before it leaves the disk
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Account:
    async def proved(*given: Any) -> None:
        pass

    def request(self: Maker, name: str, number: int, directory: Path) -> Any:
        return SimpleNamespace(name=name, lora_int_id=number, path=str(directory))

    monkeypatch.setattr(Maker, "_prove", proved)
    monkeypatch.setattr(Maker, "request", request)
    monkeypatch.setattr("trimtab.serving.making.vllm_version", lambda: "0.32.0")
    return Account()


def job(*steerings: tt.Steering) -> Any:
    return SimpleNamespace(acting=steerings)


def adapters_of(lm: tt.LanguageModel, heads: tt.Steering, most: int) -> Adapters:
    """Room for adapters, once it is known that these heads are steered."""
    carried = Adapted(lm)
    carried.start([heads], [], None)
    return Adapters(lm, carried, most)


def test_adapters_are_made_once_kept_and_left(
    lm: tt.LanguageModel, heads: tt.Steering, engine: Account
) -> None:
    adapters = adapters_of(lm, heads, 2)
    assert adapters.arguments["max_lora_rank"] == 32
    assert adapters.arguments["lora_target_modules"] == ["o_proj"]

    async def go() -> None:
        await adapters.begin(engine)
        async with AsyncExitStack() as open_jobs:
            first = await open_jobs.enter_async_context(adapters.given(job(heads.at(1))))
            again = await open_jobs.enter_async_context(adapters.given(job(heads.at(1.0))))
            assert first.adapter is again.adapter
            config = json.loads((Path(first.adapter.path) / "adapter_config.json").read_text())
            assert (config["r"], config["lora_alpha"]) == (32, 32)
            async with adapters.given(job(heads.at(2))) as second:
                with pytest.raises(FullError, match="2 variants"):
                    async with adapters.given(job(heads.at(3))):
                        pass
            async with adapters.given(job(heads.at(3))) as third:
                assert Path(third.adapter.path).is_dir()
                assert not Path(second.adapter.path).exists()
                assert Path(first.adapter.path).is_dir()
        async with adapters.given(job(heads.at(2))) as later:
            assert later.adapter.path == second.adapter.path
            assert later.adapter.lora_int_id != second.adapter.lora_int_id
        with pytest.raises(tt.TrimtabError, match="all tokens alike"):
            async with adapters.given(job(heads.scoped("last"))):
                pass

    asyncio.run(go())
    folder = Path(engine.held[1]).parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in engine.held.values()
    )
    adapters.close()
    assert not folder.exists()


def test_an_adapter_is_made_to_its_end_where_its_request_leaves(
    lm: tt.LanguageModel, heads: tt.Steering, engine: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that makes it steers the model, and writes what another request will read."""
    adapters, engine = adapters_of(lm, heads, 8), Account("cuda")
    steered, go_on, expects = threading.Event(), threading.Event(), making._expects
    calls: list[str] = []

    def held_up(language_model: tt.LanguageModel, text: Sequence[int]) -> torch.Tensor:
        calls.append(threading.current_thread().name)
        if len(calls) == 2:  # plain, and then steered
            steered.set()
            assert go_on.wait(30)
        return expects(language_model, text)

    async def path_of(steering: tt.Steering) -> Path:
        async with adapters.given(job(steering)) as given:
            return Path(given.adapter.path)

    async def go() -> None:
        await adapters.begin(engine)
        monkeypatch.setattr(making, "_expects", held_up)
        leaving = asyncio.create_task(path_of(heads.at(1)))
        await asyncio.to_thread(steered.wait, 30)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        others = [asyncio.create_task(path_of(heads.at(dial))) for dial in (3, 1)]
        await asyncio.sleep(0.3)  # in which neither begins
        assert len(calls) == 2
        go_on.set()
        for path in await asyncio.gather(*others):
            assert (path / "adapter_config.json").is_file()
        assert len(engine.numbers) == 2

    asyncio.run(go())
    adapters.close()


def test_a_proof_is_not_broken_off(
    lm: tt.LanguageModel, heads: tt.Steering, engine: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, engine = adapters_of(lm, heads, 8), Account("cuda")

    async def go() -> None:
        await adapters.begin(engine)
        proving, go_on = asyncio.Event(), asyncio.Event()

        async def prove(*given: Any) -> None:
            proving.set()
            await go_on.wait()

        async def number_of() -> int:
            async with adapters.given(job(heads)) as given:
                return int(given.adapter.lora_int_id)

        monkeypatch.setattr(Maker, "_prove", prove)
        leaving = asyncio.create_task(number_of())
        await proving.wait()
        while not leaving.done():
            leaving.cancel()
            await asyncio.sleep(0)
        later = asyncio.create_task(number_of())
        go_on.set()
        assert engine.held[await later].is_dir()
        assert len(engine.held) == 1

    asyncio.run(go())
    adapters.close()


@pytest.mark.parametrize(
    ("device", "version", "given"),
    [("cpu", "0.32.0", True), ("cpu", "0.33.0", False), ("cuda", "0.32.0", False)],
)
def test_requests_that_are_not_steered_have_a_place_of_zeros_where_they_need_one(
    lm: tt.LanguageModel, heads: tt.Steering, engine: Account, device: str, version: str,
    given: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("trimtab.serving.making.vllm_version", lambda: version)
    adapters, engine = adapters_of(lm, heads, 2), Account(device)

    async def go() -> list[Any]:
        await adapters.begin(engine)
        found = []
        for steerings in ((), (heads.at(0),)):
            async with adapters.given(job(*steerings)) as one_given:
                found.append(one_given.adapter)
        return found

    for adapter in asyncio.run(go()):
        assert (adapter is not None) == given
        if adapter is not None:
            tensors = load_file(Path(adapter.path) / "adapter_model.safetensors")
            assert all(not tensor.any() for tensor in tensors.values())
            assert {name.split(".")[-3] for name in tensors} == {"o_proj"}
    if given:
        config = engine.vllm_config
        config.lora_config.max_loras = 1
        with pytest.raises(tt.TrimtabError, match="max_loras=2"):
            adapters.check(config)
    adapters.close()
