"""`trimtab generate`: continue prompts, steered or not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from trimtab.cli.options import Force, Json, Opened, Prompting, Prompts, Sampled, Steered
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


def generate(
    *prompts: Prompts,
    opened: Opened,
    prompting: Asking = Asking(),
    steered: Steered = Steered(),
    compare: Annotated[
        bool,
        Parameter(
            name="--compare", help="Show the unsteered text beside the steered one.", negative=()
        ),
    ] = False,
    kl: Annotated[
        float | None,
        Parameter(help="Turn the dial for each prompt, to so many nats at its next token."),
    ] = None,
    decoding: Decoding = Decoding(),
    stream: Annotated[
        bool,
        Parameter(
            name="--stream",
            negative="--no-stream",
            help="Show one prompt's text in a terminal while it is written.",
        ),
    ] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Continue prompts with a model, steered or not.

    Example: `trimtab generate --model smollm2-135m-instruct --steer warm.safetensors@12 "Today I
    feel"`
    """
    from trimtab.strength import within

    chats = as_chats(prompting, opened)
    texts = read_prompts(_about(prompting.image, prompts, chats), prompting.file)
    steerings = read_steerings(steered)
    if kl is not None and len(steerings) != 1:
        raise TrimtabError(f"--kl turns one dial: name one steering, not {len(steerings)}")
    language_model = open_model(opened)
    options = asdict(decoding)
    options |= read_options(options.pop("more"))
    say_what_is_left_aside(language_model, options)
    options |= {"chat": chats, "force": force}
    rows: Any = [steerings] * len(texts) if steerings else None
    if kl is not None:
        rows = within(steerings[0], kl=kl)
    streamed = stream and len(texts) == 1 and not (compare or as_json) and is_terminal(sys.stdout)
    if streamed:
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
