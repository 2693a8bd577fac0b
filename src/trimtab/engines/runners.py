"""What vLLM's model runners are about to compute: before each pass, which rows are whose.

There are two runners. The older one keeps requests by name and hands its inputs to one method; the
newer one has a state of the model, which is told of requests that come and go and is asked for
inputs before each pass. Both order the rows of a batch themselves, so that only here it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor

from trimtab.engines.asking import Wanted, reading_by, wanted_by
from trimtab.engines.at_work import AtWork, Reading, Rows


@dataclass
class _Text:
    """A request that is under way: what is wanted of it, the ids of its prompt and of what was
    written, as far as any scope reads them, and what is read of it."""

    wanted: tuple[Wanted, ...]
    ids: list[int]
    prompt: int
    reading: Reading | None = None

    @property
    def reads(self) -> bool:
        return any(one.reads for one in self.wanted)


@dataclass
class Watching:
    """The requests of one runner, by name."""

    at_work: AtWork
    texts: dict[str, _Text] = field(default_factory=dict)

    def add(self, name: str, params: Any, ids: Sequence[int] | None, prompt: int) -> None:
        """A request comes."""
        wanted, of = wanted_by(params), reading_by(params)
        if not wanted and of is None:
            return
        reading = None
        if of is not None:  # one that comes again, after its blocks were given away, goes on
            reading = self.at_work.readings.setdefault(of.name, Reading(of))
        by_scope = of is not None and any(one.acts is not None for one in of.reads)
        reads = by_scope or any(one.reads for one in wanted)
        self.texts[name] = _Text(wanted, list(ids or ()) if reads else [], prompt, reading)

    def begin(
        self, names: Sequence[str], starts: Any, positions: Any, input_ids: Tensor | None
    ) -> None:
        """A pass begins: requests by row, the first row of each (and the end), which of its tokens
        is its first one here, and the ids of all tokens."""
        steered = [(row, self.texts[name]) for row, name in enumerate(names) if name in self.texts]
        ids = None
        if input_ids is not None and any(text.reads for _, text in steered):
            ids = input_ids.tolist()
        requests = []
        for row, text in steered:
            first, stop, position = int(starts[row]), int(starts[row + 1]), int(positions[row])
            if text.reads and ids is not None:
                # The newest token may be known to the device alone until now.
                text.ids[position : position + stop - first] = ids[first:stop]
            row_of = Rows(text.wanted, text.ids, text.prompt, position, first, stop, text.reading)
            requests.append(row_of)
        device = "cpu" if input_ids is None else input_ids.device
        self.at_work.begin(requests, device, int(starts[len(names)]))


def watch(runner: Any, at_work: AtWork) -> None:
    """Have a runner say what it is about to compute."""
    if hasattr(runner, "model_state"):
        _watch_state(runner.model_state, Watching(at_work))
    else:
        _watch_forward(runner, Watching(at_work))


def _watch_forward(runner: Any, watching: Watching) -> None:
    original = runner._model_forward

    @wraps(original)
    def forward(input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        batch, requests = runner.input_batch, runner.requests
        for name in [name for name in watching.texts if name not in requests]:
            del watching.texts[name]
        for name in batch.req_ids:
            state = requests[name]
            known = watching.texts.get(name)
            params = state.sampling_params
            if known is None and params is not None:
                watching.add(name, params, state.prompt_token_ids, state.num_prompt_tokens)
        ids = runner.input_ids.gpu if input_ids is None else input_ids
        computed = batch.num_computed_tokens_cpu
        watching.begin(batch.req_ids, runner.query_start_loc.np, computed, ids)
        try:
            return original(input_ids, *args, **kwargs)
        finally:
            watching.at_work.end()  # passes that nobody asked for go another way

    runner._model_forward = forward


def _watch_state(state: Any, watching: Watching) -> None:
    add, remove = state.add_request, state.remove_request
    prepare, prepare_dummy = state.prepare_inputs, state.prepare_dummy_inputs

    @wraps(add)
    def add_request(index: int, new: Any) -> Any:
        # What was written is read again after its blocks were given to others.
        ids = new.prefill_token_ids or new.prompt_token_ids
        watching.add(new.req_id, new.sampling_params, ids, new.prompt_len)
        return add(index, new)

    @wraps(remove)
    def remove_request(name: str) -> Any:
        watching.texts.pop(name, None)
        return remove(name)

    @wraps(prepare)
    def prepare_inputs(batch: Any, states: Any) -> Any:
        computed = batch.num_computed_tokens_np
        watching.begin(batch.req_ids, batch.query_start_loc_np, computed, batch.input_ids)
        return prepare(batch, states)

    @wraps(prepare_dummy)
    def prepare_dummy_inputs(*args: Any, **kwargs: Any) -> Any:
        watching.at_work.end()
        return prepare_dummy(*args, **kwargs)

    state.add_request, state.remove_request = add_request, remove_request
    state.prepare_inputs, state.prepare_dummy_inputs = prepare_inputs, prepare_dummy_inputs
