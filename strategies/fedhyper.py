"""FedHyper (Wang, Wang, Li, "FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning with
Hypergradient Descent", ICLR 2024), on top of any base strategy.

With Delta_t the mean client update before any server rate, and h_t = kappa <Delta_t, Delta_{t-1}>:

    G    alpha_t = clip(alpha_{t-1} + h_t, 1/3, 3),            w <- w + alpha_t Delta_t           (eq. 16)
    SL   beta_t  = clip(beta_{t-1} + h_t, beta_0/10, 10 beta_0), the same for all clients         (eq. 18)
    CL   every client adapts its own beta at every step: clients/learning_rate.py                 (eq. 20)
    GM   G with server momentum: m_t = Delta_t + 0.9 m_{t-1}, h_t = kappa <Delta_t, m_{t-1}>, w <- w + alpha_t m_t

alpha_0 = 1 (``server-lr``); in the first round nothing is adapted. Only trained parameters are stepped: a running
variance extrapolated by alpha > 1 could turn negative, so statistics take the base's value.

``released-hyper`` takes the rules of the authors' code, which differ: GM steps by alpha Delta + 0.9 (alpha - 1) m_{t-1}
with alpha at least 0.8 (no momentum at alpha = 1), SL multiplies beta_0 by 1 + sum h, CL multiplies by at most 1.1 a
step. Their alpha is bounded by [0.2, 5]: ``hyper-bound = 5``. Not taken: the clients' rates re-created every round,
which makes their SL a no-op, and Adam as the local optimizer, for which the derivation does not hold.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from clients.learning_rate import DELTA, HypergradientRate, ReleasedRate, inner
from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.registry import Part, nothing_shared, preset, register
from fedsim.strategy import SERVER, Replies, Strategy, Wrapper
from fedsim.types import Order, Tensors

ALPHA, BETA, CLIENTS, PREVIOUS = SERVER + "alpha", SERVER + "beta", SERVER + "clients", SERVER + DELTA


class FedHyper(Wrapper):
    """Args:
    base: whose new model the rate is applied to.
    server: adapt alpha (G). local: adapt one beta for all clients (SL). share: send Delta_{t-1} to the clients (CL).
    alpha, beta: initial server and local rate.
    bound, local_bound: gamma of alpha and of beta.
    """

    def __init__(
        self,
        base: Strategy,
        *,
        server: bool = True,
        local: bool = False,
        share: bool = False,
        alpha: float = 1.0,
        beta: float = 0.01,
        bound: float = 3.0,
        local_bound: float = 10.0,
        kappa: float = 1.0,
        cosine: bool = False,
        momentum: float = 0.0,
        released: bool = False,
    ):
        super().__init__(base)
        self.alpha, self.released = alpha, released
        self.server, self.local, self.share, self.beta = server, local, share, beta
        self.bound, self.local_bound, self.kappa, self.cosine = bound, local_bound, kappa, cosine
        self.momentum = momentum

    def init(self, shared: Tensors) -> Tensors:
        state = self.base.init(shared)
        state |= {ALPHA: torch.tensor(self.alpha), BETA: torch.tensor(self.beta), CLIENTS: torch.tensor(1)}
        return state | {PREVIOUS + n: torch.zeros_like(v) for n, v in shared.items() if self.is_trained(n, v)}

    def previous(self, state: Tensors) -> Tensors:
        """Delta_{t-1}, or m_{t-1} with momentum; zero before the first round."""
        return {n.removeprefix(PREVIOUS): v for n, v in state.items() if n.startswith(PREVIOUS)}

    def orders(self, round: int, state: Tensors) -> list[Order]:
        orders = self.base.orders(round, state)
        rate = {"lr": self._local_rate(state)} if self.local else {}
        rate |= {"clients": float(state[CLIENTS])} if self.share else {}
        extra = {DELTA + n: v for n, v in self.previous(state).items()} if self.share else {}
        return [
            replace(o, extra={**o.extra, **extra}, scalars={**o.scalars, **rate}) if o.task == "train" else o
            for o in orders
        ]

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        new = self.base.aggregate(round, state, order, replies)
        if order.task != "train":
            return new
        previous = self.previous(state)
        delta = {n: new[n] - state[n] for n in previous}
        # In float64: a sum over millions of products decides the rate of all of them.
        as_double = lambda tree: {n: v.double() for n, v in tree.items()}  # noqa: E731
        h = self.kappa * inner(as_double(delta), as_double(previous), self.cosine)
        alpha, beta = state[ALPHA], state[BETA]
        if self.server:
            least = 0.8 if self.released and self.momentum else 1 / self.bound
            alpha = (alpha.double() + h).clamp(least, self.bound).float()
        if self.local:
            beta = (beta.double() + (self.beta * h if self.released else h)).float()
            beta = beta if self.released else self._bounded(beta)
        step = {n: d + self.momentum * previous[n] for n, d in delta.items()} if self.momentum else delta
        move = {n: alpha.to(d.dtype) * d for n, d in step.items()}
        if self.released and self.momentum:
            push = self.momentum * (alpha - 1)
            move = {n: alpha.to(d.dtype) * d + push.to(d.dtype) * previous[n] for n, d in delta.items()}
        rates = {ALPHA: alpha, BETA: beta, CLIENTS: torch.tensor(len(replies))}
        return {
            **new,
            **{n: state[n] + d for n, d in move.items()},
            **rates,
            **{PREVIOUS + n: d for n, d in step.items()},
        }

    def _bounded(self, beta: torch.Tensor) -> torch.Tensor:
        return beta.clamp(self.beta / self.local_bound, self.beta * self.local_bound)

    def _local_rate(self, state: Tensors) -> float:
        return float(self._bounded(state[BETA]))

    def restrict(self, state: Tensors, masks: Tensors) -> Tensors:
        return self.base.restrict(state, {**masks, **{PREVIOUS + n: mask for n, mask in masks.items()}})

    def metrics(self, state: Tensors) -> dict[str, float]:
        rates = {"server-lr": float(state[ALPHA])} if self.server else {}
        return {**self.base.metrics(state), **rates, **({"local-lr": self._local_rate(state)} if self.local else {})}


def _check(task: ClientTask, config: Config) -> str | None:
    training = config.training
    if training.optimizer != "sgd" or training.momentum:
        return "hypergradients are derived for plain SGD; set training.optimizer = 'sgd' and momentum = 0"
    if training.lr <= 0:
        return "training.lr = 0 has no rate to adapt"
    return nothing_shared(task, config)


def _part(config: Config, *, server: bool, local: bool, client: bool, momentum: float = 0.0, **options) -> Part:
    kappa, cosine, released = options["kappa"], options["cosine"], options["released"]

    def wrap(base: Strategy | None, task: ClientTask) -> Strategy:
        assert base is not None
        return FedHyper(
            base,
            server=server,
            local=local,
            share=client,
            alpha=options["alpha"],
            beta=config.training.lr,
            released=released,
            bound=options["hyper_bound"],
            local_bound=options["local_bound"],
            kappa=kappa,
            cosine=cosine,
            momentum=momentum,
        )

    rate = ReleasedRate if released else HypergradientRate
    plugins = (rate(options["local_bound"], kappa, cosine),) if client else ()
    return Part(plugins, wrap, _check)


def _register(name: str, summary: str, *, server: bool, local: bool, client: bool, momentum: float = 0.0) -> None:
    @register("learning-rate", name)
    def part(
        config: Config,
        *,
        hyper_bound: float = 3.0,
        local_bound: float = 10.0,
        kappa: float = 1.0,
        cosine: bool = False,
        released_hyper: bool = False,
        server_lr: float = 1.0,
    ) -> Part:
        options = {
            "hyper_bound": hyper_bound,
            "local_bound": local_bound,
            "kappa": kappa,
            "cosine": cosine,
            "released": released_hyper,
            "alpha": server_lr,
        }
        return _part(config, server=server, local=local, client=client, momentum=momentum, **options)

    preset(name, summary, learning_rate=name)


_register("fedhyper-g", "hypergradient rate on the server", server=True, local=False, client=False)
_register(
    "fedhyper-sl", "hypergradient rate for all clients, set by the server", server=False, local=True, client=False
)
_register("fedhyper-cl", "hypergradient rate on every client", server=False, local=False, client=True)
_register("fedhyper-g-cl", "hypergradient rates on the server and every client", server=True, local=False, client=True)
_register(
    "fedhyper-gm", "hypergradient rate and momentum on the server", server=True, local=False, client=False, momentum=0.9
)
