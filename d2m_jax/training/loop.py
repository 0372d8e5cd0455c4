"""The loop of one stage: a jitted step on pure trees, the host one step behind the device."""

import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from d2m_jax import hosts
from d2m_jax.config import ConfigError, MeshConfig, StageConfig, to_json
from d2m_jax.data.protocol import Batches
from d2m_jax.distillation.fixed_times import OFFSETS, FixedTimes
from d2m_jax.distillation.fixed_times import metrics as at_fixed_times
from d2m_jax.distillation.objective import Objective
from d2m_jax.keys import named_key
from d2m_jax.named_arrays import fingerprint, shapes
from d2m_jax.sharding import batch_shards, make_mesh, put_batch, put_parameters, put_whole
from d2m_jax.training.checkpoint import Checkpoints, NoCheckpoints, Restored, stage_to_go_on
from d2m_jax.training.metrics import Board, Metrics, Window, matmul_peak
from d2m_jax.training.signals import caught_signals
from d2m_jax.training.step import Step, trained

STOPS = (
    "it stops after the steps that have begun, or when what compiles is compiled, and keeps what it"
    " has; once more stops it at once"
)
RESUMES = "the same command goes on from there"
Batch = dict[str, Any]  # arrays, or trees of them, with the batch in front


def train_stage(
    name: str,
    stage: StageConfig,
    *,
    loss: Objective,
    params: dict | Callable[[], dict],
    batches: Batches,
    run_directory: Path | str | None,
    constants: Any = (),
    validation: Sequence[Batch] = (),
    fixed: FixedTimes | None = None,
    encode: Callable[[Batch], Batch] = lambda batch: batch,
    seed: int = 0,
    flops_per_example: float = 0.0,
    sample: Callable[[dict, int], Path | None] | None = None,
    boards: Sequence[Board] = (),
    keep: int = 2,
    mesh: Mesh | None = None,
) -> dict:
    """Train what `stage` selects of `params`; return all of them (the running average if any).

    Continues from the newest whole checkpoint in `run_directory`, exactly: the same seed ends with
    the same bits, however often the process was killed; a finished stage is read, not run. `params`
    must be the same at every start; a function that makes them saves the memory of those that
    train. What is one array in `params` and `constants` stays one. The loss sees `encode(batch)`,
    of arrays on the devices; `constants` reach the loss as arguments of the compiled step; `fixed`
    is what else the validation measures; `flops_per_example` counts a whole step's work for one
    example; `sample(params, step)` may draw a picture, and gives its file. Raises ConfigError for a
    loss that is not finite, and keeps the last good checkpoint. On SIGTERM or SIGINT it saves and
    exits with 128 + the signal's number (143, 130): what schedulers read as "stopped, start me
    again". Without a run directory nothing is kept, and on SIGINT it returns what it has.
    """
    run_directory = None if run_directory is None else Path(run_directory)
    mesh = mesh or make_mesh(MeshConfig())
    check_batch(f"stages.{name}", stage, mesh)
    params = params() if callable(params) else params
    params, constants = put_parameters(mesh, (params, constants))
    whole = sum(a.size for a in jax.tree.leaves(params))
    program = Step(stage, loss, params, constants, mesh)
    frozen = program.frozen
    checkpoints = _checkpoints(name, stage, seed, program, constants, run_directory, keep)
    # What was saved is read in the place of the first state: there are never two.
    found = checkpoints.restore(program.state) or Restored(0, program.start(params), {})
    start, state, progress = found.step, found.state, found.progress
    del params, found
    if start >= stage.steps:
        checkpoints.close()
        return program.whole(trained(state), frozen, constants)
    if start:
        batches.set_state(progress["batches"])
    _announce(name, stage, start, state, whole)

    def put(batch: Batch) -> Batch:
        return encode(put_batch(mesh, batch))

    # The second name is older than what it names now: another would give other noise.
    keys = [put_whole(mesh, named_key(seed, f"{name}/{use}")) for use in ("step", "held_out")]
    train_step = program.train()
    validate = _Validation(program, [put(batch) for batch in validation], keys[1], fixed)
    clock = _Clock(progress.get("seconds", 0.0), stage, flops_per_example, mesh)
    metrics = Metrics(run_directory, name, stage.steps, start, boards)
    journal = _Journal(name, stage, checkpoints, metrics, clock, Window(progress.get("window")))
    try:
        # Inside, what crosses between host and devices is said to: anything else is a mistake.
        with caught_signals(STOPS) as caught, jax.set_mesh(mesh), jax.transfer_guard("disallow"):
            batch, no_signal = None, hosts.flags(mesh, 0)
            if start == 0 and validation:
                batch = put(clock.waiting(batches))
                first = state, frozen, constants, batch, keys[0], no_signal
                with _compiling(mesh, train_step, first):
                    at_start = validate(trained(state), frozen, constants)
                del first  # its batch is to be free after the step
                metrics.write(0, {"loss": at_start["validation"]} | at_start)
            for step in range(start + 1, stage.steps + 1):
                batch = batch or put(clock.waiting(batches))
                signals = hosts.flags(mesh, caught[0]) if caught else no_signal
                with jax.profiler.StepTraceAnnotation(name, step_num=step):
                    state, values = train_step(state, frozen, constants, batch, keys[0], signals)
                batch = None
                journal.begun(step, values)
                due = _due(stage, step)
                if not (any(due) or journal.stop):
                    continue
                journal.wait()
                result = validate(trained(state), frozen, constants) if due.validate else {}
                journal.judge(step, result, due.validate)
                if due.sample and sample:
                    with jax.transfer_guard("allow"):
                        drawn = sample(program.whole(trained(state), frozen, constants), step)
                        metrics.picture(step, drawn)
                if due.save or journal.stop:
                    with jax.transfer_guard("allow"):
                        journal.save(step, state, batches.get_state(), result.get("validation"))
                if journal.stops(step):
                    break
                clock.skip()
            journal.ends(caught)
    finally:
        checkpoints.close()
        metrics.close()
    return program.whole(trained(state), frozen, constants)


