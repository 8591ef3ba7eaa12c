"""The proximal gradient against autograd on the objective it stands for."""

import torch

from clients.proximal import Proximal
from fedsim.types import Order, View


def test_gradient_of_the_proximal_objective():
    torch.manual_seed(0)
    near = {"w": torch.randn(4, 3)}
    params = {"w": torch.randn(4, 3, requires_grad=True), "private": torch.randn(3, requires_grad=True)}

    def task(p):
        return (p["w"] @ p["private"]).square().sum()

    view = View(Order(1, near), {})
    (w, private) = torch.autograd.grad(task(params), list(params.values()))
    found, _ = Proximal(0.3).update({"w": w, "private": private}, {}, params, view)
    objective = task(params) + 0.3 / 2 * (params["w"] - near["w"]).square().sum()
    expected = torch.autograd.grad(objective, list(params.values()))
    for value, want in zip(found.values(), expected):
        torch.testing.assert_close(value, want)
