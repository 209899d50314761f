"""The contract of a method, shipped so that a plugin's author runs it too.

In a plugin's own tests: `assert broken(check_method(MyMethod)) == []`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.contract.matrix import CheckResult, broken, check_method, tiny_backbones

__all__ = ["CheckResult", "broken", "check_method", "tiny_backbones"]


def __getattr__(name: str) -> Any:
    """Imported on use: the checks import torch, which the command line does not need to list its commands."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from harness.contract import matrix

    return getattr(matrix, name)
