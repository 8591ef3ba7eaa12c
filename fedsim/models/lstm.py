"""Character models over sequences of tokens: logits for the next character at every position.

char-lstm        embedding 8, two LSTM layers of 256 (McMahan et al. 2017; Reddi et al. 2021): 820,522 parameters at 90
small-char-lstm  embedding 8, one LSTM layer of 128

The LSTM is written out, since torch's own has no batching rule for ``vmap``; same equations and names of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.models import register


class LSTM(nn.Module):
    """One layer; the gates i, f, g, o are stacked in the weights as in ``torch.nn.LSTM``."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        bound = hidden**-0.5
        uniform = lambda *shape: nn.Parameter(torch.empty(shape).uniform_(-bound, bound))  # noqa: E731
        self.weight_ih, self.weight_hh = uniform(4 * hidden, inputs), uniform(4 * hidden, hidden)
        self.bias_ih, self.bias_hh = uniform(4 * hidden), uniform(4 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, inputs] -> [B, T, hidden]."""
        projected = x @ self.weight_ih.T + (self.bias_ih + self.bias_hh)  # [B, T, 4 hidden], all steps at once
        h = c = torch.zeros_like(projected[:, 0, : self.weight_hh.shape[1]])
        outputs = []
        for step in projected.unbind(1):
            i, f, g, o = (step + h @ self.weight_hh.T).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, 1)


def _character_model(classes: int, shape: tuple[int, ...], hidden: tuple[int, ...]) -> nn.Module:
    if len(shape) != 1:
        found = "x".join(map(str, shape))
        raise ConfigError(f"model.name: takes sequences of tokens (federation.dataset = 'roles'), the data are {found}")
    widths = (8, *hidden)
    layers = [LSTM(a, b) for a, b in zip(widths, hidden)]
    return nn.Sequential(nn.Embedding(classes, 8), *layers, nn.Linear(hidden[-1], classes))


@register("char-lstm")
def char_lstm(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    return _character_model(classes, shape, (256, 256))


@register("small-char-lstm")
def small_char_lstm(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    return _character_model(classes, shape, (128,))
