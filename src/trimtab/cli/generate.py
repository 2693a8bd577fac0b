"""`trimtab generate`: continue prompts, steered or not."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from trimtab.cli.common import (
    AsChat,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    PromptFile,
    Prompts,
    Raw,
    Steer,
    as_chats,
    console,
    open_model,
    print_json,
    read_prompts,
    read_steerings,
)
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.model import SAMPLING, LanguageModel, left_aside
from trimtab.strength import within
from trimtab.terminal import write_text


def generate(
    model: Model,
    prompts: Prompts = None,
    steer: Steer = None,
    file: PromptFile = None,
    raw: Raw = False,
    chat: AsChat = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the unsteered text beside the steered one.")
    ] = False,
    kl: Annotated[
        float | None,
        typer.Option(help="Turn the dial for each prompt, to so many nats at its next token."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most likely (0: all).")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample within this probability mass.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE: what else says how tokens are chosen, as transformers names it "
            "(repetition_penalty=1.2, min_p=0.1); repeat."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per batch.")] = 16,
    dtype: Dtype = "float32",
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Continue prompts with a model, steered or not.

    Example: `trimtab generate --model smollm2-135m-instruct --steer warm.safetensors@12 "Today I
    feel"`
    """
    chats = as_chats(raw, chat)
    texts = read_prompts(prompts or [], file)
    steerings = read_steerings(steer)
    if kl is not None and len(steerings) != 1:
        raise TrimtabError(f"--kl turns one dial: name one steering, not {len(steerings)}")
    language_model = open_model(model, dtype, device)
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, **read_options(option)}
    options: dict[str, Any] = {
        **chosen,
        "max_new_tokens": max_new_tokens,
        "chat": chats,
        "seed": seed,
        "batch_size": batch_size,
        "force": force,
    }
    _say_what_is_left_aside(language_model, chosen)
    rows: Any = [steerings] * len(texts) if steerings else None
    if kl is not None:
        rows = within(steerings[0], kl=kl)
    runs = [(steer or [], language_model.generate(texts, steering=rows, **options))]
    if compare and steerings:
        runs.insert(0, ([], language_model.generate(texts, **options)))
    if as_json:
        outputs = [
            {
                "prompt": text,
                "text": completion.text,
                "tokens": list(completion.tokens),
                # With --kl the dial is each prompt's own.
                "steering": list(completion.steering) if kl is not None else labels,
            }
            for labels, run in runs
            for text, completion in zip(texts, run, strict=True)
        ]
        print_json({"outputs": outputs, "model": dict(vars(language_model.identity))})
        return
    for i in range(len(texts)):
        prompt = runs[0][1][i].prompt
        console.print(prompt if isinstance(prompt, str) else prompt[-1][1], style="bold")
        for labels, run in runs:
            if compare or kl is not None:
                said = run[i].steering if kl is not None else labels
                console.print(", ".join(said) or "unsteered", style="dim")
            write_text(run[i].text)
        console.print()


def read_options(given: Sequence[str] | None) -> dict[str, Any]:
    """`NAME=VALUE ...` as a dictionary; a value that is no JSON is text."""
    options: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or name in options:
            twice = " (it is given twice)" if name in options else ""
            raise TrimtabError(f"--option {text}: write NAME=VALUE, each name once{twice}")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    own = [name for name in options if name in _OWN]
    if own:
        raise TrimtabError(f"--option {own[0]}: it is an option by itself, {_flag(own[0])}")
    return options


#: What has an option of its own on the command line.
_OWN = frozenset(
    {*inspect.signature(LanguageModel.generate).parameters, *SAMPLING, "min_new_tokens", "kl"}
) - {"options"}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _say_what_is_left_aside(language_model: LanguageModel, chosen: dict[str, Any]) -> None:
    """One line where the checkpoint comes with settings that are not used."""
    found = left_aside(language_model.model, chosen)
    if not found:
        return
    shown = [f"{name}={json.dumps(value, default=str)}" for name, value in found.items()]
    shown = [text if len(text) <= 60 else text[:57] + "..." for text in shown]
    warnings.warn(
        f"the checkpoint asks for {', '.join(shown)}: not used; --option NAME=VALUE, "
        "--temperature, --top-k and --top-p say how tokens are chosen",
        TrimtabWarning,
        stacklevel=2,
    )
