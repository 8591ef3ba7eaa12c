"""The benchmark's command: python experiments/bench/run.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from any folder
    from experiments.bench.driver import main

    sys.exit(main())
