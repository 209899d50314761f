"""Formats the numbers of a report: percent or share, decimals, decimal sign, and the units of costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from harness.runs.result import Unit

DASH = "–"


@dataclass(frozen=True)
class NumberFormat:
    """How numbers are written; the same in every table."""

    unit: Literal["percent", "share"] = "percent"
    decimals: int | None = None
    """Of scores; None: 2 in percent, 4 as a share."""
    sign: Literal[".", ","] = "."

    @property
    def score_unit(self) -> str:
        """The end of a heading of scores."""
        return " (%)" if self.unit == "percent" else ""

    @property
    def difference_unit(self) -> str:
        return " (points)" if self.unit == "percent" else ""

    def score(self, value: float) -> str:
        """A share, such as an mIoU."""
        return self._share(value, "")

    def difference(self, value: float) -> str:
        """The difference of two scores, with its sign."""
        return self._share(value, "+")

    def plain(self, value: float) -> str:
        return DASH if math.isnan(value) else self._localised(f"{value:.2f}")

    def percent(self, value: float) -> str:
        """A share that is not a score, such as a win rate."""
        return DASH if math.isnan(value) else self._localised(f"{100 * value:.1f}")

    def whole(self, value: float) -> str:
        return DASH if math.isnan(value) else self._localised(f"{value:.0f}")

    def short(self, value: float) -> str:
        """Three significant digits; all digits before the decimal sign. A dash for NaN and infinity."""
        if not math.isfinite(value):
            return DASH
        if value == 0:
            return "0"
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return self._localised(f"{value:.{digits}f}")

    def p(self, value: float) -> str:
        return DASH if math.isnan(value) else self._localised("< 0.001" if value < 0.001 else f"{value:.3f}")

    def _share(self, value: float, sign: str) -> str:
        percent = self.unit == "percent"
        decimals = (2 if percent else 4) if self.decimals is None else self.decimals
        return DASH if math.isnan(value) else self._localised(f"{value * (100 if percent else 1):{sign}.{decimals}f}")

    def _localised(self, text: str) -> str:
        return text.replace("-", "−").replace(".", self.sign)


SIZES = {
    "%": 0.01,
    "M": 1e6,
    "MiB": 2**20,
    "GiB": 2**30,
    "h": 3600,
    "min": 60,
    "s": 1,
    "1/s": 1,
    "×": 1,
    "TFLOPs": 1e12,
}
"""The factor of each unit, in the unit of the data."""

UNITS: dict[Unit, tuple[str, ...]] = {
    "share": ("%",),
    "count": ("M",),
    "bytes": ("MiB",),
    "seconds": ("h", "min", "s"),
    "rate": ("1/s",),
    "ratio": ("×",),
    "flops": ("TFLOPs",),
}
"""The possible units of a column."""
