"""The benchmark: contenders do equal work, and the table says what they reported. No time is asserted."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.bench import driver, workloads
from experiments.bench.contenders import bmm, fedsim_, flower, plain, two_processes, vmap
from experiments.bench.memory import Tree, Watch
from experiments.bench.peers import CONTENDERS
from experiments.bench.reporting import BenchError, Result, parse
from experiments.bench.table import Run, markdown, summaries

TINY = replace(workloads.TINY, name="small", clients=40, cohort=8)
PRIVATE = replace(workloads.DOMAINS, clients=4, cohort=4, examples=16, batch=16, domains=2, data="prototypes", lr=0.05)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_DATA", str(tmp_path_factory.mktemp("bench")))
        yield


def same(workload, a: Result, b: Result) -> bool:
    return abs(a.loss - b.loss) <= workload.tolerance * b.loss


def test_contenders_do_equal_work_on_tiny():
    expected = plain.run(TINY, 3)
    others = [bmm.run(TINY, 3), vmap.run(TINY, 3, chunk=5)]
    others += [fedsim_.run(TINY, 3, executor=e, workers=0) for e in ("auto", "loop")]
    assert [same(TINY, r, expected) for r in others] == [True] * 4
    assert all(len(r.seconds) == 3 for r in others)
    assert not same(TINY, plain.run(TINY, 4), expected), "a round more must be seen in the loss"
    assert not same(TINY, plain.run(replace(TINY, lr=0.09), 3), expected)


def test_contenders_do_equal_work_with_private_normalization():
    expected, found = plain.run(PRIVATE, 2), fedsim_.run(PRIVATE, 2, workers=0)
    assert same(PRIVATE, found, expected)
    shared = plain.run(replace(PRIVATE, private=False), 2)
    assert shared.loss != pytest.approx(expected.loss, rel=1e-6), "who averages gamma and beta does other work"


@pytest.mark.slow
def test_two_workers_two_processes_and_flower_do_equal_work():
    expected = plain.run(TINY, 2)
    for found in (two_processes.run(TINY, 2), fedsim_.run(TINY, 2, workers=2), flower.run(TINY, 2)):
        assert same(TINY, found, expected), found.contender
    assert same(PRIVATE, two_processes.run(PRIVATE, 2), plain.run(PRIVATE, 2))


def test_plain_is_federated_averaging():
    """One round of the plain loop by the closed-form gradient in numpy."""
    x, y = workloads.load(TINY)
    start = workloads.initial(TINY)
    ends = []
    for client in workloads.cohort(TINY, 1):
        w, b = start["0.weight"].astype(float), start["0.bias"].astype(float)
        for rows in np.split(np.arange(TINY.examples), TINY.examples // TINY.batch):
            logits = x[client, rows] @ w.T + b
            error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(10)[y[client, rows]]
            w, b = w - TINY.lr * error.T @ x[client, rows] / len(rows), b - TINY.lr * error.mean(0)
        ends.append((w, b))
    w, b = (np.mean(parts, 0) for parts in zip(*ends))
    judged = workloads.judges(TINY)
    logits = x[judged].reshape(-1, 60) @ w.T + b
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -logits[np.arange(len(logits)), y[judged].reshape(-1)].mean()
    assert plain.run(TINY, 1).loss == pytest.approx(loss, rel=1e-5)


def test_more_clients_hold_the_data_that_fewer_do():
    few, many = (workloads.load(replace(TINY, clients=n)) for n in (100, 250))
    assert all(np.array_equal(a, b[:100]) for a, b in zip(few, many))
    cohorts = [workloads.cohort(TINY, r) for r in range(1, 20)]
    assert all(c == sorted(set(c)) and len(c) == 8 and c[-1] < 40 for c in cohorts)
    assert len({tuple(c) for c in cohorts}) == 19


def test_the_suite_is_cut_by_domain():
    assert [workloads.DOMAINS.domain(c) for c in (0, 9, 10, 49)] == [0, 0, 1, 4]
    assert {workloads.DOMAINS.domain(c) for c in workloads.judges(workloads.DOMAINS)} == set(range(5))


def start(name, loss=2.0, seconds=(9.0, 1.0, 3.0), repetition=1, peak=0, error=""):
    result = None if error else Result(name, "small", list(seconds), loss)
    return Run(name, "small", repetition, 0.1, peak, result, error)


def test_medians_ratios_and_the_proof():
    runs = [
        start("bmm", peak=50, repetition=0, seconds=(9.0, 500.0)),
        start("bmm"),
        start("bmm", seconds=(7.0, 2.0, 2.0), repetition=2),
        start("other", seconds=(1.0, 8.0, 8.0), loss=2.0 * (1 + 2e-4)),
        start("broken", error="exit code 1: no"),
    ]
    first, second, last = summaries(TINY, runs, "bmm")
    assert (first.contender, first.seconds, first.rounds, first.first, first.ratio) == ("bmm", 2.0, 4, 8.0, 1.0)
    assert (first.peak, first.equal) == (50, True)
    assert (second.ratio, second.equal) == (4.0, False)
    assert (last.error, last.equal) == ("exit code 1: no", False)
    text = markdown(TINY, [first, second, last], "bmm")
    assert "| **no** |" in text
    assert "| exit code 1: no |" in text


def test_memory_counts_children():
    code = "import subprocess, sys; b = bytearray(60 << 20); sys.exit(subprocess.call([sys.executable, '-c', {!r}]))"
    child = "b = bytearray(b'x' * (60 << 20)); import time; time.sleep(1.5)"
    process = subprocess.Popen([sys.executable, "-c", code.format(child)])
    watch = Watch(Tree(process.pid), measure=True, interval=0.1)
    process.wait()
    watch.stop()
    assert 60 << 20 < watch.peak < 1 << 30


def test_run_writes_a_table_and_the_curve(tmp_path, capsys, monkeypatch):
    names = ["--contenders", "bmm,plain-1", "--rounds", "2", "--repetitions", "1", "--no-memory"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--workloads", "tiny-10,tiny-20", *names, "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    assert driver.main() == 0
    assert torch.get_num_threads() == threads
    found = json.loads((tmp_path / "results.json").read_text())
    assert [r["contender"] for r in found["runs"]] == ["bmm", "plain-1"] * 2
    assert "| plain-1 |" in capsys.readouterr().out
    assert (tmp_path / "cost.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contenders", "nobody"], "no such contender; expected some of fedsim"),
        (["--workloads", "tiny-x"], "no such workload"),
        (["--workloads", "cifar", "--rounds", "9"], "expected 2 to 4 for cifar"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    with pytest.raises(SystemExit, match=message):
        driver.options()


def test_a_missing_environment_names_its_builder(monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_ENVS", str(tmp_path))
    absent = replace(CONTENDERS["bmm"], environment="pfl")
    with pytest.raises(BenchError, match=r"build it by: build.sh pfl"):
        driver.start(absent, workloads.workload("tiny-10"), 2, measure=False, limit=10)


def test_chatter_around_the_result_is_ignored():
    line = Result("a", "tiny", [1.0], 2.0).line()
    assert parse(f"hello\n{line}\nbye") == Result("a", "tiny", [1.0], 2.0)
    with pytest.raises(BenchError, match="without a result"):
        parse("hello")


def test_a_contender_that_cannot_is_one_row_and_not_started_again(tmp_path, monkeypatch, capsys):
    refusing = replace(CONTENDERS["bmm"], models=("mcmahan-cnn",))
    monkeypatch.setitem(CONTENDERS, "bmm", refusing)
    options = driver.check(Namespace(workloads="cifar", contenders="bmm", reference="bmm", rounds=2, repetitions=2))
    options.memory, options.limit = False, 60
    (found,) = driver.measure(options.workloads[0], ["bmm"], options)
    assert "expected tiny or tiny-K, found cifar" in found.error
