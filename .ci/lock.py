"""requirements.lock from pip's report, for Linux on x86-64 with Python 3.11.

pip install --dry-run --ignore-installed --report report.json . && python .ci/lock.py report.json > requirements.lock
"""

import json
import sys
from pathlib import Path

print("# Written by .ci/lock.py for Linux on x86-64 with Python 3.11. torch: for CPUs, of PyTorch's own index.")
for item in sorted(
    json.loads(Path(sys.argv[1]).read_text())["install"], key=lambda item: item["metadata"]["name"].lower()
):
    name, version = item["metadata"]["name"], item["metadata"]["version"]
    if name != "fedsim-domains":
        print(f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")
