"""Client halves: plug-ins for normalization, pruning, learning rates, clipping, proximal terms and adapters."""

from clients.adapters import Adapters
from clients.clipping import AdaptiveGradientClipping
from clients.evaluation import AdaBN, AlphaBN, UnMixTNS
from clients.learning_rate import HypergradientRate, ReleasedRate
from clients.norm_variants import AffineOnly, ReplaceBatchNorm, ReplaceWithActivation, StandardizeBeforeNorm
from clients.normalization import (
    FixedStatistics,
    LocalNormalization,
    LocalStatistics,
    ReplaceNormalization,
    StandardizedConv2d,
    StandardizedWeights,
)
from clients.proximal import Proximal
from clients.pruning import MaskedTraining
from clients.update_norm import UpdateNorm

__all__ = [
    "AdaBN",
    "Adapters",
    "AdaptiveGradientClipping",
    "AffineOnly",
    "AlphaBN",
    "FixedStatistics",
    "HypergradientRate",
    "LocalNormalization",
    "LocalStatistics",
    "MaskedTraining",
    "Proximal",
    "ReleasedRate",
    "ReplaceBatchNorm",
    "ReplaceNormalization",
    "ReplaceWithActivation",
    "StandardizeBeforeNorm",
    "StandardizedConv2d",
    "StandardizedWeights",
    "UnMixTNS",
    "UpdateNorm",
]
