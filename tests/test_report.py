"""The page of a run: everything is on it, nothing of it is fetched, nothing on it is code."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from trimtab.reports import NEUTRAL, Run, look_of, summarise
from trimtab.reports.charts import STYLE, UP, heatmap, panels, rendered
from trimtab.reports.dark import dark
from trimtab.reports.evaluations import evaluation_page
from trimtab.reports.page import Picture, Table, render_page

ENVIRONMENT = {"date": "2026-01-02T03:04:05+00:00", "python": "3.11"}
CONFIG = {"task": "copa", "seed": 7, "text": "<b>Ünïcode</b>"}
#: Would run, or break the page, if it were taken as it is.
HOSTILE = "<script>alert('x')</script> \"quoted\" & <img src=x onerror=y>"
#: Elements that have no end.
VOID = {"meta", "img", "br", "source", "wbr"}


class Outline(HTMLParser):
    """The elements of a page, each closed by its own end tag, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def a_picture(name: str = "curve", title: str = "A curve") -> Picture:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1, 2], [3, 1, 2], color=UP, label="accuracy, steered")
        axes.set(xlabel="dial α (no unit)", ylabel="accuracy (share)", title=title)
        axes.legend()
    return Picture(title, name, figure, "accuracy falls & rises", "Three points.")


def a_record(**more: Any) -> dict[str, Any]:
    return {
        "task": "copa",
        "id": "5",
        "steering": None,
        "prompt": HOSTILE,
        "target": "A",
        "output": HOSTILE + " before",
        "values": {"accuracy": 0.0, "answered": 1.0},
    } | more


def a_page(**more: Any) -> str:
    table = Table(
        "What was chosen",
        ["setting", "value", "n"],
        [["k=16 <alpha>", 0.5, 100], ["unsteered", None, 100]],
        note="A note & more.",
    )
    blocks = more.pop("blocks", [table, a_picture()])
    return render_page("A sweep of x", "llama, 3 layers", blocks, CONFIG, ENVIRONMENT, **more)


def test_everything_is_on_the_page() -> None:
    outline = Outline(
        a_page(
            notes=["one caveat", "another"],
            flips=[(a_record(), a_record(steering="caa@2", values={"accuracy": 1.0}))],
        )
    )
    for text in (
        "A sweep of x",
        "llama, 3 layers; 2026-01-02",
        "What was chosen",
        "setting",
        "k=16 <alpha>",
        "0.5",
        "A note & more.",
        "A curve",
        "Three points.",
        "one caveat",
        "another",
        "What flipped",
        "1 of 1 examples whose rating changed.",
        "copa 5, caa@2: accuracy 0 to 1",
        "target: A",
    ):
        assert text in outline.texts
    for needed in ('"seed": 7', "Ünïcode", '"python": "3.11"', "Intervals are 95 %"):
        assert any(needed in text for text in outline.texts)
    assert len(outline.named("td")) == 6  # the absent value is an empty cell
    assert not any("None" in text for text in outline.texts)


def test_blocks_stand_in_their_order() -> None:
    blocks = [a_picture("one", "First"), Table("Second", ["a"], [[1]]), a_picture("two", "Third")]
    outline = Outline(a_page(blocks=blocks))
    titles = [text for text in outline.texts if text in ("First", "Second", "Third")]
    assert titles == ["First", "Second", "Third"]


def test_nothing_that_was_not_given_is_announced() -> None:
    outline = Outline(a_page(blocks=[]))
    assert "To know" not in outline.texts
    assert "What flipped" not in outline.texts
    assert outline.named("img", "table") == []


def test_pictures_are_on_the_page_with_their_labels() -> None:
    outline = Outline(a_page())
    (image,) = outline.named("img")
    assert image["alt"] == "accuracy falls & rises"
    kind, _, content = str(image["src"]).partition(",")
    assert kind == "data:image/svg+xml;base64"
    drawn = ElementTree.fromstring(base64.b64decode(content, validate=True))
    texts = ["".join(each.itertext()).strip() for each in drawn.iter() if each.tag.endswith("text")]
    for label in ("dial α (no unit)", "accuracy (share)", "A curve", "accuracy, steered"):
        assert label in texts
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}path"))) > 5  # axes, ticks, the line
    for element in drawn.iter():
        for name, value in element.attrib.items():
            if name.endswith(("href", "src")):
                assert value.startswith("#"), (name, value)


def test_the_same_figures_give_the_same_page() -> None:
    assert a_page() == a_page()


