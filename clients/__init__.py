"""Client halves: plug-ins for normalization, pruning, learning rates, clipping, proximal terms and adapters."""

from clients.clipping import AdaptiveGradientClipping
from clients.learning_rate import HypergradientRate
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
    "HypergradientRate",
    "LocalNormalization",
    "LocalStatistics",
    "Proximal",
    "ReplaceNormalization",
    "StandardizedConv2d",
    "StandardizedWeights",
]
