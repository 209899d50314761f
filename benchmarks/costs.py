"""What each method costs against `full`: a step's time and memory, what is trained, and the delta that holds it."""

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
    """Each method beside `full` by itself, so that never more than two networks are on the device.

    The row of `full` is another network of the same: what is not 1 there is the machine's noise.
    """
    result = Table(
        f"Each method against full: {backbone}",
        ["method", "trained", "step", "kept, MiB", "kept", "peak, MiB", "peak", "delta"],
        "*Trained*: parameters beside the head's. *Step*: seconds of forward, backward and update. *Kept*: bytes of "
        "activations that wait for the backward pass. *Peak*: the most bytes allocated within a step, with weights, "
        "gradients and the optimiser's state. All three are over `full`'s. *Delta*: its bytes over those of the "
        "trained tensors in it (aim: at most 1.02).",
    )
    full = Stepper(setting, setting.cell(backbone, "full"))
    kept_by_full, peak_of_full = kept_bytes(full), peak_bytes(full)
    digest = tensors_digest(setting.bare(full.cell))
    for name in methods:
        try:
            own = Stepper(setting, setting.cell(backbone, name))
        except UnsupportedMethod as reason:
            result.notes.append(str(reason))
            continue
        kept, peak = kept_bytes(own), peak_bytes(own)
        seconds = in_turn({"own": own.timed, "full": full.timed}, setting.rounds * STEPS_A_ROUND, warm_up=2)
        result.add(
            name,
            f"{own.network.count_parameters().method:,}",
            Ratio.of(seconds["own"], seconds["full"]),
            f"{kept / MIB:.1f}",
            f"{kept / kept_by_full:.2f}",
            f"{peak / MIB:.1f}",
            f"{peak / peak_of_full:.2f}",
            f"{_delta_ratio(own, digest, setting.scratch / 'delta.safetensors'):.3f}",
        )
    return result


def kept_bytes(stepper: Stepper) -> int:
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
    """The most bytes that torch has allocated at one time of a step: what is there between steps, and the step's own.

    Of what its allocator reports, on a CPU too; what a library takes for itself while it computes is in neither.
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
    """Of one step, beyond what was allocated before it: from the profiler's record of every allocation and release."""
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