def _checkpoints(
    name: str,
    stage: StageConfig,
    seed: int,
    program: Step,
    constants: Any,
    run_directory: Path | None,
    keep: int,
) -> Checkpoints | NoCheckpoints:
    """Those of a stage, and what one must have been made with to be continued."""
    if run_directory is None:
        return NoCheckpoints()
    identity = {
        "stage": to_json(stage_to_go_on(stage)),
        "seed": seed,
        "parameters": shapes(program.state),
        "frozen": fingerprint(program.frozen),
        "constants": fingerprint(constants),
    }
    return Checkpoints(run_directory / "checkpoints" / name, identity, keep)


class _Journal:
    """What the host knows of a stage: numbers since the last logged step, whether to stop, and what
    of all that a checkpoint needs."""

    def __init__(
        self,
        name: str,
        stage: StageConfig,
        checkpoints: Checkpoints | NoCheckpoints,
        metrics: Metrics,
        clock: "_Clock",
        window: Window,
    ):
        self.name, self.stage, self.checkpoints = name, stage, checkpoints
        self.metrics, self.clock, self.window = metrics, clock, window
        self.stop = 0  # the number of a signal that any process got
        self._pending: tuple[int, dict[str, Array]] | None = None

    def begun(self, step: int, values: dict[str, Array]) -> None:
        """The device has a step; the one before is read while it runs."""
        before = self.wait()
        if before and _every(self.stage.log_every, before):
            self.log(before)
        self._pending = step, values

    def wait(self) -> int:
        """Until the step that the device has is done; its numbers go into the window. Which step,
        0 where there is none."""
        if self._pending is None:
            return 0
        (step, values), self._pending = self._pending, None
        found = jax.device_get(values)
        self.clock.tick()
        self.stop = int(found.pop("signal")) or self.stop
        self.check_finite(step, {"loss": found["loss"], "gradient norm": found["gradient_norm"]})
        self.window.add(found)
        self.metrics.advance(step)
        return step

    def judge(self, step: int, result: dict[str, Any], validated: bool) -> None:
        """A step's validation, if any: it is logged, and must be finite."""
        if "validation" in result:
            self.check_finite(step, {"validation loss": result["validation"]})
        if validated or _every(self.stage.log_every, step):
            self.log(step, result)

    def log(self, step: int, result: dict[str, Any] | None = None) -> None:
        """The means since the last logged step, and the validation's results where there are
        any."""
        self.metrics.write(step, self.window.means() | self.clock.rates() | (result or {}))
        self.window = Window()

    def save(self, step: int, state: dict, position: Any, validation: float | None) -> None:
        """A checkpoint; of a run that is to stop it is on disk when this returns, and told."""
        progress = {
            "batches": position,
            "window": self.window.to_json(),
            "seconds": self.clock.seconds,
        }
        try:
            self.checkpoints.save(step, state, progress, validation)
        except FloatingPointError as error:
            raise self._not_finite(step, str(error)) from None
        if self.stop and isinstance(self.checkpoints, Checkpoints):
            self.checkpoints.close()
            stopped = f"stopped by {signal.Signals(self.stop).name} at step {step}, saved"
            hosts.say(f"{self.name}: {stopped}; {RESUMES}")

    def stops(self, step: int) -> bool:
        """Whether the loop ends here: on Ctrl-C where nothing is kept, to give what there is. Else
        a signal ends the process, which has saved: SystemExit."""
        if self.stop == signal.SIGINT and isinstance(self.checkpoints, NoCheckpoints):
            hosts.say(f"{self.name}: interrupted at step {step} of {self.stage.steps}")
            return True
        if self.stop:
            raise SystemExit(128 + self.stop)
        return False

    def ends(self, caught: Sequence[int]) -> None:
        """SystemExit for a signal of any process that came too late for the last step's flags."""
        if isinstance(self.checkpoints, NoCheckpoints):
            return
        if stop := max(hosts.gather(int(max(caught, default=0)))):
            hosts.say(f"{self.name}: stopped by {signal.Signals(stop).name} at its end, {RESUMES}")
            raise SystemExit(128 + stop)

    def check_finite(self, step: int, values: dict[str, Any]) -> None:
        """ConfigError that says what to try where a number is not finite."""
        if not all(np.isfinite(value) for value in values.values()):
            said = ", ".join(f"{name} is {value}" for name, value in values.items())
            raise self._not_finite(step, said)

    def _not_finite(self, step: int, what: str) -> ConfigError:
        latest = self.checkpoints.latest_step()
        kept = "no checkpoint yet" if latest is None else f"checkpoint {latest} is kept"
        optimizer = self.stage.optimizer
        return ConfigError(
            f"stages.{self.name}, step {step}: {what}; {kept}; try a learning_rate below"
            f" {optimizer.learning_rate:g} or a smaller clip than {optimizer.clip:g}"
        )


