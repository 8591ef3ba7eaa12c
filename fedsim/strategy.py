"""The server half of an algorithm: three pure functions over a state of named tensors.

``init / orders / aggregate`` is all an algorithm writes. The class is also a Flower ``Strategy``: its five Flower
methods (``fedsim.flower.FlowerMethods``) are derived from the three, so that ``strategy.start(grid, ...)`` works on
any Flower Grid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.flops import masked_flops, training_memory
from fedsim.flower import FlowerMethods
from fedsim.fold import Partial, mean, merge
from fedsim.plugin import Plugin
from fedsim.types import FOLDED, Order, Reply, ReplyColumns, Tensors

SERVER = "@"  # prefix of the state entries that never leave the server


class Rows(Sequence[Reply]):
    """The replies of several blocks as one sequence."""

    def __init__(self, blocks: Sequence[ReplyColumns]):
        self.blocks = blocks
        self._length = sum(map(len, blocks))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Reply]:
        return chain.from_iterable(self.blocks)

    def __getitem__(self, index: Any) -> Any:
        return next(islice(self, index, None)) if isinstance(index, int) and index >= 0 else list(self)[index]


@dataclass(frozen=True)
class Replies:
    """The believed replies to one order, in client order.

    If the order asked to fold, ``partials`` holds the block sums and the single replies carry no model tensors;
    reports and metrics are there either way. ``population`` is the number of clients of the federation, sampled or
    not (N of SCAFFOLD and FedDyn); 0 where it is not known, which stands for full participation.
    """

    singles: Sequence[Reply]
    partials: Sequence[Partial] = ()
    weighting: str = "examples"
    population: int = 0

    def __len__(self) -> int:
        return len(self.singles)

    def weight(self, reply: Reply) -> float:
        return float(reply.examples) if self.weighting == "examples" else 1.0

    @property
    def share(self) -> float:
        """|S| / N, the part of the federation that replied."""
        return len(self) / max(self.population, len(self))

    def _parts(self) -> Sequence[Partial]:
        folded = lambda r: {n: v for n, v in r.report.items() if n.startswith(FOLDED)}  # noqa: E731
        return self.partials or [Partial.of({**r.shared, **folded(r)}, self.weight(r)) for r in self.singles]

    def mean(self, like: Tensors) -> Tensors:
        """sum_k p_k theta_k / sum_k p_k of the names and in the dtypes of ``like``."""
        return mean(self._parts(), like)

    def folded(self, like: Tensors) -> Tensors:
        """What one client's reports under ``FOLDED`` look like: names and shapes, in the dtypes of ``like``."""
        names = {n for p in self.partials[:1] for n in p.tensors if n.startswith(FOLDED)}
        dtype = next(iter(like.values())).dtype if like else torch.float32
        return {n: self.partials[0].tensors[n].to(dtype) for n in sorted(names)}

    def mean_folded(self, name: str, like: Tensors) -> Tensors:
        """The weighted mean of what clients reported under ``FOLDED + name``, by the names and dtypes of ``like``."""
        prefix = FOLDED + name
        total = mean(self._parts(), {prefix + n: v for n, v in like.items()})
        return {n.removeprefix(prefix): v for n, v in total.items()}

    def mean_report(self, name: str) -> Tensors:
        """The weighted mean of the report entries under ``name``, prefix removed; float64."""
        picked = [
            ({n.removeprefix(name): v for n, v in r.report.items() if n.startswith(name)}, self.weight(r))
            for r in self.singles
        ]
        total = merge(Partial.of(t, w) for t, w in picked)
        return {n: v / total.weight for n, v in total.sums().items()}

    def metric(self, name: str) -> float:
        """Weighted mean of a client metric."""
        total = sum(self.weight(r) for r in self.singles)
        return sum(self.weight(r) * r.metrics[name] for r in self.singles) / total


