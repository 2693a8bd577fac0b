"""`trimtab strength`: curves over a dial, budgets, the theory, contrasts for a concept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from trimtab.cli.common import (
    AsChat,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Overwrite,
    PromptFile,
    Prompts,
    Raw,
    Steer,
    as_chats,
    console,
    one_steering,
    open_model,
    print_json,
    read_prompts,
    read_steerings,
    refuse_holding,
    refuse_steering_path,
)
from trimtab.cli.curve import curve_command
from trimtab.contrasts import last_message
from trimtab.errors import TrimtabError
from trimtab.evaluation import ChatEndpoint
from trimtab.files import check_output, write_whole
from trimtab.model import load
from trimtab.steering import Steering
from trimtab.strength import BUDGETS, budget, calibrate

app = typer.Typer(
    help="How strong a steering should be: curves over its dial, budgets, theory.",
    no_args_is_help=True,
)
app.command("curve")(curve_command)


@app.command("budget")
def budget_command(
    model: Model,
    prompts: Prompts = None,
    steer: Steer = None,
    file: PromptFile = None,
    raw: Raw = False,
    chat: AsChat = False,
    kl: Annotated[
        list[float] | None,
        typer.Option(help="Nats of KL(unsteered || steered) to allow; repeat with --save."),
    ] = None,
    side: Annotated[str, typer.Option(help="positive, negative or both sides of the dial.")] = (
        "both"
    ),
    beyond_range: Annotated[
        bool, typer.Option(help="Look further than the dial's sensible range.")
    ] = False,
    save_to: Annotated[
        Path | None,
        typer.Option(
            "--save", help="Write the steering here, calibrated: FILE@kl=0.1 then turns its dial."
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The dial at which a steering changes the next token by a given KL, prompt by prompt.

    Example: `trimtab strength budget --model smollm2-135m-instruct --steer formal.safetensors --kl
    0.1 --raw "She looked at the map and"`
    """
    chats = as_chats(raw, chat)
    texts = read_prompts(prompts or [], file)
    steering = one_steering(read_steerings(steer))
    if save_to is not None:
        refuse_steering_path(save_to, overwrite)
    elif kl and len(kl) > 1:
        raise TrimtabError("several --kl are for a calibration: give one, or --save FILE")
    language_model = open_model(model, dtype, device)
    if save_to is not None:
        done = calibrate(language_model, steering, texts, kl or BUDGETS, chat=chats, force=force)
        done.save(save_to, overwrite=overwrite)
        _show_calibration(done, save_to, as_json)
        return
    found = budget(
        language_model,
        steering,
        texts,
        (kl or [0.1])[0],
        side=side,  # type: ignore[arg-type]
        chat=chats,
        beyond_range=beyond_range,
        force=force,
    )
    if as_json:
        about = {"model": dict(vars(language_model.identity)), "steering": steering.label}
        print_json({"budget": found.as_json(), **about})
        return
    unit, name = steering.dial.unit, steering.dial.name
    for one in (found, found.other):
        if one is None:
            continue
        table = Table("prompt", name, "KL, nats", "", box=None)
        for row in one.per_prompt:
            note = "" if row.reached else "end of the dial"
            note = note if row.in_range else "outside the sensible range"
            text = " ".join(last_message(row.prompt).split())
            text = text if len(text) <= 60 else f"{text[:57]}..."
            table.add_row(text, f"{row.dial:.4g}{unit}", f"{row.kl:.4g}", note)
        console.print(table)
        console.print(
            f"{one.kl:g} nats: {name} {one.dial:.4g}{unit} (median of {len(one.per_prompt)}); 95 % "
            f"of the prompts stay within it at {one.worst5_dial:.4g}{unit}"
        )


def _show_calibration(steering: Steering, path: Path, as_json: bool) -> None:
    found = steering.calibration
    assert found is not None
    if as_json:
        print_json({"calibration": dict(vars(found)), "steering": str(path)})
        return
    sides = [side for side in ("positive", "negative") if getattr(found, side)]
    names = [f"{side} {what}" for side in sides for what in ("median", "95 % within")]
    table = Table("KL, nats", *names, box=None)
    for i, kl in enumerate(found.kl):
        dials = [getattr(found, f"{side}{end}")[i] for side in sides for end in ("", "_worst5")]
        cells = ["not reached" if dial is None else f"{dial:.4g}" for dial in dials]
        table.add_row(f"{kl:g}", *cells)
    console.print(table)
    console.print(f"{path}: calibrated on {found.prompts} prompts; steer with {path}@kl=0.1")


@app.command("theory")
def theory_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the pictures and numbers.")
    ] = Path("theory"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The unconstrained-features model that explains the curves: its figures and numbers.

    Example: `trimtab strength theory -o theory`
    """
    from trimtab.strength.theory import facts, lines, save_pictures

    refuse_holding(output, "theory.json", overwrite, {"uniform"})
    numbers = facts()
    pictures = save_pictures(output, overwrite=overwrite)
    text = json.dumps(numbers, indent=1, allow_nan=False)
    write_whole(output / "theory.json", text.encode(), overwrite=True)
    if as_json:
        print_json({**numbers, "pictures": list(map(str, pictures))})
        return
    console.print("\n".join(lines(numbers)), highlight=False)
    for path in pictures:
        console.print(f"picture  {path}", style="dim")


@app.command("contrast")
def contrast_command(
    model: Annotated[str, typer.Option("--model", "-m", help="The model that is to be steered.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSONL file to write.")],
    concept: Annotated[str, typer.Option(help="joy, optimistic, or any word of yours.")],
    negatives: Annotated[
        str, typer.Option(help="empty: the model's own text from nothing; or contrastive.")
    ] = "empty",
    count: Annotated[int, typer.Option(min=1, help="Texts of each side.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 300,
    writer: Annotated[
        str | None,
        typer.Option(
            help="Who writes: local:MODEL, or chat:NAME at --writer-url (default: the model)."
        ),
    ] = None,
    writer_url: Annotated[str | None, typer.Option(help="Base URL of the API.")] = None,
    writer_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the API's key.")
    ] = "OPENAI_API_KEY",
    seed: Annotated[int, typer.Option(min=0, help="For sampling.")] = 0,
    dtype: Dtype = "float32",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a contrast for a concept by sampling; a run that was interrupted goes on.

    Example: `trimtab strength contrast --model smollm2-135m-instruct --concept joy --count 50
    -o joy.jsonl`
    """
    from trimtab.strength import generate_contrast

    check_output(output, overwrite)
    language_model = open_model(model, dtype, device)
    author: Any = None
    if writer is not None:
        kind, _, name = writer.partition(":")
        if kind == "local" and name:
            author = load(name, dtype=dtype, device=device)
        elif kind == "chat" and name and writer_url:
            author = ChatEndpoint(writer_url, name, key_variable=writer_key_env)
        else:
            raise TrimtabError(
                f"--writer {writer}: write local:MODEL, or chat:NAME with --writer-url"
            )
    made = generate_contrast(
        language_model,
        concept,
        negatives=negatives,  # type: ignore[arg-type]
        count=count,
        max_new_tokens=max_new_tokens,
        writer=author,
        seed=seed,
        output=output,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"contrast": str(output), "rows": len(made), "digest": made.digest})
        return
    console.print(f"{output}: {len(made)} texts; fit with --contrast {output}")
