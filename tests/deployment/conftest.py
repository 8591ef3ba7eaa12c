"""A federation of real processes on loopback: forked, so that each starts in no time; TLS and keys as in earnest."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsim.config import Config, parse_config
from fedsim.data import Dataset
from fedsim.deployment import cli, keys
from fedsim.deployment.client import work
from fedsim.deployment.federation import Patience
from fedsim.deployment.server import serve
from fedsim.deployment.site import Site
from fedsim.errors import FedsimError
from tests.conftest import DOMAINS

FORK = multiprocessing.get_context("fork")
PATIENCE = Patience(silent=6.0, order=60.0, absent=60.0)
DEADLINE = 120.0  # seconds, for a machine that has other things to do


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings(**sections) -> Config:
    base = {
        "rounds": 3,
        "federation": {"dataset": "digits", "domains": ",".join(DOMAINS), "clients-per-domain": 1},
        "training": {"batch-size": 8, "lr": 0.05},
        "simulation": {"workers": 0, "executor": "loop", "block": 2},
        "checkpoint": {"every": 1, "keep": 2},
    }
    return parse_config(
        {k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in (base | sections).items()}
    )


def in_process(log: Path, call: Callable[[], object]) -> None:
    """What a command line would do: the log in a file, the exit code of the error."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    for handler in list(logging.root.handlers):
        logging.root.removeHandler(handler)
    cli._talk()
    code = 0
    try:
        call()
    except FedsimError as error:
        print(f"fedsim: {error}", file=sys.stderr)
        code = error.exit_code
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)


class Process:
    def __init__(self, log: Path, call: Callable[[], object]):
        self.log = log
        self.process = FORK.Process(target=in_process, args=(log, call), daemon=True)
        self.process.start()

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float = DEADLINE) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running:\n{self.text()}"
        return self.process.exitcode

    def until(self, text: str, seconds: float = DEADLINE) -> None:
        end = time.monotonic() + seconds
        while text not in self.text():
            assert time.monotonic() < end, f"never said '{text}':\n{self.text()}"
            assert self.code is None or text in self.text(), f"ended without saying '{text}':\n{self.text()}"
            time.sleep(0.02)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        self.process.join(20)


class Deployment:
    """Keys, data and processes of one federation in one folder."""

    def __init__(self, folder: Path, dataset: Dataset, config: Config, patience: Patience = PATIENCE):
        self.folder, self.dataset, self.config, self.patience = folder, dataset, config, patience
        self.pki, self.known, self.out = folder / "pki", folder / "clients", folder / "run"
        self.port = free_port()
        self.started: list[Process] = []
        keys.make_ca(self.pki)
        keys.make_server(self.pki, ["127.0.0.1"])
        for domain in DOMAINS:
            keys.register(keys.make_node(self.pki, domain), self.known)

    def _start(self, name: str, call: Callable[[], object]) -> Process:
        process = Process(self.folder / f"{name}.log", call)
        self.started.append(process)
        return process

    def server(self, **changes) -> Process:
        files = {"cert": self.pki / "server.crt", "key": self.pki / "server.key", "ca": self.pki / "ca.crt"}
        options = {"listen": f"127.0.0.1:{self.port}", **files, "clients": self.known, "patience": self.patience}
        return self._start("server", lambda: serve(self.config, self.out, **{**options, **changes}))

    def client(
        self, domain: str, *, name: str = "", key: str = "", ca: Path | None = None, server: str = "", give_up=60.0
    ) -> Process:
        def call() -> None:
            site = Site(domain, str(self.dataset.folder), self.folder / "state" / domain)
            address = server or f"127.0.0.1:{self.port}"
            secret = keys.read_key(self.pki / f"{key or domain}.key")
            work(address, ca or self.pki / "ca.crt", secret, site, give_up=give_up)

        return self._start(name or domain, call)

    def clients(self) -> list[Process]:
        return [self.client(domain) for domain in DOMAINS]

    def summary(self) -> dict:
        return json.loads((self.out / "summary.json").read_text())

    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "events.jsonl").read_text().splitlines()]

    def close(self) -> None:
        for process in self.started:
            process.kill()


@pytest.fixture
def deploy(tmp_path: Path, dataset: Dataset) -> Iterator[Callable[..., Deployment]]:
    with contextlib.ExitStack() as stack:

        def make(patience: Patience = PATIENCE, **sections) -> Deployment:
            made = Deployment(tmp_path, dataset, settings(**sections), patience)
            stack.callback(made.close)
            return made

        yield make