class Strategy(FlowerMethods):
    """Base of every algorithm's server half.

    Args:
        trainable: names of the trained parameters, for rules that treat them apart from statistics and counters
            (a server learning rate must not extrapolate a variance). None: every floating-point tensor.
        seed: of what the server half draws.
        fraction_train: share of the nodes sampled each round when run by Flower's own ``start``; the simulator
            samples by its configuration.
    """

    plugins: tuple[Plugin, ...] = ()
    public: tuple[Tensor, Tensor] | None = None
    """Examples of the server's own (inputs, labels), perhaps none of them; given to the outermost strategy of a run."""
    setup_rounds: int = 0
    """Rounds before the first training round; their numbers are 1 - setup_rounds, ..., 0."""
    needs: int = 1
    """Updates without which an order cannot be aggregated; with fewer the round changes nothing."""
    weighting: ClassVar[str] = "examples"

    def __init__(self, *, trainable: Collection[str] | None = None, seed: int = 0, fraction_train: float = 1.0) -> None:
        super().__init__()
        self.trainable = frozenset(trainable) if trainable is not None else None
        self.seed, self.fraction_train = seed, fraction_train

    def init(self, shared: Tensors) -> Tensors:
        """State before the first round, from the initial shared tensors of the model."""
        return dict(shared)

    def orders(self, round: int, state: Tensors) -> list[Order]:
        """What the clients of this round are asked to do. Several orders are carried out one after the other."""
        return [Order(round, self.shared(state), weighting=self.weighting)]

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        """State after the replies to one order. The default is the weighted mean (FedAvg)."""
        server = {n: v for n, v in state.items() if n.startswith(SERVER)}
        return {**replies.mean(self.shared(state)), **server}

    def shared(self, state: Tensors) -> Tensors:
        """theta: the state entries that travel to clients."""
        return {n: v for n, v in state.items() if not n.startswith(SERVER)}

    def model(self, state: Tensors) -> Tensors:
        """The shared tensors to evaluate; differs from ``shared`` where a method reports an average of iterates."""
        return self.shared(state)

    def metrics(self, state: Tensors) -> dict[str, float]:
        """Figures of the server worth a curve (``server-lr``, ``density``)."""
        return {}

    def restrict(self, state: Tensors, masks: Tensors) -> Tensors:
        """The state with zeros where a mask prunes, in the weights and in whatever would move them (momentum)."""
        return {n: torch.where(masks[n], v, 0) if n in masks else v for n, v in state.items()}

    def training_memory(self, state: Tensors, parameters: int) -> int:
        """Bytes of a client's weights and gradients; ``parameters``: of the whole model."""
        return training_memory(parameters, {})

    def training_flops(self, order: Order, forward: Mapping[str, int], examples: int, last: int) -> float:
        """FLOPs of a round's local training.

        Args:
            order: what was asked of the clients.
            forward: FLOPs of one example's forward pass by module path, "" for the whole dense model.
            examples: seen by all clients together; ``last``: of them in the clients' last steps.
        """
        return 3 * masked_flops(forward, order.masks) * examples

    def is_trained(self, name: str, value: object) -> bool:
        return name in self.trainable if self.trainable is not None else value.dtype.is_floating_point  # type: ignore[attr-defined]


class Wrapper(Strategy):
    """A server half on top of another, so that pruning, server rates and aggregation rules compose.

    Everything not overridden is the base's. ``FedTiny(FedHyper(FedAvg()))`` prunes what FedHyper's rate scaled.
    """

    def __init__(self, base: Strategy) -> None:
        super().__init__(trainable=base.trainable, seed=base.seed, fraction_train=base.fraction_train)
        self.base = base
        self.plugins = (*self.plugins, *base.plugins)
        self.setup_rounds = self.setup_rounds + base.setup_rounds
        self.needs = max(self.needs, base.needs)

    def init(self, shared: Tensors) -> Tensors:
        return self.base.init(shared)

    def orders(self, round: int, state: Tensors) -> list[Order]:
        return self.base.orders(round, state)

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        return self.base.aggregate(round, state, order, replies)

    def model(self, state: Tensors) -> Tensors:
        return self.base.model(state)

    def metrics(self, state: Tensors) -> dict[str, float]:
        return self.base.metrics(state)

    def restrict(self, state: Tensors, masks: Tensors) -> Tensors:
        return self.base.restrict(state, masks)

    def training_flops(self, order: Order, forward: Mapping[str, int], examples: int, last: int) -> float:
        return self.base.training_flops(order, forward, examples, last)

    def training_memory(self, state: Tensors, parameters: int) -> int:
        return self.base.training_memory(state, parameters)
