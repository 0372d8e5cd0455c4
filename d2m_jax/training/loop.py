"""The loop of one stage: a jitted step on pure trees, the host one step behind the device."""

import signal
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from d2m_jax import hosts
from d2m_jax.config import ConfigError, MeshConfig, StageConfig, to_json
from d2m_jax.data.protocol import Batches
from d2m_jax.sharding import batch_shards, make_mesh, put_batch, put_parameters
from d2m_jax.training.checkpoint import Checkpoints
from d2m_jax.training.metrics import Metrics, Window, matmul_peak
from d2m_jax.training.step import Loss, Step, trained
from d2m_jax.weights.named_arrays import fingerprint, shapes

Batch = dict[str, Any]  # arrays, or trees of them, with the batch in front


def train_stage(  # noqa: C901 (one loop, whose closures share its state)
    name: str,
    stage: StageConfig,
    *,
    loss: Loss,
    params: dict | Callable[[], dict],
    batches: Batches,
    run_directory: Path | str,
    constants: Any = (),
    held_out: Sequence[Batch] = (),
    encode: Callable[[Batch], Batch] = lambda batch: batch,
    seed: int = 0,
    flops_per_example: float = 0.0,
    sample: Callable[[dict, int], None] | None = None,
    keep: int = 2,
    mesh: Mesh | None = None,
) -> dict:
    """Train what `stage` selects of `params`; return all of them (the running average if any).

    Continues from the newest whole checkpoint in `run_directory`, exactly: the same seed ends with
    the same bits, however often the process was killed; a finished stage is read, not run. `params`
    must be the same at every start; a function that makes them saves the memory of those that
    train. What is one array in `params` and `constants` stays one. The loss sees `encode(batch)`,
    of arrays on the devices; `constants` reach the loss as arguments of the compiled step;
    `flops_per_example` counts a whole step's work for one example; `sample(params, step)` draws
    pictures. Raises ConfigError for a loss that is not finite, and keeps the last good checkpoint.
    On SIGTERM or SIGINT it saves and exits with 128 + the signal's number (143, 130): what
    schedulers read as "stopped, start me again".
    """
    run_directory = Path(run_directory)
    mesh = mesh or make_mesh(MeshConfig())
    check_batch(f"stages.{name}", stage, mesh)
    params = params() if callable(params) else params
    params, constants = put_parameters(mesh, (params, constants))
    program = Step(stage, loss, params, constants, mesh)
    state, frozen = program.start(params), program.frozen
    del params
    identity = {
        "stage": to_json(stage),
        "seed": seed,
        "parameters": shapes(state),
        "frozen": fingerprint(frozen),
        "constants": fingerprint(constants),
    }

    def whole() -> dict:
        return program.whole(trained(state), frozen, constants)

    checkpoints = Checkpoints(run_directory / "checkpoints" / name, identity, keep)
    start, progress = 0, {}
    if restored := checkpoints.restore(state):
        start, state, progress = restored.step, restored.state, restored.progress
    if start >= stage.steps:
        checkpoints.close()
        return whole()
    if start:
        batches.set_state(progress["batches"])
    _announce(name, stage, start, state, frozen)

    def put(batch: Batch) -> Batch:
        return encode(put_batch(mesh, batch))

    step_key, held_out_key = (_named_key(seed, f"{name}/{use}") for use in ("step", "held_out"))
    train_step = program.train()
    evaluate = _make_evaluate(program, [put(batch) for batch in held_out], held_out_key)
    metrics = Metrics(run_directory, name, stage.steps, start)
    window = Window(progress.get("window"))
    clock = _Clock(progress.get("seconds", 0.0), stage, flops_per_example, mesh)

    not_finite = partial(_not_finite, name, stage, checkpoints)
    stop = 0  # the number of a signal that any process got

    def read(step: int, values: dict) -> None:
        """Wait for a step that the device was given; its numbers go into the window."""
        values = jax.device_get(values)
        clock.tick()
        nonlocal stop
        stop = int(values.pop("signal")) or stop
        loss, norm = values["loss"], values["gradient_norm"]
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise not_finite(step, f"loss is {loss}, gradient norm {norm}")
        window.add(values)
        metrics.advance(step)

    def log(step: int, result: dict | None = None) -> None:
        """The means since the last logged step, and the held-out results where there are any."""
        nonlocal window
        metrics.write(step, window.means() | clock.rates() | (result or {}))
        window = Window()

    try:
        with _caught_signals() as caught, jax.set_mesh(mesh):
            pending, batch, no_signal = None, None, hosts.flags(mesh, 0)
            if start == 0 and held_out:
                batch = put(next(batches))
                arguments = state, frozen, constants, batch, step_key, no_signal
                with _compiling(mesh, train_step, arguments):
                    at_start = evaluate(trained(state), frozen, constants)
                metrics.write(0, {"loss": at_start["held_out"]} | at_start)
            for step in range(start + 1, stage.steps + 1):
                batch = batch or put(next(batches))
                signals = hosts.flags(mesh, caught[0]) if caught else no_signal
                state, values = train_step(state, frozen, constants, batch, step_key, signals)
                batch = None
                if pending:
                    read(*pending)
                    if _every(stage.log_every, pending[0]):
                        log(pending[0])
                pending = (step, values)
                evaluate_now, sample_now, save_now = due = _due(stage, step)
                if not (any(due) or stop):
                    continue
                read(*pending)
                pending = None
                result = {}
                if evaluate_now and held_out:
                    result = evaluate(trained(state), frozen, constants)
                    if not np.isfinite(result["held_out"]):
                        raise not_finite(step, f"held-out loss is {result['held_out']}")
                if evaluate_now or _every(stage.log_every, step):
                    log(step, result)
                if sample_now and sample:
                    sample(whole(), step)
                if save_now or stop:
                    progress = {
                        "batches": batches.get_state(),
                        "window": window.to_json(),
                        "seconds": clock.seconds,
                    }
                    try:
                        checkpoints.save(step, state, progress, result.get("held_out"))
                    except FloatingPointError as error:
                        raise not_finite(step, str(error)) from None
                if stop:
                    checkpoints.close()
                    stopped = f"stopped by {signal.Signals(stop).name} at step {step}, saved"
                    hosts.say(f"{name}: {stopped}; start again to go on")
                    raise SystemExit(128 + stop)
                clock.skip()
    finally:
        checkpoints.close()
        metrics.close()
    return whole()


