"""Whatever a client sends, by our own description of the API and off it: no 500, and the server
answers the next request."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from helpers import language_model, steer_at
from trimtab.serving import Access, Desk, Engine, Library, Limits, application

#: Keys that cases are sent with, so that they get past the guard.
_KEYS = {"Authorization": "Bearer changes"}


@pytest.fixture(scope="module")
def schema() -> Any:
    lm = language_model("llama")
    library = Library(lm)
    with tempfile.TemporaryDirectory() as room:
        library.read(str(steer_at(lm, "resid", seed=2).save(f"{room}/joy.safetensors")))
    app = application(
        Desk(lm, "base", library, Engine(lm, Limits(rows=8)), 20.0), Access("ask", "changes", None)
    )
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=_KEYS)


def _checked(case: Any) -> None:
    """No 500; what is refused says why in one line."""
    answer = case.call(headers=_KEYS)
    assert answer.status_code < 500, (answer.status_code, case.method, case.path, case.body)
    if answer.status_code >= 400:
        told = answer.json()["error"]["message"]
        assert told
        assert "\n" not in told


@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_no_body_breaks_it(schema: Any, examples: int) -> None:
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        seen.add(operation.path)
        checked = settings(
            max_examples=examples, deadline=None, derandomize=True, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )(given(operation.as_strategy())(_checked))  # fmt: skip
        checked()
    assert seen > {"/v1/chat/completions", "/v1/completions", "/v1/steerings/{name}"}
    (answer,) = [
        found.ok().Case().call()
        for found in schema.get_all_operations()
        if found.ok().path == "/health"
    ]
    assert answer.json() == {"status": "ok"}
