"""The neutral models in torch, the ordinary local training, and the loss that proves equal work."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bench.workloads import CLASSES, Workload, initial, judges, load


def bare_model(workload: Workload) -> nn.Sequential:
    """The network with torch's own initial weights. Its output: logits [B, 10]."""
    if workload.model == "logistic":
        return nn.Sequential(nn.Linear(workload.shape[0], CLASSES))
    channels, height, width = workload.shape
    area = (height // 4) * (width // 4)
    if workload.model == "mcmahan-cnn":
        layers = [nn.Conv2d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(64 * area, 512), nn.ReLU(), nn.Linear(512, CLASSES))
    layers = [nn.Conv2d(channels, 64, 5, padding=2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 64, 5, padding=2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 128, 5, padding=2), nn.BatchNorm2d(128), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(128 * area, 2048), nn.BatchNorm1d(2048), nn.ReLU()]
    layers += [nn.Linear(2048, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, CLASSES)]
    return nn.Sequential(*layers)


def build_model(workload: Workload) -> nn.Sequential:
    """The network with the workload's initial weights, in training mode."""
    model = bare_model(workload)
    with torch.no_grad():
        values = initial(workload)
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(values[name]))
    return model.train()


def private_names(workload: Workload, model: nn.Module) -> list[str]:
    """Floating-point tensors of the normalization layers if they stay on the client, else nothing."""
    if not workload.private:
        return []
    norms = [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    floats = [n for n, v in model.state_dict().items() if v.is_floating_point()]
    return [n for n in floats if n.rpartition(".")[0] in norms]


def flat(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """One vector of all of them."""
    return torch.cat([tensors[n].detach().flatten() for n in names]) if names else torch.empty(0)


def views(vector: Tensor, like: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
    """The pieces of ``flat``'s vector in their own shapes; writing to them writes to it."""
    pieces = vector.split([like[n].numel() for n in names]) if names else ()
    return [piece.view_as(like[n]) for piece, n in zip(pieces, names)]


def shard(x: np.ndarray, y: np.ndarray, client: int) -> tuple[Tensor, Tensor]:
    """A client's examples, x [n, ...] and y [n], without a copy."""
    return torch.from_numpy(x[client]), torch.from_numpy(y[client])


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int) -> None:
    """One epoch as a PyTorch user writes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for i in range(0, len(x), batch):
        optimizer.zero_grad()
        F.cross_entropy(model(x[i : i + batch]), y[i : i + batch]).backward()
        optimizer.step()


@torch.no_grad()
def final_loss(workload: Workload, shared: Mapping[str, Tensor], private: Mapping[int, Mapping[str, Tensor]]) -> float:
    """Mean training loss over the judging clients, each with its private tensors, by the statistics of its examples.

    Args:
        shared: parameters by the names of ``build_model``; without those that are private.
        private: client -> its private tensors; empty if nothing is private.
    """
    model, (x, y) = bare_model(workload).train(), load(workload)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    total = 0.0
    for client in judges(workload):
        for name, value in {**shared, **private.get(client, {})}.items():
            named[name].copy_(value)
        inputs, labels = shard(x, y, client)
        total += float(F.cross_entropy(model(inputs), labels))
    return total / len(judges(workload))
