"""A progress bar on a terminal; two plain lines in a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress


@contextlib.contextmanager
def bar(what: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields ``tick(count)``, to be called as items are finished."""
    console = Console(stderr=True)
    if not show:
        yield lambda count: None
        return
    if not console.is_terminal:
        started = time.perf_counter()
        print(f"{what} ({total} items) ...", flush=True)
        yield lambda count: None
        print(f"... done in {time.perf_counter() - started:.0f} s", flush=True)
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
