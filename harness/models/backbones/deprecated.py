"""Names of the attach methods in version 0.1, for plugins written for it; removed in version 0.3."""

from __future__ import annotations

import warnings
from typing import Any


def _warn(old: str, new: str) -> None:
    warnings.warn(f"StagedBackbone.{old} is now {new}", DeprecationWarning, stacklevel=3)


class FormerNames:
    """Old names of `AttachPoints`' methods, with their old arguments."""

    def put_in_gap(self: Any, stage: int, module: Any) -> None:
        _warn("put_in_gap", "insert_after_stage")
        self.insert_after_stage(stage, module)

    def put_at_output(self: Any, module: Any) -> None:
        _warn("put_at_output", "insert_at_output")
        self.insert_at_output(module)

    def add_at_entry(self: Any, branch: Any, module: Any, view: Any = "tokens") -> None:
        _warn("add_at_entry", "insert_at_entry")
        self.insert_at_entry(branch, module, view)

    def add_at_exit(self: Any, branch: Any, module: Any, view: Any = "tokens") -> None:
        _warn("add_at_exit", "insert_at_exit")
        self.insert_at_exit(branch, module, view)

    def add_parallel(self: Any, branch: Any, module: Any, before_entry: bool = True, view: Any = "tokens") -> None:
        _warn("add_parallel", "add_to_branch")
        self.add_to_branch(branch, module, view, before_entry)

    def add_after_block(self: Any, block: Any, module: Any, view: Any = "tokens") -> None:
        _warn("add_after_block", "insert_after_block")
        self.insert_after_block(block, module, view)

    def add_after(self: Any, layer: str, module: Any) -> None:
        _warn("add_after", "insert_after")
        self.insert_after(layer, module)

    def add_beside(self: Any, layer: str, module: Any) -> None:
        _warn("add_beside", "add_to_layer")
        self.add_to_layer(layer, module)

    def add_prompts(self: Any, prompts: Any, length: int, deep: bool) -> None:
        _warn("add_prompts", "insert_prompts")
        self.insert_prompts(prompts, length, deep)
