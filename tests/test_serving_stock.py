"""Steerings as adapters of vLLM's own command, as far as no engine is needed: names, what is
refused before it starts and while it runs, what is made once, and which routes are closed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

import trimtab as tt
from adapters import one
from helpers import language_model, steer_at
from trimtab.serving import Library, flags_of
from trimtab.serving.making import Maker, digest_of
from trimtab.serving.names import Asked, plainly_asked
from trimtab.serving.stock import (
    Closed,
    Resolver,
    carried_by,
    folder_in,
    most_variants,
    opened,
    refuse_all,
    refuse_start,
)


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("base", None),
        ("other+joy", None),
        ("base+joy", [Asked("joy")]),
        ("base+joy@12", [Asked("joy", 12.0)]),
        ("base+joy@-0.5+calm@clear", [Asked("joy", -0.5), Asked("calm", "clear")]),
        ("also+joy@1e-05", [Asked("joy", 1e-5)]),
        ("base+joy@kl=0.1", [Asked("joy", kl=0.1)]),
    ],
)
def test_a_variant_has_one_name(name: str, asked: list[Asked] | None) -> None:
    assert plainly_asked(name, ["base", "also"]) == asked


@pytest.mark.parametrize(
    "name",
    ["base+joy@12.0", "base+joy@1.20", "base+joy@012", "base+joy@-0", "base+joy@ 12",
     "base+joy@1_2", "base+joy@1e2", "base+joy@.5", "base+joy@12+calm@2.0", "base+joy@kl=0.10",
     "base+joy@inf", "base+../joy", "base+joy/../calm", "base+", "base++joy", "base+joy\x00",
     "base+joy\n",
     "base+" + "a" * 65, "base" + "+joy" * 9],
)  # fmt: skip
def test_odd_names_and_dials_are_refused(name: str) -> None:
    try:
        asked = plainly_asked(name, ["base"])
    except tt.TrimtabError:
        return
    assert asked == [Asked("joy", "inf")]  # which is no strength of any steering


# -- before it starts -----------------------------------------------------------------------------


def config(device: str = "cpu", **changes: Any) -> Any:
    lora = {"max_loras": 4, "target_modules": ["o_proj"], "max_lora_rank": 32}
    own = {name: changes.pop(name) for name in list(changes) if name in lora}
    said = {"lora_config": SimpleNamespace(**{**lora, **own}), **changes}
    model = SimpleNamespace(quantization=said.pop("quantization", None))
    device_config = SimpleNamespace(device_type=device)
    return SimpleNamespace(model_config=model, device_config=device_config, **said)


def envs(updating: bool = True, skipping: bool = False) -> Any:
    return SimpleNamespace(
        VLLM_ALLOW_RUNTIME_LORA_UPDATING=updating, VLLM_SKIP_MODEL_NAME_VALIDATION=skipping
    )


def test_an_engine_in_which_a_variant_could_run_unsteered_is_refused() -> None:
    around = {"TRIMTAB_STEERINGS": "steerings"}
    refuse_start(config(), around, envs())
    for said, case in (
        ("TRIMTAB_STEERINGS", (config(), {}, envs())),
        ("--enable-lora", (config(lora_config=None), around, envs())),
        ("--lora-target-modules", (config(target_modules=None), around, envs())),
        ("RUNTIME_LORA_UPDATING", (config(), around, envs(updating=False))),
        ("SKIP_MODEL_NAME", (config(), around, envs(skipping=True))),
        ("quantised", (config(quantization="fp8"), around, envs())),
    ):
        with pytest.raises(tt.TrimtabError, match=said):
            refuse_start(*case)


@pytest.mark.parametrize(
    ("device", "version", "said", "most"),
    [
        ("cpu", "0.32.0", {}, 3),
        ("cpu", "0.32.0", {"TRIMTAB_VARIANTS": "2"}, 2),
        ("cpu", "0.33.0", {}, 256),
        ("cuda", "0.32.0", {"TRIMTAB_VARIANTS": "9"}, 9),
    ],
)
def test_the_last_place_stays_empty_where_it_leaks(
    device: str, version: str, said: dict[str, str], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serving.making.vllm_version", lambda: version)
    assert most_variants(config(device), said) == most


def test_odd_limits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.serving.making.vllm_version", lambda: "0.32.0")
    with pytest.raises(tt.TrimtabError, match="--max-loras 2"):
        most_variants(config(max_loras=1), {})
    for odd in ("0", "-1", "many", "1.5"):
        with pytest.raises(tt.TrimtabError, match="TRIMTAB_VARIANTS"):
            most_variants(config(), {"TRIMTAB_VARIANTS": odd})


def test_flags_are_those_that_steerings_need(lm: tt.LanguageModel) -> None:
    heads, norm = one(lm, "layers.1.heads", seed=3).at(2), one(lm, "layers.1.ffn_norm", "Rotate")
    found = flags_of(lm, [heads, steer_at(lm, "resid"), norm])
    assert found == [
        "--enable-lora", "--max-lora-rank", "32",
        "--lora-target-modules", "gate_proj", "o_proj", "up_proj",
    ]  # fmt: skip
    carried = carried_by(lm, found[4:], 32)
    assert not carried(heads)
    assert not carried(norm)
    assert "by trimtab's plugin" in carried(steer_at(lm, "resid"))
    small = carried_by(lm, ["up_proj"], 8)
    assert "o_proj among --lora-target-modules" in small(heads)
    assert "--max-lora-rank 32" in carried_by(lm, ["o_proj"], 8)(heads)


def test_steerings_are_read_from_the_directory_alone(
    lm: tt.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lm.save_pretrained(tmp_path / "model")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    steer_at(lm, "resid").save(shelf / "joy.safetensors")
    monkeypatch.setenv("TRIMTAB_STEERINGS", str(shelf))
    about = SimpleNamespace(
        model=str(model), dtype=torch.float32, revision=None, trust_remote_code=False
    )
    read, library = opened(SimpleNamespace(model_config=about))
    assert list(library.held) == ["joy"]
    assert read.identity.digest == lm.identity.digest
    with pytest.raises(tt.TrimtabError, match="no steering is carried: .*adds a constant"):
        refuse_all(library, carried_by(read, ["o_proj"], 8))
    os.symlink(tmp_path / "model" / "model.safetensors", shelf / "out.safetensors")
    with pytest.raises(tt.TrimtabError, match="leads out of"):
        opened(SimpleNamespace(model_config=about))


def test_adapters_lie_where_they_are_to(tmp_path: Path) -> None:
    first, second = folder_in(str(tmp_path)), folder_in(str(tmp_path))
    assert first.parent == second.parent == tmp_path
    assert first != second  # of two servers that have the same place
    with pytest.raises(tt.TrimtabError, match="TRIMTAB_ADAPTERS=.*missing.*make it first"):
        folder_in(str(tmp_path / "missing"))


# -- while it runs --------------------------------------------------------------------------------


class NotFoundError(Exception):
    """vLLM's own, by which a client gets a 404."""


