"""Long work tells how far it is: a bar in a terminal, elsewhere a line every ten seconds."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.progress
from rich.console import Console
from rich.text import Text

PATIENCE = 10  # seconds between two lines


@contextlib.contextmanager
def bar(
    total: int, what: str, unit: str = "bytes", waiting: str = "", shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Takes how many bytes, or of another unit, were done since the last call; tells on stderr how
    many of `total`, the rate and the time left. `waiting` is for before the first; what is not
    `shown`, as of all processes but one, tells nothing."""
    if not shown:
        yield lambda count: None
        return
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn())
        text = _Told(unit, waiting)
        with rich.progress.Progress(*columns, text, console=console, refresh_per_second=4) as live:
            task = live.add_task(what, total=total)
            yield lambda count: live.advance(task, count)
        return
    done, first, last = 0, (0, 0.0), time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, first, last
        done, now = done + count, time.monotonic()
        if done == count:  # compiling is no part of the rate
            first = done, now
        elif now - last > PATIENCE:
            last, rate = now, (done - first[0]) / (now - first[1])
            print(f"{what}: {told(done, total, rate, unit)}", file=sys.stderr, flush=True)

    yield advance


class _Told(rich.progress.ProgressColumn):
    def __init__(self, unit: str, waiting: str):
        super().__init__()
        self.unit, self.waiting = unit, waiting

    def render(self, task: rich.progress.Task) -> Text:
        text = told(task.completed, task.total or 0.0, task.speed, self.unit)
        return Text(text if task.completed else f"{text} {self.waiting}")


def told(done: float, total: float, rate: float | None, unit: str = "bytes") -> str:
    """`1.2 of 3.4 GB, 0.6 GB/s, 0:04 left`; without a rate the first part alone."""
    factor, name, digits = (1, unit, 0) if unit != "bytes" else (*scale(total), 1)
    text = f"{done / factor:.{digits}f} of {total / factor:.{digits}f} {name}"
    if not rate:
        return text
    left = round((total - done) / rate)
    return f"{text}, {rate / factor:.2f} {name}/s, {left // 60}:{left % 60:02d} left"


def size(count: float) -> str:
    """Bytes in words: `23.8 GB`, `12.0 MB`."""
    factor, name = scale(count)
    return f"{count / factor:.{0 if factor == 1 else 1}f} {name}"


def scale(count: float) -> tuple[int, str]:
    """The unit in which so many bytes are told, and its name."""
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
    return next((unit for unit in units if count >= unit[0]), (1, "bytes"))
