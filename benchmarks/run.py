"""Benchmarks of trimtab against the authors' code, other libraries and the bare model.

    python benchmarks/run.py [extraction|onepass|effects|means|generation|overhead|
                              evaluation|fits|strength|sweeps|playground|all]
                             [--rounds 5] [--pairs N] [--data DIR] [--out FILE.json]

extraction  AUSteer's sign counts at `heads` and `ffn_out` of all layers, on COPA and BoolQ, against
            the authors' way, against a floor (the bare model over each distinct token once), and
            the peak memory of a thousand pairs (extraction.py, memory.py)
onepass     nine methods in one pass against the dearest of them, and against nine passes
            (onepass.py)
effects     the effect of every unit of two kinds of sites against a forward pass, and the
            peak memory of both (effects.py, memory.py)
means       the mean difference at all layers against steering-vectors and repeng (means.py); each
            is installed into an environment of its own in the user's cache, about 1.4 GB
generation  what an attached and a baked steering cost while a model writes (generation.py)
overhead    the same to a thousandth, of every attached kind and of the peers' additive ones
            (overhead.py, lockstep.py)
evaluation  tasks against the authors' way, and a task of lm-eval against its own model
            (evaluation.py)
fits        causal AcT in one pass against a pass a site, AlphaSteer of rank one against units by
            units, steps of training against a loop that runs every block (fits.py)
strength    a curve of 1,025 dials against as many forward passes, budgets against forward passes
            (strength.py)
sweeps      a grid of 169 settings of AUSteer on copa against the authors' way and a plain batched
            evaluation (sweeps.py)
playground  a chat on the playground's server, with its evidence and without, against plain
            generation (playground.py)

What steering costs in vLLM is measured by serving.py, in an environment of its own; the worker's
part of it by rows.py, and the kernel for a card by kernel.py, on one.

What is measured: CPU seconds of the process (user and system) on one thread, with wall seconds
beside them. Contenders take turns within each round, in the opposite order every other round, and
have run once before. Model loading is never counted. A ratio is shown of the best rounds, and as
the median of the rounds' own ratios with its 95 % interval by bootstrap; the target is for the
former, in onepass, effects and overhead for the latter. On a machine with other work, believe the
CPU seconds.

The real data sets of `extraction` (copa/balanced_train.jsonl, boolq/train_small.jsonl), of
`evaluation` (the test files of copa, winogrande and boolq) and of `sweeps` (copa's files) are read
from --data or TRIMTAB_DATA.
The models are packs, which the package index carries. --pairs takes another number of pairs (or
examples) everywhere, for a quick look whose figures mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from clock import Report, machine, one_thread

BENCHMARKS = (
    "extraction",
    "onepass",
    "effects",
    "means",
    "generation",
    "overhead",
    "evaluation",
    "fits",
    "strength",
    "sweeps",
    "playground",
)
#: Those that read data sets.
ON_DATA = ("extraction", "evaluation", "sweeps")


def main() -> int:
    arguments = _arguments()
    chosen = BENCHMARKS if arguments.benchmark == "all" else (arguments.benchmark,)
    for name in ON_DATA:
        if name in chosen and arguments.data is None:
            return _complain(f"{name} reads data sets: give --data DIR or set TRIMTAB_DATA")
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        return _complain(f"cannot write {arguments.out}: there is no such directory")
    one_thread()  # before torch is imported
    import trimtab as tt

    facts, reports = machine(), []
    try:
        for name in chosen:
            reports += _run(name, arguments)
    except tt.TrimtabError as error:
        return _complain(str(error))
    _show(facts, reports)
    if arguments.out is not None:
        content = {
            "machine": facts,
            "rounds": arguments.rounds,
            "benchmarks": [report.as_json() for report in reports],
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", nargs="?", default="all", choices=(*BENCHMARKS, "all"))
    parser.add_argument("--rounds", type=_positive, default=5, help="how often each runs")
    parser.add_argument("--pairs", type=_positive, help="another number of pairs")
    data = os.environ.get("TRIMTAB_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) if data else None)
    parser.add_argument("--out", type=Path, help="write all figures there, as JSON")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _complain(message: str) -> int:
    print(f"benchmarks: {message}", file=sys.stderr)
    return 2


def _run(name: str, arguments: argparse.Namespace) -> list[Report]:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    run: Callable[..., list[Report]] = import_module(name).run
    data = [arguments.data] if name in ON_DATA else []
    return run(*data, arguments.rounds, arguments.pairs, say)


def _show(facts: dict[str, Any], reports: list[Report]) -> None:
    from rich.console import Console
    from rich.table import Table

    seconds = Table("benchmark", "contender", "n", "CPU s", "wall s", title="Best round")
    for column in seconds.columns[2:]:
        column.justify = "right"
    ratios = Table("benchmark", "CPU seconds, ratio", "best", "median", "95 %", "target", "met")
    for column in ratios.columns[2:6]:
        column.justify = "right"
    for report in reports:
        for name, taken in report.times.items():
            n = f"{report.n} {report.facts['unit']}"
            best = f"{min(taken.cpu):.3f}", f"{min(taken.wall):.3f}"
            seconds.add_row(report.name, name, n, *best)
        for ratio in report.ratios:
            figures = f"{ratio.best:.3f}", f"{ratio.median:.3f}"
            interval = "" if ratio.interval is None else "{:.3f} to {:.3f}".format(*ratio.interval)
            met = {None: "", True: "yes", False: "no"}[ratio.met]
            ratios.add_row(report.name, ratio.what, *figures, interval, ratio.target, met)
        seconds.add_section()
        ratios.add_section()
    # Rich takes 80 columns where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(seconds)
    console.print(ratios)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)


if __name__ == "__main__":
    sys.exit(main())
