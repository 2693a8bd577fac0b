"""`trimtab generate`: continue prompts, steered or not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.common import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Steer,
    console,
    open_model,
    print_json,
    read_steerings,
)
from trimtab.contrasts import Prompt
from trimtab.errors import TrimtabError
from trimtab.model import Completion


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; - reads one per line from standard input.")
    ] = None,
    steer: Steer = None,
    file: Annotated[
        Path | None,
        typer.Option("--prompts", help="File of prompts: text lines, or JSONL with `prompt`."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take prompts as they are.")] = False,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Use the chat template (the default where there is one)."),
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the unsteered text beside the steered one.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most likely (0: all).")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample within this probability mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
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
    if raw and chat:
        raise TrimtabError("choose one of --raw and --chat")
    texts = _prompts(prompts or [], file)
    steerings = read_steerings(steer)
    language_model = open_model(model, dtype, device)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "chat": True if chat else False if raw else None,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "batch_size": batch_size,
        "force": force,
    }
    rows = [steerings] * len(texts) if steerings else None
    runs = [(steer or [], language_model.generate(texts, steering=rows, **options))]
    if compare and steerings:
        runs.insert(0, ([], language_model.generate(texts, **options)))
    if as_json:
        outputs = [_record(completion, labels) for labels, run in runs for completion in run]
        print_json({"outputs": outputs, "model": dict(vars(language_model.identity))})
        return
    for i, text in enumerate(texts):
        shown = text if isinstance(text, str) else text[-1][1]
        console.print(f"[bold]{_escape(shown)}[/bold]")
        for labels, run in runs:
            if compare:
                console.print(f"[dim]{_escape(', '.join(labels) or 'unsteered')}[/dim]")
            console.print(_escape(run[i].text))
        console.print()


def _prompts(given: list[str], file: Path | None) -> list[Any]:
    """Prompts from the command line, from a file, from standard input."""
    texts: list[Any] = []
    for text in given:
        lines = sys.stdin.read().splitlines() if text == "-" else [text]
        texts += [line for line in lines if line.strip()]
    if file is not None:
        try:
            with file.open(encoding="utf-8") as lines_of_file:
                for number, line in enumerate(lines_of_file, 1):
                    if line.strip():
                        texts.append(_line(line.rstrip("\n"), file, number))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise TrimtabError(f"cannot read prompts from {file}: {reason}") from error
    if not texts:
        raise TrimtabError("there is no prompt: give one on the command line, or --prompts FILE")
    return texts


def _line(line: str, file: Path, number: int) -> Any:
    if file.suffix != ".jsonl":
        return line
    try:
        return json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise TrimtabError(f'{file}, line {number}: write {{"prompt": TEXT}}') from error


def _record(completion: Completion, steering: list[str]) -> dict[str, Any]:
    return {
        "prompt": _plain(completion.prompt),
        "text": completion.text,
        "tokens": list(completion.tokens),
        "steering": steering,
    }


def _plain(prompt: Prompt) -> Any:
    """A prompt as the user gave it: one user message is its text."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0][1]
    return [{"role": role, "content": content} for role, content in prompt]


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
