"""The tests that every method must pass, on one tiny network a family; shipped, so that a plugin's author runs them.

`harness check NAME` prints them. In a plugin's own tests: `assert broken(check_method(MyMethod)) == []`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.cells import plugins
from harness.engine.training import parameter_groups
from harness.errors import UserError
from harness.method import Method, methods
from harness.models.backbones import families
from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.weights import tensors_digest
from harness.models.delta import DeltaHeader, read_delta_header, save_delta
from harness.models.network import MethodError, Segmenter, UnsupportedMethod, apply_memory_format, build_segmenter
from harness.spec import Budget, Spec

TINY = {family: tiny.name for family, tiny in families.tiny_networks().items()}
"""family -> a small network of it; its weights are drawn at random."""

SMALLER = {tiny.name: tiny.changes for tiny in families.tiny_networks().values()}
"""timm's arguments besides the name, where its smallest network of a family is not small."""

TWO_PROCESSES_ON = ("resnet10t", "test_vit")
"""Two processes are slow to ask, and what they show does not depend on the family: one CNN and one ViT."""

CLASSES = 5
SIDE = 64
STEPS = 3
OVERFIT_FACTOR = 0.5
OVERFIT_STEPS = 80
TWO_PROCESSES_SECONDS = 180.0

CheckStatus = Literal["ok", "unsupported", "broken"]


class ContractBroken(Exception):
    """What a method does that it must not, or does not that it must."""


@dataclass(frozen=True)
class CheckResult:
    """What one check said of a method on a backbone. `detail` is the reason where it is not `ok`."""

    check: str
    backbone: str
    status: CheckStatus
    detail: str = ""


def tiny_backbones() -> dict[str, str]:
    """family -> its tiny network, for every family that the harness cuts and that has one here."""
    return {family: TINY[family] for family in families.families() if family in TINY}


def check_method(method: str | type[Method], backbones: Iterable[str] | None = None) -> list[CheckResult]:
    """Every check of the contract on a method (a class, or a registered name) and each of the backbones.

    `backbones` are timm names; by default one tiny network a family. A backbone that the method does not support has
    one outcome, `unsupported` with the method's reason. Where a check fails on which the others stand, they are left
    out. Raises `UserError` for a name that is not registered.
    """
    cls = methods.get(method) if isinstance(method, str) else method
    outcomes = [_outcome("described", "", lambda: described(cls))]
    if outcomes[0].status == "broken":
        return outcomes
    for name in tiny_backbones().values() if backbones is None else backbones:
        case = Case(cls, name)
        for check in CHECKS:
            if check is finishes_in_two_processes and name not in TWO_PROCESSES_ON:
                continue
            outcomes.append(_outcome(check.__name__, name, partial(check, case)))
            if outcomes[-1].status == "unsupported" or (outcomes[-1].status == "broken" and check in FOUNDATIONS):
                break
    return outcomes


def broken(outcomes: Iterable[CheckResult]) -> list[CheckResult]:
    """The outcomes that break the contract: empty for a method that keeps it."""
    return [outcome for outcome in outcomes if outcome.status == "broken"]


def _outcome(name: str, backbone: str, check: Callable[[], None]) -> CheckResult:
    name = name.replace("_", " ")
    try:
        with torch.random.fork_rng(devices=[]):
            check()
    except UnsupportedMethod as error:
        return CheckResult(name, backbone, "unsupported", str(error))
    except (ContractBroken, MethodError) as error:
        return CheckResult(name, backbone, "broken", str(error))
    except Exception as error:  # whatever the method raises where it claims to work
        return CheckResult(name, backbone, "broken", f"crashes: {_one_line(error)}")
    return CheckResult(name, backbone, "ok")


