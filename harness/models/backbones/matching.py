"""Matches the tensors of a checkpoint with those of a network: prefixes are stripped, published layouts renamed.

All or nothing: a network is loaded completely, or refused with the names of the rest.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.util.text import counted, list_some

Tensors = dict[str, Tensor]
Renaming = Callable[[Tensors, Any], Tensors]
"""(a file's tensors, the timm network) -> the tensors under timm's names. May raise anything for another layout."""

PREFIXES = (
    *("module", "_orig_mod", "model", "teacher", "backbone", "encoder", "image_encoder", "net", "network"),
    *("base_encoder", "encoder_q", "trunk", "student"),
)
"""Parts of names that frameworks put before a backbone's own; where two prefixes fit, the earlier is taken."""
_NOT_BACKBONE = re.compile(
    "head|^fc|classifier|project|predict|decoder|prototype|mask_token|queue|relative_position_index|attn_mask"
    r"|relative_coords_table|^norm\d$"
)
"""First or last parts of the names of tensors that pre-training, a classifier or a segmentation head has besides the
backbone, and of constants that networks compute themselves."""
_RESAMPLED = ("pos_embed", "relative_position_bias_table")
_PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Fit:
    """How a file's tensors fit a network when they are read under one prefix in one layout."""

    tensors: Tensors
    """Under timm's names, without those that are left out."""
    total: int
    """How many of the network's tensors are needed."""
    prefix: str
    missing: Sequence[str]
    unknown: Sequence[str]
    misshapen: Sequence[str]
    resampled: Sequence[str]
    left_out: Sequence[str]
    unused: Sequence[str] = ()
    """Tensors of the network that the file lacks and the backbone does not use."""

    @property
    def matched(self) -> int:
        return self.total - len(self.missing) - len(self.misshapen)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unknown or self.misshapen)

    def describe(self) -> str:
        """One line: what was matched, resampled and ignored."""
        parts = [f"all {self.total} tensors matched" + (f" under the prefix {self.prefix}*" if self.prefix else "")]
        lists = {"resampled": self.resampled, "left out": self.left_out, "absent and not used": self.unused}
        return "; ".join([*parts, *(f"{what}: {list_some(names, 5)}" for what, names in lists.items() if names)])

    def problems(self) -> str:
        """What does not fit, by name."""
        lists = {"missing": self.missing, "not of this network": self.unknown, "of another shape": self.misshapen}
        return "; ".join(f"{what}: {list_some(names)}" for what, names in lists.items() if names)


def find_fit(
    network: Any, tensors: Tensors, layouts: Sequence[Renaming] = (), unused: Callable[[], Collection[str]] = frozenset
) -> Fit:
    """The first prefix and layout under which the tensors fit completely, or else the one that fits best.

    The names as they are come first, so that a file in timm's layout is read unchanged. `unused`: the names of the
    network's tensors that may be missing.
    """
    best: Fit | None = None
    for prefix in _prefixes(tensors):
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        outside = [name for name in tensors if not name.startswith(prefix)]
        for layout in (None, *layouts):
            fit = _fit(network, own, layout, prefix, outside, unused)
            if fit is not None and fit.complete:
                return fit
            if fit is not None and (best is None or fit.matched > best.matched):
                best = fit
    assert best is not None  # the names as they are
    return best


def load(network: Any, fit: Fit, origin: str) -> None:
    """Load a fit into the network it was made for. `origin` is the user's value of `weights`, for messages.

    Raises `UserError` that names the tensors that are missing, unknown, of another shape, or not finite. Batch norms'
    counters may be missing: older checkpoints lack them, and they are not used.
    """
    expected = network.state_dict()
    if not fit.complete:
        architecture = network.pretrained_cfg.get("architecture", "the backbone")
        problem = f"does not fit {architecture} ({fit.matched} of {fit.total} tensors do): {fit.problems()}"
        raise UserError(problem, field="weights", value=origin)
    no_numbers = [n for n, t in fit.tensors.items() if expected[n].is_floating_point() and not _is_finite(t)]
    if no_numbers:
        problem = f"holds tensors that are not finite floating-point numbers: {list_some(no_numbers)}"
        raise UserError(problem, field="weights", value=origin)
    with torch.no_grad():
        network.load_state_dict({name: fit.tensors.get(name, own).to(own.dtype) for name, own in expected.items()})


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """The empty prefix, and every chain of `PREFIXES` that a name starts with."""
    chains: set[tuple[str, ...]] = {()}
    for name in tensors:
        chain = tuple(takewhile(PREFIXES.__contains__, name.split(".")[:-1]))
        chains.update(chain[:length] for length in range(1, len(chain) + 1))
    ranked = sorted(chains, key=lambda chain: [PREFIXES.index(part) for part in chain])
    return ["".join(f"{part}." for part in chain) for chain in ranked]


