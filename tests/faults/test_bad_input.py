"""Every bad input gets one message and a documented exit code, and leaves nothing half-written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.faults import table
from tests.faults.cases import CASES, Case
from tests.faults.forked import fedsim_command
from tests.faults.place import Place, full_disk, own_mounts, read_only


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Place:
    return Place.build(tmp_path_factory.mktemp("faults") / "good")


@pytest.fixture(scope="module")
def mounts() -> bool:
    """Whether this system lets a process have mounts of its own."""
    return fedsim_command("--help", before=own_mounts).code == 0


def files(root: Path) -> dict[str, str]:
    """Checksums of all files but those of the cache, and of SQLite's log, which opening a database may make."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and not name.startswith("cache/") and not name.endswith(("-wal", "-shm")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.area}: {case.name}")
def test_one_message(case: Case, good: Place, mounts: bool, tmp_path: Path):
    if case.before in (full_disk, read_only) and not mounts:
        pytest.skip("no mounts of one's own on this system")
    place = good.copy(tmp_path / "place")
    case.arrange(place)
    before = files(place.root)
    done = table.play(case, place)
    text = table.message(done, place)
    assert done.code == case.code, done.err
    assert len([line for line in done.err.splitlines() if line.startswith("fedsim: ")]) == 1, done.err
    assert all(line.startswith("  ") for line in text.splitlines()[1:]), "one message is one line, or a list below it"
    assert "Traceback" not in done.err
    assert "Warning" not in done.err
    for part in case.says:
        assert part in text
    after = files(place.root)
    if case.under_way:
        before, after = ({n: d for n, d in found.items() if not n.startswith("run/")} for found in (before, after))
    assert after == before, "nothing is changed, nothing half-written"
    assert not [p for p in place.root.glob("cache/*.tmp*")]
    assert table.row(case, text) in table.rows(), "run 'python -m tests.faults.table' and look at what changed"


def test_the_table_has_these_rows_and_no_others():
    assert len(CASES) >= 60
    assert len({(case.area, case.name) for case in CASES}) == len(CASES)
    assert [line.split(" | ")[:2] for line in table.rows()] == [[f"| {case.area}", case.name] for case in CASES]
