"""Operators of loaded steerings as stacked vectors, so that one tensor operation serves all rows of
a site, whatever their steering and dial.

Each site has a pool of vectors, of which the first is zero. A slot is what a steering does on the
tokens of one scope: at each site a form of arithmetic, which vectors of the pool it takes, a weight
and two numbers. Slot 0 does nothing. A pass says in lanes which slot each row has, and its dial; a
row under several steerings has several lanes, which act in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.engines.forms import MOST, PLANES, Form, changed, packed
from trimtab.engines.loaded import Step
from trimtab.errors import TrimtabError

#: Rows of different steerings that are served at once: each takes copies of its vectors.
_AT_ONCE = 256


class _Held(NamedTuple):
    """A step: its number, its site, its code, its vectors in the pool (0: none), its numbers."""

    number: int
    site: int
    code: int
    vectors: list[int]
    numbers: tuple[float, float, float]


class Room(NamedTuple):
    """What a bank that cannot grow has: vectors of each site, and slots."""

    vectors: int
    slots: int


@dataclass(eq=False)
class Bank:
    """The vectors of all sites, and what slots have of them."""

    sites: list[str]
    #: By site [vectors, units] float32, as long as there is need; and those that nobody has.
    pools: dict[int, Tensor] = field(default_factory=dict)
    free: dict[int, list[int]] = field(default_factory=dict)
    #: [sites, slots]: a form, and above its eight bits how many vectors it has; 0 for nothing.
    codes: Any = None
    #: [sites, slots, MOST]: which vectors of the pool, 0 for none.
    vectors: Any = None
    #: [sites, slots, 3] float64: the weight of a dial, and two numbers.
    numbers: Any = None
    #: By digest.
    steps: dict[str, list[_Held]] = field(default_factory=dict)
    #: Slots by digest and by which intervention has which scope: of each scope, in order.
    slots: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], ...] | None] = field(
        default_factory=dict
    )
    unused: list[int] = field(default_factory=list)
    #: Where pools are, and what there is room for, None where they grow.
    device: torch.device | str = "cpu"
    room: Room | None = None
    #: How often slots have changed.
    version: int = 0

    def __post_init__(self) -> None:
        slots = 1 if self.room is None else self.room.slots
        self.codes = np.zeros((len(self.sites), slots), np.int64)
        self.vectors = np.zeros((len(self.sites), slots, MOST), np.int64)
        self.numbers = np.zeros((len(self.sites), slots, 3))
        self.unused = list(range(1, slots))


def take(bank: Bank, digest: str, steps: Sequence[Step]) -> None:
    """Hold a steering, where all that it does is a form; else nothing of it."""
    leave(bank, digest)
    made = [packed(step.operator) for step in steps if step.gate is None]
    if None in made or len(made) < len(steps):
        return
    held = bank.steps.setdefault(digest, [])
    for step, one in zip(steps, made, strict=True):
        assert one is not None
        site = bank.sites.index(step.site)
        code = one.form + (len(one.vectors) << 8)
        where = _store(bank, site, one.vectors)
        held.append(_Held(step.number, site, code, where, (step.weight, *one.numbers)))


def leave(bank: Bank, digest: str) -> None:
    """Hold a steering no longer."""
    forget(bank, [key for key in bank.slots if key[0] == digest])
    for step in bank.steps.pop(digest, ()):
        bank.free[step.site] += [vector for vector in step.vectors if vector]


def forget(bank: Bank, keys: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Give slots back; who asks for them again gets others."""
    bank.version += 1
    for key in keys:
        for slot in (slot for scope in bank.slots.pop(key) or () for slot in scope):
            bank.codes[:, slot] = Form.NOTHING
            bank.unused.append(slot)


def pool_at(bank: Bank, site: int, width: int) -> Tensor:
    """The vectors of a site of so many units, [vectors, units]."""
    pool = bank.pools.get(site)
    if pool is None:
        count = 1 if bank.room is None else bank.room.vectors
        with torch.inference_mode(False):  # else it could not be changed later
            pool = bank.pools[site] = torch.zeros(count, width, device=bank.device)
        bank.free[site] = list(range(1, count))
    return pool


def _store(bank: Bank, site: int, vectors: Tensor) -> list[int]:
    """Put vectors [n, units] into a site's pool; which they are there."""
    pool = pool_at(bank, site, vectors.shape[-1])
    if pool.shape[-1] != vectors.shape[-1]:
        raise TrimtabError(
            f"{bank.sites[site]} has {pool.shape[-1]} units, and an operator "
            f"{vectors.shape[-1]}: fit the steering on the served model"
        )
    free = bank.free[site]
    taken = [bool(row.any()) for row in vectors]
    if len(free) < sum(taken):
        if bank.room is not None:
            raise TrimtabError(
                f"{bank.sites[site]} has no room for {sum(taken)} vectors more, of "
                f"{bank.room.vectors}: remove a steering first"
            )
        more = max(sum(taken), len(pool))
        free += range(len(pool), len(pool) + more)
        with torch.inference_mode(False):
            pool = torch.cat((pool, pool.new_zeros(more, pool.shape[-1])))
        bank.pools[site] = pool
    where = [free.pop() if any_of else 0 for any_of in taken]
    with torch.inference_mode(False):
        pool[[place for place in where if place]] = vectors[torch.tensor(taken)].to(pool)
    return where


