"""Just asking, beside steering: the prompts that a steering must beat, on the same rows and axes,
and what the model writes when it is steered, asked, or left as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.contrasts import Contrast, Part, Prompt, spread
from trimtab.errors import TrimtabError
from trimtab.evaluation import Attached, Prompted, Sample, asked_with, steering_of
from trimtab.figures import Estimate, mean_interval
from trimtab.model import LanguageModel
from trimtab.reading import log_odds
from trimtab.strength import Continuations, neutral
from trimtab.sweeps import Asking, Behaviour, askings, ladder
from trimtab.wishes.holding import Held, held_together
from trimtab.wishes.measuring import Measures
from trimtab.wishes.work import Work

#: Prompts of the test part that are answered, and tokens of an answer.
PROMPTS, NEW_TOKENS = 12, 40
#: The rungs of the ladder that are asked: a pack of two cores has no time for all.
_RUNGS = ("as it is", "extremely")
#: What nobody has said in words cannot be asked for.
UNSAID = "what is wished for is not known in words, so that it was not compared with asking for it"


@dataclass(frozen=True)
class Asked:
    """A prompt: what is said, what it gains on the validation rows, and what plain text costs."""

    name: str
    words: Prompted
    gain: Estimate
    cost: float

    @property
    def said(self) -> str:
        """In a few words."""
        return self.words.label

    def as_json(self) -> dict[str, Any]:
        gain = {"gain": self.gain.value, "gain_ci95": self.gain.ci95, "n": self.gain.n}
        return {"name": self.name, "said": self.said, **gain, "cost": self.cost}


def prompts_for(contrast: Contrast) -> list[tuple[str, Prompted]]:
    """The prompts by their names: the one-line ask, more of it, and some train pairs as examples.
    None where nobody has said what is wished for: then there is no fair prompt."""
    if not contrast.behaviour:
        return []
    found: list[tuple[str, Prompted]] = []
    for one in askings(Behaviour(contrast.behaviour), contrast):
        found += [(_named(one, rung), words) for rung, words in _rungs(one).items()]
    return list({words.digest: (name, words) for name, words in reversed(found)}.values())[::-1]


def _rungs(one: Asking) -> Mapping[str, Prompted]:
    if not one.toward:
        return {}
    return {name: words for name, words in one.rungs.items() if name in ("", *_RUNGS)}


def _named(one: Asking, rung: str) -> str:
    return f"{one.name}, {rung}" if rung else one.name


def asked_on_validation(
    measures: Measures, name: str, words: Prompted, say: Callable[[str], object]
) -> Asked | None:
    """What a prompt gains and costs; None where there is no room for it in the model."""
    if _too_long(measures, words):
        say(f"{name}: left out, there is no room for it in the model")
        return None
    gains = measures.gains(lambda: words, asked_key(words))
    return Asked(name, words, mean_interval(gains), measures.cost(lambda: words, asked_key(words)))


def best_asked(asked: Sequence[Asked], max_cost: float) -> Asked | None:
    """What does most on the validation rows within the limit of cost; where none keeps to it, the
    cheapest."""
    within = [one for one in asked if one.cost <= max_cost]
    if within:
        return max(within, key=lambda one: one.gain.value)
    return min(asked, key=lambda one: one.cost, default=None)


def asked_key(words: Prompted) -> str:
    """What a prompt is known by."""
    return f"prompt {words.digest[:16]}"


def _too_long(measures: Measures, words: Prompted) -> bool:
    lm = measures.bench.language_model
    asked = asked_with(lm, words, measures.bench.every_prompt())
    return max(map(len, lm.encode(asked))) > lm.max_length - measures.bench.new_tokens


# -- what is written ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What the model writes after some test prompts, and by how many nats each text fits the wish
    better than what the model writes as it is, by name: the log-odds that the two texts are where
    they belong under the wish and under its opposite, and not exchanged. The model itself says so
    (None: nobody has said the wish in words). `held` is whether they hold together."""

    samples: tuple[Sample, ...]
    fits: Mapping[str, Estimate]
    held: Mapping[str, Held] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        fits = {
            name: {"nats": one.value, "ci95": one.ci95, "n": one.n}
            for name, one in self.fits.items()
        }
        held = {name: one.as_json() for name, one in self.held.items()}
        return {"fits": fits, "held": held, "samples": [one.as_json() for one in self.samples]}


