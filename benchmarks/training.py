"""What training costs: each method's step and memory against full fine-tuning's, the harness's loop against a bare one.

    python benchmarks/training.py [--backbone NAME] [--head HEAD] [--crop N] [--steps N] [--rounds N] [--methods A,B]

Everything is timed in turn within one process run, so that ratios hold on a noisy machine. Weights are random and the
images are the packaged land cover's: the arithmetic of a step does not depend on what the weights are.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from harness.backbones.weights import Weights, load_backbone
from harness.datasets import open_dataset
from harness.datasets.transforms import TrainStream
from harness.execution import make_fabric, make_reproducible
from harness.method import methods
from harness.network import Segmenter, Unsupported, build_segmenter
from harness.runs import Checkpoints
from harness.spec import Budget
from harness.training import parameter_groups, train


def main() -> None:
    options = _options()
    make_reproducible()
    budget = Budget(name="benchmark", steps=options.steps, batch_size=8, crop=(options.crop, options.crop))
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_dataset("landcover", Path("data"), Path(scratch) / "cache")
        samples = dataset.samples("train")

        def network(method: str) -> Segmenter:
            chosen = methods.get(method)
            backbone = load_backbone(options.backbone, Weights("random", "random"), seed=0)
            instance = chosen(chosen.Hyperparameters())
            return build_segmenter(backbone, instance, options.head, len(dataset.classes), seed=0)

        def stream(built: Segmenter) -> TrainStream:
            return TrainStream(dataset, samples, budget, 0, built.backbone.mean, built.backbone.std)

        print(
            f"{options.backbone}, head {options.head}, crop {options.crop}, batch 8, {torch.get_num_threads()} threads"
        )
        built = {}
        for name in options.methods.split(",") if options.methods else methods.names():
            try:
                built[name] = network(name)
            except Unsupported as reason:
                print(f"{name}: {reason}")
        _costs(built, stream, options.rounds)
        ratios = []
        for round_ in range(options.rounds):
            built = network("spm")
            bare = _bare_loop(built, stream(built), budget)
            built = network("spm")
            ours = _harness_loop(built, stream(built), budget, Path(scratch) / str(round_))
            ratios.append(bare / ours)
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"images/s of the harness's loop over a bare one's: {middle:.3f} ({low:.3f} to {high:.3f})")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--head", default="fpn")
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--methods", help="default all")
    parser.add_argument("--steps", type=int, default=20, help="of one timed loop")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def _costs(networks: dict[str, Segmenter], stream, rounds: int) -> None:
    """Median seconds of forward, backward and update, the methods in turn on the same images; and what is kept."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    kept: dict[str, int] = {}
    optimizers = {
        name: torch.optim.AdamW(parameter_groups(built, built.method.hyperparameters), lr=1e-3, fused=True)
        for name, built in networks.items()
    }
    for repeat in range(rounds * 3 + 2):
        for name, built in networks.items():
            images, masks = next(iter(DataLoader(stream(built), batch_size=8)))
            built.train()
            if repeat == 0:
                kept[name] = _kept_bytes(built, images, masks)
            began = time.perf_counter()
            loss, _ = built(images, masks)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - began)
    full = statistics.median(seconds["full"])
    print("method         trained     step of full's  kept for backward  of full's")
    for name, measured in seconds.items():
        trained = networks[name].count_parameters().method
        ratio = statistics.median(measured) / full
        print(f"{name:12} {trained:9,} {ratio:18.2f} {kept[name] / 2**20:14.1f} MiB {kept[name] / kept['full']:10.2f}")


def _kept_bytes(built: Segmenter, images: torch.Tensor, masks: torch.Tensor) -> int:
    """Bytes of activations that the forward pass keeps for the backward pass; parameters are not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = built(images, masks)
    del loss
    return sum(storages.values())


def _bare_loop(built: Segmenter, stream: TrainStream, budget: Budget) -> float:
    """Seconds of the least that trains the same network on the same images under the same schedule."""
    optimizer = torch.optim.AdamW(parameter_groups(built, built.method.hyperparameters), lr=1e-3, fused=True)
    built.train()
    trained = [parameter for _, parameter in built.trained_parameters()]
    began = time.perf_counter()
    for step, (images, masks) in enumerate(DataLoader(stream, batch_size=budget.batch_size, num_workers=1)):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * budget.learning_rate_factor(step)
        loss, _ = built(images, masks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, budget.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def _harness_loop(built: Segmenter, stream: TrainStream, budget: Budget, scratch: Path) -> float:
    fabric = make_fabric("cpu", budget.precision)
    checkpoints = Checkpoints(scratch)
    began = time.perf_counter()
    train(built, stream, budget, built.method.hyperparameters, 0, fabric, checkpoints, workers=1)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
