"""The playground's API: what it says is what the library says, and nobody asks who may not."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

import trimtab as tt
from helpers import language_model, steer_at
from trimtab.playground import Access, Playground, Shelf, application
from trimtab.reading import plain_texts

ASK = [{"role": "user", "content": "Today I feel"}]
NEW = 10


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    return {
        "joy": steer_at(lm, "resid", seed=2),
        "calm": steer_at(lm, "heads", "Scale", seed=3),
        "late": steer_at(lm, "resid", seed=5).scoped("generated[1:4]"),
    }


@pytest.fixture(scope="module")
def place(
    lm: tt.LanguageModel,
    steerings: dict[str, tt.Steering],
    tmp_path_factory: pytest.TempPathFactory,
) -> Playground:
    room = tmp_path_factory.mktemp("playground")
    for name, steering in steerings.items():
        steering.save(room / f"{name}.safetensors")
    steer_at(language_model("mistral"), "resid").save(room / "foreign.safetensors")
    (room / "broken.safetensors").write_bytes(b"not a steering")
    run = room / "runs" / "one"
    run.mkdir(parents=True)
    (run / "report.html").write_text("<p>a report</p>", encoding="utf-8")
    (run / "config.json").write_text('{"method": "caa", "model": {"name": "m"}}', encoding="utf-8")
    (room / "secret.html").write_text("secret", encoding="utf-8")
    (run / "out.html").symlink_to(room / "secret.html")
    shelf = Shelf(lm, room / "saved")
    shelf.read(str(room))
    return Playground(lm, shelf, room / "runs")


@pytest.fixture(scope="module")
def client(place: Playground) -> Iterator[TestClient]:
    with TestClient(application(place, Access()), base_url="http://127.0.0.1") as opened:
        yield opened


def events(client: TestClient, path: str, body: Any) -> list[dict[str, Any]]:
    with client.stream("POST", f"/api/{path}", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def chat(client: TestClient, *stack: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    body = {"plain": ASK, "steered": ASK, "steerings": list(stack), **more}
    return events(client, "chat", {"sampling": {"max_tokens": NEW}, **body})


def side(told: list[dict[str, Any]], name: str) -> tuple[str, list[int]]:
    """The text of one side, and its tokens."""
    (ended,) = (one for one in told if one["kind"] == "ended" and one["side"] == name)
    tokens = [one for one in told if one["kind"] == "token" and one["side"] == name]
    said = "".join(one["text"] for one in tokens)
    assert ended["text"].startswith(said)  # the end of a character may never come
    return ended["text"], [one["id"] for one in tokens]


def log_p(lm: tt.LanguageModel, ids: list[int], *stack: tt.Steering, start: int) -> torch.Tensor:
    """Log-probabilities after each token of a text whose first `start` are the prompt, [tokens,
    vocabulary]: one plain pass."""
    with torch.inference_mode(), lm.steered(*stack) as sequences:
        sequences.given_ends = [start]
        sequences.in_part = True
        return lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_both_sides_are_what_generate_writes(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    joy, calm, late = (steerings[name] for name in ("joy", "calm", "late"))
    cases: list[tuple[list[dict[str, Any]], list[tt.Steering]]] = [
        ([{"name": "joy", "dial": 4}], [joy.at(4)]),
        ([{"name": "joy", "dial": -3}, {"name": "calm", "dial": 2}], [joy.at(-3), calm.at(2)]),
        ([{"name": "late", "dial": 6}], [late.at(6)]),
        ([{"name": "joy", "dial": 4, "scope": "generated"}], [joy.at(4).scoped("generated")]),
    ]
    for asked, stack in cases:
        for evidence in (True, False):
            told = chat(client, *asked, evidence=evidence)
            for name, own in (("plain", []), ("steered", stack)):
                (done,) = lm.generate([ASK], steering=[own], max_new_tokens=NEW)
                assert side(told, name) == (done.text, list(done.tokens)), (asked, evidence)


def test_one_side_alone_and_other_conversations(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    longer = [*ASK, {"role": "assistant", "content": "good"}, {"role": "user", "content": "Why?"}]
    asked, own = [{"name": "joy", "dial": 4}], steerings["joy"].at(4)
    alone = chat(client, *asked, plain=None)
    assert {one.get("side") for one in alone} <= {"steered", None}
    both = chat(client, *asked, plain=longer)
    assert side(both, "steered") == side(alone, "steered")
    (done,) = lm.generate([longer], max_new_tokens=NEW)
    assert side(both, "plain")[0] == done.text
    (done,) = lm.generate([ASK], steering=own, max_new_tokens=NEW)
    assert side(both, "steered")[0] == done.text
    # Drawn with a seed: at a dial that does nothing both sides are one text.
    drawn = chat(client, {"name": "joy", "dial": 0},
                 sampling={"max_tokens": NEW, "temperature": 1.5, "seed": 3})  # fmt: skip
    assert side(drawn, "plain") == side(drawn, "steered")


def test_models_that_do_not_pad_and_such_without_chats(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tt.LanguageModel, "pads", lambda self, what: False)
    monkeypatch.setattr(tt.LanguageModel, "chats", False)
    other = [{"role": "user", "content": "She looked at the map and"}]
    told = chat(client, {"name": "joy", "dial": 4}, plain=other)
    for name, asked, own in (("plain", other, []), ("steered", ASK, [steerings["joy"].at(4)])):
        (done,) = lm.generate([asked[0]["content"]], steering=[own], max_new_tokens=NEW)
        assert side(told, name)[0] == done.text
    assert sum("evidence" in one for one in told) == NEW


def test_evidence_is_that_of_two_passes(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    stack = steerings["joy"].at(4), steerings["late"].at(3)
    told = chat(client, {"name": "joy", "dial": 4}, {"name": "late", "dial": 3})
    _, new = side(told, "steered")
    (prompt,) = lm.encode(lm.prompts([ASK], True))
    ids, start = [*prompt, *new], len(prompt)
    after = log_p(lm, ids, *stack, start=start)
    before = log_p(lm, ids, start=start)
    seen = [one["evidence"] for one in told if one["kind"] == "token" and "evidence" in one]
    assert len(seen) == NEW
    for place, one in enumerate(seen):
        p, q = before[start + place - 1], after[start + place - 1]
        assert one["logp"] == pytest.approx(float(q[new[place]]), abs=1e-4)
        assert one["base_logp"] == pytest.approx(float(p[new[place]]), abs=1e-4)
        assert one["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)
        assert one["entropy"] == pytest.approx(-float((q.exp() * q).sum()), abs=1e-4)
        assert one["base_entropy"] == pytest.approx(-float((p.exp() * p).sum()), abs=1e-4)
        text, value, other = one["base_top"][0]
        likeliest = int(p.argmax())
        assert text == lm.tokenizer.decode([likeliest])
        assert [value, other] == pytest.approx([float(p[likeliest]), float(q[likeliest])], abs=1e-4)
    assert max(one["kl"] for one in seen) > 1e-3


def test_nats_turn_the_dial_for_the_conversation(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    told = chat(client, {"name": "joy", "kl": 0.2})
    (dial,) = told[0]["dials"]
    budget = tt.strength.budget(lm, steerings["joy"], [ASK], 0.2, side="positive", chat=True)
    assert dial["dial"] == pytest.approx(budget.dial, rel=1e-3)
    first = next(one["evidence"] for one in told if "evidence" in one)
    assert first["kl"] == pytest.approx(0.2, rel=0.03)


def test_where_scopes_acted_and_which_sites_push(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    stack = [{"name": "joy", "dial": 4}, {"name": "late", "dial": 6}]
    told = chat(client, *stack)
    _, new = side(told, "steered")
    body = {"messages": ASK, "steerings": stack, "new": new}
    joy, late = client.post("/api/acted", json=body).json()["steerings"]
    assert set(joy["prompt"]) == set(joy["answer"]) == {1}
    assert late["answer"] == [0, 1, 1, 1, *[0] * (NEW - 5)]
    assert not any(late["prompt"])
    seen = [one["evidence"] for one in told if "evidence" in one]
    place = 3
    found = client.post("/api/pushes", json={**body, "place": place}).json()
    assert found["logp"] == pytest.approx(seen[place]["logp"], abs=1e-4)
    assert found["base_logp"] == pytest.approx(seen[place]["base_logp"], abs=1e-4)
    (prompt,) = lm.encode(lm.prompts([ASK], True))
    ids = [*prompt, *new[:place]]
    without = log_p(lm, ids, steerings["late"].at(6), start=len(prompt))[-1, new[place]]
    pushes = {(one["steering"], one["site"]): one["push"] for one in found["sites"]}
    site = steerings["joy"].interventions[0].site
    assert pushes["joy", site] == pytest.approx(found["logp"] - float(without), abs=1e-4)


def test_gates_are_shown(place: Playground, client: TestClient, lm: tt.LanguageModel) -> None:
    gate = tt.Gate((steer_at(lm, "resid", seed=7).condition(threshold=1e9),), "two-pass")
    closed = steer_at(lm, "resid", seed=2).gated(gate)
    place.shelf.keep("closed", closed)
    told = chat(client, {"name": "closed", "dial": 5})
    (begun,) = (one for one in told if one["kind"] == "begun")
    assert [gate["fired"] for gate in begun["gates"]] == [False]
    assert side(told, "plain") == side(told, "steered")
    body = {"messages": ASK, "steerings": [{"name": "closed", "dial": 5}]}
    found = client.post("/api/acted", json={**body, "new": side(told, "steered")[1]}).json()
    assert not any(found["steerings"][0]["answer"])


def test_token_gates_are_told_while_an_answer_is_written(
    place: Playground, client: TestClient, lm: tt.LanguageModel
) -> None:
    joy = steer_at(lm, "resid", seed=2)
    score = steer_at(lm, "resid", seed=7).condition(threshold=0.0)
    place.shelf.keep("sometimes", joy.gated(tt.Gate((score,), "token")))
    stack = [{"name": "joy", "dial": 4}, {"name": "sometimes", "dial": 5}]
    for more in ({}, {"evidence": False}, {"plain": None}):
        told = chat(client, *stack, **more)
        kinds = [one["kind"] for one in told if one.get("side") == "steered"]
        assert kinds[:4] == ["begun", "token", "gated", "token"]  # as it comes, token by token
        gated = [one for one in told if one["kind"] == "gated"]
        assert [one["place"] for one in gated] == list(range(NEW - 1))  # the last one is not read
        assert all(one["fired"][0] is None for one in gated)
        body = {"messages": ASK, "steerings": stack, "new": side(told, "steered")[1]}
        _, own = client.post("/api/acted", json=body).json()["steerings"]
        acted = [weight != 0 for weight in own["answer"][: NEW - 1]]
        assert [one["fired"][1] for one in gated] == acted
        assert {True, False} == set(acted)


def test_a_dial_that_breaks_the_model_fails_on_its_side_alone(client: TestClient) -> None:
    told = chat(client, {"name": "joy", "dial": 1e6}, {"name": "calm", "dial": 1e6})
    assert len(side(told, "plain")[1]) == NEW
    failed = [one for one in told if one["kind"] == "failed"]
    assert all(one["side"] == "steered" and "dial" in one["message"] for one in failed)


def test_curve_and_cost_are_the_librarys(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    body = {"name": "joy", "prompt": "Today I feel", "points": 9, "tokens": [" happy"]}
    found = client.post("/api/curve", json=body).json()
    own = tt.strength.curve(
        lm, steerings["joy"], ["Today I feel"], tokens=[" happy"], points=9, chat=True
    )
    assert found["curve"] == own.as_json()
    reading = tt.strength.read(own)
    spot = reading.sweet_spot
    assert (found["sweet_spot"] or {}).get("best") == (None if spot is None else spot.best)

    cost = client.post("/api/cost", json={"steerings": [{"name": "joy", "dial": 4}]}).json()
    total, count = 0.0, 0
    for text in plain_texts()[:8]:
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"][:64]
        (ids,) = lm.encode([lm.tokenizer.decode(ids)])
        ids = list(ids)
        at = torch.tensor(ids[1:])[:, None]
        before = log_p(lm, ids, start=len(ids))[:-1].gather(1, at)
        after = log_p(lm, ids, steerings["joy"].at(4), start=len(ids))[:-1].gather(1, at)
        total, count = total + float((before - after).sum()), count + len(ids) - 1
    assert cost["tokens"] == count
    assert cost["value"] == pytest.approx(total / count, abs=1e-4)
    assert cost["ci95"][0] <= cost["value"] <= cost["ci95"][1]


def test_two_browsers_at_once_do_not_mix(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    dials = [-4.0, 2.0, 5.0, 7.0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda dial: chat(client, {"name": "joy", "dial": dial}), dials))
    for dial, told in zip(dials, found, strict=True):
        (done,) = lm.generate([ASK], steering=steerings["joy"].at(dial), max_new_tokens=NEW)
        assert side(told, "steered")[0] == done.text


def test_the_library_has_cards_and_says_what_it_leaves_out(client: TestClient) -> None:
    found = client.get("/api/library").json()
    assert {"joy", "calm", "late"} <= {one["name"] for one in found["steerings"]}
    why = {one["file"]: one["why"] for one in found["refused"]}
    assert "sizes do not fit" in why["foreign.safetensors"]
    assert set(why) == {"foreign.safetensors", "broken.safetensors"}
    assert all("\n" not in line for line in why.values())
    assert "formality" in {one["name"] for one in found["builtin"]}
    card = client.get("/api/library/joy").json()
    assert "# joy" in card["card"]
    assert card["says"]
    assert client.get("/api/library/nobody").status_code == 400


def test_a_file_is_taken_or_refused_in_one_line(place: Playground, client: TestClient) -> None:
    kind = {"Content-Type": "application/octet-stream"}
    file = Path(place.shelf.files["joy"])
    taken = client.put("/api/library/again", content=file.read_bytes(), headers=kind).json()
    assert Path(taken["file"]).read_bytes() == file.read_bytes()
    foreign = (file.parent / "foreign.safetensors").read_bytes()
    for name, content in (
        ("again", file.read_bytes()), ("bad", b"nothing"), ("other", foreign), ("..", b""),
        ("a b", file.read_bytes()),
    ):  # fmt: skip
        answer = client.put(f"/api/library/{name}", content=content, headers=kind)
        assert answer.status_code in (400, 404, 405), name
        assert "\n" not in answer.json()["error"] if answer.status_code == 400 else True
    assert "bad" not in place.shelf.library.held
    assert not (place.shelf.saves / "bad.safetensors").exists()


def test_inside_is_the_librarys(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    joy = steerings["joy"]
    found = client.get("/api/inside/joy").json()
    assert [one["site"] for one in found["sites"]] == [one.site for one in joy.interventions]
    site = joy.interventions[0].site
    told = client.post("/api/unit", json={"name": "joy", "site": site, "unit": None}).json()
    vector: Any = joy.interventions[0].operator
    norm = lm.model.model.norm
    with torch.inference_mode():
        logits = lm.model.lm_head(norm(vector.vector[None]))[0]
    assert told["toward"][0][0] == lm.tokenizer.decode([int(logits.argmax())])
    assert told["toward"][0][1] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)
    calm = steerings["calm"].interventions[0].site
    unit = client.post("/api/unit", json={"name": "calm", "site": calm, "unit": 2}).json()
    weight = lm.model.model.layers[int(calm.split(".")[1])].self_attn.o_proj.weight[:, 2]
    with torch.inference_mode():
        away = lm.model.lm_head(norm(-weight[None]))[0]
    assert unit["away"][0][0] == lm.tokenizer.decode([int(away.argmax())])
    text = "She looked at the map"
    along = client.post("/api/projections", json={"name": "joy", "text": text}).json()
    (turn,) = tt.monitor(lm, joy, [text]).turns
    assert [value for _, value in along["tokens"]] == pytest.approx(list(turn.projections))
    refused = client.post("/api/unit", json={"name": "joy", "site": site, "unit": 10**6})
    assert refused.status_code == 400


def test_reports_are_read_and_nothing_else(client: TestClient) -> None:
    (run,) = client.get("/api/runs").json()["runs"]
    assert (run["path"], run["what"], run["model"]) == ("one", "caa", "m")
    page = client.get("/reports/one/report.html")
    assert page.text == "<p>a report</p>"
    assert "sandbox" in page.headers["content-security-policy"]
    for path in (
        "../secret.html", "%2e%2e/secret.html", "one/%2e%2e/%2e%2e/secret.html", "one/out.html",
        "one/config.json", "/etc/passwd", "one/report.html%00",
    ):  # fmt: skip
        assert client.get(f"/reports/{path}").status_code == 404, path


def test_lines_say_the_same(
    place: Playground, client: TestClient, lm: tt.LanguageModel, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stack = [{"name": "joy", "dial": 4, "scope": "generated"}]
    body = {"prompt": 'It\'s "here"', "steerings": stack, "sampling": {"max_tokens": 6}}
    found = client.post("/api/lines", json=body).json()
    monkeypatch.setattr(tt, "load", lambda name: lm)
    exec(found["python"], {})
    joy = tt.Steering.load(place.shelf.files["joy"]).at(4).scoped("generated")
    (done,) = lm.generate([body["prompt"]], steering=joy, max_new_tokens=6)
    assert capsys.readouterr().out == done.text + "\n"
    words = shlex.split(found["cli"].replace("\\\n", ""))
    assert words[:4] == ["trimtab", "generate", "--model", "llama"]
    assert words[-1] == body["prompt"]
    assert f"{place.shelf.files['joy']}@4" in words
    sent = json.loads(shlex.split(found["curl"].splitlines()[-1])[1])
    assert sent["steering"] == stack
    assert "serve it" in found["llama.cpp"]
    plain = client.post("/api/lines", json={**body, "steerings": [{"name": "joy", "dial": 4}]})
    assert re.search(r"trimtab (export|bake)", plain.json()["llama.cpp"])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "127.0.0.1.evil.example"}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Length": str(2**40)}, 413),
        ({"Origin": "http://127.0.0.1"}, 200),
    ],
)
def test_who_may_ask(client: TestClient, headers: dict[str, str], status: int) -> None:
    body = json.dumps({"steerings": []})
    more = {"Content-Type": "application/json", **headers}
    assert client.post("/api/cost", content=body, headers=more).status_code == status


def test_a_key_is_asked_for_where_others_may_reach_it(place: Playground) -> None:
    access = Access(hosts=None, key="secret")
    client = TestClient(application(place, access), base_url="http://box:7860")
    assert client.get("/api/about").status_code == 401
    assert client.get("/?key=wrong").status_code == 401
    answer = client.get("/?key=secret", follow_redirects=False)
    assert answer.status_code == 303
    assert "samesite=strict" in answer.headers["set-cookie"].lower()
    assert client.get("/api/about").status_code == 200


def test_pages_may_load_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    static = Path(tt.__file__).parent / "playground" / "static"
    for file in static.iterdir():
        said = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", said)
        addresses = set(re.findall(r"https?://[^\"' )<]+", said))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file
        assert client.get(f"/static/{file.name}").status_code == 200
    assert client.get("/static/../pages.py").status_code == 404
    assert sum(file.stat().st_size for file in static.iterdir()) < 150_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat", {}),
        ("chat", {"plain": []}),
        ("chat", {"plain": ASK, "sampling": {"max_tokens": 0}}),
        ("chat", {"plain": ASK, "sampling": {"temperature": -1}}),
        ("chat", {"plain": [{"role": "robot", "content": "x"}]}),
        ("chat", {"plain": ASK, "more": 1}),
        ("chat", {"steered": ASK, "steerings": [{"name": "joy", "dial": 1, "kl": 1}]}),
        ("chat", {"steered": ASK, "steerings": [{"name": "nobody"}]}),
        ("chat", {"steered": ASK, "steerings": [{"name": "joy", "scope": "nowhere("}]}),
        ("chat", {"plain": [{"role": "user", "content": "x " * 2000}]}),
        ("curve", {"name": "joy", "prompt": "x", "points": 10**6}),
        ("pushes", {"messages": ASK, "new": [1, 2], "place": 2}),
        ("acted", {"messages": ASK, "new": [10**6]}),
        ("projections", {"name": "joy", "text": "x", "site": "layers.99.resid"}),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    answer = client.post(f"/api/{path}", json=body)
    assert answer.status_code in (400, 422), answer.text
    said = answer.json()["error"]
    assert said
    assert "\n" not in said
    assert "Traceback" not in said
