"""How a contrast was made stands in a file beside it, and goes along with its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import refused_in_one_line
from trimtab.contrasts import Contrast, made_beside

ROWS = [("Why?", " because", " so"), ("When?", " now", " then")]
ABOUT: dict[str, Any] = {"wish": "brief", "counts": {"kept": 2}, "questions": [{"text": "Why?"}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "pairs.jsonl"
    Contrast(Contrast.from_pairs(ROWS).rows, made=ABOUT).to_jsonl(written)
    return written


def test_it_comes_back_with_the_rows(path: Path) -> None:
    assert sorted(file.name for file in path.parent.iterdir()) == ["pairs.jsonl", "pairs.made.json"]
    contrast = Contrast.from_jsonl(path)
    assert contrast.made == {**ABOUT, "digest": contrast.digest}
    assert Contrast.from_file(path).made == contrast.made
    assert contrast == Contrast(Contrast.from_pairs(ROWS).rows, str(path))  # it is no part of it
    for other in (contrast.take(1), contrast.resample(), contrast.split(0.5, 0)):
        assert other.made == contrast.made
    assert contrast.made_in_short == {
        "wish": "brief", "counts": {"kept": 2}, "digest": contrast.digest
    }  # fmt: skip
    assert Contrast.from_pairs(ROWS).made is None
    assert Contrast.from_pairs(ROWS).made_in_short == {}


def test_rows_that_were_edited_say_so(path: Path) -> None:
    path.write_text(path.read_text().replace("because", "as it is"))
    assert Contrast.from_jsonl(path).made == {
        **ABOUT, "digest": Contrast.from_pairs(ROWS).digest, "edited": True
    }  # fmt: skip


def test_other_rows_do_not_inherit_it(path: Path) -> None:
    Contrast.from_pairs(ROWS[:1]).to_jsonl(path, overwrite=True)
    assert not made_beside(path).exists()
    assert Contrast.from_jsonl(path).made is None


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b'{"a": NaN}'])
def test_a_damaged_one_is_named(content: bytes, path: Path) -> None:
    made_beside(path).write_bytes(content)
    refused_in_one_line(lambda: Contrast.from_jsonl(path), r"pairs\.made\.json")


def test_both_files_are_refused_where_they_exist(path: Path) -> None:
    contrast = Contrast.from_jsonl(path)
    path.unlink()
    made_beside(path).write_text(json.dumps({"mine": 1}))
    refused_in_one_line(lambda: contrast.to_jsonl(path), r"pairs\.made\.json exists")
    assert not path.exists()
