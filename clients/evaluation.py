"""Evaluation modes for models with BatchNorm: which statistics normalize the layers when a model is scored.

| mode        | statistics of a client's model on its domain   | of a newcomer's model on the domain left out      |
|-------------|------------------------------------------------|---------------------------------------------------|
| global      | those the server averages                      | the same                                          |
| own         | the client's                                   | -                                                 |
| mean        | plain mean over the clients that have trained  | the same                                          |
| pooled      | of the mixture of these clients, each alike    | the same                                          |
| reestimated | re-estimated on the client's training inputs   | -                                                 |
| adabn       | re-estimated on the inputs of the test split   | the same                                          |
| test-batch  | of each test batch alone                       | the same                                          |
| alpha-bn    | (1 - a) source + a test batch                  | the same, the source being the newcomer's         |
| unmix-tns   | K components, started at the source's          | the same, the source being the newcomer's         |
| oracle      | -                                              | the best client's: chosen by the test labels      |

Where normalization is private, a newcomer's gamma and beta (and statistics, the source) are the plain mean over the
clients that have trained; a client keeps its own gamma and beta. A client that was never sampled has the initial ones
(mean 0, variance 1, gamma 1, beta 0) or, with ``evaluation.never-sampled = "mean"``, a newcomer's. Test batches are
shuffled by the seed and of ``evaluation.batch-size`` examples at most; test-batch, alpha-bn and unmix-tns depend on
both, and adabn on the size of its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.evaluation import (
    BatchNorm,
    Inputs,
    Mode,
    Predict,
    affine,
    batch_norms_compute,
    batch_statistics,
    register_mode,
)
from fedsim.random import torch_generator
from fedsim.types import Tensors
from fedsim.worker import Score

MEAN, VAR = "running_mean", "running_var"


class Global(Mode):
    """The statistics that the server averages, as FedAvg's model is evaluated everywhere."""

    statistics = "shared"


class Own(Mode):
    """The client's own statistics: the ordinary evaluation of FedBN and SiloBN."""

    statistics = "private"
    splits = ("test",)


class MeanStatistics(Mode):
    """mu = mean_k mu_k, var = mean_k var_k over the clients that have trained (the advice of FedBN's authors)."""

    statistics = "private"
    gathers = True

    def gather(self, private: Sequence[Tensors]) -> Tensors:
        names = [n for n in private[0] if n.rpartition(".")[2] in (MEAN, VAR)]
        return {n: _mean([state[n] for state in private]) for n in names}


class PooledStatistics(MeanStatistics):
    """Of the clients' mixture: var = mean_k (var_k + mu_k^2) - mu^2, which the plain mean of variances falls short of
    by the spread of the means."""

    def gather(self, private: Sequence[Tensors]) -> Tensors:
        found = super().gather(private)
        for name in [n for n in found if n.endswith(MEAN)]:
            spread = torch.stack([state[name] for state in private]).double().var(0, correction=0)
            twin = name.removesuffix(MEAN) + VAR
            if twin in found:
                found[twin] = (found[twin].double() + spread).to(found[twin].dtype)
        return found


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).double().mean(0).to(values[0].dtype)


class Reestimated(Mode):
    """The statistics of one pass over inputs: the plain mean over the batches of each batch's mean and (unbiased)
    variance, layers below normalizing by the batch, as ``torch.optim.swa_utils.update_bn`` does."""

    rewrites = True
    smallest_batch = 2
    own_examples = True
    splits: tuple[str, ...] = ("test",)

    @contextmanager
    def open(self, model: nn.Module, target: Inputs, source: Inputs) -> Iterator[Predict]:
        reestimate(model, source)
        yield model


class AdaBN(Reestimated):
    """AdaBN (Li et al., arXiv 1603.04779): re-estimated on the unlabeled inputs of the target domain."""

    own_examples = False
    splits = ("test", "unseen")

    @contextmanager
    def open(self, model: nn.Module, target: Inputs, source: Inputs) -> Iterator[Predict]:
        reestimate(model, target)
        yield model


