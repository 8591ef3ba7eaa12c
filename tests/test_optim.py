"""Local optimizers against torch.optim, step for step."""

import pytest
import torch

from fedsim.optim import SGD, Adam, learning_rate

CASES = [
    (SGD(), lambda p: torch.optim.SGD(p, lr=0.1)),
    (SGD(momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (SGD(0.9, 0.01), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    (Adam(), lambda p: torch.optim.Adam(p, lr=0.1)),
    (Adam(weight_decay=0.01), lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01)),
]


@pytest.mark.parametrize(("ours", "reference"), CASES)
def test_equals_torch(ours, reference):
    torch.manual_seed(0)
    start = {"a": torch.randn(3, 4, dtype=torch.float64), "b": torch.randn(5, dtype=torch.float64)}
    mine = {n: v.clone() for n, v in start.items()}
    theirs = {n: v.clone().requires_grad_() for n, v in start.items()}
    optimizer, moments = reference(list(theirs.values())), ours.init(mine)
    for count in range(5):
        grads = {n: torch.randn_like(v) for n, v in start.items()}
        for name, value in theirs.items():
            value.grad = grads[name].clone()
        optimizer.step()
        ours.step(mine, grads, moments, 0.1, count)
    for name in start:
        torch.testing.assert_close(mine[name], theirs[name].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ours", [SGD(0.9, 0.01), Adam(weight_decay=0.01)])
def test_a_stack_of_clients_is_the_clients_one_by_one(ours):
    torch.manual_seed(0)
    start = torch.randn(3, 7, dtype=torch.float64)
    stacked = {"w": start.clone()}
    singles = [{"w": row.clone()} for row in start]
    moments, single_moments = ours.init(stacked), [ours.init(s) for s in singles]
    for count in range(4):
        grad = torch.randn_like(start)
        ours.step(stacked, {"w": grad}, moments, 0.1, count)
        for single, moment, g in zip(singles, single_moments, grad):
            ours.step(single, {"w": g}, moment, 0.1, count)
    assert torch.equal(stacked["w"], torch.stack([s["w"] for s in singles]))


def test_schedules():
    assert learning_rate(0.1, "constant", 50, 100) == 0.1
    assert learning_rate(0.1, "exponential", 3, 100, decay=0.5) == pytest.approx(0.025)
    assert learning_rate(0.1, "step", 21, 100, decay=0.1, every=10) == pytest.approx(0.001)
    assert learning_rate(0.1, "cosine", 1, 10) == pytest.approx(0.1)
    assert learning_rate(0.1, "cosine", 6, 10) == pytest.approx(0.05)  # cos(pi / 2) = 0: half of the rate
