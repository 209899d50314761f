"""The colour and marker of each method, by its name: the same in every plot and on the page.

Six hues and twelve markers. The hues are distinguishable with normal sight and with each of the three colour
blindnesses, on white and on the page's dark background; the markers are distinguishable without colour.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import pandas as pd
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path

from studies.study import HEAD_ONLY

if TYPE_CHECKING:
    from matplotlib.typing import LineStyleType

T = TypeVar("T")

INK, MUTED, GRID, PAPER = "#15181c", "#59626e", "#e3e7ec", "#ffffff"
"""Of the plot files. `DARK` has the colours that replace them in the page's dark theme."""

HUES = ("#1f6fab", "#c15400", "#1d9e7a", "#b37bd5", "#cb8614", "#60289f")
DARK = {
    INK: "#f1f3f6",
    MUTED: "#a3adba",
    GRID: "#2b323b",
    PAPER: "#14181d",
    **dict(zip(HUES, ("#5dc2f7", "#fd7c2b", "#22b17c", "#e68ebb", "#f1c955", "#9b8bfb"), strict=True)),
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", ">", "*")
SIZES = {"*": 1.5, "P": 1.2, "X": 1.2, "s": 0.9, "D": 0.85}
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (1.4, 1.4), (6, 1.6, 1.4, 1.6))

REFERENCES = {"full": "s", "linear": "o"}
"""The references, which delimit the range of methods: black, without a hue."""
LINES = {"full": (5, 3), "linear": (1, 2), HEAD_ONLY: (1, 2)}
"""The dashes of the lines at the scores of the references, by their labels as shown."""

SHIPPED = [
    "spm",
    "lora",
    "adapter",
    "vpt_deep",
    "norm",
    "partial",
    "ssf",
    "bias",
    "side",
    "dora",
    "adaptformer",
    "rein",
    "mona",
    "conv_adapter",
    "vpt_shallow",
    "convpass",
    "oft",
    "lorand",
    "fact",
    "repadapter",
    "vpt_pad",
    "loha",
    "lokr",
    "ia3",
    "hra",
]
"""A method's position determines its style: only append to this list."""


@dataclass(frozen=True)
class SeriesStyle:
    """A colour (of the light theme), a marker in matplotlib's letters, and the dashes of a line."""

    colour: str
    marker: str
    dashes: tuple[float, ...]

    @property
    def line(self) -> LineStyleType:
        """As matplotlib's `linestyle`."""
        return (0.0, self.dashes) if self.dashes else "-"

    @property
    def size(self) -> float:
        """Scale of the marker, so that all look equally large."""
        return SIZES.get(self.marker, 1.0)


PAIRS = [(HUES[number % len(HUES)], MARKERS[(number + number // len(HUES)) % len(MARKERS)]) for number in range(72)]
"""Every pair of hue and marker once; neighbours differ in both."""


def series_styles(methods: Mapping[str, str]) -> dict[str, SeriesStyle]:
    """The style of each label, from {label: method}.

    A method outside `SHIPPED` has a style by the hash of its name. Several labels of one method share its hue and
    differ in marker and dashes; the method's plain name, where it is one of them, has the method's own marker.
    """
    own: dict[str, tuple[str, str]] = {}
    for method in sorted(set(methods.values())):
        own[method] = _own(method, set(own.values()))
    taken = set(own.values())
    styles: dict[str, SeriesStyle] = {}
    seen: dict[str, int] = {}
    for label in sorted(methods, key=lambda label: (methods[label], label != methods[label], label)):
        hue, marker = own[methods[label]]
        number = seen[methods[label]] = seen.get(methods[label], -1) + 1
        if number:
            marker = next((m for m in _rotated(MARKERS, MARKERS.index(marker)) if (hue, m) not in taken), marker)
            taken.add((hue, marker))
        styles[label] = SeriesStyle(hue, marker, DASHES[(MARKERS.index(marker) + number) % len(DASHES)])
    return styles


def styles_of(runs: pd.DataFrame, published: pd.DataFrame) -> dict[str, SeriesStyle]:
    """The styles of all labels of a report, and of the methods of its published scores by their names."""
    cited = [str(method) for method in published.method]
    return series_styles({**dict(zip(cited, cited, strict=True)), **dict(zip(runs.label, runs.method, strict=True))})


def _own(method: str, taken: set[tuple[str, str]]) -> tuple[str, str]:
    if method in REFERENCES:
        return INK, REFERENCES[method]
    if method in SHIPPED:
        return PAIRS[SHIPPED.index(method)]
    first = int(hashlib.sha256(method.encode()).hexdigest(), 16) % len(PAIRS)
    pairs = _rotated(PAIRS, first)
    return next((pair for pair in pairs if pair not in taken and pair not in PAIRS[: len(SHIPPED)]), pairs[0])


def _rotated(values: Sequence[T], first: int) -> list[T]:
    return [*values[first:], *values[:first]]


@cache
def outline(marker: str) -> str:
    """A marker as the `d` of an SVG path: a circle of radius 1, and the others equally large."""
    style = MarkerStyle(marker)
    path = style.get_path().transformed(style.get_transform())
    scale = 2 * SIZES.get(marker, 1.0)
    letters = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}
    parts = []
    for points, code in path.iter_segments():
        numbers = " ".join(f"{value:.3g}" for value in (points.reshape(-1, 2) * [scale, -scale]).ravel() + 0.0)
        parts.append("Z" if code == Path.CLOSEPOLY else letters[code] + numbers)
    return "".join(parts)


def variable(colour: str) -> str:
    """The page's CSS variable for a colour of the light theme."""
    named = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
    return named.get(colour) or f"--hue{HUES.index(colour)}"


def theme(dark: bool) -> dict[str, str]:
    """CSS variables and their values, for one of the page's themes."""
    return {variable(light): night if dark else light for light, night in DARK.items()}


def themed(svg: str) -> str:
    """An SVG that follows the page's theme when it is inlined: colours become variables."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var({variable(found[0])})" if found[0] in DARK else found[0], svg)
