"""The cost of each method, computed from the shapes of its tensors, without executing a step."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measure import Table
from benchmarks.setting import Setting
from harness.engine.cost import step_cost
from harness.models.network import UnsupportedMethod

MIB, GIB = 2**20, 2**30


def table(setting: Setting, backbone: str, methods: Sequence[str]) -> Table:
    """One row per method; independent of the weights."""
    full = setting.network(setting.cell(backbone, "full"))
    cost_of_full = step_cost(full, setting.budget)
    pretrained = full.count_parameters().backbone
    result = Table(
        f"By shapes alone: {backbone}",
        ["method", "trained, M", "of backbone, %", "delta, MiB", "FLOPs", "peak, GiB", "peak"],
        f"*Trained*: parameters without the head's {full.count_parameters().head / 1e6:.2f} M; the backbone has "
        f"{pretrained / 1e6:.2f} M. *Delta*: bytes of method and head together. *FLOPs*: those of a step over `full`'s "
        f"{cost_of_full.flops / 1e12:.3g}·10¹². *Peak*: peak bytes of a step's tensors, in float32 and "
        "with AdamW's state; then over `full`'s.",
    )
    for name in methods:
        try:
            network = setting.network(setting.cell(backbone, name))
        except UnsupportedMethod as reason:
            result.notes.append(str(reason))
            continue
        counts, cost = network.count_parameters(), step_cost(network, setting.budget)
        result.add(
            name,
            f"{counts.method / 1e6:.3f}",
            f"{100 * counts.method / pretrained:.2f}",
            f"{4 * counts.trainable / MIB:.1f}",
            f"{cost.flops / cost_of_full.flops:.2f}",
            f"{cost.peak_bytes / GIB:.2f}",
            f"{cost.peak_bytes / cost_of_full.peak_bytes:.2f}",
        )
    return result
