"""VPT, SSF, FacT and Rein: what each owes on one tiny network a family, their structure, and published counts.

Counts are derived here from the networks' shapes. Where a comment names a paper's table, the printed figure is quoted
as it is commonly restated; the tables themselves were not at hand. What was read (released code, public abstracts, two
benchmarks' READMEs) is said so beside the figure.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from harness.contract.cases import Case
from harness.method import Unsupported
from harness.models.backbones import families
from harness.models.network import UnsupportedMethod, build_segmenter
from methods.fact import FacT
from methods.modules.factors import Increment, SharedFactors
from methods.modules.prompts import Border
from methods.modules.refinement import Refinement, SharedRefinement
from methods.rein import Rein
from methods.ssf import SSF
from methods.vpt import VPTDeep, VPTPad, VPTShallow

CNNS = ["resnet10t", "mobilenetv2_035", "regnetx_002", "convnext_atto"]
HIERARCHICAL = ["swin_tiny_patch4_window7_224", "pvt_v2_b0"]
PLAIN = ["vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb"]  # the second is rotary
ROTARY_SWIGLU = "eva02_tiny_patch14_224"
EVERYWHERE = [*CNNS, *HIERARCHICAL, *PLAIN, ROTARY_SWIGLU]
CELLS = [
    *((method, name) for method in (VPTPad, SSF, Rein) for name in EVERYWHERE),
    *((method, name) for method in (VPTShallow, VPTDeep) for name in (*PLAIN, ROTARY_SWIGLU)),
    *((FacT, name) for name in (*HIERARCHICAL, *PLAIN)),
]
REFUSED = [
    *((method, name) for method in (VPTShallow, VPTDeep) for name in (*CNNS, *HIERARCHICAL)),
    *((FacT, name) for name in (*CNNS, ROTARY_SWIGLU)),
]
CLASSES = 3


@pytest.fixture(scope="module")
def pristine():
    """name -> a copy of one backbone, as small as the contract has it.

    What timm initialises to almost zero is drawn at random, so that no branch is closed.
    """
    built = {}

    def get(name):
        if name not in built:
            built[name] = Case(SSF, name).frozen_backbone()
            generator = torch.Generator().manual_seed(0)
            for parameter in built[name].parameters():
                if parameter.abs().max() < 1e-3:
                    parameter.data.copy_(torch.rand(parameter.shape, generator=generator) / 10)
        return copy.deepcopy(built[name])

    return get


def attached(method, backbone, **settings):
    return build_segmenter(backbone, method(method.Hyperparameters(**settings)), "fpn:8", CLASSES, seed=0)


def batch(size=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, size, size, generator=generator), torch.randint(
        0, CLASSES, (2, size, size), generator=generator
    )


def disturb(network):
    """Trained tensors as after a training: nothing is at its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in network.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("method", "name"), CELLS, ids=lambda value: getattr(value, "name", value))
