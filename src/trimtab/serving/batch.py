"""vLLM as what runs a model over many texts at once, each under steerings of its own.

The model of transformers stays what it is: it says where its sites are, makes texts of prompts, and
is what the engine is compared with when it starts. Work of several kinds may be under way at the
same time; whoever waits takes the next step for all.
"""

from __future__ import annotations

import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
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
    Heard,
    InProcess,
    Read,
    ReadingOf,
    Wanted,
    content_of,
    sites_of,
    untested,
    wanted_of,
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
    fired_by,
    per_text,
    row_steerings,
    sampling,
    stop_pattern,
    stops_in,
    unsound,
)
from trimtab.reading import Next, PlannedBatch, Reading, Stretch, refuse_idle
from trimtab.serving.deciding import (
    Decision,
    check_scopes,
    decided,
    early_of,
    read_of,
    scores_of,
    token_by_token,
)
from trimtab.serving.inside import Carried
from trimtab.serving.placing import acts_of
from trimtab.serving.proving import joined, last_activations, of_ranks, probe, refuse_others
from trimtab.steering import Gate, Steering

#: Steerings that workers hold at once, and requests that the engine has at once.
_HELD, _AT_ONCE = 512, 1024
#: How many steerings are kept in the form in which requests ask for them.
_KNOWN = 4096
#: What says how tokens are chosen, and vLLM has by the same name.
_CHOOSING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OPTIONS = ("max_new_tokens", "min_new_tokens", "stop", "seed", *_CHOOSING)

Acting = tuple[Steering, ...]


@dataclass(eq=False)
class _Work:
    """Requests of one kind: how many are not over, and those that are, by their place."""

    left: int = 0
    over: deque[tuple[int, _Request]] = field(default_factory=deque)


