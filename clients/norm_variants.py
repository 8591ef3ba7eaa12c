"""More values of the normalization axis: layers that take the place of BatchNorm. See ``clients/NORMALIZATION.md``.

Layers over vectors [B, C] have no positions to take statistics over. There the variants that must not depend on the
batch use LayerNorm, and the others keep BatchNorm (or their own form of it).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.local import ClientTask
from fedsim.models.norm import classify, norm_names, replace_modules
from fedsim.models.norm_layers import (
    AdaptiveMomentumBatchNorm2d,
    BatchChannelNorm2d,
    EvoNormB0,
    EvoNormS0,
    GhostBatchNorm2d,
    InstanceBatchNorm2d,
)
from fedsim.models.resnet import BasicBlock
from fedsim.plugin import Plugin
from fedsim.registry import Part, register

Make = Callable[[int], nn.Module]


def planes_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def planes_of_ibn_a(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Where IBN-Net a has its layer: after the first convolution of each residual block but those of the last stage;
    in a model without such blocks every BatchNorm2d but the deepest."""
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock)]
    firsts = [b.norm1 for b in blocks if isinstance(b.norm1, nn.BatchNorm2d)]
    if firsts:
        return [n for n in firsts if n.num_features < firsts[-1].num_features]
    return planes_of(model)[:-1]


class ReplaceBatchNorm(Plugin):
    """Args: images, vectors: channels -> layer in the place of BatchNorm2d and BatchNorm1d. choose: model -> those
    BatchNorm2d that are replaced.

    Raises:
        ConfigError: there is nothing to replace.
    """

    def __init__(
        self,
        images: Make,
        vectors: Make = nn.BatchNorm1d,
        choose: Callable[[nn.Module], list[nn.BatchNorm2d]] = planes_of,
    ):
        self.images, self.vectors, self.choose = images, vectors, choose

    def prepare(self, model: nn.Module) -> nn.Module:
        needs_batch_norm(model)
        return self.replace(model)

    def replace(self, model: nn.Module) -> nn.Module:
        chosen = self.choose(model)

        def swap(path: str, module: nn.Module) -> nn.Module | None:
            if isinstance(module, nn.BatchNorm2d):
                return self.images(module.num_features) if any(module is m for m in chosen) else module
            return self.vectors(module.num_features) if isinstance(module, nn.BatchNorm1d) else None

        return replace_modules(model, swap)


def needs_batch_norm(model: nn.Module) -> None:
    if not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in model.modules()):
        raise ConfigError(
            "algorithm.normalization: it replaces BatchNorm, and the model has none; expected model.norm = 'bn' and a"
            " model with normalization layers of that kind"
        )


class ReplaceWithActivation(ReplaceBatchNorm):
    """EvoNorm in the place of BatchNorm2d and the ReLU after it, which it includes; pooling may lie between the two.

    Raises:
        ConfigError: a BatchNorm2d is not followed by a ReLU in an ``nn.Sequential``.
    """

    def prepare(self, model: nn.Module) -> nn.Module:
        needs_batch_norm(model)
        for block in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
            kept = [i for i, module in enumerate(block) if not isinstance(module, nn.MaxPool2d)]
            for i, following in pairwise(kept):
                if isinstance(block[i], nn.BatchNorm2d) and isinstance(block[following], nn.ReLU):
                    block[i], block[following] = self.images(block[i].num_features), nn.Identity()  # type: ignore[arg-type]
        left = [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        if left:
            raise ConfigError(
                f"algorithm.normalization: EvoNorm includes its nonlinearity, and no ReLU follows '{left[0]}' in an "
                "nn.Sequential; choose another normalization or another model"
            )
        return self.replace(model)


class WeightStandardizedConv2d(nn.Conv2d):
    """Weight standardization (Qiao et al., arXiv 1903.10520): (w - mean_i) / sqrt(var_i + eps) a filter, with biased
    variance inside the root as timm's; without a gain, so that a normalization layer must follow."""

    eps = 1e-6

    def forward(self, input: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return self._conv_forward(input, (self.weight - mean) * (var + self.eps).rsqrt(), self.bias)


class StandardizeBeforeNorm(Plugin):
    """Every Conv2d becomes a ``WeightStandardizedConv2d`` with the same weights and names."""

    def prepare(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = WeightStandardizedConv2d  # no tensor of its own: weights and settings stay
        return model


class AffineOnly(Plugin):
    """Only gamma and beta train (Frankle, Schwab, Morcos, ICLR 2021): they and the statistics are all that travels.

    gamma ~ U(0, 1) and beta = 0 at first; every other parameter, the last layer's too, keeps its initial value.
    """

    def prepare(self, model: nn.Module) -> nn.Module:
        affine = {n for n, kind in classify(model).items() if kind == "affine"}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in affine)
            if name in affine:
                nn.init.uniform_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
        return model


def _register(name: str, *plugins: Plugin) -> None:
    """A value of the axis without options."""

    @register("normalization", name)
    def part(config: Config) -> Part:
        return Part(plugins)


_register("in", ReplaceBatchNorm(lambda c: nn.InstanceNorm2d(c, affine=True), nn.LayerNorm))
_register("bcn", StandardizeBeforeNorm(), ReplaceBatchNorm(BatchChannelNorm2d, nn.LayerNorm))
_register(
    "bcn-estimated",
    StandardizeBeforeNorm(),
    ReplaceBatchNorm(lambda c: BatchChannelNorm2d(c, estimated=True), nn.LayerNorm),
)
_register("ibn-a", ReplaceBatchNorm(InstanceBatchNorm2d, choose=planes_of_ibn_a))
_register("evonorm-s0", ReplaceWithActivation(EvoNormS0, nn.LayerNorm))
_register("evonorm-b0", ReplaceWithActivation(EvoNormB0, nn.BatchNorm1d))


@register("normalization", "ghost")
def ghost(config: Config, *, ghost_size: int = 8) -> Part:
    layer = lambda c: GhostBatchNorm2d(c, ghost_size)  # noqa: E731
    return Part((ReplaceBatchNorm(layer, layer),))


@register("normalization", "adab2n")
def adab2n(config: Config, *, ada_kappa: float = 0.5) -> Part:
    layer = lambda c: AdaptiveMomentumBatchNorm2d(c, ada_kappa)  # noqa: E731
    return Part((ReplaceBatchNorm(layer, layer),))


@register("normalization", "affine-only")
def affine_only(config: Config) -> Part:
    def check(task: ClientTask, config: Config) -> str | None:
        return None if norm_names(task.model) else f"model.norm = '{config.model.norm}': no layer has gamma and beta"

    return Part((AffineOnly(),), check=check)
