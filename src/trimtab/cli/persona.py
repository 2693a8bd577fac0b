"""`trimtab contrast persona`: a contrast from the description of a trait, written and filtered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from trimtab.cli.common import console, open_beside, open_model, print_json
from trimtab.cli.judging import JudgedAt
from trimtab.cli.options import Json, Opened, Overwrite
from trimtab.contrasts import Contrast, last_message, made_beside
from trimtab.errors import TrimtabError
from trimtab.files import check_output
from trimtab.options import PersonaAmounts, option
from trimtab.terminal import write_text

if TYPE_CHECKING:
    from trimtab.evaluation import ChatEndpoint

#: Pairs that are shown.
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Amounts(PersonaAmounts):
    """How much is written, and how."""

    opposite: str | None = option(
        "What the other side is, in a few words (default: what is known of the wish's words).", None
    )
    max_new_tokens: int = option("Tokens of an answer.", 100, least=1)
    temperature: float = option("Of answers; 1 is the model's own distribution.", 1.0)
    top_p: float = option("Share of the distribution that answers are drawn from.", 0.9)
    seed: int = option("For sampling.", 0, least=0)
    writer: str | None = option(
        "Who writes instructions and questions: templates, local:MODEL, or chat:NAME at "
        "--writer-url (default: the model itself from 1e9 parameters on, else templates).",
        None,
    )
    writer_url: str | None = option("Base URL of the writer's API.", None)
    writer_key_env: str = option("Environment variable that holds its key.", "OPENAI_API_KEY")

    def author(self, opened: Opened) -> Any:
        """Who writes, as `persona_contrast` takes it."""
        if self.writer in (None, "templates"):
            return self.writer
        return chat_named("--writer", self.writer, (self.writer_url, self.writer_key_env), opened)


@dataclass(frozen=True, kw_only=True)
class Judge(JudgedAt):
    """Who says which answers are kept."""

    judge: str | None = option(
        "local:MODEL, asked for yes or no, or chat:NAME at --judge-url, which scores from 0 to 100 "
        "(default: the model itself, asked for yes or no).",
        None,
    )

    def asked(self, opened: Opened) -> Any:
        """The judge, as `persona_contrast` takes it."""
        if self.judge is None:
            return None
        return chat_named("--judge", self.judge, (self.judge_url, self.judge_key_env), opened)


def chat_named(
    flag: str, named: str | None, at: tuple[str | None, str], opened: Opened
) -> Any | ChatEndpoint:
    """local:MODEL as a model, chat:NAME as an endpoint."""
    from trimtab.evaluation import ChatEndpoint

    kind, _, name = str(named).partition(":")
    url, key = at
    if kind == "local" and name:
        return open_beside(opened, name)
    if kind == "chat" and name and url:
        return ChatEndpoint(url, name, key_variable=key)
    also = "templates, " if flag == "--writer" else ""
    raise TrimtabError(f"{flag} {named}: write {also}local:MODEL, or chat:NAME with {flag}-url")


def persona(
    wish: Annotated[str, Parameter(help='A trait in a few words: "formal", "speaks like a poet".')],
    /,
    *,
    opened: Opened,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="The JSONL file to write.")],
    writing: Amounts = Amounts(),
    judging: Judge = Judge(),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a contrast for a trait: the model answers questions under instructions for the trait
    and against it, and pairs of answers are kept that show it on one side only. A run that was
    interrupted goes on. How it was made is written beside the rows, in a file .made.json.

    Example: `trimtab contrast persona "answers in one short sentence" --model
    smollm2-135m-instruct -o concise.jsonl`
    """
    from trimtab.writing import persona_contrast

    check_output(output, overwrite)
    judge, author = judging.asked(opened), writing.author(opened)
    language_model = open_model(opened)
    made = persona_contrast(
        language_model,
        wish,
        opposite=writing.opposite,
        writer=author,
        judge=judge,
        pairs=writing.pairs,
        questions=writing.questions,
        answers=writing.answers,
        max_new_tokens=writing.max_new_tokens,
        temperature=writing.temperature,
        top_p=writing.top_p,
        seed=writing.seed,
        output=output,
        overwrite=overwrite,
    )
    if as_json:
        about = {"contrast": str(output), "rows": len(made), "parts": made.sizes}
        print_json({**about, "made": str(made_beside(output)), **dict(made.made or {})})
        return
    _say(made, output)


def _say(made: Contrast, output: Path) -> None:
    """All that a person must see before anything is fitted on it."""
    about = dict(made.made or {})
    console.print("instructions", style="bold")
    for pair in about["instructions"]:
        write_text(f"  + {pair['positive']}\n  - {pair['negative']}")
    console.print("questions", style="bold")
    for part in made.sizes:
        some = [each["text"] for each in about["questions"] if each["part"] == part]
        write_text(f"  {part}: {' '.join(some)}")
    console.print("pairs", style="bold")
    for row in made.pairs[:: max(1, len(made) // _SHOWN)][:_SHOWN]:
        write_text(f"  {last_message(row.prompt)}")
        for sign, text in (("+", row.positive), ("-", row.negative)):
            write_text(f"    {sign} {' '.join(text.split())}")
    for line in _counts(about):
        console.print(line)
    sizes = ", ".join(f"{count} {part}" for part, count in made.sizes.items())
    console.print(f"{output}: {len(made)} pairs ({sizes}); fit with --contrast {output}")


def _counts(about: dict[str, Any]) -> list[str]:
    """Where instructions and questions came from, and what became of the answers."""
    counts = about["counts"]
    sources = [
        f"{what} from " + ", ".join(f"{source} {n}" for source, n in counts[what].items())
        for what in ("instructions", "questions")
    ]
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items())
    told = about["separation"]
    separation = "" if told is None else f"; the judge tells the sides apart in {told:.0%} of cases"
    return [
        "; ".join(sources),
        f"kept {counts['kept']} of {counts['written']} pairs of answers"
        f" (dropped: {dropped or 'none'}){separation}",
    ]
