"""The matcher of SPM: a small recurrent network that turns a stage's map into a prompt for the next stage."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models.losses import cross_entropy, labels_at
from harness.models.resampling import resample


class OnePass(list[Tensor]):
    """Tensors of one forward pass; a copy of the network starts without them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OnePass, ()

    def take(self) -> list[Tensor]:
        taken = list(self)
        self.clear()
        return taken


class Matcher(nn.Module):
    """f [B, C, h, w] -> f + s f + r p, where the prompts s and p are refined over T iterations at a coarser resolution.

    With P average pooling by `pool`, r the root mean square of P f over all of an image, and P f / r detached from the
    gradient; h_T' and m_T' are what the previous matcher passes on with `carry`, else 0; maps are
    [B, ., h/pool, w/pool]:

        x       = conv1x1(P f / r)                           C -> d
        h_0     = tanh(x + h_T')
        m_t     = conv1x1(h_t) + m_T'                        d -> classes, t = 0 .. T
        h_t     = ConvGRU(h_{t-1}, [x, softmax(m_{t-1})])    t = 1 .. T
        s, p    = upsample(conv1x1(h_T))                     d -> 2 C, zero at the start

    The magnitude of maps differs between networks: a ViT's can have r = 0.05 after its first blocks, an EfficientNet's
    r = 8. The matcher does not depend on it: scaling f by a scales its output by a. No gradient flows through what it
    reads; the loss of its semantic maps trains it and, through what is carried, the matchers before it.

    The GRU is the convolutional one of Ballas et al. (arXiv 1511.06432, section 3) with each convolution depth-wise
    separable. What does not change over t, the convolution of x, is computed once. The 1×1 convolutions to and from
    d commute with pooling and with bilinear upsampling, and so run at the working resolution. What is carried is
    resized bilinearly where the working resolutions differ: from one that is twice as fine, that is average pooling.

    Without `relative`, x = conv1x1(P f), with its gradient, and the output is f + p: d -> C channels.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        hidden: int,
        iterations: int,
        kernel: int,
        pool: int,
        share_weights: bool,
        guidance: bool,
        relative: bool,
        supervised: bool,
    ):
        """`guidance`: the semantic maps enter the recurrence; `supervised`: they are kept for the loss."""
        super().__init__()
        self.iterations = iterations
        self.pool = pool
        self.guidance = guidance
        self.relative = relative
        self.supervised = supervised
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.semantic = nn.Conv2d(hidden, num_classes, 1) if guidance or supervised else None
        cells = 1 if share_weights else iterations
        guided = num_classes if guidance else 0
        self.cells = nn.ModuleList(SeparableGRUCell(hidden, guided, kernel) for _ in range(cells))
        self.expand = nn.Conv2d(hidden, 2 * channels if relative else channels, 1)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        self.received: OnePass | None = None
        """h_T and m_T of the previous matcher: the list that is its `handed_on`; None: nothing is carried."""
        self.handed_on: OnePass | None = None
        self.semantic_maps = OnePass()
        """m_0 .. m_T of the last training forward pass, for the auxiliary loss."""

    def forward(self, feature_map: Tensor) -> Tensor:
        pooled = feature_map
        if self.pool > 1:
            pooled = F.avg_pool2d(feature_map, self.pool, ceil_mode=True, count_include_pad=False)
        if self.relative:
            pooled = pooled.detach()
            size = _size_of(pooled)
            pooled = pooled / size
        state = self._refine(self.reduce(pooled))
        if not self.relative:
            return feature_map + _resize(self.expand(state), feature_map)
        scale, shift = self.expand(state).chunk(2, dim=1)
        shifted = feature_map + _resize(size * shift, feature_map)
        return torch.addcmul(shifted, _resize(scale, feature_map), feature_map)

    def _refine(self, x: Tensor) -> Tensor:
        """x [B, d, h, w] -> h_T. Takes what the previous matcher passed on, and passes on its own."""
        carried = [] if self.received is None else [_resize(tensor, x) for tensor in self.received.take()]
        context = carried[1] if len(carried) > 1 else None
        state = torch.tanh(x + carried[0] if carried else x)
        inputs = [cell.project_input(x) for cell in self.cells]
        kept = self.supervised and self.training
        maps: list[Tensor] = []
        for t in range(self.iterations):
            guide = None
            if self.guidance or kept:
                maps.append(self._classify(state, context))
            if self.guidance:
                guide = maps[-1].softmax(dim=1)
            shared = min(t, len(self.cells) - 1)
            state = self.cells[shared](state, inputs[shared], guide)
        if kept or (self.guidance and self.handed_on is not None):
            maps.append(self._classify(state, context))
        if kept:
            self.semantic_maps[:] = maps
        if self.handed_on is not None:
            self.handed_on[:] = [state, *maps[-1:]]
        return state

    def _classify(self, state: Tensor, context: Tensor | None) -> Tensor:
        assert self.semantic is not None
        semantic_map = self.semantic(state)
        return semantic_map if context is None else semantic_map + context


def hand_on(matchers: list[Matcher]) -> None:
    """Each matcher receives the last state and semantic map of the one before it."""
    for before, after in itertools.pairwise(matchers):
        before.handed_on = after.received = OnePass()


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return resample(x, (like.shape[-2], like.shape[-1]))


def _size_of(feature_map: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, 1, 1, 1], the root mean square, of at least 1e-6."""
    wide = torch.promote_types(feature_map.dtype, torch.float32)
    squares = feature_map.to(wide).square().mean(dim=(1, 2, 3), keepdim=True)
    return squares.sqrt().clamp_min(1e-6).to(feature_map.dtype)


