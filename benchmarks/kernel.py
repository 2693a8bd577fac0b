"""The kernel that steers rows on a card, against the same bank in plain torch and the operators.

    python benchmarks/kernel.py [--rows 64] [--units 4096] [--sites 32] [--out FILE.json]

On a machine with a card it says how far the three are apart, in float32 and bfloat16, whether a
captured CUDA graph replays what is written after it was captured, and how long a graph of all sites
takes that steers no row, half of the rows, or all of them. Without a card, with TRITON_INTERPRET=1,
it compares, and times nothing: that is a test.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.engines import Wanted
from trimtab.engines.at_work import AtWork, Rows
from trimtab.engines.loaded import Step
from trimtab.engines.tokens import Acts
from trimtab.steering import Ablate, Add, Affine, Clamp, Respond, Rotate, Scale, Shift, Turn

DIALS = (0.7, -1.3, 2.0)
EVERYWHERE = (Acts(["all"]),)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--units", type=int, default=4096)
    parser.add_argument("--sites", type=int, default=32)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, interpreted",
        "apart": {str(dtype): compared(asked.units, dtype, device)
                  for dtype in (torch.float32, torch.bfloat16)},
    }  # fmt: skip
    if device == "cuda":
        found["replayed"] = replayed(asked.units)
        found["microseconds"] = timed(asked.rows, asked.units, asked.sites)
    print(json.dumps(found, indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def operators(units: int) -> dict[str, Any]:
    """One of each form that the bank has."""
    draws = torch.Generator().manual_seed(units)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws)

    def rows(count: int) -> Tensor:
        q: Tensor = torch.linalg.qr(drawn(units, count).double())[0]
        return q.T.contiguous().float()

    some = torch.randperm(units, generator=draws)[: units // 3]
    few = len(some)
    low = drawn(few)
    scaled = drawn(units, 4) / units**0.5
    return {
        "Add": Add(drawn(units)),
        "Add always": Add(drawn(units), "always"),
        "Add cap": Add(drawn(units), "cap"),
        "Scale": Scale(some, drawn(few), units),
        "Scale clamped": Scale(some, drawn(few), units, clamp_sign=True),
        "Scale absolute": Scale(some, drawn(few), units, absolute=True),
        "Shift": Shift(some, drawn(few), drawn(few), units),
        "Shift inside": Shift(some, drawn(few), drawn(few), units, low - 1, low + 1),
        "Ablate": Ablate(rows(1)[0]),
        "Ablate 8": Ablate(rows(8)),
        "Affine": Affine(scaled, drawn(units, 4) / units**0.5),
        "Affine constant": Affine(scaled, drawn(units, 4) / units**0.5, drawn(units)),
        "Rotate": Rotate(rows(2)),
        "Turn": Turn(rows(2)),
        "Turn adaptive": Turn(rows(2), adaptive=True),
        "Clamp": Clamp(rows(1)[0], -0.5, 0.5),
        "Clamp low": Clamp(rows(1)[0], 0.25),
        "Respond": Respond(drawn(units), drawn(units) / units**0.5, 0.1),
    }


def filled(units: int, sites: int, rows: int, device: str) -> tuple[AtWork, AtWork]:
    """The same steerings, one of each operator, for the kernel and in plain torch."""
    kernel, plain = AtWork(), AtWork()
    names = [f"layers.{site}.resid" for site in range(sites)]
    kernel.at(names, rows, device)
    plain.at(names)
    for number, operator in enumerate(operators(units).values()):
        # An angle is in degrees.
        weight = 40.0 if type(operator) in (Rotate, Turn) else 1.0
        steps = tuple(Step(i, name, operator, weight) for i, name in enumerate(names))
        kernel.load(f"{number:064x}", steps)
        plain.load(f"{number:064x}", steps)
    return kernel, plain


def asked_of(stacks: list[list[int]]) -> list[Rows]:
    """A request for each row, under the operators of these numbers."""
    return [
        Rows(
            tuple(Wanted(f"{n:064x}", DIALS[(n + row) % 3], EVERYWHERE) for n in stack),
            [], 1, 1, row, row + 1,
        )
        for row, stack in enumerate(stacks) if stack
    ]  # fmt: skip


def compared(units: int, dtype: torch.dtype, device: str) -> dict[str, dict[str, float]]:
    """How far the kernel is from plain torch, and from operators in float64, as a share of the
    largest unit: one operator on a row, and stacks of three; and rows of none, which must be the
    same to the bit."""
    kinds = list(operators(units))
    stacks = [stack for n in range(len(kinds)) for stack in ([n], [n], [n], [])]
    stacks += [[n, (n + 5) % len(kinds), (n + 11) % len(kinds)] for n in range(len(kinds))]
    kernel, plain = filled(units, 1, len(stacks) + 3, device)
    draws = torch.Generator().manual_seed(1)
    x, residual = (
        (3 * torch.randn(len(stacks), units, generator=draws)).to(device, dtype) for _ in range(2)
    )
    apart: dict[str, dict[str, float]] = {}
    for stream in (None, residual):
        got, twin = x.clone(), x.clone()
        for work, of in ((kernel, got), (plain, twin)):
            work.begin(asked_of(stacks), device)
            work.change(of, stream, 0)
        for row, stack in enumerate(stacks):
            old = x[row].double().cpu()
            whole = old if stream is None else old + stream[row].double().cpu()
            new = whole
            for n in stack:
                step = plain.loaded[f"{n:064x}"][0]
                dial = torch.tensor([DIALS[(n + row) % 3] * step.weight])
                new = step.operator.bind(dial, "cpu")(new[None])[0]
            expected = old + (new - whole)
            name = kinds[stack[0]] if len(stack) == 1 else "three" if stack else "none"
            size = 1.0 if not stack else float(torch.stack((whole, new, expected)).abs().max())
            found = apart.setdefault(name, {"plain torch": 0.0, "operators": 0.0})
            for key, other in (("plain torch", twin[row].double().cpu()), ("operators", expected)):
                off = float((got[row].double().cpu() - other).abs().max()) / size
                found[key] = max(found[key], off)
    return apart


def graph_of(work: AtWork, x: Tensor, sites: int) -> Any:
    """A CUDA graph of one pass over all sites."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for site in range(sites):
            work.change(x, None, site)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for site in range(sites):
            work.change(x, None, site)
    return graph


