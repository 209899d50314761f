"""Protocol 2: what is equal for every row of a table. Each test fails under the rule that it replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from timm.layers import DropPath

from harness.engine.training import parameter_groups
from harness.errors import UserError
from harness.method import methods
from harness.models.backbones.weights import Weights, load_backbone
from harness.models.network import Segmenter, build_segmenter
from harness.runs.folder import RunFolder
from harness.runs.store import RunStore
from harness.spec import Budget, budgets
from reports.read.rows import read_row
from tests.support.in_process import call, refusal
from tests.support.made_runs import make_run, make_spec
from tests.support.tiny_cell import run_arguments


def build(name: str, backbone: str, drop_path: float = 0.0, auxiliary_head: float = 0.0, **settings: Any) -> Segmenter:
    method = methods.get(name)
    network = load_backbone(backbone, Weights("random", "random"), 0, drop_path)
    own = method(method.Hyperparameters.parse(name, settings))
    return build_segmenter(network, own, "linear", 3, 0, auxiliary_head)


def rates(network: Segmenter) -> dict[str, tuple[float, bool]]:
    """Name -> (learning rate, whether it decays) of every trained parameter."""
    groups = parameter_groups(network, network.method.hyperparameters)
    found = {id(p): (group["base_lr"], group["weight_decay"] > 0) for group in groups for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in network.trained_parameters()}


# ---- learning rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "spm", "bias"])
def test_head_learns_at_its_own_rate_whatever_the_method_learns_at(method: str) -> None:
    for lr in (1e-5, 1e-2):
        network = build(method, "resnet10t", auxiliary_head=0.4, lr=lr, head_lr=0.003)
        found = rates(network)
        heads = {name for name in found if name.startswith(("head.", "auxiliary."))}
        assert {found[name][0] for name in heads} == {0.003}
        assert lr in {found[name][0] for name in found.keys() - heads}


def test_default_rate_of_the_head_is_the_same_for_every_method() -> None:
    defaults = {methods.get(name).Hyperparameters.model_fields["head_lr"].default for name in methods.names()}
    assert len(defaults) == 1


def test_linear_has_no_rate_but_that_of_the_head() -> None:
    assert "lr" not in methods.get("linear").Hyperparameters.model_fields
    assert "it trains only the head; use head_lr" in refusal("run", "--method", "linear", "--set", "lr=0.01")


@pytest.mark.parametrize(
    ("method", "settings", "hint"),
    [
        ("lora", ["lr=0.002", "head_lr_scale=5"], "use head_lr=0.01, the head's own learning rate"),
        ("lora", ["head_lr_scale=5"], "use head_lr, the head's own learning rate"),  # its lr had another default
        ("linear", ["lr=0.003", "head_lr_scale=10"], "it trains only the head; use head_lr=0.03"),
        ("linear", ["lr=0.003"], "it trains only the head; use head_lr=0.003"),
        ("lora", ["lr=0.002", "head_lr_scale=x"], "use head_lr, the head's own learning rate"),
    ],
)
def test_old_rate_of_the_head_is_refused_with_what_to_write(method: str, settings: list[str], hint: str) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    assert refusal("run", "--method", method, *flags).partition("; ")[2].startswith(hint)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("power", ".inf", "line 4: power: .inf is not a finite number"),
        ("clip_norm", ".inf", "line 4: clip_norm: .inf is not a finite number"),
        ("clip_norm", "null", "clip_norm: null: use 0 for no clipping"),
        ("crop", "[96]", "crop: [96]: use [height, width] in pixels"),
    ],
)
def test_value_that_a_budget_refuses(field: str, value: str, message: str, tmp_path: Path) -> None:
    fields = {"steps": "4", "batch_size": "4", "crop": "[32, 32]", field: value}
    (tmp_path / "b.yaml").write_text("\n".join(f"{name}: {text}" for name, text in fields.items()))
    assert f"b.yaml: {message}" in refusal("run", "--budget", tmp_path / "b.yaml")


def test_field_of_the_budget_is_no_hyperparameter() -> None:
    assert refusal("run", "--method", "full", "--set", "drop_path=0.1").endswith("; it is a field of the budget")


# ---- weight decay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "backbone", "without"),
    [
        ("full", "test_vit", {"pos_embed", "cls_token"}),
        ("vpt_deep", "test_vit", {"tokens"}),
        ("vpt_pad", "resnet10t", {"top_bottom", "left_right"}),
        ("dora", "test_vit", {"lora_magnitude_vector"}),
        ("ia3", "test_vit", {"ia3_l"}),
        ("rein", "test_vit", {"a", "b"}),
        ("ssf", "resnet10t", {"scale", "shift"}),
    ],
)
def test_tokens_tables_magnitudes_and_scales_do_not_decay(method: str, backbone: str, without: set[str]) -> None:
    found = rates(build(method, backbone))
    for part in without:
        assert not any(decays for name, (_, decays) in found.items() if part in name.split(".")), part
        assert any(part in name.split(".") for name in found), part


@pytest.mark.parametrize(
    ("method", "backbone"),
    [("full", "resnet10t"), ("lora", "test_vit"), ("loha", "test_vit"), ("fact", "test_vit"), ("lorand", "resnet10t")],
)
def test_weights_decay_and_biases_and_norms_do_not(method: str, backbone: str) -> None:
    network = build(method, backbone)
    found = rates(network)
    assert any(decays for name, (_, decays) in found.items() if not name.startswith("head."))
    vectors = {name for name, parameter in network.trained_parameters() if parameter.ndim < 2}
    assert not any(found[name][1] for name in vectors)
    assert found["head.conv_seg.weight"][1] and not found["head.conv_seg.bias"][1]


# ---- stochastic depth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "full"])
def test_no_stochastic_depth_by_default(method: str) -> None:
    network = build(method, "swin_tiny_patch4_window7_224").train()  # timm's own default there is 0.1
    assert not any(module.drop_prob for module in network.modules() if isinstance(module, DropPath))


@pytest.mark.parametrize("method", ["linear", "lora", "full"])
def test_stochastic_depth_of_the_budget_acts_for_every_method(method: str) -> None:
    network = build(method, "test_vit", drop_path=0.5).train()
    active = [module for module in network.modules() if isinstance(module, DropPath) and module.training]
    assert active and network.backbone.count_frozen_stages() == 0
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(network(images), network(images))
        network.eval()
        assert torch.equal(network(images), network(images))


# ---- auxiliary head --------------------------------------------------------------------------------------------------


def test_auxiliary_head_adds_its_weighted_loss_and_nothing_to_a_prediction() -> None:
    images, masks = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    plain, half, whole = (build("linear", "resnet10t", auxiliary_head=weight).eval() for weight in (0.0, 0.5, 1.0))
    losses = [network(images, masks)[0].item() for network in (plain, half, whole)]
    assert losses[1] - losses[0] == pytest.approx((losses[2] - losses[0]) / 2, rel=1e-4) and losses[1] > losses[0]
    assert torch.equal(plain(images), whole(images))


def test_auxiliary_head_is_counted_apart_and_left_out_of_the_delta() -> None:
    with_it, without = build("lora", "resnet10t", auxiliary_head=0.4), build("lora", "resnet10t")
    counts, plain = with_it.count_parameters(), without.count_parameters()
    assert counts.auxiliary > 0 and plain.auxiliary == 0
    assert (counts.method, counts.head, counts.trainable) == (plain.method, plain.head, plain.trainable)
    assert with_it.delta_state().keys() == without.trained_state().keys()
    assert with_it.trained_state().keys() > without.trained_state().keys()


def test_run_with_auxiliary_head_and_drop_path_ends_with_a_delta_that_predicts(colours: Path, tmp_path: Path) -> None:
    fields = {"steps": 6, "batch_size": 4, "crop": [32, 32], "auxiliary_head": 0.4, "drop_path": 0.2}
    budget, runs = tmp_path / "budget.yaml", tmp_path / "runs"
    budget.write_text(json.dumps(fields))
    output = call(*run_arguments(colours, budget, runs, "--method", "lora"))
    assert output.code == 0, output.err
    (run,) = RunStore(runs)
    result = run.read_result()
    assert result.parameters.auxiliary > 0
    with safe_open(run.delta_path, "pt") as stored:
        assert not any(name.startswith("auxiliary.") for name in stored.keys())  # noqa: SIM118
    image = next((colours / "images").rglob("*.png"))
    predicted = call(
        "predict", run.fingerprint, image, "--runs", runs, "--weights", "random", "--out", tmp_path / "out"
    )
    assert predicted.code == 0, predicted.err


# ---- budgets and older runs ------------------------------------------------------------------------------------------


def test_gradients_are_not_clipped_by_default() -> None:
    assert {one.clip_norm for one in budgets().values()} == {0.0} == {Budget.model_fields["clip_norm"].default}


def test_runs_of_protocol_1_are_not_reported_and_their_deltas_not_loaded(tmp_path: Path) -> None:
    old = make_spec("linear", protocol=1, hyperparameters={"lr": 1e-3, "head_lr_scale": 1.0})
    make_run(tmp_path, old)
    with pytest.raises(UserError, match="made by protocol 1; its score does not compare"):
        read_row(RunFolder(tmp_path / old.fingerprint), RunStore(tmp_path))
    assert old.fingerprint != make_spec("linear", hyperparameters={"lr": 1e-3, "head_lr_scale": 1.0}).fingerprint
    listed = call("list", "runs", "--runs", tmp_path)
    assert "[protocol 1]" in listed.out
