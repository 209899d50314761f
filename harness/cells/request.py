"""A user's description of one cell, as entered. `resolve` completes and checks it.

The command line makes its flags from the fields, so this module imports neither pydantic nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.util.option import option

if TYPE_CHECKING:
    from harness.spec import Budget, Part


@dataclass(frozen=True)
class Request:
    """One cell as the user describes it. Plain values: it is sent to other machines."""

    method: str = option("spm", "tuning method; see `harness list methods`")
    backbone: str = option("tf_efficientnet_lite0", "timm name, such as resnet101; see `harness list backbones`")
    weights: str = option(
        "auto", "auto, random, package:NAME, or a .safetensors or .pth file, as its authors publish it"
    )
    dataset: str = option("landcover", "name, or a folder or .yaml file of your own; see `harness list datasets`")
    head: str = option("fpn", "decode head, NAME or NAME:WIDTH; see `harness list heads`")
    budget: str | Budget = option("demo", "name, or a .yaml file; see `harness list budgets`", type=str)
    seed: int = option(0, "seed of initialisation, data order and augmentation", minimum=0, maximum=2**31 - 1)
    part: Part = option(
        "report",
        "report: train on train, score on test; dev: score on the dev split, or on groups that are held out of train",
        type=Literal["report", "dev"],
    )
    settings: dict[str, Any] = option({}, "a hyperparameter; repeatable", flags=("--set",), metavar="KEY=VALUE")
    """Hyperparameters that differ from the method's defaults; strings are read as the field's type."""