def _fit(
    network: Any,
    own: Tensors,
    layout: Renaming | None,
    prefix: str,
    outside: Sequence[str],
    unused: Callable[[], Collection[str]],
) -> Fit | None:
    """None if the tensors are not in the layout."""
    renamed, computed, dropped = own, set[str](), list[str]()
    if layout is not None:
        own = {name: t.float() if t.is_floating_point() else t for name, t in own.items()}
        try:
            with _silent():
                renamed = layout(dict(own), network)
        except Exception:  # made for one layout, a renaming can fail anywhere in another
            return None
        if not all(isinstance(tensor, Tensor) for tensor in renamed.values()):
            return None
        computed, dropped = _changes(own, renamed)
    expected = network.state_dict()
    classifiers = _classifiers(network)
    extra = [name for name in renamed if name not in expected or name.startswith(classifiers)]
    kept = {name: tensor for name, tensor in renamed.items() if name in expected and not name.startswith(classifiers)}
    ignored = [name for name in extra if name.startswith(classifiers) or _is_outside(name, expected)]
    misshapen = [
        f"{name} {_shape(own.get(name, tensor))} for {_shape(expected[name])}"
        for name, tensor in kept.items()
        if tensor.shape != expected[name].shape or (name == _PATCHES and name in computed)
    ]
    unknown = [name for name in extra if name not in ignored]
    missing = [name for name in expected if name not in kept and not name.endswith(".num_batches_tracked")]
    absent = [name for name in missing if name in unused()] if missing and not unknown and not misshapen else []
    counters = [name for name in expected if name not in kept and name not in missing]
    return Fit(
        tensors=kept,
        total=len(expected) - len(counters) - len(absent),
        prefix=prefix,
        missing=[name for name in missing if name not in absent],
        unknown=unknown,
        misshapen=misshapen,
        resampled=[_resampling(name, own, renamed) for name in computed if name.endswith(_RESAMPLED)],
        left_out=_groups([*outside, *(prefix + name for name in [*dropped, *ignored])], prefix),
        unused=absent,
    )


def _changes(own: Tensors, renamed: Tensors) -> tuple[set[str], list[str]]:
    """The results that are not views of a file's tensor, and the file's tensors that became no result.

    The second is empty if a result was computed other than by resampling: it may be made of several tensors.
    """
    before, after = ({_address(tensor) for tensor in tensors.values()} for tensors in (own, renamed))
    computed = {name for name, tensor in renamed.items() if _address(tensor) not in before}
    if any(not name.endswith(_RESAMPLED) for name in computed):
        return computed, []
    return computed, [name for name, t in own.items() if _address(t) not in after and name not in renamed]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _classifiers(network: Any) -> tuple[str, ...]:
    classifier = network.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))


def _is_outside(name: str, expected: Collection[str]) -> bool:
    """Whether an unknown tensor is known not to be a part of the backbone: of a longer network, say."""
    parts = name.split(".")
    if parts[0] == "head" or _NOT_BACKBONE.search(parts[-1]):
        return True
    inside = any(known.startswith(f"{parts[0]}.") or known == name for known in expected)
    return not inside and _NOT_BACKBONE.search(parts[0]) is not None


def _groups(names: Sequence[str], prefix: str) -> list[str]:
    """`decode_head (8 tensors)`: the names by their first part that is not in the prefix, constants by their last."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, prefix.split("."), strict=False)))
        group = parts[-1] if _NOT_BACKBONE.search(parts[-1]) else parts[min(common, len(parts) - 1)]
        counts[group] = counts.get(group, 0) + 1
    return [f"{group} ({counted(count, 'tensor')})" for group, count in counts.items()]


def _resampling(name: str, own: Tensors, renamed: Tensors) -> str:
    return f"{name} {_shape(own[name])} to {_shape(renamed[name])}" if name in own else name


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the prints, log lines and warnings of timm about each tensor that it resamples."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