class SeparableGRUCell(nn.Module):
    """A convolutional GRU cell whose convolutions are depth-wise, then point-wise.

        z = sigmoid(W_z x + U_z [h, g])      r = sigmoid(W_r x + U_r [h, g])
        n = tanh(W_n x + U_n [r * h, g])     h' = (1 - z) h + z n

    `g` is the guide, the semantic map's class probabilities. The gates z and r share the depth-wise part.
    """

    def __init__(self, hidden: int, guided: int, kernel: int):
        super().__init__()
        inner = hidden + guided
        self.input_depthwise = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.input_pointwise = nn.Conv2d(hidden, 3 * hidden, 1)
        self.gates_depthwise = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=False)
        self.gates_pointwise = nn.Conv2d(inner, 2 * hidden, 1, bias=False)
        self.new_depthwise = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=False)
        self.new_pointwise = nn.Conv2d(inner, hidden, 1, bias=False)

    def project_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is the same at every iteration: [W_z x, W_r x] as [B, 2d, h, w], and W_n x as [B, d, h, w].

        Split once: slices taken one by one would each cost a map of zeros in the backward pass.
        """
        hidden = x.shape[1]
        gates, new = self.input_pointwise(self.input_depthwise(x)).split([2 * hidden, hidden], dim=1)
        return gates, new

    def forward(self, state: Tensor, projected: tuple[Tensor, Tensor], guide: Tensor | None) -> Tensor:
        projected_gates, projected_new = projected
        gates_in = state if guide is None else torch.cat([state, guide], dim=1)
        gates = projected_gates + self.gates_pointwise(self.gates_depthwise(gates_in))
        update, reset = torch.sigmoid(gates).chunk(2, dim=1)
        new_in = reset * state if guide is None else torch.cat([reset * state, guide], dim=1)
        new = torch.tanh(projected_new + self.new_pointwise(self.new_depthwise(new_in)))
        return torch.lerp(state, new, update)


def matcher_parameters(
    channels: int,
    num_classes: int,
    hidden: int,
    iterations: int,
    kernel: int,
    share_weights: bool,
    guidance: bool,
    relative: bool,
    supervised: bool,
) -> int:
    """The number of a matcher's parameters in closed form; arguments as for `Matcher`."""
    inner = hidden + (num_classes if guidance else 0)
    cell = hidden * kernel**2 + 3 * hidden * (hidden + 1) + 2 * inner * kernel**2 + 3 * hidden * inner
    reduce = (channels + 1) * hidden
    semantic = (hidden + 1) * num_classes if guidance or supervised else 0
    expand = (hidden + 1) * channels * (2 if relative else 1)
    return reduce + semantic + cell * (1 if share_weights else iterations) + expand


def semantic_loss(semantic_maps: list[Tensor], masks: Tensor) -> Tensor:
    """The mean over t of the cross-entropy of m_t [B, K, h, w] with the labels [B, H, W] at the maps' size."""
    labels = labels_at(masks, semantic_maps[0].shape[-2:])
    return cross_entropy(torch.cat(semantic_maps), labels.repeat(len(semantic_maps), 1, 1))
