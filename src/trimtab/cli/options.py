"""Options that several commands share, as types of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from trimtab.options import option

Prompts = Annotated[
    str,
    Parameter(
        help="Prompts; - reads one per line from standard input.", allow_leading_hyphen=False
    ),
]
Task = Annotated[
    str,
    Parameter(name=("--task", "-t"), help="copa, boolq ...; contrast:SOURCE; or refusal:FILE."),
]
Told = Annotated[
    str,
    Parameter(
        name=("--contrast", "-c"),
        help="Texts of both kinds that are to be told apart, those at which it is to fire "
        "(positive) and others (negative): a file, builtin:NAME or task:NAME.",
    ),
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


#: Said of the option wherever there is one.
STEER = "FILE or FILE@DIAL; repeat to combine, in order."


@dataclass(frozen=True, kw_only=True)
class Steered:
    """Which steerings act, and on which tokens."""

    heading = "Steerings"

    steer: Sequence[str] = option(STEER, (), flag=("--steer", "-s"))
    scope: Sequence[str] = option(
        "On which tokens they act instead of the file's own: all, prompt, generated, "
        "'generated & !thinking', 'generated[:32]' ...; one for all, or one for each --steer.",
        (),
        flag="--scope",
    )
    gate: Sequence[str] = option(
        "Under which condition they act instead of the file's own: a file of trimtab gate fit, "
        "several as in 'a.safetensors & !b.safetensors', or none; one for all, or one for each "
        "--steer.",
        (),
        flag="--gate",
    )


@dataclass(frozen=True, kw_only=True)
class AlwaysSteered(Steered):
    """The same where there must be one."""

    steer: Sequence[str] = option(STEER, flag=("--steer", "-s"))


@dataclass(frozen=True, kw_only=True)
class Read:
    """Which model, and how it is held in memory."""

    heading = "Model"

    model: str = option(
        "A pack, a directory, a .gguf file or a hub id. Python code that comes with it runs only "
        "with `--trust-remote-code`.",
        flag=("--model", "-m"),
    )
    revision: str | None = option("Branch, tag or commit of a model of the hub.", None)
    dtype: str = option(
        "auto (the checkpoint's on a GPU, float32 on a CPU), checkpoint, float32, bfloat16 or "
        "float16.",
        "auto",
    )
    device: str = option("auto, cpu, cuda, cuda:1 or mps.", "auto")


@dataclass(frozen=True, kw_only=True)
class Opened(Read):
    """The same, and how a model that is run reads conversations."""

    device_map: str | None = option(
        "Spread it over several devices: auto, balanced, or a JSON map of modules and devices.",
        None,
    )
    quantise: Literal["4bit", "8bit"] | None = option(
        "Hold linear maps in 4bit or 8bit (the extra quantised).", None
    )
    attn_implementation: str | None = option("sdpa, eager, flash_attention_2 ...", None)
    chat_option: Sequence[str] = option(
        "NAME=VALUE: a variable of the chat template, as in enable_thinking=false; repeat.", ()
    )
    system: str | None = option(
        "The system message of conversations that have none, prompts among them.", None
    )


@dataclass(frozen=True, kw_only=True)
class OpenedIfNamed(Opened):
    """The same where a command may do without a model."""

    model: str | None = option(  # type: ignore[assignment]
        "A pack, a directory, a .gguf file or a hub id.", None, flag=("--model", "-m")
    )


@dataclass(frozen=True, kw_only=True)
class OpenedOnCpu(Read):
    """A model that is read and written, not run."""

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


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """How tokens are chosen."""

    heading = "Decoding"

    max_new_tokens: int = option("Longest continuation.", 64)
    temperature: float = option("0 is greedy.", 0.0)
    top_k: int = option("Sample among the k most likely (0: all).", 0)
    top_p: float = option("Sample within this probability mass.", 1.0)
    seed: int | None = option("Makes sampling repeatable.", None, least=0, most=2**63 - 1)
    more: Sequence[str] = option(
        "NAME=VALUE: what else says how tokens are chosen, as transformers names it "
        "(repetition_penalty=1.2, min_p=0.1); repeat.",
        (),
        flag="--option",
    )
