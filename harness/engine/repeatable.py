"""Whether a step's gradients repeat to the bit on a GPU.

Some of torch's kernels have a deterministic form (attention, convolutions), which its strict mode chooses; others have
none, and there strict mode refuses. A network without such kernels is trained in strict mode.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator

import torch
from lightning_fabric import Fabric

from harness.models.network import Segmenter, apply_memory_format
from harness.spec import Budget


def kernel_that_does_not_repeat(network: Segmenter, budget: Budget, fabric: Fabric) -> str | None:
    """The name of a kernel of a training step that has no deterministic form on the device; None if all have one.

    Executes one forward and backward pass of a copy of the network, with two images.
    """
    if fabric.device.type != "cuda":
        return None
    probe = apply_memory_format(copy.deepcopy(network).to(fabric.device), budget).train()
    images = torch.zeros(2, 3, *budget.crop, device=fabric.device)
    masks = torch.zeros(2, *budget.crop, dtype=torch.uint8, device=fabric.device)
    try:
        with strict_mode():
            with torch.random.fork_rng(devices=[fabric.device]), fabric.autocast():
                loss, _ = probe(images, masks)
            loss.backward()
    except RuntimeError as error:  # any other error: training fails in the same way, and records it
        found = re.search(r"(\w+) does not have a deterministic implementation", str(error))
        return found[1] if found else None
    return None


@contextlib.contextmanager
def strict_mode() -> Iterator[None]:
    """Let torch refuse kernels that do not repeat. Elsewhere it only warns of them, and then does not choose
    attention's deterministic form either."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