class _Validation:
    """Mean loss and metrics over batches, each with its own key, always the same; and errors at
    fixed times where these are asked for. Nothing without batches."""

    def __init__(self, step: Step, batches: list[Batch], key: Array, fixed: FixedTimes | None):
        self._one, self._batches = step.evaluate(), batches
        self._fixed = None if fixed is None else step.at_fixed_times(fixed)
        sizes = [len(jax.tree.leaves(batch)[0]) for batch in batches]
        with jax.set_mesh(step.mesh):
            self._keys = [jax.random.fold_in(key, i) for i in range(len(batches))]
            self._firsts = [
                put_whole(step.mesh, np.int32(sum(sizes[:i]))) for i in range(len(batches))
            ]
            self._offsets = {
                name: put_whole(step.mesh, np.float32(offset)) for name, offset in OFFSETS.items()
            }

    def __call__(self, trainable: dict, frozen: dict, constants: Any) -> dict[str, Any]:
        if not self._batches:
            return {}
        window, given = Window(), (trainable, frozen, constants)
        for batch, key in zip(self._batches, self._keys, strict=True):
            window.add(jax.device_get(self._one(*given, batch, key)))
        found = window.means()
        if self._fixed is None:
            return found
        for name, offset in self._offsets.items():
            sums = Window()
            for batch, key, first in zip(self._batches, self._keys, self._firsts, strict=True):
                sums.add(jax.device_get(self._fixed(*given, batch, key, first, offset)))
            found |= at_fixed_times(name, sums.sums)
        return found


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


