"""Metrics: values, rewinding, readers beside the writer, damage."""

import math
import time

import numpy as np
import pytest

from fedsim.errors import DataError, StorageError
from fedsim.results.store import MetricStore


def test_means_by_domain_equal_numpy(tmp_path):
    draw = np.random.default_rng(0)
    store, values = MetricStore(tmp_path / "m.sqlite"), {}
    for round in (1, 2):
        for client in range(6):
            weight = float(draw.integers(1, 50))
            total = float(draw.integers(0, weight + 1))
            domain = "ab"[client % 2]
            store.add([(round, client, domain, "test", "accuracy", total, weight)])
            values.setdefault((domain, round), []).append(total / weight)
    store.commit()
    curves = store.by_domain("accuracy")
    for (domain, round), expected in values.items():
        assert dict(curves[domain])[round] == pytest.approx(np.mean(expected))
    assert store.by_domain("accuracy", "validation") == {}


def test_rewind_forgets_written_and_buffered_rows(tmp_path):
    store = MetricStore(tmp_path / "m.sqlite")
    store.add([(r, -1, "", "", "x", float(r), 1.0) for r in (1, 2, 3)])
    store.commit()
    store.add([(r, -1, "", "", "x", float(r), 1.0) for r in (2, 4)])
    store.rewind(2)
    store.commit()
    assert [(r, total) for r, _, _, total, _ in store.read("x")] == [(1, 1.0), (2, 2.0), (2, 2.0)]


def test_a_reader_sees_committed_rounds_only(tmp_path):
    writer = MetricStore(tmp_path / "m.sqlite")
    writer.add([(1, -1, "", "", "x", 1.0, 1.0)])
    reader = MetricStore(tmp_path / "m.sqlite", create=False)
    assert reader.read("x") == []
    writer.commit()
    assert len(reader.read("x")) == 1


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(DataError, match="no metrics there"):
        MetricStore(tmp_path / "none.sqlite", create=False)
    (tmp_path / "bad.sqlite").write_bytes(b"not a database at all, but long enough to look at" * 30)
    with pytest.raises(DataError, match="not the metrics of a run"):
        MetricStore(tmp_path / "bad.sqlite")


def test_not_a_number_is_kept_and_its_domain_is_none_either(tmp_path):
    store = MetricStore(tmp_path / "m.sqlite")
    store.add([(1, 0, "a", "test", "loss", math.nan, 2.0), (1, 1, "a", "test", "loss", 4.0, 2.0)])
    store.add([(1, 2, "b", "test", "loss", math.inf, 2.0), (2, 0, "a", "test", "loss", 6.0, 2.0)])
    store.commit()
    totals = [total for *_, total, _ in store.read("loss", "test")]
    assert [repr(t) for t in totals] == ["nan", "4.0", "inf", "6.0"]
    curves = store.by_domain("loss")
    assert repr(curves["a"]) == "[(1, nan), (2, 3.0)]", "the mean of a NaN and a number is no number"
    assert curves["b"] == [(1, math.inf)]


def test_a_full_disk_loses_no_row_that_a_later_commit_can_write(tmp_path):
    store = MetricStore(tmp_path / "m.sqlite")
    store.db.execute("PRAGMA max_page_count = 12")  # the file may not grow beyond: SQLITE_FULL, as on a full disk
    rows = [(r, -1, "", "", "x", float(r), 1.0) for r in range(3000)]
    store.add(rows)
    with pytest.raises(StorageError, match="cannot be written: database or disk is full"):
        store.commit()
    assert MetricStore(tmp_path / "m.sqlite", create=False).read("x") == [], "all of a transaction or nothing"
    store.db.execute("PRAGMA max_page_count = 1000000")
    store.commit()
    assert len(store.read("x")) == len(rows)


def test_a_curve_is_found_by_the_index(tmp_path):
    store = MetricStore(tmp_path / "m.sqlite")
    queries: list[str] = []
    store.db.set_trace_callback(queries.append)
    store.by_domain("accuracy")
    store.read("accuracy", "test")
    store.db.set_trace_callback(None)
    assert len(queries) == 2
    for query in queries:
        plan = " ".join(step for *_, step in store.db.execute(f"EXPLAIN QUERY PLAN {query}"))
        assert "SEARCH r USING INDEX by_name" in plan
        assert "SCAN r" not in plan


@pytest.mark.slow
def test_a_million_rows_without_slowing(tmp_path):
    """A run of a thousand rounds with a thousand figures each; the time of the last stretch is that of the first."""
    store, times = MetricStore(tmp_path / "m.sqlite"), []
    for round in range(1000):
        rows = [(round, c, f"d{c % 5}", "train", n, c / 7, 3.0) for c in range(250) for n in ("loss", "a", "b", "c")]
        store.add(rows)
        started = time.process_time()
        store.commit()
        times.append(time.process_time() - started)
    tenths = [1000 * sum(times[i : i + 100]) / 100 for i in range(0, 1000, 100)]
    print("CPU milliseconds for 1000 rows, by tenths of a million:", [f"{t:.1f}" for t in tenths])
    size = (tmp_path / "m.sqlite").stat().st_size
    print(f"{size / 1e6:.1f} bytes a row")
    assert size < 60e6, "names are stored once, not with every row"
    curves = store.by_domain("loss", "train")
    assert {domain: len(curve) for domain, curve in curves.items()} == {f"d{i}": 1000 for i in range(5)}
    expected = sum(c / 7 / 3 for c in range(0, 250, 5)) / 50
    assert curves["d0"][999][1] == pytest.approx(expected)
