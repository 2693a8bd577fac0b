"""The steerings of the playground: files that were named, those of directories, and what is made
here; each with its card. Files that are no steering of this model are named with the reason."""

from __future__ import annotations

import hashlib
import re
import shlex
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from trimtab.contrasts import Contrast, builtins
from trimtab.errors import TrimtabError, shown
from trimtab.exchange import About, base_model_of, search, write_card
from trimtab.files import user_path
from trimtab.methods import explain
from trimtab.model import LanguageModel
from trimtab.serving import Asked, Library, check_name, described
from trimtab.steering import Steering

#: Signs that a name on the shelf does not have.
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(eq=False)
class Shelf:
    """Steerings by name, and the file that each is in. New ones go into the directory `saves`."""

    language_model: LanguageModel
    saves: Path
    force: bool = False
    library: Library = field(init=False)
    #: The file of each steering, as it may be written on a command line (FILE, or FILE@DIAL).
    files: dict[str, str] = field(default_factory=dict)
    #: Files of directories that are no steering of this model, and why.
    refused: dict[str, str] = field(default_factory=dict)
    _saving: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.library = Library(self.language_model, force=self.force)

    def read(self, source: str) -> None:
        """Put a file (FILE or FILE@DIAL) on the shelf, or all that is in a directory. A file that
        was named has to be a steering of this model; of a directory others are left out."""
        directory = user_path(source)
        if not directory.is_dir():
            self._read_file(source)
            return
        for file in sorted(directory.glob("*.safetensors")):
            try:
                if not file.resolve().is_relative_to(directory.resolve()):
                    raise TrimtabError(f"{file} leads out of {source}: copy it there")
                self._read_file(str(file))
            except TrimtabError as error:
                self.refused[file.name] = str(error)

    def _read_file(self, source: str) -> None:
        before = set(self.library.held)
        self.library.read(source)
        for name in set(self.library.held) - before:
            self.files[name] = source

    def keep(self, name: str, steering: Steering) -> Path:
        """Save a steering that was made here, and have it on the shelf at once."""
        with self._saving:
            file = self._new_file(name)
            steering.save(file)
            self._read_file(str(file))
        return file

    def take(self, name: str, content: bytes) -> Path:
        """Put the content of a steering's file on the shelf and into the directory."""
        with self._saving:
            file = self._new_file(name)
            self.library.add(name, content)
            file.write_bytes(content)
            self.files[name] = str(file)
        return file

    def check_free(self, name: str) -> Path:
        """The file of a new steering; refused where the name is no name, or taken."""
        check_name(name)
        file = self.saves / f"{name}.safetensors"
        if name in self.library.held or file.exists():
            raise TrimtabError(f"there is a steering called {name} already: take another name")
        return file

    def _new_file(self, name: str) -> Path:
        file = self.check_free(name)
        self.saves.mkdir(parents=True, exist_ok=True)
        return file

    def steering(self, name: str) -> Steering:
        """One of them by its name."""
        ((_, found),) = self.library.wanted([Asked(name)])
        return found

    # -- for the pages --------------------------------------------------------------------------

    def listed(self) -> list[dict[str, Any]]:
        """All of them, in the order of their names."""
        return [
            {
                **described(name, held),
                "file": self.files.get(name, ""),
                "contrast": str(held.steering.contrast.get("name", "")),
                "where": held.steering.where,
            }
            for name, held in self.library.held.items()
        ]

    def card(self, name: str) -> dict[str, Any]:
        """What one is: in sentences, and as the card that a repository would have."""
        steering = self.steering(name)
        file = self.files.get(name, f"{name}.safetensors")
        path = user_path(file if user_path(file).is_file() else file.rpartition("@")[0])
        content = path.read_bytes() if path.is_file() else b""
        about = About(
            f"you/{_NOT_IN_NAMES.sub('-', name)}",
            base_model_of(steering, None),
            None,
            hashlib.sha256(content).hexdigest(),
            len(content),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {
                "name": name,
                "file": file,
                "says": explain(steering),
                "card": write_card(steering, about),
                "made": steering.date[:10],
                "model": str(steering.model),
            }

    def built_in(self) -> list[dict[str, Any]]:
        """The contrasts that come with trimtab, and the line that fits a steering on each."""
        found = []
        for name in builtins():
            contrast = Contrast.builtin(name)
            model = shlex.quote(self.language_model.name)
            found.append({
                "name": name,
                "rows": len(contrast),
                "positive": contrast.behaviour,
                "negative": contrast.opposite,
                "line": f"trimtab fit caa --model {model} --contrast builtin:{name} "
                f"-o {name}.safetensors",
            })  # fmt: skip
        return found

    def on_hub(self, words: str) -> dict[str, Any]:
        """Steerings on the hub, or one line that says why there are none."""
        try:
            return {"found": search(words, limit=20).as_json()["steerings"], "error": ""}
        except TrimtabError as error:
            return {"found": [], "error": shown(error, 300)}
