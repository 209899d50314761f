"""The result of a run, written by the engine and read by everything else, and the list of its measures.

A new cost needs a field and a `Measure` here, and its measurement in the engine. Tables, plots, the page, searches,
lists and MLflow use the list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from harness.spec import Spec


class _Part(BaseModel):
    """Fields that a later version adds are ignored; numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, populate_by_name=True)


Score = float | None
"""In 0..1; None where it is not defined."""


class ClassScores(_Part):
    """The scores of one class; null where the denominator is zero."""

    name: str
    iou: Score = Field(ge=0, le=1, description="TP / (label + prediction - TP)")
    acc: Score = Field(ge=0, le=1, description="TP / label")
    dice: Score = Field(ge=0, le=1, description="2 TP / (label + prediction)")


class Scores(_Part):
    """The metrics of the sum of all images' confusion matrices, by `harness.runs.metrics`."""

    miou: Score = Field(ge=0, le=1, description="mean IoU of the classes that have one")
    macc: Score = Field(ge=0, le=1, description="mean accuracy of the classes")
    aacc: Score = Field(ge=0, le=1, description="accuracy of all pixels")
    mdice: Score = Field(ge=0, le=1, description="mean Dice of the classes")
    absent_classes: int = Field(ge=0, description="classes in neither labels nor predictions, left out of the means")
    per_class: tuple[ClassScores, ...] = Field(description="in the order of the labels")

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The classes of which the evaluated images hold no label. Their IoU is 0 if they are predicted anywhere, and
        not defined if not."""
        return tuple(found.name for found in self.per_class if found.acc is None)

    @property
    def only_found(self) -> str | None:
        """The only class of which a pixel is predicted right, where others are labelled too; None where there are
        several, or none. A network that calls everything background is the usual case."""
        labelled = [found for found in self.per_class if found.acc is not None]
        found = [one.name for one in labelled if one.acc]
        return found[0] if len(found) == 1 < len(labelled) else None


def about_only_found(found: Sequence[str | None]) -> str:
    """`finds only brick`, or `1 of 5 runs finds only brick`, from the runs' `Scores.only_found`; empty where there is
    none."""
    counts = Counter(name for name in found if name)
    return ", ".join(
        f"finds only {name}"
        if count == len(found)
        else f"{count} of {len(found)} runs {'finds' if count == 1 else 'find'} only {name}"
        for name, count in sorted(counts.items())
    )


ONLY_FOUND = "of no other class is a pixel predicted right"
"""What `about_only_found` means, for notes that have room for it."""


class Parameters(_Part):
    """Numbers of scalars. `trainable` = `method` + `head`; `auxiliary`: a head that exists in training only; `backbone`
    is the pre-trained network, frozen or not."""

    method: int = Field(ge=0)
    head: int = Field(ge=0)
    trainable: int = Field(ge=0)
    auxiliary: int = Field(0, ge=0)
    backbone: int = Field(ge=0)


class Inference(_Part):
    """Seconds of one forward pass at the crop's size: with the method, and of the backbone alone."""

    adapted_seconds: float = Field(gt=0)
    backbone_seconds: float = Field(gt=0)
    ratio: float = Field(gt=0, description="the first over the second")


class Reuse(_Part):
    """How much was read from the feature cache. It changes no score."""

    frozen_stages: int = Field(
        validation_alias=AliasChoices("frozen_stages", "untouched_stages"),
        ge=0,
        description="how many of the first stages the method leaves as they were",
    )
    training: float = Field(ge=0, description="share of the training passes")
    evaluation: float = Field(ge=0, description="share of the evaluation passes")
    spent_seconds: float = Field(ge=0, description="of this run's training, with the cache")


class Provenance(_Part):
    """The provenance of a result. Fields that no other code reads are not validated."""

    model_config = ConfigDict(frozen=True, extra="allow")

    commit: str | None = Field(None, description="of the harness's code")
    dirty: bool | None = Field(None, description="whether the code differed from that commit")
    device: str | None = None
    weights: dict[str, Any] = Field(default_factory=dict, description="where the backbone's weights came from")


