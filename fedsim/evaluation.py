"""Evaluation modes: with which statistics of its normalization layers a model is scored.

A mode is a plug-in of evaluation, found by name as the parts of an algorithm are (``clients/evaluation.py`` registers
them): ``[evaluation] modes = "own,reestimated"``. The same object works in the simulation's workers and on a deployed
client. Modes never touch training: they are scored beside the ordinary evaluation, which stays as it is.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.local import ClientTask
from fedsim.random import generator
from fedsim.types import Tensors

if TYPE_CHECKING:
    from fedsim.worker import Score

BatchNorm = nn.modules.batchnorm._BatchNorm
Predict = Callable[[Tensor], "Tensor | tuple[Tensor, Tensors]"]
Inputs = Callable[[], Iterator[Tensor]]  # the batches of a split, inputs without labels


class Mode:
    """One way to evaluate. The hooks run in this order: ``gather`` once on the server of a simulation, then ``open``
    and its predictions for each model and domain where the data are, then ``choose`` on the server.

    Attributes:
        splits: where the mode means something: ``test`` (domains trained on), ``unseen`` (the one left out).
        statistics: where running statistics must be: ``shared`` (the server averages them), ``private`` (they stay on
            the clients) or ``any``.
        gathers: needs what other clients keep to themselves, so only a simulation can do it.
        own_examples: needs the client's training inputs, so that every client is scored with a model of its own.
        every_model: scores the model of every client that has trained on the domain left out.
        rewrites: changes BatchNorm's statistics or rule; other layers with statistics are refused.
        smallest_batch: examples that a batch must have.
    """

    splits: tuple[str, ...] = ("test", "unseen")
    statistics: str = "any"
    gathers: bool = False
    own_examples: bool = False
    every_model: bool = False
    rewrites: bool = False
    smallest_batch: int = 1

    def gather(self, private: Sequence[Tensors]) -> Tensors:
        """Tensors that replace a model's own, from the private tensors of the clients that have trained."""
        return {}

    @contextmanager
    def open(self, model: nn.Module, target: Inputs, source: Inputs) -> Iterator[Predict]:
        """A predictor for the batches of ``target``, called on each once and in their order.

        Args:
            model: in evaluation mode with its tensors loaded; on leaving, its modules must be as they were, while its
                tensors may have changed.
            target: inputs of the split that is scored; source: of the client's training examples.
        """
        yield model

    def choose(self, scores: list[Score]) -> list[Score]:
        """What is reported of the scores of one split."""
        return scores


_modes: dict[str, Callable[[Config], Mode]] = {}


def register_mode(name: str) -> Callable[[Callable[[Config], Mode]], Callable[[Config], Mode]]:
    def put(builder: Callable[[Config], Mode]) -> Callable[[Config], Mode]:
        _modes[name] = builder
        return builder

    return put


def mode_names() -> list[str]:
    return sorted(_modes)


def _refuse(mode: Mode, config: Config, task: ClientTask, *, deployed: bool) -> str | None:
    """Why a mode makes no sense here, or None."""
    algorithm = config.algorithm
    setting = f"strategy '{algorithm.strategy}' with normalization '{algorithm.normalization}'"
    statistics = {n for n, kind in task.kinds.items() if kind == "stats"}
    if not statistics:
        return f"{setting} on model '{config.model.name}' has no running statistics; remove the mode"
    kept = statistics <= task.private
    if mode.statistics == "private" and not kept:
        return f"{setting} averages the statistics, and no client has its own; expected 'global' in its place"
    if mode.statistics == "shared" and statistics & task.private:
        return f"{setting} keeps the statistics on the clients, and the server has none; expected 'own' or 'mean'"
    if mode.gathers and deployed:
        return "it needs statistics that real clients never send; expected 'own', 'reestimated' or a mode of the target"
    if mode.rewrites:
        norms = [f"{path}." for path, m in task.model.named_modules() if isinstance(m, BatchNorm)]
        other = (
            next((n for n in sorted(statistics) if not n.startswith(tuple(norms))), None) if norms else min(statistics)
        )
        if other is not None:
            return f"'{other}' is a statistic of no BatchNorm layer, and the mode knows no other"
    if not config.federation.leave_out and "test" not in mode.splits:
        return "it scores a domain that no client holds; set federation.leave-out"
    if config.evaluation.batch_size < mode.smallest_batch:
        return f"evaluation.batch-size is {config.evaluation.batch_size}; expected {mode.smallest_batch} or more"
    return None


def modes_of(config: Config, task: ClientTask, *, deployed: bool = False) -> dict[str, Mode]:
    """The modes that a configuration asks for, in its order.

    Raises:
        ConfigError: a mode is unknown, or makes no sense with this algorithm, model or deployment.
    """
    names = [name.strip() for name in config.evaluation.modes.split(",") if name.strip()]
    if deployed and config.evaluation.never_sampled == "mean":
        raise ConfigError(
            "evaluation.never-sampled = 'mean': the mean of what clients keep to themselves is known to a simulation"
            " alone; expected 'initial'"
        )
    modes = {}
    for name in names:
        if name not in _modes:
            near = difflib.get_close_matches(name, _modes, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(mode_names())}"
            raise ConfigError(f"evaluation.modes: no such mode '{name}'; {hint}")
        modes[name] = _modes[name](config)
        reason = _refuse(modes[name], config, task, deployed=deployed)
        if reason is not None:
            raise ConfigError(f"evaluation.modes: '{name}' makes no sense here: {reason}")
    return modes


def mode_batches(indices: np.ndarray, size: int, seed: int) -> list[np.ndarray]:
    """The batches of a mode: shuffled by the seed, as even in size as they can be and of ``size`` at most.

    The order matters to modes that look at a batch: data sets are stored class by class. Even sizes leave no batch
    of one example behind.
    """
    shuffled = generator(seed, purpose="evaluate").permutation(indices)
    return np.array_split(shuffled, max(1, math.ceil(len(indices) / size)))


@contextmanager
def batch_norms_compute(model: nn.Module, make: Callable[[BatchNorm], Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within, every BatchNorm layer computes ``make(layer)`` and everything else, dropout too, what it did."""
    layers = [m for m in model.modules() if isinstance(m, BatchNorm)]
    for layer in layers:
        layer.forward = make(layer)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def affine(layer: BatchNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """gamma (x - mean) / sqrt(var + eps) + beta. x [B, C, ...]; mean, var [C] or [B, C]."""
    shape = (-1, x.shape[1], *(1,) * (x.dim() - 2))
    scale = (var + layer.eps).rsqrt() if layer.weight is None else layer.weight * (var + layer.eps).rsqrt()
    y = (x - mean.view(shape)) * scale.view(shape)
    return y if layer.bias is None else y + layer.bias.view(shape)


def batch_statistics(x: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of a batch [B, C, ...]."""
    var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=correction)
    return mean, var
