"""Plots as files: SVG, PDF and PNG. The same plot gives the same bytes, without dates and versions."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from harness.util.cores import cores
from harness.util.files import atomically
from reports.render.plots.context import Plot

FORMATS: dict[str, Callable[[Figure, Path], None]] = {
    "png": lambda figure, path: FigureCanvasAgg(figure).print_png(path, metadata={"Software": None}),
    "svg": lambda figure, path: FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None, "Creator": None}),
    "pdf": lambda figure, path: FigureCanvasPdf(figure).print_pdf(
        path, metadata={"CreationDate": None, "Creator": None, "Producer": None}
    ),
}
"""Straight to the canvases: `savefig` would draw everything once more to find a layout that is fixed already."""
DEFAULT = ("svg",)
"""What the page needs. Each further format takes as long as drawing the plot, or longer."""


@dataclass(frozen=True)
class SavedPlot:
    """A plot's files and caption."""

    name: str
    section: str
    title: str
    caption: str
    files: tuple[Path, ...]

    @property
    def svg(self) -> str:
        return next(path for path in self.files if path.suffix == ".svg").read_text(encoding="utf-8")


def save(plot: Plot, folder: Path, formats: Sequence[str] = DEFAULT) -> SavedPlot:
    """Write one plot in each of `formats`, from `FORMATS`."""
    _freeze_layout(plot.figure)
    files = tuple(folder / f"{plot.name}.{suffix}" for suffix in formats)
    for path, suffix in zip(files, formats, strict=True):
        with atomically(path) as temporary:
            FORMATS[suffix](plot.figure, temporary)
    return SavedPlot(plot.name, plot.section, plot.title, plot.caption, files)


PlotSource = Iterator[Plot]
_sources: Sequence[PlotSource] = ()
"""What the processes of `saving` inherit: drawing code cannot be sent to them."""


@contextlib.contextmanager
def saving(
    sources: Sequence[PlotSource], folder: Path, formats: Sequence[str]
) -> Iterator[Callable[[], list[SavedPlot]]]:
    """Draw and save the plots in as many processes as there are cores, while the caller continues.

    Yields a function that waits for them and returns them in the order of their sources.
    """
    global _sources
    folder.mkdir(parents=True, exist_ok=True)
    executor = ProcessPoolExecutor(min(len(cores()), max(len(sources), 1)), multiprocessing.get_context("fork"))
    try:
        _sources = sources
        waiting = [executor.submit(_save_source, number, folder, formats) for number in range(len(sources))]
        _sources = ()
        yield lambda: [plot for future in waiting for plot in future.result()]
    finally:
        executor.shutdown(cancel_futures=True)


def _save_source(number: int, folder: Path, formats: Sequence[str]) -> list[SavedPlot]:
    return [save(plot, folder, formats) for plot in _sources[number]]


def _freeze_layout(figure: Figure) -> None:
    """Lay the figure out once, not for each file."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
