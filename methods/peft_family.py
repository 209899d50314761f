"""LoRA and its relatives, through HF peft's injection: each adapts frozen Linear and Conv2d layers by trained factors.

This file declares, counts, and selects the adapted layers; `methods/modules/peft_family.py` calls peft, which has the
layers themselves. Grouped convolutions are left alone: peft cannot merge them, or cannot compute them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.backbone import StagedBackbone
    from methods.modules.peft_family import Target

_ROLES = ("q", "k", "v", "proj", "joint_in", "joint_out", "fc1", "gate", "fc2", "conv", "merge", "se", "stem")
_ALL = frozenset(_ROLES) - {"se", "stem"}
_CONVOLUTIONAL = frozenset({"conv", "fc1", "fc2"})
_PATTERN = rf"^(auto|all|({'|'.join(_ROLES)})(,({'|'.join(_ROLES)}))*)$"


def _targets(default: str) -> Any:
    return hyperparameter(
        "auto",
        f"layers by role, as q,v,fc1; auto: {default}, or conv,fc1,fc2 without attention; all: all but se and stem",
        pattern=_PATTERN,
    )


def _rank(default: int, search: Any = (1, 64, "log"), **bounds: Any) -> Any:
    return hyperparameter(
        default, "rank of what is added to a layer", search=search, **({"ge": 1, "le": 1024} | bounds)
    )


class Injected(Method):
    """Base class of the family. A subclass defines the meaning of `auto`, its peft configuration, and its count."""

    mergeable: ClassVar[bool] = True
    auto: ClassVar[frozenset[str]] = frozenset({"q", "v"})
    """The roles that `targets=auto` selects in a network with attention."""

    class Hyperparameters(method.Hyperparameters):
        targets: str = _targets("q,v")

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        if self._chosen(backbone):
            return True
        targets = self.hyperparameters.targets
        return Unsupported(f"no layer that {self.name} can adapt has a role of targets={targets}")

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.peft_family import inject

        targets = self._chosen(backbone)
        inject(backbone, targets, self.configuration(targets))
        self.adjust(backbone, targets)

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        return sum(self.added_parameters(target) for target in self._chosen(backbone))

    def merge(self, backbone: StagedBackbone) -> None:
        """Fold what was trained into the backbone's own layers, which are back in their places afterwards."""
        from methods.modules.peft_family import fold

        fold(backbone)

    @abstractmethod
    def configuration(self, targets: list[Target]) -> Any:
        """peft's configuration, without the target modules."""

    @abstractmethod
    def added_parameters(self, target: Target) -> int:
        """How many parameters one layer gets, in closed form."""

    def fits(self, target: Target) -> bool:
        """Whether the method can adapt this layer, by its shape."""
        return True

    def adjust(self, backbone: StagedBackbone, targets: list[Target]) -> None:
        """Change peft's layers once they are in place."""

    def _chosen(self, backbone: StagedBackbone) -> list[Target]:
        from methods.modules.peft_family import find_targets

        named = self.hyperparameters.targets
        if named == "auto":
            roles = self.auto if {"qkv", "kv", "q", "v"} & set(backbone.roles().values()) else _CONVOLUTIONAL
        else:
            roles = _ALL if named == "all" else frozenset(named.split(","))
        return [target for target in find_targets(backbone, roles) if self.fits(target)]


class LoRA(Injected):
    """W + scale · B A, with scale = alpha / rank, or alpha / √rank with `rslora` (Kalajdzievski, arXiv 2312.03732), and
    A drawn as peft and the authors' code (github.com/microsoft/LoRA) draw it and B zero.

    Queries and values by default, as in the paper, section 4.2; in a fused projection each part has its own A and B.
    A convolution's A keeps its kernel and stride, and its B is 1×1, as peft does it; the authors' code shapes a
    convolution's factors differently. Where there is no attention, all plain convolutions and MLP layers are adapted,
    a case that the paper does not cover. Rank 8 and alpha = rank are those of its RoBERTa tables.

    The LoRA row published for Swin-L, UperNet and ADE20K (50.34 mIoU) is a different one: the code that Mona's authors
    released for this setting (github.com/Leiyi-Hu/mona) has rank 64 on queries and values and leaves `lora_alpha` at 1,
    a scale of 1/64, at a learning rate of 6e-5. Here that is rank=64, alpha=1, lr=6e-5 (4.62 M; the table prints 4.57).
    """

    name = "lora"
    summary = "low-rank updates of the query and value projections"
    source = "Hu et al., LoRA, arXiv 2106.09685; HF peft"

    class Hyperparameters(Injected.Hyperparameters):
        rank: int = _rank(8)
        alpha: float = hyperparameter(8.0, "the update is scaled by alpha / rank", gt=0, le=1024)
        rslora: bool = hyperparameter(False, "scale by alpha / √rank, so that a high rank does not shrink the update")
        dropout: float = hyperparameter(0.0, "dropout of the update's input", ge=0, lt=1)

    def configuration(self, targets: list[Target]) -> Any:
        from peft import LoraConfig

        own = self.hyperparameters
        return LoraConfig(r=own.rank, lora_alpha=own.alpha, lora_dropout=own.dropout, use_rslora=own.rslora)

    def added_parameters(self, target: Target) -> int:
        """A is rank × inputs · kernel, B is outputs × rank."""
        return self.hyperparameters.rank * (target.inputs * target.kernel + target.outputs)


