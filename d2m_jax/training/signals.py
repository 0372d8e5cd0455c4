"""Signals by which a training is asked to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from d2m_jax import hosts

ASKED_TO_STOP = signal.SIGTERM, signal.SIGINT


@contextmanager
def caught_signals(what_follows: str) -> Iterator[list[signal.Signals]]:
    """A list that fills with the first SIGTERM or SIGINT; a second one acts as usual.

    A line says at once that the signal came and `what_follows`. Python itself hears of a signal
    only when a call that compiles or computes has returned, which may take minutes.
    """
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {}

    def catch(number: int, _: Any):
        caught.append(signal.Signals(number))
        for each, handler in before.items():
            signal.signal(each, handler)

    with _told_at_once(what_follows):
        for number in ASKED_TO_STOP:
            before[number] = signal.signal(number, catch)
        try:
            yield caught
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _told_at_once(what_follows: str) -> Iterator[None]:
    """A thread tells of the first signal: C writes its number into a pipe as soon as it comes."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    def listen():
        while number := os.read(reads, 1):
            if number[0] in ASKED_TO_STOP:
                hosts.say(f"{signal.Signals(number[0]).name}: {what_follows}")
                break

    told = threading.Thread(target=listen, daemon=True)
    told.start()
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writes)
        told.join()
        os.close(reads)
