"""`trimtab make`: from a wish in a few words to a steering that was chosen and measured."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json
from trimtab.cli.options import Data, Json, Opened
from trimtab.cli.persona import chat_named
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError
from trimtab.options import Keep, Making, WishTexts, option
from trimtab.terminal import write_text

if TYPE_CHECKING:
    from trimtab.wishes import Made

#: The exit status where nothing works: a line that would go on with the steering stops there.
_NOTHING = 1
#: What is there for people.
_LEFT = (
    *("report.html", "steering.safetensors", "README.md", "contrast.jsonl", "samples.md"),
    *("next.md", "results.json"),
)


@dataclass(frozen=True, kw_only=True)
class Texts(WishTexts):
    """How the contrast of a wish is written, and where who writes and who judges are."""

    writer_url: str | None = option("Base URL of the writer's API.", None)
    writer_key_env: str = option("Environment variable that holds its key.", "OPENAI_API_KEY")
    judge_url: str | None = option("Base URL of the judge's API.", None)
    judge_key_env: str = option("Environment variable that holds its key.", "OPENAI_API_KEY")

    def as_python_has_it(self, opened: Opened) -> WishTexts:
        """The same with a writer and a judge that are there."""
        writer: Any = self.writer
        if writer not in (None, "templates"):
            writer = chat_named("--writer", writer, (self.writer_url, self.writer_key_env), opened)
        judge: Any = self.judge
        if judge is not None:
            judge = chat_named("--judge", judge, (self.judge_url, self.judge_key_env), opened)
        given = {item.name: getattr(self, item.name) for item in fields(WishTexts)}
        return WishTexts(**{**given, "writer": writer, "judge": judge})


def make(
    wish: Annotated[
        str | None,
        Parameter(help='What is wished for: "formal", "answers in one short sentence".'),
    ] = None,
    /,
    *,
    opened: Opened,
    contrast: Annotated[
        str | None,
        Parameter(
            name=("--contrast", "-c"),
            help="Instead of a wish: a file of pairs, builtin:NAME or task:NAME.",
        ),
    ] = None,
    data: Data = None,
    making: Making = Making(),
    texts: Texts = Texts(),
    keep: Keep = Keep(),
    review: Annotated[
        bool,
        Parameter(
            help="Stop when the contrast is there, to look at it and edit it; the same line "
            "without --review goes on from the edited file.",
            negative=(),
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a steering of a wish: a model writes a contrast, one pass fits many methods, and what
    gains most within the limit of cost is chosen on validation pairs and measured on others, beside
    just asking for the same in the prompt.

    The directory (default: named after the wish) then has the steering, a card, the contrast, a
    report, samples and what to do next. What was interrupted goes on there. The exit status is 1
    where nothing works, which is said with its reasons.

    Example: `trimtab make "answers in one short sentence" --model smollm2-135m-instruct -o concise`
    """
    from trimtab import wishes

    if (wish is None) is (contrast is None):
        raise TrimtabError(
            'say what is wished for, as in trimtab make "answers in one short sentence", or give '
            "--contrast"
        )
    if keep.output is None:
        keep = replace(keep, output=Path(wishes.slug(wish or str(contrast))))
    written = texts.as_python_has_it(opened)
    found = wishes.make(
        open_model(opened),
        wish,
        contrast=contrast,
        data=data,
        making=making,
        texts=written,
        keep=keep,
        review=review,
        say=_silent if as_json else write_text,
    )
    if as_json:
        print_json(found.as_json())
    else:
        _say(found, keep.output)
    if found.reviewed and found.chosen is None:
        sys.exit(_NOTHING)


def _silent(text: str) -> None:
    """Says nothing."""


def _say(found: Made, output: Path | str | None) -> None:
    """What was chosen beside asking, what it writes, and where everything is; or why nothing."""
    if not found.reviewed:
        console.print(
            f"Look at {output}/contrast.jsonl, edit it as you like, and go on with the same line "
            "without --review."
        )
        return
    tables = found.tables()
    shown = tables if found.chosen is None else [tables[0], tables[-1]]
    show(shown, found.notes(), output, _LEFT, summary=found.summary)
