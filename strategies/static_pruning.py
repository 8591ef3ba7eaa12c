"""Pruning once, at the server, before training: the baselines of FedTiny's tables.

    magnitude   the largest |w| of each layer
    random      positions at random in each layer
    snip        |g w| on examples of the server's own (Lee, Ajanthan, Torr, "SNIP", ICLR 2019)
    synflow     dR/dw w, R the output under |w| for an input of ones (Tanaka et al., "SynFlow", NeurIPS 2020); no data

All layers have the same density, as FedTiny's authors ran them; snip and synflow prune in five steps of equal sparsity
(SynFlow's own paper takes a hundred exponential ones), scored in evaluation mode. The server's examples come from a
public split of the training data (``federation.public-per-class``), where the authors took them from the test split.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.random import torch_generator
from fedsim.registry import Part, preset, register
from fedsim.strategy import Strategy
from fedsim.types import Tensors
from strategies import masks as m
from strategies.pruned import Pruned, pruning_part

STEPS = 5


class StaticPruning(Pruned):
    """Args: criterion: magnitude, random, snip or synflow. skeleton: the model, for the last two. seed: for random."""

    def __init__(
        self,
        base: Strategy,
        *,
        names: Sequence[str],
        density: float,
        criterion: str = "magnitude",
        skeleton: nn.Module | None = None,
        seed: int = 0,
    ):
        super().__init__(base, names=names, density=density)
        self.criterion, self.skeleton, self.seed = criterion, skeleton, seed

    def first_masks(self, shared: Tensors) -> Tensors:
        sizes = self.sizes(shared)
        weights = {n: shared[n] for n in self.names}
        if self.criterion == "magnitude":
            return m.magnitude(weights, m.uniform_counts(sizes, self.density))
        if self.criterion == "random":
            draw = torch_generator(self.seed, purpose="server")
            scores = {n: torch.rand(w.shape, generator=draw) for n, w in weights.items()}
            return m.magnitude(scores, m.uniform_counts(sizes, self.density))
        masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
        for step in range(1, STEPS + 1):
            counts = m.uniform_counts(sizes, 1 - (1 - self.density) * step / STEPS)
            scores = {n: torch.where(masks[n], s, -1) for n, s in self._scores(shared, masks).items()}
            masks = {n: m.top(s, counts[n]) for n, s in scores.items()}
        return masks

    def _scores(self, shared: Tensors, masks: Tensors) -> Tensors:
        """|g w| of the pruned model, g the gradient of snip's loss or of synflow's flow."""
        assert self.skeleton is not None
        assert self.public is not None
        (x, y), state, model = self.public, m.apply(shared, masks), copy.deepcopy(self.skeleton).eval()
        if self.criterion == "synflow":  # in float64: the flow is a product over the layers
            x, model = torch.ones(1, *x.shape[1:], dtype=torch.float64), model.double()
            state = {n: v.abs().double() for n, v in state.items()}
        weights = {n: state[n].clone().requires_grad_() for n in self.names}
        output = functional_call(model, {**state, **weights}, (x,))
        value = output.sum() if self.criterion == "synflow" else F.cross_entropy(output, y)
        gradients = torch.autograd.grad(value, list(weights.values()))
        return {n: (g * w).abs().detach() for (n, w), g in zip(weights.items(), gradients)}


def _register(name: str, summary: str) -> None:
    @register("pruning", name)
    def part(config: Config, *, density: float = 0.05) -> Part:
        def server(base: Strategy, task: ClientTask, names: Sequence[str]) -> StaticPruning:
            return StaticPruning(
                base, names=names, density=density, criterion=name, skeleton=task.model, seed=config.seed
            )

        return pruning_part(density, server, needs_examples=name == "snip")

    preset(name, summary, pruning=name)


_register("magnitude", "the largest weights of each layer, chosen once at the server")
_register("random", "positions drawn once at the server")
_register("snip", "connection sensitivity on the server's examples, once")
_register("synflow", "synaptic flow, once, without data")
