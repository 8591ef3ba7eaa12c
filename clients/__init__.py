"""Client halves: plug-ins for normalization, pruning, learning rates, clipping, proximal terms and adapters."""

from clients.clipping import AdaptiveGradientClipping
from clients.normalization import (
    FixedStatistics,
    LocalNormalization,
    LocalStatistics,
    ReplaceNormalization,
    StandardizedConv2d,
    StandardizedWeights,
)
from clients.proximal import Proximal

__all__ = [
    "AdaptiveGradientClipping",
    "FixedStatistics",
    "LocalNormalization",
    "LocalStatistics",
    "Proximal",
    "ReplaceNormalization",
    "StandardizedConv2d",
    "StandardizedWeights",
]
