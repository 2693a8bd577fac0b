"""Stands in for vLLM where requests go in and answers come out: the hooks and plans that trimtab
puts into an engine, on the model of transformers, one request after the other.

What is checked with it is everything but vLLM: what is asked, for how many tokens, under what, and
what is made of the answers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import trimtab as tt
from trimtab.engines import Ask, Heard, Place, steps_of
from trimtab.engines.acting import Reading
from trimtab.engines.asking import reading_by, wanted_by
from trimtab.engines.at_work import AT_WORK, Rows
from trimtab.engines.modules import install
from trimtab.engines.plugin import trimtab_read
from trimtab.model import are_sound
from trimtab.serving import batch


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`tt.VLLM` runs the engine below; all that were opened are closed in the end."""
    monkeypatch.setattr(batch, "InProcess", StandIn)
    monkeypatch.setattr(batch, "untested", str)
    monkeypatch.setattr("trimtab.engines.untested", str)
    StandIn.opened.clear()
    yield
    assert all(one.closed for one in StandIn.opened)


class StandIn:
    """As `engines.InProcess`; `most` requests are under way at once."""

    most = 4
    #: Every one that was opened.
    opened: ClassVar[list[StandIn]] = []

    def __init__(
        self,
        model: str,
        dtype: str,
        places: dict[str, Place],
        ends: Collection[int],
        arguments: Mapping[str, Any],
    ) -> None:
        self.model = tt.load(Path(model), device="cpu", dtype=dtype).model
        self.ends, self.words = set(ends), self.model.config.vocab_size
        self.longest = arguments.get("max_model_len", 512)
        self.sites = sorted(places)
        AT_WORK.at(self.sites)
        install(self.model, places, self.sites)
        self.waiting: dict[str, tuple[Ask, list[int]]] = {}
        self.asked: list[Ask] = []
        self.left: list[str] = []
        self.loads: list[str] = []
        self.closed = False
        StandIn.opened.append(self)

    def load(self, digest: str, content: bytes) -> None:
        file = Path(f"{digest}.safetensors")
        file.write_bytes(content)
        AT_WORK.load(digest, steps_of(tt.Steering.load(file)))
        file.unlink()
        self.loads.append(digest)

    def unload(self, digest: str) -> None:
        AT_WORK.unload(digest)

    def seen(self, name: str, tokens: Sequence[int]) -> list[bytes]:
        AT_WORK.end()
        AT_WORK.seen = {}
        self.model(torch.tensor([list(tokens)]), use_cache=False)
        seen, AT_WORK.seen = AT_WORK.seen, None
        return [save({self.sites[site]: x.contiguous() for site, x in seen.items()})]

    def add(self, name: str, ask: Ask) -> None:
        assert name not in self.waiting
        self.waiting[name] = ask, []
        self.asked.append(ask)

    def leave(self, name: str) -> None:
        del self.waiting[name]
        self.left.append(name)

    def told(self, name: str) -> list[dict[str, Tensor]]:
        return [load(trimtab_read(self, name))]

    def _run(self, params: Any, ids: list[int], prompt: int) -> Tensor:
        """Logits of a text, which is read in pieces, each time from its beginning on."""
        wanted, of = wanted_by(params), reading_by(params)
        reading = None if of is None else AT_WORK.readings.setdefault(of.name, Reading(of))
        stops = [len(ids)] if of is None else [*range(3, len(ids), 3), len(ids)]
        for stop in stops:
            AT_WORK.begin([Rows(wanted, ids, prompt, 0, 0, stop, reading)])
            logits = self.model(torch.tensor([ids[:stop]]), use_cache=False).logits[0].float()
        AT_WORK.end()
        return logits

    def close(self) -> None:
        AT_WORK.at([])
        self.closed = True

    @torch.inference_mode()
    def step(self) -> list[Heard]:
        return [self._one(name) for name in list(self.waiting)[: self.most]]

    def _one(self, name: str) -> Heard:
        ask, new = self.waiting[name]
        ids = [*ask.tokens, *new]
        # As it travels.
        params = type("Params", (), {"extra_args": ask.extra_args})
        logits = self._run(params, ids, len(ask.tokens))
        if len(new) < ask.fewest:
            logits[-1, list(self.ends)] = -float("inf")
        token = int(logits[-1].argmax())
        new.append(token)
        over = token in self.ends or len(new) == ask.new
        if over:
            del self.waiting[name]
        sound = [bool(are_sound(logits[-1]))]
        log_p: list[float] = []
        likeliest: list[int] = []
        if ask.scored:
            every = logits[:-1].log_softmax(-1)
            log_p = every.gather(-1, torch.tensor(ask.tokens[1:])[:, None])[:, 0].tolist()
            likeliest = every.argmax(-1).tolist()
            sound += are_sound(logits[:-1]).tolist()
        told = (token,) if ask.told else tuple(new) if over else ()
        return Heard(name, told, tuple(sound), over, tuple(log_p), tuple(likeliest))
