"""Programs compiled in threads: found by those who run them, given up where the report ends."""

import logging
import time
from dataclasses import replace

import jax
import pytest

from d2m_jax.evaluate import latency, noisy, routing
from d2m_jax.report import ahead, rows
from d2m_jax.report.measure import Bench


@pytest.fixture
def run_and_bench(make_run, tmp_path):
    """The run with its main student alone, and what measures it."""
    run = rows.read(make_run())
    run = replace(run, students=run.students[-1:])
    return run, Bench(run, tmp_path / "evaluation", {})


def test_what_is_compiled_ahead_is_not_compiled_again(run_and_bench, monkeypatch, caplog):
    run, bench = run_and_bench
    inputs = bench.inputs["seen"][0]
    monkeypatch.setattr(latency, "ROUNDS", 1)
    jax.clear_caches()  # another file of tests may have compiled the same programs
    caplog.set_level(logging.DEBUG, "jax._src.dispatch")
    with ahead.compiled_ahead(run, bench):
        pass
    # teacher, MoE and MoB in batches and alone; the routing of the latter two
    assert compiled(caplog) == {"_forward": 6, "_route": 2}
    caplog.clear()
    models = [(bench.program(row), bench.params(row)) for row in run.rows]
    for program, params in models:
        noisy.velocities(program, params, [inputs])
    for batch in (1, bench.batch):
        latency.milliseconds(models, inputs, batch)
    for row in run.routed:
        routing.measure(bench.program(row), bench.params(row), [inputs])
    assert compiled(caplog) == {"_forward": 0, "_route": 0}


def compiled(caplog) -> dict[str, int]:
    """How often the programs of a report were compiled since the log was cleared."""
    said = [record.getMessage() for record in caplog.records]
    done = [line for line in said if line.startswith("Finished XLA compilation of")]
    return {name: sum(f"jit({name})" in line for line in done) for name in ("_forward", "_route")}


class Killed(BaseException):
    """Stands for a signal that no one can catch."""


def test_an_error_cancels_what_has_not_begun(run_and_bench, monkeypatch):
    begun = []

    def slow(*model):
        begun.append(model)
        time.sleep(0.2)

    monkeypatch.setattr(noisy.Program, "compile", slow)
    with pytest.raises(Killed), ahead.compiled_ahead(*run_and_bench):
        raise Killed
    assert len(begun) <= ahead.THREADS

    def fails(*model):
        raise ValueError("no such program")

    monkeypatch.setattr(noisy.Program, "compile", fails)
    failing = ahead.compiled_ahead(*run_and_bench)
    with pytest.raises(ValueError, match="no such program"), failing:
        pass
