"""RepAdapter: linear adapters before attention and MLP, which cost nothing once they are merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.attach import Branch
    from harness.models.backbones.backbone import StagedBackbone
    from methods.modules.repadapter import LinearAdapter


class RepAdapter(Method):
    """f(norm(x)) becomes f(z + s · (B A z)) with z = norm(x); A narrows to a few channels, B widens in groups.

    Follows the released code: width 8, two groups, dropout 0.1 between A and B, biases in both; s is tuned per
    dataset there. The adapter is directly before the branch's first projections, and shared by them where there are
    several: the same map as after the norm, except that padded windows of Swin have their padding adapted as well,
    without which merging would not be exact. So it works in post-norm blocks too.

    In a ConvNeXt block it is only before the MLP: the released code has a second one before the depth-wise convolution,
    where it could not be merged.
    """

    name = "repadapter"
    summary = "linear adapters before attention and MLP, which merge into them"
    source = (
        "Luo et al., Towards Efficient Visual Adaption via Structural Re-parameterization, arXiv 2302.08106; "
        "code followed: github.com/luogen1996/RepAdapter"
    )
    decayed = ("up",)
    mergeable: ClassVar[bool] = True

    class Hyperparameters(method.Hyperparameters):
        width: int = hyperparameter(8, "channels between A and B", ge=1, le=1024, search=[4, 8, 16, 32])
        groups: int = hyperparameter(2, "groups of B; a divisor of the width and of all channels", ge=1, le=64)
        scale: float = hyperparameter(1.0, "factor s on what an adapter adds", gt=0, le=1000, search=(0.1, 10, "log"))
        dropout: float = hyperparameter(0.1, "dropout between A and B", ge=0, le=0.9, search=(0.0, 0.2))
        before: Literal["both", "attention"] = hyperparameter(
            "both", "which branches carry an adapter; attention is the paper's RepAdapter-attn"
        )

        @model_validator(mode="after")
        def _divides(self) -> RepAdapter.Hyperparameters:
            if self.width % self.groups:
                raise ValueError(f"width {self.width} is not a multiple of groups {self.groups}")
            return self

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        if not backbone.branches:
            return Unsupported("its blocks have no attention and no MLP to insert an adapter before")
        places = self._places(backbone)
        if not places:
            return Unsupported("its blocks have no attention")
        groups = self.hyperparameters.groups
        if uneven := [branch for branch, _ in places if branch.channels % groups]:
            return Unsupported(f"{uneven[0].channels} channels are not a multiple of groups {groups}")
        return True

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.repadapter import LinearAdapter

        options = self.hyperparameters.model_dump(include={"width", "groups", "scale", "dropout"})
        self._adapters: list[tuple[list[str], LinearAdapter]] = []
        for branch, layers in self._places(backbone):
            adapter = LinearAdapter(branch.channels, **options)
            backbone.insert_before(layers, adapter)
            self._adapters.append((layers, adapter))

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        from methods.modules.repadapter import linear_adapter_parameters

        width, groups = self.hyperparameters.width, self.hyperparameters.groups
        return sum(linear_adapter_parameters(branch.channels, width, groups) for branch, _ in self._places(backbone))

    def merge(self, backbone: StagedBackbone) -> None:
        """Fold the adapters into the projections after them and remove them. The result equals evaluation mode."""
        for layers, adapter in self._adapters:
            for layer in layers:
                adapter.fold_into(backbone.get_submodule(layer))
            backbone.remove(adapter)
        self._adapters = []

    def _places(self, backbone: StagedBackbone) -> list[tuple[Branch, list[str]]]:
        """Each branch that carries an adapter, with the names of the layers that read it."""
        paths = {module: name for name, module in backbone.named_modules()}
        roles = backbone.roles()
        with_mlp = {branch.block for branch in backbone.branches if branch.kind == "mlp"}
        places = []
        for branch in backbone.branches:
            if self.hyperparameters.before == "attention" and branch.kind not in ("attention", "joint"):
                continue
            scope = f"{paths[branch.module]}.{branch.exit.rpartition('.')[0]}".rstrip(".") + "."
            inside = {name: role for name, role in roles.items() if name.startswith(scope)}
            if layers := _first_layers(branch, inside, branch.block in with_mlp):
                places.append((branch, layers))
        return places


def _first_layers(branch: Branch, inside: dict[str, str], with_mlp: bool) -> list[str]:
    """Of the layers around a branch, with their roles, those that read what enters it; `with_mlp`: the block has a
    branch for its MLP. Empty where there are none (pooling)."""
    reducers = [name for name, role in inside.items() if role == "conv"]  # PVT's, before keys and values
    if branch.kind == "conv" and with_mlp:
        return reducers[:1]  # the first point-wise convolution of a MetaFormer's mixer
    first = {
        "attention": {"qkv", "q", "k", "v", "conv" if reducers else "kv"},
        "mlp": {"fc1", "gate"},
        "joint": {"joint_in"},
        "conv": {"fc1"},
    }[branch.kind]
    return [name for name, role in inside.items() if role in first]
