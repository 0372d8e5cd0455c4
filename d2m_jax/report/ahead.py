"""The programs of a report, compiled in threads while its images are drawn and judged."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from d2m_jax.evaluate import routing
from d2m_jax.evaluate.noisy import first
from d2m_jax.report.measure import Bench
from d2m_jax.report.rows import Run

THREADS = 2  # beside the one that measures: tracing holds Python's lock, compiling does not


@contextmanager
def compiled_ahead(run: Run, bench: Bench) -> Iterator[None]:
    """Compile all forwards and routings of a run's rows while the block runs.

    They reach their callers through JAX's cache, where one that is still being compiled is waited
    for. An error in the block, or in a compilation, cancels what has not begun.
    """
    inputs = bench.inputs["seen"][0]
    shapes = {bench.program(row): bench.shapes(row) for row in run.rows}
    jobs: list[tuple] = [(program.compile, params, inputs) for program, params in shapes.items()]
    for program in map(bench.program, run.routed):
        jobs.append((routing.compile_routing, program, shapes[program], inputs))
    if 1 in bench.timed:
        jobs += [(program.compile, *first(params, inputs, 1)) for program, params in shapes.items()]
    threads = ThreadPoolExecutor(THREADS)
    try:
        compiling = [threads.submit(*job) for job in jobs]
        yield
        for job in compiling:
            job.result()
    finally:
        threads.shutdown(cancel_futures=True)
