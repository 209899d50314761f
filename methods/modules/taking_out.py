"""How a method that is folded into the backbone takes its own modules out again."""

from __future__ import annotations

from torch import nn

from harness.models.backbones.backbone import StagedBackbone


def take_out(backbone: StagedBackbone, module: nn.Module) -> None:
    """Undo `add_after` or `add_beside` of `module`: its hook and its registration. Raises `ValueError` if unknown."""
    key = next((key for key, known in backbone.added.items() if known is module), None)
    if key is None:
        raise ValueError(f"this {type(module).__name__} was not added to {backbone.name}")
    del backbone.added[key]
    for target in backbone.modules():
        for handle, hook in list(target._forward_hooks.items()):
            if getattr(hook, "module", None) is module:
                del target._forward_hooks[handle]
