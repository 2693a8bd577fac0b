"""The playground's pages in a browser: what a person sees and does there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

import trimtab as tt
from helpers import language_model, steer_at
from services import listening
from trimtab.playground import Access, Playground, Shelf, application
from trimtab.terminal import progress
from trimtab.wishes.portfolio import Arm

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip("there is no /usr/bin/chromium", allow_module_level=True)

#: axe-core's axe.min.js, of the npm package of that name.
AXE = Path(os.environ.get("TRIMTAB_AXE", "node_modules/axe-core/axe.min.js"))
PAGES = ("chat", "make", "curves", "inside", "library", "runs")
ASK, NEW = "Today I feel", 12
WORDS = ("ship", "map", "king", "sea", "house", "bird", "tree", "road", "book", "song", "lamp", "x")
#: For a machine that is busy, in milliseconds.
PATIENCE = 60_000


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def joy(lm: tt.LanguageModel) -> tt.Steering:
    return steer_at(lm, "resid", seed=2)


@pytest.fixture(scope="module")
def address(
    lm: tt.LanguageModel, joy: tt.Steering, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    room = tmp_path_factory.mktemp("pages")
    joy.save(room / "joy.safetensors")
    steer_at(lm, "heads", "Scale", seed=3).save(room / "calm.safetensors")
    (room / "runs" / "one").mkdir(parents=True)
    (room / "runs" / "one" / "report.html").write_text("<h1>A report</h1>", encoding="utf-8")
    shelf = Shelf(lm, room / "saved")
    shelf.read(str(room))
    app = application(Playground(lm, shelf, room / "runs"), Access())
    with listening(app) as served:
        yield f"{served}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as drive:
        opened = drive.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


#: Opens a page of a browser of its own: its name with a query, theme, width.
Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Open]:
    contexts, wrong = [], []

    def look(name: str, theme: str = "light", width: int = 1280) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=theme, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url) if _leaves(asked.url) else None)
        page.goto(f"{address}#/{name}")
        page.wait_for_selector("html[data-ready]")
        return page

    yield look
    for context in contexts:
        context.close()
    assert wrong == []


def _leaves(url: str) -> bool:
    """Whether a request is for another machine."""
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1"


def ask(page: Any, text: str = ASK) -> None:
    """Ask, and wait until all figures are there."""
    page.fill("#ask", text)
    page.keyboard.press("Enter")
    settled(page)


def settled(page: Any) -> None:
    page.wait_for_function(
        "() => !document.querySelector('[aria-busy=true]') && "
        "/\\d/.test(document.querySelector('[data-figure=cost] b').textContent)"
    )


def text_of(page: Any, side: str) -> str:
    return str(page.locator(f".answer.{side} .tokens").last.evaluate("one => one.textContent"))


def written(lm: tt.LanguageModel, *stack: tt.Steering) -> str:
    """What generate writes, as far as it is whole."""
    chat = [{"role": "user", "content": ASK}]
    (done,) = lm.generate([chat], steering=[list(stack)], max_new_tokens=NEW)
    return done.text.rstrip("\N{REPLACEMENT CHARACTER}")


def turn(page: Any, name: str, dial: float) -> None:
    """Turn a slider, as a person does who lets it go."""
    page.get_by_role("slider", name=f"{name}:").evaluate(
        "(one, dial) => { one.value = dial; one.dispatchEvent(new Event('input'));"
        " one.dispatchEvent(new Event('change')); }",
        dial,
    )


def test_a_slider_changes_the_steered_text_and_not_the_other(
    opened: Open, lm: tt.LanguageModel, joy: tt.Steering
) -> None:
    page = opened(f"chat?s=joy@4&n={NEW}")
    ask(page)
    assert text_of(page, "plain").rstrip("\ufffd") == written(lm)
    assert text_of(page, "steered").rstrip("\ufffd") == written(lm, joy.at(4))
    before = page.locator(".answer.plain .tokens").element_handle()
    with page.expect_response("**/api/chat") as asked:
        turn(page, "joy", -20)
    assert "steered" in asked.value.request.post_data_json
    assert "plain" not in asked.value.request.post_data_json
    settled(page)
    page.wait_for_function("() => document.querySelectorAll('.t.acted').length > 0")
    assert before is not None
    assert text_of(page, "plain").rstrip("\ufffd") == written(lm)
    assert text_of(page, "steered").rstrip("\ufffd") == written(lm, joy.at(-20))
    assert "s=joy%40-20" in page.url


def test_numbers_on_the_page_are_the_librarys(
    opened: Open, lm: tt.LanguageModel, joy: tt.Steering
) -> None:
    page = opened(f"chat?s=joy@4&n={NEW}")
    ask(page)
    chat = [{"role": "user", "content": ASK}]
    (done,) = lm.generate([chat], steering=joy.at(4), max_new_tokens=NEW)
    (prompt,) = lm.encode(lm.prompts([chat], True))
    texts = [[*prompt, *done.tokens[:place]] for place in range(NEW)]
    changes, kls = [], []
    for ids, token in zip(texts, done.tokens, strict=True):
        p = _next(lm, ids)
        with lm.steered(joy.at(4)):
            q = _next(lm, ids)
        changes.append(float(q[token] - p[token]))
        kls.append(float((p.exp() * (p - q)).sum()))
    spans = page.locator(".answer.steered .t")
    shown = spans.evaluate_all("all => all.map((one) => Number(one.dataset.change))")
    assert shown == pytest.approx(changes, abs=2e-3)
    kl = page.locator("[data-figure=kl] b").text_content()
    assert float(kl) == pytest.approx(sum(kls) / len(kls), abs=1e-3)
    spans.nth(3).click()
    page.wait_for_selector("#token h4:text-is('Sites that push')")
    assert joy.interventions[0].site in page.locator("#token").text_content()
    up = changes[3] >= 0
    assert ("up" if up else "down") in spans.nth(3).get_attribute("class").split()


def _next(lm: tt.LanguageModel, ids: list[int]) -> Any:
    with torch.inference_mode():
        return lm.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def test_two_browsers_do_not_mix(opened: Open, lm: tt.LanguageModel, joy: tt.Steering) -> None:
    one = opened(f"chat?s=joy@4&n={NEW}")
    other = opened(f"chat?s=joy@-9&n={NEW}")
    for page in (one, other):
        page.fill("#ask", ASK)
        page.keyboard.press("Enter")
    for page in (one, other):
        settled(page)
    for page, dial in ((one, 4), (other, -9)):
        assert text_of(page, "steered").rstrip("\ufffd") == written(lm, joy.at(dial))


def test_without_evidence_nothing_but_text(opened: Open, lm: tt.LanguageModel) -> None:
    page = opened(f"chat?s=joy@4&n={NEW}&e=0")
    page.fill("#ask", ASK)
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer.plain footer span")
    page.wait_for_function("() => !document.querySelector('[aria-busy=true]')")
    assert page.locator(".t").count() == 0
    assert text_of(page, "plain").rstrip("\ufffd") == written(lm)


def test_by_keyboard_alone(opened: Open) -> None:
    page = opened(f"chat?s=joy@4&n={NEW}")
    press = page.keyboard.press

    def tab_to(what: str) -> None:
        for _ in range(40):
            press("Tab")
            if page.evaluate("what => document.activeElement.matches(what)", what):
                # What has the focus shows it.
                outline = "getComputedStyle(document.activeElement).outlineStyle"
                assert page.evaluate(outline) != "none", what
                return
        raise AssertionError(f"no Tab leads to {what}")

    tab_to("nav a")
    tab_to("#ask")
    page.keyboard.type(ASK)
    press("Enter")
    settled(page)
    press("Shift+Tab")
    assert page.evaluate("document.activeElement.matches('.steered .tokens')")
    press("ArrowRight")
    press("ArrowRight")
    assert page.locator(".t.looked").get_attribute("data-place") == "1"
    assert page.locator("#token").is_visible()
    assert "nats" in page.locator("#live").text_content()
    press("Enter")
    page.wait_for_selector("#token h4:text-is('Sites that push')")
    press("Escape")
    assert not page.locator("#token").is_visible()
    before = text_of(page, "steered")
    page.get_by_role("slider", name="joy:").focus()
    for _ in range(8):
        press("ArrowLeft")
    page.wait_for_function(
        "before => document.querySelector('.steered .tokens').textContent !== before", arg=before
    )
    settled(page)
    page.get_by_role("button", name="Copy as").focus()
    press("Enter")
    page.wait_for_selector("dialog pre")
    assert "import trimtab as tt" in page.locator("dialog").text_content()
    press("Escape")
    # A dialog says that it is closed a moment after it is, and goes then.
    page.wait_for_selector("dialog", state="detached")
    assert page.evaluate("document.activeElement.textContent") == "Copy as …"


def test_the_address_brings_everything_back(opened: Open) -> None:
    page = opened("chat?s=joy@4@generated&s=calm@2&n=7&t=0.5&r=3&q=Hello&sys=Be+kind")
    again = opened(page.url.partition("#/")[2])
    for one in (page, again):
        assert one.locator("#ask").input_value() == "Hello"
        assert one.get_by_label("joy: acts on").input_value() == "generated"
        assert one.locator("[aria-label^='calm:'][type=number]").input_value() == "2"
    assert page.url == again.url


@pytest.mark.slow
def test_pairs_become_a_steering_behind_the_page(
    opened: Open, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    go, real = Event(), tt.make

    def held(*given: Any, **more: Any) -> tt.Made:
        with progress("waiting", 10**6) as advance:
            while not go.wait(0.02):
                advance(1)
        return real(*given, **more)

    arms = [Arm(tt.CAA(layer=2)), Arm(tt.CAA(layer=1)), Arm(tt.ITI(k=2))]
    monkeypatch.setattr("trimtab.wishes.making.portfolio", lambda *_: arms)
    monkeypatch.setattr("trimtab.playground.making.make", held)
    page = opened("make")
    name = f"made-{time.time_ns()}"
    rows = [f"The {one} near the {other} is\t good and kind.\t bad and cruel."
            for one in WORDS[:6] for other in WORDS[6:]]  # fmt: skip
    page.get_by_label("Pasted").fill("\n".join(rows))
    page.get_by_role("button", name="Read these").click()
    page.wait_for_selector("table.edit tbody tr")
    page.get_by_role("button", name="Remove this pair").first.click()
    assert page.get_by_role("heading", name="35 pairs").is_visible()
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Make", exact=True).click()
    going = page.get_by_role("region", name="What goes on")
    going.wait_for()
    # A page that is opened again finds the work, its rows, and can stop it.
    page.reload()
    going.get_by_text("waiting").wait_for()
    assert page.get_by_role("heading", name="35 pairs").is_visible()
    going.get_by_role("button", name="Stop").click()
    page.get_by_text(f"{name} was stopped").wait_for()
    go.set()
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Make", exact=True).click()
    page.wait_for_selector("[data-figure=gain]")
    assert page.locator(".plane .chosen").count() == 1
    assert page.locator(".sample").count() > 0
    folder = pictures(tmp_path_factory)
    for theme in ("light", "dark"):
        for width in (390, 1280):
            again = opened("make", theme, width)
            again.wait_for_selector("[data-figure=gain]")
            wide = again.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, (theme, width, again.evaluate(TOO_WIDE))
            again.screenshot(path=folder / f"made-{theme}-{width}.png", full_page=True)
    page.get_by_role("button", name="Chat with it").click()
    page.wait_for_selector(f"input[id='on-{name}']:checked")


def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of pages go."""
    kept = os.environ.get("TRIMTAB_ARTEFACTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


#: What reaches beyond the window, innermost last.
TOO_WIDE = """[...document.querySelectorAll('main *')].filter((one) =>
  one.getBoundingClientRect().right > innerWidth).map((one) => one.outerHTML.slice(0, 90))"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_every_page_in_both_themes_and_widths(
    name: str, opened: Open, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = pictures(tmp_path_factory)
    grounds = set()
    for theme in ("light", "dark"):
        for width in (390, 1280):
            page = opened(f"{name}?s=joy@4&n={NEW}&look=joy", theme, width)
            FILLED[name](page)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, (theme, width, page.evaluate(TOO_WIDE))
            page.screenshot(path=folder / f"{name}-{theme}-{width}.png", full_page=True)
            grounds.add(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
    assert len(grounds) == 2
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def _curves(page: Any) -> None:
    page.wait_for_selector(".chart")


def _inside(page: Any) -> None:
    page.get_by_role("button", name="Read").click()
    page.wait_for_selector(".coloured")


def _make(page: Any) -> None:
    page.get_by_role("button", name="Take these").click()
    page.wait_for_selector("table.edit tbody tr")


def _library(page: Any) -> None:
    page.get_by_role("article", name="joy").get_by_role("button", name="Card").click()
    page.wait_for_selector("article pre", state="attached")
    page.locator("details.card > summary").click()


def _runs(page: Any) -> None:
    page.get_by_role("button", name="one").click()
    page.frame_locator("iframe").get_by_text("A report").wait_for()


#: What is done on each page before it is looked at.
FILLED: dict[str, Callable[[Any], None]] = {
    "chat": ask, "make": _make, "curves": _curves, "inside": _inside, "library": _library,
    "runs": _runs,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_serious_fault(name: str, opened: Open) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not there: TRIMTAB_AXE names its axe.min.js")
    for theme, width in (("light", 1280), ("dark", 390)):
        page = opened(f"{name}?s=joy@4&n={NEW}&look=joy", theme, width)
        FILLED[name](page)
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run(document, {iframes: false})")
        serious = [
            (fault["id"], fault["nodes"][0]["html"][:200], fault["nodes"][0].get("failureSummary"))
            for fault in found["violations"]
            if fault["impact"] in ("serious", "critical")
        ]
        assert serious == [], (theme, width)
