"""Whole runs through the command line: summary, resume after a real kill, interruption, damage, bad input."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.place import CONFIG, write_tree

KEYS = """strategy model dataset seed rounds clients accuracy mean_accuracy worst_accuracy examples_seen bytes_up
bytes_down train_flops seconds peak_rss_bytes state_sha256 rejected_updates retried_clients executor workers block"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree") / "root"
    write_tree(root, per_class=12)
    return root


@pytest.fixture
def config(tree, tmp_path):
    def write(strategy: str = "fedbn") -> Path:
        path = tmp_path / f"{strategy}.toml"
        text = CONFIG.format(root=tree, strategy=strategy).replace("rounds = 3", "rounds = 6")
        path.write_text(text + "[evaluation]\nevery = 2\n")
        return path

    return write


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def fedsim(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fedsim.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert not check or done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_a_run_leaves_everything_behind(config, tmp_path):
    done = fedsim("run", config(), "--out", tmp_path / "r")
    found = summary(tmp_path / "r")
    assert set(KEYS.split()) <= found.keys()
    assert set(found["accuracy"]) == {"photo", "sketch"}
    assert found["worst_accuracy"] == min(found["accuracy"].values())
    assert found["mean_accuracy"] == pytest.approx(sum(found["accuracy"].values()) / 2)
    for name in ("config.toml", "metrics.sqlite", "events.jsonl", "plots/accuracy_by_domain.png"):
        assert (tmp_path / "r" / name).stat().st_size > 0
    assert "photo" in done.stdout
    assert "sketch" in done.stdout
    again = fedsim("run", tmp_path / "r" / "config.toml", "--out", tmp_path / "again")
    assert again.returncode == 0
    assert summary(tmp_path / "again")["state_sha256"] == found["state_sha256"]


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "fedtiny", "fedhyper-g-cl", "fedins"])
def test_a_killed_run_resumes_to_the_same_bits(config, tmp_path, strategy):
    undisturbed, killed = tmp_path / "whole", tmp_path / "killed"
    fedsim("run", config(strategy), "--out", undisturbed)
    command = [sys.executable, "-m", "fedsim.cli", "run", str(config(strategy)), "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    deadline = time.time() + 120
    while not list((killed / "checkpoints").glob("*.json")) and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    fedsim("resume", killed)
    assert summary(killed)["state_sha256"] == summary(undisturbed)["state_sha256"]
    assert summary(killed)["accuracy"] == summary(undisturbed)["accuracy"]
    assert "resumed" in (killed / "events.jsonl").read_text()


def test_an_interrupted_run_says_how_to_go_on(config, tmp_path):
    command = [sys.executable, "-m", "fedsim.cli", "run", str(config()), "--set", "rounds=100000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "r")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.time() + 120
    while not list((tmp_path / "r" / "checkpoints").glob("*.json")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "fedsim resume" in errors
    assert "Traceback" not in errors


SWALLOWED = """
import importlib, os, signal, sys
from fedsim import cli
run = importlib.import_module("fedsim.run")
begin = run.federation_of

class Last:
    def __del__(self):  # what is raised here is printed and dropped
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(1000))

def federation_of(*arguments, **named):
    Last()
    print("going on", flush=True)
    return begin(*arguments, **named)

run.federation_of = federation_of
cli.main()
"""


def test_an_interrupt_that_a_finalizer_swallows_ends_a_run_before_its_first_round(config, tmp_path):
    command = [sys.executable, "-c", SWALLOWED, "run", str(config()), "--out", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert "going on" in done.stdout
    assert done.returncode == 130, done.stderr
    assert "fedsim: interrupted" in done.stderr
    assert "round 1" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "missing.toml"], "missing.toml: no such configuration file"),
        (["run", "{config}", "--set", "training.lrr=1"], "did you mean 'lr'"),
        (["run", "{config}", "--set", "algorithm.strategy=fedbm"], "did you mean 'fedbn'"),
        (["run", "{config}", "--set", "federation.root=/nowhere"], "/nowhere"),
        (["run", "{config}", "--set", "federation.domains=photo,oil"], "oil"),
        (["run", "{config}", "--set", "model.name=alexnet"], "64x64"),
        (["run", "{config}", "--set", "model.norm=none"], "no normalization layer"),
        (["run", "{config}", "--set", "federation.clients-per-round=9"], "2 clients"),
        (["run", "{config}", "--seed", "one"], "expected a whole number"),
        (["resume", "nowhere"], "no run directory"),
        (["table", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(config, tmp_path, arguments, expected):
    filled = [a.format(config=config()) for a in arguments]
    out = ["--out", tmp_path / "r"] if arguments[0] == "run" else []
    done = fedsim(*filled, *out, check=False)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert not (tmp_path / "r").exists(), "nothing half-written"


@pytest.mark.slow
@pytest.mark.parametrize(("block", "idle"), [(2, True), (1, False)])
def test_workers_without_a_block_are_named(config, tmp_path, block, idle):
    sizes = ["federation.clients-per-domain=2", f"simulation.block={block}", "rounds=1"]
    overrides = [part for size in sizes for part in ("--set", size)]
    done = fedsim("run", config(), "--workers", 3, *overrides, "--out", tmp_path / "r")
    note = "3 workers, but a round's clients are cut into blocks for 2; set simulation.block=1 for more blocks"
    assert (note in done.stdout) is idle


def test_a_run_directory_is_not_overwritten(config, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.toml").write_text("precious")
    done = fedsim("run", config(), "--out", tmp_path / "r", check=False)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert (tmp_path / "r" / "config.toml").read_text() == "precious"


def test_resume_refuses_other_numerics(config, tmp_path):
    fedsim("run", config(), "--out", tmp_path / "r")
    path = tmp_path / "r" / "config.toml"
    text = path.read_text().replace('executor = "vmap"', 'executor = "loop"')
    path.write_text(text.replace("odd-block-threads = 1", "odd-block-threads = 2"))
    done = fedsim("resume", tmp_path / "r", check=False)
    assert done.returncode == 2
    assert "executor was 'vmap', is 'loop'" in done.stderr
    assert "odd_block_threads was 1, is 2" in done.stderr


def test_resume_refuses_a_processor_of_other_instructions(config, tmp_path, monkeypatch):
    here = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    fedsim("run", config(), "--out", tmp_path / "r", "--set", "rounds=1")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    done = fedsim("resume", tmp_path / "r", check=False)
    if here == "DEFAULT":  # nothing wider to differ by
        assert done.returncode == 0
        return
    assert done.returncode == 2
    assert f"instructions was 'DEFAULT', is '{here}'" in done.stderr


@pytest.mark.parametrize(
    ("key", "same"),
    [
        ("executor='loop'", False),
        ("block=2", False),
        ("threads=2", False),
        ("odd-block-threads=2", False),
        ("workers=5", True),
        ("retries=7", True),
        ("time-limit=9.0", True),
    ],
)
def test_numerics_hold_the_keys_that_change_bits(config, key, same):
    from fedsim.build import plan
    from fedsim.config import load_config
    from fedsim.run import numerics

    path = config()
    plain, other = (numerics(plan(load_config(path, keys))) for keys in ([], [f"simulation.{key}"]))
    assert (plain == other) is same


@pytest.mark.parametrize("version", ["fedsim.run.__version__", "torch.__version__"])
def test_numerics_hold_the_versions(config, monkeypatch, version):
    from fedsim.build import plan
    from fedsim.config import load_config
    from fedsim.run import numerics

    planned = plan(load_config(config()))
    here = numerics(planned)
    monkeypatch.setattr(version, "0.0.0")
    assert numerics(planned) != here


def test_initial_weights_are_recorded_and_a_resumed_run_wants_the_same_file(config, tmp_path):
    from safetensors.torch import save_file

    from fedsim.models import build_model

    weights = tmp_path / "w.safetensors"
    save_file(build_model("small-cnn", classes=3, shape=(3, 12, 12)).state_dict(), weights)
    text = config("fedssf").read_text().replace("[training]", f'[model]\nweights = "{weights}"\n[training]')
    (tmp_path / "c.toml").write_text(text)
    fedsim("run", tmp_path / "c.toml", "--out", tmp_path / "r")
    digest = json.loads((tmp_path / "r" / "summary.json").read_text())["weights_sha256"]
    assert digest == hashlib.sha256(weights.read_bytes()).hexdigest()
    save_file({"x": torch.zeros(1)}, weights)
    done = fedsim("resume", tmp_path / "r", check=False)
    assert done.returncode == 2
    assert "not the weights of this model" in done.stderr
    save_file(build_model("small-cnn", classes=3, shape=(3, 12, 12)).state_dict(), weights)  # drawn anew
    done = fedsim("resume", tmp_path / "r", check=False)
    assert done.returncode == 2
    assert f"weights_sha256 was '{digest}'" in done.stderr


def test_help_without_arguments():
    done = fedsim(check=False)
    assert "fedsim run" in done.stdout + done.stderr


def test_evaluation_modes_stand_beside_the_ordinary_evaluation(config, tmp_path):
    """In summary and metrics, after the last round; the training and the ordinary figures keep their bits."""
    from fedsim.config import load_config
    from fedsim.results.store import MetricStore
    from fedsim.run import run

    modes = "own,mean,reestimated,adabn,unmix-tns"
    a = run(load_config(config()), tmp_path / "plain")
    overrides = [f"evaluation.modes={modes}", "evaluation.batch-size=6"]
    b = run(load_config(config(), overrides), tmp_path / "moded")
    assert a["state_sha256"] == b["state_sha256"]
    assert a["accuracy"] == b["accuracy"]
    assert "modes" not in a
    assert (b["modes"]["round"], b["modes"]["batch_size"]) == (6, 6)
    assert list(b["modes"]["test"]) == modes.split(",")
    assert b["modes"]["test"]["own"]["accuracy"] == b["accuracy"]
    store = MetricStore(tmp_path / "moded" / "metrics.sqlite", create=False)
    curves = store.by_domain("accuracy", "test/adabn")
    assert {d: v for d, [(_, v)] in curves.items()} == pytest.approx(b["modes"]["test"]["adabn"]["accuracy"])
