"""`trimtab strength`: curves over a dial, budgets, the theory, contrasts for a concept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from trimtab.cli.common import (
    as_chats,
    console,
    one_steering,
    open_beside,
    open_model,
    print_json,
    read_prompts,
    read_steerings,
    refuse_holding,
    refuse_steering_path,
)
from trimtab.cli.curve import curve
from trimtab.cli.making import prepared
from trimtab.cli.options import Force, Json, Opened, Overwrite, Prompting, Prompts, Steered
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError
from trimtab.files import check_output, write_whole
from trimtab.options import option

if TYPE_CHECKING:
    from trimtab.steering import Steering


def commands(app: App) -> None:
    """How strong a steering should be: curves over its dial, budgets, theory."""
    for command in (curve, budget, theory, contrast):
        app.command(prepared(command), name=command.__name__)


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """How much a steering may change."""

    heading = "Budget"

    kl: Sequence[float] = option(
        "Nats of KL(unsteered || steered) to allow; repeat with --save.", (), repeats=True
    )
    side: str = option("positive, negative or both sides of the dial.", "both")
    beyond_range: bool = option("Look further than the dial's sensible range.", False)


def budget(
    *prompts: Prompts,
    opened: Opened,
    steered: Steered = Steered(),
    prompting: Prompting = Prompting(),
    allowed: Allowed = Allowed(),
    save_to: Annotated[
        Path | None,
        Parameter(
            name="--save",
            help="Write the steering here, calibrated: FILE@kl=0.1 then turns its dial.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The dial at which a steering changes the next token by a given KL, prompt by prompt.

    Example: `trimtab strength budget --model smollm2-135m-instruct --steer formal.safetensors --kl
    0.1 --raw "She looked at the map and"`
    """
    from trimtab import strength

    kl, chats = allowed.kl, as_chats(prompting, opened)
    texts = read_prompts(prompts, prompting.file)
    steering = one_steering(read_steerings(steered))
    if save_to is not None:
        refuse_steering_path(save_to, overwrite)
    elif len(kl) > 1:
        raise TrimtabError("several --kl are for a calibration: give one, or --save FILE")
    language_model = open_model(opened)
    if save_to is not None:
        nats = kl or strength.BUDGETS
        done = strength.calibrate(language_model, steering, texts, nats, chat=chats, force=force)
        done.save(save_to, overwrite=overwrite)
        _show_calibration(done, save_to, as_json)
        return
    found = strength.budget(
        language_model,
        steering,
        texts,
        kl[0] if kl else 0.1,
        side=allowed.side,  # type: ignore[arg-type]
        chat=chats,
        beyond_range=allowed.beyond_range,
        force=force,
    )
    if as_json:
        about = {"model": dict(vars(language_model.identity)), "steering": steering.label}
        print_json({"budget": found.as_json(), **about})
        return
    show(found.tables(), (), None, summary=found.summary)


def _show_calibration(steering: Steering, path: Path, as_json: bool) -> None:
    from rich.table import Table

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


def theory(
    *,
    output: Annotated[
        Path,
        Parameter(name=("--output", "-o"), help="Directory for the pictures and numbers."),
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


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What texts are written, and by whom."""

    heading = "Texts"

    concept: str = option("joy, optimistic, or any word of yours.")
    negatives: str = option("empty: the model's own text from nothing; or contrastive.", "empty")
    count: int = option("Texts of each side.", 500, least=1)
    max_new_tokens: int = option("Tokens of each text.", 300, least=1)
    writer: str | None = option(
        "Who writes: local:MODEL, or chat:NAME at --writer-url (default: the model).", None
    )
    writer_url: str | None = option("Base URL of the API.", None)
    writer_key_env: str = option("Environment variable that holds the API's key.", "OPENAI_API_KEY")
    seed: int = option("For sampling.", 0, least=0)

    def author(self, opened: Opened) -> Any:
        """The chat model or endpoint that writes; None is the model that is steered."""
        from trimtab.evaluation import ChatEndpoint

        if self.writer is None:
            return None
        kind, _, name = self.writer.partition(":")
        if kind == "local" and name:
            return open_beside(opened, name)
        if kind == "chat" and name and self.writer_url:
            return ChatEndpoint(self.writer_url, name, key_variable=self.writer_key_env)
        raise TrimtabError(
            f"--writer {self.writer}: write local:MODEL, or chat:NAME with --writer-url"
        )


def contrast(
    *,
    opened: Opened,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="The JSONL file to write.")],
    writing: Writing,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a contrast for a concept by sampling; a run that was interrupted goes on.

    Example: `trimtab strength contrast --model smollm2-135m-instruct --concept joy --count 50
    -o joy.jsonl`
    """
    from trimtab.strength import generate_contrast

    check_output(output, overwrite)
    language_model = open_model(opened)
    made = generate_contrast(
        language_model,
        writing.concept,
        negatives=writing.negatives,
        count=writing.count,
        max_new_tokens=writing.max_new_tokens,
        writer=writing.author(opened),
        seed=writing.seed,
        output=output,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"contrast": str(output), "rows": len(made), "digest": made.digest})
        return
    console.print(f"{output}: {len(made)} texts; fit with --contrast {output}")
