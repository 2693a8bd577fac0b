"""Gates where an engine runs the model: what workers read of prompts and decide token by token is
what transformers makes of the same texts, however they are cut into passes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import IDS, PROMPTS, language_model, steer, steer_at, token_ids
from operator_formulas import random_operator
from trimtab.engines import (
    Read,
    ReadingOf,
    extra_args,
    places_of,
    reading_args,
    sites_of,
    steps_of,
    wanted_of,
)
from trimtab.engines.acting import Reading
from trimtab.engines.asking import READING, block_key, reading_by
from trimtab.engines.at_work import AT_WORK, AtWork, Rows
from trimtab.engines.modules import install
from trimtab.model.gate_scores import score_prompts
from trimtab.serving import Carried
from trimtab.serving.deciding import mean_of, refuse_what_it_sees
from trimtab.serving.placing import acts_of
from trimtab.steering import READS_LAST, Condition, Gate

PROMPT = len(IDS) - 4


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def direction(seed: int) -> Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed))


def token_gate() -> Gate:
    """One that fires at some tokens of a text and not at others."""
    first = Condition("layers.0.resid", direction(1), 0.0, score="projection")
    second = Condition("layers.1.ffn_out", direction(2), 0.0, score="projection")
    return Gate((first,)) | ~Gate((second,))


@pytest.fixture
def hooked(lm: tt.LanguageModel) -> Iterator[list[tt.Steering]]:
    """The model of transformers with an engine's hooks on it, and steerings under a token gate."""
    add = steer(lm, ("layers.1.resid", random_operator("Add", 5, 48)), alpha=3.0)
    turn = steer(lm, ("layers.2.ffn_norm", random_operator("Turn", 6, 48)), alpha=140.0)
    early = steer(lm, ("layers.0.resid", random_operator("Add", 7, 48)), alpha=2.0)
    steerings = [add.gated(token_gate()), turn.gated(token_gate()).scoped("generated"), early, add]
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


def test_token_gates_fire_where_they_do_in_transformers(
    lm: tt.LanguageModel, hooked: list[tt.Steering]
) -> None:
    gated, later, early, plain = hooked
    for stack in ([gated], [later], [early, gated], [gated, early, later], [plain, gated]):
        wanted = tuple(wanted_of(one, partial(acts_of, lm)) for one in stack)
        reading = Reading(ReadingOf("0" * 32))
        AT_WORK.begin([Rows(wanted, IDS, PROMPT, 0, 0, len(IDS), reading)])
        with torch.no_grad():
            got = lm.model(torch.tensor([IDS]), use_cache=False).logits[0]
        AT_WORK.end()
        with lm.steered(*stack) as sequences, torch.no_grad():
            sequences.given_ends = [PROMPT]
            for work in sequences.gates:
                work.watched = True
            expected = lm.model(torch.tensor([IDS]), use_cache=False).logits[0]
            seen = {work.rank: work.seen[-1] for work in sequences.gates}
        assert torch.allclose(got, expected, atol=1e-4), stack
        for rank, of in seen.items():
            assert reading.fired[rank] == of.fired[0, :PROMPT].nonzero()[:, 0].tolist()
            assert torch.allclose(
                reading.scores[rank].float(), of.scores[:, 0, PROMPT - 1], atol=1e-4
            )
            assert 0 < int(of.fired.sum()) < of.fired.numel()


def test_pieces_of_prompts_and_rows_of_others(lm: tt.LanguageModel) -> None:
    """A prompt in pieces, one of which is read twice, beside others; rows at which a gate does not
    fire stay as they are to the bit."""
    gate = Gate((Condition("layers.0.resid", direction(3), 0.0, score="projection"),))
    add = steer(lm, ("layers.1.resid", random_operator("Add", 5, 48)), alpha=2.0).gated(gate)
    bare = steer(lm, ("layers.1.resid", random_operator("Add", 5, 48)), alpha=2.0)
    work = AtWork()
    work.at(["layers.0.resid", "layers.1.resid"])
    wanted = (wanted_of(add, partial(acts_of, lm)),)
    free = (wanted_of(bare, partial(acts_of, lm)),)
    assert wanted[0].digest != free[0].digest
    work.load(wanted[0].digest, steps_of(add))
    work.load(free[0].digest, steps_of(bare))
    low, high = torch.randn(9, 48), torch.randn(9, 48)
    reading = Reading(ReadingOf("1" * 32, (Read("layers.0.resid"),)))
    got = torch.zeros_like(high)

    def run(position: int, first: int, stop: int) -> None:
        rows = [
            Rows(wanted, [], 7, position, 2, 2 + stop - first, reading),
            Rows(free, [], 3, 0, 0, 2),
        ]
        work.begin(rows)
        x = torch.cat((torch.randn(2, 48), low[first:stop]))
        work.change(x, None, 0)
        y = torch.cat((torch.ones(2, 48), high[first:stop]))
        work.change(y, None, 1)
        got[first:stop] = y[2:]
        assert not torch.equal(y[:2], torch.ones(2, 48))

    for position, first, stop in ((0, 0, 3), (3, 3, 5), (0, 0, 5), (5, 5, 9)):
        run(position, first, stop)
    fires = low @ gate.conditions[0].direction > 0
    operator = add.interventions[0].operator
    assert torch.equal(got[~fires], high[~fires])
    assert torch.allclose(got[fires], operator.bind(2.0, "cpu")(high[fires]), atol=1e-6)
    assert reading.fired[0] == fires[:7].nonzero()[:, 0].tolist()
    assert torch.allclose(reading.sums[0], low[6].double())
    assert reading.counts[0] == 1


