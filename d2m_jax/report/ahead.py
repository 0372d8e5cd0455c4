"""The programs of a report, compiled in threads while its images are drawn and judged."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from d2m_jax.evaluate import routing
from d2m_jax.evaluate.held_out import Inputs, compile_forward
from d2m_jax.report.rows import Run

THREADS = 2  # beside the one that measures: tracing holds Python's lock, compiling does not


@contextmanager
def compiled_ahead(run: Run, inputs: Inputs) -> Iterator[None]:
    """Compile all forwards and routings of a run's rows while the block runs.

    They reach their callers through JAX's cache, where one that is still being compiled is waited
    for. An error in the block, or in a compilation, cancels what has not begun.
    """
    models = {row.config: row.params for row in run.rows}
    one = {name: array[:1] for name, array in inputs.items()}
    jobs = [(compile_forward, *model, inputs) for model in models.items()]
    jobs += [(routing.compile_routing, row.config, row.params, inputs) for row in run.routed]
    jobs += [(compile_forward, *model, one) for model in models.items()]
    threads = ThreadPoolExecutor(THREADS)
    try:
        compiling = [threads.submit(*job) for job in jobs]
        yield
        for job in compiling:
            job.result()
    finally:
        threads.shutdown(cancel_futures=True)
