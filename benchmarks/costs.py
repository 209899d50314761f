"""The cost of each method relative to `full`: time and memory of a step, trained parameters, and size of the delta."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Ratio, Table, in_turn
from benchmarks.setting import Setting, Stepper
from harness.models.backbones.weights import tensors_digest
from harness.models.delta import DeltaHeader, save_delta
from harness.models.network import UnsupportedMethod

STEPS_A_ROUND = 3
MIB = 2**20


def table(setting: Setting, backbone: str, methods: Sequence[str]) -> Table:
    """Each method is compared with `full` separately, so that never more than two networks are on the device.

    The row of `full` compares two equal networks: its deviation from 1 is noise.
    """
    result = Table(
        f"Methods relative to full: {backbone}",
        ["method", "trained", "step", "saved, MiB", "saved", "peak, MiB", "peak", "delta"],
        "*Trained*: parameters without the head's. *Step*: seconds of forward, backward and update. *Saved*: bytes of "
        "activations saved for the backward pass. *Peak*: the most bytes allocated within a step, with weights, "
        "gradients and the optimiser's state. All three are over `full`'s. *Delta*: its bytes over those of the "
        "trained tensors in it (aim: at most 1.02).",
    )
    full = Stepper(setting, setting.cell(backbone, "full"))
    saved_by_full, peak_of_full = saved_bytes(full), peak_bytes(full)
    digest = tensors_digest(setting.pretrained(full.cell))
    for name in methods:
        try:
            own = Stepper(setting, setting.cell(backbone, name))
        except UnsupportedMethod as reason:
            result.notes.append(str(reason))
            continue
        saved, peak = saved_bytes(own), peak_bytes(own)
        seconds = in_turn({"own": own.timed, "full": full.timed}, setting.rounds * STEPS_A_ROUND, warm_up=2)
        result.add(
            name,
            f"{own.network.count_parameters().method:,}",
            Ratio.of(seconds["own"], seconds["full"]),
            f"{saved / MIB:.1f}",
            f"{saved / saved_by_full:.2f}",
            f"{peak / MIB:.1f}",
            f"{peak / peak_of_full:.2f}",
            f"{_delta_ratio(own, digest, setting.scratch / 'delta.safetensors'):.3f}",
        )
    return result


def saved_bytes(stepper: Stepper) -> int:
    """Bytes that the forward pass keeps for the backward pass, without parameters and buffers."""
    network = stepper.network
    known = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = network(*stepper.batches[0])
    del loss
    return sum(storages.values())


def peak_bytes(stepper: Stepper) -> int:
    """Peak bytes allocated by torch during a step: those that exist between steps and the step's own.

    As reported by its allocator, also on a CPU; without the workspace of libraries.
    """
    stepper.step()  # which allocates the optimiser's state
    network, optimizer = stepper.network, stepper.optimizer
    between = [*network.parameters(), *network.buffers(), *stepper.batches[0]]
    between += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    device = stepper.batches[0][0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        stepper.step()
        own = torch.cuda.max_memory_allocated(device) - before
    else:
        own = _peak_on_cpu(stepper)
    return own + sum(tensor.numel() * tensor.element_size() for tensor in between)


def _peak_on_cpu(stepper: Stepper) -> int:
    """Peak bytes of one step beyond those allocated before it: from the profiler's record of every allocation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        stepper.step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        recorded = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in recorded if event["name"] == "[memory]"]
    allocated = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def _delta_ratio(stepper: Stepper, digest: str, path: Path) -> float:
    cell, network = stepper.cell, stepper.network
    dataset = cell.dataset
    header = DeltaHeader(cell.spec, tuple(dataset.classes), tuple(dataset.palette), dataset.scale, digest)
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in network.trained_state().values())
    return save_delta(path, network, header) / tensors
