"""Turns a user's request into one complete cell. Does not import torch, so that planning stays fast."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness.cells.plugins import outside_digest
from harness.cells.request import Request
from harness.data.base import SegmentationDataset
from harness.data.catalog import open_dataset
from harness.data.fit import check_fit
from harness.method import Method, methods
from harness.models.backbones.weights import Weights, find_weights
from harness.models.heads import parse_head
from harness.runs.store import RunStore
from harness.spec import PROTOCOL, Budget, Spec, budget


@dataclass(frozen=True)
class Cell:
    """A spec together with the method class, the dataset's files and the weights' file that it refers to."""

    spec: Spec
    method: type[Method]
    dataset: SegmentationDataset
    weights: Weights

    def new_method(self) -> Method:
        """A fresh instance of the method with the spec's hyperparameters."""
        return self.method(self.method.Hyperparameters.model_validate(self.spec.hyperparameters))


class Resolver:
    """Turns requests into cells. What the cells of a study share is looked up once."""

    def __init__(self, store: RunStore, data: Path):
        self._budget = cache(budget)
        self._weights = cache(lambda backbone, weights: find_weights(backbone, weights, store.cache))
        self.dataset = cache(lambda name: open_dataset(name, data, store.cache))
        self._digest = cache(lambda name: self.dataset(name).digest)
        self._check_fit = cache(lambda name, *of: check_fit(self.dataset(name), *of))
        self._code = cache(lambda name: outside_digest(methods.get(name)))

    def __call__(self, request: Request) -> Cell:
        """Check and complete a request. Raises `UserError` for the first field that is wrong.

        Cheap checks come first; the digest of the dataset, whose files may have to be read, comes last.
        """
        method = methods.get(request.method)
        hyperparameters = method.Hyperparameters.parse(request.method, request.settings)
        chosen_budget = request.budget if isinstance(request.budget, Budget) else self._budget(request.budget)
        parse_head(request.head)
        dataset = self.dataset(request.dataset)
        weights = self._weights(request.backbone, request.weights)
        spec = Spec(
            method=request.method,
            hyperparameters=hyperparameters.spec_values(),
            method_code=self._code(request.method),
            backbone=request.backbone,
            weights=weights.identity,
            dataset=dataset.name,
            data_digest=self._digest(request.dataset),
            head=request.head,
            budget=chosen_budget,
            seed=request.seed,
            part=request.part,
            protocol=PROTOCOL,
        )
        self._check_fit(request.dataset, chosen_budget, request.part)
        return Cell(spec, method, dataset, weights)


def resolve(request: Request, store: RunStore, data: Path) -> Cell:
    """One cell; see `Resolver`."""
    return Resolver(store, data)(request)
