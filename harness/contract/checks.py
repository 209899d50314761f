"""The checks of the contract, in order. Each verifies one property that every method must have."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from harness.cells import plugins
from harness.contract.cases import (
    CLASSES,
    SIDE,
    STEPS,
    Case,
    ContractBroken,
    deterministic_mode,
    differing,
    first_difference,
    four_images,
    gradients_of,
    train_briefly,
)
from harness.contract.two_processes import ProcessPair
from harness.engine.training import parameter_groups
from harness.method import Method
from harness.models.backbones.weights import tensors_digest
from harness.models.delta import DeltaHeader, read_delta_header, save_delta
from harness.models.network import UnsupportedMethod, apply_memory_format
from harness.spec import Budget, Spec
from harness.util.text import list_some

OVERFIT_FACTOR = 0.5
OVERFIT_STEPS = 80


def described(method: type[Method]) -> None:
    """Name, summary and source are set; every hyperparameter has help, a default, bounds and a valid search range."""
    for attribute in ("name", "summary", "source"):
        if not isinstance(getattr(method, attribute, None), str) or not getattr(method, attribute).strip():
            raise ContractBroken(f"states no {attribute}")
    if not plugins.is_method_name(method.name):
        raise ContractBroken(f"its name {method.name!r} is not lower_case_with_underscores")
    if method.changes_start is not None and not method.changes_start.strip():
        raise ContractBroken("changes_start is empty; state the reason, or None")
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
                raise ContractBroken(f"hyperparameter {name} accepts any text; add a pattern or use a Literal")
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


def declares_support(case: Case) -> None:
    """`supports` answers True or `Unsupported(reason)`, and does not change the backbone."""
    backbone = case.frozen_backbone()
    before = tensors_digest(backbone), str(backbone), [p.requires_grad for p in backbone.parameters()]
    answer = case.method(case.method.Hyperparameters()).supports(backbone)
    if (tensors_digest(backbone), str(backbone), [p.requires_grad for p in backbone.parameters()]) != before:
        raise ContractBroken("supports changes the backbone")
    if answer is True:
        return
    if not isinstance(answer, str) or answer or not str(answer).strip():
        raise ContractBroken(f"supports returns {answer!r}; return True or Unsupported(reason)")
    raise UnsupportedMethod(str(answer))


def trains_the_declared_number_of_parameters(case: Case) -> None:
    """The closed form equals the real count for any number of classes; a method that trains nothing declares it."""
    for classes in (CLASSES, CLASSES + 2):
        counted = case.build(classes=classes).count_parameters().method
    head_only = case.method.head_only
    if counted == 0 and not head_only:
        raise ContractBroken("trains nothing here; return Unsupported(reason) from supports, or set head_only")
    if counted and head_only:
        raise ContractBroken(f"states head_only, but trains {counted} parameters of its own")


def starts_as_the_frozen_backbone(case: Case) -> None:
    """Before training the maps equal the frozen backbone's up to rounding, unless `changes_start` states a reason."""
    images, _ = four_images(case.device)
    with torch.no_grad():
        ours = case.build().eval().backbone(images)
        frozen = case.frozen_backbone()(images)
    for stage, (one, other) in enumerate(zip(ours, frozen, strict=True)):
        if one.shape != other.shape:
            raise ContractBroken(f"the map of stage {stage} has shape {list(one.shape)} instead of {list(other.shape)}")
        difference, size = (one - other).abs().max().item(), other.abs().max().item()
        if case.method.changes_start is None and not difference <= 1e-4 * size:
            raise ContractBroken(
                f"the map of stage {stage} differs at the start by {difference:.2g} of {size:.2g}; "
                "initialise to the identity, or state changes_start"
            )


def trains(case: Case) -> None:
    """A few steps run, with a finite loss."""
    if not all(map(torch.isfinite, map(torch.tensor, case.short_training.losses))):
        raise ContractBroken(f"the loss is not finite: {case.short_training.losses}")


def keeps_frozen_tensors_unchanged(case: Case) -> None:
    """Frozen parameters and buffers are bit-identical after attaching and training."""
    if case.short_training.changed:
        raise ContractBroken(f"changes frozen tensors: {list_some(case.short_training.changed)}")


def gives_every_trained_parameter_a_gradient(case: Case) -> None:
    """Every trained parameter gets a gradient within a few steps: zero-initialised projections block it at first."""
    if case.short_training.silent:
        raise ContractBroken(f"no gradient reaches {list_some(case.short_training.silent)}")


def shares_no_state_between_instances(case: Case) -> None:
    """Building or training one network does not change another."""
    if case.short_training.disturbed:
        raise ContractBroken(
            f"attaching a second instance changes the first: {list_some(case.short_training.disturbed)}"
        )
    if moved := differing(case.short_training.twin_before, case.short_training.twin.state_dict()):
        raise ContractBroken(f"training one instance changes another: {list_some(moved)}")


