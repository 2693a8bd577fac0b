"""What steering costs in vLLM: requests under steerings of their own against an engine of stock.

    python benchmarks/serving.py [--rounds 5] [--requests 32] [--new 32] [--starts 1]
                                 [--engines stock,plugin,baked,lora] [--out FILE.json]

It runs in an environment that has vLLM and trimtab (see the Makefile's test-vllm). Four engines are
open at the same time, each in a process of its own, and take turns: one of stock, one with
trimtab's plugin at the output of every block's heads and at one block's, one of stock on a baked
checkpoint, and one of stock with room for LoRA adapters at the modules that are needed. A turn is
one continuous batch of greedy requests, in float32, eager; prompts share nothing, and no block is
cached from before. What is measured are the engine process's CPU seconds, with wall seconds beside.

Two processes of one engine differ by some percent for as long as they live, which is more than the
plugin takes. So its contenders are also held against their own engine from which the plugin is
taken off for a turn: its hooks and what it put around vLLM's methods. With --starts all engines are
started so many times, in another order each time. Against stock a figure is then the median of a
start's turns, and intervals are of engines, not of turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from clock import Ratio, Report, Times, Took, interleaved, machine, one_thread, ratio

MODEL = "smollm2-135m-instruct"
#: The block at which a direction is added, and how many units of heads are scaled.
LAYER, UNITS = 12, 96
#: The plugin's engine without it.
OFF = "plugin, taken off"
#: Contender: its engine, and how many different steerings its requests have between them.
CONTENDERS = {
    "stock": ("stock", 0),
    "stock again": ("stock", 0),
    OFF: ("plugin", 0),
    "plugin, nothing steered": ("plugin", 0),
    "plugin, a direction at one block": ("plugin", -1),
    "plugin, units of all heads": ("plugin", 1),
    "plugin, 16 different": ("plugin", 16),
    "plugin, all different": ("plugin", 64),
    "baked": ("baked", 0),
    "LoRA, nothing steered": ("lora", 0),
    "LoRA, units of all heads": ("lora", 1),
}
#: What each should be at most, of the plugin against its engine without it, else against stock.
AT_MOST = {
    "plugin, nothing steered": 1.01,
    "plugin, a direction at one block": 1.03,
    "plugin, units of all heads": 1.03,
    "plugin, 16 different": 1.06,
    "baked": 1.01,
}


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--engines", default="stock,plugin,baked,lora", help="which of them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine is not None:
        answer(asked.engine, json.loads(asked.job.read_text()))
        return 0
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        job = prepared(Path(folder), asked.requests, asked.new)
        kinds = ["stock", *(kind for kind in asked.engines.split(",") if kind != "stock")]
        report = measured(job, kinds, asked.rounds, asked.starts)
    facts = machine()
    print(json.dumps(facts))
    for one in report.ratios:
        low, high = one.interval or (0.0, 0.0)
        wanted = f"   wanted {one.target}: {'yes' if one.met else 'no'}" if one.target else ""
        print(f"{one.what:52} {one.median:6.3f} [{low:.3f}, {high:.3f}]{wanted}")
    if asked.out is not None:
        content = {"machine": facts, "benchmarks": [report.as_json()]}
        asked.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def prepared(folder: Path, requests: int, new: int) -> Path:
    """All that engines read: checkpoints, steerings, an adapter, prompts."""
    import torch

    import trimtab as tt
    from trimtab.engines import places_of, sites_of
    from trimtab.reading import plain_texts

    lm = tt.load(MODEL, device="cpu", dtype=torch.float32)
    contrast = tt.Contrast.builtin("formality").part("train").take(48)
    direction, units = tt.fit(
        [tt.CAA(layer=LAYER, alpha=1.0), tt.AUSteer(site="heads", k=UNITS, alpha=1.0)], lm, contrast
    )
    drawn = [tt.AUSteer(site="heads", k=UNITS, locate="random", seed=seed, alpha=1.0)
             for seed in range(16)]  # fmt: skip
    fitted = tt.fit(drawn, lm, contrast.take(8))
    different = [one.at(dial) for dial in (0.5, 1.0, 1.5, 2.0) for one in fitted]
    every = [direction, units, *different]
    for number, one in enumerate(every):
        one.save(folder / f"{number}.safetensors")
    base = lm.save_pretrained(folder / "base")
    adapter = tt.export(lm, units, "lora", folder / "adapter")
    tt.bake(lm, units).save_pretrained(folder / "baked")
    sites = [*lm.anatomy.sites("heads"), *sites_of([direction])]
    # Numbers keep prompts apart where there are more of them than texts.
    texts = [f"{n}. {text[:200]}" for n, text in zip(range(requests), cycle(plain_texts()))]
    job = {
        "base": str(base),
        "baked": str(folder / "baked"),
        "adapter": str(folder / "adapter"),
        "rank": adapter.details["rank"],
        "steerings": [str(folder / f"{number}.safetensors") for number in range(len(every))],
        "places": {site: list(place) for site, place in places_of(lm.anatomy, sites).items()},
        "prompts": [list(tokens) for tokens in lm.encode(texts)],
        "new": new,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


def measured(job: Path, kinds: list[str], rounds: int, starts: int) -> Report:
    """What contenders take over stock: by turns of one start, or by the medians of several."""
    taken = []
    for number in range(starts):
        taken.append(of_one_start(job, kinds[::-1] if number % 2 else kinds, rounds))
        print(f"{number + 1} of {starts} starts", file=sys.stderr, flush=True)
    turns = {name: together(start[name] for start in taken) for name in taken[0]}
    times = turns if starts == 1 else {name: of_starts(taken, name) for name in turns}
    ratios = [against("stock", name, one, times) for name, one in times.items() if name != "stock"]
    ratios += [
        against(OFF, name, one, turns)
        for name, one in turns.items()
        if CONTENDERS[name][0] == "plugin" and name != OFF
    ]
    prompts = json.loads(job.read_text())["prompts"]
    return Report(f"vLLM: {MODEL}", len(prompts), turns, ratios, {"starts": starts})


def together(starts: Iterable[Times]) -> Times:
    """The turns of all starts, in one list."""
    every = list(starts)
    return Times([s for one in every for s in one.cpu], [s for one in every for s in one.wall])


def of_starts(taken: Sequence[dict[str, Times]], name: str) -> Times:
    """The median of a contender's turns, of each start."""
    every = [start[name] for start in taken]
    return Times([median(one.cpu) for one in every], [median(one.wall) for one in every])


