"""Plots as files: PNG, SVG and PDF. The same plot gives the same bytes, without dates and versions."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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


@dataclass(frozen=True)
class SavedPlot:
    """A plot's files and caption."""

    name: str
    section: str
    title: str
    caption: str
    files: tuple[Path, ...]

    @classmethod
    def of(cls, plot: Plot, folder: Path) -> SavedPlot:
        files = tuple(folder / f"{plot.name}.{suffix}" for suffix in FORMATS)
        return cls(plot.name, plot.section, plot.title, plot.caption, files)

    @property
    def svg(self) -> str:
        return next(path for path in self.files if path.suffix == ".svg").read_text(encoding="utf-8")


def save(plot: Plot, folder: Path) -> SavedPlot:
    """Write every format of one plot."""
    _freeze_layout(plot.figure)
    saved = SavedPlot.of(plot, folder)
    for path, write in zip(saved.files, FORMATS.values(), strict=True):
        with atomically(path) as temporary:
            write(plot.figure, temporary)
    return saved


def save_all(plots: Iterable[Plot], folder: Path) -> list[SavedPlot]:
    """Save each plot in its own process, as many at once as there are cores, while the next one is drawn."""
    fork = multiprocessing.get_context("fork")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    running: deque[tuple[Plot, BaseProcess]] = deque()
    saved = []

    def finish() -> None:
        plot, process = running.popleft()
        process.join()
        if process.exitcode:
            save(plot, folder)
        saved.append(SavedPlot.of(plot, folder))

    for plot in plots:
        process = fork.Process(target=_try_to_save, args=(plot, folder))
        process.start()
        running.append((plot, process))
        if len(running) == cores:
            finish()
    while running:
        finish()
    return saved


def _try_to_save(plot: Plot, folder: Path) -> None:
    try:
        save(plot, folder)
    except Exception:
        sys.exit(1)  # the parent process saves it again, and raises there


def _freeze_layout(figure: Figure) -> None:
    """Lay the figure out once, not for each file."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