# ---- what the checks share ------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A method at its defaults on one backbone, and what more than one check looks at."""

    method: type[Method]
    backbone: str

    def bare(self) -> StagedBackbone:
        """The frozen backbone with random weights of one seed, made smaller where `SMALLER` says how.

        What timm initialises to (almost) zero, so that a branch starts as nothing, is drawn at random: pre-trained
        networks have no such branches, and no gradient would reach what stands inside one.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = families.cut(self.backbone, families.create(self.backbone, **SMALLER.get(self.backbone, {})))
            for parameter in backbone.parameters():
                if parameter.abs().max() < 1e-3:
                    parameter.copy_(torch.rand(parameter.shape) / 10)
        return backbone

    def build(self, backbone: StagedBackbone | None = None, classes: int = CLASSES) -> Segmenter:
        method = self.method(self.method.Hyperparameters())
        return build_segmenter(backbone or self.bare(), method, "fpn:16", classes, seed=0)

    @cached_property
    def trial(self) -> ShortTraining:
        """Two equal networks, of which the first has been trained for a few steps."""
        return ShortTraining.of(self)


@dataclass
class ShortTraining:
    """What a short training left: see the fields."""

    network: Segmenter
    """Trained for `STEPS`."""
    twin: Segmenter
    """Built alike, before `network` was trained, and not touched since."""
    twin_before: dict[str, Tensor]
    disturbed: list[str]
    """Tensors of `network` that building `twin` changed."""
    changed: list[str]
    """Frozen tensors that attaching or training changed."""
    silent: list[str]
    """Trained parameters that no backward pass gave a gradient."""
    copied: list[str]
    """Tensors of the delta that are pre-trained ones."""
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case) -> ShortTraining:
        backbone = case.bare()
        came = {name: (tensor, tensor.detach().clone()) for name, tensor in _tensors(backbone)}
        network = case.build(backbone)
        attached = _snapshot(network)
        twin = case.build()
        disturbed = _differing(attached, network.state_dict())
        twin_before = _snapshot(twin)
        silent = {name for name, _ in network.trained_parameters()}
        losses = _train(network, on_backward=lambda: silent.difference_update(_with_gradient(network)))

        moving = _moving(network)
        changed = [name for name, (tensor, old) in came.items() if id(tensor) not in moving and _differ(tensor, old)]
        trained = network.trained_state()
        frozen = {name: tensor for name, tensor in attached.items() if name not in trained}
        changed += [name for name in _differing(frozen, network.state_dict()) if name not in changed]
        parameters = dict(network.trained_parameters())
        copied = [
            name
            for name, tensor in trained.items()
            if name not in parameters and any(_is_copy(tensor, old) for _, old in came.values())
        ]
        return cls(network, twin, twin_before, disturbed, changed, sorted(silent), copied, losses)


def _train(network: Segmenter, on_backward: Callable[[], object] = lambda: None) -> list[float]:
    images, masks = four_images()
    optimizer = torch.optim.AdamW([parameter for _, parameter in network.trained_parameters()], lr=1e-3)
    network.train()
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss, _ = network(images, masks)
        loss.backward()
        on_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def four_images() -> tuple[Tensor, Tensor]:
    """Images [4, 3, 64, 64] of quadrants whose colour tells their class, and masks [4, 64, 64] uint8, all labelled."""
    draw = torch.Generator().manual_seed(1)
    masks = torch.randint(0, CLASSES, (4, 2, 2), generator=draw).repeat_interleave(SIDE // 2, 1)
    masks = masks.repeat_interleave(SIDE // 2, 2)
    colours = 1.5 * torch.randn(CLASSES, 3, generator=draw)
    images = colours[masks].permute(0, 3, 1, 2) + 0.2 * torch.randn(4, 3, SIDE, SIDE, generator=draw)
    return images.contiguous(), masks.to(torch.uint8)


def _steady(network: Segmenter) -> Segmenter:
    """In training mode, but for what makes a pass depend on chance or on the rest of the batch."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "drop" in type(module).__name__.lower():
            module.eval()
    return network


