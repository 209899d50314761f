"""LoRA and its relatives: what they adapt, published counts, and that every role trains and merges.

Counts are derived here from the networks' shapes. Where a comment names a paper's table, the printed number is quoted
as it is commonly restated; the tables themselves were not available. What was read (released code, public abstracts,
two benchmarks' READMEs) is said beside the number.
"""

import copy
import subprocess
import sys

import pytest
import torch

from harness.errors import UserError
from harness.models.network import UnsupportedMethod
from methods.modules.peft_family import Rows, SplitProjection, Target, find_targets, nearest_divisor, weight_of
from methods.peft_family import HRA, IA3, OFT, DoRA, LoHa, LoKr, LoRA
from reports.read.cited import load_published
from studies.search.spec import declared_space
from tests.support.tiny_methods import assert_merges, backbone, build, count, segmenter, train

FAMILY = [LoRA, DoRA, LoHa, LoKr, IA3, OFT, HRA]


def vit_b():
    """The layers of a ViT-B, RoBERTa-base or DeBERTa-base: C = 768 and MLPs of 4 C."""
    block = [Target(role, "", role, 768, 768) for role in ("q", "k", "v", "proj")]
    block += [Target("fc1", "", "fc1", 768, 3072), Target("fc2", "", "fc2", 3072, 768)]
    return 12 * block


def counted(method, targets, roles=None, **settings):
    built = method(method.Hyperparameters(**settings))
    return sum(built.added_parameters(target) for target in targets if roles is None or target.role in roles)


def test_lora_count_in_a_vit_b_is_the_published_one():
    """0.295 M in table 1 of FacT (arXiv 2212.03145), and 0.3 M for RoBERTa-base in LoRA's own table 2: rank 8, q, v."""
    real = count(LoRA, "vit_base_patch16_224")
    assert real == counted(LoRA, vit_b(), {"q", "v"}) == 12 * 2 * 8 * (768 + 768) == 294_912


def test_lora_count_in_gpt_3_is_the_published_one():
    """4.7 M in LoRA's table 4: rank 1 on q and v of 96 layers of width 12,288."""
    layers = 96 * [Target(role, "", role, 12288, 12288) for role in ("q", "v")]
    assert f"{counted(LoRA, layers, rank=1) / 1e6:.1f}" == "4.7"


def test_dora_share_in_llama_7b_is_the_published_one():
    """0.83 % for LoRA and 0.84 % for DoRA in DoRA's table 1, of all parameters, those added among them."""
    layer = [Target(role, "", role, 4096, 4096) for role in ("q", "k", "v")]
    layer += [Target("up", "", "fc1", 4096, 11008), Target("down", "", "fc2", 11008, 4096)]
    frozen = 6_738_415_616
    for method, share in ((LoRA, "0.83"), (DoRA, "0.84")):
        added = counted(method, 32 * layer, rank=32, alpha=64)
        assert f"{100 * added / (frozen + added):.2f}" == share


def test_hra_count_in_a_base_transformer_is_the_published_one():
    """0.66 M in HRA's table 1 (DeBERTaV3-base, rank 8, all linear layers); LoRA's 1.33 M in the same table."""
    assert f"{counted(HRA, vit_b()) / 1e6:.2f}" == "0.66"
    assert f"{counted(LoRA, vit_b()) / 1e6:.2f}" == "1.33"
    real = count(HRA, "vit_base_patch16_224", targets="all")
    assert real == counted(HRA, vit_b())


def test_ia3_scales_keys_values_and_mlp_activations():
    real = count(IA3, "vit_base_patch16_224")
    assert real == 12 * (768 + 768 + 3072)
    network = segmenter(IA3, "vit_tiny_patch16_224")
    block = network.backbone.stages[0][0]
    assert block.attn.qkv.k.ia3_l["default"].shape == (192, 1)
    assert block.mlp.fc2.ia3_l["default"].shape == (1, 768)
    assert isinstance(block.attn.qkv.q, Rows)


@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize("method", [LoRA, DoRA, LoHa, LoKr])
def test_closed_form_holds_at_other_ranks_and_on_all_layers(method, rank):
    for name in ("resnet10t", "pvt_v2_b0"):
        segmenter(method, name, rank=rank, targets="all")  # counted on building


@pytest.mark.parametrize("method", FAMILY)
def test_every_role_trains_and_merges(method):
    network = segmenter(method, "pvt_v2_b0", targets="all")
    assert train(network) == set()
    assert_merges(network, backbone("pvt_v2_b0"))


def test_lora_adapts_queries_and_values_of_a_fused_projection():
    network = segmenter(LoRA, "vit_tiny_patch16_224")
    split = network.backbone.stages[0][0].attn.qkv
    assert isinstance(split, SplitProjection)
    before = split(torch.ones(1, 1, 192))
    torch.testing.assert_close(before, split.fused(torch.ones(1, 1, 192)))
    with torch.no_grad():
        for part in (split.q, split.v):
            part.lora_B["default"].weight.fill_(1.0)
    q, k, v = (split(torch.ones(1, 1, 192)) - before).chunk(3, dim=-1)
    assert q.abs().max() > 1e-3 and v.abs().max() > 1e-3
    assert k.abs().max() == 0


def test_targets_of_a_fused_projection_are_its_q_k_and_v_rows():
    vit = backbone("vit_tiny_patch16_224")
    targets = {target.part: target for target in find_targets(vit, frozenset("qkv")) if "stages.0.0." in target.layer}
    fused = vit.stages[0][0].attn.qkv.weight
    for part, rows in zip("qkv", fused.chunk(3), strict=True):
        assert torch.equal(weight_of(vit, targets[part]), rows)


