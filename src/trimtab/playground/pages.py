"""The pages and what they ask for, below /api."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from trimtab.errors import TrimtabError, one_line
from trimtab.playground import curves, inside, looking, making, reports
from trimtab.playground.answers import answers, check_length
from trimtab.playground.bodies import (
    ChatBody,
    ContrastBody,
    CostBody,
    CurveBody,
    LinesBody,
    MakeBody,
    PlaceBody,
    StopBody,
    TextBody,
    UnitBody,
    WrittenBody,
)
from trimtab.playground.guard import Access, Guard, event
from trimtab.playground.job import Job
from trimtab.playground.lines import lines
from trimtab.playground.place import Playground

_LOG = logging.getLogger(__name__)
_STATIC = Path(__file__).parent / "static"


def application(place: Playground, access: Access = Access()) -> FastAPI:
    """The application of one playground."""

    @asynccontextmanager
    async def lifetime(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(place.close)

    app = FastAPI(title="trimtab", lifespan=lifetime, docs_url=None, redoc_url=None,
                  openapi_url=None)  # fmt: skip
    app.add_exception_handler(TrimtabError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _by_http)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Guard, access=access)
    _add_chat(app, place)
    _add_shelf(app, place)
    _add_making(app, place)
    _add_others(app, place)

    @app.get("/")
    async def index() -> Response:
        return FileResponse(_STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=_STATIC))
    return app


def _add_chat(app: FastAPI, place: Playground) -> None:
    lm = place.language_model

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        """The model, and what the pages can do with it."""
        return {
            "model": lm.name,
            "architecture": lm.identity.architecture,
            "layers": lm.anatomy.layers,
            "chats": lm.chats,
            "max_length": lm.max_length,
            "saves": str(place.shelf.saves),
            "runs": None if place.runs is None else str(place.runs),
        }

    @app.post("/api/chat")
    async def chat(body: ChatBody) -> Response:
        """Answer a conversation on one side or both, as events."""
        texts: dict[Any, list[int]] = {}
        for side in ("plain", "steered"):
            messages = getattr(body, side)
            if messages is not None:
                texts[side] = await place.run(place.tokens, messages)
                check_length(lm, texts[side], body.sampling.settings)
        place.wanted(body.steerings)  # what is wrong with them is said before a stream begins
        return StreamingResponse(_answered(place, body, texts), media_type="text/event-stream")

    @app.post("/api/acted")
    async def acted(body: WrittenBody) -> dict[str, Any]:
        """At which tokens of an answer the steerings acted."""
        tokens, stack, names = await _looked_at(place, body)
        found = await place.run(looking.acted, lm, stack, names, tokens, body.new)
        return {"steerings": found}

    @app.post("/api/pushes")
    async def pushes(body: PlaceBody) -> dict[str, Any]:
        """Which sites push one token of an answer."""
        if body.place >= len(body.new):
            raise TrimtabError(f"the answer has {len(body.new)} tokens: there is no {body.place}")
        tokens, stack, names = await _looked_at(place, body)
        return await place.run(looking.pushes, lm, stack, names, tokens, body.new, body.place)

    @app.post("/api/cost")
    async def cost(body: CostBody) -> dict[str, Any]:
        """What plain text costs under steerings."""
        stack = tuple(steering for _, steering in place.wanted(body.steerings))
        return await place.run(curves.cost, lm, stack)

    @app.post("/api/lines")
    async def written_down(body: LinesBody) -> dict[str, str]:
        """The same as lines that can be run."""
        place.wanted(body.steerings)
        return lines(lm, place.shelf, body)


async def _answered(
    place: Playground, body: ChatBody, texts: dict[Any, list[int]]
) -> AsyncIterator[str]:
    """The answers as server-sent events; where the browser leaves, the writing ends."""
    try:
        prompt = texts.get("steered") or texts["plain"]
        stack = await place.run(place.stack, body.steerings, prompt)
        dials = [{"name": one.name, "dial": steering.setting}
                 for one, steering in zip(body.steerings, stack, strict=True)]  # fmt: skip
        yield event({"kind": "dials", "dials": dials})
        written = answers(place.language_model, texts, stack, body.sampling.settings, body.evidence)
        async for told in place.each(written):
            yield event(told)
        yield event({"kind": "done"})
    except TrimtabError as error:
        yield event({"kind": "error", "message": one_line(error)})
    except Exception as error:
        _LOG.exception("an answer failed")
        yield event({"kind": "error", "message": f"it failed ({type(error).__name__})"})


async def _looked_at(place: Playground, body: WrittenBody) -> tuple[list[int], Any, list[str]]:
    tokens = await place.run(place.tokens, body.messages)
    vocabulary = place.language_model.anatomy.config.vocab_size
    if max(body.new) >= vocabulary:
        raise TrimtabError(f"token ids go from 0 to {vocabulary - 1}")
    if len(tokens) + len(body.new) > place.language_model.max_length:
        raise TrimtabError("that is longer than the model takes")
    stack = await place.run(place.stack, body.steerings, tokens)
    return tokens, stack, [one.name for one in body.steerings]


def _add_shelf(app: FastAPI, place: Playground) -> None:
    shelf = place.shelf

    @app.get("/api/library")
    async def library() -> dict[str, Any]:
        """The steerings that are there, files that are none, contrasts that come with trimtab."""
        refused = [{"file": name, "why": why} for name, why in shelf.refused.items()]
        return {"steerings": shelf.listed(), "refused": refused, "builtin": shelf.built_in()}

    @app.get("/api/library/{name}")
    async def card(name: str) -> dict[str, Any]:
        """One of them, with its card."""
        return await asyncio.to_thread(shelf.card, name)

    @app.put("/api/library/{name}")
    async def take(name: str, request: Request) -> dict[str, Any]:
        """Take a steering's file."""
        content = await request.body()
        file = await place.run(shelf.take, name, content)
        return {"name": name, "file": str(file)}

    @app.get("/api/hub")
    async def hub(words: str = "") -> dict[str, Any]:
        """Steerings on the hub; asked for by hand only."""
        return await asyncio.to_thread(shelf.on_hub, words[:200])


