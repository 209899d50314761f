"""The cost of a step, counted on shapes alone, compared with real steps."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.costs import peak_bytes
from harness.engine.cost import FlopMode, PeakMemoryMode, _convolution_backward_flops, _whole_interpolation, step_cost
from harness.engine.training import parameter_groups
from harness.method import methods
from harness.models.backbones.families import create, cut
from harness.models.network import Segmenter, build_segmenter
from harness.spec import Budget

CLASSES = 3
SMALLER = {"vit_tiny_patch16_224": {"depth": 4}}


@pytest.fixture(
    autouse=True, params=[pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["", "deterministic"]
)
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """As runs set torch, and in the long tests as it is without."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield
    assert torch.are_deterministic_algorithms_enabled() == request.param
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def network_of(method: str, backbone: str) -> Segmenter:
    torch.manual_seed(0)
    built = methods.get(method)
    return build_segmenter(
        cut(backbone, create(backbone, **SMALLER.get(backbone, {}))),
        built(built.Hyperparameters()),
        "fpn:16",
        CLASSES,
        seed=0,
    )


@pytest.mark.parametrize("backbone", ["resnet10t", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("method", ["linear", "spm", "full"])
def test_peak_memory_equals_that_of_real_steps(method: str, backbone: str) -> None:
    """With the gradients of real data and AdamW's own state, updated in place as a run does."""
    images, side = 2, 96
    network = network_of(method, backbone).train()
    counted = step_cost(network, Budget(name="one", steps=1, batch_size=images, crop=(side, side)))
    optimizer = torch.optim.AdamW(parameter_groups(network, network.method.hyperparameters), lr=1e-3, fused=True)
    batch = torch.rand(images, 3, side, side), torch.randint(CLASSES, (images, side, side), dtype=torch.uint8)
    with PeakMemoryMode([*network.parameters(), *network.buffers()]) as memory:
        for _ in range(2):
            loss, _ = network(*batch)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert counted.peak_bytes == pytest.approx(memory.peak, rel=0.03)


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224"])
def test_peak_memory_is_close_to_what_torch_allocates(backbone: str) -> None:
    """Maps of 256×256, beside which what kernels take for themselves is little."""
    images, side = 2, 256
    network = network_of("spm", backbone).train()
    counted = step_cost(network, Budget(name="one", steps=1, batch_size=images, crop=(side, side)))
    optimizer = torch.optim.AdamW(parameter_groups(network, network.method.hyperparameters), lr=1e-3, fused=True)
    batch = torch.rand(images, 3, side, side), torch.randint(CLASSES, (images, side, side), dtype=torch.uint8)

    def step() -> None:
        loss, _ = network(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    allocated = peak_bytes(SimpleNamespace(step=step, network=network, optimizer=optimizer, batches=[batch]))
    assert counted.peak_bytes == pytest.approx(allocated, rel=0.05)


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (4, False), (16, False), (4, True)])
def test_convolution_gradients_cost_as_much_as_the_convolution(groups: int, transposed: bool) -> None:
    made = nn.ConvTranspose2d if transposed else nn.Conv2d
    convolution = made(16, 16, 3, groups=groups)
    x = torch.rand(2, 16, 8, 8, requires_grad=True)
    with FlopMode() as forward:
        y = convolution(x)
    with FlopMode() as backward:
        y.sum().backward()
    assert backward.total == 2 * forward.total > 0


@pytest.mark.parametrize(
    ("method", "backbone"),
    [("spm", "resnet10t"), ("lora", "vit_tiny_patch16_224"), ("full", "swinv2_tiny_window8_256")],
)
def test_flops_are_those_of_torchs_own_counter(method: str, backbone: str) -> None:
    network = network_of(method, backbone).to("meta").train()
    images, masks = torch.empty(2, 3, 64, 64, device="meta"), torch.zeros(2, 64, 64, dtype=torch.uint8, device="meta")
    own = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with _whole_interpolation(), FlopMode() as ours:
        network(images, masks)[0].backward()
    with FlopCounterMode(display=False, custom_mapping=own) as theirs:
        network(images, masks)[0].backward()
    assert ours.total == theirs.get_total_flops() > 0


def test_accumulation_needs_the_same_flops_and_less_memory() -> None:
    network = network_of("full", "resnet10t")
    whole, parts = (
        step_cost(network, Budget(name="one", steps=1, batch_size=8, accumulate=accumulate, crop=(64, 64)))
        for accumulate in (1, 4)
    )
    assert parts.flops == whole.flops and parts.peak_bytes < whole.peak_bytes
    assert all(not parameter.is_meta and parameter.grad is None for parameter in network.parameters())
