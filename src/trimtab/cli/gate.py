"""`trimtab gate`: under which condition a steering acts: fit it, look at what it decides, put it
into a steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from trimtab.cli.common import as_chats, console, open_model, print_json, read_prompts
from trimtab.cli.making import prepared
from trimtab.cli.options import Data, Json, Opened, Overwrite, Prompting, Prompts, Told
from trimtab.cli.tables import show
from trimtab.cli.values import read_named
from trimtab.errors import one_line, shown
from trimtab.files import check_output
from trimtab.options import option

if TYPE_CHECKING:
    from trimtab.steering import Gate

Named = Annotated[
    str, Parameter(help="A gate's file, or several: 'a.safetensors & !b.safetensors'.")
]
Output = Annotated[Path, Parameter(name=("--output", "-o"), help="The file to write.")]


def commands(app: App) -> None:
    """Under which condition a steering acts: `fit` a gate, `check` what it decides, `put` it into a
    steering.

    Example: `trimtab gate fit --model M --contrast requests.jsonl -o asks.safetensors`, then
    `trimtab generate --model M --steer refuse.safetensors@2 --gate asks.safetensors "..."`
    """
    for command in (fit, check, put):
        app.command(prepared(command), name=command.__name__)


@dataclass(frozen=True, kw_only=True)
class Gated:
    """What kind of gate is fitted, and where it may read."""

    heading = "Method"

    kind: str = option(
        "When it decides: token (at each token), latched (once, at the prompt's last token), "
        "two-pass (once, from a pass over the prompt before).",
        "two-pass",
    )
    score: str = option(
        "cosine or projection on the difference of means, probe (logistic regression), or compat "
        "(the score of conditional activation steering's authors).",
        "probe",
    )
    reads: str | None = option(
        "Whose tokens' mean activation is scored: a scope as in 'all[1:]' or user; or last, the "
        "prompt's last token (default: last for token gates, or else all[1:]).",
        None,
    )
    site: Sequence[str] = option(
        "A site to choose from; repeat (default: every block's output).", (), repeats=True
    )
    below: str | None = option("Choose among sites below what this steering changes: a file.", None)
    any_of: int = option("How many conditions may fire each by itself.", 1, least=1)


def fit(
    *,
    opened: Opened,
    contrast: Told,
    gated: Gated = Gated(),
    unrelated: Annotated[
        Sequence[str],
        Parameter(
            help="NAME=FILE: prompts about other things, at which it should not fire either; "
            "repeat.",
        ),
    ] = (),
    raw: Annotated[
        bool, Parameter(name="--raw", help="Take plain texts as they are.", negative=())
    ] = False,
    data: Data = None,
    output: Output,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fit a gate: directions and thresholds on the train part of a contrast, the site chosen on its
    validation part, and how often it fires measured on its test part and on unrelated prompts.

    Example: `trimtab gate fit --model smollm2-135m-instruct --contrast requests.jsonl --kind
    latched --unrelated sums=sums.txt -o asks.safetensors`
    """
    from trimtab.evaluation import load_contrast
    from trimtab.fitting import fit_gate
    from trimtab.steering import Steering

    check_output(output, overwrite)
    texts = load_contrast(contrast, data=data)
    others = {
        name: read_prompts((), Path(file))
        for name, file in read_named("--unrelated", unrelated).items()
    }
    below = None if gated.below is None else Steering.read(gated.below)
    language_model = open_model(opened)
    found = fit_gate(
        language_model,
        texts,
        kind=gated.kind,  # type: ignore[arg-type]
        score=gated.score,  # type: ignore[arg-type]
        reads=gated.reads,
        sites=gated.site or None,
        below=below,
        any_of=gated.any_of,
        chat=False if raw else None,
        unrelated=others,
    )
    found.save(output, overwrite=overwrite)
    if as_json:
        model = dict(vars(language_model.identity))
        about = {"model": model, "contrast": found.contrast, "file": str(output)}
        print_json({"gate": found.as_json(), **about})
        return
    _say(found)
    console.print(f"wrote {output}")


def check(
    gate: Named,
    /,
    *prompts: Prompts,
    opened: Opened,
    prompting: Prompting = Prompting(),
    as_json: Json = False,
) -> None:
    """Say of prompts whether a gate fires, and by which scores; of a token gate at which share of
    their tokens.

    Example: `trimtab gate check asks.safetensors --model smollm2-135m-instruct "Today I feel"`
    """
    from trimtab.model import decisions
    from trimtab.reports import Table
    from trimtab.steering import read_gate

    chats, texts = as_chats(prompting, opened), read_prompts(prompts, prompting.file)
    found = read_gate(gate)
    language_model = open_model(opened)
    found.check_fits(language_model.anatomy, language_model.identity)
    wanted = language_model.prompts(texts, chats)
    decided = decisions(
        language_model.anatomy, language_model.marks, found, language_model.fitting(wanted)
    )
    if as_json:
        rows = [
            {"prompt": text, **each.as_json()} for text, each in zip(texts, decided, strict=True)
        ]
        print_json({"gate": found.as_json(), "prompts": rows})
        return
    heads = ["prompt", "fires", *(str(each) for each in found.conditions), "tokens"]
    lines = [
        [
            shown(text, 60),
            "yes" if each.fired else "no",
            *("none" if score is None else f"{score:.4g}" for score in each.scores),
            "" if each.prompt_tokens is None else str(each.prompt_tokens),
        ]
        for text, each in zip(texts, decided, strict=True)
    ]
    fired = sum(each.fired for each in decided)
    table = Table("What the gate decides", heads, lines).without_empty_columns()
    show([table], (), None, summary=f"The gate fires at {fired} of {len(texts)} prompts.")


def put(
    steering: Annotated[str, Parameter(help="A steering, FILE or FILE@DIAL.")],
    gate: Annotated[str, Parameter(help="A gate's file, several put together, or none.")],
    /,
    *,
    output: Output,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a steering that acts under a gate, or, with none, one that acts without.

    Example: `trimtab gate put refuse.safetensors asks.safetensors -o careful.safetensors`
    """
    from trimtab.cli.common import read_steerings, refuse_steering_path
    from trimtab.cli.options import Steered
    from trimtab.methods import describe

    refuse_steering_path(output, overwrite)
    (made,) = read_steerings(Steered(steer=(steering,), gate=(gate,)))
    made.save(output, overwrite=overwrite)
    if as_json:
        print_json(describe(made))
        return
    console.print(f"wrote {output}: {one_line(made.label)}")


def _say(gate: Gate) -> None:
    from trimtab.methods import gate_in_words

    console.print(one_line(str(gate)))
    for line in gate_in_words(gate):
        console.print(one_line(line))