@dataclass
class Engine:
    """Keeps an account of adapters: those that are under proof, and how often one was loaded."""

    held: set[int] = field(default_factory=set)
    loaded: list[str] = field(default_factory=list)

    async def add_lora(self, request: Any) -> bool:
        assert (Path(request.path) / "adapter_config.json").is_file()
        self.held.add(request.number)
        self.loaded.append(Path(request.path).name)
        return True

    async def remove_lora(self, number: int) -> bool:
        self.held.discard(number)
        return True


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What the next proofs do; those that there is nothing for hold."""
    waiting: list[Callable[[], None]] = []

    async def prove(*given: Any) -> None:
        if waiting:
            waiting.pop()()

    def request(self: Maker, name: str, number: int, directory: Path) -> Any:
        return SimpleNamespace(name=name, number=number, path=str(directory))

    monkeypatch.setattr(Maker, "_prove", prove)
    monkeypatch.setattr(Maker, "request", request)
    return waiting


@pytest.fixture
def heads(lm: tt.LanguageModel) -> tt.Steering:
    return one(lm, "layers.1.heads", seed=3).at(2)


@pytest.fixture
def resolver(
    lm: tt.LanguageModel, heads: tt.Steering, tmp_path: Path, proofs: list[Any]
) -> Resolver:
    library = Library(lm, refusal=lambda steering: "")
    for name, steering in (("heads", heads), ("joy", steer_at(lm, "resid"))):
        file = steering.save(tmp_path / f"{name}.safetensors")
        library.add(name, file.read_bytes())
    (tmp_path / "made").mkdir()
    maker = Maker(lm, carried_by(lm, ["o_proj"], 32), tmp_path / "made")
    return Resolver(["base", "also"], library, maker, Engine(), 3, NotFoundError)


def test_an_adapter_is_made_once_and_stays(
    resolver: Resolver, lm: tt.LanguageModel, heads: tt.Steering
) -> None:
    async def go() -> list[Any]:
        names = ["base+heads@3", "base+heads@3", "also+heads@3", "base+heads"]
        return await asyncio.gather(*(resolver.resolve_lora("path", name) for name in names))

    first, again, other, own = asyncio.run(go())
    assert first.path == again.path == other.path != own.path
    assert Path(first.path).name == digest_of([heads.at(3)], lm.identity.digest)
    assert (first.name, other.name) == ("base+heads@3", "also+heads@3")
    assert sorted(resolver.llm.loaded) == sorted(Path(each.path).name for each in (first, own))
    assert not resolver.llm.held  # vLLM loads it under a number of its own

    with pytest.raises(NotFoundError, match="3 variants are served"):
        asyncio.run(resolver.resolve_lora("path", "base+heads@4"))
    assert asyncio.run(resolver.resolve_lora("path", "base+heads@3")).path == first.path
    assert {path.name for path in resolver.maker.directory("").iterdir()} == {
        Path(each.path).name for each in (first, own)
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base+joy", "adds a constant.*by trimtab's plugin"),
        ("base+nobody", "no steering is called"),
        ("base+heads@0", "ask for base"),
        ("base+heads@2.0", "take base.heads@2"),
        ("base+heads@clear", "clear"),
        ("base+heads@kl=0.1", "kl"),
        ("base+heads@3e38", "not finite"),
    ],
)
def test_what_is_not_carried_is_not_found(resolver: Resolver, name: str, said: str) -> None:
    with pytest.raises(NotFoundError, match=said):
        asyncio.run(resolver.resolve_lora("path", name))
    assert not resolver.llm.held
    assert not any(resolver.maker.directory("").iterdir())


def test_other_models_are_left_to_others(resolver: Resolver) -> None:
    for name in ("base", "other", "other+heads", "heads", "../base+heads", ""):
        assert asyncio.run(resolver.resolve_lora("path", name)) is None


def test_what_the_engine_leaves_out_is_not_handed_over(
    resolver: Resolver, proofs: list[Callable[[], None]]
) -> None:
    def unlike() -> None:
        raise tt.TrimtabError("log-probabilities are off")

    def dead() -> None:
        raise RuntimeError("the engine has died")

    for proof, said in ((unlike, "are off"), (dead, "has died")):
        proofs.append(proof)
        with pytest.raises(NotFoundError, match=said):
            asyncio.run(resolver.resolve_lora("path", "base+heads@3"))
        assert not resolver.llm.held
        assert not any(resolver.maker.directory("").iterdir())
    # And is tried again.
    assert asyncio.run(resolver.resolve_lora("path", "base+heads@3")) is not None


def test_routes_that_take_any_path_are_closed() -> None:
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def every(path: str) -> dict[str, str]:
        return {"path": path}

    app.add_middleware(Closed)
    client = TestClient(app)
    for path in (
        "v1/load_lora_adapter",
        "v1/load_lora_adapter/",
        "v1//unload_lora_adapter",
        "root/v1/load_lora_adapter",
        "adapters",
        "adapters/name",
        "invocations",
    ):
        for method in ("POST", "DELETE"):
            answer = client.request(method, f"/{path}")
            assert answer.status_code == 404
            assert "closed by trimtab" in answer.json()["error"]["message"]
    for path in ("v1/models", "v1/completions", "health"):
        assert client.post(f"/{path}").json() == {"path": path}
