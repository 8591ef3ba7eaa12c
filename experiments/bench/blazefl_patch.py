"""Make BlazeFL 3.0.0, which asks for Python 3.14, importable on an older one: run by the interpreter that has it.

Two generic functions are written in the syntax of Python 3.12, ``def f[T](...)``, and annotations name what is defined
only later, as 3.14 allows. Nothing else is changed. What 3.14 would add, threads without the global lock, cannot be
shown this way.
"""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

FUTURE = "from __future__ import annotations\n"


def patch(path: Path) -> bool:
    """True if the file was changed: every one is, once."""
    text = path.read_text()
    if FUTURE in text:
        return False
    path.write_text(FUTURE + re.sub(r"^def (\w+)\[T\]\(", r"def \1(", text, flags=re.MULTILINE))
    return True


if __name__ == "__main__":
    package = Path(sysconfig.get_path("purelib")) / "blazefl"
    print(f"{package}: {sum(map(patch, package.rglob('*.py')))} files rewritten")
