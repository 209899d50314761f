"""The loss that every method trains with."""

import torch
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
