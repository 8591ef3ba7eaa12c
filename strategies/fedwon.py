"""FedWon (Zhuang and Lyu, "FedWon: Triumphing Multi-domain Federated Learning Without Normalization", ICLR 2024).

FedAvg of a network without normalization layers, whose convolutions use scaled standardized weights

    w_hat = gain * gamma * (w - mean) / (sigma sqrt(N))        per filter, fan-in N

and whose gradients are clipped unit by unit (adaptive gradient clipping, lambda = 0.1 unless stated). Everything is
averaged; no client keeps anything. The paper calls gamma "a constant number" and its listing has a gain: both are here,
gain learned and gamma = 1 by default. No residual scaling is added, as in the paper. No code was released.
"""

from __future__ import annotations

from clients.clipping import AdaptiveGradientClipping
from clients.normalization import StandardizedWeights
from fedsim.registry import preset
from strategies.fedavg import FedAvg


class FedWon(FedAvg):
    """Args: agc: lambda of adaptive gradient clipping, 0 for none. gamma: the constant factor of every filter."""

    def __init__(self, agc: float = 0.1, gamma: float = 1.0, **options):
        super().__init__(**options)
        self.plugins = (StandardizedWeights(gamma), *((AdaptiveGradientClipping(agc),) if agc else ()))


preset(
    "fedwon",
    "no normalization layers: standardized weights and adaptive gradient clipping",
    normalization="standardized-weights",
)