def _running(layer: BatchNorm) -> tuple[Tensor, Tensor]:
    """(mean, variance) that the layer has learned; modes replace the forward of layers that have."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def reestimate(model: nn.Module, inputs: Inputs) -> None:
    """Overwrite the running statistics of every BatchNorm layer."""
    seen: dict[nn.Module, int] = {}

    def make(layer: BatchNorm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            seen[layer] = seen.get(layer, 0) + 1
            for running, now in zip(_running(layer), batch_statistics(x, correction=1)):
                running.copy_(now if seen[layer] == 1 else running + (now - running) / seen[layer])
            return affine(layer, x, *batch_statistics(x, correction=0))

        return forward

    with batch_norms_compute(model, make):
        for x in inputs():
            model(x)


class TestBatch(Mode):
    """Each test batch normalizes itself, as in training (Nado et al., arXiv 2006.10963)."""

    rewrites = True
    smallest_batch = 2

    @contextmanager
    def open(self, model: nn.Module, target: Inputs, source: Inputs) -> Iterator[Predict]:
        make = lambda layer: lambda x: affine(layer, x, *batch_statistics(x, correction=0))  # noqa: E731
        with batch_norms_compute(model, make):
            yield model


class AlphaBN(Mode):
    """alpha-BN (You, Li, Zhao, arXiv 2110.04065): mu = (1 - a) mu_source + a mu_batch, the variance (unbiased in the
    batch) likewise. ``alpha`` weighs the batch; some papers put the weight on the source."""

    rewrites = True
    smallest_batch = 2

    def __init__(self, alpha: float):
        self.alpha = alpha

    @contextmanager
    def open(self, model: nn.Module, target: Inputs, source: Inputs) -> Iterator[Predict]:
        def make(layer: BatchNorm) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                both = zip(_running(layer), batch_statistics(x, correction=1))
                mean, var = (torch.lerp(source, batch, self.alpha) for source, batch in both)
                return affine(layer, x, mean, var)

            return forward

        with batch_norms_compute(model, make):
            yield model


class UnMixTNS(Mode):
    """UnMix-TNS (Tomar et al., ICLR 2024): K components of statistics, each test image drawing the alike ones to it.

    Image b with mean m_b and (biased) variance v_b over its positions, p_bk = softmax_k(cos(m_b, mu_k) / 0.07):

        mu_bk = (1 - p_bk) mu_k + p_bk m_b,    var_bk = (1 - p_bk) var_k + p_bk v_b
        mu_b = mean_k mu_bk,                   var_b = mean_k (var_bk + mu_bk^2) - mu_b^2
        mu_k <- mu_k + eta mean_b p_bk (m_b - mu_k),  var_k likewise;  eta = 1 - (1 - momentum)^(B / 64)

    At first mu_k = mu + sqrt(c K / (K - 1) var) N(0, 1), var_k = (1 - c) var of the source, c = 0.5 (one component: the
    source itself). Layers over vectors use the source's statistics.
    """

    rewrites = True
    temperature, spread, full_batch = 0.07, 0.5, 64

    def __init__(self, components: int, seed: int):
        self.components, self.seed = components, seed

    @contextmanager
    def open(self, model: nn.Module, target: Inputs, source: Inputs) -> Iterator[Predict]:
        draw = torch_generator(self.seed, purpose="evaluate")

        def make(layer: BatchNorm) -> Callable[[Tensor], Tensor]:
            mu, var = self.start(*_running(layer), draw)
            momentum = 0.1 if layer.momentum is None else layer.momentum

            def forward(x: Tensor) -> Tensor:
                if x.dim() == 2:
                    return affine(layer, x, *_running(layer))
                nonlocal mu, var
                v, m = torch.var_mean(x.flatten(2), 2, correction=0)  # [B, C]
                alike = nn.functional.cosine_similarity(m[:, None], mu[None], dim=2)  # [B, K]
                p = (alike / self.temperature).softmax(1)[:, :, None]  # [B, K, 1]
                means, variances = torch.lerp(mu[None], m[:, None], p), torch.lerp(var[None], v[:, None], p)
                mean = means.mean(1)  # [B, C]
                spread = (variances + means.square()).mean(1) - mean.square()
                eta = 1 - (1 - momentum) ** (len(x) / self.full_batch)
                mu = mu + eta * (p * (m[:, None] - mu)).mean(0)
                var = var + eta * (p * (v[:, None] - var)).mean(0)
                return affine(layer, x, mean, spread)

            return forward

        with batch_norms_compute(model, make):
            yield model

    def start(self, mean: Tensor, var: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """The components (mu, var), [K, C] each, from the source's [C]."""
        k, c = self.components, self.spread
        if k == 1:
            return mean.clone()[None], var.clone()[None]
        noise = torch.randn(k, len(mean), generator=draw, dtype=mean.dtype).to(mean.device)
        return mean + (c * k / (k - 1) * var).sqrt() * noise, ((1 - c) * var).expand(k, -1).clone()


class Oracle(Mode):
    """The client model that is best on the domain left out. It is chosen by the labels it is scored on: a bound for
    choices among the clients' models, not a method."""

    statistics = "private"
    gathers = True
    every_model = True
    splits = ("unseen",)

    def choose(self, scores: list[Score]) -> list[Score]:
        return [max(scores, key=lambda s: (s.correct, -s.client))] if scores else []


def _register(name: str, mode: type[Mode]) -> None:
    register_mode(name)(lambda config: mode())


for _name, _mode in {
    "global": Global,
    "own": Own,
    "mean": MeanStatistics,
    "pooled": PooledStatistics,
    "reestimated": Reestimated,
    "adabn": AdaBN,
    "test-batch": TestBatch,
    "oracle": Oracle,
}.items():
    _register(_name, _mode)


@register_mode("alpha-bn")
def alpha_bn(config: Config) -> Mode:
    return AlphaBN(config.evaluation.alpha)


@register_mode("unmix-tns")
def unmix_tns(config: Config) -> Mode:
    return UnMixTNS(config.evaluation.components, config.seed)
