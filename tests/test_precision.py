"""Permitted numerics: bf16 changes what is rounded, not what is trained, kept or sent."""

import pytest
import torch

from fedsim.build import plan
from fedsim.config import parse_config
from fedsim.errors import ConfigError
from tests.conftest import Small


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "fedwon", "fedhyper-g-cl"])
def test_bf16_is_full_precision_but_for_rounding(dataset, executor, strategy):
    sections = {"algorithm": {"strategy": strategy}, "simulation": {"executor": executor}, "model": {"norm": "gn"}}
    if strategy == "fedbn":
        sections["model"] = {"norm": "bn"}
    full = Small(dataset, training={"lr": 0.01}, **sections).run(1)
    half = Small(dataset, training={"lr": 0.01, "precision": "bf16"}, **sections).run(1)
    changed = 0
    for name, value in full.items():
        assert half[name].dtype == value.dtype
        if value.is_floating_point():
            torch.testing.assert_close(
                half[name], value, rtol=0.05, atol=0.02, msg=lambda text, name=name: f"{name} {text}"
            )
            changed += not torch.equal(half[name], value)
    assert changed, "bf16 rounds"


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"precision": "tf32"}, "of a GPU's tensor cores"),
        ({"precision": "bf16", "dtype": "float64"}, "asks for the opposite"),
    ],
)
def test_what_cannot_be_had_is_refused(dataset, training, message):
    with pytest.raises(ConfigError, match=message):
        plan(parse_config({"training": training}))
