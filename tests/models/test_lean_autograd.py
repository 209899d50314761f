"""Frozen convolutions and batch norms keep no input for the backward pass, and change no bit of what they compute."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from harness.models.backbones import lean_autograd
from harness.models.backbones.lean_autograd import make_lean

CONVOLUTIONS = {
    "1x1": lambda: nn.Conv2d(12, 20, 1, bias=False),
    "3x3 with bias": lambda: nn.Conv2d(12, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1, bias=False),
    "7x5, uneven everything": lambda: nn.Conv2d(12, 8, (7, 5), stride=(2, 3), padding=(3, 1), dilation=(1, 2)),
    "depth-wise": lambda: nn.Conv2d(12, 12, 5, padding=2, groups=12, bias=False),
    "depth-wise, strided": lambda: nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=12),
    "grouped": lambda: nn.Conv2d(12, 18, 3, padding=1, groups=3, bias=False),
    "dilated": lambda: nn.Conv2d(12, 8, 3, padding=4, dilation=4),
    "patches": lambda: nn.Conv2d(12, 32, 4, stride=4),
    "same, strided": lambda: Conv2dSame(12, 8, 3, stride=2, bias=False),
    "same, depth-wise": lambda: Conv2dSame(12, 12, 5, stride=2, groups=12),
}
NORMS = {
    "norm": lambda: nn.BatchNorm2d(12),
    "norm, another eps": lambda: nn.BatchNorm2d(12, eps=1e-3),
    "norm and ReLU in place": lambda: BatchNormAct2d(12),
    "norm and SiLU": lambda: BatchNormAct2d(12, act_layer=nn.SiLU),
    "norm alone of two": lambda: BatchNormAct2d(12, apply_act=False),
}
LAYERS = CONVOLUTIONS | NORMS
LAYOUTS = {
    "NCHW": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a slice": lambda x: torch.cat([x, x], dim=1)[:, 6:18],
    "a slice, channels last": lambda x: torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, 6:18],
    "transposed": lambda x: x.transpose(2, 3),
    "a vector in every place": lambda x: x[:, :, :1, :1].expand(x.shape),
}
PRECISIONS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}
OFF = 2**62


@pytest.fixture(autouse=True)
def _however_small(monkeypatch):
    monkeypatch.setattr(lean_autograd, "LEAN_FROM", 0)


def _made(layer: str) -> nn.Module:
    torch.manual_seed(0)
    module = LAYERS[layer]().requires_grad_(False)
    for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    module.eval()
    make_lean(module)
    return module


def _image(size: tuple[int, ...] = (3, 12, 13, 18)) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def _passed(module: nn.Module, x: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The output, the gradient of x, and what was kept between the two but for the module's own tensors."""
    own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() and tensor.data_ptr() not in own:
            kept.append(tensor)
        return tensor

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        (gradient,) = torch.autograd.grad(y, x, weights)
    return y, gradient, kept


def _same(first: Tensor, second: Tensor) -> bool:
    """To the bit, and in the same layout."""
    return first.dtype == second.dtype and first.stride() == second.stride() and torch.equal(first, second)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_and_gradients_are_the_same_to_the_bit(monkeypatch, layer, layout, precision):
    dtype, autocast = PRECISIONS[precision]
    module = _made(layer).to(dtype)
    for size in ((3, 12, 13, 18), (1, 12, 7, 7), (2, 12, 20, 20)):
        x = LAYOUTS[layout](_image(size).to(dtype))
        output, gradient, _ = _passed(module, x, autocast)
        monkeypatch.setattr(lean_autograd, "LEAN_FROM", OFF)
        expected, expected_gradient, _ = _passed(module, x, autocast)
        monkeypatch.setattr(lean_autograd, "LEAN_FROM", 0)
        assert _same(output, expected) and _same(gradient, expected_gradient)


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, "norm", "norm, another eps", "norm alone of two"])
def test_only_the_modules_own_tensors_are_saved(monkeypatch, layer):
    module = _made(layer)
    assert _passed(module, _image())[2] == []
    monkeypatch.setattr(lean_autograd, "LEAN_FROM", OFF)
    assert _passed(module, _image())[2] != []


