"""A process has one Ray session, and one after the other."""

import ctypes
import os
import signal
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


def test_what_sigterm_does_stays_as_it_is():
    def handler() -> bytes:
        action = ctypes.create_string_buffer(1024)  # a struct sigaction, of whatever size, which Ray's C++ sets
        assert ctypes.CDLL(None).sigaction(signal.SIGTERM, None, action) == 0
        return action.raw[: ctypes.sizeof(ctypes.c_void_p)]  # its first field

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        expected = handler()
        for _ in range(2):
            with session(1) as one:
                one.wait()
                assert handler() == expected
            assert handler() == expected
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_processes_of_ray_that_a_simulation_never_talks_to():
    with session(1) as one:
        one.wait()
        members = (Path(f"/proc/{process}/cmdline") for process in Tree(os.getpid()).members())
        programs = [file.read_text().replace("\0", " ").partition(" --")[0].lower() for file in members]
    assert any(program.endswith("/raylet") for program in programs)
    assert not [program for program in programs if "agent" in program or "dashboard" in program]
