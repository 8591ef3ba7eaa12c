"""A progress bar on a terminal; in a file, a line at the start, one every ten seconds and one at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

EVERY = 10.0  # seconds


@contextlib.contextmanager
def bar(what: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields ``tick(count)``, to be called as items are finished. Everything goes to stderr."""
    if not show:
        yield lambda count: None
        return
    from rich.console import Console  # 5 MB that a worker, which reads data and shows nothing, does without
    from rich.progress import Progress

    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)
    else:
        yield from _lines(what, total)


def _lines(what: str, total: int) -> Iterator[Callable[[int], None]]:
    started = said = time.monotonic()
    done = 0

    def tick(count: int) -> None:
        nonlocal done, said
        done += count
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            print(f"... {done} of {total}", file=sys.stderr, flush=True)

    print(f"{what} ({total} items) ...", file=sys.stderr, flush=True)
    yield tick
    print(f"... done in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