def slots_of(bank: Bank, digest: str, of: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
    """The slots of a steering for each of its scopes; None where the bank does not carry it: it
    does something else, or at one site something on one scope and something on another."""
    key = digest, of
    if key not in bank.slots and digest in bank.steps:
        bank.slots[key] = _slots(bank, bank.steps[digest], of)
    return bank.slots.get(key)


def _slots(
    bank: Bank, steps: list[_Held], of: tuple[int, ...]
) -> tuple[tuple[int, ...], ...] | None:
    # How many steps there were at a site before; one after the other are in slots of their own.
    before: dict[int, tuple[int, int]] = {}
    bank.version += 1
    scopes = [of[step.number] if step.number < len(of) else 0 for step in steps]
    for step, scope in zip(steps, scopes, strict=True):
        whose, _ = before.setdefault(step.site, (scope, 0))
        if whose != scope:
            return None
        before[step.site] = scope, before[step.site][1] + 1
    deepest = [
        max((count for whose, count in before.values() if whose == scope), default=0)
        for scope in range(max(of, default=0) + 1)
    ]
    if bank.room is not None and sum(deepest) > len(bank.unused):
        raise TrimtabError(f"all {bank.room.slots} places are taken: remove a steering first")
    found = [[_slot(bank) for _ in range(count)] for count in deepest]
    for site, (scope, _) in before.items():
        own = [step for step in steps if step.site == site]
        for slot, step in zip(found[scope], own, strict=False):
            bank.codes[site, slot] = step.code
            bank.vectors[site, slot] = 0
            bank.vectors[site, slot, : len(step.vectors)] = step.vectors
            bank.numbers[site, slot] = step.numbers
    return tuple(map(tuple, found))


def _slot(bank: Bank) -> int:
    """A slot that nobody has."""
    if not bank.unused:
        count = bank.codes.shape[1]
        bank.unused += range(count, 2 * count)
        for name in ("codes", "vectors", "numbers"):
            old = getattr(bank, name)
            setattr(bank, name, np.concatenate((old, np.zeros_like(old)), axis=1))
    return bank.unused.pop()


# -- a pass ---------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Rows of a pass at a site that have one form: which, the code, their vectors in the pool [n *
    count] and their numbers [n, 2], n 1 where all are of one slot, and dials as `changed` has them.
    """

    rows: Tensor | slice
    code: int
    vectors: Tensor
    numbers: Tensor
    dials: Tensor


def groups_at(
    bank: Bank, site: int, slots: Any, dials: Any, device: torch.device | str
) -> list[Group]:
    """What rows have at a site, by slots [lanes, rows] and dials [lanes, rows]: lane by lane."""
    found = []
    for own, turned in zip(slots, dials, strict=True):
        codes = bank.codes[site, own]
        for code in np.unique(codes):
            if code == Form.NOTHING:
                continue
            rows = np.flatnonzero(codes == code)
            if len(rows) > _AT_ONCE and len(np.unique(own[rows])) > 1:
                rows = rows[np.argsort(own[rows], kind="stable")]
                parts = np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE))
            else:
                parts = [rows]
            found += [
                _group(bank, site, int(code), part, own[part], turned[part], device)
                for part in parts
            ]
    return found


def _group(
    bank: Bank, site: int, code: int, rows: Any, own: Any, dials: Any, device: torch.device | str
) -> Group:
    numbers = bank.numbers[site, own]
    turned = (dials * numbers[:, 0]).astype(np.float32)[:, None]
    if (own == own[0]).all():
        own, numbers = own[:1], numbers[:1]
    vectors = bank.vectors[site, own, : code >> 8].ravel()
    if code & 255 in PLANES:
        angles = np.deg2rad(turned.astype(np.float64))
        less = float(code & 255 == Form.ROTATE)
        turned = np.concatenate((np.cos(angles) - less, np.sin(angles)), axis=1, dtype=np.float32)
    first, stop = int(rows[0]), int(rows[-1]) + 1
    # Rows that follow one another are a view, which takes no copy.
    whole = stop - first == len(rows) and bool((np.diff(rows) == 1).all())
    return Group(
        slice(first, stop) if whole else torch.from_numpy(rows).to(device),
        code,
        torch.from_numpy(vectors).to(device),
        torch.from_numpy(numbers[:, 1:].astype(np.float32)).to(device),
        torch.from_numpy(turned).to(device),
    )


def change_group(bank: Bank, site: int, group: Group, x: Tensor, residual: Tensor | None) -> None:
    """Change the rows of a group in place; with a residual the activation is the sum of both, and x
    takes the change."""
    pool, count = bank.pools[site], group.code >> 8
    if pool.device != x.device:
        pool = bank.pools[site] = pool.to(x.device)
    vectors = pool.index_select(0, group.vectors).view(-1, count, pool.shape[-1])
    old = x[group.rows].float()
    form = Form(group.code & 255)
    if residual is None:
        x[group.rows] = changed(form, old, vectors, group.numbers, group.dials).to(x.dtype)
    else:
        whole = old + residual[group.rows].float()
        new = changed(form, whole, vectors, group.numbers, group.dials)
        x[group.rows] = (old + (new - whole)).to(x.dtype)