def prompts_of(contrast: Contrast, part: Part) -> list[Prompt]:
    """Some prompts of a part, each once, that are answered."""
    rows = [pair.prompt for pair in contrast.part(part).pairs if pair.prompt]
    return spread(list(dict.fromkeys(rows)), PROMPTS)


def written(
    language_model: LanguageModel,
    contrast: Contrast,
    attached: Mapping[str, Callable[[], Attached]],
    work: Work,
) -> Written:
    """Answers to some test prompts as the model is, and under each of what is `attached`."""
    prompts = prompts_of(contrast, "test")
    if not prompts:
        return Written((), {})
    base = texts_of(language_model, prompts, lambda: None, "unsteered", work)
    columns = {
        name: texts_of(language_model, prompts, find, name, work) for name, find in attached.items()
    }
    samples = tuple(
        Sample(prompt, base[i], {name: texts[i] for name, texts in columns.items()})
        for i, prompt in enumerate(prompts)
    )
    held = {name: held_together(texts, base) for name, texts in columns.items()}
    if not contrast.behaviour:
        return Written(samples, {}, held)
    fits = {}
    for name, texts in columns.items():
        nats = work.recall(
            f"fit of what is written {name}",
            lambda texts=texts: _fits(language_model, contrast, prompts, texts, base),  # type: ignore[misc]
        )
        fits[name] = mean_interval(torch.tensor(nats, dtype=torch.float64))
    return Written(samples, fits, held)


def texts_of(
    language_model: LanguageModel,
    prompts: Sequence[Prompt],
    find: Callable[[], Attached],
    name: str,
    work: Work,
) -> list[str]:
    """What the model writes after prompts under what `find` finds, by its name."""

    def write() -> list[str]:
        attached = find()
        completions = language_model.generate(
            asked_with(language_model, attached, prompts),
            steering=steering_of(attached),
            max_new_tokens=NEW_TOKENS,
            chat=False,
        )
        return [completion.text for completion in completions]

    return work.recall(f"texts, {name}", write)


def _fits(
    language_model: LanguageModel,
    contrast: Contrast,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    base: Sequence[str],
) -> list[float]:
    """Of each prompt by how many nats a text fits the wish better than what was written before;
    equal texts fit alike."""
    differ = [i for i, (one, other) in enumerate(zip(texts, base, strict=True)) if one != other]
    nats = [0.0] * len(prompts)
    if not differ:
        return nats
    odds = []
    for words in (_ask(contrast.behaviour), _ask(contrast.opposite)):
        asked = words.put(language_model, [prompts[i] for i in differ])
        triples = [(p, texts[i], base[i]) for p, i in zip(asked, differ, strict=True)]
        odds.append(_odds(language_model, triples))
    for place, i in enumerate(differ):
        nats[i] = odds[0][place] - odds[1][place]
    return nats


def _ask(behaviour: str) -> Prompted:
    """The one-line ask; of what nobody has said in words, nothing."""
    return ladder(behaviour)["as it is"] if behaviour else Prompted("")


def _odds(language_model: LanguageModel, triples: Sequence[tuple[Prompt, str, str]]) -> list[float]:
    try:
        return log_odds(language_model, Contrast.from_pairs(list(triples), "written")).tolist()
    except TrimtabError:
        if len(triples) > 1:
            return [odds for one in triples for odds in _odds(language_model, [one])]
        return [0.0]  # both are the same tokens, or one is empty: neither fits better


def kl_per_token(
    language_model: LanguageModel,
    contrast: Contrast,
    attached: Mapping[str, Callable[[], Attached]],
    work: Work,
) -> dict[str, dict[str, Any] | None]:
    """KL(unsteered || changed) per generated token after neutral prompts, by name; None where it
    cannot be measured."""
    chats = any(not isinstance(pair.prompt, str) for pair in contrast.pairs)
    made: list[Continuations] = []

    def measure(find: Callable[[], Attached]) -> dict[str, Any] | None:
        try:
            if not made:
                made.append(Continuations(language_model, neutral(language_model, chats)))
            return made[0].kl(find()).as_json()
        except TrimtabError:
            return None

    return {
        name: work.recall(f"kl of {name}", lambda find=find: measure(find))  # type: ignore[misc]
        for name, find in attached.items()
    }