def against(other: str, name: str, one: Times, times: dict[str, Times]) -> Ratio:
    """A contender over another, with what is wanted of it where that is the one to hold it to."""
    own = OFF if CONTENDERS[name][0] == "plugin" else "stock"
    wanted = AT_MOST.get(name) if other == own else None
    return ratio(f"{name} / {other}", one, times[other], of_median=True, at_most=wanted)


def of_one_start(job: Path, kinds: list[str], rounds: int) -> dict[str, Times]:
    """Each contender in turn, in its engine's process; engines start in the order of kinds."""
    engines = {kind: Engine(kind, job) for kind in kinds}
    try:
        ways = {
            name: partial(engines[kind].turn, name)
            for name, (kind, _) in CONTENDERS.items()
            if kind in engines
        }
        for way in ways.values():
            way()
        return interleaved(ways, rounds)
    finally:
        for engine in engines.values():
            engine.close()


class Engine:
    """An engine in a process of its own, which takes a turn when it is told to."""

    def __init__(self, kind: str, job: Path) -> None:
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, __file__, "--engine", kind, "--job", str(job)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def turn(self, name: str) -> Took:
        """One contender's turn, by the engine's own clock."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("took "):
                cpu, wall = line.split()[1:]
                return Took(float(cpu), float(wall))
        raise RuntimeError(f"the engine of {name} ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def answer(kind: str, job: dict[str, Any]) -> None:
    """Be the engine of one kind: a line names a contender, whose turn is taken and timed."""
    from vllm import LLM

    import trimtab as tt
    from trimtab.engines import LOADED, Place, configuration, content_of

    steerings = [tt.Steering.load(file) for file in job["steerings"]]
    more: dict[str, Any] = {}
    if kind == "plugin":
        places = {site: Place(*place) for site, place in job["places"].items()}
        more = {"additional_config": configuration(places)}
    if kind == "lora":
        modules = ["o_proj"]
        more = {"enable_lora": True, "max_loras": 2, "max_lora_rank": max(8, job["rank"])}
        more["lora_target_modules"] = modules
    engine = LLM(
        job["baked" if kind == "baked" else "base"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=64,
        enforce_eager=True,
        **more,
    )
    if kind == "plugin":
        for steering in steerings:
            digest = wanted(steering).digest
            engine.collective_rpc("trimtab_load", args=(digest, content_of(steering)))
            LOADED.add(digest)
    for line in sys.stdin:
        name = line.strip()
        run = turn_of(engine, kind, CONTENDERS[name][1], steerings, job)
        with taken_off(engine, len(job["places"])) if name == OFF else nullcontext():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            took = time.process_time() - cpu, time.perf_counter() - wall
        print("took", *took, flush=True)


@contextmanager
def taken_off(engine: Any, sites: int) -> Iterator[None]:
    """The engine without the plugin: its hooks at so many sites, what says to them which rows a
    pass has, and what stands around vLLM's methods."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor

    (runner,) = engine.collective_rpc(lambda worker: worker.model_runner)
    hooks = [
        held
        for module in runner.get_model().modules()
        for held in (module._forward_hooks, module._forward_pre_hooks)
        if held
    ]
    own = [dict(held) for held in hooks]
    assert sum(map(len, own)) == sites
    around: list[tuple[Any, str]] = [(InputProcessor, "process_inputs")]
    keys = "generate_block_hash_extra_keys"
    around += [(kv_cache_utils, keys), (block_pool, keys)]
    put = [(of, name, getattr(of, name)) for of, name in around]
    forward = vars(runner).pop("_model_forward")
    for held in hooks:
        held.clear()
    for of, name, ours in put:
        setattr(of, name, ours.__wrapped__)
    try:
        yield
    finally:
        runner._model_forward = forward
        for held, was in zip(hooks, own, strict=True):
            held.update(was)
        for of, name, ours in put:
            setattr(of, name, ours)


