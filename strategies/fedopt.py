"""Server optimizers (Reddi et al., "Adaptive Federated Optimization", ICLR 2021), the mean update as pseudo-gradient.

    m <- b1 m + (1 - b1) Delta
    v <- v + Delta^2                                    FedAdagrad (b1 = 0)
    v <- v - (1 - b2) Delta^2 sign(v - Delta^2)         FedYogi
    v <- b2 v + (1 - b2) Delta^2                        FedAdam
    w <- w + eta m / (sqrt(v) + tau),                   v_0 = tau^2

FedAvgM (Hsu et al. 2019): m <- b m + Delta, w <- w + eta m. No bias correction: Reddi's algorithm has none (Flower's
FedAdam has, and starts v at 0). Statistics and counters take the mean.
"""

from __future__ import annotations

import torch

from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.registry import Part, preset, register
from fedsim.strategy import SERVER, Replies, Strategy
from fedsim.types import Order, Tensors
from strategies.fedavg import FedAvg

FIRST, SECOND = SERVER + "first.", SERVER + "second."


class FedOpt(FedAvg):
    """Args: kind: momentum, adagrad, yogi or adam; eta: server rate; beta1, beta2, tau: as above."""

    def __init__(
        self, kind: str, eta: float = 1.0, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, **options
    ):
        super().__init__(**options)
        self.kind, self.eta, self.beta1, self.beta2, self.tau = kind, eta, beta1, beta2, tau

    def init(self, shared: Tensors) -> Tensors:
        trained = {n: v for n, v in shared.items() if self.is_trained(n, v)}
        state = {**shared, **{FIRST + n: torch.zeros_like(v) for n, v in trained.items()}}
        if self.kind != "momentum":
            state |= {SECOND + n: torch.full_like(v, self.tau**2) for n, v in trained.items()}
        return state

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        new = super().aggregate(round, state, order, replies)
        for name in [n.removeprefix(FIRST) for n in state if n.startswith(FIRST)]:
            delta = new[name] - state[name]
            if self.kind == "momentum":
                first = self.beta1 * state[FIRST + name] + delta
                step = first
            else:
                first = self.beta1 * state[FIRST + name] + (1 - self.beta1) * delta
                second = self._second(state[SECOND + name], delta.square())
                step = first / (second.sqrt() + self.tau)
                new[SECOND + name] = second
            new[FIRST + name] = first
            new[name] = state[name] + self.eta * step
        return new

    def restrict(self, state: Tensors, masks: Tensors) -> Tensors:
        # The second moment stays: at zero it would fall below tau^2.
        return super().restrict(state, {**masks, **{FIRST + n: mask for n, mask in masks.items()}})

    def _second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        if self.kind == "adagrad":
            return v + square
        if self.kind == "yogi":
            return v - (1 - self.beta2) * square * torch.sign(v - square)
        return self.beta2 * v + (1 - self.beta2) * square


def _rule(kind: str, eta: float, beta1: float, beta2: float = 0.99, tau: float = 1e-3) -> Part:
    def server(base: Strategy | None, task: ClientTask) -> Strategy:
        return FedOpt(kind, eta, beta1, beta2, tau, trainable=task.trainable)

    return Part(server=server)


@register("rule", "fedavgm")
def fedavgm(config: Config, *, server_lr: float = 1.0, server_momentum: float = 0.9) -> Part:
    return _rule("momentum", server_lr, server_momentum)


@register("rule", "fedadagrad")
def fedadagrad(config: Config, *, adagrad_lr: float = 0.1, tau: float = 1e-3) -> Part:
    return _rule("adagrad", adagrad_lr, 0.0, tau=tau)


@register("rule", "fedyogi")
def fedyogi(
    config: Config, *, yogi_lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Part:
    return _rule("yogi", yogi_lr, beta1, beta2, tau)


@register("rule", "fedadam")
def fedadam(
    config: Config, *, adam_lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Part:
    return _rule("adam", adam_lr, beta1, beta2, tau)


preset("fedavgm", "server momentum", rule="fedavgm")
preset("fedadagrad", "Adagrad on the server", rule="fedadagrad")
preset("fedyogi", "Yogi on the server", rule="fedyogi")
preset("fedadam", "Adam on the server", rule="fedadam")
