"""What a worker of an engine does to activations, without an engine: the plan of a pass, hooks on
modules, ranks that split units, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import trimtab as tt
from helpers import IDS, language_model, steer, steer_at
from operator_formulas import ALL, random_operator
from trimtab.engines import (
    Place,
    captures,
    configuration,
    extra_args,
    not_captured,
    places_of,
    plugin,
    refuse_ways,
    sites_of,
    steps_of,
    wanted_of,
)
from trimtab.engines.at_work import AT_WORK, AtWork, Rows
from trimtab.engines.modules import install
from trimtab.engines.runners import watch
from trimtab.serving import Carried
from trimtab.serving.placing import acts_of
from trimtab.serving.proving import joined, last_activations, refuse_others

PROMPT = len(IDS) - 4


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def every_operator(lm: tt.LanguageModel) -> list[tt.Steering]:
    kinds = ("resid", "heads", "attn_norm", "ffn_out", "ffn_in", "ffn_norm", "attn_out")
    scopes = ("all", "generated", "prompt", "last", "generated[1:3]", "generated ~ 0.7")
    made = []
    for number, name in enumerate(name for name in ALL if name != "Unbound"):
        site = f"layers.{number % 3}.{kinds[number % len(kinds)]}"
        operator = random_operator(name, number + 30, lm.anatomy.width(site))
        decays = operator.identity == 0
        scope = scopes[number % (len(scopes) if decays else len(scopes) - 1)]
        made.append(steer(lm, (site, operator), alpha=0.7).scoped(scope))
    return made


@pytest.fixture
def hooked(lm: tt.LanguageModel) -> Iterator[list[tt.Steering]]:
    """The model of transformers with an engine's hooks on it."""
    steerings = every_operator(lm)
    sites = sites_of(steerings)
    AT_WORK.at(sites)
    before = {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.model.modules()}
    assert install(lm.model, places_of(lm.anatomy, sites), sites) == sites
    for steering in steerings:
        AT_WORK.load(wanted_of(steering, partial(acts_of, lm)).digest, steps_of(steering))
    yield steerings
    for module, (after, ahead) in before.items():
        for hooks, count in ((module._forward_hooks, after), (module._forward_pre_hooks, ahead)):
            while len(hooks) > count:
                hooks.popitem()
    AT_WORK.at([])


def test_a_plan_does_what_hooks_do(lm: tt.LanguageModel, hooked: list[tt.Steering]) -> None:
    stacks = [[one] for one in hooked] + [hooked[:3], hooked[2::-1], []]
    for stack in stacks:
        wanted = tuple(wanted_of(one, partial(acts_of, lm)) for one in stack)
        AT_WORK.begin([Rows(wanted, IDS, PROMPT, 0, 0, len(IDS))])
        with torch.no_grad():
            got = lm.model(torch.tensor([IDS]), use_cache=False).logits[0]
        AT_WORK.end()
        with lm.steered(*stack) as sequences, torch.no_grad():
            if stack:
                sequences.given_ends = [PROMPT]
            expected = lm.model(torch.tensor([IDS]), use_cache=False).logits[0]
        assert torch.allclose(got, expected, atol=1e-4), stack
    assert min(AT_WORK.calls) > 0


def test_each_row_of_a_pass_is_steered_by_itself(lm: tt.LanguageModel) -> None:
    """Pieces of three texts in one pass: rows of one are those that it has alone, and rows of none
    stay as they are to the bit."""
    add, turn = (
        steer(lm, ("layers.0.resid", random_operator(name, 3, 48))) for name in ("Add", "Turn")
    )
    work = AtWork()
    work.at(["layers.0.resid"])
    texts = [
        (wanted_of(one, partial(acts_of, lm)),)
        for one in (add.at(2.0).scoped("generated"), turn.at(90.0), add.at(-1.0))
    ]
    for steering in (add, turn):
        work.load(wanted_of(steering, partial(acts_of, lm)).digest, steps_of(steering))
    x, residual = torch.randn(12, 48), torch.randn(12, 48)
    rows = [
        Rows(texts[0], [], 5, 3, 0, 4),  # tokens 3 to 6, of which 5 and 6 are generated
        Rows(texts[1], [], 9, 0, 6, 8),
        Rows(texts[2], [], 1, 7, 8, 9),
    ]
    work.begin(rows)
    got = x.clone()
    work.change(got, residual, 0)
    expected, stream = x.clone(), x + residual
    operator = add.interventions[0].operator
    expected[2:4] += operator.bind(2.0, "cpu")(stream[2:4]) - stream[2:4]
    plane = turn.interventions[0].operator
    expected[6:8] += plane.bind(90.0, "cpu")(stream[6:8]) - stream[6:8]
    expected[8:9] += operator.bind(-1.0, "cpu")(stream[8:9]) - stream[8:9]
    assert torch.allclose(got, expected, atol=1e-5)
    still = [0, 1, 4, 5, 9, 10, 11]
    assert torch.equal(got[still], x[still])


