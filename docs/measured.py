"""Runs `trimtab fit METHOD` once for each method and keeps what it printed, for the methods' pages.

python docs/measured.py [METHOD ...]    writes docs/measured.json; half an hour on two cores
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import tempfile
from pathlib import Path

from trimtab.cli import main as trimtab
from trimtab.methods import METHODS

MODEL, CONTRAST = "smollm2-135m-instruct", "builtin:formality"
KEPT = Path(__file__).parent / "measured.json"
#: What methods ask for that no default can say.
MORE = {
    "alphasteer": "--protect builtin:lists",
    "psr": '--ask "Please answer formally."',
}
#: Methods that need what does not come with trimtab: an autoencoder, a mixture of experts.
NEEDY = ("sta", "sae", "steermoe")


def command(method: str) -> str:
    """The command line that a method's page shows."""
    more = f" {MORE[method]}" if method in MORE else ""
    return (
        f"trimtab fit {method} --model {MODEL} --contrast {CONTRAST}{more} -o {method}.safetensors"
    )


def output(line: str) -> str:
    """What a command prints."""
    printed = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.chdir(directory),
        contextlib.redirect_stdout(printed),
    ):
        try:
            trimtab(shlex.split(line)[1:])
        except SystemExit as ended:
            if ended.code:
                raise
    return printed.getvalue()


def main(names: list[str]) -> None:
    """Measure the methods that are named, or all, and keep each as soon as it is there."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    for name in names or [name for name in METHODS if name not in NEEDY]:
        line = command(name)
        kept[name] = {"command": line, "output": output(line)}
        KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(name, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
