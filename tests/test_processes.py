"""What the program asks of the C library and of OpenMP, seen in processes of their own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from fedsim.build import plan, federation_of
from fedsim.config import parse_config
from fedsim.store import ClientStore
config = parse_config({"federation": {"domains": "mnist", "examples-per-client": 32}, "simulation": {"workers": 0}})
federation_of(plan(config), ClientStore())
torch.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 23)  # 32 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_simulation_in_this_process_keeps_the_memory_it_frees():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120)
    assert int(done.stdout.split()[-1]) < 3 * 8192, done.stdout + done.stderr  # pages of three of the ten


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "5000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "active"}, "None active")],
)
def test_threads_wait_briefly_unless_the_environment_says_otherwise(variables, expected):
    code = "import os, fedsim;print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=clean)
    assert done.stdout.split("\n")[0] == expected, done.stderr
