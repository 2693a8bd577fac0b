"""Rows of one pass under steerings of their own, served together: each gets what the operators
themselves make of it alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from operator_formulas import ALL, random_operator
from trimtab.engines import Acts, Wanted, at_work
from trimtab.engines.at_work import AtWork, Rows
from trimtab.engines.forms import MOST, packed
from trimtab.engines.loaded import Step
from trimtab.steering import Ablate, Add, Affine

WIDTH, SITES = 24, ["layers.0.resid", "layers.1.resid"]
CARRIED = [name for name in ALL if not name.startswith("features")]
EVERYWHERE = (Acts(["all"]),)
#: How far float32 and what is rounded once more may lie apart, of an activation's largest unit.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def digest(number: int) -> str:
    return f"{number:064x}"


def dial_of(number: int, row: int) -> float:
    return (-1.0) ** row * (0.3 + 0.41 * ((number + row) % 7))


def loaded(names: list[str], copies: int = 2) -> tuple[AtWork, list[tuple[Step, ...]]]:
    """Steerings of every operator, each several times over with other numbers, at both sites."""
    work, steerings = AtWork(), []
    work.at(SITES)
    for number, name in enumerate(name for name in names for _ in range(copies)):
        steps = tuple(
            Step(place, site, random_operator(name, 7 * number + place + 25, WIDTH), 0.5 + place)
            for place, site in enumerate(SITES)
        )
        work.load(digest(number), steps)
        steerings.append(steps)
    return work, steerings


def alone(steps: Any, site: int, dial: float, whole: Tensor) -> Tensor:
    """What the operators make of one activation [units] in float64's arithmetic."""
    for step in steps:
        if step.site == SITES[site]:
            dials = torch.tensor([dial * step.weight], dtype=torch.float64).float()
            whole = step.operator.bind(dials, "cpu")(whole[None])[0]
    return whole