def replayed(units: int) -> float:
    """How far a graph that was captured with nothing steered is from plain torch, when it is
    replayed after lanes were written, and other ones after that."""
    kernel, plain = filled(units, 2, 32, "cuda")
    x = torch.randn(32, units, device="cuda")
    graph, off = graph_of(kernel, x, 2), 0.0
    for first in (0, 7):
        stacks = [[(row + first) % len(operators(units))] if row % 3 else [] for row in range(20)]
        start = torch.randn(32, units, device="cuda")
        x.copy_(start)
        kernel.begin(asked_of(stacks), "cuda")
        graph.replay()
        expected = start.clone()
        plain.begin(asked_of(stacks), "cuda")
        for site in range(2):
            plain.change(expected, None, site)
        off = max(off, float((x - expected).abs().max() / expected.abs().max()))
        assert torch.equal(x[20:], start[20:])
    return off


def timed(rows: int, units: int, sites: int) -> dict[str, float]:
    """Microseconds that a graph takes for all sites, by how many rows are steered."""
    kernel, _ = filled(units, sites, rows, "cuda")
    x = torch.randn(rows, units, device="cuda", dtype=torch.bfloat16)
    graph = graph_of(kernel, x, sites)
    count = len(operators(units))

    def run(stacks: list[list[int]]) -> Callable[[], None]:
        kernel.begin(asked_of(stacks), "cuda")
        return lambda: graph.replay()

    ways = {
        "nothing steered": [],
        "half of the rows, one of each operator in turn": [
            [row % count] if row % 2 else [] for row in range(rows)
        ],
        "all rows added to": [[0] for _ in range(rows)],
        "all rows turned": [[13] for _ in range(rows)],
    }
    found = {}
    for name, stacks in ways.items():
        replay = run(stacks)
        for _ in range(20):
            replay()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            replay()
        torch.cuda.synchronize()
        found[name] = (time.perf_counter() - start) / 200 * 1e6
    return found


if __name__ == "__main__":
    raise SystemExit(main())
