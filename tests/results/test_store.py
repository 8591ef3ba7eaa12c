"""Metrics: values, rewinding, readers beside the writer, damage."""

import numpy as np
import pytest

from fedsim.errors import DataError
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