def sizes(dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple((3 * torch.randn(2, rows, WIDTH, generator=generator)).to(dtype))  # type: ignore


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("stream", [False, True])
def test_every_operator_at_once(dtype: torch.dtype, stream: bool) -> None:
    """One, two or three of them on a row, each at its own dial, beside rows of none."""
    # Features end at a threshold, where rounding decides.
    work, steerings = loaded(list(ALL) if dtype == torch.float32 else CARRIED)
    assert set(work.bank.steps) == {digest(n) for n in range(2 * len(CARRIED))}
    rows = 3 * len(steerings)
    stacks: list[list[int]] = [
        [] if row % 5 == 4 else [(row + 11 * i) % len(steerings) for i in range(1 + row % 3)]
        for row in range(rows)
    ]
    requests = [
        Rows(
            tuple(Wanted(digest(n), dial_of(n, row), EVERYWHERE) for n in stack),
            [], 4, 4 + row, row, row + 1,
        )
        for row, stack in enumerate(stacks) if stack
    ]  # fmt: skip
    x, residual = sizes(dtype, rows)
    for _ in range(2):  # the second time as the first one was planned
        work.begin(requests)
        for site in range(len(SITES)):
            got = x.clone()
            work.change(got, residual if stream else None, site)
            for row, stack in enumerate(stacks):
                old = x[row].double()
                whole = old + residual[row].double() if stream else old
                new = whole
                for n in stack:
                    new = alone(steerings[n], site, dial_of(n, row), new)
                expected = old + (new - whole)
                largest = float(torch.stack((whole, new, expected)).abs().max())
                off = float((got[row].double() - expected).abs().max())
                # What one has rounded the next one may make larger.
                assert off <= ROUNDING[dtype] * (1 + largest) * 4.0 ** max(0, len(stack) - 1)
                if not stack:
                    assert torch.equal(got[row], x[row])
    work.end()
    still = x.clone()
    work.change(still, None, 0)
    assert torch.equal(still, x)


@pytest.mark.parametrize("name", CARRIED)
def test_many_rows(name: str) -> None:
    """More rows than are gathered at once: of one steering, and of several in turn; rows of a dial
    of 0 stay as they are to the bit, where the operator says so."""
    work, steerings = loaded([name], copies=3)
    x, residual = sizes(torch.float32, 600)
    for different in (1, 3):
        wanted = [Wanted(digest(n), float(n), EVERYWHERE) for n in range(different)]
        requests = [Rows((one,), [], 1, 1, 0, 600) for one in wanted[:1]]
        if different > 1:
            requests = [Rows((wanted[r % 3],), [], 1, 1, r, r + 1) for r in range(600)]
        work.begin(requests)
        got = x.clone()
        work.change(got, residual, 1)
        for n in range(different):
            own = slice(n, None, different)
            whole = x[own] + residual[own]
            expected = x[own] + (alone_rows(steerings[n], float(n), whole) - whole)
            assert torch.allclose(got[own], expected, atol=2e-5), (different, n)
        if steerings[0][1].operator.identity == 0:
            assert torch.equal(got[::different], x[::different])


def alone_rows(steps: Any, dial: float, whole: Tensor) -> Tensor:
    dials = torch.full((len(whole),), dial * steps[1].weight)
    return steps[1].operator.bind(dials, "cpu")(whole)


def test_two_at_one_site_and_scopes_of_their_own() -> None:
    add, turn, ablate = (random_operator(name, 4, WIDTH) for name in ("Add", "Turn", "Ablate"))
    work = AtWork()
    work.at(SITES)
    twice = (Step(0, SITES[0], add, 1.0), Step(1, SITES[0], turn, 40.0))
    apart = (Step(0, SITES[0], ablate, 1.0), Step(1, SITES[1], add, 1.0))
    work.load(digest(0), twice)
    work.load(digest(1), apart)
    prompt, generated = Acts(["prompt"]), Acts(["generated"], 0.5)
    requests = [
        Rows((Wanted(digest(0), 1.5, (prompt,)),), [], 3, 0, 0, 5),
        Rows((Wanted(digest(1), 0.5, (prompt, generated), (0, 1)),), [], 3, 1, 5, 9),
        # At one site something on one scope and something on another: by the operators.
        Rows((Wanted(digest(0), 2.0, (prompt, generated), (1, 0)),), [], 2, 0, 9, 13),
    ]
    work.begin(requests)
    x, _ = sizes(torch.float32, 13)
    first, second = x.clone(), x.clone()
    work.change(first, None, 0)
    work.change(second, None, 1)
    expected = x.clone()
    expected[:3] = turn.bind(60.0, "cpu")(add.bind(1.5, "cpu")(x[:3]))
    expected[5:7] = ablate.bind(0.5, "cpu")(x[5:7])
    decayed = torch.tensor([2.0, 1.0])
    expected[11:13] = add.bind(decayed, "cpu")(x[11:13])
    expected[9:11] = turn.bind(80.0, "cpu")(x[9:11])
    assert torch.allclose(first, expected, atol=2e-5)
    assert sum(len(acts) for acts in work.plan.values()) == 2
    expected = x.clone()
    expected[7:9] = add.bind(torch.tensor([0.5, 0.25]), "cpu")(x[7:9])
    assert torch.allclose(second, expected, atol=2e-5)


def test_what_comes_after_one_that_left() -> None:
    """Places are given back and had by others, and no row gets what was there before."""
    work = AtWork()
    work.at(SITES)
    kept = random_operator("Add", 1, WIDTH)
    work.load(digest(0), (Step(0, SITES[0], kept, 1.0),))
    x, _ = sizes(torch.float32, 2)
    sized = None
    for turn in range(1, 12):
        operator = random_operator(CARRIED[turn], 30 + turn, WIDTH)
        work.load(digest(turn), (Step(0, SITES[turn % 2], operator, 1.0),))
        requests = [
            Rows((Wanted(digest(n), 1.0, EVERYWHERE),), [], 1, 1, row, row + 1)
            for row, n in enumerate((0, turn))
        ]
        work.begin(requests)
        got = x.clone()
        work.change(got, None, 0)
        assert torch.allclose(got[0], kept.bind(1.0, "cpu")(x[0]), atol=1e-5)
        own = operator.bind(1.0, "cpu")(x[1]) if turn % 2 == 0 else x[1]
        assert torch.allclose(got[1], own, atol=2e-5)
        work.unload(digest(turn))
        work.begin([*requests[:1], requests[1]._replace(wanted=())])
        assert work.missed == 0
        if turn == 6:
            sized = work.bank.codes.shape, {s: len(p) for s, p in work.bank.pools.items()}
    assert sized is not None
    assert work.bank.codes.shape == sized[0]
    assert all(len(work.bank.pools[site]) <= 4 * MOST for site in sized[1])
    work.unload(digest(0))
    assert not work.bank.steps
    assert not work.bank.slots
    assert not np.any(work.bank.codes)


def test_slots_of_other_requests_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way in which scopes are shared out takes slots, which come to an end."""
    monkeypatch.setattr(at_work, "_KEPT", 3)
    work, x = AtWork(), sizes(torch.float32, 1)[0]
    work.at(SITES)
    add = random_operator("Add", 4, WIDTH)
    work.load(digest(0), tuple(Step(i, site, add, 1.0) for i, site in enumerate(SITES)))
    for turn in range(20):
        scopes = (Acts(["generated"]),) * (turn + 1)
        wanted = Wanted(digest(0), 1.0 + turn, scopes, (0,) * turn + (turn,))
        work.begin([Rows((wanted,), [], 1, 1, 0, 1)])
        got = x.clone()
        work.change(got, None, 0)
        assert torch.allclose(got, add.bind(1.0 + turn, "cpu")(x), atol=1e-5)
    assert work.bank.codes.shape[1] <= 16


def test_what_the_bank_leaves_to_operators() -> None:
    class Twice(Add):
        """One of a plugin, which does something else."""

    rank = torch.randn(WIDTH, 9)
    assert packed(Twice(torch.randn(WIDTH))) is None
    assert packed(Affine(rank, rank)) is None
    assert packed(Affine(rank[:, :8], rank[:, :8])) is not None
    assert packed(Ablate(torch.linalg.qr(rank)[0].T.contiguous())) is None
    assert packed(random_operator("features ablate", 1, WIDTH)) is None
    work = AtWork()
    work.at(SITES)
    mixed = (Step(0, SITES[0], random_operator("Add", 1, WIDTH), 1.0),
             Step(1, SITES[0], Affine(rank, rank), 1.0))  # fmt: skip
    work.load(digest(0), mixed)
    work.begin([Rows((Wanted(digest(0), 0.1, EVERYWHERE),), [], 1, 0, 0, 3)])
    x, _ = sizes(torch.float32, 4)
    got = x.clone()
    work.change(got, None, 0)
    expected = mixed[1].operator.bind(0.1, "cpu")(mixed[0].operator.bind(0.1, "cpu")(x[:3]))
    assert torch.allclose(got[:3], expected, atol=1e-5)
    assert torch.equal(got[3], x[3])
