"""What an export is asked for, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.model import LanguageModel
from trimtab.steering import Steering


@dataclass(frozen=True)
class Request:
    """What is to be written, and where. The steerings fit the model, and act in this order."""

    language_model: LanguageModel
    steerings: tuple[Steering, ...]
    output: Path
    overwrite: bool = False
    #: Write the part that the format can carry, and say what is left, instead of refusing.
    split: bool = False
    #: The steerings may have been made for another model.
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written: its files, and whether a program that reads them computes what the steering
    does when it is attached, rounding in float32 apart."""

    format: str
    files: tuple[Path, ...]
    exact: bool = True
    #: With `split`: what the format cannot carry, each with the reason.
    left_out: tuple[str, ...] = ()
    #: What else is to be said of the files, by name.
    details: dict[str, Any] = field(default_factory=dict)
    #: For people: lines of other programs that put the files to use.
    use: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "format": self.format,
            "files": [str(file) for file in self.files],
            "exact": self.exact,
            "left_out": list(self.left_out),
            **self.details,
        }
