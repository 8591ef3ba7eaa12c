"""The client half of an algorithm: plug-ins, each a handful of pure hooks.

Rules that make one plug-in serve the loop, Ray and vmap alike: no ``.item()``, no Python branch on data, no
global random state, no input changed in place. What differs between clients comes in ``view.memory`` or in the
arguments; what is the same for all of them comes in ``view.order``. Of a model, vmap asks the same: what ``forward``
does must follow from shapes and the modules' modes, since it may be called once for many steps (``fedsim.replay``).
"""

from __future__ import annotations

from torch import Tensor, nn

from fedsim.types import Order, Tensors, View


class Plugin:
    """One concern of local training. Every hook has a do-nothing default.

    The hooks run in this order: ``prepare`` and ``private`` once a process; ``begin`` once an order; then for
    each client ``start``, for each step ``loss`` and ``update``, and ``finish``.

    Attributes:
        per_tensor: ``update`` looks at each tensor by itself, so it may be called with a single gradient at a time.
        frugal: asks the loop executor to keep one gradient alive at a time, if every plug-in is ``per_tensor``.
    """

    per_tensor: bool = False
    frugal: bool = False

    def overrides(self, *hooks: str) -> bool:
        """Whether any of these hooks is more than its default."""
        return any(getattr(type(self), hook) is not getattr(Plugin, hook) for hook in hooks)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Model surgery, before any weight is sent: strip layers, swap layers, add adapters, freeze."""
        return model

    def private(self, model: nn.Module) -> set[str]:
        """Names of the ``state_dict`` entries that never leave the client."""
        return set()

    def begin(self, model: nn.Module, order: Order) -> None:
        """Set modes of modules for this order (the model is in training mode before)."""

    def start(self, params: Tensors, view: View) -> Tensors:
        """State of the plug-in at the first local step."""
        return {}

    def loss(self, loss: Tensor, params: Tensors, view: View) -> Tensor:
        """The local objective, from the task's loss (a scalar)."""
        return loss

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        """A gradient transformation as in optax: (gradients, state) -> (gradients, state)."""
        return grads, state

    def project(self, params: Tensors, view: View) -> Tensors:
        """Parameters after the optimizer's step, back on the feasible set (masks)."""
        return params

    def finish(self, params: Tensors, state: Tensors, view: View) -> tuple[Tensors, Tensors]:
        """(report to the server, memory to keep): tensors by name, the names the plug-in's own.

        Small, except what the server needs only the mean of: such a report goes under ``fedsim.types.FOLDED``.
        """
        return {}, {}
