"""Normalization layers that torch does not have. All take images [B, C, H, W]; those derived from BatchNorm2d also
take vectors [B, C]. Buffers are written with ``copy_`` so that each layer also runs under ``torch.func.vmap``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """[C] -> [C, 1, 1] for images."""
    return value.view(-1, *(1,) * (x.dim() - 2))


class EstimatedBatchNorm2d(nn.Module):
    """BatchNorm for micro-batches (Qiao et al., arXiv 1911.09738): training, too, normalizes with running estimates,

    var <- (1 - r) var + r mean (x - mu_old)^2,    mu <- (1 - r) mu + r mean x

    Gradients do not flow through the estimates. It makes sense under a normalization of each example alone (BCN).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, rate: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.rate, self.eps = rate, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            seen = x.detach()
            spread = (seen - per_channel(mean, x)).square().mean((0, 2, 3))
            mean = (1 - self.rate) * mean + self.rate * seen.mean((0, 2, 3))
            var = (1 - self.rate) * var + self.rate * spread
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        scale = self.weight * (var + self.eps).rsqrt()
        return (x - per_channel(mean, x)) * per_channel(scale, x) + per_channel(self.bias, x)


class BatchChannelNorm2d(nn.Module):
    """Batch-channel normalization (Qiao et al., arXiv 1911.09738): batch normalization with its affine, then group
    normalization over ``groups`` groups with one affine pair a group. ``estimated``: the form for batches of one."""

    def __init__(self, channels: int, groups: int = 32, estimated: bool = False):
        super().__init__()
        self.batch = EstimatedBatchNorm2d(channels) if estimated else nn.BatchNorm2d(channels)
        self.groups = math.gcd(groups, channels)
        self.weight = nn.Parameter(torch.ones(1, self.groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, self.groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(self.batch(x), self.groups).reshape(len(x), self.groups, -1)  # [B, G, C / G * H * W]
        return (y * self.weight + self.bias).view_as(x)


class InstanceBatchNorm2d(nn.Module):
    """IBN-Net's block a (Pan et al., ECCV 2018): InstanceNorm on the first half of the channels, BatchNorm on the
    others. It takes out an image's contrast and colour while it keeps half of what tells classes apart."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = channels // 2
        self.instance = nn.InstanceNorm2d(self.first, affine=True)
        self.batch = nn.BatchNorm2d(channels - self.first)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.instance(x[:, : self.first]), self.batch(x[:, self.first :])], 1)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Ghost batch normalization (Hoffer, Hubara, Soudry, NeurIPS 2017): in training each chunk of ``size`` examples is
    normalized with its own statistics, which enter the running ones chunk after chunk. What does not divide is spread
    over the chunks, lest the rest be a chunk of its own, of two examples say."""

    def __init__(self, channels: int, size: int = 8):
        super().__init__(channels)
        self.size = size

    def _check_input_dim(self, input: Tensor) -> None:
        """Vectors are welcome, too."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        chunks = input.tensor_split(max(1, len(input) // self.size))
        return torch.cat([super(GhostBatchNorm2d, self).forward(chunk) for chunk in chunks])


class EvoNormS0(nn.Module):
    """EvoNorm-S0 (Liu et al., NeurIPS 2020): gamma x sigmoid(v x) / sqrt(var_group(x) + eps) + beta; it includes the
    nonlinearity and keeps no running state."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = math.gcd(groups, channels), eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(len(x), self.groups, -1)
        std = (grouped.var(2, correction=0, keepdim=True) + self.eps).sqrt()
        std = std.expand_as(grouped).reshape(x.shape)
        y = x * (x * per_channel(self.v, x)).sigmoid() / std
        return y * per_channel(self.weight, x) + per_channel(self.bias, x)


class EvoNormB0(nn.Module):
    """EvoNorm-B0 (Liu et al., NeurIPS 2020): gamma x / max(sqrt(var_batch + eps), v x + sqrt(var_instance + eps)) +
    beta; it includes the nonlinearity. Only a variance is tracked, as in BatchNorm (unbiased, momentum 0.1)."""

    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-3):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        var = self.running_var
        if self.training:
            var = x.var((0, 2, 3), correction=0)
            count = len(x) * x[0, 0].numel()
            unbiased = var.detach() * (count / (count - 1))
            self.running_var.copy_((1 - self.momentum) * self.running_var + self.momentum * unbiased)
        instance = (x.var((2, 3), correction=0, keepdim=True) + self.eps).sqrt()
        left, right = per_channel((var + self.eps).sqrt(), x), x * per_channel(self.v, x) + instance
        return x / torch.maximum(left, right) * per_channel(self.weight, x) + per_channel(self.bias, x)


class AdaptiveMomentumBatchNorm2d(nn.BatchNorm2d):
    """AdaB2N's running statistics (Lyu et al., NeurIPS 2023): at step i their momentum is

    eta_1 = m^kappa,    eta_i = eta_{i-1} / (eta_{i-1} + (1 - m)^kappa)

    kappa 1: constant m, plain BatchNorm; kappa 0: 1 / i, the mean over all steps. i is ``num_batches_tracked``. The
    paper's weights of the tasks in a batch and its extra loss are left out: a client's batch is of one domain.
    """

    def __init__(self, channels: int, kappa: float = 0.5):
        super().__init__(channels)
        self.kappa = kappa

    def _check_input_dim(self, input: Tensor) -> None:
        """Vectors are welcome, too."""

    def rate(self, step: Tensor) -> Tensor:
        """eta_i, from 1 / eta_i = 1 + q / eta_{i-1} with q = (1 - m)^kappa. step: i, a scalar from 1 on."""
        m = 0.1 if self.momentum is None else self.momentum
        q = (1 - m) ** self.kappa
        before = q ** (step - 1)
        geometric = step - 1 if q == 1 else (1 - before) / (1 - q)
        return 1 / (geometric + before * m**-self.kappa)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        eta = self.rate(self.num_batches_tracked.to(input.dtype))
        dims = (0, *range(2, input.dim()))
        var, mean = torch.var_mean(input.detach(), dims)
        self.running_mean.copy_((1 - eta) * self.running_mean + eta * mean)
        self.running_var.copy_((1 - eta) * self.running_var + eta * var)
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


class PooledBatchNorm2d(nn.BatchNorm2d):
    """FBN's layer (Guerraoui et al., arXiv 2405.14670): training, too, normalizes by the running statistics, which are
    the federation's and stand still during local training. Gradients do not flow through them.

    Training steps collect what the server pools: ``seen_mean`` m = mean of the batches' means, ``seen_square`` v + m^2
    with v = mean of their (unbiased) variances, ``seen_batches`` how many. The server sets them to zero.
    """

    seen_mean: Tensor
    seen_square: Tensor
    seen_batches: Tensor

    def __init__(self, channels: int):
        super().__init__(channels)
        self.register_buffer("seen_mean", torch.zeros(channels))
        self.register_buffer("seen_square", torch.zeros(channels))
        self.register_buffer("seen_batches", torch.zeros((), dtype=torch.int64))

    def _check_input_dim(self, input: Tensor) -> None:
        """Vectors are welcome, too."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.training:
            var, mean = torch.var_mean(input.detach(), (0, *range(2, input.dim())))
            self.seen_batches.add_(1)
            m, v = self.seen_mean, self.seen_square - self.seen_mean.square()
            m, v = m + (mean - m) / self.seen_batches, v + (var - v) / self.seen_batches
            self.seen_mean.copy_(m)
            self.seen_square.copy_(v + m.square())
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
