"""Progress in a file: plain lines."""

import io

from rich.console import Console

from fedsim.results.progress import Progress, clock


def test_plain_lines():
    buffer = io.StringIO()
    with Progress("fedbn", 4, Console(file=buffer, width=80)) as progress:
        progress.update(2, accuracy={"mnist": 0.5, "street": 0.25}, loss=1.5, examples=100)
        progress.note("client 3 left out: 'w[0]' is [not] finite")
        progress.update(4, accuracy={"mnist": 0.75, "street": 0.5}, loss=None, examples=300)
    lines = buffer.getvalue().splitlines()
    assert lines[0] == "fedbn: 4 rounds"
    assert lines[1] == "round 2/4  mnist 50.0  street 25.0  mean 37.5  loss 1.500"
    assert lines[2] == "fedbn: client 3 left out: 'w[0]' is [not] finite"
    assert lines[3].startswith("round 4/4  mnist 75.0  street 50.0  mean 62.5")
    assert "examples/s" in lines[3]
    assert "\x1b" not in buffer.getvalue()


def test_clock():
    assert [clock(s) for s in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]
