"""The written-out LSTM against torch's, and a character model under both executors."""

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.data import Dataset
from fedsim.errors import ConfigError
from fedsim.models import build_model
from fedsim.models.lstm import LSTM
from tests.conftest import DOMAINS, Small
from tests.test_engine import agree


def test_equals_torch():
    torch.manual_seed(0)
    ours, theirs = LSTM(5, 7), nn.LSTM(5, 7, batch_first=True)
    theirs.load_state_dict({f"{n}_l0": v for n, v in ours.state_dict().items()})
    x = torch.randn(3, 11, 5)
    torch.testing.assert_close(ours(x), theirs(x)[0])


def test_parameter_count_of_the_papers_network():
    model = build_model("char-lstm", classes=90, shape=(80,))
    lstm = sum(4 * h * (i + h + 2) for i, h in ((8, 256), (256, 256)))
    assert sum(p.numel() for p in model.parameters()) == 90 * 8 + lstm + 257 * 90


def test_images_are_refused():
    with pytest.raises(ConfigError, match="sequences of tokens"):
        build_model("char-lstm", classes=10, shape=(3, 8, 8))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = np.random.default_rng(0)
    arrays = {}
    for domain in DOMAINS:
        codes = np.cumsum(draw.integers(1, 3, (60, 13)), 1) % 6
        arrays[domain] = {s: (codes[r, :-1], codes[r, 1:]) for s, r in (("train", slice(40)), ("test", slice(40, 60)))}
    return Dataset.from_arrays("codes", tmp_path_factory.mktemp("codes"), arrays, tuple("abcdef"))


@pytest.mark.parametrize("strategy", ["fedavg", "fedhyper-g-cl"])
def test_loop_and_vmap_agree_on_sequences(text, strategy):
    sections = {
        "model": {"name": "small-char-lstm"},
        "algorithm": {"strategy": strategy},
        "training": {"dtype": "float64", "lr": 0.5},
    }
    runs = [Small(text, simulation={"executor": e}, **sections) for e in ("loop", "vmap")]
    agree(*runs, tolerance=1e-7)
    run = runs[0]
    before = run.federation.evaluate(run.federation.shared)
    after = run.federation.evaluate(run.strategy.model(run.run(4)))
    assert sum(s.loss for s in after) < sum(s.loss for s in before)
