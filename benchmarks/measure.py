"""Alternating measurements, and tables of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Clock:
    """Seconds after all pending work on the device is done."""

    device: torch.device
    of_process: bool = False
    """Count CPU seconds of this process: without other processes of the machine, the GPU and the loader's processes."""

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.of_process else time.perf_counter()


@dataclass(frozen=True)
class Ratio:
    """The median over rounds, and the range of their middle half."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """One quotient per round of two measurements."""
        quotients = [a / b for a, b in zip(above, below, strict=True)]
        low, middle, high = statistics.quantiles(quotients, method="inclusive") if quotients[1:] else quotients * 3
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass
class Table:
    """A table in Markdown, its columns aligned so that a terminal shows it as well."""

    title: str
    columns: Sequence[str]
    about: str = ""
    """The explanation of the columns, above the table."""
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Missing measurements with their reasons, below the table."""

    def add(self, *cells: object) -> None:
        assert len(cells) == len(self.columns)
        self.rows.append([str(cell) for cell in cells])

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in (self.columns, ["-" * width for width in widths], *self.rows)
        ]
        parts = [f"### {self.title}", self.about, "\n".join(lines) if self.rows else "", *self.notes]
        return "\n\n".join(part for part in parts if part)


def in_turn(timed: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 0) -> dict[str, list[float]]:
    """Seconds of each, `rounds` times, starting with a different one in every round. `warm_up` rounds are discarded."""
    names = list(timed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-warm_up, rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            took = timed[name]()
            if round_ >= 0:
                seconds[name].append(took)
    return seconds
