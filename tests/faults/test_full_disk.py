"""A run whose disk fills ends with one message; once there is room it resumes to the bits of an undisturbed one."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

import fedsim.cli
from tests.faults.forked import Done, fedsim_command, forked
from tests.faults.place import CONFIG, full_disk, make_room, own_mounts, write_tree
from tests.faults.test_kills import figures

KILOBYTES = (128, 700)  # of the disk: too few for the first round's metrics, and for the last checkpoint's header
BYTES = (30_000, 60_000)  # of a file, where mounts are not allowed: too few to begin, and for a checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    write_tree(root / "tree", per_class=5)
    (root / "c.toml").write_text(CONFIG.format(root=root / "tree", strategy="fedbn"))
    done = fedsim_command("run", root / "c.toml", "--out", root / "whole", environment=cache(root))
    assert done.code == 0, done.err
    return root


def cache(root: Path) -> dict[str, str]:
    """With the data in it the data set takes nothing of the run's disk."""
    return {"FEDSIM_CACHE": str(root / "cache")}


def assert_told(done: Done) -> None:
    assert done.code == 1, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("fedsim: ")]
    assert "cannot be written" in line
    assert "make room there" in line
    assert "Traceback" not in done.err
    assert "Warning" not in done.err


def begun(run: Path) -> bool:
    return (run / "config.toml").exists()


def here(*words: object) -> int:
    """``fedsim WORDS...`` in a fork, which sees this process's mounts; its exit code."""
    process = os.fork()
    if not process:
        sys.argv = ["fedsim", *map(str, words)]
        try:
            fedsim.cli.main()
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(ended.code or 0))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fill_then_make_room(config: Path, disk: Path, kilobytes: int, out: Path) -> None:
    """Exit with the code of the run on the full disk; the resumed run is copied to ``out``, off the disk."""
    full_disk(str(disk), kilobytes)
    run = disk / "run"
    code = here("run", config, "--out", run)
    if code:
        told = "'fedsim resume' continues" if begun(run) else "run it again"
        print(told)
        make_room(str(disk))
        again = here("resume", run) if begun(run) else here("run", config, "--out", run)
        assert again == 0
    shutil.copytree(run, out)
    sys.exit(code)


def play(folder: Path, out: Path, kilobytes: int) -> bool:
    """Whether a disk of that size fills; if so, all is as it should be."""
    disk, resumed = out / f"disk{kilobytes}", out / f"run{kilobytes}"
    out.mkdir(exist_ok=True)
    inputs = (folder / "c.toml", disk, kilobytes, resumed)
    done = forked(fill_then_make_room, *inputs, environment=cache(folder))
    if done.code != 0:
        assert_told(done)
        promised = "run it again" if "run it again" in done.err else "'fedsim resume' continues"
        assert promised in done.out, "the message says what then works"
    assert figures(resumed) == figures(folder / "whole")
    return done.code != 0


@pytest.fixture(scope="module")
def mounts() -> None:
    if fedsim_command("--help", before=own_mounts).code:
        pytest.skip("no mounts of one's own on this system")


@pytest.mark.parametrize("kilobytes", KILOBYTES)
def test_resumed_after_a_full_disk(folder, tmp_path, mounts, kilobytes):
    assert play(folder, tmp_path, kilobytes)


@pytest.mark.slow
def test_resumed_after_a_disk_full_at_any_point(folder, tmp_path, mounts):
    filled = [play(folder, tmp_path / "d", kilobytes) for kilobytes in range(4, 840, 16)]
    assert filled == sorted(filled, reverse=True), "from some size on there is room for all of it"
    assert not filled[-1]


def limit_files(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize("most", BYTES)
def test_resumed_after_files_that_could_not_grow(folder, tmp_path, most):
    run = tmp_path / "run"
    words = ("run", folder / "c.toml", "--out", run)
    done = fedsim_command(*words, environment=cache(folder), before=limit_files, extra=(most,))
    assert_told(done)
    again = ("resume", run) if begun(run) else words
    done = fedsim_command(*again, environment=cache(folder))
    assert done.code == 0, done.err
    assert figures(run) == figures(folder / "whole")
