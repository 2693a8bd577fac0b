"""What is found in a tiny model of every architecture that transformers knows, as a table.

`python tests/architectures_table.py` writes it into docs/architectures.md, and says the same of
the names given, if any, in the terminal.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import every_architecture
from trimtab.anatomy import Anatomy
from trimtab.errors import TrimtabError

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
BEGIN, END = "<!-- every architecture: begin -->", "<!-- every architecture: end -->"
CORE = ("heads", "attn_out", "ffn_in", "ffn_out")

#: What a row says, and in which order the rows are counted.
KINDS = {
    "complete": "every core site in every layer",
    "hybrid": "every branch that exists; heads where there is attention",
    "parts": "some of the core sites",
    "stream": "the residual stream alone",
    "refused": "refused, with the reason",
    "no text": "does not run on text alone",
    "not built": "cannot be built small",
}


def found(name: str) -> tuple[str, str]:
    """What is found of one architecture: a kind of `KINDS`, and what is missing and why."""
    try:
        model = every_architecture.build(name)
    except every_architecture.NotBuilt as error:
        return "not built", str(error).removeprefix(f"{name}: ")
    try:
        anatomy = Anatomy(model)
    except TrimtabError as error:
        reason = _short(str(error))
        return ("refused" if _runs_on_text(model) else "no text"), reason
    missing = {
        f"{kind}: {anatomy.missing(layer, kind)}"
        for kind in CORE
        for layer in range(anatomy.layers)
        if anatomy.missing(layer, kind)
    }
    why = "; ".join(sorted(missing))
    if anatomy.missing(None, "final_norm"):
        why = "; ".join(filter(None, [why, "no final norm"]))
    if not why:
        return "complete", ""
    if not any(anatomy.has(kind) for kind in CORE):
        return "stream", re.sub(r"^.*?: ", "", sorted(missing)[0])
    if all(re.search("the block has no|mixes tokens in another way", each) for each in missing):
        return ("hybrid" if "final norm" not in why else "parts"), why
    return "parts", why


def _short(message: str) -> str:
    message = re.sub(r"; registering .*", "", message)
    return re.sub(r"^(cannot steer )?this .*?\): ", "", message)


def _runs_on_text(model: Any) -> bool:
    if model.config.is_encoder_decoder:
        return True
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.arange(3, 25).view(2, 11), use_cache=False).logits
    except Exception:  # whatever it wants besides
        return False
    return bool(logits.isfinite().all())


def rows(names: list[str]) -> dict[str, tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: found(name) for name in names}


def table(rows: dict[str, tuple[str, str]]) -> str:
    counts = Counter(kind for kind, _ in rows.values())
    lines = [
        f"Tiny models with random weights, transformers {version('transformers')}, "
        f"{len(rows)} architectures and variants:",
        "",
        "| | how many | what is there |",
        "|---|---|---|",
        *(f"| {kind} | {counts[kind]} | {what} |" for kind, what in KINDS.items()),
        "",
        "Complete: " + _listed(rows, "complete") + ".",
        "",
        "Hybrid: " + _listed(rows, "hybrid") + ".",
        "",
        "| architecture | | why |",
        "|---|---|---|",
    ]
    others = [kind for kind in KINDS if kind not in ("complete", "hybrid")]
    for kind in others:
        for name, (own, why) in rows.items():
            if own == kind:
                lines.append(f"| {name} | {kind} | {why.replace('|', '/')} |")
    return "\n".join(lines)


def _listed(rows: dict[str, tuple[str, str]], kind: str) -> str:
    return ", ".join(name for name, (own, _) in rows.items() if own == kind)


def write(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        for each, (kind, why) in rows(sys.argv[1:]).items():
            print(f"{each}: {kind} {why}")
    else:
        every = rows(every_architecture.names())
        write(table(every))
        print(Counter(kind for kind, _ in every.values()))
