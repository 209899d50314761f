"""The device of a run, the processes that share a batch, and torch's settings for bit-reproducible results."""

from __future__ import annotations

import os
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from torch import nn

from harness.engine.options import check_device_name
from harness.errors import UserError
from harness.spec import Precision
from harness.util.cores import cores
from harness.util.option import environment_number

_PRECISIONS: dict[Precision, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "tf32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}


def make_fabric(device: str, precision: Precision) -> Fabric:
    """Device placement, mixed precision and, under a `torchrun`-style launch, processes that share a batch.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`. Raises `UserError` for an invalid device or one that is absent.
    """
    check_device_name(device)
    kind, _, index = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is available; use cpu, or see `harness doctor`")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    processes = environment_number("LOCAL_WORLD_SIZE", 1)
    fabric = Fabric(
        accelerator=kind,
        devices=[int(index)] if index and processes == 1 else processes,
        num_nodes=max(1, environment_number("WORLD_SIZE", 1) // processes),
        strategy="ddp" if "LOCAL_WORLD_SIZE" in os.environ else "auto",
        # Without torchrun this process is the whole launch, also inside a Slurm job.
        plugins=[] if "LOCAL_WORLD_SIZE" in os.environ else [LightningEnvironment()],
        precision=_PRECISIONS[precision],
    )
    fabric.launch()
    # torch's own default is TF32 in convolutions alone: CNNs and Transformers would differ in precision.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    return fabric


def make_reproducible() -> None:
    """Make torch deterministic: one seed, one result, to the bit. Kernels that cannot be are reported as warnings."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # fills every new tensor, to find code that reads it
    torch.backends.cudnn.benchmark = False


def check_compiler(device: torch.device) -> None:
    """Raises `UserError` if `torch.compile` does not work on the device: on a CPU it needs a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        problem = f"torch.compile does not work here: {reason}"
        raise UserError(problem, field="budget", hint="leave `compile` out of the budget") from error


def compiled(network: nn.Module) -> nn.Module:
    """`network` with a compiled forward and backward pass.

    torch compiles a limited number of networks in one process and executes further ones as they are, with other last
    bits. Here it must compile them all, or fail.
    """
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(network, dynamic=False)


def default_workers(threads: int | None) -> int:
    """Data-loading processes of a run: none where they would compete with the network for the only core.

    `threads`: cores that the run may use; None: all of this process.
    """
    available = len(cores())
    return min(8, min(available, threads or available) // 2)
