"""Flower's stock deployment of the same work: SuperLink and SuperNodes with TLS and node authentication, FedAvg."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedsim.deployment import keys

PROJECT = """
[project]
name = "echo"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "measurement"
[tool.flwr.app.components]
serverapp = "echo.app:server"
clientapp = "echo.app:client"
[tool.flwr.app.config]
size = 0
rounds = 0
"""

APP = '''
"""A client that sends every model back."""
import time

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    model = [v + np.float32(1) for v in message.content["arrays"].to_numpy_ndarrays()]
    content = {"arrays": ArrayRecord(model), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, replies)
        print(f"round-ended {time.time():.3f}", flush=True)
        return result


@server.main()
def main(grid, context):
    size, rounds = int(context.run_config["size"]), int(context.run_config["rounds"])
    model = ArrayRecord([np.ones(size // 10, np.float32) for _ in range(10)])
    Timed(fraction_evaluate=0.0, min_train_nodes=4, min_available_nodes=4).start(grid, model, num_rounds=rounds)
'''


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stock_rounds(size: int, rounds: int, clients: int) -> list[float]:
    """Seconds between the ends of successive rounds, the first left out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        app = folder / "app"
        (app / "echo").mkdir(parents=True)
        (app / "pyproject.toml").write_text(PROJECT)
        (app / "echo" / "app.py").write_text(APP)
        (app / "echo" / "__init__.py").touch()
        keys.make_ca(folder)
        keys.make_server(folder, ["127.0.0.1"])
        fleet, control = free_port(), free_port()
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "trial"\n[superlink.trial]\naddress = "127.0.0.1:{control}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )
        switches = {"TELEMETRY_ENABLED": "0", "DISABLE_UPDATE_CHECK": "1", "HOME": str(folder / "flwr")}
        environment = {**os.environ, **{f"FLWR_{k}": v for k, v in switches.items()}}
        environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        quiet: dict[str, Any] = {
            "env": environment,
            "cwd": folder,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        files = [f"--ssl-{k}={folder / v}" for k, v in (("certfile", "server.crt"), ("keyfile", "server.key"))]
        files += [f"--ssl-ca-certfile={folder / 'ca.crt'}", "--enable-supernode-auth", "--host=127.0.0.1"]
        started = [
            subprocess.Popen(
                ["flower-superlink", *files, f"--port={control}", f"--fleet-api-address=127.0.0.1:{fleet}"], **quiet
            )
        ]
        try:
            _until_open(control)
            for number in range(clients):
                secret = _make_key(folder, f"node{number}")
                subprocess.run(["flwr", "supernode", "register", f"{secret}.pub", "trial"], check=True, **quiet)
                node = ["flower-supernode", f"--superlink=127.0.0.1:{fleet}", f"--port={free_port()}"]
                node += [f"--root-certificates={folder / 'ca.crt'}", f"--auth-supernode-private-key={secret}"]
                started.append(subprocess.Popen([*node, f"--node-config=partition-id={number}"], **quiet))
            settings = f"size={size} rounds={rounds + 1}"
            command = ["flwr", "run", str(app), "trial", "--run-config", settings, "--stream"]
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=3600)
        finally:
            for process in reversed(started):
                process.terminate()
            for process in started:
                process.wait(60)
    ends = [float(t) for t in re.findall(r"round-ended ([\d.]+)", done.stdout)]
    if len(ends) != rounds + 1:
        raise RuntimeError(f"{len(ends)} of {rounds + 1} rounds ended:\n{done.stdout}{done.stderr}")
    return [after - before for before, after in itertools.pairwise(ends)]


def _until_open(port: int, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _make_key(folder: Path, name: str) -> Path:
    key = ec.generate_private_key(ec.SECP384R1())
    secret = folder / name
    secret.touch(0o600)
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    secret.with_name(f"{name}.pub").write_bytes(public)
    return secret
