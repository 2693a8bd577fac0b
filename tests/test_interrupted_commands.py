"""Commands with a run directory that Ctrl-C ends: what was made for nothing goes, and the next
start ends as one that was not interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaMLP

from commands import Command, home, trimtab, work, write_rows

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

pytestmark = pytest.mark.usefixtures("undrawn")

PARTS = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
COMMANDS = {
    "dial": "analyse dial --model model --task contrast:parts.jsonl --methods ss --step 180",
    "plane": "analyse plane --model model --contrast parts.jsonl",
    "evaluate": "evaluate --model model --task contrast:parts.jsonl",
    "sweep": "sweep caa --model model --task contrast:parts.jsonl --layer 0,1",
    "compare": "compare 'caa layer=0,1' --model model --task contrast:parts.jsonl --untimed",
    "curve": "strength curve --model model --steer happy.safetensors --raw Today --points 9",
}


@pytest.fixture(autouse=True)
def _texts(work: Path) -> None:
    write_rows(
        "parts.jsonl",
        [
            {"prompt": f"Today {i}", "positive": " I love it", "negative": " no", "part": part}
            for i, part in enumerate(PARTS)
        ],
    )


def figures(found: Any) -> Any:
    """Without times, which differ from run to run, and the paths of pictures."""
    if isinstance(found, dict):
        left = ("seconds", "fit", "swept", "pictures")
        return {key: figures(value) for key, value in found.items() if key not in left}
    return [figures(one) for one in found] if isinstance(found, list) else found


@pytest.mark.parametrize(
    "name",
    [
        name if name == "evaluate" else pytest.param(name, marks=pytest.mark.slow)
        for name in COMMANDS
    ],
)
def test_interrupted_it_leaves_nothing_or_goes_on(
    name: str, trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = trimtab("fit caa --model model --contrast parts.jsonl --layer 1 -o happy.safetensors")
    assert fit.status == 0, fit.err
    command = f"{COMMANDS[name]} --json"
    forward, passes, allowed = LlamaMLP.forward, 0, 10**9

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > allowed:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    whole = trimtab(f"{command} -o whole")
    assert whole.status == 0, whole.err
    many, expected = passes, figures(json.loads(whole.out))
    for interrupted_at in sorted({0, 1, many // 3, many - 1}):
        passes, allowed = 0, interrupted_at
        folder = Path(f"run{interrupted_at}")
        result = trimtab(f"{command} -o {folder}")
        assert result.status == 130, (result.status, result.err)
        assert interrupted_at or not folder.exists()
        left = {path.name for path in folder.rglob("*") if path.is_file()}
        assert left - {".lock", "config.json", "environment.json"} or not folder.exists()
        allowed = 10**9
        again = trimtab(f"{command} -o {folder}")
        assert again.status == 0, again.err
        assert figures(json.loads(again.out)) == expected