class DoRA(LoRA):
    """m · (W + ΔW) / ‖W + ΔW‖ by output row, with ΔW as in LoRA and the magnitude m starting at ‖W‖.

    The norm is detached from the gradient, as in the paper, section 4.3. Rank and targets are those of `lora`, so that
    the two differ only by the decomposition; the paper's LLaMA runs are rank=32, alpha=64, targets=q,k,v,fc1,fc2.
    A row of zeros has no direction: a network with one is unsupported.
    """

    name = "dora"
    summary = "low-rank updates of direction, and a trained magnitude per row"
    source = "Liu et al., DoRA, arXiv 2402.09353; HF peft"

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        from methods.modules.peft_family import weight_of

        if not (supported := super().supports(backbone)):
            return supported
        for target in self._chosen(backbone):
            if not bool(weight_of(backbone, target).flatten(1).norm(dim=1).gt(0).all()):
                return Unsupported(f"{target.name} has a row of zeros, which has no direction to train")
        return True

    def configuration(self, targets: list[Target]) -> Any:
        config = super().configuration(targets)
        config.use_dora = True
        return config

    def adjust(self, backbone: StagedBackbone, targets: list[Target]) -> None:
        for module in backbone.modules():
            for name, factors in module.named_children():
                if name in ("lora_A", "lora_B"):  # peft multiplies views of them, which have to be contiguous
                    for factor in factors.children():
                        factor.keeps_layout = True

    def added_parameters(self, target: Target) -> int:
        """As LoRA, and one magnitude for each output."""
        return super().added_parameters(target) + target.outputs


class LoHa(Injected):
    """W + (alpha / rank) · (A₁ B₁) ∘ (A₂ B₂), the element-wise product of two low-rank matrices; B₂ starts at zero.

    peft initialises as FedPara does (He), not with LyCORIS's normal distributions. A convolution's kernel is
    flattened into the inputs, LyCORIS's default; its Tucker form is not offered.
    """

    name = "loha"
    summary = "updates that are products of two low-rank matrices"
    source = "Hyeon-Woo et al., FedPara, arXiv 2108.06098; as LoHa in LyCORIS, arXiv 2309.14859; HF peft"
    decayed = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    class Hyperparameters(Injected.Hyperparameters):
        rank: int = _rank(8)
        alpha: float = hyperparameter(8.0, "the update is scaled by alpha / rank", gt=0, le=1024)

    def configuration(self, targets: list[Target]) -> Any:
        from peft import LoHaConfig

        return LoHaConfig(r=self.hyperparameters.rank, alpha=self.hyperparameters.alpha)

    def added_parameters(self, target: Target) -> int:
        """Twice those of LoRA."""
        return 2 * self.hyperparameters.rank * (target.inputs * target.kernel + target.outputs)


class LoKr(Injected):
    """W + (alpha / rank) · C ⊗ D: a Kronecker product of a small full factor C and a large one D of low rank.

    Inputs and outputs are each split into the two divisors nearest to their square root (LyCORIS's `factor=-1`). D is
    full where the rank would not make it smaller. C starts at zero, as in peft; LyCORIS zeroes D.
    """

    name = "lokr"
    summary = "updates that are Kronecker products"
    source = "Yeh et al., LyCORIS, arXiv 2309.14859; HF peft"
    decayed = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

    class Hyperparameters(Injected.Hyperparameters):
        rank: int = _rank(8)
        alpha: float = hyperparameter(8.0, "the update is scaled by alpha / rank", gt=0, le=1024)

    def configuration(self, targets: list[Target]) -> Any:
        from peft import LoKrConfig

        return LoKrConfig(r=self.hyperparameters.rank, alpha=self.hyperparameters.alpha)

    def added_parameters(self, target: Target) -> int:
        """With inputs = a · b and outputs = c · d: C is c × a; D is d × b · kernel, or of that rank."""
        from methods.modules.peft_family import largest_divisor

        a, c = (largest_divisor(number, math.isqrt(number)) for number in (target.inputs, target.outputs))
        b, d, rank = target.inputs // a, target.outputs // c, self.hyperparameters.rank
        factored = rank < max(b, d) / 2
        return a * c + (rank * (d + b * target.kernel) if factored else d * b * target.kernel)