@pytest.mark.parametrize("layout", ["NCHW", "channels last"])
@pytest.mark.parametrize("layer", [*CONVOLUTIONS, "norm", "norm alone of two"])
def test_placeholder_of_the_input_is_never_read(monkeypatch, layer, layout):
    """Whatever layout the gradient comes in: a norm's kernel is given the gradient itself where the two agree."""
    module, x = _made(layer), _image().requires_grad_()
    weights = LAYOUTS[layout](torch.randn(module(x).shape))
    (expected,) = torch.autograd.grad(module(x), x, weights)
    blank = lean_autograd._Layout.blank
    monkeypatch.setattr(lean_autograd._Layout, "blank", lambda layout: blank(layout).fill_(torch.nan))
    (gradient,) = torch.autograd.grad(module(x), x, weights)
    assert _same(gradient, expected) and gradient.isfinite().all()


def test_small_input_uses_the_plain_forward(monkeypatch):
    module, x = _made("norm"), _image()
    monkeypatch.setattr(lean_autograd, "LEAN_FROM", x.nbytes)
    assert _passed(module, x)[2] == []
    assert len(_passed(module, x[:2])[2]) > 0


@pytest.mark.parametrize("layer", LAYERS)
def test_unfrozen_layer_trains_as_before(monkeypatch, layer):
    def gradients(target: nn.Module) -> list[Tensor]:
        x = _image().requires_grad_()
        target.zero_grad()
        target(x).square().sum().backward()
        return [x.grad, *(p.grad for p in target.parameters() if p.requires_grad), *target.buffers()]

    def copies(prepare) -> tuple[nn.Module, nn.Module]:
        module = _made(layer)
        prepare(module)
        return module, copy.deepcopy(module)

    for prepare in (
        lambda module: module.requires_grad_(True),
        lambda module: module.requires_grad_(True).train(),
        lambda module: module.train(),
        lambda module: next(iter(module.parameters())).requires_grad_(True),
        lambda module: module.bias is not None and module.bias.requires_grad_(True),
    ):
        ours, theirs = copies(prepare)
        got = gradients(ours)
        monkeypatch.setattr(lean_autograd, "LEAN_FROM", OFF)
        expected = gradients(theirs)
        monkeypatch.setattr(lean_autograd, "LEAN_FROM", 0)
        assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_each_call_decides_for_itself():
    module, x = _made("3x3 with bias"), _image()
    assert _passed(module, x)[2] == []
    module.weight.requires_grad_(True)
    assert len(_passed(module, x)[2]) > 0
    module.weight.requires_grad_(False)
    assert _passed(module, x)[2] == []


def test_other_classes_and_paddings_are_not_changed():
    class Own(nn.Conv2d):
        pass

    torch.manual_seed(0)
    others = [
        StdConv2d(12, 8, 3),
        Own(12, 8, 3),
        nn.ConvTranspose2d(12, 8, 3),
        nn.Conv1d(12, 8, 3),
        nn.GroupNorm(3, 12),
    ]
    before = [(type(module), dict(vars(module))) for module in others]
    make_lean(nn.ModuleList(others))
    assert [(type(module), vars(module)) for module in others] == before
    for options in ({"padding": "same"}, {"padding": 2, "padding_mode": "reflect"}):
        plain = nn.Conv2d(12, 8, 4, **options).requires_grad_(False)
        lean = copy.deepcopy(plain)
        make_lean(lean)
        assert all(_same(a, b) for a, b in zip(_passed(lean, _image())[:2], _passed(plain, _image())[:2], strict=True))