def is_deterministic_at_a_seed(case: Case) -> None:
    """Two networks built from one seed are bit-identical, before and after the same steps."""
    twin = case.build()
    if moved := differing(case.short_training.twin_before, twin.state_dict()):
        raise ContractBroken(f"two builds from one seed differ: {list_some(moved)}; draw from torch's global generator")
    train_briefly(twin)
    if moved := differing(case.short_training.network.state_dict(), twin.state_dict()):
        raise ContractBroken(f"{STEPS} identical steps end differently: {list_some(moved)}")


def is_rebuilt_from_its_delta(case: Case) -> None:
    """A delta that is saved and loaded into a new network gives identical logits, and holds no pre-trained tensor."""
    from safetensors.torch import load_file

    network, images = case.short_training.network, four_images(case.device)[0]
    if case.short_training.copied:
        raise ContractBroken(f"the delta holds copies of pre-trained tensors: {list_some(case.short_training.copied)}")
    spec = Spec(
        method=case.method.name, hyperparameters=network.method.hyperparameters.model_dump(), backbone=case.backbone,
        weights="random", dataset="contract", data_digest="", head="fpn:16", seed=0,
        budget=Budget(name="contract", steps=STEPS, batch_size=4, crop=(SIDE, SIDE)),
    )  # fmt: skip
    classes = tuple(f"class {index}" for index in range(CLASSES))
    header = DeltaHeader(spec, classes, ((0, 0, 0),) * CLASSES, None, tensors_digest(case.frozen_backbone()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.safetensors"
        save_delta(path, network, header)
        if read_delta_header(path) != header:
            raise ContractBroken("its hyperparameters are not restored from the delta's header")
        stored = load_file(path)
    rebuilt = case.build()
    try:
        rebuilt.load_trained_state(stored)
    except ValueError as error:
        raise ContractBroken(f"its delta does not fit a new network: {error}") from error
    with torch.no_grad():
        if not torch.equal(network.eval()(images), rebuilt.eval()(images)):
            raise ContractBroken("logits differ after loading the saved delta: a trained tensor is missing from it")


def accumulates_gradients(case: Case) -> None:
    """Two half batches give the gradient of the whole."""
    _, whole = case.plain_gradients
    _, halves = gradients_of(deterministic_mode(case.short_training.network), parts=2)
    if different := first_difference(halves, whole):
        raise ContractBroken(f"two half batches give a different gradient than the whole batch: {different}")


def works_with_checkpointed_activations(case: Case) -> None:
    """Recomputing the stages in the backward pass gives the same gradient."""
    _, plain = case.plain_gradients
    network = deterministic_mode(case.short_training.network)
    with checkpointed(network.backbone.stages):
        _, recomputed = gradients_of(network)
    if different := first_difference(recomputed, plain):
        raise ContractBroken(f"checkpointed stages give a different gradient: {different}")


@contextlib.contextmanager
def checkpointed(stages: Iterable[nn.Module]) -> Iterator[None]:
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
    """Under bfloat16 autocast the loss is close to the one in full precision, and gradients are finite."""
    full, _ = case.plain_gradients
    mixed, gradients = gradients_of(deterministic_mode(case.short_training.network), autocast=True)
    if not abs(mixed - full) <= 0.1 * abs(full):
        raise ContractBroken(f"the loss under bfloat16 autocast is {mixed:.4g}, and {full:.4g} in full precision")
    if bad := [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]:
        raise ContractBroken(f"gradients under bfloat16 autocast are not finite: {list_some(bad)}")


def works_in_channels_last(case: Case) -> None:
    """The gradient is the same in channels-last layout, which the shipped budgets use."""
    network = deterministic_mode(case.build())
    _, plain = gradients_of(network)
    apply_memory_format(network, Budget(name="contract", steps=1, batch_size=4, crop=(SIDE, SIDE), channels_last=True))
    _, laid_out = gradients_of(network, memory_format=torch.channels_last)
    if different := first_difference(laid_out, plain):
        raise ContractBroken(f"channels-last layout gives a different gradient: {different}")


def overfits_four_images(case: Case) -> None:
    """The loss of four images halves. The head learns at 0.01, the method at its own default."""
    network = case.build().train()
    images, masks = four_images(case.device)
    groups = parameter_groups(network, network.method.hyperparameters)
    head = {id(parameter) for parameter in network.head.parameters()}
    for group in groups:
        group["lr"] = 1e-2 if id(group["params"][0]) in head else group["base_lr"]
    optimizer = torch.optim.AdamW(groups, fused=True)
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
    raise ContractBroken(f"does not overfit four images: the loss only falls from {first:.3g} to {lowest:.3g}")


def finishes_in_two_processes(case: Case) -> None:
    """Two processes over gloo, with half a batch each, end with the same gradients and parameters."""
    one, other = ProcessPair.ask(case.method, case.backbone)
    if one != other:
        raise ContractBroken("two processes end with different gradients or parameters")


CHECKS: tuple[Callable[[Case], None], ...] = (
    declares_support,
    trains_the_declared_number_of_parameters,
    starts_as_the_frozen_backbone,
    trains,
    keeps_frozen_tensors_unchanged,
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
FOUNDATIONS = (declares_support, trains_the_declared_number_of_parameters, trains)
"""If one of these fails, the later checks would fail for the same reason and are skipped."""