class RunResult(_Part):
    """`result.json`, the last file of a run: if it is present and valid, the run is done."""

    status: Literal["done"] = "done"
    fingerprint: str
    spec: Spec
    metrics: Scores
    parameters: Parameters
    delta_bytes: int = Field(ge=0, description="size of `delta.safetensors`")
    steps: int = Field(ge=0, description="optimiser steps")
    images: int = Field(ge=0, description="training images seen, with repetitions")
    train_seconds: float = Field(
        ge=0, description="without evaluation; what was read from a cache counts the time of the run that computed it"
    )
    images_per_second: float = Field(ge=0, description="of the training, as `train_seconds`")
    data_wait: float = Field(ge=0, description="share of the training time that the step waited for data")
    peak_memory_bytes: int | None = Field(description="during training; None: not measured")
    train_flops: int | None = Field(description="of the whole training; None: not counted")
    inference: Inference
    reuse: Reuse
    provenance: Provenance
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of the files that the run ended with")
    digest: str | None = Field(None, description="SHA-256 of the other fields; None: the run is older than this field")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd about the dataset or the weights; empty for runs of earlier versions."""
        recorded = self.provenance.model_extra or {}
        data, norm = recorded.get("data"), recorded.get("normalisation")
        of_data = data.get("warnings") if isinstance(data, dict) else None
        of_norm = norm.get("warning") if isinstance(norm, dict) else None
        return (*map(str, of_data if isinstance(of_data, list) else ()), *([str(of_norm)] if of_norm else ()))


Unit = Literal["share", "count", "bytes", "seconds", "rate", "ratio", "flops"]


@dataclass(frozen=True)
class Measure:
    """One number of a result, described once: a column of a table, an axis of a plot, an objective of a search."""

    key: str
    """The column's name in data files."""
    title: str
    """A heading, without the unit."""
    axis: str
    """The label of an axis, with the unit."""
    unit: Unit
    better: Literal["higher", "lower"]
    of: Callable[[RunResult], float | int | None]
    name: str | None = None
    """The name for `--objective`; None: it is not an objective."""
    column: str | None = None
    """The name of a cost in result tables, `--columns` and `--sort`; None: it is not in the tables."""
    table_unit: str | None = None
    """The unit of its column, if it is not the usual one of its kind."""
    plotted: bool = False
    """Whether it is an axis of the trade-off plots."""
    head_counted: bool | None = None
    """For parameters: whether the head is counted; cited scores must count in the same way."""

    @property
    def label(self) -> str:
        """The heading of stored values, which are in bytes where an axis shows MiB."""
        return f"{self.title}, bytes" if self.unit == "bytes" else self.title

    @property
    def integer(self) -> bool:
        return self.unit in ("count", "bytes", "flops")


METRICS: dict[str, Measure] = {
    measure.key: measure
    for measure in (
        Measure("miou", "mIoU", "mIoU, %", "share", "higher", lambda r: r.metrics.miou, "miou"),
        Measure("mdice", "mDice", "mDice, %", "share", "higher", lambda r: r.metrics.mdice, "mdice"),
        Measure("macc", "mAcc", "mAcc, %", "share", "higher", lambda r: r.metrics.macc, "macc"),
        Measure("aacc", "aAcc", "aAcc, %", "share", "higher", lambda r: r.metrics.aacc, "aacc"),
    )
}
"""Scores; the first is the default."""

COSTS: dict[str, Measure] = {
    measure.key: measure
    for measure in (
        Measure(
            "trained_method",
            "trained parameters",
            "trained parameters of the method, without the head",
            "count",
            "lower",
            lambda r: r.parameters.method,
            "method",
            column="trained",
            plotted=True,
            head_counted=False,
        ),
        Measure(
            "trained_head",
            "trained parameters of the head",
            "trained parameters of the head",
            "count",
            "lower",
            lambda r: r.parameters.head,
            "head",
            column="head",
        ),
        Measure(
            "trained",
            "trained parameters with the head",
            "trained parameters of method and head",
            "count",
            "lower",
            lambda r: r.parameters.trainable,
            "trained",
            plotted=True,
            head_counted=True,
        ),
        Measure(
            "backbone_parameters",
            "parameters of the backbone",
            "parameters of the backbone",
            "count",
            "lower",
            lambda r: r.parameters.backbone,
        ),
        Measure(
            "delta_bytes",
            "delta",
            "size of the delta, MiB",
            "bytes",
            "lower",
            lambda r: r.delta_bytes,
            "delta",
            column="delta",
            plotted=True,
        ),
        Measure(
            "peak_memory_bytes",
            "peak memory",
            "peak memory during training, MiB",
            "bytes",
            "lower",
            lambda r: r.peak_memory_bytes,
            "memory",
            column="memory",
            table_unit="GiB",
            plotted=True,
        ),
        Measure(
            "train_seconds",
            "training time",
            "training time without evaluation, s",
            "seconds",
            "lower",
            lambda r: r.train_seconds,
            "time",
            column="time",
            plotted=True,
        ),
        Measure(
            "images_per_second",
            "training throughput",
            "training images per second",
            "rate",
            "higher",
            lambda r: r.images_per_second,
        ),
        Measure("train_flops", "training FLOPs", "training FLOPs", "flops", "lower", lambda r: r.train_flops, "flops"),
        Measure(
            "inference_ratio",
            "inference time",
            "inference time relative to the backbone alone",
            "ratio",
            "lower",
            lambda r: r.inference.ratio,
            "inference",
            column="inference",
        ),
    )
}
"""The costs of a run."""

MEASURES = METRICS | COSTS

MEASURES_BY_NAME: dict[str, Measure] = {measure.name: measure for measure in MEASURES.values() if measure.name}
"""The objectives of searches."""