def test_dora_starts_with_row_norms_and_refuses_rows_of_zeros():
    network = segmenter(DoRA, "resnet10t")
    for _, module in network.backbone.named_modules():
        if hasattr(module, "lora_magnitude_vector"):
            magnitude = module.lora_magnitude_vector["default"].weight.flatten()
            torch.testing.assert_close(magnitude, module.base_layer.weight.flatten(1).norm(dim=1))
    bare = backbone("resnet10t")
    with torch.no_grad():
        bare.stages[0][0].conv1.weight[3] = 0
    with pytest.raises(UnsupportedMethod, match=r"stages.0.0.conv1 has a row of zeros"):
        build(DoRA, bare)


@pytest.mark.parametrize("method", [OFT, HRA])
def test_rotation_keeps_the_norms_of_weight_rows(method):
    network = segmenter(method, "vit_tiny_patch16_224", targets="proj")
    rows = network.backbone.stages[0][0].attn.proj.base_layer.weight.norm(dim=1).clone()
    train(network, steps=2)
    network.method.merge(network.backbone)
    torch.testing.assert_close(network.backbone.stages[0][0].attn.proj.weight.norm(dim=1), rows, rtol=1e-5, atol=1e-6)


def test_rotations_refuse_convolutions_with_larger_kernels():
    with pytest.raises(UnsupportedMethod, match="no layer that oft can adapt has a role of targets=merge"):
        segmenter(OFT, "convnext_atto", targets="merge")


@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (48, 24), (40, 40), (16, 16), (67, 1), (99, 33)])
def test_block_size_is_the_divisor_nearest_to_32(inputs, block):
    assert nearest_divisor(inputs, 32) == block


def test_role_that_the_network_lacks_is_named():
    with pytest.raises(UnsupportedMethod, match="no layer that lora can adapt has a role of targets=q,v"):
        segmenter(LoRA, "resnet10t", targets="q,v")


def test_unknown_role_and_odd_number_of_reflections_are_refused():
    with pytest.raises(UserError, match="targets"):
        LoRA.Hyperparameters.parse("lora", {"targets": "q,grouped"})
    with pytest.raises(UserError, match="rank"):
        HRA.Hyperparameters.parse("hra", {"rank": "3"})


def test_copied_network_reads_its_own_weights():
    network = segmenter(LoRA, "vit_tiny_patch16_224").eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.backbone.stages[0][0].attn.qkv.fused.weight.zero_()
        assert not twin.backbone.stages[0][0].attn.qkv.q.base_layer.weight.any()
        assert network.backbone.stages[0][0].attn.qkv.q.base_layer.weight.any()


def test_importing_the_methods_imports_neither_torch_nor_peft():
    code = "import methods.peft_family, sys; sys.exit(any(m in sys.modules for m in ('torch', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_building_prints_nothing(capfd, recwarn):
    segmenter(OFT, "mobilenetv2_035")
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in recwarn if "peft" in str(w.filename)] == []


def test_rslora_scales_by_the_root_of_the_rank():
    def update(rank, alpha, **settings):
        """What factors of ones add to a layer, over the rank: the scale."""
        network = segmenter(LoRA, "vit_tiny_patch16_224", rank=rank, alpha=alpha, **settings)
        layer = next(module for module in network.backbone.modules() if hasattr(module, "lora_A"))
        for factor in (layer.lora_A, layer.lora_B):
            torch.nn.init.ones_(factor["default"].weight)
        return float(layer.get_delta_weight("default").detach()[0, 0]) / rank

    assert update(64, 1.0) == pytest.approx(1 / 64)  # the published Swin-L row
    assert update(64, 1.0, rslora=True) == pytest.approx(1 / 8)
    assert update(16, 8.0) == pytest.approx(8 / 16) and update(16, 8.0, rslora=True) == pytest.approx(2)


def test_merged_rslora_is_exact():
    network = segmenter(LoRA, "vit_tiny_patch16_224", rank=16, rslora=True)
    train(network)
    assert_merges(network, backbone("vit_tiny_patch16_224"))


def test_lora_of_the_published_swin_l_row_trains_what_its_code_trains():
    """`MergedLinear(dim, 3 dim, r=64, enable_lora=[True, False, True])` in each of the 24 blocks: 256 C parameters."""
    widths = [192] * 2 + [384] * 2 + [768] * 18 + [1536] * 2
    assert count(LoRA, "swin_large_patch4_window7_224", rank=64, alpha=1) == 256 * sum(widths) == 4_620_288
    (row,) = [score for score in load_published() if (score.method, score.head) == ("lora", "uper")]
    assert "1/64" in row.note and "lora_alpha" in row.note


AUTHORS_RATES = {
    # microsoft/LoRA: GPT-2, RoBERTa-base; NVlabs/DoRA: LLaMA 3, VL-BART; r-three/t-few; Zeju1997/oft: ControlNet,
    # DreamBooth, text to image; DaShenZi721/HRA: LLaMA, DreamBooth, CoLA
    LoRA: (2e-4, 5e-4), DoRA: (1e-4, 1e-3), IA3: (3e-3,), OFT: (1e-5, 6e-5, 1e-4), HRA: (1e-5, 1e-4, 4e-3),
}  # fmt: skip


@pytest.mark.parametrize("method", AUTHORS_RATES)
def test_searched_rates_hold_those_of_the_authors(method):
    searched = declared_space(method)["lr"]
    assert all(searched.low <= rate <= searched.high for rate in AUTHORS_RATES[method])


def test_default_rate_of_oft_is_within_ten_times_of_its_authors():
    assert OFT.Hyperparameters().lr <= 10 * 6e-5
