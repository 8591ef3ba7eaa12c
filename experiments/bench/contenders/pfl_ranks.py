"""Start pfl_.py once a rank. pfl looks for its peers when it is imported, so whoever tells it comes before that."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from experiments.bench.reporting import arguments


def ranks(processes: int, options: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    addresses = ",".join(f"localhost:{port + rank}" for rank in range(processes))
    command = [sys.executable, str(Path(__file__).with_name("pfl_.py")), *options, "--processes", str(processes)]
    environments = [
        {**os.environ, "PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank)} for rank in range(processes)
    ]
    return [subprocess.Popen(command, env=environment) for environment in environments]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="ranks (default: 2)")
    chosen = parser.parse_args()
    options = ["--workload", chosen.workload, "--rounds", str(chosen.rounds)]
    sys.exit(max(rank.wait() for rank in ranks(chosen.processes, options)))
