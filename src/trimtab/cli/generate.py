"""`trimtab generate`: continue prompts, steered or not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from trimtab.cli.common import (
    as_chats,
    console,
    open_model,
    print_json,
    read_options,
    read_prompts,
    read_steerings,
    say_what_is_left_aside,
)
from trimtab.cli.engines import Running, opened_engine, read_beside
from trimtab.cli.options import Force, Opened, Prompting, Prompts, Sampled, Steered
from trimtab.contrasts import last_message, read_image
from trimtab.errors import TrimtabError
from trimtab.options import option
from trimtab.terminal import is_terminal, printable, write_text

if TYPE_CHECKING:
    from trimtab.model import Completion, LanguageModel


@dataclass(frozen=True, kw_only=True)
class Asking(Prompting):
    """The same, and images that prompts are about."""

    image: Sequence[str] = option(
        "An image that the prompts on the command line are about; repeat.", ()
    )


@dataclass(frozen=True, kw_only=True)
class Decoding(Sampled):
    """The same, and how many prompts are answered at once."""

    batch_size: int = option("Prompts per batch.", 16)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A file of prompts in, a file of texts out."""

    heading = "Batch"

    input: Path | None = option(
        "JSONL: prompt or messages a row, with an id and its own steer, dial and scope if it has "
        "some.",
        None,
        flag="--input",
    )
    output: Path | None = option(
        "JSONL that grows row by row; the same command goes on where it stopped.",
        None,
        flag=("--output", "-o"),
    )
    overwrite: bool = option("Replace an output that exists.", False, flag="--overwrite")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is printed."""

    heading = "Output"

    compare: bool = option(
        "Show the unsteered text beside the steered one.", False, flag="--compare"
    )
    stream: bool = option(
        "Show one prompt's text in a terminal while it is written.",
        True,
        flag=("--stream", "--no-stream"),
    )
    as_json: bool = option("Print one JSON object on standard output.", False, flag="--json")


def generate(
    *prompts: Prompts,
    opened: Opened,
    prompting: Asking = Asking(),
    steered: Steered = Steered(),
    kl: Annotated[
        float | None,
        Parameter(help="Turn the dial for each prompt, to so many nats at its next token."),
    ] = None,
    decoding: Decoding = Decoding(),
    batch: Batch = Batch(),
    running: Running = Running(),
    shown: Shown = Shown(),
    force: Force = False,
) -> None:
    """Continue prompts with a model, steered or not.

    Example: `trimtab generate --model smollm2-135m-instruct --steer warm.safetensors@12 "Today I
    feel"`
    """
    if batch.input is not None or batch.output is not None or running.elsewhere:
        said = {
            "prompts on the command line": bool(prompts),
            "--prompts": prompting.file is not None,
            "--image": bool(prompting.image),
            "--kl": kl is not None,
            "--compare": shown.compare,
        }
        _generate_file(opened, prompting, steered, decoding, batch, running, shown, force, said)
        return
    if batch.overwrite:
        raise TrimtabError("--overwrite replaces an --output: name one")
    from trimtab.dials import within

    chats = as_chats(prompting, opened)
    texts = read_prompts(_about(prompting.image, prompts, chats), prompting.file)
    steerings = read_steerings(steered)
    if kl is not None and len(steerings) != 1:
        raise TrimtabError(f"--kl turns one dial: name one steering, not {len(steerings)}")
    language_model = open_model(opened)
    options = _decoded(decoding)
    say_what_is_left_aside(language_model, options)
    options |= {"chat": chats, "force": force}
    rows: Any = [steerings] * len(texts) if steerings else None
    if kl is not None:
        rows = within(steerings[0], kl=kl)
    compare, as_json = shown.compare, shown.as_json
    alone = shown.stream and len(texts) == 1 and not (compare or as_json)
    if alone and is_terminal(sys.stdout):
        _stream(language_model, texts[0], rows, options)
        return
    runs: list[Any] = [(steered.steer, language_model.generate(texts, steering=rows, **options))]
    if compare and steerings:
        runs.insert(0, ((), language_model.generate(texts, **options)))
    if as_json:
        outputs = [
            {
                "prompt": text,
                "text": completion.text,
                "tokens": list(completion.tokens),
                # With --kl the dial is each prompt's own.
                "steering": list(completion.steering) if kl is not None else labels,
                **_gates(completion),
            }
            for labels, run in runs
            for text, completion in zip(texts, run, strict=True)
        ]
        print_json({"outputs": outputs, "model": dict(vars(language_model.identity))})
        return
    for i in range(len(texts)):
        console.print(last_message(runs[0][1][i].prompt), style="bold")
        for labels, run in runs:
            if compare or kl is not None:
                said = run[i].steering if kl is not None else labels
                console.print(", ".join(said) or "unsteered", style="dim")
            write_text(run[i].text)
            for decided in run[i].gates:
                console.print(decided.summary, style="dim")
        console.print()


def _decoded(decoding: Decoding) -> dict[str, Any]:
    """How tokens are chosen, as arguments of `generate`."""
    options = asdict(decoding)
    return options | read_options(options.pop("more"))


def _generate_file(
    opened: Opened,
    prompting: Asking,
    steered: Steered,
    decoding: Decoding,
    batch: Batch,
    running: Running,
    shown: Shown,
    force: bool,
    others: dict[str, bool],
) -> None:
    """A file of prompts into a file of texts."""
    from trimtab.batches import generate_file

    if batch.input is None or batch.output is None:
        what = "--engine vllm" if running.engine == "vllm" else "a file of prompts"
        raise TrimtabError(f"{what} takes --input FILE and --output FILE, both")
    strange = [name for name, given in others.items() if given]
    if strange:
        raise TrimtabError(f"{strange[0]}: leave that out beside --input, whose rows say it all")
    chats, steerings = as_chats(prompting, opened), read_steerings(steered)
    options = _decoded(decoding)
    if running.elsewhere:
        if decoding.batch_size != Decoding().batch_size:
            raise TrimtabError("vLLM divides its own memory: leave --batch-size out")
        del options["batch_size"]
    options = {name: value for name, value in options.items() if value is not None}
    language_model = open_model(read_beside(opened) if running.elsewhere else opened)
    say_what_is_left_aside(language_model, options)
    with opened_engine(running, language_model, opened) as engine:
        found = generate_file(
            language_model,
            batch.input,
            batch.output,
            steering=steerings,
            chat=chats,
            engine=engine,
            overwrite=batch.overwrite,
            force=force,
            **options,
        )
    if shown.as_json:
        print_json(found.as_json() | {"model": dict(vars(language_model.identity))})
    else:
        there = found.rows - found.written
        more = f" ({there} were there)" if there else ""
        console.print(f"{found.rows} rows in {found.output}{more}, {found.seconds:g} s")
    if found.failed:
        line, error = found.failed[0]
        raise TrimtabError(
            f"{len(found.failed)} of {found.rows} rows have an error in place of a text, the first "
            f"is line {line} of {batch.input}: {error}"
        )


def _gates(completion: Completion) -> dict[str, Any]:
    """What gates decided, where there are some."""
    return {"gate": [each.as_json() for each in completion.gates]} if completion.gates else {}


def _about(images: Sequence[str], prompts: Sequence[str], chats: bool | None) -> Sequence[Any]:
    """Prompts of the command line, as messages that begin with images where there are some."""
    if not images:
        return prompts
    if chats is False:
        raise TrimtabError("--image is for messages, and --raw takes prompts as they are")
    if not prompts or "-" in map(str.strip, prompts):
        raise TrimtabError(
            "--image is for prompts on the command line: a file of prompts names its own images"
        )
    for image in images:
        read_image(image, "--image")  # before the model is loaded
    shown = [{"type": "image", "image": image} for image in images]
    return [
        [{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}]
        for prompt in prompts
    ]


def _stream(language_model: LanguageModel, prompt: Any, steering: Any, options: Any) -> None:
    """One prompt's text while it is written; the dial that a budget found stands below it."""
    (read,) = language_model.prompts([prompt], options["chat"])
    console.print(last_message(read), style="bold")
    try:
        (done,) = language_model.generate(
            [prompt],
            steering=steering,
            on_text=lambda _, piece: print(printable(piece), end="", flush=True),
            **options,
        )
    finally:
        print()  # also where an error, or the user, ends it
    if not isinstance(steering, list) and done.steering:
        console.print(", ".join(done.steering), style="dim")
    for decided in done.gates:
        console.print(decided.summary, style="dim")
    console.print()
