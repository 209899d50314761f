"""SVG in the page: a plot's file as an element in the page's colours, and the markers of methods."""

from __future__ import annotations

from xml.etree import ElementTree

from markupsafe import Markup

from reports.render.plots.saving import SavedPlot
from reports.render.style import SeriesStyle, outline, themed, variable


def inlined(plot: SavedPlot) -> str:
    """A plot's SVG as an element: in the page's colours, its ids unique on the page, without metadata."""
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(plot.svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in (f"{svg}metadata", f"{svg}style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(svg)
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            element.set(name.rpartition("}")[2], _attribute(name.rpartition("}")[2], value, plot.name))
    points = float(root.attrib["width"].removesuffix("pt"))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("style", f"min-width: {0.95 * points:.0f}px; max-width: {1.6 * points:.0f}px")
    root.set("role", "img")
    root.set("aria-label", f"{plot.title}. {plot.caption}")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _attribute(name: str, value: str, prefix: str) -> str:
    """An attribute's value: ids with a prefix, colours as the page's variables."""
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return value.replace("#", f"#{prefix}-", 1)
    if name == "clip-path":
        return value.replace("url(#", f"url(#{prefix}-")
    return themed(value) if name == "style" else value


def marker(style: SeriesStyle) -> Markup:
    """A method's marker, as large as the text next to it."""
    return Markup(
        '<svg class="mark" viewBox="-1.2 -1.2 2.4 2.4" aria-hidden="true"><path d="{}" fill="var({})"/></svg>'
    ).format(outline(style.marker), variable(style.colour))
