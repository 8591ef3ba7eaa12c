"""FBN: running statistics that are the federation's (Guerraoui et al., arXiv 2405.14670).

Clients normalize by the received statistics in training too, and report the mean of their batches' statistics (m_k,
v_k). With weights p_k the server pools them, spread between the clients included, and moves slowly:

    m = sum_k p_k m_k,
    v = sum_k p_k (v_k + (m_k - m)^2) = sum_k p_k (v_k + m_k^2) - m^2
    mu <- (1 - r) mu + r m,    var <- (1 - r) var + r v,    r = 0.1

Gamma, beta and all weights are the base's. From a re-implementation of the paper; its division by n - 1 in place of n
(examples) is left out.
"""

from __future__ import annotations

from clients.norm_variants import ReplaceBatchNorm
from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.local import ClientTask
from fedsim.models.norm_layers import PooledBatchNorm2d
from fedsim.registry import Part, preset, register
from fedsim.strategy import Replies, Strategy, Wrapper
from fedsim.types import Order, Tensors

MEAN, VAR = "running_mean", "running_var"


class PooledStatistics(Wrapper):
    """Args: rate: r, of the server's moving mean."""

    def __init__(self, base: Strategy, rate: float = 0.1):
        super().__init__(base)
        self.rate = rate

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        after = dict(super().aggregate(round, state, order, replies))
        if order.task != "train":
            return after
        seen = {n: v for n, v in replies.mean(order.returned).items() if n.rpartition(".")[2].startswith("seen_")}
        for layer in [n.removesuffix("seen_mean") for n in seen if n.endswith("seen_mean")]:
            mean, square = seen[layer + "seen_mean"].double(), seen[layer + "seen_square"].double()
            for name, pooled in ((layer + MEAN, mean), (layer + VAR, (square - mean.square()).clamp(min=0))):
                after[name] = ((1 - self.rate) * state[name].double() + self.rate * pooled).to(state[name].dtype)
        return after | {n: v.new_zeros(v.shape) for n, v in seen.items()}


@register("normalization", "pooled-statistics")
def pooled_statistics(config: Config, *, pool_rate: float = 0.1) -> Part:
    """``pool-rate``: share of the round's pooled statistics in the server's moving mean."""
    if not 0 < pool_rate <= 1:
        raise ConfigError(f"algorithm.pool-rate = {pool_rate}: expected above 0 and at most 1")

    def server(base: Strategy | None, task: ClientTask) -> Strategy:
        assert base is not None
        return PooledStatistics(base, pool_rate)

    def check(task: ClientTask, config: Config) -> str | None:
        if config.algorithm.pruning == "fedtiny":
            return "FedTiny scores its candidates by re-estimated statistics, and these layers only pool the server's"
        return None

    return Part((ReplaceBatchNorm(PooledBatchNorm2d, PooledBatchNorm2d),), server, check)


preset("fbn", "normalization by pooled statistics, in training too", normalization="pooled-statistics")
