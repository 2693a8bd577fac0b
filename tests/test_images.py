"""Images in messages: how they are read from files and objects, what is refused, and what a
contrast, its digest and its files make of them."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

import trimtab as tt
from seeing import about, saved, square
from trimtab.contrasts import Image, check, images_in, last_message, read_prompt
from trimtab.contrasts.images import MOST_PIXELS


def pair(*parts: Any) -> tuple[Any, str, str]:
    return about(*parts), " yes", " no"


def refusal(value: Any) -> str:
    with pytest.raises(tt.TrimtabError) as caught:
        read_prompt(value, "here")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- one image ------------------------------------------------------------------------------------


def test_a_file_and_an_image_of_pil(tmp_path: Path) -> None:
    (red, *_) = saved(tmp_path)
    prompt = read_prompt(about("What? ", red), "here")
    (image,) = images_in(prompt)
    assert image.path == red
    assert image.digest == hashlib.sha256(Path(red).read_bytes()).hexdigest()
    assert image.opened().tobytes() == square("red").tobytes()
    (held,) = images_in(read_prompt(about(square("red")), "here"))
    assert held.opened().tobytes() == square("red").tobytes()
    assert str(held) == "[image 24x20]"
    (other,) = images_in(read_prompt(about(square("blue")), "here"))
    assert other.digest != held.digest
    path = [{"role": "user", "content": [{"type": "image", "path": red}]}]
    assert images_in(read_prompt(path, "here")) == (image,)
    assert read_prompt(prompt, "again") == prompt


def test_text_in_parts_is_text() -> None:
    parts = [{"type": "text", "text": "Today "}, {"type": "text", "text": "I feel"}]
    assert read_prompt([{"role": "user", "content": parts}], "here") == (("user", "Today I feel"),)


def test_the_way_up_and_the_colours(tmp_path: Path) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turned by a quarter
    square("red", (30, 10)).save(tmp_path / "turned.jpg", exif=exif)
    square("red").convert("LA").save(tmp_path / "grey.png")
    found = read_prompt(about("x", Image(str(tmp_path / "turned.jpg"), "")), "here")
    assert images_in(found)[0].path.endswith("turned.jpg")
    for name, size in (("turned.jpg", (10, 30)), ("grey.png", (24, 20))):
        content = [{"type": "image", "image": str(tmp_path / name)}]
        (image,) = images_in(read_prompt([("user", content)], "here"))
        assert (image.opened().size, image.opened().mode) == (size, "RGB")


def test_what_is_no_image_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (red, *_) = saved(tmp_path)
    (tmp_path / "half.png").write_bytes(Path(red).read_bytes()[:60])
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, said in (
        ("missing.png", "cannot be read: No such file"),
        ("", "is not a file"),
        ("text.png", "is no image that can be read: known are PNG, JPEG"),
        ("page.eps", "is no image that can be read: known are PNG, JPEG"),
        ("half.png", "is no image that can be read: "),
    ):
        content = [{"type": "image", "image": str(tmp_path / name)}]
        message = refusal([{"role": "user", "content": content}])
        assert said in message
        assert message.startswith("here: ")


@pytest.mark.parametrize(
    "address", ["https://example.org/cat.png", "http://x/y", "file:///etc/x.png", "data:image/png,"]
)
def test_nothing_is_fetched(address: str) -> None:
    for key in ("image", "path", "url"):
        said = refusal([{"role": "user", "content": [{"type": "image", key: address}]}])
        assert "is an address, and nothing is fetched: download the image" in said


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "film.mp4"},
        {"type": "image"},
        {"type": "image", "image": "a.png", "path": "b.png"},
        {"type": "text"},
        {"type": "image_url", "image_url": {"url": "https://example.org"}},
        7,
    ],
)
def test_other_parts_are_refused(part: Any) -> None:
    said = refusal([{"role": "user", "content": [part]}])
    assert 'a part of a message must be {"type": "text", "text": TEXT} or {"type": "image"' in said


@pytest.mark.parametrize("source", [7, ["a.png"], b"bytes", {"x": 1}])
def test_what_an_image_may_be(source: Any) -> None:
    said = refusal([{"role": "user", "content": [{"type": "image", "image": source}]}])
    assert "write the path of a file, or give an image of PIL" in said


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes that says that it is huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + name + data
        chunks += struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.mark.parametrize("side", [8200, 10_000, 60_000])
def test_a_bomb_is_not_unpacked(tmp_path: Path, side: int) -> None:
    assert side * side > MOST_PIXELS
    path = bomb(tmp_path / "bomb.png", side, side)
    said = refusal([{"role": "user", "content": [{"type": "image", "image": str(path)}]}])
    assert "bomb.png has more than 67 million pixels: make it smaller" in said


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    (red, *_) = saved(tmp_path)
    (image,) = images_in(read_prompt(about(red), "here"))
    square("blue").save(red)
    with pytest.raises(tt.TrimtabError, match="red.png. has changed since it was read"):
        image.opened()


# -- contrasts ------------------------------------------------------------------------------------


def rows(*images: str) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {"type": "text", "text": "What is this?"},
                    ],
                }
            ],
            "positive": " good",
            "negative": " bad",
        }
        for image in images
    ]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    (tmp_path / "sub" / "pictures").mkdir(parents=True)
    saved(tmp_path / "sub" / "pictures")
    file = tmp_path / "sub" / f"pairs.{ending}"
    given = rows("pictures/red.png", str(tmp_path / "sub" / "pictures" / "blue.png"))
    if ending == "csv":
        import csv

        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ["prompt", "positive", "negative"])
            writer.writeheader()
            writer.writerows({**row, "prompt": json.dumps(row["prompt"])} for row in given)
    elif ending == "json":
        file.write_text(json.dumps(given))
    else:
        file.write_text("\n".join(map(json.dumps, given)))
    monkeypatch.chdir(tmp_path)
    contrast = tt.Contrast.from_file(f"sub/pairs.{ending}")
    first, second = (images_in(pair.prompt)[0] for pair in contrast.pairs)
    assert first.path == "sub/pictures/red.png"
    assert second.path == str(tmp_path / "sub" / "pictures" / "blue.png")
    assert last_message(contrast.pairs[0].prompt) == "[image sub/pictures/red.png] What is this?"


def test_it_is_written_as_seen_from_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    saved(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows("red.png"))))
    contrast = tt.Contrast.from_file("a/pairs.jsonl")
    written = contrast.to_jsonl("b/again.jsonl")
    assert '"image": "../a/red.png"' in written.read_text()
    again = tt.Contrast.from_file(written)
    assert again.digest == contrast.digest
    held = tt.Contrast.from_pairs([pair(square("red"))])
    with pytest.raises(tt.TrimtabError, match="in memory only: save it, and give the path"):
        held.to_jsonl(tmp_path / "held.jsonl")
    assert not (tmp_path / "held.jsonl").exists()


def test_a_digest_is_of_what_images_hold(tmp_path: Path) -> None:
    red, green, *_ = saved(tmp_path)
    (tmp_path / "copy.png").write_bytes(Path(red).read_bytes())
    digests = [
        tt.Contrast.from_pairs([pair("What? ", image)]).digest
        for image in (red, str(tmp_path / "copy.png"), green)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_digest_of_text_is_what_it_was() -> None:
    """Recorded before there were images."""
    contrast = tt.Contrast.from_pairs(
        [("Today I feel", " happy", " sad"), ([("user", "How are you?")], "Well.", "Bad.")]
    )
    content = '[["Today I feel"," happy"," sad"],[[["user","How are you?"]],"Well.","Bad."]]'
    assert contrast.digest == hashlib.sha256(content.encode()).hexdigest()


def test_prompts_are_alike_whose_images_are(tmp_path: Path) -> None:
    red, green, *_ = saved(tmp_path)
    (tmp_path / "copy.png").write_bytes(Path(red).read_bytes())
    alike = tt.Contrast.from_pairs(
        [pair("What? ", red), pair("what?", str(tmp_path / "copy.png")), pair("What? ", green)]
    )
    parts = [row.part for row in alike.split(0.0, 0.34, seed=1).rows]
    assert parts[0] == parts[1]
    found = check(alike)
    assert found.lengths["prompt"].most > 1


def test_a_mistake_in_a_file_names_its_row(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    saved(tmp_path)
    file.write_text("\n".join(map(json.dumps, rows("red.png", "missing.png"))))
    with pytest.raises(tt.TrimtabError, match="pairs.jsonl, row 2: the image .*missing.png") as got:
        tt.Contrast.from_file(file)
    assert "\n" not in str(got.value)


def test_sides_are_text(tmp_path: Path) -> None:
    (red, *_) = saved(tmp_path)
    answer = [{"role": "assistant", "content": [{"type": "image", "image": red}]}]
    chosen = [{"role": "user", "content": "Draw"}, *answer]
    rejected = [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": "no"}]
    file = tmp_path / "drawn.jsonl"
    file.write_text(json.dumps({"chosen": chosen, "rejected": rejected}))
    with pytest.raises(tt.TrimtabError, match="positive and negative must be text"):
        tt.Contrast.from_file(file)


def test_a_prompt_in_words() -> None:
    messages = about("What? ", "red.png")
    as_read = (("user", ("What? ", Image("red.png", "00"))),)
    from_json = json.loads(json.dumps(as_read))
    for prompt in (messages, as_read, from_json):
        assert last_message(prompt) == "What?  [image red.png]"
    assert last_message([{"role": "user", "content": "Hello"}]) == "Hello"
