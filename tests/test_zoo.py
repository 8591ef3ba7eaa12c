"""Every model, and every model with every strategy, under both executors: three rounds of the loop and of vmap agree.

In float64, so that a mistake cannot hide behind rounding: with batches of four, BatchNorm amplifies a difference
about a thousandfold each round (MobileNetV2: 1e-13, 2e-10, 7e-7). ``test_engine`` has the same comparison in float32.
"""

import pytest

from fedsim.data import Dataset
from fedsim.errors import ConfigError
from fedsim.models import model_names
from fedsim.registry import presets
from tests.conftest import Small, shards_of, small_dataset
from tests.test_engine import agree

SHAPES = {"alexnet": (3, 64, 64), "digits-cnn": (3, 16, 16), "lenet": (3, 16, 16), "vgg-11": (3, 16, 16)}
STRATEGIES = [name for name in presets() if name != "centralised"]


@pytest.fixture(scope="session")
def datasets(tmp_path_factory) -> dict[tuple[int, ...], Dataset]:
    root = tmp_path_factory.mktemp("shapes")
    return {s: small_dataset(root / "x".join(map(str, s)), shape=s) for s in {(3, 12, 12), *SHAPES.values()}}


def both(datasets, model: str, strategy: str) -> tuple[Small, Small]:
    dataset = datasets[SHAPES.get(model, (3, 12, 12))]
    # two ragged clients, two steps each; one step of the 57 million parameters is enough
    shards = shards_of(dataset, (4, 3) if model == "alexnet" else (8, 7))
    sections = {
        "model": {"name": model},
        "algorithm": {"strategy": strategy},
        "training": {"batch-size": 4, "lr": 0.01, "dtype": "float64"},
    }
    loop, vmap = (Small(dataset, shards, simulation={"executor": e}, **sections) for e in ("loop", "vmap"))
    return loop, vmap


@pytest.mark.parametrize("model", [m for m in model_names() if m != "alexnet"])
def test_vmap_agrees_with_the_loop_on_every_model(datasets, model):
    agree(*both(datasets, model, "fedavg"), rounds=1, tolerance=1e-9)
    agree(*both(datasets, model, "fedavg"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", model_names())
def test_vmap_agrees_with_the_loop_on_every_model_and_strategy(datasets, model, strategy):
    if model == "logistic" and strategy in ("fedbn", "silobn", "fixbn"):
        with pytest.raises(ConfigError, match="has no"):
            both(datasets, model, strategy)
        return
    agree(*both(datasets, model, strategy))
