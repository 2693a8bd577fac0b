"""`trimtab contrast`: look at a contrast before anything is fitted on it, give its rows parts, or
have one written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

from trimtab.cli.common import console, open_model, print_json
from trimtab.cli.making import prepared
from trimtab.cli.options import Data, Json, OpenedIfNamed, Overwrite
from trimtab.cli.persona import persona
from trimtab.contrasts import Contrast, Image, Pair, as_messages, check, columns, images_in
from trimtab.errors import TrimtabError
from trimtab.files import check_output
from trimtab.options import SPLIT, Split
from trimtab.terminal import write_text

if TYPE_CHECKING:
    from trimtab.contrasts import Checked, Text
    from trimtab.model import LanguageModel

Source = Annotated[
    str,
    Parameter(help="A .jsonl, .json, .csv or .tsv file, builtin:NAME, task:NAME or answers:FILE."),
]
Count = Annotated[
    int, Parameter(help="How many rows, from the first on.", validator=validators.Number(gte=1))
]


def commands(app: App) -> None:
    """Your own contrast: `check` it, `show` some of it, `split` it into parts; or have a model
    write one for a trait (`persona`).

    Example: `trimtab contrast check pairs.jsonl`, then `trimtab fit caa --contrast pairs.jsonl ...`
    """
    named = (("check", check_it), ("show", show), ("split", split), ("persona", persona))
    for name, command in named:
        app.command(prepared(command), name=name)


def check_it(
    source: Source,
    /,
    *,
    opened: OpenedIfNamed = OpenedIfNamed(),
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Count rows and lengths, and say what is odd: duplicates, prompts in two parts, sides that
    hardly differ, columns and rows that look exchanged. With a model lengths are in tokens, and
    sides that are the same tokens to it are refused, as `fit` refuses them.

    Example: `trimtab contrast check pairs.jsonl --model smollm2-135m-instruct`
    """
    texts = _load(source, data)
    _ = texts.train  # a file whose parts leave nothing to fit on is refused
    lengths = None
    if opened.model is not None:
        lengths = _token_lengths(open_model(opened), texts)
    found = check(texts, lengths)
    if as_json:
        print_json({**found.as_json(), "examples": [_as_json(row) for row in texts.rows[:2]]})
        return
    _say_checked(found)
    for row in texts.rows[:2]:
        _say_row(row)
    for finding in found.warnings:
        console.print(f"warning: {finding.says}")
    if not found.warnings:
        console.print("Nothing odd was found.")
    console.print(
        "Which side is the positive one no program can tell: it is what a positive dial steers to.",
        style="dim",
    )


def show(source: Source, /, *, count: Count = 2, data: Data = None, as_json: Json = False) -> None:
    """Show the first rows, as they are read.

    Example: `trimtab contrast show pairs.csv --count 3`
    """
    texts = _load(source, data)
    if as_json:
        rows = [_as_json(row) for row in texts.rows[:count]]
        print_json({"name": texts.name, "digest": texts.digest, "size": len(texts), "rows": rows})
        return
    for row in texts.rows[:count]:
        _say_row(row)
    if len(texts) > count:
        console.print(f"{count} of {len(texts)} rows", style="dim")


def split(
    source: Source,
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="The .jsonl file to write.")],
    split: Annotated[
        str,
        Parameter(
            help="TRAIN,VALIDATION,TEST of the prompts, with :SEED behind it for others; none "
            "writes the rows as they are."
        ),
    ] = SPLIT,
    data: Data = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a JSONL file whose rows name their parts, drawn so that no prompt is in two of them;
    parts of before are forgotten.

    Example: `trimtab contrast split pairs.csv -o pairs-parts.jsonl --split 0.5,0.2,0.3:7`
    """
    check_output(output, overwrite)
    texts, chosen = _load(source, data), Split.read(split)
    if chosen is not None:
        texts = texts.split(chosen.validation, chosen.test, chosen.seed)
        for part, share in (("validation", chosen.validation), ("test", chosen.test)):
            if share and part not in texts.sizes:
                raise TrimtabError(
                    f"{texts.name}: {len(texts)} rows with too few different prompts leave none "
                    f"for {part}: write more, or give {part} no share"
                )
    texts.to_jsonl(output, overwrite)
    if as_json:
        print_json(
            {
                "output": str(output),
                "digest": texts.digest,
                "split": None if chosen is None else str(chosen),
                "parts": texts.sizes,
                "rows": len(texts),
            }
        )
        return
    sizes = ", ".join(f"{count} {part}" for part, count in texts.sizes.items())
    console.print(f"Wrote {output}: {len(texts)} rows{f', {sizes}' if sizes else ''}.")


def _load(source: str, data: str | None) -> Contrast:
    from trimtab.evaluation import load_contrast

    return load_contrast(source, data=data)


def _token_lengths(language_model: LanguageModel, texts: Contrast) -> dict[str, Sequence[int]]:
    """Lengths in tokens: of prompts as the model is given them, of sides without their prompt."""
    from trimtab.reading import encode_contrast

    encode_contrast(language_model, texts, None)  # refuses sides that are the same tokens
    found = columns(texts)
    if not texts.paired:
        return {side: list(map(len, language_model.encode(some))) for side, some in found.items()}
    prompts = [pair.prompt for pair in texts.pairs]
    before = list(map(len, language_model.encode(prompts)))
    lengths: dict[str, Sequence[int]] = {"prompt": before} if "prompt" in found else {}
    for side in ("positive", "negative"):
        whole = map(len, language_model.encode(prompts, found.get(side, [""] * len(texts))))
        lengths[side] = [b - a for a, b in zip(before, whole, strict=True)]
    return lengths


def _as_json(row: Pair | Text) -> dict[str, Any]:
    found = {key: value for key, value in vars(row).items() if value is not None}
    for name in ("prompt", "text"):
        if images_in(found.get(name, "")):
            found[name] = as_messages(found[name])
    return found


def _say_checked(found: Checked) -> None:
    from rich.table import Table

    kind = "pairs" if found.paired else "texts"
    console.print(f"{found.name}: {found.rows} {kind}, digest {found.digest[:16]}", style="bold")
    table = Table("part", "positive", "negative", box=None)
    for part, sides in found.parts.items():
        table.add_row(part, str(sides["positive"]), str(sides["negative"]))
    console.print(table)
    table = Table(found.unit, "least", "median", "most", box=None)
    for column, lengths in found.lengths.items():
        table.add_row(column, str(lengths.least), f"{lengths.median:g}", str(lengths.most))
    console.print(table)


def _say_row(row: Pair | Text) -> None:
    """A row with a line for each of its texts."""
    if not isinstance(row, Pair):
        _say_text(row.label, row.text)
        return
    for name in ("prompt", "positive", "negative"):
        _say_text(name, getattr(row, name))
    console.print()


def _say_text(name: str, text: Any) -> None:
    if isinstance(text, str):
        write_text(f"{name:<9} {text!r}")
        return
    for role, content in text:
        pieces = (content,) if isinstance(content, str) else content
        said = " ".join(str(one) if isinstance(one, Image) else repr(one) for one in pieces)
        write_text(f"{name:<9} {role}: {said}")
