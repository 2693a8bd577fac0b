"""Has a model answer the examples of a task, batch by batch, and judges what it wrote.

Every batch is planned before the first one runs and has a seed of its own, so that a run which was
interrupted gives the same records as one that was not.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.contrasts import Prompt, images_in, in_words
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.evaluation.prompted import Attached, asked_with, steering_of
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task
from trimtab.model import Completion, LanguageModel, UnsoundError, answer_of, batches_by_length
from trimtab.options import Answering
from trimtab.reading import (
    Engine,
    Next,
    PlannedBatch,
    Reading,
    StreamCache,
    next_tokens,
    prompt_reading,
)
from trimtab.steering import Steering, Steerings, together
from trimtab.terminal import progress

#: Why an engine does not do what is random.
OTHERWISE = "vLLM would otherwise than transformers: leave the engine out"
#: Judges a batch of outputs: what is measured, by name, for each of them.
Measure = Callable[[Sequence[Example], Sequence[Completion]], list[dict[str, float | None]]]


@dataclass(frozen=True)
class Entry:
    """The examples of a task under one protocol."""

    protocol: Protocol
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Settings:
    """How answers are generated where a task leaves it open."""

    seed: int = 0
    batch_size: int = 16
    max_new_tokens: int | None = None
    force: bool = False
    #: What the blocks below steerings computed of one-token prompts, for the next steering.
    kept: StreamCache | None = None
    #: What runs the model in place of transformers, for several jobs in turns.
    engine: Engine | None = None


@dataclass(frozen=True, kw_only=True)
class AnsweredBy(Answering):
    """The same, and what runs the model in place of transformers (`tt.VLLM`)."""

    engine: Engine | None = None


def engine_of(answering: Answering) -> Engine | None:
    """What runs the model in place of transformers, if anything does."""
    return answering.engine if isinstance(answering, AnsweredBy) else None


def next_tokens_by(
    language_model: LanguageModel,
    readings: Sequence[Reading],
    steering: Any,
    missing: Callable[[int], bool],
    settings: Settings,
) -> Iterator[tuple[PlannedBatch, list[Next]]]:
    """What is expected next, by whatever runs the model: where it is an engine, a batch may be
    empty."""
    if settings.engine is None:
        kept, force = settings.kept, settings.force
        return next_tokens(
            language_model, readings, steering, missing=missing, kept=kept, force=force
        )
    return settings.engine.next_tokens(
        readings, steering, missing=missing, in_turns=True, force=settings.force
    )


def answer(
    language_model: LanguageModel,
    task: Task,
    entries: Sequence[Entry],
    attached: Attached,
    done: set[tuple[str, int]],
    settings: Settings,
    measure: Measure | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Records of a task, a batch at a time; batches whose records are all `done` are left out.

    What is thought between thinking markers is no answer: it is kept, and neither read nor judged.
    A prompt that several protocols share is answered once. What is attached may be a steering, or
    words before each prompt: the records then still say what the task asked.
    """
    owners: dict[Prompt, list[tuple[Entry, int]]] = {}
    for entry in entries:
        for index, example in enumerate(entry.examples):
            prompt = for_model(language_model, example.prompt)
            owners.setdefault(prompt, []).append((entry, index))
    prompts = list(owners)
    asked = asked_with(language_model, attached, prompts)

    def missing(i: int) -> bool:
        return any((entry.protocol, index) not in done for entry, index in owners[prompts[i]])

    write = _write_one_token if task.generation.new_tokens == 1 else _write
    with progress(task.name, len(prompts)) as advance:
        started = time.perf_counter()
        waited = 0.0
        for batch, completions in write(
            language_model, task, asked, steering_of(attached), missing, settings
        ):
            if not batch:  # others have their turn
                waited += time.perf_counter() - started
                yield []
                started = time.perf_counter()
                continue
            records = []
            answers = [answer_of(language_model, each) for each in completions]
            for i, completion, said in zip(batch, completions, answers, strict=True):
                for entry, index in owners[prompts[i]]:
                    example = entry.examples[index]
                    records.append(_record(task, entry.protocol, index, example, said))
                    if said is not completion:
                        records[-1] |= {"output": completion.text, "answer": said.text}
            if measure is not None:
                _add_measures(records, batch, answers, owners, prompts, measure)
            _add_gates(records, batch, completions, owners, prompts)
            seconds = waited + time.perf_counter() - started
            waited = 0.0
            for record in records:
                record["seconds"] = round(seconds / len(records), 4)
            yield [r for r in records if (r["protocol"], r["index"]) not in done]
            advance(len(batch))
            started = time.perf_counter()


def for_model(language_model: LanguageModel, prompt: Prompt) -> Prompt:
    """A conversation as plain text where the model has no chat template."""
    if isinstance(prompt, str) or language_model.chats or images_in(prompt):
        return prompt
    return "\n\n".join(in_words(content) for _, content in prompt) + "\n"


def _add_measures(
    records: list[dict[str, Any]],
    batch: Sequence[int],
    completions: Sequence[Completion],
    owners: dict[Prompt, list[tuple[Entry, int]]],
    prompts: Sequence[Prompt],
    measure: Measure,
) -> None:
    """Scores each output once, for all records that share it."""
    firsts = [owners[prompts[i]][0] for i in batch]
    examples = [entry.examples[index] for entry, index in firsts]
    values = measure(examples, completions)
    shared = [v for i, v in zip(batch, values, strict=True) for _ in owners[prompts[i]]]
    for record, found in zip(records, shared, strict=True):
        record["values"] |= found


