"""FedTiny (Huang, Zhang, Sun, Liu, Yuan, "Distributed Pruning Towards Tiny Neural Networks in Federated Learning",
ICDCS 2023), on top of any base strategy and normalization.

A. Adaptive BN selection. The server makes C = ceil(0.1 / d) masks of density d, layer densities drawn from
   U[d/2, 3d/2], the largest weights of each layer. For each candidate c, on a tenth of every device's data:

       mu_c, var_c <- sum_k n_k (mu, var)_{k,c} / sum_k n_k        by forward passes, parameters unchanged
       L_c = sum_k n_k loss_k(theta * m_c; mu_c, var_c) / sum_k n_k          c* = argmin L_c

   Training starts from theta * m_{c*} with the statistics of c*.

B. Progressive pruning. In rounds r = dR, 2 dR, ..., R_stop, for the layers l of one block, last block first:

       a_l = ceil(rho_r nnz_l),     rho_r = rho_0 / 2 (1 + cos(pi r / R_stop))
       device: the a_l pruned positions with the largest |g| of the last minibatch          clients/pruning.py
       server: g~ = sum_k n_k g_k / sum_k n_k over what was sent; grow the a_l largest |g~| at weight 0, prune the a_l
               smallest |w| of the averaged model                                           strategies.masks.adjust

Deviations. Candidates are made exactly as dense as asked after the 2 % acceptance. Where statistics are private
(FedBN, SiloBN) each device scores a candidate under its own re-estimated statistics; where there are none (FedWon, GN)
only the loss is asked for. Orders carry all they need, so a candidate is sent for each of its two orders. ``released``
takes from the authors' code: the block from the round number (which never visits some blocks), a clock that advances
with adjustments, and an unweighted mean of gradients. Its pre-training on test images has no counterpart here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from clients.pruning import GROW, INDEX, VALUE
from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.local import ClientTask
from fedsim.random import generator
from fedsim.registry import Part, preset, register
from fedsim.strategy import SERVER, Replies, Strategy
from fedsim.types import Order, Tensors
from strategies import masks as m
from strategies.pruned import MASK, Pruned, pruning_part

DENSE, STATISTICS = SERVER + "dense.", SERVER + "statistics."  # held during the selection only
CHOSEN, LOSS, ADJUSTED = SERVER + "candidate", SERVER + "candidate-loss", SERVER + "adjustments"


class FedTiny(Pruned):
    """Args:
    base, names, density: see ``Pruned``.
    statistics: names of the running statistics among the shared tensors.
    private_statistics: the clients keep statistics of their own.
    candidates: C; 0: ceil(0.1 / density). selection: adaptive, vanilla (loss only) or none.
    dev_fraction, dev_passes: share of the shard and forward passes for module A.
    pooled: add the variance between the clients' means to the aggregated variance.
    granularity, every, until, rate: block, dR, R_stop and rho_0 of module B; rate 0 leaves the mask as selected.
    released: see the header. seed: of the candidates' layer densities.
    """

    def __init__(
        self,
        base: Strategy,
        *,
        names: Sequence[str],
        density: float,
        statistics: Sequence[str] = (),
        private_statistics: bool = False,
        candidates: int = 0,
        selection: str = "adaptive",
        dev_fraction: float = 0.1,
        dev_passes: int = 10,
        pooled: bool = False,
        granularity: str = "block",
        every: int = 10,
        until: int = 100,
        rate: float = 0.3,
        released: bool = False,
        seed: int = 0,
    ):
        super().__init__(base, names=names, density=density)
        self.seed = seed
        self.statistics = tuple(statistics) if selection == "adaptive" else ()
        self.own_statistics = private_statistics and selection == "adaptive"
        self.candidates = 1 if selection == "none" else candidates or math.ceil(0.1 / density)
        self.dev = {"dev-fraction": dev_fraction, "passes": float(dev_passes)}
        self.pooled, self.released = pooled, released
        self.blocks = m.blocks(self.names, granularity)
        self.every, self.until, self.rate = every, until, rate
        self.selects = selection != "none"
        self.setup_rounds = (2 if self.statistics or self.own_statistics else 1) if self.selects else 0

    def init(self, shared: Tensors) -> Tensors:
        state = {**super().init(shared), ADJUSTED: torch.tensor(0)}
        if self.selects:
            state |= {CHOSEN: torch.tensor(0), LOSS: torch.tensor(math.inf, dtype=torch.float64)}
            state |= {DENSE + n: shared[n] for n in self.names}
        return state

    def first_masks(self, shared: Tensors) -> Tensors:
        return self.candidate(shared, 0)

    def orders(self, round: int, state: Tensors) -> list[Order]:
        if round > 0:
            return super().orders(round, state)
        each = range(self.candidates)
        if self.own_statistics:  # they stay on the client, so a candidate is scored right after they are estimated
            if round == 0:
                return [self._order(round, state, "statistics", int(state[CHOSEN]))]
            return [self._order(round, state, task, c) for c in each for task in ("statistics", "score")]
        return [self._order(round, state, "statistics" if round < 0 else "score", c) for c in each]

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        if round > 0:
            new = super().aggregate(round, state, order, replies)
            return {n: v for n, v in new.items() if not n.startswith((DENSE, STATISTICS))}
        number = int(order.scalars["candidate"])
        if order.task == "statistics":
            found = self._mean_statistics(order, replies) if self.statistics else {}
            return {**state, **{f"{STATISTICS}{number}.{n}": v for n, v in found.items()}}
        loss = torch.tensor(replies.metric("loss"), dtype=torch.float64)
        if loss >= state[LOSS]:
            return state
        chosen = {CHOSEN: torch.tensor(number), LOSS: loss, **{MASK + n: v for n, v in order.masks.items()}}
        return {**state, **order.shared, **chosen}

    # A. Adaptive BN selection: in rounds -1 (statistics) and 0 (losses).

    def candidate(self, dense: Tensors, number: int) -> Tensors:
        """Masks of candidate c: a function of the dense weights and the seed."""
        draw = generator(self.seed, round=number, purpose="server")
        return m.magnitude(dense, m.noisy_counts(self.sizes(dense), self.density, draw))

    def _order(self, round: int, state: Tensors, task: str, number: int) -> Order:
        dense = {n: state[DENSE + n] for n in self.names}
        masks = self.candidate(dense, number)
        estimated = f"{STATISTICS}{number}."
        theta = {**self.shared(state), **m.apply(dense, masks)}
        theta |= {n.removeprefix(estimated): v for n, v in state.items() if n.startswith(estimated)}
        returns = self.statistics if task == "statistics" else ()
        passes = self.dev if task == "statistics" else {**self.dev, "passes": 1.0}
        scalars = {**passes, "candidate": float(number)}
        return Order(
            round, theta, task, scalars=scalars, fold=not (returns and self.pooled), masks=masks, returns=returns
        )

    def _mean_statistics(self, order: Order, replies: Replies) -> Tensors:
        """Mean over the devices, by dev examples; of the variance the pooled one if asked."""
        mean = replies.mean(order.returned)
        if self.pooled:
            total = sum(replies.weight(r) for r in replies.singles)
            for name in [n for n in mean if n.endswith("running_var")]:
                centre = name.removesuffix("var") + "mean"
                spread = [replies.weight(r) * (r.shared[centre] - mean[centre]).square() for r in replies.singles]
                mean[name] = mean[name] + torch.stack(spread).sum(0) / total
        return mean

    # B. Progressive pruning.

    def asks(self, round: int, state: Tensors) -> Mapping[str, float]:
        """{grow.NAME: a_l} for the layers of this round's block, or nothing."""
        if round % self.every or round > self.until:
            return {}
        done = int(state[ADJUSTED])
        number = round % len(self.blocks) if self.released else len(self.blocks) - 1 - done % len(self.blocks)
        clock = done if self.released else round
        rate = 0.5 * self.rate * (1 + math.cos(math.pi * clock / self.until))
        return {GROW + n: float(amount(state[MASK + n], rate)) for n in self.blocks[number]}

    def rewire(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        asked = {n.removeprefix(GROW): int(a) for n, a in order.scalars.items() if n.startswith(GROW)}
        new = {ADJUSTED: state[ADJUSTED] + bool(asked)}
        for name, count in asked.items():
            gradient = self.gradient(name, state[name], replies)
            new[name], new[MASK + name] = m.adjust(state[name], state[MASK + name], gradient, count)
        return {**state, **new}

    def gradient(self, name: str, like: torch.Tensor, replies: Replies) -> torch.Tensor:
        """Mean gradient of the pruned positions that the devices reported; zero where none did."""
        total = torch.zeros(like.numel(), dtype=torch.float64)
        for reply in replies.singles:
            index, value = reply.report.get(INDEX + name), reply.report.get(VALUE + name)
            if index is None or value is None or index.shape != value.shape:
                continue  # the report of a client that runs something else
            known = (index >= 0) & (index < like.numel())
            weight = 1.0 if self.released else replies.weight(reply)
            total.index_add_(0, index[known].long(), weight * value[known].double())
        return total.view(like.shape)

    def training_flops(self, order: Order, forward: Mapping[str, int], examples: int, last: int) -> float:
        """The base's, and one dense gradient of the block's weights in the last minibatch of an adjustment."""
        dense = 0.0
        for name in self.names:
            if GROW + name in order.scalars:
                dense += forward.get(name.rpartition(".")[0], 0) * (1 - m.density({name: order.masks[name]}))
        return super().training_flops(order, forward, examples, last) + dense * last


def amount(mask: torch.Tensor, rate: float) -> int:
    """a_l = ceil(rho nnz_l), and no more than there are pruned positions."""
    kept = int(mask.sum())
    return min(math.ceil(rate * kept), mask.numel() - kept)


@register("pruning", "fedtiny")
def fedtiny(
    config: Config,
    *,
    density: float = 0.05,
    candidates: int = 0,
    selection: str = "adaptive",
    dev_fraction: float = 0.1,
    dev_passes: int = 10,
    pooled_variance: bool = False,
    granularity: str = "block",
    adjust_every: int = 10,
    adjust_until: int = 100,
    adjust_rate: float = 0.3,
    released_pruning: bool = False,
) -> Part:
    for key, value, known in (
        ("selection", selection, ("adaptive", "vanilla", "none")),
        ("granularity", granularity, ("block", "layer", "entire")),
    ):
        if value not in known:
            raise ConfigError(f"algorithm.{key} = '{value}': expected one of {', '.join(known)}")
    if min(adjust_every, adjust_until, dev_passes) < 1 or not 0 <= adjust_rate <= 1 or not 0 < dev_fraction <= 1:
        raise ConfigError(
            "algorithm: expected adjust-every, adjust-until and dev-passes of at least 1, adjust-rate between 0 and 1,"
            " dev-fraction above 0 and at most 1"
        )

    def server(base: Strategy, task: ClientTask, names: Sequence[str]) -> FedTiny:
        statistics = [n for n, kind in task.kinds.items() if kind == "stats"]
        return FedTiny(
            base,
            names=names,
            density=density,
            statistics=[n for n in statistics if n not in task.private],
            private_statistics=any(n in task.private for n in statistics),
            candidates=candidates,
            selection=selection,
            dev_fraction=dev_fraction,
            dev_passes=dev_passes,
            pooled=pooled_variance,
            granularity=granularity,
            every=adjust_every,
            until=adjust_until,
            rate=adjust_rate,
            released=released_pruning,
            seed=config.seed,
        )

    return pruning_part(density, server)


preset("fedtiny", "pruned by the server, mask chosen and refined with the clients", pruning="fedtiny")