class _Due(NamedTuple):
    """What there is to do after a step."""

    validate: bool
    sample: bool
    save: bool


def _due(stage: StageConfig, step: int) -> _Due:
    """0 means at the end only, for samples never."""
    last = step == stage.steps
    return _Due(
        validate=last or _every(stage.evaluate_every, step),
        sample=bool(stage.sample_every) and (last or _every(stage.sample_every, step)),
        save=last or _every(stage.checkpoint_every, step),
    )


def _every(count: int, step: int) -> bool:
    return count > 0 and step % count == 0


def check_batch(path: str, stage: StageConfig, mesh: Mesh) -> None:
    """Raise ConfigError where the batch cannot be cut over the mesh and into micro-batches; `path`
    is that of the stage in its run's config."""
    shards, accumulate = batch_shards(mesh), stage.optimizer.accumulate
    if accumulate < 1 or stage.batch_size % (accumulate * shards):
        factors = [f"optimizer.accumulate = {accumulate}"] if accumulate != 1 else []
        if shards != 1:
            factors.append(f"the mesh's data · fsdp · expert = {shards}")
        found = f"{path}.batch_size = {stage.batch_size}"
        raise ConfigError(f"{found}: expected a multiple of " + " times ".join(factors))


class _Clock:
    """Seconds spent in steps alone: without compilation, evaluation, sampling and saving."""

    def __init__(self, seconds: float, stage: StageConfig, flops_per_example: float, mesh: Mesh):
        self.seconds, self.batch_size = seconds, stage.batch_size
        self.flops_per_example = flops_per_example
        self.peak = matmul_peak(mesh, stage.dtype) if flops_per_example else 0.0
        self._mark: float | None = None
        self._steps, self._since, self._waited = 0, 0.0, 0.0
        self._sizes: frozenset[tuple] = frozenset()  # that batches had
        self._compiles = False

    def waiting(self, batches: Batches) -> Batch:
        """The next batch, whose time is the input's."""
        start = time.perf_counter()
        batch = next(batches)
        if self._mark is not None:
            self._waited += time.perf_counter() - start
        size = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        self._compiles, self._sizes = size not in self._sizes, self._sizes | {size}
        return batch

    def tick(self) -> None:
        """A step is done; the first after a pause, or while a program was compiled, only starts the
        clock."""
        now = time.perf_counter()
        if self._compiles:  # the program of a size that is new
            self._mark, self._compiles = None, False
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
                "input_wait": self._waited / self._since,  # share of the time
            }
            if self.peak:
                flops = self.flops_per_example * self.batch_size / per_step
                rates["model_flop_utilisation"] = flops / self.peak
        self._steps, self._since, self._waited = 0, 0.0, 0.0
        return rates


def _announce(name: str, stage: StageConfig, start: int, state: dict, whole: int) -> None:
    mine = sum(a.size for a in jax.tree.leaves(state["trainable"]))
    resumed = f", going on from step {start}" if start else ""
    share = f"{mine:,} of {whole:,} parameters are trained"
    hosts.say(
        f"{name}: {stage.steps:,} steps of {stage.batch_size} examples, {share}{resumed}; the first"
        " step is compiled before it runs"
    )
