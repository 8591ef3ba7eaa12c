"""Proximal term of FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020).

    F_k(w) + (mu / 2) ||w - w_t||^2,    whose gradient is  grad F_k(w) + mu (w - w_t)

over the parameters the server sent (private ones have no global value to stay near). The gradient is added to the
task's gradient as it stands in that equation. FedBN's released scripts take the root of the norm in two of three data
sets and skip the term in the first round and first batch; the true gradient at w = w_t is zero: nothing needs skipping.
"""

from __future__ import annotations

from fedsim.plugin import Plugin
from fedsim.types import Tensors, View


class Proximal(Plugin):
    per_tensor = True

    def __init__(self, mu: float):
        self.mu = mu

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        near = view.order.shared
        return {n: g + self.mu * (params[n] - near[n]) if n in near else g for n, g in grads.items()}, state