def _add_gates(
    records: list[dict[str, Any]],
    batch: Sequence[int],
    completions: Sequence[Completion],
    owners: dict[Prompt, list[tuple[Entry, int]]],
    prompts: Sequence[Prompt],
) -> None:
    """Notes whether gates fired, and how strongly, of steerings that have some."""
    shared = [
        each.gates for i, each in zip(batch, completions, strict=True) for _ in owners[prompts[i]]
    ]
    for record, gates in zip(records, shared, strict=True):
        if gates:
            record["gate"] = [each.as_json() for each in gates]
            record["values"]["gate_fired"] = float(any(each.fired for each in gates))


def _record(
    task: Task, protocol: Protocol, index: int, example: Example, completion: Completion
) -> dict[str, Any]:
    """What is kept of one answer."""
    values: dict[str, float | None] = {}
    prediction = None
    if task.read is not None:
        prediction = task.read(completion.text, protocol)
        answered = prediction is not None and (
            not task.options or str(prediction).lower() in map(str.lower, task.options)
        )
        values = {
            "accuracy": float(task.right(prediction, example.target)),
            "answered": float(answered),
        }
    return {
        "task": task.name,
        "protocol": protocol,
        "index": index,
        "id": example.id,
        "prompt": example.prompt,
        "output": completion.text,
        "prediction": prediction,
        "target": example.target,
        "values": values,
    }


_Steered = Steering | Steerings | None
_Written = Iterator[tuple[Sequence[int], list[Completion]]]


def _write_one_token(
    language_model: LanguageModel,
    task: Task,
    prompts: Sequence[Prompt],
    steering: _Steered,
    missing: Callable[[int], bool],
    settings: Settings,
) -> _Written:
    """The most probable next token of each prompt; no more than one position is unembedded."""
    readings = [
        prompt_reading(tokens) for tokens in _cut_left(language_model, task.name, prompts, room=1)
    ]
    decode = language_model.tokenizer.decode
    for batch, found in next_tokens_by(language_model, readings, steering, missing, settings):
        tokens = [int(each.best[0]) for each in found]
        texts = [decode([token], skip_special_tokens=True) for token in tokens]
        yield (
            batch.rows,
            [
                Completion(prompts[i], text, (token,), gates=each.gates)
                for i, text, token, each in zip(batch.rows, texts, tokens, found, strict=True)
            ],
        )


def _write(
    language_model: LanguageModel,
    task: Task,
    prompts: Sequence[Prompt],
    steering: _Steered,
    missing: Callable[[int], bool],
    settings: Settings,
) -> _Written:
    """Texts of many tokens, batched by the length of their prompts."""
    generation: Generation = task.generation
    new = settings.max_new_tokens or generation.tokens_for(language_model.anatomy.name)
    lengths = [len(tokens) for tokens in language_model.encode(prompts)]
    longest = max(lengths, default=0)
    if longest + new > language_model.max_length:  # said before the first batch, not at the last
        raise TrimtabError(
            f"{task.name}: a prompt of {longest} tokens and {new} new ones exceed the "
            f"{language_model.max_length} tokens that {language_model.name} takes: ask for fewer "
            "new tokens (--max-new-tokens)"
        )
    if settings.engine is not None:
        if generation.sampled:
            raise TrimtabError(f"{task.name} samples its answers, as {OTHERWISE}")
        acting = [together(steering)] * len(prompts)
        asked = [missing(i) for i in range(len(prompts))]
        for some in settings.engine.written(
            prompts, acting, asked, in_turns=True, max_new_tokens=new, stop=generation.stop
        ):
            completions: list[Completion] = []
            for _, made in some:
                if isinstance(made, UnsoundError):
                    raise made
                completions.append(made)
            yield [place for place, _ in some], completions
        return
    for number, batch in enumerate(batches_by_length(lengths, rows=settings.batch_size)):
        if not any(map(missing, batch)):
            continue
        options: dict[str, Any] = {}
        if generation.sampled:
            options = {
                "temperature": 1.0,
                "top_k": 50,
                "seed": _seed(settings.seed, task, number * settings.batch_size),
            }
        yield (
            batch,
            language_model.generate(
                [prompts[i] for i in batch],
                chat=False,  # conversations are rendered all the same, and text is taken as it is
                max_new_tokens=new,
                steering=steering,
                batch_size=settings.batch_size,
                stop=generation.stop,
                force=settings.force,
                **options,
            ),
        )


def _seed(seed: int, task: Task, start: int) -> int:
    """A seed of each batch, so that skipping batches changes nothing in the others."""
    digest = hashlib.sha256(f"{seed}/{task.name}/{start}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _cut_left(
    language_model: LanguageModel, name: str, prompts: Sequence[Prompt], room: int
) -> list[Sequence[int]]:
    """Token ids; a prompt that leaves no room loses its beginning, never its end, and is counted.

    A BOS stays.
    """
    limit = language_model.max_length - room
    encoded = language_model.encode(prompts)
    if not all(encoded):
        raise TrimtabError(f"{name}: a prompt has no tokens")
    cut = 0
    for i, tokens in enumerate(encoded):
        if len(tokens) > limit:
            kept = tokens[:1] if tokens[0] == language_model.bos else []
            encoded[i] = [*kept, *tokens[len(tokens) - limit + len(kept) :]]
            cut += 1
    if cut:
        warnings.warn(
            f"{name}: {cut} of {len(prompts)} prompts are longer than {limit} tokens; their "
            "beginnings were cut",
            TrimtabWarning,
            stacklevel=2,
        )
    return encoded
