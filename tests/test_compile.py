"""Steps through torch's compiler: the numbers of vmap without it, whatever plug-ins and BatchNorm do in a step."""

import pytest
import torch

from fedsim.build import plan
from fedsim.config import parse_config
from fedsim.errors import ConfigError
from tests.conftest import Small
from tests.test_engine import agree


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedbn", "fedhyper-g-cl"])
def test_compiled_steps_agree_with_vmap(dataset, strategy):
    sections = {
        "algorithm": {"strategy": strategy},
        "training": {"lr": 0.02, "dtype": "float64"},
    }
    plain, compiled = (Small(dataset, **sections, simulation={"executor": "vmap", "compile": c}) for c in (False, True))
    assert compiled.task.compile
    agree(plain, compiled, rounds=2, tolerance=1e-8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "something was compiled"


@pytest.mark.parametrize(
    ("executor", "compiler", "message"),
    [("loop", "g++", "the executor here is 'loop'"), ("vmap", "none", "'none' is not there")],
)
def test_what_cannot_be_compiled_is_refused(monkeypatch, executor, compiler, message):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ConfigError, match=message):
        plan(parse_config({"simulation": {"executor": executor, "compile": True}}))
