"""A process has one Ray session, and one after the other."""

import os
from pathlib import Path

from experiments.bench.memory import Tree
from fedsim.ray_session import Session, current, session


def test_a_session_is_the_processs_own_until_it_ends():
    with session(1) as one:
        assert current() is one
        one.wait()
    assert current() is None
    again = Session(1)
    again.start()
    again.wait()  # a second Ray starts after the first has ended
    again.close()


def test_no_processes_of_ray_that_a_simulation_never_talks_to():
    with session(1) as one:
        one.wait()
        members = (Path(f"/proc/{process}/cmdline") for process in Tree(os.getpid()).members())
        programs = [file.read_text().replace("\0", " ").partition(" --")[0].lower() for file in members]
    assert any(program.endswith("/raylet") for program in programs)
    assert not [program for program in programs if "agent" in program or "dashboard" in program]