@contextmanager
def _compiling(mesh: Mesh, program: Callable, arguments: tuple):
    """Compile a jitted program in a thread while the block compiles and runs another; its first
    call finds it in JAX's cache."""

    def compile_it():
        with jax.set_mesh(mesh):
            program.lower(*arguments).compile()

    with ThreadPoolExecutor(1) as threads:
        compiled = threads.submit(compile_it)
        yield
        compiled.result()


def _due(stage: StageConfig, step: int) -> tuple[bool, bool, bool]:
    """Whether to evaluate, to draw samples and to save after this step; 0 means at the end only,
    for samples never."""
    last = step == stage.steps
    return (
        last or _every(stage.evaluate_every, step),
        bool(stage.sample_every) and (last or _every(stage.sample_every, step)),
        last or _every(stage.checkpoint_every, step),
    )


def _every(count: int, step: int) -> bool:
    return count > 0 and step % count == 0


def check_batch(path: str, stage: StageConfig, mesh: Mesh) -> None:
    """Raise ConfigError where the batch cannot be cut over the mesh and into micro-batches; `path`
    is that of the stage in its run's config."""
    shards = batch_shards(mesh)
    parts = stage.optimizer.accumulate * shards
    if stage.optimizer.accumulate < 1 or stage.batch_size % parts:
        raise ConfigError(
            f"{path}.batch_size = {stage.batch_size}: expected a multiple of"
            f" optimizer.accumulate = {stage.optimizer.accumulate} times the mesh's"
            f" data · fsdp · expert = {shards}"
        )


def _named_key(seed: int, name: str) -> Array:
    return jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(name.encode())))


def _make_evaluate(step: Step, batches: list, key: Array) -> Callable[[dict, dict, Any], dict]:
    """Mean loss and metrics over the held-out batches, each with its own key, always the same."""
    one = step.evaluate()

    def evaluate(trainable: dict, frozen: dict, constants: Any):
        window = Window()
        for i, batch in enumerate(batches):
            window.add(jax.device_get(one(trainable, frozen, constants, batch, key, np.uint32(i))))
        return window.means()

    return evaluate


class _Clock:
    """Seconds spent in steps alone: without compilation, evaluation, sampling and saving."""

    def __init__(self, seconds: float, stage: StageConfig, flops_per_example: float, mesh: Mesh):
        self.seconds, self.batch_size = seconds, stage.batch_size
        self.flops_per_example = flops_per_example
        self.peak = matmul_peak(mesh, stage.dtype) if flops_per_example else 0.0
        self._mark: float | None = None
        self._steps, self._since = 0, 0.0

    def tick(self) -> None:
        """A step is done; the first after a pause only starts the clock."""
        now = time.perf_counter()
        if self._mark is not None:
            self.seconds += now - self._mark
            self._since += now - self._mark
            self._steps += 1
        self._mark = now

    def skip(self) -> None:
        """What happened since the last step does not count."""
        self._mark = time.perf_counter() if self._mark is not None else None

    def rates(self) -> dict[str, float]:
        """Rates since the last call, and all seconds of the stage."""
        rates = {"seconds": self.seconds}
        if self._steps:
            per_step = self._since / self._steps
            rates |= {
                "seconds_per_step": per_step,
                "examples_per_second": self.batch_size / per_step,
            }
            if self.peak:
                flops = self.flops_per_example * self.batch_size / per_step
                rates["model_flop_utilisation"] = flops / self.peak
        self._steps, self._since = 0, 0.0
        return rates


def _announce(name: str, stage: StageConfig, start: int, state: dict, frozen: dict) -> None:
    mine, others = (sum(a.size for a in jax.tree.leaves(t)) for t in (state["trainable"], frozen))
    resumed = f", going on from step {start}" if start else ""
    share = f"{mine:,} of {mine + others:,} parameters train"
    hosts.say(f"{name}: {stage.steps:,} steps of {stage.batch_size}, {share}{resumed}")


def _not_finite(
    name: str, stage: StageConfig, checkpoints: Checkpoints, step: int, what: str
) -> ConfigError:
    latest = checkpoints.latest_step()
    kept = "no checkpoint yet" if latest is None else f"checkpoint {latest} is kept"
    return ConfigError(
        f"stages.{name}, step {step}: {what}; {kept}; try a learning_rate below"
        f" {stage.optimizer.learning_rate:g} or a smaller clip than {stage.optimizer.clip:g}"
    )


@contextmanager
def _caught_signals():
    """A list that fills with the first SIGTERM or SIGINT; a second one acts as usual."""
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {}

    def catch(number: int, _: FrameType | None):
        caught.append(signal.Signals(number))
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
