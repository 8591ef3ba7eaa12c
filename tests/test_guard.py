"""The guard's policy: norm bound, quorum, repeat offenders; each said in events.jsonl and summary.json."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.build import federation_of, plan
from fedsim.config import Config
from fedsim.data import Partition
from fedsim.errors import ConfigError, FedsimError
from fedsim.guard import Offenders, Policy, refuse_norm, refuse_odd
from fedsim.run import drive
from fedsim.rundir import RunWriter
from fedsim.store import ClientStore
from fedsim.types import FOLDED, Tensors
from tests.conftest import shards_of, small_config
from tests.hostile import hand_over, scaled


def run(dataset, folder: Path, config: Config, shards: Partition | None = None) -> dict:
    """Start or continue a run in this process -> summary."""
    planned = plan(config, (dataset, shards or shards_of(dataset), None))
    federation = federation_of(planned, ClientStore(folder.with_suffix(".sqlite")))
    return drive(federation, planned, RunWriter(folder, resume=(folder / "config.toml").exists()))


def events(folder: Path, what: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == what]


def missing_a_tensor(shared: Tensors) -> Tensors:
    return dict(list(shared.items())[1:])


@given(st.integers(0, 2**31), st.floats(0.01, 20))
def test_the_norm_is_numpys_over_all_floating_point_tensors(seed, most):
    draw = np.random.default_rng(seed)
    before, after = draw.normal(size=(2, 3, 4)), draw.normal(size=(2, 3, 4))
    as_tensors = lambda v, n: {"w": torch.from_numpy(v[0]), "var": torch.from_numpy(v[1]), "n": torch.tensor(n)}  # noqa: E731
    norm = np.linalg.norm(after - before)
    reason = refuse_norm(as_tensors(after, 10**9), as_tensors(before, 0), most)
    assert (reason is None) == (norm <= most)
    if reason:
        assert reason == f"the update has norm {norm:.6g}, the bound is {most:g}"
    assert refuse_norm(as_tensors(after, 1), as_tensors(before, 0), 0.0) is None


def test_the_norm_of_huge_updates_does_not_overflow():
    reason = refuse_norm({"w": torch.full((2,), 3e38)}, {"w": torch.zeros(2)}, 1.0)
    assert reason == f"the update has norm {math.sqrt(2) * 3e38:.6g}, the bound is 1"


@pytest.mark.parametrize(
    ("policy", "believed", "asked", "needs", "void"),
    [
        (Policy(), 1, 3, 1, None),
        (Policy(), 0, 3, 1, "0 of 3 updates can be used, the aggregation rule needs 1"),
        (Policy(quorum=0.5), 2, 4, 1, None),
        (Policy(quorum=0.5), 1, 4, 1, "1 of 4 updates can be used, the quorum is 0.5"),
        (Policy(quorum=1.0), 2, 3, 1, "2 of 3 updates can be used, the quorum is 1"),
        (Policy(), 4, 5, 5, "4 of 5 updates can be used, the aggregation rule needs 5"),
        (Policy(quorum=1.0), 0, 0, 1, "0 of 0 updates can be used, the aggregation rule needs 1"),
    ],
)
def test_when_a_round_is_void(policy, believed, asked, needs, void):
    assert policy.void(believed, asked, needs) == void


def test_offenders_are_set_aside_once_and_never_without_a_limit():
    strict, lenient = Offenders(Policy(set_aside_after=2)), Offenders(Policy())
    assert [strict.record(7) for _ in range(4)] == [False, True, False, False]
    assert (strict.aside, strict.record(3)) == ([7], False)
    assert not any(lenient.record(7) for _ in range(9))
    assert lenient.aside == []


def test_the_odd_report_is_that_of_the_minority_even_if_it_comes_first():
    good, odd = {FOLDED + "w": torch.zeros(3), "rate": torch.zeros(())}, {FOLDED + "w": torch.zeros(1)}
    assert refuse_odd({0: odd, 1: good, 2: good}).keys() == {0}
    assert refuse_odd({0: {}, 1: good, 2: good}).keys() == {0}
    assert refuse_odd({0: good, 1: {FOLDED + "w": torch.zeros(3)}}) == {}, "small reports may differ"
    assert refuse_odd({}) == {}


LOOP = {"executor": "loop"}  # under vmap the bits depend on how many clients it stacks


def test_an_update_beyond_the_bound_is_refused_and_the_others_count(dataset, tmp_path, monkeypatch):
    expected = run(dataset, tmp_path / "without", small_config(rounds=1, simulation=LOOP), shards_of(dataset, (40, 33)))
    hand_over(monkeypatch, 2, scaled(50.0))
    config = small_config(rounds=1, simulation=LOOP, guard={"max-update-norm": 20.0})
    found = run(dataset, tmp_path / "bounded", config)
    assert found["state_sha256"] == expected["state_sha256"]
    (event,) = events(tmp_path / "bounded", "rejected")
    assert (event["round"], event["client"], event["stage"]) == (1, 2, "update")
    assert "the bound is 20" in event["reason"]
    assert (found["left_out"], found["refused_rounds"], found["set_aside"]) == ({"update": 1}, {2: 1}, [])


@pytest.mark.parametrize("strategy", ["fedbn", "scaffold", "fedtiny"])
def test_without_the_quorum_a_round_changes_nothing(dataset, tmp_path, monkeypatch, strategy):
    sections = {"algorithm": {"strategy": strategy}, "guard": {"quorum": 0.7}}
    whole = run(dataset, tmp_path / "one", small_config(rounds=1, **sections))
    hand_over(monkeypatch, 1, missing_a_tensor, {2})
    found = run(dataset, tmp_path / "two", small_config(rounds=2, **sections))
    for key in ("state_sha256", "accuracy"):  # of FedBN's clients too: their private state stays
        assert found[key] == whole[key]
    assert found["void_rounds"] == 1
    (event,) = events(tmp_path / "two", "void")
    assert (event["round"], event["reason"]) == (2, "2 of 3 updates can be used, the quorum is 0.7")
    enough = run(dataset, tmp_path / "enough", small_config(rounds=2, **{**sections, "guard": {"quorum": 0.6}}))
    assert enough["void_rounds"] == 0
    assert enough["state_sha256"] != whole["state_sha256"]


def test_void_rounds_in_a_row_end_the_run_with_the_causes(dataset, tmp_path, monkeypatch):
    hand_over(monkeypatch, 1, missing_a_tensor)
    with pytest.raises(FedsimError, match=r"no usable update in 3 rounds in a row: tensor '.*' is missing"):
        run(dataset, tmp_path / "r", small_config(rounds=9, guard={"quorum": 1.0}))


def test_a_resumed_run_goes_on_counting_void_rounds(dataset, tmp_path, monkeypatch):
    hand_over(monkeypatch, 1, missing_a_tensor)
    config = small_config(rounds=2, guard={"quorum": 1.0})
    run(dataset, tmp_path / "r", config)
    with pytest.raises(FedsimError, match="no usable update in 3 rounds in a row"):
        run(dataset, tmp_path / "r", config.model_copy(update={"rounds": 9}))
    assert [e["round"] for e in events(tmp_path / "r", "void")] == [1, 2, 3]


def test_a_repeat_offender_is_set_aside_and_a_resumed_run_knows(dataset, tmp_path, monkeypatch):
    hand_over(monkeypatch, 1, missing_a_tensor)
    config = small_config(rounds=4, guard={"set-aside-after": 2}, checkpoint={"every": 1})
    whole = run(dataset, tmp_path / "whole", config)
    assert whole["set_aside"] == [1]
    assert whole["refused_rounds"] == {1: 2}
    assert whole["rejected_updates"] == 2
    (event,) = events(tmp_path / "whole", "set aside")
    assert (event["round"], event["client"], event["refused"]) == (2, 1, 2)
    run(dataset, tmp_path / "parts", config.model_copy(update={"rounds": 2}))
    resumed = run(dataset, tmp_path / "parts", config)
    assert [e["round"] for e in events(tmp_path / "parts", "rejected")] == [1, 2]
    for key in ("state_sha256", "rejected_updates", "left_out", "refused_rounds", "set_aside"):
        assert resumed[key] == whole[key]


@pytest.mark.parametrize(
    ("key", "value"),
    [("max-update-norm", -1.0), ("max-update-norm", math.inf), ("quorum", 1.5), ("set-aside-after", -1)],
)
def test_senseless_policies_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"guard.{key}"):
        small_config(guard={key: value})
