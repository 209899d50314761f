"""The outputs of frozen stages can be computed separately, bit-identical to a whole forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from harness.method import methods
from harness.models.backbones.backbone import StagedBackbone, StageOutputs
from harness.models.network import Segmenter, build_segmenter
from tests.support.tiny_networks import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_from_any_stage_gives_the_same_maps(pristine, name):
    backbone: StagedBackbone = pristine(name)
    images = torch.randn(2, 3, 50, 75)  # no multiple of any stride
    stages = len(backbone.stages)
    assert backbone.count_frozen_stages() == stages
    expected = backbone(images)
    whole = backbone.prefix(images, stages)
    kept = [output.clone() for output in whole.outputs]
    other = copy.deepcopy(backbone)  # one that has seen no image yet, or one of another size
    other(torch.randn(1, 3, 64, 64))
    for begun in range(1, stages + 1):
        prefix = backbone.prefix(images, begun)
        longer = other.prefix(prefix, stages)
        assert all(map(torch.equal, whole.outputs, longer.outputs))
        for given in (prefix, longer.first(begun)):
            assert all(map(torch.equal, expected, other(given)))
    assert all(map(torch.equal, kept, whole.outputs))


STAGES = {
    "linear": {"resnet10t": 4, "vit_tiny_patch16_224": 4},
    "full": {"resnet10t": 0, "vit_tiny_patch16_224": 0},
    "spm": {"resnet10t": 1, "vit_tiny_patch16_224": 1},
    "spm gaps=3": {"resnet10t": 3, "vit_tiny_patch16_224": 3},
    "partial blocks=1": {"resnet10t": 3, "vit_tiny_patch16_224": 3},
    "lora": {"resnet10t": 0, "vit_tiny_patch16_224": 0},
    "side": {"resnet10t": 0, "vit_tiny_patch16_224": 0},
    "vpt_shallow": {"vit_tiny_patch16_224": 0},
    "vpt_pad": {"resnet10t": 0, "vit_tiny_patch16_224": 0},
    "norm": {"resnet10t": 0, "vit_tiny_patch16_224": 0},
}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, names in STAGES.items() for name in names])
def test_method_trains_the_same_from_the_frozen_prefix(pristine, method, name):
    stages = STAGES[method][name]
    network = _attached(pristine(name), method)
    assert network.backbone.count_frozen_stages() == stages
    images = torch.randn(2, 3, 50, 75)
    masks = torch.randint(0, 3, (2, 50, 75))
    if stages:
        prefix = network.backbone.prefix(images, stages)
        assert not any(output.requires_grad for output in prefix.outputs)
        whole, begun = (_gradients(copy.deepcopy(network), given, masks) for given in (images, prefix))
        assert whole.keys() == begun.keys() and all(torch.equal(whole[key], begun[key]) for key in whole)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("method", ["linear", "side"])
def test_no_gradient_enters_the_backbone_of_linear_and_side(pristine, method, name):
    network = _attached(pristine(name), method).train()
    inside = {id(module) for part in (network.backbone.stem, network.backbone.stages) for module in part.modules()}
    seen: list[str] = []
    for module_name, module in network.named_modules():
        if id(module) in inside and not list(module.children()):
            module.register_forward_hook(
                lambda module, inputs, output, which=module_name: (
                    seen.append(which) if isinstance(output, torch.Tensor) and output.requires_grad else None
                )
            )
    loss, _ = network(torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)))
    loss.backward()
    assert seen == []


def test_changed_stage_does_not_count_as_frozen(pristine):
    def hooked(stage: nn.Module) -> None:
        next(stage.modules()).register_forward_hook(lambda *_: None)

    def replaced(stage: nn.Module) -> None:
        parent = next(module for module in stage.modules() if isinstance(getattr(module, "conv1", None), nn.Conv2d))
        parent.conv1 = copy.deepcopy(parent.conv1)

    def removed(stage: nn.Module) -> None:
        name = next(name for name, module in stage.named_modules() if isinstance(module, nn.Conv2d))
        parent, _, leaf = name.rpartition(".")
        delattr(stage.get_submodule(parent), leaf)

    def overridden(stage: nn.Module) -> None:
        module = next(module for module in stage.modules() if isinstance(module, nn.Conv2d))
        module.forward = lambda x: x

    def other_class(stage: nn.Module) -> None:
        module = next(module for module in stage.modules() if isinstance(module, nn.Conv2d))
        module.__class__ = type("Other", (type(module),), {})

    def trained(stage: nn.Module) -> None:
        next(stage.parameters()).requires_grad_(True)

    def parametrised(stage: nn.Module) -> None:
        module = next(module for module in stage.modules() if isinstance(module, nn.Conv2d))
        nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())

    for change in (hooked, replaced, removed, overridden, other_class, trained, parametrised):
        backbone = pristine("resnet10t")
        change(backbone.stages[2])
        assert backbone.count_frozen_stages() == 2, change.__name__
    backbone = pristine("resnet10t")
    backbone.unfreeze(backbone.stages[1])
    assert backbone.count_frozen_stages() == 1
    hooked(backbone.stem)
    assert backbone.count_frozen_stages() == 0


def _attached(backbone: StagedBackbone, described: str) -> Segmenter:
    method, *settings = described.split()
    chosen = methods.get(method)
    hyperparameters = chosen.Hyperparameters.parse(method, dict(setting.split("=") for setting in settings))
    return build_segmenter(backbone, chosen(hyperparameters), "fpn:16", 3, seed=0)


def _gradients(network: Segmenter, given: torch.Tensor | StageOutputs, masks: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    loss, _ = network.train()(given, masks)
    loss.backward()
    return {name: parameter.grad for name, parameter in network.trained_parameters() if parameter.grad is not None}
