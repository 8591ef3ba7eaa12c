"""A training step of two stacked models under vmap is that of each alone, buffers included, for any normalization."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fedsim.models import build_model
from tests.conftest import IMAGE_MODELS

# The smallest images each model takes; of alexnet the convolutions only, for the sake of memory.
SHAPES = {
    "alexnet": (3, 64, 64),
    "vgg-11": (3, 16, 16),
    "lenet": (3, 16, 16),
    "logistic": (60,),
    "vit-tiny": (3, 16, 16),
}
# Equal in exact arithmetic; what is left is the rounding of float64.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}


def make(name: str, norm: str) -> tuple[nn.Module, tuple[int, ...]]:
    shape = SHAPES.get(name, (3, 8, 8))
    model = build_model(name, classes=10, shape=shape, norm=norm).double()
    return (model.features if name == "alexnet" else model), shape


@pytest.mark.parametrize("norm", ["bn", "gn", "ln", "none"])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_two_stacked_models_step_as_each_alone(name, norm):
    torch.manual_seed(0)
    models, shapes = zip(*(make(name, norm) for _ in range(2)))
    stack = lambda states: {n: torch.stack([s[n].detach() for s in states]) for n in states[0]}  # noqa: E731
    params = stack([dict(m.named_parameters()) for m in models])
    buffers = stack([dict(m.named_buffers()) for m in models])
    x = torch.randn(2, 4, *shapes[0], dtype=torch.float64)

    def step(params, buffers, x):
        def loss(params):
            new = {n: b.clone() for n, b in buffers.items()}  # written in place by BatchNorm
            return functional_call(models[0], {**params, **new}, (x,)).square().mean(), new

        return grad(loss, has_aux=True)(params)

    together = vmap(step)(params, buffers, x)
    for i in range(2):
        alone = step({n: p[i] for n, p in params.items()}, {n: b[i] for n, b in buffers.items()}, x[i])
        for stacked, single in zip(together, alone):
            for n, value in single.items():
                torch.testing.assert_close(stacked[n][i], value, **TOLERANCE, msg=lambda m, n=n: f"{n}: {m}")
