"""`trimtab monitor`: set an alarm along a steering's direction, and read chats along it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from trimtab.cli.common import (
    as_chats,
    console,
    open_model,
    print_json,
    read_options,
    read_prompts,
)
from trimtab.cli.generate import Decoding
from trimtab.cli.making import prepared
from trimtab.cli.options import Data, Json, Opened, Overwrite, Prompting, Prompts, Steered, Told
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError, one_line
from trimtab.files import check_output, json_digest
from trimtab.options import Keep, option

#: The exit status of --fail where a turn is an alarm.
_ALARMED = 1


def commands(app: App) -> None:
    """What chats show of a behaviour, turn by turn and token by token: `fit` an alarm along a
    steering's direction, `check` chats.

    Example: `trimtab monitor fit --model M --steer warm.safetensors --contrast builtin:warmth -o
    watch.safetensors`, then `trimtab monitor check watch.safetensors --model M --chats chats.jsonl`
    """
    for command in (fit, check):
        app.command(prepared(command), name=command.__name__)


@dataclass(frozen=True, kw_only=True)
class Alarmed:
    """What of a turn is compared, and with which threshold."""

    heading = "Method"

    site: str | None = option("Which direction of the steering, where it has several.", None)
    at: Literal["answer", "prompt"] = option(
        "What of a turn is compared: the mean over the answer's tokens, or the prompt's last token "
        "(before there is an answer).",
        "answer",
    )
    threshold: Literal["false-alarms", "f1"] = option(
        "By the rate of false alarms on validation turns, or the best F1 there.", "false-alarms"
    )
    false_alarms: float = option("The rate of false alarms that is allowed.", 0.01)
    fires: Literal["above", "below"] = option("On which side of the threshold.", "above")


def fit(
    *,
    opened: Opened,
    steer: Annotated[
        str,
        Parameter(
            name=("--steer", "-s"),
            help="The steering whose direction is watched: a probe's reader, or the vector that it "
            "adds, takes out or bounds.",
        ),
    ],
    contrast: Told,
    alarmed: Alarmed = Alarmed(),
    baseline: Annotated[
        str | None,
        Parameter(
            help="Chats that are as usual: a file, or plain, the paragraphs that come with trimtab "
            "(default: the contrast's negative train turns)."
        ),
    ] = None,
    chat: Annotated[
        bool,
        Parameter(name="--chat", help="Put plain prompts as a user's message.", negative=()),
    ] = False,
    data: Data = None,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="The file to write.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Set an alarm along a steering's direction: what is usual from train turns, the threshold
    chosen on validation turns, hits and false alarms counted on test turns.

    Example: `trimtab monitor fit --model smollm2-135m-instruct --steer warm.safetensors --contrast
    builtin:warmth --chat -o watch.safetensors`
    """
    from trimtab.evaluation import load_contrast
    from trimtab.methods import gate_in_words
    from trimtab.monitoring import fit_monitor, read_chats
    from trimtab.reading import plain_texts
    from trimtab.steering import Steering

    check_output(output, overwrite)
    texts, steering = load_contrast(contrast, data=data), Steering.read(steer)
    usual: Sequence[Any] | None = None
    if baseline is not None:
        usual = plain_texts() if baseline == "plain" else read_chats(baseline)
    language_model = open_model(opened)
    found = fit_monitor(
        language_model, steering, texts, **asdict(alarmed), baseline=usual, chat=chat
    )
    found.save(output, overwrite=overwrite)
    if as_json:
        about = {"model": dict(vars(language_model.identity)), "file": str(output)}
        print_json({"monitor": found.as_json(), "contrast": found.contrast, **about})
        return
    console.print(one_line(str(found)))
    for line in (*gate_in_words(found.gate), *found.notes):
        console.print(one_line(line))
    console.print(f"wrote {output}")


@dataclass(frozen=True, kw_only=True)
class Read:
    """Which chats are read."""

    heading = "Texts"

    chats: Path | None = option(
        "A file of chats: rows with messages, with prompt and text (an answer), or with text; or a "
        ".txt with a text a line.",
        None,
        flag="--chats",
    )
    site: str | None = option("Which direction of a steering, where it has several.", None)


def check(
    watch: Annotated[
        str, Parameter(help="A file of monitor fit; or a steering, which is read without alarms.")
    ],
    /,
    *prompts: Prompts,
    opened: Opened,
    read: Read = Read(),
    prompting: Prompting = Prompting(),
    steered: Steered = Steered(),
    decoding: Decoding = Decoding(),
    fail: Annotated[
        bool,
        Parameter(name="--fail", help="Exit status 1 where a turn is an alarm.", negative=()),
    ] = False,
    keep: Keep = Keep(),
    as_json: Json = False,
) -> None:
    """Read chats along a direction, turn by turn: those of a file, or prompts that the model
    answers now, steered or not. What is read is the text, by the model as it is.

    Example: `trimtab monitor check watch.safetensors --model smollm2-135m-instruct --chats
    chats.jsonl --fail`

    Example: `trimtab monitor check watch.safetensors --model smollm2-135m-instruct --steer
    warm.safetensors@2 "How was your day?"`
    """
    from trimtab.cli.common import read_steerings
    from trimtab.monitoring import Monitor, monitor, read_chats, write_run
    from trimtab.reports import Run
    from trimtab.steering import Steering, kind_of_file

    asked = bool(prompts) or prompting.file is not None
    if not asked and read.chats is None:
        raise TrimtabError("there is no chat to read: give --chats FILE, or prompts to answer")
    if steered.steer and not asked:
        raise TrimtabError("--steer is for prompts that are answered now: give some")
    watched = Monitor.load(watch) if kind_of_file(watch) == "gate" else Steering.read(watch)
    if fail and not isinstance(watched, Monitor):
        raise TrimtabError("a steering has no alarm to fail by: make a monitor with monitor fit")
    chats: list[Any] = [] if read.chats is None else read_chats(read.chats)
    texts = read_prompts(prompts, prompting.file) if asked else []
    as_messages, steerings = as_chats(prompting, opened), read_steerings(steered)
    language_model = open_model(opened)
    options = asdict(decoding)
    options |= read_options(options.pop("more"))
    config = {
        "watch": watch,
        "chats": None if read.chats is None else str(read.chats),
        "digest": json_digest(repr(chats)),
        "site": read.site,
        **({"prompts": texts, "steer": list(steered.steer), **options} if asked else {}),
        "model": language_model.described,
    }
    run = Run(keep.output, config, keep.overwrite)
    if asked:
        chats += language_model.generate(
            texts, chat=as_messages, steering=[steerings] * len(texts) or None, **options
        )
    found = monitor(language_model, watched, chats, site=read.site)
    write_run(found, run)
    if as_json:
        print_json(found.as_json() | {"model": dict(vars(language_model.identity))})
    else:
        show(found.tables(), (), keep.output, summary=one_line(found.summary))
    if fail and found.alarming:
        sys.exit(_ALARMED)
