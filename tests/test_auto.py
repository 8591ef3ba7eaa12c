"""What is chosen by rule: functions of model, batch and device, on both sides of their bounds."""

import pytest
import torch

from fedsim.build import choose_executor, choose_odd_block_threads, plan
from fedsim.flops import forward_flops
from fedsim.local import ClientTask
from fedsim.models import build_model
from fedsim.optim import SGD
from tests.conftest import shards_of, small_config


def task(name: str, shape: tuple[int, ...], classes: int, norm: str) -> ClientTask:
    return ClientTask(build_model(name, classes=classes, shape=shape, norm=norm), (), SGD())


@pytest.mark.parametrize(
    ("name", "shape", "classes", "norm", "batch", "expected"),
    [
        ("logistic", (60, 1, 1), 10, "none", 10, "vmap"),
        ("logistic", (3, 32, 32), 10, "none", 10, "vmap"),
        ("logistic", (3, 32, 32), 60, "none", 10, "vmap"),  # 92,190 parameters a tensor
        ("logistic", (3, 32, 32), 100, "none", 10, "loop"),  # 153,650
        ("small-cnn", (3, 28, 28), 10, "bn", 4, "vmap"),
        ("small-cnn", (3, 28, 28), 10, "bn", 32, "loop"),  # 53 MFLOP a step
        ("mcmahan-cnn", (3, 32, 32), 10, "none", 10, "loop"),
        ("digits-cnn", (3, 28, 28), 10, "bn", 32, "loop"),
    ],
)
def test_vmap_where_a_step_is_overhead(name, shape, classes, norm, batch, expected):
    made = task(name, shape, classes, norm)
    assert choose_executor(made, forward_flops(made.model, torch.zeros(shape))[""], batch, "cpu") == expected


def test_on_a_gpu_up_to_some_millions_of_parameters():
    assert choose_executor(task("mcmahan-cnn", (3, 28, 28), 10, "none"), 0, 32, "cuda") == "vmap"
    assert choose_executor(task("digits-cnn", (3, 28, 28), 10, "bn"), 0, 32, "cuda") == "loop"


@pytest.mark.parametrize(("batch", "expected"), [(8, "vmap"), (200, "loop")])
def test_the_choice_is_written_into_the_configuration(dataset, batch, expected):
    config = small_config(training={"batch-size": batch}, model={"name": "small-cnn", "norm": "bn"})
    config = config.model_copy(update={"simulation": config.simulation.model_copy(update={"executor": "auto"})})
    assert plan(config, (dataset, shards_of(dataset), None)).config.simulation.executor == expected


@pytest.mark.parametrize(
    ("executor", "batch", "device", "expected"),
    [("loop", 32, "cpu", 2), ("loop", 8, "cpu", 1), ("vmap", 32, "cpu", 1), ("loop", 32, "cuda", 1)],
)
def test_an_odd_block_has_two_threads_where_a_step_is_long(executor, batch, device, expected):
    flops = forward_flops(task("digits-cnn", (3, 28, 28), 10, "bn").model, torch.zeros(3, 28, 28))[""]  # 96 MFLOP
    assert choose_odd_block_threads(executor, flops, batch, device) == expected


@pytest.mark.parametrize(
    ("batch", "asked", "expected"),
    [(4, 0, 1), (32, 0, 2), (32, 1, 1), (4, 3, 3), (10**6, 0, 2)],  # a client has 40 examples at most
)
def test_the_threads_are_written_into_the_configuration(dataset, batch, asked, expected):
    config = small_config(
        training={"batch-size": batch},
        model={"name": "resnet-18", "norm": "bn"},
        simulation={"executor": "loop", "odd-block-threads": asked},
    )
    assert plan(config, (dataset, shards_of(dataset), None)).config.simulation.odd_block_threads == expected


def test_a_large_batch_is_as_large_as_the_largest_client(dataset):
    config = small_config(training={"batch-size": 10**6}, simulation={"executor": "loop"})
    assert plan(config, (dataset, shards_of(dataset), None)).config.simulation.odd_block_threads == 1
