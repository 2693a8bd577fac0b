"""The playground's Make: pairs to look over, and the one piece of long work behind the pages, which
goes on when nobody looks, can be stopped, and is there for a page that is opened again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from fastapi.testclient import TestClient
from matplotlib.figure import Figure

import trimtab as tt
from helpers import language_model
from trimtab.playground import Access, Playground, Shelf, application
from trimtab.playground.bodies import Row
from trimtab.playground.making import as_contrast
from trimtab.terminal import progress
from trimtab.wishes import Made, asking
from trimtab.wishes.portfolio import Arm

PLACES = ("ship", "map", "king", "sea", "house", "bird", "tree", "road", "book", "song", "lamp")
ROWS = [
    {"prompt": f"Row {n} is", "positive": f"good {n}", "negative": f"bad {n}"} for n in range(24)
]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture
def place(lm: tt.LanguageModel, tmp_path: Path) -> Playground:
    return Playground(lm, Shelf(lm, tmp_path / "saved"))


@pytest.fixture
def client(place: Playground) -> Iterator[TestClient]:
    with TestClient(application(place, Access()), base_url="http://127.0.0.1") as opened:
        yield opened


def job(client: TestClient, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The work when it is so far."""
    for _ in range(6000):
        found: dict[str, Any] = client.get("/api/job?whole=true").json()
        if until(found):
            return found
        time.sleep(0.01)
    raise AssertionError(found)


def over(found: dict[str, Any]) -> bool:
    return found["state"] in ("done", "failed", "stopped")


class Slow:
    """Stands for `make`: says a line, then waits at each of its steps."""

    def __init__(self) -> None:
        self.go = Event()
        self.asked: list[dict[str, Any]] = []

    def __call__(self, lm: Any, *, contrast: tt.Contrast, say: Any, **more: Any) -> Made:
        self.asked.append({"contrast": contrast, **more})
        say("fitting 1 setting")
        with progress("waiting", 1000) as advance:
            for _ in range(1000):
                if self.go.wait(0.01):
                    break
                advance(1)
        return Made("", contrast, {"name": "tiny"}, 0.1, 1.0, why=("nothing gains",))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    stand_in = Slow()
    monkeypatch.setattr("trimtab.playground.making.make", stand_in)
    return stand_in


def test_work_goes_on_and_is_there_for_who_asks_again(client: TestClient, slow: Slow) -> None:
    assert client.get("/api/job").json() == {"state": "none"}
    body = {"rows": ROWS, "name": "good", "source": "mine", "behaviour": "say good", "minutes": 3}
    begun = client.post("/api/make", json=body).json()
    assert (begun["kind"], begun["name"]) == ("make", "good")
    seen = job(client, lambda found: bool(found["progress"]))
    assert seen["state"] == "running"
    assert seen["said"] == ["fitting 1 setting"]
    assert (seen["progress"]["what"], seen["progress"]["total"]) == ("waiting", 1000)
    assert [row["positive"] for row in seen["asked"]["rows"]] == [r["positive"] for r in ROWS]
    assert "rows" not in str(client.get("/api/job").json())  # what is asked for often is short
    # One at a time, and what is meant to be stopped is what goes on.
    again = client.post("/api/make", json={**body, "name": "other"})
    assert again.status_code == 400
    assert "good is still being made" in again.json()["error"]
    assert client.post("/api/job/stop", json={"name": "other"}).status_code == 400
    slow.go.set()
    done = job(client, over)
    assert done["state"] == "done"
    assert (done["result"]["file"], done["result"]["made"]["chosen"]) == (None, None)
    assert "nothing gains" in done["result"]["notes"]
    (asked,) = slow.asked
    assert asked["contrast"].behaviour == "say good"
    assert (asked["making"].minutes, asked["making"].max_cost) == (3, 0.1)
    assert asked["keep"].output.name == "good"


def test_work_is_stopped_and_may_begin_anew(client: TestClient, slow: Slow) -> None:
    body = {"rows": ROWS, "name": "good"}
    client.post("/api/make", json=body)
    job(client, lambda found: bool(found["progress"]))
    assert client.post("/api/job/stop", json={"name": "good"}).json()["state"] == "stopping"
    assert job(client, over)["state"] == "stopped"
    slow.go.set()
    assert client.post("/api/make", json=body).status_code == 200
    assert job(client, over)["state"] == "done"


def test_closing_ends_it(place: Playground, slow: Slow) -> None:
    with TestClient(application(place, Access()), base_url="http://127.0.0.1") as opened:
        opened.post("/api/make", json={"rows": ROWS, "name": "good"})
        job(opened, lambda found: bool(found["progress"]))
    assert place.job is not None
    assert place.job.state == "stopped"