def test_what_models_wrote_is_text_and_not_code() -> None:
    content = render_page(
        HOSTILE,
        HOSTILE,
        [Table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE), _titled(a_picture(), HOSTILE)],
        {"prompt": HOSTILE},
        {**ENVIRONMENT, "platform": HOSTILE},
        notes=[HOSTILE],
        flips=[(a_record(), a_record(id=HOSTILE, steering=HOSTILE, values={"accuracy": 1.0}))],
    )
    outline = Outline(content)
    assert outline.named("script") == []
    assert len(outline.named("img")) == 1  # the picture's
    for _, attributes in outline.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert sum(HOSTILE in text for text in outline.texts) >= 10
    assert outline.named("img")[0]["alt"] == HOSTILE


def _titled(picture: Picture, text: str) -> Picture:
    return Picture(text, picture.name, picture.figure, text, text)


def test_nothing_is_fetched() -> None:
    content = a_page(notes=["a note"], flips=[(a_record(), a_record(values={"accuracy": 1.0}))])
    outline = Outline(content)
    assert outline.named("script", "link", "iframe", "object", "embed", "base") == []
    for tag, attributes in outline.elements:
        for name in ("src", "href", "srcset", "action", "poster", "style"):
            value = attributes.get(name) or ""
            drawn = tag in ("img", "source") and value.startswith("data:image/svg+xml;")
            assert value == "" or drawn, tag
    assert re.findall(r"https?:", content) == []
    assert re.findall(r"@import|url\(", content) == []


def test_light_and_dark_wide_and_narrow() -> None:
    content = a_page()
    outline = Outline(content)
    assert {"charset": "utf-8"} in outline.named("meta")
    views = [m["content"] for m in outline.named("meta") if m.get("name") == "viewport"]
    assert views == ["width=device-width, initial-scale=1"]
    assert "color-scheme: light dark" in content
    assert "prefers-color-scheme: dark" in content
    # What is wider than a phone scrolls by itself.
    assert re.search(r"\.wide\s*{[^}]*overflow-x:\s*auto", content)
    assert re.search(r"pre\s*{[^}]*overflow-wrap:\s*anywhere", content)
    wide = [i for i, (_, a) in enumerate(outline.elements) if a.get("class") == "wide"]
    assert [outline.elements[i + 1][0] for i in wide] == ["table"]
    # A picture fits; the headline and paragraphs break rather than scroll.
    assert re.search(r"img\s*{[^}]*max-width:\s*100%", content)
    assert re.search(r"h1, h2, p[^{]*{[^}]*overflow-wrap:\s*anywhere", content)
    assert re.search(r"td:first-child\s*{[^}]*position:\s*sticky", content)
    assert not re.search(r"filter:\s*invert", content)
    assert content.startswith("<!doctype html>")
    assert outline.elements[0] == ("html", {"lang": "en"})


def test_few_of_many_flips_are_shown() -> None:
    flips = [(a_record(), a_record(id=str(i), values={"accuracy": 1.0})) for i in range(150)]
    outline = Outline(a_page(flips=flips))
    assert "100 of 150 examples whose rating changed." in outline.texts
    assert len(outline.named("details")) == 100 + 2


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({"accuracy": 0.0}, {"accuracy": 1.0}, "accuracy 0 to 1"),
        # The first that changed, of those that both have.
        ({"a": None, "b": 0.5, "c": 1.0}, {"a": 1.0, "b": 0.5, "c": 0.0}, "c 1 to 0"),
        ({"log_odds": -0.123456}, {"log_odds": 2.0, "prefers": 1.0}, "log-odds -0.123 to 2"),
    ],
)
def test_what_flipped_is_named(before: Any, after: Any, says: str) -> None:
    flips = [(a_record(values=before), a_record(values=after, steering="s"))]
    assert f"copa 5, s: {says}" in Outline(a_page(flips=flips)).texts


def test_of_a_conversation_the_last_message_is_shown() -> None:
    prompt = [["system", "Be brief."], ["user", "What is the tab for?"]]
    flips = [(a_record(), a_record(prompt=prompt, target=None, values={"accuracy": 1.0}))]
    outline = Outline(a_page(flips=flips))
    assert "What is the tab for?" in outline.texts
    assert not any("Be brief." in text or "target" in text for text in outline.texts)


