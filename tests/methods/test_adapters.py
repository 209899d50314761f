"""Adapters of all kinds: what each one owes on every family, what it computes, and the counts that papers print.

Counts are derived here from the networks' shapes. Where a comment names a paper's table, the printed figure is quoted
as it is commonly restated; the tables themselves were not at hand. What was read (released code, public abstracts, two
benchmarks' READMEs) is said so beside the figure.
"""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from harness.models.backbones import families
from harness.models.network import UnsupportedMethod, build_segmenter
from methods.adapter import Adapter
from methods.adaptformer import AdaptFormer
from methods.conv_adapter import ConvAdapter
from methods.convpass import Convpass
from methods.lorand import LoRand
from methods.modules.conv_adapter import ConvAdapterModule
from methods.mona import Mona
from methods.repadapter import RepAdapter

METHODS = {method.name: method for method in (Adapter, AdaptFormer, Convpass, ConvAdapter, RepAdapter, Mona, LoRand)}
SMALL_SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
NETWORKS = {
    "resnet10t": {},
    "mobilenetv2_035": {},
    "convnext_atto": {"depths": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": SMALL_SWIN,
    "swinv2_tiny_window8_256": SMALL_SWIN,
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"depth": 4},
    "vit_small_patch14_reg4_dinov2": {"depth": 4, "embed_dim": 64, "num_heads": 2},
    "eva02_tiny_patch14_224": {"depth": 4},
    "eva02_base_patch14_224": {"depth": 4, "embed_dim": 64, "num_heads": 2},
}
UNSUPPORTED = {
    "adaptformer": {"resnet10t", "mobilenetv2_035"},
    "convpass": {"resnet10t", "mobilenetv2_035"},
    "repadapter": {"resnet10t", "mobilenetv2_035"},
    "conv_adapter": {
        name for name in NETWORKS if name.startswith(("swin", "pvt", "vit", "eva"))
    },
}  # fmt: skip
PAIRS = [(m, n) for m in METHODS for n in NETWORKS if n not in UNSUPPORTED.get(m, ())]
CLASSES = 3


@functools.cache
def _built(name):
    torch.manual_seed(0)
    options = families._families[families._module_of(name)].options | NETWORKS[name]
    built = families.cut(name, timm.create_model(name, num_classes=0, **options))
    for parameter in built.parameters():
        if parameter.abs().max() < 1e-3:  # else a branch that timm starts at zero hides what is inside it
            parameter.copy_(torch.rand(parameter.shape) / 10)
    return built


def bare(name):
    """A frozen backbone of its own, with random weights."""
    return copy.deepcopy(_built(name))


def segmenter(method, name, **settings):
    cls = METHODS[method]
    return build_segmenter(bare(name), cls(cls.Hyperparameters(**settings)), "fpn:8", CLASSES, seed=0)


def images(height=64, width=48):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def train(network, steps=2):
    """A few steps; the names of the trained parameters that no step gave a gradient."""
    network.train()
    masks = torch.arange(64 * 48).reshape(1, 64, 48).expand(2, -1, -1) % CLASSES
    optimizer = torch.optim.AdamW([parameter for _, parameter in network.trained_parameters()], lr=1e-2)
    silent = {name for name, _ in network.trained_parameters()}
    for _ in range(steps):
        loss, _ = network(images(), masks)
        loss.backward()
        silent -= {n for n, p in network.trained_parameters() if p.grad is not None and bool(p.grad.ne(0).any())}
        optimizer.step()
        optimizer.zero_grad()
    return silent


