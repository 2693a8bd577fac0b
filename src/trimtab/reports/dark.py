"""A picture for a dark page: light text and lines on the page's own ground, lighter colours, and
maps of colours whose middle or beginning is dark."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import Collection
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

#: Maps that begin or have their middle in white, by name, as they are on a dark page: the same hues
#: at the same ends. Others (cividis) begin dark as they are.
_MAPS = {
    "PuOr": ("#ffc06a", "#9a6220", "#1b1b1b", "#5f50a8", "#c0b0ff"),
    "Blues": ("#16222d", "#1f5f99", "#6db6f2", "#d6ecff"),
}
#: Below this saturation a colour is a grey.
_GREY = 0.15


@contextmanager
def dark(figure: Figure) -> Iterator[None]:
    """The figure, which was drawn once, in the colours of a dark page until the block ends."""
    undo: list[Callable[[], Any]] = []
    try:
        for artist in figure.findobj():
            if isinstance(artist, ScalarMappable):
                _turn(undo, artist, "cmap", _dark_map)
        for ground in (figure.patch, *(axes.patch for axes in figure.axes)):
            _turn(undo, ground, "facecolor", lambda _: "none")
        for artist in figure.findobj():
            for name in _colours_of(artist):
                _turn(undo, artist, name, _on_dark)
        yield
    finally:
        for back in reversed(undo):
            back()


def _turn(undo: list[Callable[[], Any]], artist: Any, name: str, to: Callable[[Any], Any]) -> None:
    old = getattr(artist, f"get_{name}")()
    change = getattr(artist, f"set_{name}")
    undo.append(partial(change, old))
    change(to(old))


def _colours_of(artist: Any) -> tuple[str, ...]:
    """The colours that an artist has of its own."""
    if isinstance(artist, Text):
        return ("color",)
    if isinstance(artist, Line2D):
        # The colour last: where a marker has none of its own, it follows it.
        return ("markerfacecolor", "markeredgecolor", "color")
    if isinstance(artist, Patch):
        return ("facecolor", "edgecolor")
    if isinstance(artist, Collection) and artist.get_array() is None:
        return ("facecolor", "edgecolor")
    return ()


def _on_dark(colour: Any) -> Any:
    """A colour, or rows of colours, as it is on a dark ground: greys turned round, others light."""
    if np.ndim(colour) == 2:
        return [_on_dark(one) for one in colour]
    if isinstance(colour, str) and colour == "none":
        return colour
    *rgb, alpha = to_rgba(colour)
    hue, light, saturation = colorsys.rgb_to_hls(*rgb)
    light = 0.93 - 0.84 * light if saturation < _GREY else max(light, 0.6)
    return (*colorsys.hls_to_rgb(hue, light, saturation), alpha)


def _dark_map(light: Colormap) -> Colormap:
    name = light.name.removesuffix("_r")
    if name not in _MAPS:
        return light
    found = LinearSegmentedColormap.from_list(f"dark {name}", _MAPS[name])
    return found.reversed() if light.name.endswith("_r") else found