def _gradients(
    network: Segmenter,
    parts: int = 1,
    autocast: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[float, dict[str, Tensor]]:
    """The loss of the four images, and every trained parameter's gradient, summed over so many equal parts."""
    images, masks = four_images()
    network.zero_grad(set_to_none=True)
    total = 0.0
    for x, y in zip(images.chunk(parts), masks.chunk(parts), strict=True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = network(x.contiguous(memory_format=memory_format), y)
        (loss / parts).backward()
        total += loss.item() / parts
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in network.trained_parameters()
    }
    network.zero_grad(set_to_none=True)
    return total, gradients


def _first_difference(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-3) -> str | None:
    """The first gradient that differs by more than rounding, relative to its own size and to all of them."""
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    for name, gradient in expected.items():
        difference = (ours[name] - gradient).norm().item()
        if not difference <= tolerance * gradient.norm().item() + 1e-5 * size:
            return f"{name} (by {difference:.2g} of {gradient.norm().item():.2g})"
    return None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _differ(one: Tensor, other: Tensor) -> bool:
    """Not the same to the bit; a NaN is the same as a NaN."""
    return one.shape != other.shape or not torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())


def _differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in before.items() if name not in after or _differ(tensor, after[name])]


def _with_gradient(network: Segmenter) -> set[str]:
    return {name for name, p in network.trained_parameters() if p.grad is not None and bool(p.grad.ne(0).any())}


def _moving(network: Segmenter) -> set[int]:
    """Identities of the tensors that training may change: trained parameters, and buffers of what is not frozen."""
    moving = {id(parameter) for _, parameter in network.trained_parameters()}
    for module in network.modules():
        if not network.backbone.is_frozen(module):
            moving.update(id(buffer) for buffer in module.buffers(recurse=False))
    return moving


def _is_copy(tensor: Tensor, pretrained: Tensor) -> bool:
    """Constants do not count: a fresh running mean is zero everywhere."""
    return tensor.shape == pretrained.shape and bool((tensor != tensor.flatten()[:1]).any()) and not _differ(
        tensor, pretrained
    )  # fmt: skip


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


# ---- the checks: each a promise, by its name ------------------------------------------------------------------------


def described(method: type[Method]) -> None:
    """It says what it is, and every hyperparameter has help, a default, bounds, and a search range within them."""
    for attribute in ("name", "summary", "source"):
        if not isinstance(getattr(method, attribute, None), str) or not getattr(method, attribute).strip():
            raise ContractBroken(f"states no {attribute}")
    if not plugins.is_method_name(method.name):
        raise ContractBroken(f"its name {method.name!r} is not lower_case_with_underscores")
    if method.changes_start is not None and not method.changes_start.strip():
        raise ContractBroken("changes_start is empty; give the reason, or None")
    for hyperparameter in method.Hyperparameters.describe():
        name, bounds = hyperparameter["name"], hyperparameter["bounds"]
        if not hyperparameter["help"].strip():
            raise ContractBroken(f"hyperparameter {name} has no help")
        if hyperparameter["default"] is None:
            raise ContractBroken(f"hyperparameter {name} has no default")
        low = bounds.get("minimum", bounds.get("exclusiveMinimum"))
        high = bounds.get("maximum", bounds.get("exclusiveMaximum"))
        if isinstance(hyperparameter["default"], str):
            if not bounds.keys() & {"pattern", "enum"}:
                raise ContractBroken(f"hyperparameter {name} is any text; give a pattern or a Literal")
        elif not isinstance(hyperparameter["default"], bool) and (low is None or high is None) and "enum" not in bounds:
            raise ContractBroken(f"hyperparameter {name} has no {'lower' if low is None else 'upper'} bound")
        for value in _searched(hyperparameter["search"]):
            try:
                method.Hyperparameters.model_validate({name: value})
            except ValueError as error:
                raise ContractBroken(f"hyperparameter {name}: its search draws {value}, out of bounds") from error
    method.Hyperparameters.model_validate({k["name"]: k["default"] for k in method.Hyperparameters.describe()})


def _searched(search: Any) -> list[Any]:
    if isinstance(search, tuple | list) and len(search) == 3 and search[2] == "log":
        return list(search[:2])
    return list(search or ())


