"""What every pruning method's server half shares: the masks are server state, orders carry them, and they hold through
aggregation, server momentum and adjustments of the mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from clients.pruning import MaskedTraining
from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.flops import training_memory
from fedsim.local import ClientTask
from fedsim.registry import Part
from fedsim.strategy import SERVER, Replies, Strategy, Wrapper
from fedsim.types import Order, Tensors
from strategies import masks as m

MASK = SERVER + "mask."


class Pruned(Wrapper):
    """Args: base: whose model is pruned. names: the weights to prune. density: kept share of all of them together.

    A method says what masks it starts from (``first_masks``), what it asks of the clients beside training (``asks``)
    and how it changes the masks afterwards (``rewire``).
    """

    plugins = (MaskedTraining(),)

    def __init__(self, base: Strategy, *, names: Sequence[str], density: float):
        super().__init__(base)
        self.names, self.density = tuple(names), density

    def first_masks(self, shared: Tensors) -> Tensors:
        """Masks from the dense initial model."""
        raise NotImplementedError

    def asks(self, round: int, state: Tensors) -> Mapping[str, float]:
        """Scalars of the training order of a round; see ``clients.pruning``."""
        return {}

    def rewire(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        """The aggregated state with new masks, or as it is."""
        return state

    def masks(self, state: Tensors) -> Tensors:
        return {n.removeprefix(MASK): v for n, v in state.items() if n.startswith(MASK)}

    def sizes(self, shared: Tensors) -> dict[str, int]:
        return {n: shared[n].numel() for n in self.names}

    def init(self, shared: Tensors) -> Tensors:
        masks = self.first_masks(shared)
        return {**self.base.init(m.apply(shared, masks)), **{MASK + n: v for n, v in masks.items()}}

    def orders(self, round: int, state: Tensors) -> list[Order]:
        masks, asks = self.masks(state), self.asks(round, state)
        return [replace(o, masks=masks, scalars={**o.scalars, **asks}) for o in self.base.orders(round, state)]

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        new = self.base.aggregate(round, state, order, replies)
        new = self.rewire(round, self.restrict(new, self.masks(new)), order, replies)
        return self.restrict(new, self.masks(new))

    def training_memory(self, state: Tensors, parameters: int) -> int:
        return training_memory(parameters, self.masks(state))

    def metrics(self, state: Tensors) -> dict[str, float]:
        return {**self.base.metrics(state), "density": m.density(self.masks(state))}


def prunable_of(task: ClientTask) -> tuple[str, ...]:
    """The prunable weights that are trained and shared: what is private is the client's own affair."""
    return tuple(n for n in m.prunable(task.model) if n in task.trainable and n not in task.private)


def pruning_part(
    density: float, server: Callable[[Strategy, ClientTask, Sequence[str]], Pruned], *, needs_examples: bool = False
) -> Part:
    """Both halves of a pruning method, refused where there is nothing to prune.

    Args:
        server: (the strategy to wrap, the task, the weights to prune) -> the server half.

    Raises:
        ConfigError: the density is no share.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"algorithm.density = {density}: expected a share of the weights above 0, at most 1")

    def check(task: ClientTask, config: Config) -> str | None:
        names, weights = prunable_of(task), dict(task.model.named_parameters())
        total = sum(weights[n].numel() for n in names)
        if not names:
            return (
                f"nothing to prune: model '{config.model.name}' shares no weight of a convolution or linear layer"
                " beside its first"
            )
        if round(density * total) < len(names):
            return f"density {density} of {total} weights leaves less than one to each of {len(names)} layers"
        if needs_examples and not config.federation.public_per_class:
            return "scores weights on examples of the server's own; set federation.public-per-class, for example to 5"
        return None

    def wrapped(base: Strategy | None, task: ClientTask) -> Strategy:
        assert base is not None, "a rule comes first"
        return server(base, task, prunable_of(task))

    return Part((MaskedTraining(),), wrapped, check)
