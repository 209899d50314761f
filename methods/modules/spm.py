"""The matcher of SPM: a small recurrent network that turns a stage's map into a prompt for the next stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models.losses import cross_entropy, labels_at


class Matcher(nn.Module):
    """f [B, C, h, w] -> f + p, where the prompt p is refined over T iterations at a coarser working resolution.

    With P average pooling by `pool`, and all maps [B, ., h/pool, w/pool]:

        x   = conv1x1(P f)                                   C -> d
        h_0 = tanh(x)
        m_t = conv1x1(h_{t-1})                               d -> classes
        h_t = ConvGRU(h_{t-1}, [x, softmax(m_t)])            t = 1 .. T
        p   = upsample(conv1x1(h_T))                         d -> C, zero at the start

    The GRU is the convolutional one of Ballas et al. (arXiv 1511.06432, section 3) with each convolution depth-wise
    separable. What does not change over t, the convolution of x, is computed once. The 1×1 convolutions to and from
    d commute with pooling and with bilinear upsampling, and so run at the working resolution.

    `relative`, with r the root mean square of P f over all of an image, and P f / r a constant to the gradient:

        x    = conv1x1(P f / r)                              C -> d
        s, p = upsample(conv1x1(h_T))                        d -> 2 C, zero at the start
        f -> f + s f + r p

    How large a network's maps are is its own convention: a ViT's can have r = 0.05 after its first blocks, where the
    plain matcher sees next to nothing and outputs the same prompt everywhere, an EfficientNet's r = 8, where its tanh
    is saturated. The relative matcher is invariant to it: a f instead of f changes its output by the factor a. And as
    no gradient passes what it reads, a matcher's semantic maps only teach that matcher, not the ones before it.
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
        relative: bool = False,
    ):
        """`num_classes` 0 leaves the semantic map out; `guidance` feeds it back into the recurrence."""
        super().__init__()
        self.iterations = iterations
        self.pool = pool
        self.guidance = guidance
        self.relative = relative
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.semantic = nn.Conv2d(hidden, num_classes, 1) if num_classes else None
        cells = 1 if share_weights else iterations
        guided = num_classes if guidance else 0
        self.cells = nn.ModuleList(SeparableGRUCell(hidden, guided, kernel) for _ in range(cells))
        self.expand = nn.Conv2d(hidden, 2 * channels if relative else channels, 1)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        self.semantic_maps: list[Tensor] = []
        """m_1 .. m_T of the last training forward pass, for the auxiliary loss."""

    def forward(self, feature_map: Tensor) -> Tensor:
        pooled = feature_map
        if self.pool > 1:
            pooled = F.avg_pool2d(feature_map, self.pool, ceil_mode=True, count_include_pad=False)
        size = None
        if self.relative:
            pooled = pooled.detach()
            size = _size_of(pooled)
            pooled = pooled / size
        x = self.reduce(pooled)
        state = torch.tanh(x)
        inputs = [cell.project_input(x) for cell in self.cells]
        self.semantic_maps = []
        for t in range(self.iterations):
            shared = min(t, len(self.cells) - 1)
            guide = None
            if self.semantic is not None:
                semantic_map = self.semantic(state)
                if self.training:
                    self.semantic_maps.append(semantic_map)
                if self.guidance:
                    guide = semantic_map.softmax(dim=1)
            state = self.cells[shared](state, inputs[shared], guide)
        prompt = self.expand(state)
        if prompt.shape[-2:] != feature_map.shape[-2:]:
            prompt = F.interpolate(prompt, feature_map.shape[-2:], mode="bilinear", align_corners=False)
        if size is None:
            return feature_map + prompt
        scale, shift = prompt.chunk(2, dim=1)
        return feature_map + scale * feature_map + size * shift


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

        Taken apart once: each slice of its own would cost a map of zeros in the backward pass.
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
    relative: bool = False,
) -> int:
    """The number of a matcher's parameters in closed form; arguments as for `Matcher`."""
    inner = hidden + (num_classes if guidance else 0)
    cell = hidden * kernel**2 + 3 * hidden * (hidden + 1) + 2 * inner * kernel**2 + 3 * hidden * inner
    reduce = (channels + 1) * hidden
    semantic = (hidden + 1) * num_classes
    expand = (hidden + 1) * channels * (2 if relative else 1)
    return reduce + semantic + cell * (1 if share_weights else iterations) + expand


def semantic_loss(semantic_maps: list[Tensor], masks: Tensor) -> Tensor:
    """Σ_t cross-entropy of m_t [B, K, h, w] with the labels [B, H, W] at the maps' size."""
    labels = labels_at(masks, semantic_maps[0].shape[-2:])
    stacked = torch.cat(semantic_maps)
    return len(semantic_maps) * cross_entropy(stacked, labels.repeat(len(semantic_maps), 1, 1))
