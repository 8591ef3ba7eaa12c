"""What a client does with normalization layers: which of their tensors stay, and layers in BatchNorm's place.

Layers are found by type and full path, never by name. What each value of the axis averages: ``NORMALIZATION.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clients.clipping import AdaptiveGradientClipping
from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.models.norm import NORM_TYPES, classify, make_norm, norm_names, replace_modules
from fedsim.plugin import Plugin
from fedsim.registry import Part, register
from fedsim.types import Order

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class LocalNormalization(Plugin):
    """FedBN (Li et al., ICLR 2021): every tensor of every normalization layer stays on the client."""

    def private(self, model: nn.Module) -> set[str]:
        return norm_names(model)


class LocalStatistics(Plugin):
    """SiloBN (Andreux et al., 2020): running statistics (and their counter) stay local, gamma and beta are averaged."""

    def private(self, model: nn.Module) -> set[str]:
        return {name for name, kind in classify(model).items() if kind in ("stats", "counter")}


class FixedStatistics(Plugin):
    """FixBN (Zhong et al., 2023): after round ``last`` BatchNorm uses the averaged statistics in training too.

    Gamma and beta keep training. Only the BatchNorm layers change mode: putting the whole network in evaluation mode,
    as one released code does, would switch dropout off as well.
    """

    def __init__(self, last: int):
        self.last = last

    def begin(self, model: nn.Module, order: Order) -> None:
        if order.round > self.last:
            for module in model.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()


class ReplaceNormalization(Plugin):
    """Every normalization layer becomes GroupNorm (but for a LayerNorm) or LayerNorm of the same width, or nothing."""

    def __init__(self, kind: str):
        self.kind = kind

    def prepare(self, model: nn.Module) -> nn.Module:
        def swap(path: str, module: nn.Module) -> nn.Module | None:
            if not isinstance(module, NORM_TYPES):
                return None
            if self.kind == "gn" and isinstance(module, nn.LayerNorm):
                return None  # already of each example alone; GroupNorm would take a ViT's tokens for channels
            vector = isinstance(module, nn.BatchNorm1d | nn.LayerNorm)
            return make_norm(self.kind, _width(module), dims=1 if vector else 2)

        return replace_modules(model, swap)


def _width(norm: nn.Module) -> int:
    for attribute in ("num_features", "num_channels"):
        if hasattr(norm, attribute):
            return getattr(norm, attribute)
    return math.prod(norm.normalized_shape)  # type: ignore[arg-type]


class StandardizedConv2d(nn.Conv2d):
    """Convolution on scaled, standardized weights (Brock et al. 2021; FedWon, eq. 3):

        w_hat[i] = gain[i] * gamma * (w[i] - mean_i) / sqrt(max(var_i * N, eps)),   N = fan-in, biased variance

    so that every filter has norm gain * gamma. ``gain`` is learned, one per output channel, 1 at first.
    """

    def __init__(self, conv: nn.Conv2d, gamma: float = 1.0, eps: float = 1e-4, learn_gain: bool = True):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
        )
        self.load_state_dict(conv.state_dict())
        self.gamma, self.eps = gamma, eps
        self.fan_in = conv.weight[0].numel()
        if learn_gain:
            self.gain = nn.Parameter(torch.ones(conv.out_channels, 1, 1, 1))
        else:
            self.register_parameter("gain", None)

    def standardized(self) -> Tensor:
        """w_hat [O, I / groups, kh, kw]."""
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        scale = self.gamma * torch.rsqrt(torch.clamp(var * self.fan_in, min=self.eps))
        if self.gain is not None:
            scale = scale * self.gain
        return (self.weight - mean) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized(), self.bias)


class StandardizedWeights(Plugin):
    """FedWon's surgery (Zhuang and Lyu, ICLR 2024): no normalization layer at all, convolutions on standardized
    weights; linear layers stay as they are."""

    def __init__(self, gamma: float = 1.0, eps: float = 1e-4, learn_gain: bool = True):
        self.gamma, self.eps, self.learn_gain = gamma, eps, learn_gain

    def prepare(self, model: nn.Module) -> nn.Module:
        def swap(path: str, module: nn.Module) -> nn.Module | None:
            if isinstance(module, nn.Conv2d) and not isinstance(module, StandardizedConv2d):
                return StandardizedConv2d(module, self.gamma, self.eps, self.learn_gain)
            return nn.Identity() if isinstance(module, NORM_TYPES) else None

        return replace_modules(model, swap)


def _needs(kinds: tuple[str, ...], what: str):
    def check(task: ClientTask, config: Config) -> str | None:
        if any(kind in kinds for kind in task.kinds.values()):
            return None
        return f"model '{config.model.name}' with norm = '{config.model.norm}' has no {what} to treat apart"

    return check


@register("normalization", "local")
def local(config: Config) -> Part:
    return Part((LocalNormalization(),), check=_needs(("affine", "stats"), "normalization layer"))


@register("normalization", "local-statistics")
def local_statistics(config: Config) -> Part:
    return Part((LocalStatistics(),), check=_needs(("stats",), "running statistics"))


@register("normalization", "fixed-statistics")
def fixed_statistics(config: Config, *, fix_after: float = 0.5) -> Part:
    """``fix-after``: share of the rounds before the statistics are frozen (T* = T / 2 in a re-implementation)."""
    plugin = FixedStatistics(round(fix_after * config.rounds))
    return Part((plugin,), check=_needs(("stats",), "running statistics"))


@register("normalization", "gn")
def gn(config: Config) -> Part:
    return Part((ReplaceNormalization("gn"),))


@register("normalization", "ln")
def ln(config: Config) -> Part:
    return Part((ReplaceNormalization("ln"),))


@register("normalization", "standardized-weights")
def standardized_weights(
    config: Config,
    *,
    gamma: float = 1.0,
    ws_eps: float = 1e-4,
    learn_gain: bool = True,
    agc: float = 0.1,
    agc_skip_last: bool = False,
) -> Part:
    """``agc``: factor lambda of adaptive gradient clipping; 0: none, as FedWon does for batches of 1 and 2."""
    plugins: tuple[Plugin, ...] = (StandardizedWeights(gamma, ws_eps, learn_gain),)
    if agc:
        plugins += (AdaptiveGradientClipping(agc, skip_last=agc_skip_last),)
    return Part(plugins)