@functools.cache
def trained(method, name):
    """Of a short training: is each frozen tensor unchanged, which parameters had no gradient, and the network."""
    network = segmenter(method, name)
    kept = network.trained_state().keys()
    frozen = {key: tensor.clone() for key, tensor in network.state_dict().items() if key not in kept}
    silent = train(network)
    after = network.state_dict()
    return [key for key, tensor in frozen.items() if not torch.equal(tensor, after[key])], silent, network


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_starts_as_the_frozen_backbone_to_the_bit(method, name):
    ours = segmenter(method, name).eval().backbone(images())
    for one, other in zip(ours, bare(name)(images()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_training_leaves_what_is_frozen_and_reaches_every_parameter(method, name):
    changed, silent, _ = trained(method, name)
    assert changed == []
    assert silent == set()


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_the_delta_rebuilds_the_network_and_holds_nothing_pretrained(method, name):
    *_, network = trained(method, name)
    delta = {key: tensor.clone() for key, tensor in network.trained_state().items()}
    assert all(key.startswith(("backbone.added.", "head.")) for key in delta)
    rebuilt = segmenter(method, name)
    rebuilt.load_trained_state(delta)
    with torch.no_grad():
        assert torch.equal(network.eval()(images()), rebuilt.eval()(images()))


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_the_network_stands_on_its_own(method):
    name = "convnext_atto" if method == "conv_adapter" else "vit_tiny_patch16_224"
    *_, network = trained(method, name)
    twin = copy.deepcopy(network).eval()
    with torch.no_grad():
        before = network.eval()(images())
        for _, parameter in twin.trained_parameters():
            parameter.zero_()
        twin(images(32, 32))
        assert torch.equal(before, network(images()))


@pytest.mark.parametrize(("method", "name"), [(m, n) for m, names in UNSUPPORTED.items() for n in sorted(names)])
def test_what_is_not_supported_is_refused_with_a_reason(method, name):
    with pytest.raises(UnsupportedMethod, match="its blocks have no"):
        segmenter(method, name)


# ---- what each computes ---------------------------------------------------------------------------------------------


class Stirred:
    """The adapted ViT, its added modules drawn at random, and one of its blocks: what enters, what leaves."""

    def __init__(self, method, index=1, name="vit_small_patch14_reg4_dinov2", **settings):
        self.backbone = segmenter(method, name, **settings).backbone.eval()
        torch.manual_seed(3)
        for parameter in self.backbone.added.parameters():
            nn.init.normal_(parameter, std=0.2)
        place = self.backbone.blocks[index].module
        place.register_forward_hook(lambda module, inputs, output: self.__dict__.update(x=inputs[0], y=output))
        with torch.no_grad():
            self.backbone(images())
        self.block = bare(name).blocks[index].module
        path = next(path for path, module in self.backbone.named_modules() if module is place).replace(".", "_")
        self.added = [module for key, module in self.backbone.added.items() if key.startswith(f"{path}_")]

    def attention(self, x):
        return self.block.ls1(self.block.attn(self.block.norm1(x)))

    def mlp(self, x):
        return self.block.ls2(self.block.mlp(self.block.norm2(x)))

    def puts_out(self, y):
        torch.testing.assert_close(self.y, y, rtol=1e-4, atol=1e-4)
        return True


@torch.no_grad()
def test_adapter_stands_behind_attention_and_mlp_before_the_residual_addition():
    block = Stirred("adapter")
    behind_attention, behind_mlp = block.added
    x = block.x + behind_attention(block.attention(block.x))
    assert block.puts_out(x + behind_mlp(block.mlp(x)))


@torch.no_grad()
def test_pfeiffers_adapter_stands_behind_the_mlp_alone():
    block = Stirred("adapter", variant="pfeiffer")
    (behind_mlp,) = block.added
    x = block.x + block.attention(block.x)
    assert block.puts_out(x + behind_mlp(block.mlp(x)))


@torch.no_grad()
def test_adaptformer_adds_a_tenth_of_the_bottleneck_of_what_enters_the_mlps_norm():
    block = Stirred("adaptformer")
    (beside_mlp,) = block.added
    x = block.x + block.attention(block.x)
    change = beside_mlp.up(F.relu(beside_mlp.down(x)))
    assert block.puts_out(x + block.mlp(x) + 0.1 * change)


@torch.no_grad()
def test_convpass_convolves_patches_on_their_grid_and_each_prefix_token_as_a_map_of_one_pixel():
    block = Stirred("convpass")

    def bypass(module, z):
        inner = module.down(z)
        inner = inner * torch.sigmoid(1.702 * inner)
        patches = inner[:, 5:].transpose(1, 2).reshape(2, 8, 5, 4)  # 64×48 in patches of 14, padded
        patches = module.convolution(patches).flatten(2).transpose(1, 2)
        prefix = [module.convolution(inner[:, i, :, None, None])[:, None, :, 0, 0] for i in range(5)]
        inner = torch.cat([*prefix, patches], dim=1)
        return module.up(inner * torch.sigmoid(1.702 * inner))

    beside_attention, beside_mlp = block.added
    x = block.x + block.attention(block.x) + bypass(beside_attention, block.block.norm1(block.x))
    assert block.puts_out(x + block.mlp(x) + bypass(beside_mlp, block.block.norm2(x)))


@torch.no_grad()
def test_mona_stands_on_the_residual_stream():
    block = Stirred("mona")
    changes = [module.change for module in block.added if hasattr(module, "change")]
    x = block.x + block.attention(block.x)
    x = x + changes[0](x)
    x = x + block.mlp(x)
    assert block.puts_out(x + changes[1](x))


@torch.no_grad()
def test_mona_scales_norm_and_identity_and_averages_three_filters():
    block = Stirred("mona", name="vit_tiny_patch16_224")
    module = next(m.change for m in block.added if hasattr(m, "change"))
    x = torch.randn(2, 1 + 12, 192)
    scaled = module.gamma * F.layer_norm(x, (192,), module.norm.weight, module.norm.bias) + module.gamma_x * x
    z = module.down(scaled)[:, 1:].transpose(1, 2).reshape(2, 64, 4, 3)
    z = z + (module.filter.depth[0](z) + module.filter.depth[1](z) + module.filter.depth[2](z)) / 3
    z = z + module.filter.point(z)
    expected = module.up(F.gelu(z).flatten(2).transpose(1, 2))
    torch.testing.assert_close(module(x)[:, 1:], expected, rtol=1e-4, atol=1e-4)
    assert [(*c.kernel_size, c.groups) for c in module.filter.depth] == [(k, k, 64) for k in (3, 5, 7)]


def test_mona_starts_with_the_norm_at_a_millionth_beside_the_identity():
    change = next(m for m in segmenter("mona", "resnet10t").modules() if hasattr(m, "gamma_x"))
    assert change.gamma.unique().tolist() == [pytest.approx(1e-6)] and change.gamma_x.unique().tolist() == [1]


@torch.no_grad()
def test_repadapter_is_a_linear_map_between_the_norm_and_the_branch():
    block = Stirred("repadapter")
    before_attention, before_mlp = block.added
    own = block.block
    x = block.x + own.ls1(own.attn(before_attention(own.norm1(block.x))))
    assert block.puts_out(x + own.ls2(own.mlp(before_mlp(own.norm2(x)))))
    z = torch.randn(7, 64)
    matrix, constant = before_mlp.affine()
    torch.testing.assert_close(before_mlp(z), (z.double() @ matrix.T + constant).float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lorand_shares_the_kernels_of_its_two_projections():
    block = Stirred("lorand")
    adapter = block.added[0]
    z = torch.randn(5, 64)
    down = sum(adapter.down_left[i] @ adapter.kernel[i] @ adapter.down_right[i] for i in range(2))
    up = sum(adapter.up_left[i] @ adapter.kernel[i] @ adapter.up_right[i] for i in range(2))
    assert down.shape == (64, 8) and up.shape == (8, 64)
    torch.testing.assert_close(adapter(z), z + F.gelu(z @ down) @ up)
    x = block.x + adapter(block.attention(block.x))
    assert block.puts_out(x + block.added[1](block.mlp(x)))


@torch.no_grad()
def test_conv_adapter_is_added_to_what_the_convolution_puts_out():
    backbone = segmenter("conv_adapter", "resnet10t").backbone.eval()
    adapter = backbone.added["stages_1_0_conv1_beside"]
    nn.init.normal_(adapter.point.weight)
    seen = {}
    layer = backbone.get_submodule("stages.1.0.conv1")
    layer.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    backbone(images())
    plain = F.conv2d(seen["x"], layer.weight, None, layer.stride, layer.padding)
    inner = F.relu(F.conv2d(seen["x"], adapter.depth.weight, adapter.depth.bias, 2, 1, groups=8))
    expected = plain + adapter.scale * F.conv2d(inner, adapter.point.weight, adapter.point.bias)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)


def test_conv_adapter_takes_kernel_stride_and_dynamic_padding_of_its_convolution():
    backbone = families.cut("tf_efficientnet_lite0", families.create("tf_efficientnet_lite0"))
    plain = backbone(images(65, 47))
    build_segmenter(backbone, ConvAdapter(ConvAdapter.Hyperparameters()), "fpn:8", CLASSES, seed=0)
    assert all(torch.equal(one, other) for one, other in zip(plain, backbone(images(65, 47)), strict=True))
    adapters = [module for module in backbone.added.values() if isinstance(module, ConvAdapterModule)]
    assert len(adapters) == len(backbone.blocks)
    assert {adapter.depth.kernel_size for adapter in adapters} == {(3, 3), (5, 5)}


# ---- folding RepAdapter in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for method, name in PAIRS if method == "repadapter"])
def test_a_merged_repadapter_puts_out_the_same_and_leaves_a_plain_network(name):
    network = copy.deepcopy(trained("repadapter", name)[2]).eval()
    hooks = sum(len(module._forward_pre_hooks) for module in network.modules())
    with torch.no_grad():
        before = network(images())
        assert (before - segmenter("repadapter", name).eval()(images())).abs().max() > 1e-2
        network.method.merge(network.backbone)
        after = network(images())
    assert len(network.backbone.added) == 0 and hooks > 0
    assert sum(len(module._forward_pre_hooks) for module in network.modules()) == 0
    assert (before - after).abs().max() <= 1e-5 * max(1, before.abs().max())
    added = network.backbone.state_dict().keys() ^ bare(name).state_dict().keys()
    assert all(key.endswith(".bias") for key in added)  # of layers that had none
    if not name.startswith(("eva", "swinv2")):
        assert not added


def test_a_merged_repadapter_is_exact_in_convolutional_mixers_and_their_projections():
    backbone = families.cut("caformer_s18", families.create("caformer_s18"))
    method = RepAdapter(RepAdapter.Hyperparameters())
    method.attach(backbone, CLASSES)
    for parameter in backbone.added.parameters():
        nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        before = backbone.eval()(images())
        method.merge(backbone)
        after = backbone(images())
    assert len(backbone.added) == 0
    for one, other in zip(before, after, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1, one.abs().max())


def test_a_merged_repadapter_holds_under_padded_windows_and_grouped_scales():
    network = segmenter("repadapter", "swin_tiny_patch4_window7_224", scale=5, groups=4, width=16)
    train(network)
    with torch.no_grad():
        before = network.eval()(images(72, 40))
        network.method.merge(network.backbone)
        assert (before - network(images(72, 40))).abs().max() <= 1e-5 * max(1, before.abs().max())


def test_repadapter_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="not a multiple of groups"):
        RepAdapter.Hyperparameters(width=8, groups=3)
    answer = RepAdapter(RepAdapter.Hyperparameters(width=7, groups=7)).supports(bare("vit_tiny_patch16_224"))
    assert not answer and "192 channels" in answer


# ---- counts ---------------------------------------------------------------------------------------------------------


@functools.cache
def meta(name):
    """A network of full size without memory."""
    with torch.device("meta"):
        return families.cut(name, families.create(name))


def count(method, name, **settings):
    cls = METHODS[method]
    return cls(cls.Hyperparameters(**settings)).parameter_count(meta(name), 150)


SWIN_L = "swin_large_patch4_window7_224"
WIDTHS = [192] * 2 + [384] * 2 + [768] * 18 + [1536] * 2  # of Swin-L's blocks


@pytest.mark.parametrize(
    ("millions", "method", "name", "settings"),
    [
        # V-PETL Bench (NeurIPS 2024), README, ADE20K with Swin-L
        (4.66, "adapter", SWIN_L, {}),
        (1.31, "lorand", SWIN_L, {}),
        # Vireo's tables 4 and 6, AdaptFormer in DINOv2-L and EVA02-L
        (3.17, "adaptformer", "vit_large_patch14_dinov2", {}),
        (3.17, "adaptformer", "eva02_large_patch14_224", {}),
        # VTAB-1k tables (as in arXiv 2207.07039), ViT-B/16: AdaptFormer of width 8, Convpass, Convpass-attn; the
        # Convpass repository's 1.4 MB a task is its 0.33 M in float32 and a classifier
        (0.16, "adaptformer", "vit_base_patch16_224", {"width": 8}),
        (0.33, "convpass", "vit_base_patch16_224", {}),
        (0.16, "convpass", "vit_base_patch16_224", {"beside": "attention"}),
        # HyperAdapter's table 12, SETR-PUP on ViT-L/16: 13.82 with RepAdapter, 13.18 without
        (0.64, "repadapter", "vit_large_patch16_224", {}),
    ],
)
def test_the_closed_form_gives_the_count_that_is_published(millions, method, name, settings):
    assert round(count(method, name, **settings) / 1e6, 2) == millions


def test_adaptformer_of_width_64_in_vit_b_and_its_paper_which_counts_a_classifier_of_100_classes():
    own = count("adaptformer", "vit_base_patch16_224")
    assert own == 12 * (2 * 768 * 64 + 64 + 768)
    assert int((own + 769 * 100) / 1e4) / 100 == 1.26  # AdaptFormer-64, table 1, cut after two digits


def test_repadapters_paper_counts_weights_without_biases():
    biases = 24 * (8 + 768)
    assert round((count("repadapter", "vit_base_patch16_224") - biases) / 1e6, 2) == 0.22  # table 1, VTAB-1k
    assert 2 * count("repadapter", "vit_base_patch16_224", before="attention") == 239808


def test_mona_in_swin_l_counts_what_the_released_code_trains_and_5_08_where_some_is_left_out():
    filters = 64 * (9 + 25 + 49 + 3) + 64 * 64 + 64
    code = sum(2 * (4 * c + (c + 1) * 64 + (64 + 1) * c + filters) for c in WIDTHS)
    assert count("mona", SWIN_L) == code == 5_267_712
    # The paper and V-PETL Bench print 5.08 M, which no version of that code trains. Without norms, scales and the
    # projections' biases it is the printed number; that this is how it came about is our guess.
    left_out = sum(2 * (4 * c + 64 + c) for c in WIDTHS)
    assert round((code - left_out) / 1e6, 2) == 5.08


def test_lorands_variants_cost_what_rank_and_branches_say():
    terms = sum(2 * 2 * (c + c // 8) for c in WIDTHS)  # times α β, and α β² for the kernel
    for branches, rank in ((2, 8), (4, 8), (4, 16)):
        expected = branches * rank * terms + 48 * branches * rank**2
        assert count("lorand", SWIN_L, branches=branches, rank=rank) == expected


def test_conv_adapter_in_resnet50_is_the_formula_over_its_3x3_convolutions():
    widths = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
    for gamma in (4, 8):
        depth = sum(9 * w + w // gamma for w in widths)
        point = sum(w * w // gamma + w for w in widths)
        assert count("conv_adapter", "resnet50", compression=gamma) == depth + point + sum(widths)