def answers_whether_it_is_supported(case: Case) -> None:
    """`supports` answers True or `No(reason)`, and leaves the backbone as it was."""
    backbone = case.bare()
    before = tensors_digest(backbone), str(backbone), [p.requires_grad for p in backbone.parameters()]
    answer = case.method(case.method.Hyperparameters()).supports(backbone)
    if (tensors_digest(backbone), str(backbone), [p.requires_grad for p in backbone.parameters()]) != before:
        raise ContractBroken("supports changes the backbone")
    if answer is True:
        return
    if not isinstance(answer, str) or answer or not str(answer).strip():
        raise ContractBroken(f"supports answers {answer!r}; answer True, or No with the reason")
    raise UnsupportedMethod(str(answer))


def trains_as_many_parameters_as_it_says(case: Case) -> None:
    """The closed form is the real count, at any number of classes; nothing to train is said, not found out."""
    for classes in (CLASSES, CLASSES + 2):
        counted = case.build(classes=classes).count_parameters().method
    head_only = case.method.head_only
    if counted == 0 and not head_only:
        raise ContractBroken(
            "trains nothing here, silently; answer No with the reason in supports (or state head_only = True)"
        )
    if counted and head_only:
        raise ContractBroken(f"states head_only, and trains {counted} parameters of its own")


def starts_as_the_frozen_backbone(case: Case) -> None:
    """Before training the maps are the frozen backbone's up to rounding, unless `changes_start` says why not."""
    images, _ = four_images()
    with torch.no_grad():
        ours = case.build().eval().backbone(images)
        bare = case.bare()(images)
    for stage, (one, other) in enumerate(zip(ours, bare, strict=True)):
        if one.shape != other.shape:
            raise ContractBroken(f"the map of stage {stage} is {list(one.shape)} and was {list(other.shape)}")
        difference, size = (one - other).abs().max().item(), other.abs().max().item()
        if case.method.changes_start is None and not difference <= 1e-4 * size:
            raise ContractBroken(
                f"the map of stage {stage} differs at the start by {difference:.2g} of {size:.2g}; "
                "initialise to the identity, or state changes_start"
            )


def trains(case: Case) -> None:
    """A few steps run, with a finite loss."""
    if not all(map(torch.isfinite, map(torch.tensor, case.trial.losses))):
        raise ContractBroken(f"the loss is not finite: {case.trial.losses}")


def leaves_what_is_frozen(case: Case) -> None:
    """Frozen parameters and buffers are the same to the bit after attaching and training."""
    if case.trial.changed:
        raise ContractBroken(f"changes what is frozen: {_some(case.trial.changed)}")


def gives_every_trained_parameter_a_gradient(case: Case) -> None:
    """Looked at over a few steps: a zero-initialised projection hides what is before it until it has moved."""
    if case.trial.silent:
        raise ContractBroken(f"no gradient reaches {_some(case.trial.silent)}")


def shares_no_state_between_instances(case: Case) -> None:
    """Building or training one network leaves another one alone."""
    if case.trial.disturbed:
        raise ContractBroken(f"attaching a second instance changes the first: {_some(case.trial.disturbed)}")
    if moved := _differing(case.trial.twin_before, case.trial.twin.state_dict()):
        raise ContractBroken(f"training one instance changes another: {_some(moved)}")


def is_deterministic_at_a_seed(case: Case) -> None:
    """Two networks of one seed are the same to the bit, before and after the same steps."""
    twin = case.build()
    if moved := _differing(case.trial.twin_before, twin.state_dict()):
        raise ContractBroken(f"two builds at one seed differ: {_some(moved)}; draw from torch's global generator")
    _train(twin)
    if moved := _differing(case.trial.network.state_dict(), twin.state_dict()):
        raise ContractBroken(f"{STEPS} equal steps end differently: {_some(moved)}")


