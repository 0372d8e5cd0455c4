"""Denoising steps a few at a time, all by one compiled program, so that a bar can move between."""

import time
from collections.abc import Callable
from typing import Any

import jax

# Tokens of an image from which its steps are told by themselves: less are done before one looks,
# and the modulations, which every part computes again, would be more than 1 % of the work.
LARGE = 2048
SECONDS = 2.0  # of a part


class Pace:
    """So many steps at a time that a part takes SECONDS; all at once for small images and where
    nobody is told.

    Parts are of whole turns of `reuse` steps. On many processes all go at once: they have to do the
    same, and their clocks differ.
    """

    def __init__(self, steps: int, reuse: int, tokens: int, advance: Callable[[int], None] | None):
        self.steps, self.reuse, self.advance = steps, reuse, advance
        self.parts = advance is not None and tokens >= LARGE and jax.process_count() == 1
        self.size = reuse if self.parts else steps

    def run(self, call: Callable[..., Any], x: Any, *rest: Any) -> Any:
        """x after all steps, those of a span being taken by call(x, span, *rest)."""
        first = 0
        while first < self.steps:
            last, start = min(first + self.size, self.steps), time.monotonic()
            # Placed as before, or the next part would be another program.
            x = jax.device_put(call(x, (first, last), *rest), x.sharding)
            if self.advance is not None:
                jax.block_until_ready(x)
                self.advance(last - first)
            if self.parts:
                turn = (time.monotonic() - start) / (last - first) * self.reuse
                self.size = self.reuse * max(1, int(SECONDS / turn))
            first = last
        return x
