"""Run contenders on the neutral workloads, interleaved, and write results.json, a table and the curve of cost.

    python experiments/bench/run.py --workloads tiny --contenders fedsim,bmm,flower
    python experiments/bench/run.py --workloads tiny-10,tiny-100,tiny,tiny-10000 --out curve

Every contender is started anew in every repetition and trains --rounds rounds; the median is over all rounds but the
first of each start. A repetition before those, of two rounds, is not timed: it warms the page cache and measures
memory. Equal work is proven by the final training loss of every start.

Exit code 1 if a contender failed or did other work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from experiments.bench.export_suite import export
from experiments.bench.memory import Tree, Watch
from experiments.bench.peers import CONTENDERS, Contender
from experiments.bench.reporting import BenchError, parse
from experiments.bench.table import Run, curve, markdown, summaries
from experiments.bench.workloads import NAMES, Workload, prepare, workload

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = {"logistic": "bmm", "mcmahan-cnn": "processes", "digits-cnn": "processes"}


@dataclass(frozen=True)
class Machine:
    cores: int
    processor: str
    system: str
    date: str
    load: float  # one minute's, before the first run

    @classmethod
    def here(cls) -> Machine:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else platform.machine()
        now = datetime.now().astimezone().isoformat(timespec="minutes")
        cores = len(os.sched_getaffinity(0))
        return cls(cores, processor, f"{platform.system()} {platform.release()}", now, os.getloadavg()[0])


def start(contender: Contender, workload: Workload, rounds: int, measure: bool, limit: float) -> tuple[str, int]:
    """(what it printed, peak bytes if measured).

    Raises:
        BenchError: it could not be started, ended badly or took more than ``limit`` seconds.
    """
    if not contender.interpreter.exists():
        raise BenchError(f"{contender.interpreter}: not there; build it by: build.sh {contender.environment}")
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # threads are each contender's choice
    environment = {**inherited, "PYTHONPATH": str(ROOT), **contender.variables}
    command = contender.command(workload, rounds)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watch = Watch(Tree(process.pid), measure, 0.25 if measure else 5.0)  # following costs time too
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise BenchError(f"not done within {limit:g} s") from None
        finally:
            watch.stop()
            watch.tree.kill()  # daemons that outlive their parent would be in the next contender's way
    if process.returncode:
        lines = (errors or output).strip().splitlines()
        raise BenchError(f"exit code {process.returncode}: {lines[-1] if lines else 'no output'}")
    return output, watch.peak


def measure(workload: Workload, names: Sequence[str], options: argparse.Namespace) -> list[Run]:
    """All runs of a workload. A contender that failed once is not started again."""
    runs: list[Run] = []
    for repetition in range(0 if options.memory else 1, options.repetitions + 1):
        for name in names if repetition % 2 else reversed(names):  # nobody always runs after the same neighbour
            if name in {run.contender for run in runs if run.error}:
                continue
            load, begin = os.getloadavg()[0], time.perf_counter()
            rounds = options.rounds if repetition else 2
            result, peak, error = None, 0, ""
            try:
                output, peak = start(CONTENDERS[name], workload, rounds, repetition == 0, options.limit)
                result = parse(output)
                told = ", ".join(f"{s:.4g}" for s in result.seconds) + f" s; loss {result.loss:.6f}"
            except BenchError as problem:
                error = told = str(problem)
            runs.append(Run(name, workload.name, repetition, load, peak, result, error))
            took = time.perf_counter() - begin
            print(f"{workload.name} {repetition} {name}: {told} ({took:.0f} s, load {load:.1f})", file=sys.stderr)
    return runs


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    put = parser.add_argument
    put("--workloads", default="tiny,cifar,digits,domains", help=f"comma-separated, of: {', '.join(NAMES)}")
    put("--contenders", default="all", help=f"comma-separated, of: {', '.join(CONTENDERS)}; or all")
    put("--reference", default="", help="whose time is 1 (default: bmm for tiny, processes for the others)")
    put("--rounds", type=int, default=4, help="of each start, the first included (default: 4)")
    put("--repetitions", type=int, default=2, help="starts of each contender (default: 2)")
    put("--no-memory", dest="memory", action="store_false", help="leave the repetition that measures memory out")
    put("--limit", type=float, default=1800, help="seconds a start may take (default: 1800)")
    put("--out", type=Path, default=Path("bench-results"), help="folder of what is written (default: bench-results)")
    return check(parser.parse_args())


def check(chosen: argparse.Namespace) -> argparse.Namespace:
    """Workloads and contenders by name become lists.

    Raises:
        SystemExit: what cannot be run, or cannot prove what it should.
    """
    chosen.workloads = [workload(name) for name in chosen.workloads.split(",")]
    chosen.contenders = list(CONTENDERS) if chosen.contenders == "all" else chosen.contenders.split(",")
    for name in [*chosen.contenders, *([chosen.reference] if chosen.reference else [])]:
        if name not in CONTENDERS:
            raise SystemExit(f"contender '{name}': no such contender; expected some of {', '.join(CONTENDERS)}")
    timed = chosen.repetitions * (chosen.rounds - 1)
    if timed < 5:
        print(
            f"{timed} timed rounds: a median worth quoting needs five; add --repetitions or --rounds", file=sys.stderr
        )
    for item in chosen.workloads:
        if not 2 <= chosen.rounds <= item.proof_rounds:
            raise SystemExit(
                f"--rounds {chosen.rounds}: expected 2 to {item.proof_rounds} for {item.name}: one to warm up, and with"
                " more, equal programs may end at different losses; use --repetitions for more timed rounds"
            )
    return chosen


def main() -> int:
    chosen, machine = options(), Machine.here()
    if machine.load > 0.3:
        print(
            f"the machine is busy (load {machine.load:.1f}): ratios of this run are not to be quoted", file=sys.stderr
        )
    chosen.out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    tables = []
    for item in chosen.workloads:
        (export if item.data == "suite" else prepare)(item)
        reference = chosen.reference or REFERENCE[item.model]
        names = [n for n in dict.fromkeys([reference, *chosen.contenders]) if CONTENDERS[n].able(item)]
        runs += measure(item, names, chosen)
        tables.append(markdown(item, summaries(item, runs, reference), reference))
        everything = {"command": sys.argv[1:], "machine": asdict(machine), "runs": [asdict(run) for run in runs]}
        (chosen.out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
        head = f"{machine.cores} cores, {machine.processor}, load before {machine.load:.1f}, {machine.date}\n"
        (chosen.out / "table.md").write_text("\n".join([head, *tables]))
    curve(runs, chosen.out / "cost.png")
    print((chosen.out / "table.md").read_text())
    ends = [s for item in chosen.workloads for s in summaries(item, runs, chosen.reference or REFERENCE[item.model])]
    return 0 if all(s.equal for s in ends) else 1
