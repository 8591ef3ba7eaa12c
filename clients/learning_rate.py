"""Learning rates that a client adapts by hypergradient.

FedHyper-CL (Wang, Wang, Li, ICLR 2024, eq. 20), at every local step k of round t, with K steps a round:

    beta_k = clip(beta_{k-1} + kappa (g_k . g_{k-1} + (1/K) g_k . -Delta_{t-1}),  beta_0 / gamma,  beta_0 gamma)

Delta_{t-1} is the previous mean update of the clients; -Delta stands in for a gradient, so that steps in the same
direction raise the rate; it is the "previous gradient" of the first step, too. The rate restarts at beta_0 each round.
kappa = 1 and the plain inner product are the paper's; that product grows with the size of the model, and ``cosine``
divides it by the norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.plugin import Plugin
from fedsim.types import Tensors, View

DELTA = "delta."  # prefix of the previous global update in an order's extra tensors
RATE = "client-lr"  # in the plug-in's state and in its report; no parameter has a hyphen in its name


def inner(a: Tensors, b: Tensors, cosine: bool = False) -> Tensor:
    """<a, b> over the names they share, or the cosine of the angle; zero if they share none."""
    names = [n for n in a if n in b]
    if not names:
        return next(iter(a.values())).new_zeros(())
    product = torch.stack([(a[n] * b[n]).sum() for n in names]).sum()
    if not cosine:
        return product
    norms = [torch.stack([t[n].square().sum() for n in names]).sum().sqrt() for t in (a, b)]
    return product / (norms[0] * norms[1]).clamp(min=1e-12)


class HypergradientRate(Plugin):
    """Args: gamma: bound of beta / beta_0. kappa: step size of the rate. cosine: see above."""

    def __init__(self, gamma: float = 10.0, kappa: float = 1.0, cosine: bool = False):
        self.gamma, self.kappa, self.cosine = gamma, kappa, cosine

    def start(self, params: Tensors, view: View) -> Tensors:
        first = next(iter(params.values()))
        pseudo = self._pseudo_gradient(view)
        previous = {n: pseudo.get(n, torch.zeros_like(p)) for n, p in params.items()}
        return {RATE: torch.full_like(first.detach().sum(), view.lr), **previous}

    def _pseudo_gradient(self, view: View) -> Tensors:
        extra = view.order.extra
        return {n.removeprefix(DELTA): -v for n, v in extra.items() if n.startswith(DELTA)}

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        local = inner(grads, state, self.cosine)
        globally = inner(grads, self._pseudo_gradient(view), self.cosine) / view.steps
        beta = state[RATE] + self.kappa * (local + globally)
        beta = beta.clamp(view.lr / self.gamma, view.lr * self.gamma)
        scaled = {n: g * (beta / view.lr) for n, g in grads.items()}  # the optimizer multiplies by the schedule's rate
        return scaled, {RATE: beta, **grads}

    def finish(self, params: Tensors, state: Tensors, view: View) -> tuple[Tensors, Tensors]:
        return {RATE: state[RATE]}, {}


class ReleasedRate(HypergradientRate):
    """The rate of FedHyper-CL as the authors' code computes it, a factor m on the local rate:

        m <- clip(m min(1.1, 1 + d_k . d_{k-1} + 0.1 d_k . Delta_{t-1} / clients),  1 / gamma,  gamma)

    d_k is the change of the parameters by step k, and the factor counts from the next step on. The order's scalar
    ``clients`` says how many sent Delta_{t-1}. (Their code skips the first minibatch of every epoch; this does not.)
    """

    def start(self, params: Tensors, view: View) -> Tensors:
        first, delta = next(iter(params.values())), self._pseudo_gradient(view)
        previous = {n: -delta[n] if n in delta else torch.zeros_like(p) for n, p in params.items()}
        return {RATE: torch.full_like(first.detach().sum(), view.lr), **previous}

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        factor = state[RATE] / view.lr
        change = {n: -state[RATE] * g for n, g in grads.items()}
        towards = -inner(change, self._pseudo_gradient(view)) / view.order.scalars.get("clients", 1.0)
        growth = (1 + inner(change, state) + 0.1 * towards).clamp(max=1.1)
        after = (factor * growth).clamp(1 / self.gamma, self.gamma) * view.lr
        return {n: g * factor for n, g in grads.items()}, {RATE: after, **change}