def _add_making(app: FastAPI, place: Playground) -> None:
    lm, shelf = place.language_model, place.shelf

    @app.post("/api/contrast")
    async def contrast(body: ContrastBody) -> dict[str, Any]:
        """A contrast to look over; pairs for a wish take a while, and are written as a job."""
        if body.wish is None:
            return await asyncio.to_thread(making.contrast_rows, body)
        wish = body.wish
        job = Job("pairs", wish, {"wish": wish})
        return place.begin(job, lambda say: making.written_rows(lm, wish)).as_json()

    @app.post("/api/make")
    async def make(body: MakeBody) -> dict[str, Any]:
        """Begin to make a steering of pairs."""
        shelf.check_free(body.name)
        making.as_contrast(body.rows, body.source).with_parts()
        job = Job("make", body.name, body.model_dump())
        return place.begin(job, lambda say: making.made(lm, shelf, body, say)).as_json()

    @app.get("/api/job")
    async def job(whole: bool = False) -> dict[str, Any]:
        """The work that goes on, or the last one that did; `whole` with its rows and its result."""
        return {"state": "none"} if place.job is None else place.job.as_json(whole)

    @app.post("/api/job/stop")
    async def stop(body: StopBody) -> dict[str, Any]:
        """Stop it, if it is still the one that is meant."""
        found = place.job
        if found is None or found.name != body.name:
            raise TrimtabError(f"nothing called {body.name} is being made here")
        found.stop()
        return found.as_json()


def _add_others(app: FastAPI, place: Playground) -> None:
    lm, shelf = place.language_model, place.shelf

    @app.post("/api/curve")
    async def curve(body: CurveBody) -> dict[str, Any]:
        """The next token over the dial."""
        asked = shelf.steering(body.name), body.prompt, body.tokens, body.points
        return await place.run(curves.over_the_dial, lm, *asked)

    @app.get("/api/inside/{name}")
    async def within(name: str) -> dict[str, Any]:
        """Where a steering acts."""
        return await asyncio.to_thread(inside.contents, lm, shelf.steering(name))

    @app.post("/api/unit")
    async def unit(body: UnitBody) -> dict[str, Any]:
        """The tokens that a unit, or what a steering adds, stands for."""
        return await place.run(inside.decoded, lm, shelf.steering(body.name), body.site, body.unit)

    @app.post("/api/projections")
    async def projections(body: TextBody) -> dict[str, Any]:
        """A text along a steering's direction."""
        return await place.run(
            inside.projections, lm, shelf.steering(body.name), body.text, body.site
        )

    @app.get("/api/runs")
    async def runs() -> dict[str, Any]:
        """The runs that left a report."""
        return {"runs": await asyncio.to_thread(reports.runs, place.runs)}

    @app.get("/reports/{path:path}")
    async def report(path: str) -> Response:
        """A report, or a picture of one."""
        try:
            file, kind = reports.report_file(place.runs, path)
        except TrimtabError as error:
            raise HTTPException(404, str(error)) from error
        return FileResponse(file, media_type=kind)


# -- mistakes -------------------------------------------------------------------------------------


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": one_line(error)}, 400)


async def _malformed(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, by its place."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return JSONResponse({"error": f"{place}: {first['msg']}"[:500].removeprefix(": ")}, 422)


async def _by_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"it failed ({type(error).__name__})"}, 500)
