"""Asking instead of steering, or beside it: words before every prompt, which go where a steering
goes, so that nothing else differs between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.contrasts import Prompt
from trimtab.errors import TrimtabError, shown
from trimtab.files import json_digest
from trimtab.model import LanguageModel, asked
from trimtab.reading import Reading
from trimtab.steering import Steering, Steerings


@dataclass(frozen=True)
class Prompted:
    """Words that are put before every prompt, with or without a steering beside them.

    Of a conversation `text` is the system message, behind one that is there already; where the
    chat template takes none it stands before what the user says first. `examples`, each a prompt
    and its answer, are turns of user and assistant before the conversation. Of text that is taken
    as it is all of this stands before it, with blank lines between. Where nothing is said the
    prompts are what they were.

    It goes where a steering goes in `evaluate`, alone or as an alternative:

        >>> import trimtab as tt
        >>> asked = tt.Prompted("Please write formally.")
        >>> found = tt.evaluate(lm, contrast, steering={"ask": asked, "nothing": tt.Prompted("")})
    """

    text: str = ""
    examples: tuple[tuple[Prompt, str], ...] = ()
    steering: Steering | Steerings | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TrimtabError(f"a prompt is text, not {self.text!r:.60}")

    @property
    def label(self) -> str:
        """What it is called where it has no name."""
        examples = f"{len(self.examples)} examples" if self.examples else ""
        said = shown(self.text, 60) if self.text else ""
        steered = "" if self.steering is None else self.steering.label
        return " + ".join(filter(None, (said, examples, steered))) or "no words"

    @property
    def words(self) -> tuple[str, tuple[tuple[Prompt, str], ...]]:
        """What is put before prompts, whatever is steered."""
        return self.text, self.examples

    @property
    def digest(self) -> str:
        """SHA-256 of the words."""
        return json_digest(self.words, ensure_ascii=False, separators=(",", ":"))

    def put(self, language_model: LanguageModel, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with the words before them."""
        return asked(language_model, prompts, self.text, self.examples)


#: Under what a model is evaluated: nothing, steerings, or words with or without some.
Attached = Steering | Steerings | Prompted | None


def steering_of(attached: Attached) -> Steering | Steerings | None:
    """What is steered."""
    return attached.steering if isinstance(attached, Prompted) else attached


def words_of(attached: Attached) -> Any:
    """What is put before prompts, to tell apart what is asked; None where nothing is."""
    if not isinstance(attached, Prompted) or not any(attached.words):
        return None
    return attached.words


def asked_with(
    language_model: LanguageModel, attached: Attached, prompts: Sequence[Prompt]
) -> list[Prompt]:
    """The prompts as they are asked."""
    if isinstance(attached, Prompted):
        return attached.put(language_model, prompts)
    return list(prompts)


def with_words(
    language_model: LanguageModel, attached: Attached, readings: Sequence[Reading]
) -> list[Reading]:
    """Plain texts that are read, with the words before them; the same tokens are scored."""
    if not isinstance(attached, Prompted) or words_of(attached) is None:
        return list(readings)
    said = str(attached.put(language_model, ["."])[0])
    (before,) = language_model.encode([said.removesuffix(".")])
    return [_behind(tuple(before), reading, language_model.bos) for reading in readings]


def _behind(before: tuple[int, ...], reading: Reading, bos: int | None) -> Reading:
    """A reading after some tokens, with the BOS that it began with before both."""
    own = 0 if bos is None or reading.tokens[0] != bos else 1
    begun = (reading.tokens[0], *before) if own and before[0] != bos else before
    moved = len(begun) - own
    return Reading(
        (*begun, *reading.tokens[own:]),
        tuple(position + moved for position in reading.positions),
        reading.prompt + moved,
        reading.targets,
    )


def together_with(prompted: Prompted, steering: Steering | Steerings) -> Prompted:
    """The same words beside a steering."""
    return replace(prompted, steering=steering)