def test_ranks_that_split_a_site_do_together_what_one_does(lm: tt.LanguageModel) -> None:
    x = torch.randn(5, 64)
    for name in ("Scale", "Add", "Shift", "Interval", "Absolute", "clamped"):
        steering = steer(lm, ("layers.1.heads", random_operator(name, 40, 64)))
        parts = [steps_of(steering, rank, 2)[0].operator.bind(0.8, "cpu") for rank in (0, 1)]
        halves = [part(half) for part, half in zip(parts, x.chunk(2, -1), strict=True)]
        whole = steps_of(steering)[0].operator.bind(0.8, "cpu")(x)
        assert torch.equal(torch.cat(halves, -1), whole), name
    with pytest.raises(tt.TrimtabError, match="needs all units of the site, which 2 ranks share"):
        steps_of(steer(lm, ("layers.1.heads", random_operator("Turn", 1, 64))), 0, 2)


class Block(nn.Module):
    """A block as engines have it, that hands on (hidden, residual), after one on another rank."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp(hidden), residual + hidden


class PPMissingLayer(nn.Identity):
    """What stands where another rank has a block."""


def test_hooks_on_an_engine_s_blocks() -> None:
    model: Any = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([PPMissingLayer(), Block()])
    places = {
        "layers.0.ffn_out": Place("model.layers.0.mlp", "output"),
        "layers.1.resid": Place("model.layers.1", "output"),
    }
    sites = sorted(places)
    AT_WORK.at(sites)
    assert install(model, places, sites) == ["layers.1.resid"]
    AT_WORK.seen = {}
    hidden, residual = torch.randn(3, 4), torch.randn(3, 4)
    with torch.no_grad():
        out, stream = model.model.layers[1](hidden, residual)
    assert torch.allclose(AT_WORK.seen[1], (out + stream)[-1])
    AT_WORK.at([])
    AT_WORK.seen = None
    with pytest.raises(tt.TrimtabError, match="no module like model.layers.1.ffn, where"):
        install(model, {"layers.1.ffn_out": Place("model.layers.1.ffn", "output")},
                ["layers.1.ffn_out"])  # fmt: skip


def test_a_runner_says_which_rows_are_whose(lm: tt.LanguageModel) -> None:
    """Rows in the runner's order; ids that only the pass knows; requests that end are forgotten."""
    scopes = ("generated", "token(7)")
    add = steer(lm, ("layers.0.resid", random_operator("Add", 3, 48)))
    work = AtWork()
    work.at(["layers.0.resid"])
    wanted = [wanted_of(add.scoped(scope), partial(acts_of, lm)) for scope in scopes]
    work.load(wanted[0].digest, steps_of(add))
    plans: list[Any] = []
    runner: Any = SimpleNamespace(
        requests={
            name: SimpleNamespace(
                sampling_params=SimpleNamespace(extra_args=extra), prompt_token_ids=[1, 7, 3],
                num_prompt_tokens=3,
            )
            for name, extra in (("a", extra_args(wanted[:1])), ("b", extra_args(wanted[1:])),
                                ("c", None))
        },
        _model_forward=lambda input_ids: plans.append(
            [] if not work.banked else work.slots[0].nonzero()[0].tolist()
        ),
    )  # fmt: skip
    watch(runner, work)

    def run(names: list[str], starts: list[int], computed: list[int], ids: list[int]) -> None:
        runner.input_batch = SimpleNamespace(req_ids=names, num_computed_tokens_cpu=computed)
        runner.query_start_loc = SimpleNamespace(np=starts)
        runner._model_forward(torch.tensor(ids))

    run(["c", "b"], [0, 3, 5], [0, 0], [1, 7, 3, 1, 7])
    run(["b", "a"], [0, 1, 4], [2, 0], [3, 1, 7, 3])
    run(["a", "b"], [0, 1, 2], [3, 3], [7, 7])  # b's newest token is known to the pass alone
    del runner.requests["b"]
    run(["a"], [0, 1], [4], [5])
    assert plans == [[4], [], [0, 1], [0]]
    assert not work.banked
    assert work.missed == 0


def test_what_an_engine_does_not_carry(lm: tt.LanguageModel) -> None:
    carried = Carried(lm.anatomy)
    assert carried(steer_at(lm, "resid")) == ""
    assert "norms it in one step" in carried(steer_at(lm, "attn_norm_in"))
    carried.sites = ["layers.0.resid"]
    assert "--hook resid" in carried(steer_at(lm, "resid"))
    carried = Carried(lm.anatomy, ranks=2)
    assert "2 ranks share" in carried(steer_at(lm, "heads", "Ablate"))
    mixture = language_model("qwen3_moe")
    assert "one kernel" in Carried(mixture.anatomy)(steer_at(mixture, "ffn_in"))


