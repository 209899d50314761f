"""Published scores: read from CSV files, checked, matched to measured ones. Files and columns: cited/README.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.errors import UserError, invalid
from harness.runs.result import METRICS
from reports.analysis.comparison import Comparison
from reports.read.frames import rows_of


class PublishedScore(BaseModel):
    """One score from a published table."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    setting: str
    dataset: str = Field(min_length=1)
    backbone: str = Field(min_length=1, description="patterns, separated by spaces")
    head: str = Field(min_length=1)
    method: str = Field(min_length=1)
    printed: str
    metric: str = "miou"
    evaluation: Literal["single-scale", "multi-scale"] | None = None
    value: float = Field(ge=0, le=100, description="percent")
    trained_millions: float | None = Field(None, ge=0)
    head_counted: bool | None = None
    memory_mb: float | None = Field(None, ge=0)
    source: str = Field(min_length=1)
    sure: Literal["own", "restated", "notes"]
    note: str = ""

    @field_validator("metric")
    @classmethod
    def _is_metric(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"{metric!r}: known: {', '.join(METRICS)}")
        return metric

    def belongs_to(self, dataset: str, backbone: str, head: str) -> bool:
        """Whether the harness measures the same metric in this setting."""
        return (
            self.evaluation != "multi-scale"
            and (self.dataset, self.head) == (dataset, head)
            and any(fnmatchcase(backbone, pattern) for pattern in self.backbone.split())
        )


def load_published(files: Sequence[Path] = ()) -> list[PublishedScore]:
    """The scores that ship, and those of the user's own files. Raises `UserError` that names file and line."""
    folder = sorted(resources.files("reports").joinpath("cited").iterdir(), key=lambda file: file.name)
    shipped = [file for file in folder if file.name.endswith(".csv")]
    return [score for file in (*shipped, *files) for score in _read(file)]


def _read(file: Traversable | Path) -> Iterator[PublishedScore]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--published {file}: {error.strerror}; name a CSV file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--published {file}: not UTF-8; save it as CSV in UTF-8") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    while True:
        try:
            fields = next(rows, None)
        except csv.Error as error:  # for example, a field of more than 128 KiB
            raise UserError(f"{error}").at(f"--published {file}: line {rows.line_num + 1}") from error
        if fields is None:
            return
        filled = {str(name): value for name, value in fields.items() if value not in ("", None)}
        try:
            yield PublishedScore.model_validate(filled)
        except ValidationError as error:
            problem = invalid(error, PublishedScore.model_fields)
            raise problem.at(f"--published {file}: line {rows.line_num}") from error


def match(published: Sequence[PublishedScore], comparison: Comparison, metric: str) -> pd.DataFrame:
    """One row per published score and setting that it belongs to, measured there or not; in the units of runs.

    `measured` is the mean of the method's label there, `difference` is measured minus published; a method with several
    labels in a setting has a row for each.
    """
    rows = []
    settings = comparison.summary.drop_duplicates("setting")
    for setting in rows_of(settings):
        here = comparison.summary[comparison.summary["setting"] == setting.setting]
        for score in published:
            if score.metric != metric or not score.belongs_to(setting.dataset, setting.backbone, setting.head):
                continue
            measured = here[here["method"] == score.method]
            for label, mean in list(zip(measured["label"], measured["mean"], strict=True)) or [(None, None)]:
                rows.append(
                    {
                        "setting": setting.setting,
                        "setting_name": setting.setting_name,
                        "label": score.printed,
                        "method": score.method,
                        "metric": score.metric,
                        "value": score.value / 100,
                        "trained": None if score.trained_millions is None else score.trained_millions * 1e6,
                        "head_counted": score.head_counted,
                        "source": score.source,
                        "sure": score.sure,
                        "note": score.note,
                        "measured_label": label,
                        "measured": mean,
                        "difference": None if mean is None else mean - score.value / 100,
                    }
                )
    columns = ["setting", "setting_name", "label", "method", "metric", "value", "trained", "head_counted", "source",
               "sure", "note", "measured_label", "measured", "difference"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"value": float, "trained": float, "measured": float,
                                                       "difference": float})  # fmt: skip
