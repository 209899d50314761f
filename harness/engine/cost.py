"""A method's costs beyond its parameters: FLOPs and memory of a training step, and inference time."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry, shape_wrapper

from harness.cells.resolve import Cell
from harness.errors import UserError
from harness.method import Hyperparameters
from harness.models.network import Segmenter, apply_memory_format
from harness.spec import Budget
from harness.util import provenance
from harness.util.device_clock import clock
from harness.util.json_cache import cached_json


@dataclass(frozen=True)
class StepCost:
    """The cost of one optimiser step, computed from the shapes of its tensors."""

    flops: int
    """Floating-point operations of its forward and backward passes, as torch counts them; a multiply-add counts two."""
    peak_bytes: int
    """The most bytes of tensors at one time: weights, buffers, gradients, AdamW's state, activations. In float32,
    without the workspace of kernels."""


def arithmetic_of(cell: Cell) -> dict[str, Any]:
    """All that the arithmetic of a step depends on, as plain values: not learning rates or weight decay."""
    spec = cell.spec
    own = {name: value for name, value in spec.hyperparameters.items() if name not in Hyperparameters.model_fields}
    return {
        "code": provenance.sources("harness", "methods"),
        "packages": provenance.packages(),
        "method": [spec.method, spec.method_code, own],
        "network": [spec.backbone, spec.head, len(cell.dataset.classes)],
        "budget": spec.budget.model_dump(
            mode="json", include={"steps", "batch_size", "accumulate", "crop", "auxiliary_head", "drop_path"}
        ),
    }


def cached_step_cost(cell: Cell, network: Segmenter, cache: Path) -> StepCost | None:
    """`step_cost` of the cell's network, counted once for all cells of the same arithmetic; `cache`: a folder.

    Also checks that a step works: raises `UserError` for a head that cannot be trained under the budget. Returns None
    if the step fails for another reason: if the network is the cause, training fails too and records it.
    """
    budget = cell.spec.budget
    try:
        return StepCost(**cached_json(cache, "step", arithmetic_of(cell), lambda: asdict(step_cost(network, budget))))
    except Exception as error:
        if "more than 1 value per channel" not in str(error):
            return None
        raise UserError(
            f"--budget {budget.name}: the batch norms of head {cell.spec.head} see one value per channel in a "
            f"forward pass of {budget.batch_size // budget.accumulate}x3x{budget.crop[0]}x{budget.crop[1]}; "
            "use a larger `batch_size` or `crop`, or a smaller `accumulate`"
        ) from error


def step_cost(network: Segmenter, budget: Budget) -> StepCost:
    """The cost of one step under the budget, executed once on meta tensors; `network` is not changed."""
    shape_only = copy.deepcopy(network).to("meta").train()
    apply_memory_format(shape_only, budget)
    count = budget.batch_size // budget.accumulate
    layout = torch.channels_last if budget.channels_last else torch.contiguous_format

    def one_pass() -> None:
        loss, _ = shape_only(
            torch.empty(count, 3, *budget.crop, device="meta", memory_format=layout),
            torch.zeros(count, *budget.crop, dtype=torch.uint8, device="meta"),
        )
        loss.backward()

    with _whole_interpolation():
        with FlopMode() as counter:
            one_pass()
        shape_only.zero_grad(set_to_none=True)
        with _whole_attention(), PeakMemoryMode([*shape_only.parameters(), *shape_only.buffers()]) as memory:
            for _ in range(min(2, budget.accumulate)):  # from the second pass on, gradients already exist
                one_pass()
    trained = [parameter for parameter in shape_only.parameters() if parameter.requires_grad]
    state = 2 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return StepCost(counter.total * budget.accumulate, memory.peak + state)


def _convolution_backward_flops(
    gradient: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    out_shape: Any,
) -> int:
    """FLOPs from shapes: torch (2.12) counts the weight gradient of a grouped convolution as that of a dense one."""
    return (wanted[0] + wanted[1]) * conv_flop_count(list(x), list(weight), list(gradient), transposed)


class FlopMode(TorchDispatchMode):
    """Adds up the FLOPs of the operations that torch counts.

    As torch's `FlopCounterMode`, which however takes an interpolation apart into hundreds of operations without FLOPs.
    """

    formulas: ClassVar = flop_registry | {
        torch.ops.aten.convolution_backward: shape_wrapper(_convolution_backward_flops)
    }

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        formula = self.formulas.get(getattr(operation, "_overloadpacket", None))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@contextlib.contextmanager
def _whole_interpolation() -> Iterator[None]:
    """Keep interpolation one operation on meta tensors: only a GPU needs its deterministic form, of many."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)


@contextlib.contextmanager
def _whole_attention() -> Iterator[None]:
    """Keep attention one operation on meta tensors, as on a CPU: else it would store the matrix of all pairs."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, *, scale: float | None = None, **others: Any) -> Tensor:  # fmt: skip
        if others.get("enable_gqa") or dropout_p:
            return decomposed(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
        return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]

    decomposed = F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


class PeakMemoryMode(TorchDispatchMode):
    """Counts the bytes of every storage from its creation until it is freed, also of meta tensors."""

    def __init__(self, tensors: Iterable[Tensor]):
        """`tensors`: those that exist already."""
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # unique while the storage is alive
        if reference.cdata in self._known:
            return
        self._known[reference.cdata] = reference, storage.nbytes()
        self.now += storage.nbytes()
        if self.now > self.peak:
            for key in [key for key, (known, _) in self._known.items() if known.expired()]:
                self.now -= self._known.pop(key)[1]
            self.peak = max(self.peak, self.now)


@torch.inference_mode()
def inference_seconds(
    adapted: nn.Module, frozen: nn.Module, size: tuple[int, int], device: torch.device, repeats: int = 10
) -> tuple[float, float]:
    """Median seconds of one image [3, *size] through the adapted and the frozen backbone, timed alternately."""
    image = torch.zeros(1, 3, *size, device=device)
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for repeat in range(repeats + 2):
        for which, backbone in enumerate((adapted, frozen)):
            started = clock(device)
            backbone(image)
            if repeat >= 2:
                seconds[which].append(clock(device) - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
