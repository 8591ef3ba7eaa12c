"""FedAvg (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017).

    theta_{t+1} = sum_k (n_k / n) theta_k

over the whole state dict: weights, gamma and beta, running mean and variance. The variance is averaged as it is,
without the spread between the clients' means, as in FedBN's released code; integer counters keep their dtype.
"""

from __future__ import annotations

from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.registry import Part, preset, register
from fedsim.strategy import Strategy


class FedAvg(Strategy):
    """The base class's rule under its own name."""


def averaging(base: Strategy | None, task: ClientTask) -> Strategy:
    return FedAvg(trainable=task.trainable)


@register("rule", "fedavg")
def fedavg(config: Config) -> Part:
    return Part(server=averaging)


preset("fedavg", "weighted mean of the whole state dict, running statistics included")
preset("fedavg-gn", "FedAvg with GroupNorm in place of BatchNorm", normalization="gn")
preset("fedavg-ln", "FedAvg with LayerNorm in place of BatchNorm", normalization="ln")
