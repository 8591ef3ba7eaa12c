"""Who competes: a script of ``contenders/``, its options, its environment and what it can train."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiments.bench.workloads import Workload

HERE = Path(__file__).resolve().parent
CNNS = ("mcmahan-cnn", "digits-cnn")
# glibc keeps memory that is freed: what fedsim's processes do for themselves.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}

JAX = {"JAX_PLATFORMS": "cpu"}


@dataclass(frozen=True)
class Contender:
    """Args:
    script: in ``contenders/``, with ``options``.
    environment: a virtual environment of ``build.sh``, or "" for the one of this interpreter.
    models: that it can train.
    private: it can keep normalization layers on the client.
    exact: it rounds as float32 does, so that its final loss proves its work; else the loss is shown and not judged.
    variables: of the process's environment.
    """

    script: str
    options: tuple[str, ...] = ()
    environment: str = ""
    models: tuple[str, ...] = ("logistic", *CNNS)
    private: bool = False
    exact: bool = True
    variables: Mapping[str, str] = field(default_factory=dict)

    def able(self, workload: Workload) -> bool:
        return workload.model in self.models and (self.private or not workload.private)

    @property
    def interpreter(self) -> Path:
        return environments() / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    def command(self, workload: Workload, rounds: int) -> list[str]:
        script = str(HERE / "contenders" / self.script)
        return [str(self.interpreter), script, "--workload", workload.name, "--rounds", str(rounds), *self.options]


def environments() -> Path:
    """$BENCH_ENVS, else fedsim-bench/envs in the user's cache folder; as ``build.sh``."""
    return Path(os.environ.get("BENCH_ENVS", Path.home() / ".cache" / "fedsim-bench" / "envs"))


CONTENDERS = {
    "fedsim": Contender("fedsim_.py", private=True),
    "fedsim-alone": Contender("fedsim_.py", ("--workers", "0"), private=True),
    "fedsim-alone-2": Contender("fedsim_.py", ("--workers", "0", "--threads", "2"), private=True),
    "fedsim-loop": Contender("fedsim_.py", ("--executor", "loop"), private=True),
    "fedsim-vmap": Contender("fedsim_.py", ("--executor", "vmap"), private=True),
    "fedsim-compiled": Contender("fedsim_.py", ("--workers", "0", "--compile"), models=("logistic",)),
    "fedsim-odd1": Contender("fedsim_.py", ("--odd-block-threads", "1"), private=True),
    "fedsim-bf16": Contender("fedsim_.py", ("--precision", "bf16"), models=CNNS, private=True, exact=False),
    "plain-1": Contender("plain.py", ("--threads", "1"), private=True),
    "plain-2": Contender("plain.py", ("--threads", "2"), private=True),
    "processes": Contender("two_processes.py", private=True),
    "processes-tuned": Contender("two_processes.py", private=True, variables=MALLOC),
    "bmm": Contender("bmm.py", models=("logistic",)),
    "vmap": Contender("vmap.py", models=("logistic",)),
    "flower": Contender("flower.py", variables={"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}),
    "pfl-1": Contender("pfl_.py", environment="pfl"),
    "pfl-1-2": Contender("pfl_.py", ("--threads", "2"), environment="pfl"),
    "pfl-2": Contender("pfl_ranks.py", environment="pfl"),
    "fedjax": Contender("fedjax_.py", environment="jax", variables=JAX),
    "jax-vmap": Contender("jax_vmap.py", environment="jax", models=("logistic",), variables=JAX),
    "fluke-1": Contender("fluke_.py", environment="fluke"),
    "fluke-2": Contender("fluke_.py", ("--threads", "2"), environment="fluke"),
    "blazefl-serial": Contender("blazefl_.py", ("--mode", "serial"), environment="blazefl"),
    "blazefl-threads": Contender("blazefl_.py", ("--mode", "threads"), environment="blazefl"),
    "blazefl-processes": Contender("blazefl_.py", ("--mode", "processes"), environment="blazefl"),
}