def test_it_keeps_what_is_frozen_trains_all_it_adds_and_is_rebuilt_from_its_delta(method, name, pristine):
    images, masks = batch()
    bare = pristine(name)
    network = attached(method, pristine(name))  # its count is checked on building
    if method.changes_start is None:
        for ours, theirs in zip(network.eval().backbone(images), bare(images), strict=True):
            assert torch.equal(ours, theirs)
    reached = set()
    optimizer = torch.optim.AdamW([parameter for _, parameter in network.trained_parameters()], lr=1e-2)
    network.train()
    for _ in range(2 if method is FacT else 1):  # V at zero hides the other factors until it has moved
        loss, _ = network(images, masks)
        loss.backward()
        reached |= {key for key, parameter in network.trained_parameters() if parameter.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert {key for key, _ in network.trained_parameters()} - reached == set()

    trained = network.trained_state()
    assert all(torch.equal(tensor, network.backbone.state_dict()[key]) for key, tensor in bare.state_dict().items())
    assert len(network.state_dict()) == len(bare.state_dict()) + len(trained)
    rebuilt = attached(method, pristine(name))
    rebuilt.load_trained_state(trained)
    assert torch.equal(network.eval()(images), rebuilt.eval()(images))


@pytest.mark.parametrize(("method", "name"), REFUSED, ids=lambda value: getattr(value, "name", value))
def test_it_says_why_not(method, name, pristine):
    backbone = pristine(name)
    answer = method(method.Hyperparameters()).supports(backbone)
    assert isinstance(answer, Unsupported) and len(answer) > 20
    with pytest.raises(UnsupportedMethod, match=method.name):
        attached(method, backbone)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", ROTARY_SWIGLU])
def test_the_border_leaves_maps_their_size_on_images_of_any_size(name, pristine):
    bare = pristine(name)
    backbone = attached(VPTPad, pristine(name)).backbone
    for height, width in ((64, 64), (50, 75)):
        images = torch.randn(1, 3, height, width)
        for ours, theirs in zip(backbone(images), bare(images), strict=True):
            assert ours.shape == theirs.shape


def test_the_border_surrounds_the_image_and_cells_stay_in_place():
    border = Border(5, 64, (4, 8, 16, 32), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    images = torch.randn(2, 3, 64, 64)
    framed = border.surround(images)
    assert border.margin == 32 and framed.shape == (2, 3, 128, 128)
    assert torch.equal(framed[..., 32:96, 32:96], images)
    assert (framed[..., :27, :] == 0).all() and (framed[..., 101:] == 0).all()
    colours = torch.cat([border.top_bottom[:, :, :5], border.top_bottom[:, :, 5:]], dim=2)
    normalised = (colours - border.mean) / border.std
    torch.testing.assert_close(framed[:1, :, 27:32, 27:101], normalised[:, :, :5])
    torch.testing.assert_close(framed[1:, :, 96:101, 27:101], normalised[:, :, 5:])
    pooled = [nn.functional.avg_pool2d(framed, stride) for stride in border.strides]
    for cut, stride in zip(border(pooled), border.strides, strict=True):
        torch.testing.assert_close(cut, nn.functional.avg_pool2d(images, stride))


def test_a_border_is_resampled_along_the_image_and_every_pixel_has_a_share():
    border = Border(3, 224, (4, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    border.surround(torch.zeros(1, 3, 32, 48)).sum().backward()
    assert (border.top_bottom.grad > 0).all() and (border.left_right.grad > 0).all()


def test_prompts_start_uniform_and_deep_ones_are_of_every_block(pristine):
    backbone = attached(VPTDeep, pristine("vit_tiny_patch16_224"), length=7).backbone
    tokens = backbone.added["prompts"].tokens
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    assert tokens.shape == (12, 7, 192)
    assert 0.95 * bound < tokens.abs().max() <= bound and abs(tokens.mean()) < 0.05 * bound
    shallow = attached(VPTShallow, pristine("vit_tiny_patch16_224"), length=7).backbone
    assert shallow.added["prompts"].tokens.shape == (1, 7, 192)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_ssf_folds_into_the_backbone(name, pristine):
    bare = pristine(name)
    assert_merges(attached(SSF, pristine(name)), bare)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "convnextv2_atto", "poolformer_s12"])
def test_ssf_folds_into_fused_projections_and_norms_of_every_kind(name, pristine):
    assert_merges(attached(SSF, pristine(name)), pristine(name))


@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb", "pvt_v2_b0"])
def test_fact_folds_into_the_backbone(name, form, pristine):
    assert_merges(attached(FacT, pristine(name), form=form, rank=4), pristine(name))


def assert_merges(network, bare):
    images, _ = batch()
    disturb(network)
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        before, start = network(images), bare(images)[-1]
        moved = network.backbone(images)[-1]
        network.method.merge(network.backbone)
        after = network(images)
    assert not torch.allclose(moved, start, rtol=1e-2)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max().clamp(min=1)
    assert not any(parameter.requires_grad for parameter in network.backbone.parameters())
    assert len(network.backbone.added) == 0
    names = set(network.backbone.state_dict())
    assert names >= set(bare.state_dict())
    assert all(name.endswith(".bias") for name in names - set(bare.state_dict()))


def test_ssf_stands_between_a_norm_and_its_fused_activation(pristine):
    network = attached(SSF, pristine("mobilenetv2_035"))
    backbone = network.backbone
    with torch.no_grad():
        backbone.added["stem_1_drop_after"].shift.fill_(-1e6)
    stem = backbone.stem(torch.randn(1, 3, 32, 32))
    assert (stem == 0).all()  # ReLU6 came after the shift


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_an_increment_is_u_sigma_v_slice_by_slice(form):
    torch.manual_seed(0)
    tucker, rank, width = form == "tk", 2, 6
    shared = SharedFactors(width, rank, 9, tucker)
    nn.init.normal_(shared.v)
    wide = Increment(shared, True, 1, 4, 3, tucker, 0.5, 0.1).eval()
    tall = Increment(shared, False, 4, 1, 3, tucker, 0.5, 0.1).eval()
    for module, rows, columns in ((wide, 4, 1), (tall, 1, 4)):
        weight = module.weight()
        assert weight.shape == (rows * width, columns * width)
        for number in range(4):
            i, j = (0, number) if columns == 1 else (number, 0)
            if tucker:
                sigma = torch.einsum("ijk,k->ij", shared.core, shared.rows[:, 3 + number])
            else:
                sigma = module.middle[i * rank : (i + 1) * rank, j * rank : (j + 1) * rank]
            square = weight[j * width : (j + 1) * width, i * width : (i + 1) * width]
            torch.testing.assert_close(square, 0.5 * (shared.u @ sigma @ shared.v).T)
    x = torch.randn(2, 5, 4 * width)
    torch.testing.assert_close(tall(x), x @ tall.weight().T)


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_fact_trains_all_factors_in_both_forms(form, pristine):
    network = attached(FacT, pristine("vit_tiny_patch16_224"), form=form, rank=4).train()
    disturb(network)
    loss, _ = network(*batch())
    loss.backward()
    assert [key for key, parameter in network.trained_parameters() if not parameter.grad.abs().sum() > 0] == []
    names = [key for key in network.trained_state() if key.startswith("backbone.")]
    assert len(names) == {"tt": 2 + 12 * 4, "tk": 4}[form]


def test_a_refinement_is_the_formula_and_its_first_token_adds_nothing():
    torch.manual_seed(0)
    shared = SharedRefinement(8, 0.25)
    module = Refinement(shared, True, channels=8, tokens=5, rank=2, patch=4)
    f = torch.randn(2, 8, 3, 4)
    tokens = module.a @ module.b
    expected = torch.empty_like(f)
    for n in range(2):
        for y in range(3):
            for x in range(4):
                feature = f[n, :, y, x]
                share = torch.softmax(tokens @ feature / math.sqrt(8), dim=0)
                gathered = sum(share[m] * shared.token_to_feature(tokens[m]) for m in range(1, 5))
                expected[n, :, y, x] = feature + 0.25 * shared.refine(gathered + feature)
    torch.testing.assert_close(module(f), expected)


def test_rein_passes_prefix_tokens_untouched_and_shares_one_refinement_in_a_vit(pristine):
    network = attached(Rein, pristine("deit_tiny_distilled_patch16_224"), rank=2, tokens=4)
    seen = []
    block = network.backbone.blocks[0].module
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    bare = pristine("deit_tiny_distilled_patch16_224")
    bare.blocks[0].module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images, _ = batch()
    network.eval().backbone(images), bare(images)
    assert torch.equal(seen[0][:, :2], seen[1][:, :2]) and not torch.equal(seen[0][:, 2:], seen[1][:, 2:])
    assert sum(name.endswith("refine.weight") for name, _ in network.trained_parameters()) == 1


def test_two_networks_and_a_copy_share_nothing(pristine):
    for method in (FacT, Rein):
        network = attached(method, pristine("vit_tiny_patch16_224"))
        other = copy.deepcopy(network)
        images, _ = batch()
        before = other.eval()(images)
        disturb(network)
        assert torch.equal(other(images), before)
        assert not torch.equal(network.eval()(images), before)


# ---- counts: closed form, on the shapes of published networks -------------------------------------------------------


def on_paper(name):
    """The backbone of that name without memory: shapes alone."""
    with torch.device("meta"):
        return families.cut(name, families.create(name))


def count(method, name, check=True, **settings):
    """The closed form, and, where `check`, the real count of what `attach` makes trainable."""
    with torch.device("meta"):
        backbone = on_paper(name)
        instance = method(method.Hyperparameters(**settings))
        counted = instance.parameter_count(backbone, 19)
        if check:
            instance.attach(backbone, 19)
            assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == counted
    return counted


def test_vpt_counts_prompts_of_a_block():
    """Paper, section 3.2, storing visual prompts: with 50 prompts on ViT-B, p·d = 0.038 M and N·p·d = 0.46 M."""
    assert count(VPTShallow, "vit_base_patch16_224", length=50) == 50 * 768 == 38_400
    assert count(VPTDeep, "vit_base_patch16_224", length=50) == 12 * 50 * 768 == 460_800
    assert count(VPTDeep, "vit_large_patch16_224", length=10) == 245_760


def test_vpt_pad_counts_as_the_code_shapes_its_tensors():
    """`setup_prompt_pad` of the released ResNet: [3, 2p, 224 + 2p] and [3, 224, 2p]; p = 5."""
    assert count(VPTPad, "resnet50", width=5) == 3 * 10 * 234 + 3 * 224 * 10 == 13_740


def test_ssf_counts_as_published():
    """Paper, ViT-B/16: 0.97 M tuned on ImageNet-1K with its classifier of 1000, 0.28 M on CIFAR-100."""
    ours = count(SSF, "vit_base_patch16_224")
    block = 768 + 3 * 768 + 768 + 768 + 4 * 768 + 768  # norm, qkv, proj, norm, fc1, fc2
    assert ours == 2 * (768 + 12 * block + 768) == 205_824
    assert round((ours + 769_000) / 1e6, 2) == 0.97
    assert round((ours + 76_900) / 1e6, 2) == 0.28


def test_ssf_counts_the_released_swin_and_the_merging_layers_that_it_leaves_out():
    """Swin-B by the released code: 22C a block, the norm of each merge, patch embedding and its norm; ours adds the
    merges' linear layers, and has no classifier's norm."""
    blocks = 22 * (2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024)
    merges, embedding, reductions = 8 * (128 + 256 + 512), 4 * 128, 4 * (128 + 256 + 512)
    assert count(SSF, "swin_base_patch4_window7_224") == blocks + merges + embedding + reductions


def test_fact_counts_as_published():
    """Paper: the tiny FacT-TT of rank 4 has 8 K parameters on ViT-B (abstract); Swin-B at rank 16."""
    assert count(FacT, "vit_base_patch16_224", rank=4) == 2 * 768 * 4 + 12 * 12 * 16 == 8_448
    assert count(FacT, "vit_base_patch16_224", rank=16) == 2 * 768 * 16 + 12 * 12 * 256 == 61_440
    tucker = count(FacT, "vit_base_patch16_224", rank=32, form="tk")
    assert tucker == 2 * 768 * 32 + 144 * 32 + 32**3 == 86_528  # `FacTp` of the code is [r, 144]
    assert count(FacT, "swin_base_patch4_window7_224", rank=16) == 32 * (128 + 256 + 512 + 1024) + 24 * 12 * 256


@pytest.mark.parametrize(("rank", "published"), [(4, 2.67), (8, 2.77), (16, 2.99), (32, 3.42), (64, 4.28)])
def test_rein_counts_as_published_less_the_link_to_queries(rank, published):
    """Paper, DINOv2 ViT-L, 100 tokens, by rank. The link is `transform`, C -> 256, and `merge`, 768 -> 256."""
    ours = count(Rein, "vit_large_patch14_dinov2", check=rank == 16, rank=rank)
    link = (1024 + 1) * 256 + (3 * 256 + 1) * 256
    assert round((ours + link) / 1e6, 2) == published
    if rank == 16:
        assert ours == 2_530_817 and ours + link == 2_990_081