def is_rebuilt_from_its_delta(case: Case) -> None:
    """Delta stored, read and loaded into a new network: identical logits; and it holds nothing pre-trained."""
    from safetensors.torch import load_file

    network, images = case.trial.network, four_images()[0]
    if case.trial.copied:
        raise ContractBroken(f"the delta holds copies of pre-trained tensors: {_some(case.trial.copied)}")
    spec = Spec(
        method=case.method.name, hyperparameters=network.method.hyperparameters.model_dump(), backbone=case.backbone,
        weights="random", dataset="contract", data_digest="", head="fpn:16", seed=0,
        budget=Budget(name="contract", steps=STEPS, batch_size=4, crop=(SIDE, SIDE)),
    )  # fmt: skip
    classes = tuple(f"class {index}" for index in range(CLASSES))
    header = DeltaHeader(spec, classes, ((0, 0, 0),) * CLASSES, None, tensors_digest(case.bare()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.safetensors"
        save_delta(path, network, header)
        if read_delta_header(path) != header:
            raise ContractBroken("its hyperparameters do not survive the delta's header")
        stored = load_file(path)
    rebuilt = case.build()
    try:
        rebuilt.load_trained_state(stored)
    except ValueError as error:
        raise ContractBroken(f"its delta does not fit a new network: {error}") from error
    with torch.no_grad():
        if not torch.equal(network.eval()(images), rebuilt.eval()(images)):
            raise ContractBroken("logits differ after the delta was stored and loaded: something trained is not in it")


def accumulates_gradients(case: Case) -> None:
    """Two half batches give the gradient of the whole."""
    network = _steady(case.trial.network)
    _, whole = _gradients(network)
    _, halves = _gradients(network, parts=2)
    if different := _first_difference(halves, whole):
        raise ContractBroken(f"two half batches give another gradient than the whole: {different}")


def works_with_checkpointed_activations(case: Case) -> None:
    """Recomputing the stages in the backward pass gives the same gradient."""
    network = _steady(case.trial.network)
    _, plain = _gradients(network)
    with _checkpointed(network.backbone.stages):
        _, recomputed = _gradients(network)
    if different := _first_difference(recomputed, plain):
        raise ContractBroken(f"checkpointed stages give another gradient: {different}")


@contextlib.contextmanager
def _checkpointed(stages: Iterable[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for stage in stages:
            forward, own = stage.forward, stage.__dict__.get("forward")
            if own is None:
                undo.callback(stage.__dict__.pop, "forward")
            else:
                undo.callback(setattr, stage, "forward", own)
            stage.forward = partial(checkpoint, forward, use_reentrant=False)
        yield


def works_in_mixed_precision(case: Case) -> None:
    """Under bfloat16 autocast the loss is near the one in full precision, and gradients are finite."""
    network = _steady(case.trial.network)
    full, _ = _gradients(network)
    mixed, gradients = _gradients(network, autocast=True)
    if not abs(mixed - full) <= 0.1 * abs(full):
        raise ContractBroken(f"the loss under bfloat16 autocast is {mixed:.4g}, and {full:.4g} in full precision")
    if bad := [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]:
        raise ContractBroken(f"gradients under bfloat16 autocast are not finite: {_some(bad)}")


def works_in_channels_last(case: Case) -> None:
    """In the memory layout of the budgets that ship the gradient is the same."""
    network = _steady(case.build())
    _, plain = _gradients(network)
    apply_memory_format(network, Budget(name="contract", steps=1, batch_size=4, crop=(SIDE, SIDE), channels_last=True))
    _, laid_out = _gradients(network, memory_format=torch.channels_last)
    if different := _first_difference(laid_out, plain):
        raise ContractBroken(f"the gradient is another in channels-last layout: {different}")


def overfits_four_images(case: Case) -> None:
    """The loss of four images halves. The head learns at 0.01, the method at its own default."""
    network = case.build().train()
    images, masks = four_images()
    groups = parameter_groups(network, network.method.hyperparameters)
    head = {id(parameter) for parameter in network.head.parameters()}
    for group in groups:
        group["lr"] = 1e-2 if id(group["params"][0]) in head else group["base_lr"]
    optimizer = torch.optim.AdamW(groups)
    first = lowest = None
    for step in range(OVERFIT_STEPS):
        torch.manual_seed(step)
        loss, _ = network(images, masks)
        value = loss.item()
        first = value if first is None else first
        lowest = value if lowest is None else min(lowest, value)
        if value < OVERFIT_FACTOR * first:
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in network.trained_parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    raise ContractBroken(f"does not overfit four images: the loss goes from {first:.3g} to {lowest:.3g} at best")


def finishes_in_two_processes(case: Case) -> None:
    """Two processes over gloo, a half batch each, end with the same gradients and parameters."""
    one, other = _Pair.ask(case.method, case.backbone)
    if one != other:
        raise ContractBroken("two processes end with different gradients or parameters")


CHECKS: tuple[Callable[[Case], None], ...] = (
    answers_whether_it_is_supported,
    trains_as_many_parameters_as_it_says,
    starts_as_the_frozen_backbone,
    trains,
    leaves_what_is_frozen,
    gives_every_trained_parameter_a_gradient,
    shares_no_state_between_instances,
    is_deterministic_at_a_seed,
    is_rebuilt_from_its_delta,
    accumulates_gradients,
    works_with_checkpointed_activations,
    works_in_mixed_precision,
    works_in_channels_last,
    overfits_four_images,
    finishes_in_two_processes,
)
FOUNDATIONS = (answers_whether_it_is_supported, trains_as_many_parameters_as_it_says, trains)
"""Where one of these fails, what comes after it would only say so again."""


# ---- two processes --------------------------------------------------------------------------------------------------


class _Pair:
    """Two processes that are started once, for all methods, and anew after one that did not finish."""

    current: _Pair | None = None

    def __init__(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            arguments = (rank, theirs, str(Path(self.folder.name) / "rendezvous"))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    @classmethod
    def ask(cls, method: type[Method], backbone: str) -> list[str]:
        """A digest of gradients and parameters from each. Raises `ContractBroken` where there is none."""
        pair = cls.current or cls()
        cls.current = None  # until it has answered in full
        try:
            answers = pair._ask((plugins.reference(method), backbone, plugins.loaded_files()))
        except BaseException:
            pair._end()
            raise
        cls.current = pair
        return answers

    def _ask(self, job: tuple[object, ...]) -> list[str]:
        for pipe in self.pipes:
            try:
                pipe.send(job)
            except Exception as error:  # pickle raises what it likes
                raise ContractBroken(f"another process cannot import the method: {_one_line(error)}") from error
        answers: dict[int, str] = {}
        deadline = time.monotonic() + TWO_PROCESSES_SECONDS
        while len(answers) < 2:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ContractBroken(f"two processes did not finish within {TWO_PROCESSES_SECONDS:.0f} s")
            for pipe in ready:
                try:
                    status, text = pipe.recv()
                except (EOFError, OSError) as error:
                    raise ContractBroken("one of two processes died; its last words are on stderr") from error
                if status != "ok":
                    raise ContractBroken(f"one of two processes failed: {text}")
                answers[self.pipes.index(pipe)] = text
        return [answers[0], answers[1]]

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, pipe: connection.Connection, rendezvous: str) -> None:
    """The life of one of the two processes: jobs in, digests out, until the parent is gone."""
    import os
    import socket

    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not resolve
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    while True:
        try:
            method, backbone, files = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # what was sent cannot be imported here
            pipe.send(("failed", _one_line(error)))
            continue
        try:
            plugins.load(files)
            cls = methods.get(method) if isinstance(method, str) else method
            pipe.send(("ok", _train_in_parallel(Case(cls, backbone), rank)))
        except Exception as error:
            pipe.send(("failed", _one_line(error)))


def _train_in_parallel(case: Case, rank: int) -> str:
    """Two steps on this process's half of the four images; the digest of all gradients and trained parameters."""
    network = case.build()
    model = nn.parallel.DistributedDataParallel(network).train()
    optimizer = torch.optim.SGD([parameter for _, parameter in network.trained_parameters()], lr=1e-3)
    images, masks = (tensor.chunk(2)[rank] for tensor in four_images())
    state = hashlib.sha256()
    for step in range(2):
        torch.manual_seed(2 * step + rank)
        loss, _ = model(images, masks)
        loss.backward()
        optimizer.step()
        for _, parameter in network.trained_parameters():
            state.update(parameter.grad.contiguous().numpy().tobytes())
            state.update(parameter.detach().contiguous().numpy().tobytes())
        optimizer.zero_grad(set_to_none=True)
    return state.hexdigest()


# ---- `harness check` ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixRow:
    """One method on one family. `state` is `passes`, `unsupported`, `broken` or `skipped`."""

    method: str
    family: str
    backbone: str
    state: str
    reason: str
    seconds: float
    checks: list[dict[str, str]]


def check_names(names: Sequence[str], on_row: Callable[[MatrixRow], None] = lambda row: None) -> list[MatrixRow]:
    """A row for every method and family. A method that fails to import is broken everywhere, with its reason."""
    rows = []
    for name in names:
        for family in families.families():
            row = _row(name, family)
            rows.append(row)
            on_row(row)
    return rows


def _row(name: str, family: str) -> MatrixRow:
    began = time.monotonic()
    if family not in TINY:
        return MatrixRow(name, family, "", "skipped", "no tiny network of this family is known", 0.0, [])
    try:
        outcomes = check_method(name, [TINY[family]])
    except UserError as error:
        outcomes = [CheckResult("import", TINY[family], "broken", str(error))]
    found = broken(outcomes)
    unsupported = [outcome for outcome in outcomes if outcome.status == "unsupported"]
    state = "broken" if found else "unsupported" if unsupported else "passes"
    reason = "; ".join(f"{o.check}: {o.detail}" for o in found) or "; ".join(o.detail for o in unsupported)
    seconds = round(time.monotonic() - began, 2)
    return MatrixRow(name, family, TINY[family], state, reason, seconds, [asdict(outcome) for outcome in outcomes])


def run_check(names: Sequence[str], json_: bool = False) -> int:
    """Check these methods on every family and print the matrix, or JSON; 1 where a contract is broken, else 0.

    Raises `UserError` for a name that is not registered.
    """
    known = methods.names()
    for name in names:
        if name not in known:
            methods.get(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small lose time to more
    try:
        rows = check_names(names, on_row=_show)
    finally:
        torch.set_num_threads(threads)
    if json_:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print("\n".join(matrix(rows)))
    return 1 if any(row.state == "broken" for row in rows) else 0


def _show(row: MatrixRow) -> None:
    """While it goes, on stderr: one line a method and family."""
    print(f"{row.method} on {row.family}: {row.state} ({row.seconds:.1f} s)", file=sys.stderr, flush=True)


def matrix(rows: Sequence[MatrixRow]) -> list[str]:
    """The lines of the table families × methods, then every reason once, with the families that it holds for."""
    names = list(dict.fromkeys(row.method for row in rows))
    cells = {(row.family, row.method): row.state for row in rows}
    left = max(map(len, ("family", *(row.family for row in rows))))
    widths = [max(len(name), *(len(row.state) for row in rows if row.method == name)) for name in names]
    lines = ["  ".join(["family".ljust(left), *(n.ljust(w) for n, w in zip(names, widths, strict=True))]).rstrip()]
    for family in dict.fromkeys(row.family for row in rows):
        states = [cells[family, name].ljust(width) for name, width in zip(names, widths, strict=True)]
        lines.append("  ".join([family.ljust(left), *states]).rstrip())
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.reason:
            where = "" if row.state == "skipped" else row.method
            held = reasons.setdefault((row.state, where, row.reason), [])
            held += [row.family] if row.family not in held else []
    for state in ("broken", "unsupported", "skipped"):
        for (its_state, name, reason), where in reasons.items():
            if its_state == state:
                lines.append(f"{state}: {f'{name} on ' if name else ''}{', '.join(where)}: {reason}")
    return lines
