"""Options that several commands share, as types of their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.options import option

Prompts = Annotated[
    str,
    Parameter(
        help="Prompts; - reads one per line from standard input.", allow_leading_hyphen=False
    ),
]
Steer = Annotated[
    tuple[str, ...],
    Parameter(
        name=("--steer", "-s"), help="FILE or FILE@DIAL; repeat to combine, in order.", negative=()
    ),
]
Task = Annotated[
    str,
    Parameter(name=("--task", "-t"), help="copa, boolq ...; contrast:SOURCE; or refusal:FILE."),
]
Data = Annotated[
    str | None,
    Parameter(help="Directory of data sets (default: the environment's TRIMTAB_DATA)."),
]
Json = Annotated[
    bool, Parameter(name="--json", help="Print one JSON object on standard output.", negative=())
]
Overwrite = Annotated[
    bool, Parameter(name="--overwrite", help="Replace an output that exists.", negative=())
]
Force = Annotated[
    bool,
    Parameter(
        name="--force", help="Allow a steering that was made for another model.", negative=()
    ),
]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Which model, and how it is held in memory."""

    heading = "Model"

    model: str = option(
        "A pack, a directory, a .gguf file or a hub id. Python code that comes with it runs only "
        "with `--trust-remote-code`.",
        flag=("--model", "-m"),
    )
    dtype: str = option("float32, bfloat16 or float16.", "float32")
    device: str = option("auto, cpu, cuda, cuda:1 or mps.", "auto")


@dataclass(frozen=True, kw_only=True)
class OpenedIfNamed(Opened):
    """The same where a command may do without a model."""

    model: str | None = option(  # type: ignore[assignment]
        "A pack, a directory, a .gguf file or a hub id.", None, flag=("--model", "-m")
    )


@dataclass(frozen=True, kw_only=True)
class OpenedOnCpu(Opened):
    """The same where a model is read and written, not run."""

    device: str = option("auto, cpu, cuda, cuda:1 or mps.", "cpu")


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """Where prompts come from, and whether they are put as a user's message."""

    heading = "Prompts"

    file: Path | None = option(
        "File of prompts: text lines, or JSONL with `prompt`.", None, flag="--prompts"
    )
    raw: bool = option("Take prompts as they are.", False, flag="--raw")
    chat: bool = option(
        "Use the chat template (the default where there is one).", False, flag="--chat"
    )