@dataclass(eq=False)
class _Request:
    """One text that is under way, and what came of it."""

    work: _Work
    place: int
    ask: Ask
    acting: Acting
    #: How many of its tokens are prompt to steerings.
    prompt: int
    pattern: Any = None
    #: What gates that go by the prompt decide, by the place of their steering, and did.
    decisions: dict[int, Decision] = field(default_factory=dict)
    early: dict[int, Fired] = field(default_factory=dict)
    #: What the workers steer with, and of what gates decide token by token the place in `acting`,
    #: by that place.
    sent: Acting = ()
    by_token: dict[int, int] = field(default_factory=dict)
    #: What it finds out for others, where it is no text of anybody's.
    finds: Decision | None = None
    tokens: list[int] = field(default_factory=list)
    sound: bool = True
    last: Heard | None = None
    #: What each rank has read of it.
    told: list[dict[str, Tensor]] = field(default_factory=list)


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
        )
        self._sites = {site for kind in hooks for site in language_model.anatomy.sites(kind)}
        self._inner: InProcess | None = None
        self._broken = False
        self._open = ExitStack()
        self._ends = end_tokens(language_model.model.generation_config.eos_token_id)
        self._waiting: deque[_Request] = deque()
        #: Requests whose gates have not decided, passes that they wait for, and what came of these,
        #: by gate and prompt.
        self._undecided: list[_Request] = []
        self._asides = _Work()
        self._decisions: dict[tuple[int, tuple[int, ...]], Decision] = {}
        self._free: dict[int, tuple[Steering, Steering]] = {}
        self._under_way: dict[str, _Request] = {}
        #: Steerings that the workers hold, by digest, and how many requests run with each.
        self._held: dict[str, int] = {}
        #: Steerings in the form in which requests ask for them, and those that can be asked for.
        self._known: dict[int, tuple[Steering, Wanted]] = {}
        self._prepared: dict[int, Steering] = {}
        self._count = 0
        #: Tokens that ran through the model.
        self.read = 0
        self.prepare(steerings, force=force)

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
            if self._inner is None:
                self._sites |= sites
            if len(self._prepared) < _KNOWN:
                self._prepared[id(steering)] = steering

    @property
    def longest(self) -> int:
        """The longest text, with what is written after it, in tokens."""
        if self._inner is not None:
            return min(self._lm.max_length, self._inner.longest)
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
        work = _Work()
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
            self._ask(_Request(work, place, asked, acting[place], len(tokens), pattern))
        for some in self._results(work, in_turns):
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
        work = _Work()
        for place, reading in enumerate(readings):
            if missing is None or missing(place):
                asked = Ask(_asked_text(reading), scored=reading.targets is not None)
                self._ask(_Request(work, place, asked, acting[place], reading.prompt))
        for some in self._results(work, in_turns):
            batch = PlannedBatch(0, tuple(place for place, _ in some))
            yield batch, [self._next(readings[place], place, one) for place, one in some]

    def prepare_sites(self, sites: Sequence[str]) -> None:
        """Be able to read activations there: refuses sites that vLLM has no place for, and those
        that it was not started with."""
        places(self._lm.anatomy, sites)
        strange = [site for site in sites if site not in self._sites]
        if self._inner is None:
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
        work = _Work()
        for place, (tokens, wanted) in enumerate(texts):
            reads = tuple(
                Read(one.site, tokens=(one.first, one.stop), whole=one.whole) for one in wanted
            )
            asked = Ask(tuple(tokens), reading=ReadingOf(uuid.uuid4().hex, reads))
            self._ask(_Request(work, place, asked, (), len(tokens)))
        for some in self._results(work, in_turns=False):
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
        inner, self._inner, self._broken = self._inner, None, True
        self._waiting.clear()
        self._undecided.clear()
        self._under_way.clear()
        try:
            if inner is not None:
                inner.close()
        finally:
            self._open.close()

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

    def _choosing(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """How tokens are chosen, in vLLM's words; nothing where the likeliest are."""
        given = {name: options[name] for name in _CHOOSING if options.get(name) is not None}
        asked = sampling(given, self._lm.anatomy.config.vocab_size)
        asked.pop("do_sample")
        return {name: asked[name] for name in given if name in asked}

    def _wanted(self, acting: Acting) -> tuple[Wanted, ...]:
        """How steerings are asked for."""
        found = []
        for steering in acting:
            if id(steering) not in self._known:
                if len(self._known) >= _KNOWN:
                    del self._known[next(iter(self._known))]
                wanted = wanted_of(steering, partial(acts_of, self._lm))
                self._known[id(steering)] = steering, wanted
            found.append(self._known[id(steering)][1])
        return tuple(found)

    def _ask(self, request: _Request) -> None:
        """Have a text wait for its turn; refuses one that is too long, that has no turns of a chat
        where a scope asks for some, or whose gates see what they should not."""
        whole = len(request.ask.tokens) + request.ask.new
        if whole > self.longest:
            raise TrimtabError(
                f"a text of {len(request.ask.tokens)} tokens and {request.ask.new} new ones do not "
                f"go into the {self.longest} that vLLM takes: say max_model_len"
            )
        for steering in request.acting:
            check_scopes(self._lm, steering.scopes, request.ask.tokens)
        prompt = request.ask.tokens[: request.prompt]
        request.decisions = {
            place: self._decision(gate, prompt) for place, gate in early_of(request.acting).items()
        }
        request.work.left += 1
        if request.decisions:
            self._undecided.append(request)
        else:
            self._settle(request)

    def _decision(self, gate: Gate, prompt: tuple[int, ...]) -> Decision:
        """What a gate decides of a prompt, from a pass that is not steered; one for all who ask."""
        key = id(gate), prompt
        if key in self._decisions:
            return self._decisions[key]
        if len(self._decisions) >= _KNOWN:
            known = [k for k, one in self._decisions.items() if one.scores is not None]
            for each in known:
                del self._decisions[each]
        found = self._decisions[key] = Decision(gate)
        reads = tuple(read_of(self._lm, each, prompt) for each in gate.conditions)
        salt = uuid.uuid4().hex  # what comes out of a cache passes no site
        asked = Ask(prompt, reading=ReadingOf(uuid.uuid4().hex, reads), salt=salt)
        self._asides.left += 1
        self._waiting.append(_Request(self._asides, 0, asked, (), len(prompt), finds=found))
        return found

    def _settle(self, request: _Request) -> None:
        """Have a request wait for its turn whose gates that go by the prompt have decided."""
        acting = request.acting
        for place, decision in request.decisions.items():
            assert decision.scores is not None
            request.early[place] = fired_by(acting[place], decision.scores)
        places = [
            place
            for place in range(len(acting))
            if place not in request.early or request.early[place].fired
        ]
        request.sent = tuple(self._without(acting[place]) for place in places)
        request.by_token = {
            number: place
            for number, place in enumerate(places)
            if request.sent[number].gate is not None
        }
        wanted = self._wanted(request.sent)
        if request.prompt != len(request.ask.tokens):  # else it shares blocks with texts that go on
            wanted = tuple(replace(one, prompt=request.prompt) for one in wanted)
        request.ask = replace(request.ask, wanted=wanted)
        if request.by_token:  # what is read again is not known to gates
            reading = ReadingOf(uuid.uuid4().hex, written=True)
            request.ask = replace(request.ask, reading=reading, salt=uuid.uuid4().hex)
        self._waiting.append(request)

    def _without(self, steering: Steering) -> Steering:
        """A steering as the workers hold it; the same one for all who have it."""
        if decided(steering) is steering:
            return steering
        if id(steering) not in self._free:
            if len(self._free) >= _KNOWN:
                del self._free[next(iter(self._free))]
            self._free[id(steering)] = steering, decided(steering)
        return self._free[id(steering)][1]

    # -- while it runs ----------------------------------------------------------------------------

    def _results(self, work: _Work, in_turns: bool) -> Iterator[list[tuple[int, _Request]]]:
        """Requests that are over, as they come."""
        if in_turns and work.left:
            yield []  # all who take turns have asked before the first step
        try:
            while work.left or work.over:
                if not work.over:
                    self._step()
                found = [work.over.popleft() for _ in range(len(work.over))]
                if found or in_turns:
                    yield found
        finally:
            self._leave(work)

    def _leave(self, work: _Work) -> None:
        """Nobody waits for the rest of some work."""
        if not work.left:
            return
        self._waiting = deque(one for one in self._waiting if one.work is not work)
        self._undecided = [one for one in self._undecided if one.work is not work]
        for name, one in list(self._under_way.items()):
            if one.work is work:
                self._over(name)
                if self._inner is not None and not self._broken:
                    self._inner.leave(name)
                    if one.ask.reading is not None:  # which is forgotten with it
                        self._inner.told(one.ask.reading.name)

    def _step(self) -> None:
        """One pass, for all work that is under way."""
        if self._broken:
            raise TrimtabError("the engine was ended or interrupted: open another")
        inner = self._started()
        try:
            self._feed(inner)
            for heard in inner.step():
                self._hear(inner, heard)
        except BaseException:
            self._broken = True  # what it was at, nobody knows
            raise

    def _feed(self, inner: InProcess) -> None:
        """Hand over requests that wait, as far as their steerings find room."""
        if self._undecided:
            asked, self._undecided = self._undecided, []
            for each in asked:
                if all(decision.scores is not None for decision in each.decisions.values()):
                    self._settle(each)
                else:
                    self._undecided.append(each)
        while self._waiting and len(self._under_way) < _AT_ONCE:
            request = self._waiting[0]
            own = {
                wanted.digest: one
                for wanted, one in zip(request.ask.wanted, request.sent, strict=True)
            }
            if not all(self._hold(inner, digest, own) for digest in own):
                return
            self._waiting.popleft()
            for one in request.ask.wanted:
                self._held[one.digest] += 1
            self._count += 1
            name = str(self._count)
            self._under_way[name] = request
            inner.add(name, request.ask)

    def _hold(self, inner: InProcess, digest: str, own: Mapping[str, Steering]) -> bool:
        """Have the workers hold a steering, one of those of a request; whether they do."""
        if digest in self._held:
            return True
        if len(self._held) >= _HELD:
            idle = [each for each, running in self._held.items() if not running and each not in own]
            if not idle:
                return False
            del self._held[idle[0]]
            inner.unload(idle[0])
        inner.load(digest, content_of(own[digest]))
        self._held[digest] = 0
        return True

    def _hear(self, inner: InProcess, heard: Heard) -> None:
        request = self._under_way.get(heard.name)
        if request is None:  # one that was left
            return
        request.last = heard
        request.sound = request.sound and all(heard.sound)
        over = heard.over
        for token in heard.tokens:
            request.tokens.append(token)
            # As in transformers, where the end of a text counts as text.
            if request.pattern is not None and stops_in(
                request.pattern, self._lm.tokenizer.decode(request.tokens)
            ):
                if not over:
                    inner.leave(heard.name)
                over = True
                break
        if over:
            self._over(heard.name)
            if request.ask.reading is not None:
                request.told = inner.told(request.ask.reading.name)
            if request.finds is None:
                request.work.over.append((request.place, request))
            else:
                request.finds.scores = scores_of(request.finds.gate, request.told)

    def _over(self, name: str) -> None:
        request = self._under_way.pop(name)
        request.work.left -= 1
        for one in request.ask.wanted:
            self._held[one.digest] -= 1
        cached = 0 if request.last is None else request.last.cached
        # The last token that was written ran through nothing.
        self.read += len(request.ask.tokens) - cached + max(0, len(request.tokens) - 1)

    def _started(self) -> InProcess:
        """The engine, which is seen to have the model's activations at each site when it starts."""
        if self._inner is not None:
            return self._inner
        lm, sites = self._lm, sorted(self._sites)
        self._carried.sites = sites
        source = self._model
        if source is None:
            folder = self._open.enter_context(tempfile.TemporaryDirectory())
            source = lm.save_pretrained(Path(folder) / "model")
        expected = last_activations(lm, sites)
        dtype = str(lm.dtype).removeprefix("torch.")
        where = places(lm.anatomy, sites)
        self._inner = InProcess(str(source), dtype, where, self._ends, self._arguments)
        if sites:
            seen = self._inner.seen(uuid.uuid4().hex, probe(lm))
            refuse_others(expected, joined(seen), lm.dtype)
        return self._inner

    # -- what came --------------------------------------------------------------------------------

    def _completed(self, prompt: Prompt, place: int, one: _Request) -> Completion | UnsoundError:
        labels = tuple(steering.label for steering in one.acting)
        if not one.sound:
            return unsound(f"prompt {place + 1}", labels, self._lm.dtype)
        end = next((i for i, token in enumerate(one.tokens) if token in self._ends), None)
        tokens = one.tokens[:end]
        text = self._lm.tokenizer.decode(tokens, skip_special_tokens=True)
        gates = self._gates(one, one.prompt + len(tokens) - 1)
        return Completion(prompt, text, tuple(tokens), labels, gates)

    def _gates(self, one: _Request, stop: int) -> tuple[Fired, ...]:
        """What the gates of a text's steerings decided of it up to a token."""
        found = dict(one.early)
        for number, place in one.by_token.items():
            found[place] = token_by_token(one.acting[place], number, one.told, one.prompt, stop)
        return tuple(found[place] for place in sorted(found))

    def _next(self, reading: Reading, place: int, one: _Request) -> Next:
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
