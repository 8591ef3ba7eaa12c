"""Client halves of the methods that correct client drift: SCAFFOLD's control variates, FedNova's normalized update,
FedDyn's dynamic regularizer. Only parameters that the server averages are corrected: a private one has no drift.

Two tensors of the model's size that stay on the client (``control.*``, ``dynamic.*``) start at zero. (A known baseline
starts SCAFFOLD's at the current weights.)
"""

from __future__ import annotations

from torch import Tensor

from fedsim.plugin import Plugin
from fedsim.types import FOLDED, Tensors, View

CONTROL, DYNAMIC, NOVA = "control.", "dynamic.", "nova."
STEPS = "-steps"  # |a_i|_1; no parameter's name begins with a hyphen


def kept(view: View, prefix: str, name: str, like: Tensor) -> Tensor:
    """This client's tensor ``prefix + name``, zero before its first round."""
    memory = view.memory
    return memory[prefix + name] if prefix + name in memory else like.new_zeros(like.shape)


class ControlVariates(Plugin):
    """SCAFFOLD (Karimireddy et al., ICML 2020), option II, with K local steps at rate eta:

    y <- y - eta (g - c_i + c),    c_i+ = c_i - c + (w - y) / (K eta),    reported: c_i+ - c_i
    """

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        out = dict(grads)
        for name, g in grads.items():
            if CONTROL + name in view.order.extra:
                out[name] = g - kept(view, CONTROL, name, g) + view.order.extra[CONTROL + name]
        return out, state

    def finish(self, params: Tensors, state: Tensors, view: View) -> tuple[Tensors, Tensors]:
        report, memory = {}, {}
        for name, y in params.items():
            if CONTROL + name not in view.order.extra:
                continue
            moved = (view.order.shared[name] - y) / (view.steps * view.lr) - view.order.extra[CONTROL + name]
            report[FOLDED + CONTROL + name] = moved
            memory[CONTROL + name] = kept(view, CONTROL, name, y) + moved
        return report, memory


class NormalizedUpdate(Plugin):
    """FedNova (Wang et al., NeurIPS 2020): d_i = (w - w_i) / |a_i|_1 and |a_i|_1, with momentum rho and tau steps

    |a_i|_1 = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho)    (tau without momentum)
    """

    def __init__(self, momentum: float = 0.0):
        self.momentum = momentum

    def finish(self, params: Tensors, state: Tensors, view: View) -> tuple[Tensors, Tensors]:
        rho, tau = self.momentum, view.steps
        a = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho) if rho else tau
        shared = view.order.shared
        report = {FOLDED + NOVA + n: (shared[n] - p) / a for n, p in params.items() if n in shared}
        first = next(iter(params.values()))
        return {**report, FOLDED + NOVA + STEPS: first.new_zeros(()) + a}, {}


class DynamicRegularizer(Plugin):
    """FedDyn (Acar et al., ICLR 2021): the client minimises F_i(y) - <h_i, y> + (alpha / 2) ||y - w||^2, then
    h_i <- h_i - alpha (y - w)."""

    def __init__(self, alpha: float):
        self.alpha = alpha

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        w = view.order.shared
        pull = lambda n, g: g - kept(view, DYNAMIC, n, g) + self.alpha * (params[n] - w[n])  # noqa: E731
        return {n: pull(n, g) if n in w else g for n, g in grads.items()}, state

    def finish(self, params: Tensors, state: Tensors, view: View) -> tuple[Tensors, Tensors]:
        w, h = view.order.shared, lambda n, y: kept(view, DYNAMIC, n, y)
        return {}, {DYNAMIC + n: h(n, y) - self.alpha * (y - w[n]) for n, y in params.items() if n in w}