def test_the_page_of_an_evaluation_has_every_figure() -> None:
    """Tables by task with differences and flips; columns that nothing is in are left out."""
    records = [
        {
            "task": task,
            "protocol": "trimtab",
            "steering": steering,
            "index": i,
            "id": f"row {i}",
            "prompt": f"Prompt {i}",
            "output": "B" if steering else "A",
            "target": "A" if i % 2 else "B",
            "values": {"accuracy": float((i % 2 == 1) == (steering is None)), "answered": 1.0},
            "seconds": 0.5,
        }
        for task in ("copa", "boolq")
        for steering in (None, "caa@2")
        for i in range(6)
    ]
    model = {"name": "tiny", "architecture": "llama", "layers": 3, "dtype": "torch.float32"}
    evaluation = summarise(records, model, ["a note of the run"])
    outline = Outline(evaluation_page(evaluation, Run(None, {"model": model}), ENVIRONMENT))
    for text in (
        "Evaluation of tiny",
        "llama, 3 layers, float32; 12 seconds; 2026-01-02",
        "copa, trimtab's protocol",
        "boolq, trimtab's protocol",
        "a note of the run",
        "12 of 12 examples whose rating changed.",
        "+3 -3 (p 1)",
    ):
        assert text in outline.texts
    assert outline.texts.count("difference") == 2
    assert "unclear" not in outline.texts
    for result in evaluation.results:
        assert result.value is not None
        assert result.ci95 is not None
        low, high = result.ci95
        share = f"{100 * result.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        assert share in outline.texts
    for found in evaluation.comparisons:
        low, high = found.ci95
        points = f"{100 * found.difference:+.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
        assert points in outline.texts


def test_names_break_at_their_joints_and_nowhere_else() -> None:
    names = "layers.12.ffn_out with runs/joy.safetensors@12 at 0.0833 and 1.5"
    shown = render_page("T", "s", [Table("T", ["a"], [[names]])], CONFIG, ENVIRONMENT)
    (cell,) = re.findall(r"<td[^>]*>(.*?)</td>", shown)
    assert cell == (
        "layers.<wbr>12.<wbr>ffn_out with runs/<wbr>joy.<wbr>safetensors@<wbr>12 at 0.0833 and 1.5"
    )
    # A word is not broken: that takes a rule which this page has for paragraphs alone.
    assert not re.search(r"td[^{]*{[^}]*anywhere", shown)


def test_a_page_begins_with_what_was_found() -> None:
    content = a_page(summary="With joy accuracy is 75.0 %.")
    outline = Outline(content)
    place = outline.texts.index("With joy accuracy is 75.0 %.")
    assert outline.texts[place - 1] == "A sweep of x"
    assert 'class="found"' not in a_page()


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def colours_of(svg: bytes) -> set[bytes]:
    return set(re.findall(rb"#[0-9a-f]{6}", svg))


def test_a_dark_page_has_pictures_of_its_own() -> None:
    """Light text and lines, no ground of its own, and a map of colours whose middle is dark; the
    figure is afterwards as it was."""
    figure, (axes,) = panels((4, 3))
    drawn = heatmap(figure, axes, [[0.0, 0.5, 1.0]], "share", cmap="PuOr", vmin=0, vmax=1).mappable
    words = axes.text(1, 0, "0.5", color="black")
    (line,) = axes.plot([0, 2], [0, 0], color="black")
    before = colours_of(rendered(figure, "svg"))
    with dark(figure):
        middle = to_hex(drawn.cmap(0.5))
        ends = [to_hex(drawn.cmap(end)) for end in (0.0, 1.0)]
        assert luminance(middle) < 0.2
        assert all(luminance(end) > 0.5 for end in ends)
        assert all(luminance(to_hex(each.get_color())) > 0.8 for each in (words, line))
        assert luminance(to_hex(axes.xaxis.label.get_color())) > 0.8
        assert to_rgba(figure.patch.get_facecolor())[3] == 0
        on_dark = colours_of(rendered(figure, "svg"))
    assert on_dark != before
    assert b"#000000" not in on_dark
    assert colours_of(rendered(figure, "svg")) == before
    picture = Picture("T", "heatmap", figure, "colours")
    outline = Outline(render_page("T", "s", [picture], CONFIG, ENVIRONMENT))
    (source,), (image,) = outline.named("source"), outline.named("img")
    assert source["media"] == "(prefers-color-scheme: dark)"
    sources = [str(source["srcset"]), str(image["src"])]
    decoded = [base64.b64decode(each.partition(",")[2]) for each in sources]
    assert [colours_of(each) for each in decoded] == [on_dark, before]


def test_no_two_lines_of_a_picture_look_alike() -> None:
    """Nor like what stands beside them in grey."""
    looks = [look_of(place) for place in range(40)]
    assert len(set(looks)) == 40
    assert NEUTRAL not in {colour for colour, _ in looks}
