"""Pruning that the clients' gradients keep adjusting: PruneFL and FedDST, in the form FedTiny's authors compared with.

Both start from the largest weights of each layer and adjust every layer in rounds r = dR, 2 dR, ..., R_stop by
a_l = ceil(rho_0 / 2 (1 + cos(pi r / R_stop)) nnz_l), as FedTiny does for one block.

PruneFL (Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", TNNLS 2022): the clients
average the squared gradient of every position over the round and send it dense; grow where its mean is largest.
Its first stage (one client prunes alone) and its time model of layers are left out, as there.

FedDST (Bibikar et al., "Federated Dynamic Sparse Training", AAAI 2022): the clients send the positions of their largest
gradients; grow a random sample of the union. In its own paper each client trains a mask of its own meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from clients.pruning import GROW, INDEX, SQUARE, SQUARES
from fedsim.config import Config
from fedsim.flops import masked_flops, training_memory
from fedsim.local import ClientTask
from fedsim.random import torch_generator
from fedsim.registry import Part, preset, register
from fedsim.strategy import Replies, Strategy
from fedsim.types import Order, Tensors
from strategies import masks as m
from strategies.fedtiny import amount
from strategies.pruned import MASK, Pruned, pruning_part


class Adjusted(Pruned):
    """Args: every, until, rate: dR, R_stop, rho_0. seed: for FedDST's draw."""

    def __init__(self, base: Strategy, *, every: int, until: int, rate: float, seed: int = 0, **options):
        super().__init__(base, **options)
        self.every, self.until, self.rate, self.seed = every, until, rate, seed

    def first_masks(self, shared: Tensors) -> Tensors:
        return m.magnitude(shared, m.uniform_counts(self.sizes(shared), self.density))

    def amounts(self, round: int, state: Tensors) -> dict[str, int]:
        if round % self.every or round > self.until:
            return {}
        rate = 0.5 * self.rate * (1 + math.cos(math.pi * round / self.until))
        return {n: amount(state[MASK + n], rate) for n in self.names}

    def gradient(self, round: int, name: str, like: torch.Tensor, replies: Replies) -> torch.Tensor:
        """Scores of where to grow."""
        raise NotImplementedError

    def rewire(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        new: Tensors = {}
        for name, count in self.amounts(round, state).items():
            gradient = self.gradient(round, name, state[name], replies)
            new[name], new[MASK + name] = m.adjust(state[name], state[MASK + name], gradient, count)
        return {**state, **new}


class PruneFL(Adjusted):
    def asks(self, round: int, state: Tensors) -> Mapping[str, float]:
        return {SQUARES: 1.0} if self.amounts(round, state) else {}

    def gradient(self, round: int, name: str, like: torch.Tensor, replies: Replies) -> torch.Tensor:
        told = [r for r in replies.singles if SQUARE + name in r.report]
        total = torch.zeros(like.shape, dtype=torch.float64)
        for reply in told:
            total += replies.weight(reply) * reply.report[SQUARE + name].double()
        return total

    def training_memory(self, state: Tensors, parameters: int) -> int:
        return training_memory(parameters, self.masks(state), dense_gradient=True)

    def training_flops(self, order: Order, forward: Mapping[str, int], examples: int, last: int) -> float:
        """2 f_S + f_D an example where dense gradients are averaged, 3 f_S otherwise."""
        total = super().training_flops(order, forward, examples, last)
        if SQUARES in order.scalars:
            total += (forward[""] - masked_flops(forward, order.masks)) * examples
        return total


class FedDST(Adjusted):
    def asks(self, round: int, state: Tensors) -> Mapping[str, float]:
        return {GROW + n: float(a) for n, a in self.amounts(round, state).items()}

    def gradient(self, round: int, name: str, like: torch.Tensor, replies: Replies) -> torch.Tensor:
        union = torch.zeros(like.numel(), dtype=torch.bool)
        for reply in replies.singles:
            index = reply.report.get(INDEX + name, torch.empty(0, dtype=torch.int32))
            union[index[(index >= 0) & (index < like.numel())].long()] = True
        draw = torch_generator(self.seed, round=round, client=self.names.index(name), purpose="server")
        return torch.where(union, torch.rand(like.numel(), generator=draw) + 1, 0).view(like.shape)


def _register(name: str, summary: str, kind: type[Adjusted]) -> None:
    @register("pruning", name)
    def part(
        config: Config,
        *,
        density: float = 0.05,
        adjust_every: int = 10,
        adjust_until: int = 100,
        adjust_rate: float = 0.3,
    ) -> Part:
        def server(base: Strategy, task: ClientTask, names: Sequence[str]) -> Adjusted:
            return kind(
                base,
                names=names,
                density=density,
                every=adjust_every,
                until=adjust_until,
                rate=adjust_rate,
                seed=config.seed,
            )

        return pruning_part(density, server)

    preset(name, summary, pruning=name)


_register("prunefl", "masks adjusted by dense squared gradients of the clients", PruneFL)
_register("feddst", "masks adjusted at random among the clients' largest gradients", FedDST)
