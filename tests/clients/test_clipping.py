"""Adaptive gradient clipping against timm's, and its two defining properties."""

import pytest
import torch
from torch import nn

from clients.clipping import AdaptiveGradientClipping, unitwise_norm
from fedsim.types import Order, View
from tests.oracles import timm_module

VIEW = View(Order(1, {}), {})


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5), nn.Linear(5, 2))


@pytest.mark.parametrize("clip", [0.01, 0.1, 1.28])
def test_equals_timm(clip):
    model = network()
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 3
    params = {n: p.detach() for n, p in model.named_parameters()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    mine, _ = AdaptiveGradientClipping(clip).update(grads, {}, params, VIEW)
    timm_module("utils.agc").adaptive_clip_grad(model.parameters(), clip_factor=clip)
    for name, p in model.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, rtol=1e-6, atol=1e-7)


def test_units_within_the_ratio_are_untouched_and_others_end_on_it():
    weight, grad = torch.randn(6, 3, 3, 3), torch.randn(6, 3, 3, 3)
    grad[:3] *= 1e-3
    (clipped,) = AdaptiveGradientClipping(0.1).update({"w": grad}, {}, {"w": weight}, VIEW)[0].values()
    assert torch.equal(clipped[:3], grad[:3])
    torch.testing.assert_close(unitwise_norm(clipped[3:]), 0.1 * unitwise_norm(weight[3:]))


def test_zero_weights_and_zero_gradients_are_finite():
    zero = torch.zeros(4, 3)
    out = AdaptiveGradientClipping().update({"w": zero}, {}, {"w": zero}, VIEW)[0]["w"]
    assert torch.equal(out, zero)
    big = AdaptiveGradientClipping(0.1).update({"w": zero + 1.0}, {}, {"w": zero}, VIEW)[0]["w"]
    torch.testing.assert_close(unitwise_norm(big), torch.full((4, 1), 0.1 * 1e-3))  # the floor eps = 1e-3


def test_the_last_linear_layer_can_be_left_alone():
    plugin = AdaptiveGradientClipping(0.01, skip_last=True)
    model = plugin.prepare(network())
    params = {n: p.detach() for n, p in model.named_parameters()}
    grads = {n: torch.ones_like(p) for n, p in params.items()}
    out, _ = plugin.update(grads, {}, params, VIEW)
    assert {n for n in grads if torch.equal(out[n], grads[n])} == {"3.weight", "3.bias"}
