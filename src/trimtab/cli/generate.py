"""`trimtab generate`: continue prompts, steered or not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
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
from trimtab.errors import TrimtabError


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
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")
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
        outputs = [
            {
                "prompt": text,
                "text": completion.text,
                "tokens": list(completion.tokens),
                "steering": labels,
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
            if compare:
                console.print(", ".join(labels) or "unsteered", style="dim")
            print(run[i].text)  # exactly as the model wrote it
        console.print()


def _prompts(given: list[str], file: Path | None) -> list[Any]:
    """Prompts from the command line, from standard input, from a file."""
    texts: list[Any] = []
    for text in given:
        if text == "-":
            texts += [line for _, line in _lines(sys.stdin, "standard input")]
        elif text.strip():
            texts.append(text)
        else:
            raise TrimtabError(f"prompt {len(texts) + 1} is empty")
    if file is not None:
        try:
            with file.open(encoding="utf-8-sig") as opened:
                lines = _lines(opened, str(file))
        except OSError as error:
            raise TrimtabError(f"cannot read prompts from {file}: {error.strerror}") from error
        texts += [_prompt(line, file, number) for number, line in lines]
    if not texts:
        raise TrimtabError("there is no prompt: give one on the command line, or --prompts FILE")
    for number, text in enumerate(texts, 1):
        try:
            json.dumps(text, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # bytes of the command line, or escapes in JSON
            raise TrimtabError(f"prompt {number} is not UTF-8 text") from error
    return texts


def _lines(stream: Iterable[str], name: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    # Iterating, not str.splitlines(): a prompt may hold U+2028 and the like.
    try:
        return [(i, line.rstrip("\n")) for i, line in enumerate(stream, 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise TrimtabError(f"cannot read prompts from {name}: it is not UTF-8 text") from error


def _prompt(line: str, file: Path, number: int) -> Any:
    if file.suffix != ".jsonl":
        return line
    try:
        return json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrimtabError(f'{file}, line {number}: write {{"prompt": TEXT}}') from error
