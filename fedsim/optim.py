"""Local optimizers over named tensors, in place.

The tensors may be one client's or, with a leading client dimension, a whole block's: every rule is elementwise, so
the same lines serve both executors. Checked against ``torch.optim``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

import torch

from fedsim.types import Tensors

Moments = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class SGD:
    """p <- p - lr (g + wd p), with heavy-ball momentum as in torch.optim.SGD."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def init(self, params: Tensors) -> Moments:
        return {"momentum": [torch.zeros_like(p) for p in params.values()]} if self.momentum else {}

    def step(self, params: Tensors, grads: Tensors, moments: Moments, lr: float, count: int) -> None:
        """``count`` is the number of steps done before this one."""
        p, g = list(params.values()), [grads[n] for n in params]
        if self.weight_decay:
            g = list(torch._foreach_add(g, p, alpha=self.weight_decay))
        if self.momentum:
            m = moments["momentum"]
            torch._foreach_mul_(m, self.momentum)
            torch._foreach_add_(m, g)
            g = m
        torch._foreach_add_(p, g, alpha=-lr)


@dataclass(frozen=True)
class Adam:
    """Kingma and Ba 2015, weight decay as in torch.optim.Adam (added to the gradient)."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def init(self, params: Tensors) -> Moments:
        return {m: [torch.zeros_like(p) for p in params.values()] for m in ("first", "second")}

    def step(self, params: Tensors, grads: Tensors, moments: Moments, lr: float, count: int) -> None:
        """``count`` is the number of steps done before this one."""
        p, g = list(params.values()), [grads[n] for n in params]
        if self.weight_decay:
            g = list(torch._foreach_add(g, p, alpha=self.weight_decay))
        first, second, t = moments["first"], moments["second"], count + 1
        torch._foreach_lerp_(first, g, 1 - self.beta1)
        torch._foreach_mul_(second, self.beta2)
        torch._foreach_addcmul_(second, g, g, value=1 - self.beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - self.beta2**t) ** 0.5)
        torch._foreach_add_(denominator, self.eps)
        torch._foreach_addcdiv_(p, first, denominator, value=-lr / (1 - self.beta1**t))


Optimizer = SGD | Adam


def learning_rate(base: float, schedule: str, round: int, rounds: int, decay: float = 1.0, every: int = 1) -> float:
    """The local rate of a round (1-based): constant, exponential (decay^(t-1)), step or cosine to zero."""
    t = max(round, 1) - 1
    if schedule == "exponential":
        return base * decay**t
    if schedule == "step":
        return base * decay ** (t // every)
    if schedule == "cosine":
        return base * 0.5 * (1 + cos(pi * t / max(rounds, 1)))
    return base
