"""FedBN and the methods that differ from it only in which normalization tensors are averaged.

FedBN (Li, Jiang, Zhang, Kamp, Dou, ICLR 2021): for every layer l,

    l not a normalization layer:  theta_l <- sum_k p_k theta_{k,l}, broadcast to all clients
    l a normalization layer:      nothing is sent; gamma, beta, running mean, variance and counter persist on the client

SiloBN (Andreux et al., MICCAI DART 2020) keeps only the statistics local; FixBN (Zhong, Chen, Chao, 2023) averages
everything and freezes the statistics half-way. The server half of all three is FedAvg: it never sees what is private.

Deviation from the released FedBN code: layers are found by module type, not by "bn" in the name (which misses the
normalization layers of most model zoos).
"""

from __future__ import annotations

from clients.normalization import FixedStatistics, LocalNormalization, LocalStatistics
from fedsim.registry import preset
from strategies.fedavg import FedAvg


class FedBN(FedAvg):
    plugins = (LocalNormalization(),)


class SiloBN(FedAvg):
    plugins = (LocalStatistics(),)


class FixBN(FedAvg):
    """Args: last: the last round that trains with batch statistics."""

    def __init__(self, last: int, **options):
        super().__init__(**options)
        self.plugins = (FixedStatistics(last),)


preset("fedbn", "normalization layers stay on the client", normalization="local")
preset("silobn", "running statistics stay on the client, gamma and beta are averaged", normalization="local-statistics")
preset("fixbn", "averaged statistics, frozen after half of the rounds", normalization="fixed-statistics")
