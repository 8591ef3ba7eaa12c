"""Adapters on a frozen backbone, as a plug-in: what is trained and sent is the adapters, their keys and classifiers.

    loss = (1 - lambda) CE + lambda (1 - sum_{i in top(x)} cos(q(x), key_i))     (FedIns, Feng et al., ICCV 2023)

with the second term a mean over the batch; a pool of one has no keys and the plain loss. ``clients.ssf`` has the rest.
"""

from __future__ import annotations

from torch import Tensor, nn

from clients.ssf import MATCHING, Adapted, adapt, places
from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.local import ClientTask
from fedsim.plugin import Plugin
from fedsim.registry import Part, register
from fedsim.types import Order, Tensors, View


class Adapters(Plugin):
    """Args: pool: sets of SSF (P). top_k: sets an example uses. matching: lambda. batch_mean: see ``clients.ssf``."""

    def __init__(self, pool: int = 1, top_k: int = 1, matching: float = 0.0, batch_mean: bool = False):
        self.pool, self.top_k, self.matching, self.batch_mean = pool, top_k, matching, batch_mean

    def prepare(self, model: nn.Module) -> nn.Module:
        return adapt(model, self.pool, self.top_k, self.batch_mean) if places(model) else model

    def begin(self, model: nn.Module, order: Order) -> None:
        model.eval()  # a frozen backbone: neither running statistics nor dropout

    def loss(self, loss: Tensor, params: Tensors, view: View) -> Tensor:
        if MATCHING not in view.aux:
            return loss
        return (1 - self.matching) * loss + self.matching * view.aux[MATCHING]


def sensible(task: ClientTask, config: Config) -> str | None:
    algorithm, model = config.algorithm, config.model
    if algorithm.normalization != "shared":
        return (
            "the backbone is frozen as it was pre-trained, its normalization layers too: nothing is left for "
            f"normalization = '{algorithm.normalization}' (set it to 'shared', or adapters to 'none')"
        )
    if algorithm.pruning != "none":
        return (
            "the backbone is frozen and in no message: nothing is left for "
            f"pruning = '{algorithm.pruning}' (set it to 'none', or adapters to 'none')"
        )
    if not isinstance(task.model, Adapted):
        return f"model '{model.name}' with norm = '{model.norm}' has no layer that an adapter could follow"
    return None


@register("adapters", "ssf")
def ssf(config: Config) -> Part:
    return Part((Adapters(),), check=sensible)


@register("adapters", "ssf-pool")
def ssf_pool(
    config: Config,
    *,
    ssf_pool: int = 25,
    ssf_top_k: int = 3,
    matching: float = 0.1,
    ssf_batch_mean: bool = False,
) -> Part:
    """``ssf-pool``: P; ``ssf-top-k``: k; ``matching``: lambda; ``ssf-batch-mean``: not per example, as released."""
    if not 1 <= ssf_top_k <= ssf_pool:
        raise ConfigError(f"algorithm.ssf-top-k = {ssf_top_k}: expected 1 to ssf-pool = {ssf_pool}")
    if not 0 <= matching <= 1:
        raise ConfigError(f"algorithm.matching = {matching}: expected a share from 0 to 1")
    return Part((Adapters(ssf_pool, ssf_top_k, matching, ssf_batch_mean),), check=sensible)
