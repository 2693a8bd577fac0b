"""vLLM as what runs a model over many texts at once, each under steerings of its own.

The model of transformers stays what it is: it says where its sites are, makes texts of prompts, and
is what the engine is compared with when it starts. Work of several kinds may be under way at the
same time; whoever waits takes the next step for all.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from trimtab.batches import seed_of
from trimtab.contrasts import Prompt, images_in
from trimtab.engines import OURS as GIVEN
from trimtab.engines import (
    Ask,
    InProcess,
    Read,
    ReadingOf,
    captures,
    sites_of,
    untested,
)
from trimtab.engines import places_of as places
from trimtab.errors import TrimtabError, shown
from trimtab.model import (
    Completion,
    Fired,
    LanguageModel,
    SteeringArgument,
    UnsoundError,
    end_tokens,
    per_text,
    row_steerings,
    sampling,
    stop_pattern,
    unsound,
)
from trimtab.reading import Next, PlannedBatch, Reading, Stretch, refuse_idle
from trimtab.serving.deciding import token_by_token
from trimtab.serving.inside import Carried
from trimtab.serving.proving import joined, last_activations, of_ranks, probe, refuse_others
from trimtab.serving.queueing import KNOWN, Acting, Queue, Request, Work
from trimtab.steering import Steering

#: What says how tokens are chosen, and vLLM has by the same name.
_CHOOSING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OPTIONS = ("max_new_tokens", "min_new_tokens", "stop", "seed", *_CHOOSING)


class VLLM:
    """vLLM in this process, on a model's weights.

        with tt.VLLM(lm, [joy, formal]) as engine:
            texts = engine.generate(prompts, steering=[joy, None, formal.at(3)])
            found = tt.evaluate(lm, "copa", steering={"joy": joy}, engine=engine)

    It starts at the first text, hooked at the sites of the `steerings` that it was told of until
    then, and in all blocks at the kinds of sites in `hooks` ("resid", "ffn_out" ...); others are
    refused. `model` is a directory or hub id with the same weights, which vLLM reads (default: a
    temporary checkpoint of what is in memory); the other arguments are vLLM's own. What it does not
    carry, such as a rule (`kl=`), is refused before it starts.
    """

    name = "vllm"

    def __init__(
        self,
        language_model: LanguageModel,
        steerings: Sequence[Steering] = (),
        *,
        hooks: Sequence[str] = (),
        model: str | Path | None = None,
        force: bool = False,
        **arguments: Any,
    ) -> None:
        if reason := untested():
            raise TrimtabError(f"{reason}: leave the engine out, and transformers runs the model")
        ours = [name for name in GIVEN if name in arguments]
        if ours:
            raise TrimtabError(f"vLLM's {ours[0]} is for trimtab to say: leave it out")
        self._lm, self._model, self._arguments = language_model, model, arguments
        self._carried = Carried(
            language_model.anatomy,
            int(arguments.get("tensor_parallel_size", 1)),
            stages=int(arguments.get("pipeline_parallel_size", 1)),
            captured=captures(arguments),
        )
        self._sites = {site for kind in hooks for site in language_model.anatomy.sites(kind)}
        self._open = ExitStack()
        self._ends = end_tokens(language_model.model.generation_config.eos_token_id)
        #: Steerings that can be asked for.
        self._prepared: dict[int, Steering] = {}
        self._queue = Queue(language_model, self._started)
        self.prepare(steerings, force=force)

    @property
    def read(self) -> int:
        """Tokens that ran through the model."""
        return self._queue.read

    # -- before it starts -------------------------------------------------------------------------

    def prepare(
        self, steerings: Sequence[Steering], *, everywhere: bool = False, force: bool = False
    ) -> None:
        """Be able to steer so: refuses what does not fit the model, or is not carried. With
        `everywhere` the same kinds of sites are there in all blocks."""
        for steering in steerings:
            if not everywhere and id(steering) in self._prepared:
                continue
            with self._lm.steered(steering, force=force):
                pass  # says what does not fit
            if reason := self._carried(steering):
                raise TrimtabError(f"vLLM does not carry {shown(steering.label)}: {reason}")
            sites = set(sites_of([steering]))
            if everywhere:
                kinds = {site.rpartition(".")[2] for site in sites}
                sites |= {site for kind in kinds for site in self._lm.anatomy.sites(kind)}
            if self._queue.inner is None:
                self._sites |= sites
            if len(self._prepared) < KNOWN:
                self._prepared[id(steering)] = steering

    @property
    def longest(self) -> int:
        """The longest text, with what is written after it, in tokens."""
        if self._queue.inner is not None:
            return min(self._lm.max_length, self._queue.inner.longest)
        given = self._arguments.get("max_model_len")
        own = given if isinstance(given, int) and given > 0 else self._lm.max_length
        return min(self._lm.max_length, own)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse what says how texts are written, and vLLM does not have."""
        strange = [name for name in options if name not in _OPTIONS]
        if strange:
            raise TrimtabError(
                f"vLLM does not take {strange[0]} here: it takes {', '.join(_OPTIONS)}"
            )
        self._choosing(options)

    # -- asking -----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        steering: SteeringArgument = None,
        chat: bool | None = None,
        force: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Continue prompts as `LanguageModel.generate` does, all of them in one continuous batch.

        `options` are max_new_tokens (64), min_new_tokens, stop, temperature, top_k, top_p, min_p,
        repetition_penalty and seed, which gives each prompt a seed of its own.
        """
        self.check_options(options)
        wanted = self._lm.prompts(prompts, chat)
        acting = self._acting(steering, len(wanted))
        self.prepare(list({id(one): one for row in acting for one in row}.values()), force=force)
        found: dict[int, Completion] = {}
        for some in self.written(wanted, acting, **options):
            for place, made in some:
                if isinstance(made, UnsoundError):
                    raise made
                found[place] = made
        return [found[place] for place in range(len(wanted))]

    def written(
        self,
        prompts: Sequence[Prompt],
        acting: Sequence[Acting],
        missing: Sequence[bool] | None = None,
        *,
        in_turns: bool = False,
        **options: Any,
    ) -> Iterator[list[tuple[int, Completion | UnsoundError]]]:
        """What follows prompts (rendered as they are) under the steerings of each, as it comes, by
        its place; `missing` says which are asked for. `in_turns` gives an empty list wherever
        nothing is known yet, so that other work can go on."""
        new, fewest = options.get("max_new_tokens", 64), options.get("min_new_tokens", 0)
        stop, seed = options.get("stop"), options.get("seed")
        pattern = None if stop is None else stop_pattern(stop)
        choosing = self._choosing(options)
        if any(images_in(prompt) for prompt in prompts):
            raise TrimtabError("vLLM is given text only here: leave images to transformers")
        work = Work()
        for place, tokens in enumerate(self._lm.encode(prompts)):
            if missing is not None and not missing[place]:
                continue
            own = {} if seed is None or not choosing else {"seed": seed_of(seed, place)}
            asked = Ask(
                tuple(tokens),
                new=new,
                fewest=fewest,
                told=pattern is not None,
                choosing=choosing | own,
            )
            self._ask(Request(work, place, asked, acting[place], len(tokens), pattern))
        for some in self._queue.results(work, in_turns):
            yield [(place, self._completed(prompts[place], place, one)) for place, one in some]

    def next_tokens(
        self,
        readings: Sequence[Reading],
        steering: SteeringArgument = None,
        *,
        missing: Callable[[int], bool] | None = None,
        in_turns: bool = False,
        force: bool = False,
    ) -> Iterator[tuple[PlannedBatch, list[Next]]]:
        """What the model expects at the positions of readings, as `reading.next_tokens` has it, as
        it comes. `in_turns` gives an empty batch wherever nothing is known yet."""
        acting = self._acting(steering, len(readings))
        self.prepare(list({id(one): one for row in acting for one in row}.values()), force=force)
        if acting:
            refuse_idle(readings, acting[0])
        work = Work()
        for place, reading in enumerate(readings):
            if missing is None or missing(place):
                asked = Ask(_asked_text(reading), scored=reading.targets is not None)
                self._ask(Request(work, place, asked, acting[place], reading.prompt))
        for some in self._queue.results(work, in_turns):
            batch = PlannedBatch(0, tuple(place for place, _ in some))
            yield batch, [self._next(readings[place], place, one) for place, one in some]

    def prepare_sites(self, sites: Sequence[str]) -> None:
        """Be able to read activations there: refuses sites that vLLM has no place for, and those
        that it was not started with."""
        places(self._lm.anatomy, sites)
        strange = [site for site in sites if site not in self._sites]
        if self._queue.inner is None:
            self._sites |= set(strange)
        elif strange:
            kind = strange[0].rpartition(".")[2]
            raise TrimtabError(f"vLLM was not started with {strange[0]}: say hooks=[{kind!r}]")

    def activations(
        self, texts: Sequence[tuple[Sequence[int], Sequence[Stretch]]]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Of texts, as token ids, the stretches that are wanted of each, as they come, by the
        text's place: [tokens, units] in float32 of a whole one, of others the sum, [units] in
        float64. No steering acts."""
        self.prepare_sites(sorted({one.site for _, wanted in texts for one in wanted}))
        work = Work()
        for place, (tokens, wanted) in enumerate(texts):
            reads = tuple(
                Read(one.site, tokens=(one.first, one.stop), whole=one.whole) for one in wanted
            )
            asked = Ask(tuple(tokens), reading=ReadingOf(uuid.uuid4().hex, reads))
            self._ask(Request(work, place, asked, (), len(tokens)))
        for some in self._queue.results(work, in_turns=False):
            for place, request in some:
                told, request.told = request.told, []
                yield (
                    place,
                    [
                        of_ranks(f"{'rows' if one.whole else 'sum'} {number}", one.site, told)
                        for number, one in enumerate(texts[place][1])
                    ],
                )

    def close(self) -> None:
        """End it, and what is under way."""
        with self._open:
            self._queue.close()

    def __enter__(self) -> VLLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- what is asked ----------------------------------------------------------------------------

    def _acting(self, steering: SteeringArgument, count: int) -> list[Acting]:
        each = per_text(steering, count)
        return [row_steerings(steering)] * count if each is None else list(each)

    def _ask(self, request: Request) -> None:
        """Have a text wait for its turn; refuses one that is too long."""
        whole = len(request.ask.tokens) + request.ask.new
        if whole > self.longest:
            raise TrimtabError(
                f"a text of {len(request.ask.tokens)} tokens and {request.ask.new} new ones do not "
                f"go into the {self.longest} that vLLM takes: say max_model_len"
            )
        self._queue.ask(request)

    def _choosing(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """How tokens are chosen, in vLLM's words; nothing where the likeliest are."""
        given = {name: options[name] for name in _CHOOSING if options.get(name) is not None}
        asked = sampling(given, self._lm.anatomy.config.vocab_size)
        asked.pop("do_sample")
        return {name: asked[name] for name in given if name in asked}

    def _started(self) -> InProcess:
        """The engine, which is seen to have the model's activations at each site when it starts."""
        lm, sites = self._lm, sorted(self._sites)
        self._carried.sites = sites
        source = self._model
        if source is None:
            folder = self._open.enter_context(tempfile.TemporaryDirectory())
            source = lm.save_pretrained(Path(folder) / "model")
        expected = last_activations(lm, sites)
        dtype = str(lm.dtype).removeprefix("torch.")
        where = places(lm.anatomy, sites)
        inner = InProcess(str(source), dtype, where, self._ends, self._arguments)
        try:
            if sites:
                seen = inner.seen(uuid.uuid4().hex, probe(lm))
                refuse_others(expected, joined(seen), lm.dtype)
        except BaseException:
            inner.close()
            raise
        return inner

    # -- what came --------------------------------------------------------------------------------

    def _completed(self, prompt: Prompt, place: int, one: Request) -> Completion | UnsoundError:
        labels = tuple(steering.label for steering in one.acting)
        if not one.sound:
            return unsound(f"prompt {place + 1}", labels, self._lm.dtype)
        end = next((i for i, token in enumerate(one.tokens) if token in self._ends), None)
        tokens = one.tokens[:end]
        text = self._lm.tokenizer.decode(tokens, skip_special_tokens=True)
        gates = self._gates(one, one.prompt + len(tokens) - 1)
        return Completion(prompt, text, tuple(tokens), labels, gates)

    def _gates(self, one: Request, stop: int) -> tuple[Fired, ...]:
        """What the gates of a text's steerings decided of it up to a token."""
        found = dict(one.early)
        for number, place in one.by_token.items():
            found[place] = token_by_token(one.acting[place], number, one.told, one.prompt, stop)
        return tuple(found[place] for place in sorted(found))

    def _next(self, reading: Reading, place: int, one: Request) -> Next:
        if not one.sound:
            labels = [steering.label for steering in one.acting]
            raise unsound(f"text {place + 1}", labels, self._lm.dtype)
        gates = self._gates(one, len(reading.tokens))
        if reading.targets is None or one.last is None:
            return Next(torch.tensor(one.tokens[:1]), torch.zeros(0), gates=gates)
        best = [one.last.likeliest[position] for position in reading.positions]
        log_p = [one.last.log_p[position] for position in reading.positions]
        return Next(torch.tensor(best), torch.tensor(log_p, dtype=torch.float64), gates=gates)


def _asked_text(reading: Reading) -> tuple[int, ...]:
    """The text of a request that answers a reading: with the token after it where that is asked
    about."""
    text = reading.tokens
    if reading.targets is None:
        if reading.positions != (len(text) - 1,):
            raise TrimtabError(
                "vLLM says what comes after a text, or how likely its own tokens are"
            )
        return text
    if reading.positions[-1:] == (len(text) - 1,):
        text = (*text, reading.targets[-1])
    own = tuple(text[position + 1] for position in reading.positions)
    if own != reading.targets:
        raise TrimtabError("vLLM scores the tokens of a text, not others in their place")
    return text
