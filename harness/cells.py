"""From what a user asked for to one complete cell, without importing torch where nothing has to be trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from harness.backbones.weights import Weights, find_weights
from harness.datasets import open_dataset
from harness.datasets.base import SegmentationDataset
from harness.heads import parse_head
from harness.method import Method, methods
from harness.plugins import outside_digest
from harness.runs import RunStore
from harness.spec import Part, Spec, budget


@dataclass(frozen=True)
class Request:
    """The arguments of `harness run` that say what is run, as the user gave them."""

    method: str = "spm"
    backbone: str = "tf_efficientnet_lite0"
    weights: str = "auto"
    dataset: str = "landcover"
    head: str = "fpn"
    budget: str = "demo"
    seed: int = 0
    part: Part = "report"
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A spec with what it needs found: the method, the dataset's files, the weights' file."""

    spec: Spec
    method: type[Method]
    dataset: SegmentationDataset
    weights: Weights

    def new_method(self) -> Method:
        """A fresh instance of the method with the spec's hyperparameters."""
        return self.method(self.method.Hyperparameters.model_validate(self.spec.hyperparameters))


def resolve(request: Request, store: RunStore, data: Path) -> Cell:
    """Check every part of a request and complete it. Raises `UserError` for the first that does not fit.

    What is cheap to check comes first; the dataset, which may have to be read, last.
    """
    method = methods.get(request.method)
    hyperparameters = method.Hyperparameters.parse(request.method, request.settings)
    chosen_budget = budget(request.budget)
    parse_head(request.head)
    weights = find_weights(request.backbone, request.weights, store.cache)
    dataset = open_dataset(request.dataset, data, store.cache)
    spec = Spec(
        method=request.method,
        hyperparameters=hyperparameters.model_dump(),
        method_code=outside_digest(method),
        backbone=request.backbone,
        weights=weights.identity,
        dataset=dataset.name,
        data_digest=dataset.digest,
        head=request.head,
        budget=chosen_budget,
        seed=request.seed,
        part=request.part,
    )
    return Cell(spec, method, dataset, weights)
