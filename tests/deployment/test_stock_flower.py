"""Flower's own tools carry our app: a stock SuperLink and stock SuperNodes with TLS and node authentication."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedsim.config import parse_config
from fedsim.deployment import keys
from fedsim.run import run
from tests.deployment.conftest import free_port
from tests.test_flwr_run import end_all, processes_of

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOMAINS = ("mnist", "utility")
SETTINGS = {
    "rounds": 2,
    "federation": {"domains": ",".join(DOMAINS), "examples-per-client": 128},
    "algorithm": {"strategy": "fedbn"},
    "training": {"lr": 0.1},
    "simulation": {"executor": "loop", "workers": 0, "block": 2, "odd-block-threads": 2},
}


class Stock:
    """Processes of stock Flower with a FLWR_HOME of their own; each in a session that is ended whole."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def start(self, name: str, *command: object) -> None:
        with open(self.folder / f"{name}.log", "w") as log:
            self.started.append(
                subprocess.Popen(list(map(str, command)), env=self.environment, cwd=self.folder, stdout=log, stderr=log)
            )

    def until(self, name: str, text: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.log(name):
            assert time.monotonic() < end, f"{name} never said '{text}':\n{self.log(name)}"
            time.sleep(0.2)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def done(self, *command: object, seconds: float = 300.0) -> str:
        words = list(map(str, command))
        ended = subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        assert ended.returncode == 0, ended.stdout + ended.stderr + self.log("superlink")
        return ended.stdout

    def close(self) -> None:
        for process in self.started:
            process.terminate()
        end_all(self.folder / "flwr")
        for process in self.started:
            process.wait(60)
        assert not processes_of(self.folder / "flwr")


def flat(settings: dict) -> str:
    words = []
    for key, value in settings.items():
        for name, v in value.items() if isinstance(value, dict) else [("", value)]:
            words.append(f"{key}.{name}={json.dumps(v)}" if name else f"{key}={json.dumps(v)}")
    return " ".join(words)


def make_node(folder: Path, name: str) -> tuple[Path, Path]:
    """What ``ssh-keygen -t ecdsa -b 384`` makes."""
    key = ec.generate_private_key(ec.SECP384R1())
    secret, public = folder / name, folder / f"{name}.pub"
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    secret.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return secret, public


@pytest.fixture
def stock(tmp_path):
    stock = Stock(tmp_path)
    (tmp_path / "flwr").mkdir()
    yield stock
    stock.close()


@pytest.mark.slow
def test_stock_superlink_and_supernodes_end_with_the_simulations_bits(stock, tmp_path):
    fleet, control = free_port(), free_port()
    keys.make_ca(tmp_path)
    keys.make_server(tmp_path, ["127.0.0.1", "localhost"])
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "trial"\n[superlink.trial]\naddress = "127.0.0.1:{control}"\n'
        f'root-certificates = "{tmp_path / "ca.crt"}"\n'
    )
    stock.start(
        "superlink",
        *("flower-superlink", "--ssl-certfile", tmp_path / "server.crt", "--ssl-keyfile", tmp_path / "server.key"),
        *("--ssl-ca-certfile", tmp_path / "ca.crt", "--enable-supernode-auth", "--host", "127.0.0.1"),
        *("--port", control, "--fleet-api-address", f"127.0.0.1:{fleet}"),
    )
    stock.until("superlink", "Fleet")
    for number, domain in enumerate(DOMAINS):
        secret, public = make_node(tmp_path, domain)
        stock.done("flwr", "supernode", "register", public, "trial", seconds=60)
        stock.start(
            domain,
            *("flower-supernode", "--superlink", f"127.0.0.1:{fleet}", "--root-certificates", tmp_path / "ca.crt"),
            *("--auth-supernode-private-key", secret, "--port", free_port()),
            *("--node-config", f"partition-id={number}"),
        )
    said = stock.done("flwr", "run", ".", "trial", "--run-config", flat(SETTINGS), "--stream")
    found = re.search(r"state_sha256 ([0-9a-f]{64})", said)
    assert found, said + stock.log("superlink") + stock.log("mnist")
    simulated = run(parse_config(SETTINGS), tmp_path / "simulated")
    assert found[1] == simulated["state_sha256"]
