"""vLLM with trimtab in it: whatever runs beside a request, it gets what attached hooks write.

`make test-vllm` sets up an environment with vLLM and trimtab, names its Python in TRIMTAB_VLLM and
runs this. Every batch mixes operators, sites, scopes and unsteered requests; prompts share their
beginnings and are read in pieces; each batch runs twice, the second time from cached blocks.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import steer
from operator_formulas import ALL, random_operator
from tiny import tiny_model, tiny_tokenizer
from trimtab.engines import (
    Read,
    ReadingOf,
    content_of,
    extra_args,
    places_of,
    reading_args,
    sites_of,
    steps_of,
    wanted_of,
    why_not,
)
from trimtab.engines.forms import packed
from trimtab.model import Writing
from trimtab.serving.placing import acts_of

PYTHON = os.environ.get("TRIMTAB_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

NEW = 12
SHARED = (
    "The notes below were written by several people over a long summer by the sea, and they do not "
    "all agree with each other about what happened on the last evening. "
)
TEXTS = [SHARED + end for end in ("Read them", "She told me that", "Dear sir, I am")]
#: Where operators act in the matrix, in turn, and on which tokens.
KINDS = ("resid", "heads", "attn_norm", "ffn_out", "ffn_in", "ffn_norm", "attn_out")
SCOPES = ("all", "generated", "prompt", "last", "generated[1:5]", "prompt[-4:]", "!prompt[:40]")
#: Dials at which operators show.
DIALS = {"Turn": 200.0, "Adaptive": 200.0, "Rotate": 120.0} | dict.fromkeys(
    ("Add", "Kept", "Capped"), 3.0
)


@dataclass(frozen=True)
class Spec:
    """What a request asks for: steerings at dials, and the scope of each that is not its own."""

    steerings: tuple[tt.Steering, ...] = ()
    scope: str | None = None

    @property
    def acting(self) -> list[tt.Steering]:
        return [s if self.scope is None else s.scoped(self.scope) for s in self.steerings]

    def extra(self, lm: tt.LanguageModel) -> dict[str, str] | None:
        return extra_args([wanted_of(one, partial(acts_of, lm)) for one in self.acting])


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    """A tiny Llama whose heads are as wide as vLLM's kernels take them."""
    model = tiny_model("llama", head_dim=32, hidden_size=64, num_hidden_layers=4)
    tokenizer = tiny_tokenizer()
    made = tt.wrap(model, tokenizer, "tiny")
    made.model.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def base(lm: tt.LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.save_pretrained(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def specs(lm: tt.LanguageModel) -> list[Spec]:
    """Every operator, each at a site and in a scope of the ones above; stacks; and nothing."""
    made = [Spec()]
    for number, name in enumerate(name for name in ALL if name != "Unbound"):  # which does nothing
        kind, scope = KINDS[number % len(KINDS)], SCOPES[number % len(SCOPES)]
        site = f"layers.{1 + number % 3}.{kind}"
        operator = random_operator(name, number + 30, lm.anatomy.width(site))
        dial = DIALS.get(name, 0.9)
        made.append(Spec((steer(lm, (site, operator), alpha=dial),), scope))
    push, turn = (
        steer(lm, ("layers.1.resid", random_operator("Add", 5, 64)), alpha=4.0),
        steer(lm, *((f"layers.{i}.ffn_norm", random_operator("Turn", 6, 64)) for i in range(4)),
              alpha=140.0),
    )  # fmt: skip
    aim = torch.randn(64, generator=torch.Generator().manual_seed(3))
    conditions = (
        tt.Condition("layers.0.resid", aim, 0.0, score="projection"),
        tt.Condition("layers.1.attn_out", aim.flip(0), 0.0, fires="below"),
    )
    gated = push.at(6.0).gated(tt.Gate(conditions, "token", ("or", 0, ("not", 1))))
    two = replace(push, interventions=(
        replace(push.interventions[0], scope="prompt"),
        tt.Intervention("layers.2.resid", random_operator("Add", 9, 64), "generated", 0.5),
        tt.Intervention("layers.2.ffn_out", random_operator("Scale", 40, 64), "prompt", -1.0),
    ))  # fmt: skip
    faded = push.at(9.0).scoped("generated ~ 0.8")
    words = [Spec((push,), scope) for scope in ("user", "last_user", "token(260, 265, 270)")]
    return [
        *made, *words, Spec((push,)), Spec((push.at(-6.0),)), Spec((turn, push)),
        Spec((push, turn)), Spec((faded,)), Spec((two,)),
        Spec((turn.at(100.0), push.at(7.0)), "generated"),
        Spec((gated,)), Spec((gated,), "generated"), Spec((turn, gated.at(7.0)), "prompt"),
        Spec(), *(Spec((push.at(float(dial)),), "last") for dial in range(2, 8)),
        Spec((steer(lm, ("embed", random_operator("Add", 7, 64)), alpha=0.3),)),
        Spec((steer(lm, ("final_norm", random_operator("Add", 8, 64)), alpha=2.0),)),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(lm: tt.LanguageModel) -> list[list[int]]:
    chats = [(("user", text),) for text in TEXTS]
    longer = (("user", SHARED), ("assistant", "Yes"), ("user", "And then?"))
    return [list(ids) for ids in lm.encode([*chats, longer])]


@pytest.fixture(scope="module")
def wanted(
    lm: tt.LanguageModel, specs: list[Spec], prompts: list[list[int]]
) -> list[list[list[int]]]:
    """What attached hooks write of each prompt under each spec."""
    return [attached(lm, prompt, specs) for prompt in prompts]


def attached(lm: tt.LanguageModel, prompt: list[int], specs: Sequence[Spec]) -> list[list[int]]:
    """Greedy tokens of one prompt, each row of the batch under steerings of its own."""
    writing = Writing(lm, [prompt] * len(specs), [tuple(spec.acting) for spec in specs])
    written = []
    for _ in range(NEW):
        tokens = writing.logits().argmax(-1)
        written.append(tokens)
        writing.put(tokens)
    return torch.stack(written, 1).tolist()


@dataclass(frozen=True)
class Engine:
    """How an engine runs, by the arguments that it is given."""

    name: str
    engine: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)


ENGINES = (
    Engine("eager", {"enforce_eager": True}),
    Engine("compiled", {"enforce_eager": False}),
    Engine("transformers", {"enforce_eager": True, "model_impl": "transformers"}),
    Engine("few blocks", {"enforce_eager": True, "num_gpu_blocks_override": 14}),
    Engine("second runner", {"enforce_eager": True}, {"second": True}),
    Engine("two ranks", {"enforce_eager": True, "tensor_parallel_size": 2}, {"ranks": 2}),
    Engine("two stages", {"enforce_eager": False, "pipeline_parallel_size": 2}, {"ranks": 2}),
)
BAD = [
    {"trimtab": "["},
    {"trimtab": json.dumps([{"steering": "0" * 64, "dial": 1.0,
                             "scopes": [{"tree": ["all"], "decay": None}], "of": []}])},
    {"trimtab": 7},
]  # fmt: skip


def run(
    lm: tt.LanguageModel, base: Path, engine: Engine, batches: list[list[dict[str, Any]]],
    specs: Sequence[Spec], folder: Path, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """What vLLM answers, in a process of its own."""
    steerings = {one.scoped("all").digest: one for spec in specs for one in spec.steerings}
    files = {}
    for digest, steering in steerings.items():
        files[digest] = str(folder / f"{digest}.safetensors")
        Path(files[digest]).write_bytes(content_of(steering))
    job = {
        "base": str(base), "engine": engine.engine, "steerings": files, "batches": batches,
        "places": places_of(lm.anatomy, sites_of(list(steerings.values()))), "bad": BAD,
        **engine.more, **more,
    }  # fmt: skip
    given, found = folder / "job.json", folder / "answers.json"
    given.write_text(json.dumps(job))
    program = Path(__file__).with_name("vllm_steered.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(tt.__file__).parents[1])}
    ran = subprocess.run(
        [str(PYTHON), program, given, found], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    answered: dict[str, Any] = json.loads(found.read_text())
    return answered


def requests(
    lm: tt.LanguageModel, prompts: Sequence[list[int]], specs: Sequence[Spec]
) -> list[dict[str, Any]]:
    """All prompts under all specs, specs in turn, so that each batch of rows is mixed."""
    return [
        {"tokens": prompt, "new": NEW, "extra": spec.extra(lm)}
        for prompt in prompts
        for spec in specs
    ]


def wrong(answers: list[dict[str, Any]], wanted: list[list[list[int]]]) -> list[int]:
    """The numbers of the answers that are not what was wanted."""
    flat = [tokens for of_prompt in wanted for tokens in of_prompt]
    assert len(flat) == len(answers)
    return [i for i, (one, tokens) in enumerate(zip(answers, flat, strict=True))
            if one["tokens"] != tokens]  # fmt: skip


def of_ranks(specs: list[Spec], engine: Engine) -> list[int]:
    """The specs that an engine carries: a site that ranks share takes what acts on each unit by
    itself, and a gate that decides token by token is for one stage."""
    tensor, stages = (engine.engine.get(f"{of}_parallel_size", 1) for of in ("tensor", "pipeline"))
    carried = []
    for number, spec in enumerate(specs):
        if any(why_not(steering, tensor, stages) for steering in spec.steerings):
            continue
        try:
            for steering in spec.steerings:
                steps_of(steering, 0, tensor)
        except tt.TrimtabError:
            continue
        carried.append(number)
    return carried


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_what_hooks_write(
    engine: Engine, lm: tt.LanguageModel, base: Path, specs: list[Spec],
    prompts: list[list[int]], wanted: list[list[list[int]]], tmp_path: Path,
) -> None:  # fmt: skip
    """All of it in one continuous batch; again from cached blocks; then later turns, steered
    otherwise, whose prompts are what was written."""
    carried = of_ranks(specs, engine)
    few = [specs[i] for i in carried]
    expected = [[of_prompt[i] for i in carried] for of_prompt in wanted]
    batch = requests(lm, prompts, few)
    turned = [*few[1:], few[0]]
    later = [
        {"tokens": [*prompt, *tokens, *prompt[1:6]], "new": NEW, "extra": spec.extra(lm)}
        for prompt, of_prompt in zip(prompts[:2], expected, strict=False)
        for tokens, spec in zip(of_prompt, turned, strict=True)
    ]
    after = [
        attached(lm, request["tokens"], [spec])[0]
        for request, spec in zip(later, turned * 2, strict=True)
    ]
    said = run(lm, base, engine, [batch, batch[::-1], later], few, tmp_path)
    cold, warm, answers = said["answers"]
    assert not wrong(cold, expected)
    assert not wrong(warm[::-1], expected)
    assert not wrong(answers, [after])
    cached = [sum(one["cached"] for one in answer) for answer in (cold, warm, answers)]
    assert cached[1] > (0 if engine.name == "few blocks" else cached[0]), cached
    assert min(said.get("calls", [1])) > 0
    assert said.get("missed", 0) == 0
    assert all("Validation" in one for one in said["refused"]), said["refused"]


def test_what_the_kernel_writes(
    lm: tt.LanguageModel, base: Path, specs: list[Spec], prompts: list[list[int]],
    wanted: list[list[list[int]]], tmp_path: Path,
) -> None:  # fmt: skip
    """The operation as graphs capture it, in Triton's interpreter: what is no form of the bank is
    refused when it is loaded, and a request that says more than it carries before it runs."""
    engine = Engine("kernel", {"enforce_eager": True}, {"second": True, "way": "kernel"})
    steps = [[step for one in spec.steerings for step in steps_of(one)] for spec in specs]
    carried = [
        number for number, of in enumerate(steps)
        if all(step.gate is None and packed(step.operator) for step in of)
        and all(len(one.scopes) == 1 for one in specs[number].acting)
    ]  # fmt: skip
    few = [specs[i] for i in carried]
    odd = [
        spec.steerings[0] for spec, of in zip(specs, steps, strict=True)
        if any(packed(step.operator) is None for step in of)
    ]  # fmt: skip
    assert len(carried) > 30
    batch = requests(lm, prompts[:1], few)
    reads = reading_args(ReadingOf("0" * 32, (Read("layers.1.resid"),)))
    said = run(lm, base, engine, [batch, batch[::-1]], few, tmp_path, reads=reads,
               odd=[content_of(odd[0]).hex()])  # fmt: skip
    expected = [[wanted[0][i] for i in carried]]
    cold, warm = said["answers"]
    assert not wrong(cold, expected)
    assert not wrong(warm[::-1], expected)
    assert said["missed"] == 0
    assert "inside of full CUDA graphs" in said["unread"]
    assert all("SetFeatures" in one and "PIECEWISE" in one for one in said["unloaded"])


def test_the_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    program = Path(__file__).with_name("vllm_compiles.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(tt.__file__).parents[1])}
    ran = subprocess.run(
        [str(PYTHON), program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len(json.loads(ran.stdout)) == 6
    assert min(json.loads(ran.stdout)) > 10_000


def test_the_kernel_is_what_the_bank_and_operators_are(tmp_path: Path) -> None:
    program = Path(tt.__file__).parents[2] / "benchmarks" / "kernel.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(tt.__file__).parents[1])}
    ran = subprocess.run(
        [str(PYTHON), program, "--units", "40"], capture_output=True, text=True,
        env=environment | {"TRITON_INTERPRET": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    for dtype, off in (("torch.float32", 2e-6), ("torch.bfloat16", 2**-6)):
        apart = json.loads(ran.stdout)["apart"][dtype]
        assert apart.pop("none") == {"plain torch": 0.0, "operators": 0.0}
        assert len(apart) > 18
        assert max(max(each.values()) for each in apart.values()) < off


def test_the_operation_splits_what_is_captured(tmp_path: Path) -> None:
    """vLLM cuts a model's graph at it, once it is told to."""
    program = Path(__file__).with_name("vllm_splits.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(tt.__file__).parents[1])}
    ran = subprocess.run(
        [str(PYTHON), program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == {
        "told": [False, True, False, True, False], "not told": [False],
    }  # fmt: skip


def test_what_is_steered_shows(wanted: list[list[list[int]]], specs: list[Spec]) -> None:
    """Nearly every spec writes something else than nothing does, or the rest would say little."""
    plain = [of_prompt[0] for of_prompt in wanted]
    shows = [
        any(of_prompt[i] != bare for of_prompt, bare in zip(wanted, plain, strict=True))
        for i, spec in enumerate(specs) if spec.steerings
    ]  # fmt: skip
    assert sum(shows) > 0.8 * len(shows), [i for i, one in enumerate(shows) if not one]


@pytest.mark.parametrize("control", ["stock", "no key"])
def test_controls_are_wrong(
    control: str, lm: tt.LanguageModel, base: Path, specs: list[Spec],
    prompts: list[list[int]], wanted: list[list[list[int]]], tmp_path: Path,
) -> None:  # fmt: skip
    """A worker that knows nothing of steerings, and blocks that are known by their tokens alone:
    both are found out by the same comparison."""
    batch = requests(lm, prompts, specs)
    said = run(lm, base, ENGINES[0], [batch, batch], specs, tmp_path, control=control, bad=[])
    assert len(wrong(said["answers"][1], wanted)) > len(batch) / 5