def test_what_fails_is_said_in_one_line(client: TestClient) -> None:
    few = {"rows": ROWS[:2], "name": "few"}
    client.post("/api/make", json=few)
    found = job(client, over)
    assert found["state"] == "failed"
    assert "too few" in found["error"]
    for name in ("..", "a b"):
        assert client.post("/api/make", json={"rows": ROWS, "name": name}).status_code == 400
    for more in ({"minutes": 0}, {"max_cost": -1}, {"rows": []}):
        body = {"rows": ROWS, "name": "x", **more}
        assert client.post("/api/make", json=body).status_code == 422


def test_pairs_become_a_steering_with_gain_and_cost(
    place: Playground, client: TestClient, lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [Arm(tt.CAA(layer=2)), Arm(tt.ITI(k=2))]
    monkeypatch.setattr("trimtab.wishes.making.portfolio", lambda *_: arms)
    monkeypatch.setattr(asking, "PROMPTS", 2)
    monkeypatch.setattr(asking, "NEW_TOKENS", 4)
    monkeypatch.setattr("trimtab.evaluation.per_token.PROMPTS", 2)
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **options: target.write(b""))
    pairs = [(f"The {one} near the {other} is", " good and kind.", " bad and cruel.")
             for one in PLACES[:6] for other in PLACES[6:]]  # fmt: skip
    contrast = tt.Contrast.from_pairs(pairs, "pairs").split(0.3, 0.3)
    rows = [
        {"prompt": p.prompt, "positive": p.positive, "negative": p.negative, "part": p.part}
        for p in contrast.pairs
    ]
    assert client.post("/api/make", json={"rows": rows, "name": "good"}).status_code == 200
    done = job(client, over)
    assert (done["error"], done["result"]["made"]["why"]) == ("", [])
    made = done["result"]["made"]["chosen"]
    saved = tt.Steering.load(done["result"]["file"])
    test = contrast.part("test")
    gain = tt.log_odds(lm, test, saved.at(made["dial"])) - tt.log_odds(lm, test)
    assert made["gain"] == pytest.approx(float(gain.mean()), rel=1e-4)
    assert made["n"] == len(test)
    assert place.shelf.steering("good").digest == saved.digest
    assert (place.shelf.saves / "good" / "report.html").is_file()
    taken = client.post("/api/make", json={"rows": rows, "name": "good"})
    assert "another name" in taken.json()["error"]


# -- pairs ----------------------------------------------------------------------------------------


def test_pasted_pairs_fill_the_table(client: TestClient) -> None:
    text = "\n".join(f"Row {n} is\t good {n}\t bad {n}" for n in range(24))
    found = client.post("/api/contrast", json={"pasted": text}).json()
    assert found["rows"][3] == {
        "prompt": "Row 3 is", "chat": False, "positive": "good 3", "negative": "bad 3",
        "part": None,
    }  # fmt: skip


def test_every_builtin_contrast_fills_the_table(client: TestClient) -> None:
    for name in ("formality", "refusal"):
        own = tt.Contrast.builtin(name)
        found = client.post("/api/contrast", json={"builtin": name}).json()
        assert (len(found["rows"]), found["behaviour"]) == (len(own), own.behaviour)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"pasted": "one column"}, "line 1"),
        ({"pasted": '{"prompt": "a"}'}, "line 1"),
        ({"builtin": "nothing"}, "no builtin contrast"),
    ],
)
def test_what_is_no_contrast_is_refused(
    client: TestClient, body: dict[str, Any], said: str
) -> None:
    answer = client.post("/api/contrast", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_what_a_model_writes_for_a_wish_stays_a_conversation(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = [{"role": "user", "content": "Why?"}]
    wishes = []

    def written(lm: tt.LanguageModel, wish: str, **more: Any) -> tt.Contrast:
        wishes.append(wish)
        return tt.Contrast.from_pairs([(chat, "Yes.", "No.")] * 2, f"persona:{wish}")

    monkeypatch.setattr("trimtab.playground.making.persona_contrast", written)
    assert client.post("/api/contrast", json={"wish": "says yes"}).json()["kind"] == "pairs"
    done = job(client, over)["result"]
    assert (wishes, done["name"]) == (["says yes"], "persona:says yes")
    assert done["rows"][0] == {
        "prompt": "Why?", "chat": True, "positive": "Yes.", "negative": "No.", "part": None,
    }  # fmt: skip
    contrast = as_contrast([Row(**row) for row in done["rows"]], "again")
    assert contrast.pairs[0].prompt == (("user", "Why?"),)
