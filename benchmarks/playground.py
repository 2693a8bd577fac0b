"""What the playground's chat takes against plain generation, and the first token of both.

The server runs in a thread of this process and is asked over HTTP as a page asks it: both sides of
one prompt, so many greedy tokens, with all evidence and with none. Beside it stands `generate` with
the same two rows in one batch.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from clock import Report, interleaved, ratio

import trimtab as tt
from trimtab.playground import Access, Playground, Shelf, application

MODEL, LAYER = "smollm2-135m-instruct", 12
PROMPT = [{"role": "user", "content": "Tell me about the library of a small town by the sea."}]
NEW = 48
GENERATE, FIRST = "generate", "generate, first token"
OFF, ON = "playground, no evidence", "playground, all evidence"
OFF_FIRST, ON_FIRST = f"{OFF}, first token", f"{ON}, first token"
MOST_OFF, MOST_ON = 1.05, 1.25

Say = Callable[[str], None]


def run(rounds: int, pairs: int | None, say: Say) -> list[Report]:
    lm = tt.load(MODEL, device="cpu", dtype=torch.float32)
    contrast = tt.Contrast.builtin("warmth").part("train").take(24)
    warm = tt.CAA(layer=LAYER, alpha=2.0).fit(lm, contrast)
    with (
        tempfile.TemporaryDirectory() as folder,
        _listening(_application(lm, warm, Path(folder))) as address,
    ):
        client = httpx.Client(base_url=address, timeout=600)

        def generated(new: int) -> None:
            lm.generate([PROMPT, PROMPT], steering=[None, warm], max_new_tokens=new,
                        min_new_tokens=new)  # fmt: skip

        ways: dict[str, Callable[[], Any]] = {
            GENERATE: lambda: generated(NEW),
            OFF: lambda: _asked(client, NEW, evidence=False),
            ON: lambda: _asked(client, NEW, evidence=True),
            FIRST: lambda: generated(1),
            OFF_FIRST: lambda: _asked(client, 1, evidence=False),
            ON_FIRST: lambda: _asked(client, 1, evidence=True),
        }
        for way in ways.values():
            way()
        say(f"playground: {rounds} rounds")
        times = interleaved(ways, rounds)
    shown = [
        ratio(f"{OFF} / {GENERATE}", times[OFF], times[GENERATE], at_most=MOST_OFF, of_median=True),
        ratio(f"{ON} / {GENERATE}", times[ON], times[GENERATE], at_most=MOST_ON, of_median=True),
        ratio(f"{OFF_FIRST} / {FIRST}", times[OFF_FIRST], times[FIRST], of_median=True),
        ratio(f"{ON_FIRST} / {FIRST}", times[ON_FIRST], times[FIRST], of_median=True),
    ]
    return [Report(f"playground: {MODEL}", NEW, times, shown, {"unit": "tokens"})]


def _application(lm: tt.LanguageModel, warm: tt.Steering, folder: Path) -> Any:
    shelf = Shelf(lm, folder)
    shelf.keep("warm", warm)
    return application(Playground(lm, shelf, None), Access())


def _asked(client: httpx.Client, new: int, *, evidence: bool) -> None:
    body = {
        "plain": PROMPT,
        "steered": PROMPT,
        "steerings": [{"name": "warm"}],
        "sampling": {"max_tokens": new},
        "evidence": evidence,
    }
    said = client.post("/api/chat", json=body)
    said.raise_for_status()
    ends = [line for line in said.text.splitlines() if '"ended"' in line]
    assert len(ends) == 2, said.text[-500:]
    for line in ends:
        assert json.loads(line.removeprefix("data: "))["kind"] == "ended"


@contextmanager
def _listening(app: Any) -> Iterator[str]:
    """The address of an application that runs in a thread for the block."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    (first, *_) = server.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{first.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
