"""Server learning rates that need no history: a constant or decaying one, and FedExP's.

    w <- w + eta_t Delta_t

    server-rate   eta_t = eta decay^(t-1)
    fedexp        eta_t = max(1, sum_k p_k ||Delta_k||^2 / (2 (||Delta_t||^2 + eps)))

FedExP (Jhunjhunwala, Wang, Joshi, "FedExP: Speeding Up Federated Averaging via Extrapolation", ICLR 2023) reports the
mean of its last two iterates; p_k are the weights of the mean (n_k / n, as its code has it). Its code decays eps with
the local rate, here eps stays. Statistics take the base's value, as under FedHyper.
"""

from __future__ import annotations

import torch

from clients.update_norm import NORM, UpdateNorm
from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.registry import Part, nothing_shared, preset, register
from fedsim.strategy import SERVER, Replies, Strategy, Wrapper
from fedsim.types import Order, Tensors

RATE, BEFORE = SERVER + "server-lr", SERVER + "before."


class ServerRate(Wrapper):
    """Args: base: whose new model is extrapolated. eta, decay: as above."""

    def __init__(self, base: Strategy, eta: float = 1.0, decay: float = 1.0):
        super().__init__(base)
        self.eta, self.decay = eta, decay

    def init(self, shared: Tensors) -> Tensors:
        return {**self.base.init(shared), RATE: torch.tensor(self.eta)}

    def rate(self, round: int, delta: Tensors, replies: Replies) -> float:
        return self.eta * self.decay ** (round - 1)

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        new = self.base.aggregate(round, state, order, replies)
        if order.task != "train":
            return new
        delta = {n: new[n] - v for n, v in self.shared(state).items() if self.is_trained(n, v)}
        rate = self.rate(round, delta, replies)
        return {**new, **{n: state[n] + rate * d for n, d in delta.items()}, RATE: torch.tensor(rate)}

    def metrics(self, state: Tensors) -> dict[str, float]:
        return {**self.base.metrics(state), "server-lr": float(state[RATE])}


class FedExP(ServerRate):
    """Args: eps: keeps the rate finite where the updates cancel."""

    plugins = (UpdateNorm(),)

    def __init__(self, base: Strategy, eps: float = 1e-3):
        super().__init__(base)
        self.eps = eps

    def init(self, shared: Tensors) -> Tensors:
        before = {BEFORE + n: v for n, v in shared.items() if self.is_trained(n, v)}
        return {**super().init(shared), **before}

    def rate(self, round: int, delta: Tensors, replies: Replies) -> float:
        norms = float(replies.mean_report(NORM)[""])
        mean = sum(float(d.double().square().sum()) for d in delta.values())
        return max(1.0, norms / (2 * (mean + self.eps)))

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        new = super().aggregate(round, state, order, replies)
        before = {n: state[n.removeprefix(BEFORE)] for n in state if n.startswith(BEFORE)}
        return {**new, **before} if order.task == "train" else new

    def model(self, state: Tensors) -> Tensors:
        now = self.base.model(state)
        return {n: (v + state[BEFORE + n]) / 2 if BEFORE + n in state else v for n, v in now.items()}

    def restrict(self, state: Tensors, masks: Tensors) -> Tensors:
        return super().restrict(state, {**masks, **{BEFORE + n: mask for n, mask in masks.items()}})


def _based(make):
    def server(base: Strategy | None, task: ClientTask) -> Strategy:
        assert base is not None
        return make(base)

    return server


@register("learning-rate", "server-rate")
def server_rate(config: Config, *, server_lr: float = 1.0, server_decay: float = 1.0) -> Part:
    return Part((), _based(lambda base: ServerRate(base, server_lr, server_decay)), nothing_shared)


@register("learning-rate", "fedexp")
def fedexp(config: Config, *, fedexp_eps: float = 1e-3) -> Part:
    return Part((UpdateNorm(),), _based(lambda base: FedExP(base, fedexp_eps)), nothing_shared)


preset("server-rate", "a constant or decaying learning rate on the server", learning_rate="server-rate")
preset("fedexp", "server rate by extrapolation", learning_rate="fedexp")
