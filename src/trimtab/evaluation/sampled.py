"""What a model writes, unsteered beside steered: figures say how much, texts say what."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.contrasts import Prompt, last_message, spread
from trimtab.errors import TrimtabError
from trimtab.evaluation.prompted import Attached, asked_with, steering_of
from trimtab.model import LanguageModel
from trimtab.reports import Table

#: Prompts that are shown, and tokens that are written after each.
SHOWN, NEW_TOKENS = 3, 32
#: Characters of a prompt that stand in a table, from its end.
_WIDTH = 200


@dataclass(frozen=True)
class Sample:
    """A prompt and what follows it: unsteered, and under each steering by its name."""

    prompt: Prompt
    unsteered: str
    steered: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "prompt": last_message(self.prompt),
            "unsteered": self.unsteered,
            "steered": dict(self.steered),
        }


def samples(
    language_model: LanguageModel,
    steerings: Mapping[str, Attached],
    prompts: Sequence[Prompt],
    *,
    count: int = SHOWN,
) -> tuple[Sample, ...]:
    """Greedy continuations of some of the prompts, spread over them. A steering under which the
    model's numbers overflow has that said in place of a text."""
    asked = spread(list(dict.fromkeys(prompt for prompt in prompts if prompt)), count)
    if not asked or not steerings:
        return ()

    def written(attached: Attached) -> list[str]:
        try:
            completions = language_model.generate(
                asked_with(language_model, attached, asked),
                steering=steering_of(attached),
                max_new_tokens=NEW_TOKENS,
                chat=False,
            )
        except TrimtabError as error:
            return [f"({error})"] * len(asked)
        return [completion.text for completion in completions]

    columns = [written(None), *(written(attached) for attached in steerings.values())]
    return tuple(
        Sample(prompt, base, dict(zip(steerings, texts, strict=True)))
        for prompt, base, *texts in zip(asked, *columns, strict=True)
    )


def kept_samples(results: Mapping[str, Any] | None, names: Collection[str]) -> tuple[Sample, ...]:
    """The samples in the results of a finished run, if they are of these steerings; else none."""
    found = (results or {}).get("samples")
    try:
        kept = tuple(Sample(one["prompt"], one["unsteered"], one["steered"]) for one in found or ())
    except (TypeError, KeyError):
        return ()
    return kept if all(one.steered.keys() == set(names) for one in kept) else ()


def samples_table(shown: Sequence[Sample]) -> Table:
    """A row for each text, the unsteered one first."""
    rows = []
    for sample in shown:
        prompt = last_message(sample.prompt)
        first = prompt if len(prompt) <= _WIDTH else "..." + prompt[-_WIDTH:]
        for name, text in {"unsteered": sample.unsteered, **sample.steered}.items():
            rows.append([first, name, text])
            first = ""
    return Table("What it writes", ["prompt", "", "text"], rows, "Greedy, the first tokens.")
