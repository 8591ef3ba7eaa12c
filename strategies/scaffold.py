"""SCAFFOLD (Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020),
option II. Over the sampled clients S of N, each weighing the same:

    w <- w + eta_g mean_S(y_i - w),    c <- c + (|S| / N) mean_S(c_i+ - c_i),    c and every c_i zero at first

The client half is ``clients.control.ControlVariates``. Only trained parameters take the rate eta_g and have a control
variate; statistics are averaged. Deviation: none known.
"""

from __future__ import annotations

import torch

from clients.control import CONTROL, ControlVariates
from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.registry import Part, preset, register
from fedsim.strategy import SERVER, Replies, Strategy
from fedsim.types import Order, Tensors

VARIATE = SERVER + CONTROL


def plain_sgd(task: ClientTask, config: Config) -> str | None:
    """Why the rule's algebra does not hold here: it takes (w - y) / (K eta) for a mean gradient."""
    training = config.training
    if training.optimizer != "sgd" or training.momentum:
        return "its rule is derived for plain SGD; set training.optimizer = 'sgd' and momentum = 0"
    return None if training.lr > 0 else "training.lr = 0: its rule divides by the rate"


class Scaffold(Strategy):
    """Args: server_lr: eta_g."""

    plugins = (ControlVariates(),)
    weighting = "uniform"

    def __init__(self, server_lr: float = 1.0, **options):
        super().__init__(**options)
        self.server_lr = server_lr

    def init(self, shared: Tensors) -> Tensors:
        return {**shared, **{VARIATE + n: torch.zeros_like(v) for n, v in shared.items() if self.is_trained(n, v)}}

    def variate(self, state: Tensors) -> Tensors:
        """c."""
        return {n.removeprefix(VARIATE): v for n, v in state.items() if n.startswith(VARIATE)}

    def orders(self, round: int, state: Tensors) -> list[Order]:
        c = {CONTROL + n: v for n, v in self.variate(state).items()}
        return [Order(round, self.shared(state), extra=c, weighting=self.weighting)]

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        new, c = replies.mean(self.shared(state)), self.variate(state)
        moved = {n: state[n] + self.server_lr * (new[n] - state[n]) for n in c}
        change = replies.mean_folded(CONTROL, c)
        return {**state, **new, **moved, **{VARIATE + n: v + replies.share * change[n] for n, v in c.items()}}


@register("rule", "scaffold")
def scaffold(config: Config, *, server_lr: float = 1.0) -> Part:
    build = lambda base, task: Scaffold(server_lr, trainable=task.trainable)  # noqa: E731
    return Part((ControlVariates(),), build, plain_sgd)


preset("scaffold", "control variates against client drift", rule="scaffold")
