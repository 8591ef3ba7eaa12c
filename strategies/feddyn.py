"""FedDyn (Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021). Over the sampled clients S
of N, each weighing the same:

    client   minimises F_i(y) - <h_i, y> + (alpha / 2) ||y - w||^2,  then  h_i <- h_i - alpha (y_i - w)
    server   h <- h - (alpha / N) sum_S (y_i - w),    w <- mean_S y_i - h / alpha

The client half is ``clients.control.DynamicRegularizer``. Only trained parameters are regularized; statistics are
averaged. Deviations from the released code: alpha is the same for every client (the code divides it by the client's
relative size) and gradients are not clipped.
"""

from __future__ import annotations

import torch

from clients.control import DynamicRegularizer
from fedsim.config import Config
from fedsim.registry import Part, preset, register
from fedsim.strategy import SERVER, Replies, Strategy
from fedsim.types import Order, Tensors

H = SERVER + "dynamic."


class FedDyn(Strategy):
    """Args: alpha: weight of the regularizer."""

    weighting = "uniform"

    def __init__(self, alpha: float = 0.01, **options):
        super().__init__(**options)
        self.alpha = alpha
        self.plugins = (DynamicRegularizer(alpha),)

    def init(self, shared: Tensors) -> Tensors:
        return {**shared, **{H + n: torch.zeros_like(v) for n, v in shared.items() if self.is_trained(n, v)}}

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        mean = replies.mean(self.shared(state))
        h = {n.removeprefix(H): v for n, v in state.items() if n.startswith(H)}
        h = {n: v - self.alpha * replies.share * (mean[n] - order.shared[n]) for n, v in h.items()}
        moved = {n: mean[n] - v / self.alpha for n, v in h.items()}
        return {**state, **mean, **moved, **{H + n: v for n, v in h.items()}}


def _check(alpha: float) -> str | None:
    return None if alpha > 0 else f"dyn-alpha = {alpha:g}: the rule divides by it; expected a number above 0"


@register("rule", "feddyn")
def feddyn(config: Config, *, dyn_alpha: float = 0.01) -> Part:
    build = lambda base, task: FedDyn(dyn_alpha, trainable=task.trainable)  # noqa: E731
    return Part((DynamicRegularizer(dyn_alpha),), build, lambda task, config: _check(dyn_alpha))


preset("feddyn", "dynamic regularizer on every client", rule="feddyn")