def wanted(steering: Any) -> Any:
    """How a request asks for a steering that acts on all tokens."""
    from trimtab.engines import Acts, wanted_of

    return wanted_of(steering, lambda scope: Acts(["all"]))


def turn_of(
    engine: Any, kind: str, different: int, steerings: list[Any], job: dict[str, Any]
) -> Callable[[], Any]:
    """One continuous batch of requests, which have so many different steerings between them (-1:
    the direction)."""
    import uuid

    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from trimtab.engines import extra_args

    prompts, params = [], []
    chosen = {-1: steerings[:1], 0: [], 1: steerings[1:2]}.get(different, steerings[2:][:different])
    for number, tokens in enumerate(job["prompts"]):
        # Nothing is cached from an earlier turn.
        prompts.append({"prompt_token_ids": tokens, "cache_salt": uuid.uuid4().hex})
        extra = None
        if kind == "plugin" and chosen:
            extra = extra_args([wanted(chosen[number % len(chosen)])])
        new = job["new"]
        params.append(
            SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, extra_args=extra)
        )
    adapter = LoRARequest("units", 1, job["adapter"]) if kind == "lora" and different else None
    return lambda: engine.generate(prompts, params, use_tqdm=False, lora_request=adapter)


if __name__ == "__main__":
    raise SystemExit(main())
