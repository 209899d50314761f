"""The modules of Rein: learned tokens refine the map behind a block, through MLPs that blocks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SharedRefinement(nn.Module):
    """The two linear layers and the scale that all blocks of one width have in common."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.token_to_feature = nn.Linear(channels, channels)
        self.refine = nn.Linear(channels, channels)
        self.scale = nn.Parameter(torch.tensor(scale))


class Refinement(nn.Module):
    """f [B, C, h, w] -> f + scale·refine(A·token_to_feature(T) + f), A = softmax(f Tᵀ / √C), T = a b, [m, C].

    The first token takes its share of the softmax and adds nothing, for features that no token fits.
    """

    def __init__(self, shared: SharedRefinement, owner: bool, channels: int, tokens: int, rank: int, patch: int):
        """One of the modules that share is the `owner` and registers what is shared; the others refer to it."""
        super().__init__()
        self._shared = (shared,)
        if owner:
            self.shared = shared
        bound = math.sqrt(6 / (3 * patch**2 + math.sqrt(channels * rank)))
        self.a = nn.Parameter(torch.empty(tokens, rank).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.empty(rank, channels).uniform_(-bound, bound))

    def forward(self, feature_map: Tensor) -> Tensor:
        (shared,) = self._shared
        features = feature_map.flatten(2).transpose(1, 2)
        tokens = self.a @ self.b
        attention = (features @ tokens.T * features.shape[-1] ** -0.5).softmax(dim=-1)
        gathered = attention[..., 1:] @ shared.token_to_feature(tokens[1:])
        delta = shared.scale * shared.refine(gathered + features)
        return feature_map + delta.transpose(1, 2).reshape(feature_map.shape)
