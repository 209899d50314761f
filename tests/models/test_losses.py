"""The loss that every method trains with."""

import platform

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.models.losses import cross_entropy

CLASSES = 5


def test_loss_ignores_unlabelled_pixels_and_is_zero_without_labels():
    logits = torch.randn(2, CLASSES, 8, 8)
    masks = torch.randint(0, CLASSES, (2, 8, 8))
    masks[0] = 255
    expected = F.cross_entropy(logits[1:], masks[1:])
    torch.testing.assert_close(cross_entropy(logits, masks), expected)
    assert cross_entropy(logits, torch.full_like(masks, 255)) == 0


def flattened(logits: Tensor, labels: Tensor) -> Tensor:
    """The same loss where every pixel is a row."""
    rows = logits.float().permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    total = F.cross_entropy(rows, labels.flatten(), ignore_index=255, reduction="sum")
    return total / (labels != 255).sum()


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="vectors of other processors have other widths"
)
@pytest.mark.parametrize("classes", [2, 3, 7, 8, 19])
@pytest.mark.parametrize("size", [(10, 16), (9, 7), (64, 64)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_loss_and_gradient_are_those_of_flattened_pixels_to_the_bit(
    classes: int, size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    logits = (9 * torch.randn(3, classes, *size)).contiguous(memory_format=memory_format)
    labels = torch.randint(0, classes, (3, *size))
    labels[:, :2] = 255
    found = []
    for loss_of in (cross_entropy, flattened):
        at = logits.clone().requires_grad_()
        loss = loss_of(at, labels)
        loss.backward()
        assert at.grad is not None
        found.append((loss.detach(), at.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
