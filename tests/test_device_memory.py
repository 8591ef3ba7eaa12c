"""How many clients vmap trains at once follows the device's free memory; what they add up to does not."""

import pytest
import torch

import fedsim.optim
import fedsim.worker
from fedsim.device_memory import free_bytes, training_bytes
from tests.conftest import Small

MANY = {"simulation": {"workers": 0, "executor": "vmap", "block": 3}, "training": {"dtype": "float64"}}


def test_a_processor_counts_no_memory():
    assert free_bytes(torch.device("cpu")) is None


def test_training_takes_the_state_five_times_and_the_activations_twice():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Sigmoid())
    task = fedsim.worker.ClientTask(model, (), fedsim.optim.SGD())
    x = torch.zeros(10, 8)
    kept = 4 * (x.numel() + 10 * 4)  # the input of the product and the output of the sigmoid
    assert training_bytes(task, x) == 5 * 4 * (8 * 4 + 4) + 2 * kept


@pytest.mark.parametrize(("fit", "widths"), [(0.5, [1, 1, 1]), (2.5, [2, 1]), (3.0, [3])])
def test_vmap_is_as_wide_as_the_memory_that_is_free(dataset, monkeypatch, fit, widths):
    whole, narrow = Small(dataset, **MANY), Small(dataset, **MANY)
    expected = whole.run(2)
    worker = narrow.federation.pool.worker
    free = int(fit * worker._client_bytes)
    monkeypatch.setattr(fedsim.worker, "free_bytes", lambda device: free)
    seen, run = [], fedsim.worker.EXECUTORS["vmap"]
    monkeypatch.setitem(
        fedsim.worker.EXECUTORS,
        "vmap",
        lambda task, order, block, *more: (seen.append(len(block)), run(task, order, block, *more))[1],
    )
    found = narrow.run(2)
    assert seen == 2 * widths
    assert narrow.federation.events == []
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
