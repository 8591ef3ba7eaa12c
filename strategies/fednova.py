"""FedNova (Wang, Liu, Liang, Joshi, Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization", NeurIPS 2020):

    w <- w - tau_eff sum_i p_i d_i,    d_i = (w - w_i) / |a_i|_1,    tau_eff = sum_i p_i |a_i|_1,    p_i = n_i / n

so that a client with more local steps has no more say. The client half is ``clients.control.NormalizedUpdate``.
Only trained parameters are stepped; statistics are averaged. The authors' proximal variant is left out.
"""

from __future__ import annotations

from clients.control import NOVA, STEPS, NormalizedUpdate
from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.registry import Part, preset, register
from fedsim.strategy import Replies, Strategy
from fedsim.types import Order, Tensors


class FedNova(Strategy):
    """Args: momentum: of the clients' SGD."""

    def __init__(self, momentum: float = 0.0, **options):
        super().__init__(**options)
        self.plugins = (NormalizedUpdate(momentum),)

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        new = replies.mean(self.shared(state))
        trained = {n: v for n, v in new.items() if self.is_trained(n, v)}
        like = {**trained, STEPS: next(iter(trained.values()))} if trained else {}
        told = replies.mean_folded(NOVA, like)
        return {**state, **new, **{n: state[n] - told[STEPS] * told[n] for n in trained}}


def _check(task: ClientTask, config: Config) -> str | None:
    return None if config.training.optimizer == "sgd" else "|a_i| is known for SGD; set training.optimizer = 'sgd'"


@register("rule", "fednova")
def fednova(config: Config) -> Part:
    rho = config.training.momentum
    build = lambda base, task: FedNova(rho, trainable=task.trainable)  # noqa: E731
    return Part((NormalizedUpdate(rho),), build, _check)


preset("fednova", "updates normalized by the number of local steps", rule="fednova")