def test_what_full_graphs_do_not_carry(lm: tt.LanguageModel) -> None:
    add, features = (
        steer(lm, ("layers.0.resid", random_operator(name, 3, 48)))
        for name in ("Add", "features scale")
    )
    gate = tt.Gate((tt.Condition("layers.0.resid", torch.ones(48), 0.0),), "two-pass")
    apart = replace(add, interventions=(
        replace(add.interventions[0], scope="prompt"),
        replace(add.interventions[0], scope="generated"),
    ))  # fmt: skip
    thrice = replace(add, interventions=add.interventions * 3)
    assert not_captured(add) == ""
    for said, bad in (
        ("SetFeatures", features), ("two-pass gate", add.gated(gate)),
        ("scopes of their own", apart), ("more than 2 interventions", thrice),
    ):  # fmt: skip
        assert said in not_captured(bad)
        assert "PIECEWISE" in not_captured(bad)
    carried = Carried(lm.anatomy, captured=True)
    assert carried(add) == ""
    assert "SetFeatures" in carried(features)
    assert "two-pass gate" in carried(add.gated(gate))
    assert Carried(lm.anatomy)(add.gated(gate)) == ""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({}, False),
        ({"compilation_config": {"cudagraph_mode": "NONE"}}, False),
        ({"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}, True),
        ({"compilation_config": {"cudagraph_mode": "full"}}, True),
        ({"compilation_config": {"mode": 3}}, True),  # vLLM's own choice is to capture all
        ({"compilation_config": {"mode": 3}, "enforce_eager": True}, False),
    ],
)
def test_arguments_that_ask_for_full_graphs(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], found: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert captures(arguments) is found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not captures(arguments)


def test_a_site_that_is_something_else_ends_the_start(lm: tt.LanguageModel) -> None:
    sites = ["layers.0.heads", "layers.1.resid", "final_norm"]
    seen = last_activations(lm, sites)
    halves = seen["layers.0.heads"].chunk(2)
    ranks = [
        save({"layers.0.heads": halves[0].contiguous(), "layers.1.resid": seen["layers.1.resid"]}),
        save({"layers.0.heads": halves[1].contiguous(), "final_norm": seen["final_norm"]}),
    ]
    refuse_others(seen, joined(ranks), torch.float32)
    with pytest.raises(tt.TrimtabError, match="never passed final_norm"):
        refuse_others(seen, joined(ranks[:1]) | {"layers.0.heads": seen["layers.0.heads"]},
                      torch.float32)  # fmt: skip
    with pytest.raises(tt.TrimtabError, match="layers.1.resid is something else"):
        refuse_others(seen, joined(ranks) | {"layers.1.resid": -9 * seen["layers.1.resid"]},
                      torch.float32)  # fmt: skip


class Graphs:
    """As vLLM's modes of graphs."""

    def __init__(self, full: bool, pieces: bool = True) -> None:
        self.full, self.pieces = full, pieces

    def __bool__(self) -> bool:
        return self.full or self.pieces

    def has_full_cudagraphs(self) -> bool:
        return self.full


def test_ways_of_running_that_leave_rows_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(device: str = "cpu", **changes: Any) -> Any:
        parallel = {"use_ubatching": False, "prefill_context_parallel_size": 1,
                    "data_parallel_size": 1}  # fmt: skip
        own = {name: changes.pop(name) for name in list(changes) if name in parallel}
        compiled = {"cudagraph_mode": changes.pop("graphs", Graphs(False)),
                    "splitting_ops": changes.pop("splits", ["vllm::attention"]),
                    "use_inductor_graph_partition": changes.pop("inductor", False)}  # fmt: skip
        return SimpleNamespace(
            parallel_config=SimpleNamespace(**{**parallel, **own}),
            cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
            device_config=SimpleNamespace(device_type=device),
            model_config=SimpleNamespace(
                enforce_eager=changes.pop("eager", False), is_moe=changes.pop("moe", False)
            ),
            compilation_config=SimpleNamespace(**compiled),
            **{"speculative_config": None, "additional_config": {}, **changes},
        )

    whole = {"graphs": Graphs(True)}
    monkeypatch.setattr(plugin, "find_spec", lambda name: object())
    for way, fine in (
        ("python", config()),
        ("python", config("cuda", eager=True)),
        ("python", config("cuda", graphs=Graphs(False, False))),
        ("split", config("cuda")),
        ("kernel", config("cuda", **whole)),
        ("kernel", config(additional_config=configuration({}, "kernel"))),
    ):
        refuse_ways(fine)
        assert plugin.way_of(fine) == way
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    refuse_ways(config(data_parallel_size=2))
    for said, bad in (
        ("need Triton", config("cuda", **whole)),
        ("leave steerings out", config("xpu")),
        ("leave steerings out", config("cuda", splits=[])),
        ("leave steerings out", config("cuda", inductor=True)),
        ("speculative", config(speculative_config=object())),
        ("data parallelism", config(data_parallel_size=2, moe=True)),
        ("dual batch", config(use_ubatching=True)),
    ):
        with pytest.raises(tt.TrimtabError, match=said):
            refuse_ways(bad)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(tt.TrimtabError, match="unset VLLM_USE_BREAKABLE"):
        refuse_ways(config("cuda"))