def test_modules_keep_their_identity_and_state():
    network = nn.Sequential(*(make() for make in LAYERS.values()))
    modules, state = list(network.modules()), network.state_dict()
    own = {name: tensor.data_ptr() for name, tensor in state.items()}
    make_lean(network)
    make_lean(network)
    assert all(before is after for before, after in zip(modules, network.modules(), strict=True))
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == own
    assert type(network[0]) is nn.Conv2d and isinstance(network[-1], BatchNormAct2d)
    assert not any("forward" in vars(module) for module in network.modules())


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copy_is_independent(remake):
    module = _made("3x3 with bias")
    copied = remake(module)
    copied.weight.zero_()
    copied.stride = (2, 2)
    y, gradient, kept = _passed(copied, _image())
    assert y.shape[-2:] == (7, 9) and torch.equal(y, copied.bias[:, None, None].expand_as(y))
    assert not gradient.any() and kept == []
    assert _passed(module, _image())[0].shape[-2:] == (13, 18)


def test_changing_a_weight_before_the_backward_pass_is_an_error():
    for layer in ("1x1", "norm"):
        module = _made(layer)
        y = module(_image().requires_grad_())
        module.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("layer", ["3x3 with bias", "depth-wise, strided", "same, strided", "norm", "norm and SiLU"])
def test_gradients_can_be_differentiated_again(layer):
    module = _made(layer).double()
    x = _image((2, 12, 5, 6)).double().requires_grad_()
    assert torch.autograd.gradcheck(module, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(module, x, fast_mode=True)


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = ("3x3 with bias", "norm and ReLU in place")
    block = nn.Sequential(
        nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), Conv2dSame(12, 12, 3)
    )
    network = nn.Sequential(block, *(LAYERS[layer]() for layer in reversed(layers))).eval().requires_grad_(False)
    make_lean(network)
    return network


def test_flops_are_those_of_the_plain_network(monkeypatch):
    def counted() -> int:
        network = _network().to("meta")
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(2, 12, 16, 16, device="meta", requires_grad=True)).sum().backward()
        return counter.get_total_flops()

    lean = counted()
    monkeypatch.setattr(lean_autograd, "LEAN_FROM", OFF)
    assert lean == counted() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_recomputed(reentrant):
    network, x = _network(), _image().requires_grad_()
    network(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(network, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


def test_tracing_sees_the_plain_operations():
    network, x = _network(), _image((1, 12, 16, 16))
    with_gradient = x.clone().requires_grad_()
    expected = network(x)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, with_gradient, check_trace=False), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), expected)
    exported = torch.export.export(network, (with_gradient,))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any("conv2d" in name for name in called) and any("batch_norm" in name for name in called)
    torch.testing.assert_close(exported.module()(x), expected)


@pytest.mark.parametrize(
    "name", ["resnet26d", "tf_efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002", "skresnet18"]
)
def test_backbone_saves_less_and_computes_the_same_to_the_bit(monkeypatch, pristine, name):
    backbone = pristine(name)

    def passed() -> tuple[list[Tensor], int]:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        images = _image((2, 3, 64, 80)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            maps = backbone(images)
        (gradient,) = torch.autograd.grad(sum(feature_map.square().mean() for feature_map in maps), images)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}
        return [*maps, gradient], sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)

    lean, kept = passed()
    monkeypatch.setattr(lean_autograd, "LEAN_FROM", OFF)
    plain, kept_before = passed()
    assert all(_same(a, b) for a, b in zip(lean, plain, strict=True))
    assert kept < 0.75 * kept_before


def test_norm_gives_its_gradient_kernel_every_tensor() -> None:
    """On a CPU the kernel takes None for the saved mean and deviation, on a GPU it fails an assertion of torch's."""
    called: list[tuple[object, ...]] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.native_batch_norm_backward.default:
                called.append(args)
            return function(*args, **(kwargs or {}))

    norm = nn.Sequential(nn.BatchNorm2d(3)).eval().requires_grad_(False)
    make_lean(norm)
    with Calls():
        norm(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    [(_, _, weight, mean, variance, saved_mean, saved_deviation, *_)] = called
    assert all(isinstance(one, Tensor) for one in (weight, mean, variance, saved_mean, saved_deviation))
