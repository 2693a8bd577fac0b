"""What other packages add to trimtab, by entry points.

A package names what it adds in its pyproject.toml, for example

    [project.entry-points."trimtab.methods"]
    pull = "my_package:Pull"

and so methods, operators, tasks and architectures (`trimtab.operators`, `trimtab.tasks`,
`trimtab.architectures`) of installed packages stand beside trimtab's own. See
examples/trimtab_plugin.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from trimtab.errors import TrimtabError, TrimtabWarning, shown

T = TypeVar("T")


class Extended(Mapping[str, T]):
    """trimtab's own things of one kind by name, and after them those of installed packages.

    Packages are read when a name is asked for that is not trimtab's own, or all names are. What
    cannot be loaded is left out with a warning, and refused with the reason when it is asked for.
    `fits` says whether an object is of this kind and goes by the entry's name.
    """

    def __init__(self, kind: str, own: Mapping[str, T], fits: Callable[[Any, str], bool]) -> None:
        self._kind, self._own, self._fits = kind, own, fits

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        loaded, refused = self._added
        if name in refused:
            raise TrimtabError(refused[name])
        return loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._added[0]

    def __len__(self) -> int:
        return len(self._own) + len(self._added[0])

    @cached_property
    def _added(self) -> tuple[dict[str, T], dict[str, str]]:
        """What packages add, by name; and why something of theirs is left out."""
        loaded: dict[str, T] = {}
        refused: dict[str, str] = {}
        points = entry_points(group=f"trimtab.{self._kind}s")
        for point in sorted(points, key=lambda point: (point.name, _package(point))):
            try:
                if point.name in self._own or point.name in loaded:
                    raise TrimtabError(f"there is another {self._kind} of that name")
                loaded[point.name] = self._load(point)
            except TrimtabError as error:
                reason = (
                    f"the {self._kind} {point.name} of the package {_package(point)} is left out: "
                    f"{error}; repair or uninstall the package"
                )
                refused.setdefault(point.name, reason)
                warnings.warn(reason, TrimtabWarning, stacklevel=2)
        return loaded, refused

    def _load(self, point: EntryPoint) -> T:
        try:
            added = point.load()
        # Whatever goes wrong in another's code, the rest should work.
        except Exception as error:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise TrimtabError(f"it cannot be loaded, {shown(why, 200)}") from error
        if not self._fits(added, point.name):
            raise TrimtabError(f"{point.value} is no {self._kind} of that name")
        found: T = added
        return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "of no name"
