"""What README and docs show is run: Python blocks as one script a file, `trimtab` lines too."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from trimtab.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def test_every_page_is_found() -> None:
    assert {page.name for page in PAGES} >= {"README.md", "guide.md", "methods.md"}
    assert blocks(PAGES[0], "python")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = "\n".join(blocks(page, "python"))
    exec(compile(script, str(page), "exec"), {"__name__": "docs"})
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            # `trimtab demo` takes minutes and has its own slow test.
            if line.startswith("trimtab ") and not line.startswith("trimtab demo"):
                with pytest.raises(SystemExit) as ended:
                    main(shlex.split(line)[1:])
                assert ended.value.code == 0, (line, capsys.readouterr().err)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