def test_what_gates_read_of_prompts(lm: tt.LanguageModel, hooked: list[tt.Steering]) -> None:
    """Sums of a prompt in pieces come to the scores that transformers has of it."""
    conditions = (
        Condition("layers.0.resid", direction(4), 0.1),
        Condition("layers.1.ffn_out", direction(5), 0.0, score="projection", reads=READS_LAST),
        Condition("layers.1.resid", direction(6), 0.0, reads="token(260, 265, 270)"),  # type: ignore[arg-type]
    )
    gate = Gate(conditions, "two-pass")
    for text in PROMPTS[:2]:
        ids = token_ids(text)
        reads = tuple(
            Read(c.site, None if c.reads == READS_LAST else acts_of(lm, c.reads))
            for c in conditions
        )
        of = reading_by(SimpleNamespace(extra_args=reading_args(ReadingOf("2" * 32, reads))))
        assert of is not None
        reading = Reading(of)
        with torch.no_grad():
            states = {c.site: [] for c in conditions}  # type: dict[str, list[Tensor]]
            handles = []
            for site in states:
                module = lm.anatomy.point(site).module
                handles.append(module.register_forward_hook(
                    lambda m, a, out, site=site: states[site].append(
                        (out[0] if isinstance(out, tuple) else out).reshape(-1, 48))))  # fmt: skip
            lm.model(torch.tensor([ids]), use_cache=False)
            for handle in handles:
                handle.remove()
        for first, stop in ((0, 2), (2, len(ids) - 1), (len(ids) - 1, len(ids))):
            AT_WORK.begin([Rows((), ids, len(ids), first, 0, stop - first, reading)])
            for site, seen in states.items():
                AT_WORK.change(seen[0][first:stop].clone(), None, AT_WORK.sites.index(site))
        told = {f"sum {i}": total for i, total in reading.sums.items()} | {
            f"count {i}": torch.tensor(n) for i, n in reading.counts.items()
        }
        means = [mean_of(i, c.site, [told], 48) for i, c in enumerate(conditions)]
        scores = torch.stack([c.scores(mean) for c, mean in zip(conditions, means, strict=True)])
        expected = score_prompts(lm.anatomy, lm.marks, gate, [ids])[:, 0]
        assert torch.allclose(scores, expected, atol=1e-5, equal_nan=True)


def test_ranks_that_split_a_site_have_a_part_of_its_mean() -> None:
    whole = torch.arange(6.0, dtype=torch.float64)
    ranks = [{"sum 0": part, "count 0": torch.tensor(2)} for part in whole.chunk(2)]
    assert torch.equal(mean_of(0, "layers.0.heads", ranks, 6), whole / 2)
    same = [{"sum 0": whole, "count 0": torch.tensor(2)}] * 2
    assert torch.equal(mean_of(0, "layers.0.resid", [{}, *same], 6), whole / 2)
    assert mean_of(0, "layers.0.resid", [{}], 6).isnan().all()


def test_blocks_that_a_gate_decided_are_its_own(lm: tt.LanguageModel) -> None:
    steering = steer_at(lm, "resid").at(2)
    gates = [None, token_gate(), ~token_gate()]
    keys = {
        tuple(block_key([wanted_of(steering.gated(gate), partial(acts_of, lm))], IDS, 4, 0, 8))
        for gate in gates
    }
    assert len(keys) == len(gates)


def test_what_is_refused(lm: tt.LanguageModel) -> None:
    low, high = steer_at(lm, "resid", layer=0), steer_at(lm, "resid", layer=2)
    latched = high.scoped("generated").gated(
        Gate((Condition("layers.1.resid", direction(1), 0.0),), "latched")
    )
    with pytest.raises(tt.TrimtabError, match="of_kind"):
        refuse_what_it_sees(latched, [low])
    refuse_what_it_sees(latched, [low.scoped("generated"), high])
    carried = Carried(lm.anatomy)
    assert carried(latched) == ""
    carried.sites = ["layers.2.resid"]
    assert "--hook resid" in carried(latched)
    by_heads = high.gated(Gate((Condition("layers.1.heads", torch.ones(48), 0.0),)))
    assert "2 ranks share" in Carried(lm.anatomy, ranks=2)(by_heads)
    assert "another stage" in Carried(lm.anatomy, stages=2)(by_heads)
    assert Carried(lm.anatomy, ranks=2, stages=2)(latched) == ""
    bad: list[Any] = [7, "[", '{"name": "x", "reads": []}', '{"name": 1}']
    for text in bad:
        with pytest.raises(ValueError, match="cannot be read"):
            reading_by(SimpleNamespace(extra_args={READING: text}))
    assert reading_by(SimpleNamespace(extra_args=extra_args([]))) is None