class IA3(Injected):
    """A trained scale, from one, on keys, values, and what enters the last layer of each MLP.

    As in the paper, section 3.3, on transformers. Without attention, the outputs of plain convolutions are scaled,
    and the inputs of `fc2`: ours, as the paper is only about transformers. Where a network adds the bias of its keys
    and values outside the projection (Swin v2, EVA), the scale acts before it.
    """

    name = "ia3"
    summary = "trained scales of keys, values and MLP activations"
    source = "Liu et al., Few-Shot PEFT is Better and Cheaper (T-Few), arXiv 2205.05638; HF peft"
    auto: ClassVar[frozenset[str]] = frozenset({"k", "v", "fc2"})

    class Hyperparameters(method.Hyperparameters):
        lr: float = hyperparameter(3e-3, "learning rate of the scales (AdamW)", gt=0, le=10, search=(1e-4, 3e-2, "log"))
        targets: str = _targets("k,v,fc2")

    def configuration(self, targets: list[Target]) -> Any:
        from peft import IA3Config

        inputs: Any = {target.name for target in targets if _scales_input(target)}  # peft takes a set too
        return IA3Config(feedforward_modules=inputs)

    def added_parameters(self, target: Target) -> int:
        """One scale for each channel: of the input of `fc2`, of the output of any other layer."""
        return target.inputs if _scales_input(target) else target.outputs


def _scales_input(target: Target) -> bool:
    return target.role == "fc2"


class OFT(Injected):
    """W R, with R a block-diagonal rotation of the inputs: the Cayley transform of trained skew-symmetric blocks.

    Blocks of 32, peft's default; the paper fixes the number of blocks instead. Where 32 does not divide a layer's
    inputs, the nearest divisor is taken. The transform is exact here, not peft's default of five terms of its Neumann
    series, so that R stays a rotation. Linear and 1×1 convolutions only: peft 0.21 rotates the patches of a larger
    kernel and sums them back where they overlap, which is not the identity at the start.

    The authors' code (github.com/Zeju1997/oft) learns at 6e-5 for 2,005 steps, at 1e-4 for 15,000 and at 1e-5 for
    ControlNet. The default of 3e-4 is higher, as the short budgets here have a few hundred steps; the range holds all.
    """

    name = "oft"
    summary = "block-diagonal rotations of a layer's inputs"
    source = "Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280; HF peft"

    class Hyperparameters(Injected.Hyperparameters):
        lr: float = hyperparameter(
            3e-4, "learning rate of the rotations (AdamW)", gt=0, le=10, search=(1e-5, 1e-2, "log")
        )
        block: int = hyperparameter(32, "side of a rotation's blocks", ge=2, le=1024, search=[8, 16, 32, 64])

    def configuration(self, targets: list[Target]) -> Any:
        from peft import OFTConfig

        return OFTConfig(r=0, oft_block_size=self.hyperparameters.block, use_cayley_neumann=False)

    def adjust(self, backbone: StagedBackbone, targets: list[Target]) -> None:
        from methods.modules.peft_family import see_sequences

        see_sequences(backbone, targets)  # peft takes a Linear's channels-last map for a convolution's input

    def added_parameters(self, target: Target) -> int:
        """inputs / b blocks, each with the b (b − 1) / 2 entries above its diagonal."""
        block = self._block(target)
        return target.inputs // block * (block * (block - 1) // 2)

    def fits(self, target: Target) -> bool:
        return target.kernel == 1 and self._block(target) > 1

    def _block(self, target: Target) -> int:
        from methods.modules.peft_family import nearest_divisor

        return nearest_divisor(target.inputs, self.hyperparameters.block)


class HRA(Injected):
    """W H₁ … H_r, a chain of Householder reflections H = I − 2 u uᵀ of the inputs, u trained and normalised.

    The reflections start as equal pairs, which cancel: the rank is even. They are not kept orthogonal to each other
    (the paper's λ = 0). Linear and 1×1 convolutions only: peft 0.21 multiplies the chain out as a matrix of the side
    inputs · kernel, which takes seconds per step for one wide 3×3 convolution.
    """

    name = "hra"
    summary = "chains of Householder reflections of a layer's inputs"
    source = "Yuan et al., Householder Reflection Adaptation, arXiv 2405.17484; HF peft"

    class Hyperparameters(Injected.Hyperparameters):
        rank: int = _rank(8, search=[2, 4, 8, 16], ge=2, multiple_of=2)

    def configuration(self, targets: list[Target]) -> Any:
        from peft import HRAConfig

        return HRAConfig(r=self.hyperparameters.rank)

    def added_parameters(self, target: Target) -> int:
        """One vector of the length of the inputs for each reflection."""
        return self.hyperparameters.rank * target.inputs

    def fits(self, target: Target) -> bool:
        return target.kernel == 1
