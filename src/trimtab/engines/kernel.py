"""The bank on a card: one Triton kernel per site that a captured CUDA graph can replay.

All that it reads stands at fixed addresses: the pools of vectors, the tables of slots, and lanes,
which are written before each pass. It is launched with a program for each row, also for those that
only fill a graph up, and a row that has no slot in any lane is neither read nor written.

The kernel computes as `forms.changed` does, which runs the same bank on a CPU and in eager mode,
with all lanes of a row in registers and rounded once. Its tests run it in Triton's interpreter,
against that and against the operators themselves, and compile it for a card. It has not run on one
yet, nor in a captured graph: `python benchmarks/kernel.py`, on a machine with one, compares all
three, replays a graph and times it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.engines.asking import MOST_STACKED
from trimtab.engines.bank import Bank, Room, pool_at
from trimtab.engines.forms import MOST
from trimtab.engines.loaded import MOST_AT_A_SITE

try:
    import triton
    import triton.language as tl
except ImportError:  # where there is no card there need not be a Triton
    triton = tl = None

#: How many slots a row may have in a pass.
LANES = MOST_STACKED * MOST_AT_A_SITE
#: Vectors that a site has room for, and slots that there are.
ROOM = Room(vectors=256, slots=1024)


@dataclass(eq=False)
class Fixed:
    """What the kernel reads, at addresses that stay."""

    #: Those of the bank, [sites, slots], [sites, slots, MOST] and [sites, slots, 3].
    codes: Tensor
    vectors: Tensor
    numbers: Tensor
    #: Of the pass at hand [LANES, rows].
    slots: Tensor
    dials: Tensor
    #: How many of the lanes it has, and the row that is noted, -1 for none.
    head: Tensor
    #: By site the activation that was noted last, [units].
    noted: dict[int, Tensor] = field(default_factory=dict)
    #: Which bank is written here, and up to which row lanes are not empty.
    version: int = -1
    filled: int = 0
    idle: bool = True


def fixed_for(bank: Bank, rows: int, device: torch.device | str) -> Fixed:
    """Buffers for passes of so many rows at most."""
    with torch.inference_mode(False):
        sites, slots = bank.codes.shape
        return Fixed(
            torch.zeros(sites, slots, dtype=torch.int32, device=device),
            torch.zeros(sites, slots, MOST, dtype=torch.int32, device=device),
            torch.zeros(sites, slots, 3, device=device),
            torch.zeros(LANES, rows, dtype=torch.int32, device=device),
            torch.zeros(LANES, rows, device=device),
            torch.tensor([0, -1], dtype=torch.int32, device=device),
        )


def write_pass(fixed: Fixed, bank: Bank, slots: Any, dials: Any, noted: int) -> None:
    """Say which slot each row of the next pass has, slots and dials [lanes, rows], and which row is
    noted (-1: none)."""
    if fixed.version != bank.version:
        for name in ("codes", "vectors", "numbers"):
            here: Tensor = getattr(fixed, name)
            here.copy_(torch.from_numpy(getattr(bank, name)))
        fixed.version = bank.version
    lanes, rows = slots.shape
    if not lanes and noted < 0:
        write_nothing(fixed)
        return
    if lanes:
        # Rows after these fill a graph up, or had a slot in the last pass.
        wide = max(rows, fixed.filled)
        for here, given in ((fixed.slots, slots), (fixed.dials, dials)):
            padded = np.zeros((LANES, wide), np.int32 if here is fixed.slots else np.float32)
            padded[:lanes, :rows] = given
            here[:, :wide].copy_(torch.from_numpy(padded))
        fixed.filled = rows
    fixed.head.copy_(torch.tensor([lanes, noted], dtype=torch.int32))
    fixed.idle = False


def write_nothing(fixed: Fixed) -> None:
    """Leave all rows as they are until the next pass is written."""
    if not fixed.idle:
        fixed.head.copy_(torch.tensor([0, -1], dtype=torch.int32))
        fixed.idle = True


def launch(fixed: Fixed, bank: Bank, x: Tensor, residual: Tensor | None, site: int) -> None:
    """Change the rows of x [rows, units] at a site in place; with a residual the activation is the
    sum of both, and x takes the change."""
    rows, width = x.shape
    if not rows:
        return
    pool = pool_at(bank, site, width)
    if site not in fixed.noted:
        with torch.inference_mode(False):
            fixed.noted[site] = torch.zeros(width, device=x.device)
    block = triton.next_power_of_2(width)
    _steer[(rows,)](
        (x, x.stride(0)),
        (x, 0) if residual is None else (residual, residual.stride(0)),
        (pool, fixed.codes[site], fixed.vectors[site], fixed.numbers[site]),
        (fixed.slots, fixed.dials, fixed.slots.stride(0), fixed.head),
        fixed.noted[site],
        width,
        STREAM=residual is not None,
        MOST=MOST,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )


# What Triton compiles has no types of Python.
def _steer_rows(  # type: ignore[no-untyped-def]
    into, beside, bank, lanes_of, noted, width,
    STREAM: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x, x_stride = into
    residual, residual_stride = beside
    pool, codes, vectors, numbers = bank
    slots, dials, rows, head = lanes_of
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.load(head)
    is_noted = tl.load(head + 1) == row
    steered = 0
    for lane in range(0, lanes):
        steered += tl.load(slots + lane * rows + row)
    if (steered > 0) | is_noted:
        units = tl.arange(0, BLOCK)
        inside = units < width
        old = tl.load(x + row * x_stride + units, inside, 0.0).to(tl.float32)
        whole = old
        if STREAM:
            whole += tl.load(residual + row * residual_stride + units, inside, 0.0).to(tl.float32)
        if is_noted:
            tl.store(noted + units, whole, inside)
        new = whole
        for lane in range(0, lanes):
            slot = tl.load(slots + lane * rows + row)
            code = tl.load(codes + slot)
            if code > 0:
                form = code & 255
                weight = tl.load(numbers + slot * 3)
                dial = tl.load(dials + lane * rows + row) * weight
                low = tl.load(numbers + slot * 3 + 1)
                high = tl.load(numbers + slot * 3 + 2)
                which = vectors + slot * MOST
                first = tl.load(pool + tl.load(which).to(tl.int64) * width + units, inside, 0.0)
                second = tl.load(
                    pool + tl.load(which + 1).to(tl.int64) * width + units, inside, 0.0
                )
                if form <= 3:  # ADD, KEPT, CAPPED
                    moved = new + dial * first
                    if form > 1:
                        length = tl.sqrt(tl.sum(new * new))
                        now = tl.maximum(tl.sqrt(tl.sum(moved * moved)), 1.1754943508222875e-38)
                        factor = length / now
                        if form == 3:
                            factor = tl.minimum(factor, 1.0)
                        moved = moved * factor
                    new = moved
                elif form <= 6:  # SCALE, CLAMPED, ABSOLUTE
                    if form == 6:
                        new = new + tl.abs(new) * (dial * first)
                    else:
                        factors = 1 + dial * first
                        if form == 5:
                            factors = tl.maximum(factors, 0.0)
                        new = new * factors
                elif form <= 8:  # SHIFT, INTERVAL
                    mapped = new * (1 + dial * first) + dial * second
                    if form == 8:
                        below = pool + tl.load(which + 2).to(tl.int64) * width
                        above = pool + tl.load(which + 3).to(tl.int64) * width
                        ends = tl.load(below + units, inside, 0.0)
                        mapped = tl.where(new > ends, mapped, new)
                        ends = tl.load(above + units, inside, 0.0)
                        mapped = tl.where(new < ends, mapped, new)
                    new = mapped
                elif form == 9:  # MAP
                    rank = (code >> 8) // 2
                    change = first
                    for k in range(0, rank):
                        reader = pool + tl.load(which + 1 + k).to(tl.int64) * width
                        added = pool + tl.load(which + 1 + rank + k).to(tl.int64) * width
                        along = tl.sum(new * tl.load(reader + units, inside, 0.0))
                        change += along * tl.load(added + units, inside, 0.0)
                    new = new + dial * change
                elif form <= 12:  # ROTATE, TURN, ADAPTIVE
                    angle = dial * 0.017453292519943295
                    cos = tl.cos(angle)
                    sin = tl.sin(angle)
                    a = tl.sum(new * first)
                    b = tl.sum(new * second)
                    if form == 10:
                        half = tl.sin(angle * 0.5)
                        less = -2 * half * half
                        more_a = less * a - sin * b
                        more_b = sin * a + less * b
                    else:
                        length = tl.sqrt(a * a + b * b)
                        more_a = length * cos - a
                        more_b = length * sin - b
                        if form == 12:
                            keep = (a > 0).to(tl.float32)
                            more_a = more_a * keep
                            more_b = more_b * keep
                    new = new + more_a * first + more_b * second
                elif form == 13:  # BOUNDED
                    along = tl.sum(new * first)
                    new = new + dial * (tl.minimum(tl.maximum(along, low), high) - along) * first
                else:  # RESPOND
                    read = tl.maximum(tl.sum(new * first) + low, 0.0)
                    new = new + dial * read * second
        if steered > 0:
            if STREAM:
                new = old + (new - whole)
            tl.store(x + row * x_stride + units, new.to(x.dtype.element_ty), inside)


_steer: Any = None if triton is None else triton.jit(_steer_rows)
