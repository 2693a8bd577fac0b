"""What a worker of an engine takes to steer one pass, without the engine: 16 rows, each under a
steering of its own at 36 sites, by the bank and by the operators one after the other.

    python benchmarks/rows.py [--rounds 15] [--out FILE.json]

A round is 20 passes, of one new token for each row. CPU seconds, contenders in turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clock import Report, interleaved, machine, one_thread, ratio

if TYPE_CHECKING:
    from trimtab.steering import Operator

ROWS, SITES, UNITS, PASSES = 16, 36, 576, 20
KINDS = ("Scale", "Add", "Turn")


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    one_thread()
    ways = {
        f"{kind} by {way}": passes(kind, way == "the bank")
        for kind in KINDS
        for way in ("operators", "the bank")
    }
    for way in ways.values():
        way()
    times = interleaved(ways, asked.rounds)
    shown = [
        ratio(f"{kind}: the bank / operators", times[f"{kind} by the bank"],
              times[f"{kind} by operators"], at_most=0.2, of_median=True)
        for kind in KINDS
    ]  # fmt: skip
    report = Report("rows of one pass", ROWS, times, shown)
    for one in shown:
        low, high = one.interval or (0.0, 0.0)
        print(f"{one.what:32} {one.median:6.3f} [{low:.3f}, {high:.3f}]")
    for name, taken in times.items():
        print(f"{name:32} {min(taken.cpu) / PASSES * 1e3:6.2f} ms for a pass at best")
    if asked.out is not None:
        content = {"machine": machine(), "benchmarks": [report.as_json()]}
        asked.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def passes(kind: str, banked: bool) -> Callable[[], None]:
    """Some passes of the same requests, each a token further on."""
    import torch

    from trimtab.engines import Acts, Wanted
    from trimtab.engines.at_work import AtWork, Rows
    from trimtab.engines.bank import leave
    from trimtab.engines.loaded import Step

    work, wanted = AtWork(), []
    sites = [f"layers.{number}.resid" for number in range(SITES)]
    work.at(sites)
    for row in range(ROWS):
        steps = tuple(Step(i, s, operator(kind, SITES * row + i), 1.0) for i, s in enumerate(sites))
        digest = f"{row:064x}"
        work.load(digest, steps)
        if not banked:
            leave(work.bank, digest)
        wanted.append((Wanted(digest, 0.5 + row / 10, (Acts(["all"]),)),))
    x = torch.randn(ROWS, UNITS)

    def run() -> None:
        for number in range(PASSES):
            work.begin([Rows(wanted[r], [], 5, 5 + number, r, r + 1) for r in range(ROWS)])
            here = x.clone()
            for site in range(SITES):
                work.change(here, None, site)
            work.end()

    return run


def operator(kind: str, seed: int) -> Operator:
    """One of each kind as methods make them."""
    import torch

    from trimtab.steering import Add, Scale, Turn

    draws = torch.Generator().manual_seed(seed)
    if kind == "Scale":
        return Scale(torch.randperm(UNITS, generator=draws)[:3], torch.ones(3), UNITS)
    if kind == "Add":
        return Add(torch.randn(UNITS, generator=draws))
    return Turn(torch.linalg.qr(torch.randn(UNITS, 2, generator=draws))[0].T.contiguous())


if __name__ == "__main__":
    raise SystemExit(main())
