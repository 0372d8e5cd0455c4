"""The loop: exact resume, kills, frozen parameters, accumulation, NaN, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from d2m_jax import hosts
from d2m_jax.config import ConfigError, MeshConfig, OptimizerConfig
from d2m_jax.distillation.objective import Objective
from d2m_jax.named_arrays import names
from d2m_jax.sharding import make_mesh, replicated
from d2m_jax.training.checkpoint import Checkpoints
from d2m_jax.training.loop import STOPS
from tests.training import toy

ROOT = Path(__file__).parents[2]


class Stop(Exception):
    """Stands for a crash."""


class CrashingStream(toy.Stream):
    """Fails when the batch after `last` is asked for."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def __next__(self):
        if self.position == self.last:
            raise Stop
        return super().__next__()


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def lines(directory):
    """metrics.jsonl without what a clock measured."""
    clocks = (
        "seconds",
        "seconds_per_step",
        "examples_per_second",
        "model_flop_utilisation",
        "input_wait",
    )
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in found]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, toy.run(directory, toy.stage(40))


def test_resume_equals_uninterrupted(uninterrupted, tmp_path):
    # Some checkpoints fall between logged steps (4, 8, …, and every evaluation at 10, 20, …).
    stage = toy.stage(40, checkpoint_every=5)
    for last in (7, 29, 30):
        with pytest.raises(Stop):
            toy.run(tmp_path, stage, batches=CrashingStream(last))
    params = toy.run(tmp_path, stage)
    assert same(params, uninterrupted[1])
    assert lines(tmp_path) == lines(uninterrupted[0])


def test_goes_on_in_other_parts(uninterrupted, tmp_path):
    """As on another number of devices: a batch in parts, activations computed again."""
    with pytest.raises(Stop):
        toy.run(tmp_path, toy.stage(40), batches=CrashingStream(25))
    stage = toy.stage(40)
    optimizer = replace(stage.optimizer, accumulate=4)
    other = replace(stage, optimizer=optimizer, remat=False, sample_every=0, checkpoint_every=3)
    for a, b in zip(
        *map(jax.tree.leaves, (toy.run(tmp_path, other), uninterrupted[1])), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=5e-6)  # sums in another order, 20 steps of Adam
    assert [line["step"] for line in lines(tmp_path)] == [
        line["step"] for line in lines(uninterrupted[0])
    ]


def test_it_learns_and_logs(uninterrupted):
    found = lines(uninterrupted[0])
    assert [line["step"] for line in found] == [0, 4, 8, 10, 12, 16, 20, 24, 28, 30, 32, 36, 40]
    validation = {line["step"]: line["validation"] for line in found if "validation" in line}
    assert list(validation) == [0, 10, 20, 30, 40]
    assert validation[40] < 0.9 * validation[0]
    assert all(np.isfinite(line["loss"]) and line["stage"] == "toy" for line in found)


def test_finished_stage_is_read(uninterrupted):
    params = toy.run(uninterrupted[0], toy.stage(40), batches=CrashingStream(0))
    assert same(params, uninterrupted[1])


def test_average_is_returned(tmp_path):
    stage = toy.stage(12, optimizer=OptimizerConfig(warmup=4, ema=0.0))
    last = toy.run(tmp_path / "last", stage)
    average = toy.run(tmp_path / "average", toy.stage(12))
    assert not np.allclose(last["out"]["kernel"], average["out"]["kernel"], atol=1e-4)


@pytest.mark.parametrize("wrong", [{"seed": 1}, {"stage": toy.stage(60)}])
def test_another_run_is_refused(uninterrupted, wrong):
    arguments = {"stage": toy.stage(40)} | wrong
    field = "seed is 0" if "seed" in wrong else "stage.steps is 40 there and 60 here"
    with pytest.raises(ConfigError, match=field):
        toy.run(uninterrupted[0], **arguments)


def test_other_frozen_parameters_are_refused(tmp_path):
    stage = toy.stage(10, train=("out.*",))
    toy.run(tmp_path, stage)
    params = toy.initial()
    params["body"][0]["bias"] += 1e-3
    with pytest.raises(ConfigError, match="frozen is"):
        toy.run(tmp_path, stage, params=params)


def test_frozen_stay_identical(tmp_path):
    before = jax.device_put(toy.initial(), replicated(make_mesh(MeshConfig())))
    stage = toy.stage(10, train=("body.*",), freeze=("*.bias",))
    after = toy.run(tmp_path, stage, params=before)
    for name, array in names(after).items():
        trains = name.startswith("body.") and name.endswith("kernel")
        assert bool((array == names(before)[name]).all()) != trains, name
    # The caller's arrays are not donated.
    assert np.isfinite(before["body"][0]["kernel"]).all()


def test_accumulation_equals_one_batch(tmp_path):
    results = []
    for parts in (1, 4):
        # Adam hides the scale of gradients: compare the logged norm too.
        optimizer = OptimizerConfig(warmup=4, accumulate=parts, clip=0.1)
        directory = tmp_path / str(parts)
        params = toy.run(directory, toy.stage(12, optimizer=optimizer))
        results.append((params, [line.get("gradient_norm", 0) for line in lines(directory)]))
    for a, b in zip(*(jax.tree.leaves(params) for params, _ in results), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)


def test_batch_that_does_not_divide(tmp_path):
    optimizer = OptimizerConfig(accumulate=3)
    with pytest.raises(ConfigError, match="toy.batch_size = 8"):
        toy.run(tmp_path, toy.stage(10, optimizer=optimizer))


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Poisoned(toy.Stream):
        def __next__(self):
            batch = super().__next__()
            return batch | {"y": batch["y"] * np.nan} if self.position == 17 else batch

    with pytest.raises(
        ConfigError, match=r"step 17: loss is nan, gradient norm is nan; checkpoint 10 is kept"
    ) as error:
        toy.run(tmp_path, toy.stage(40), batches=Poisoned())
    assert "\n" not in str(error.value)
    kept = [path.name for path in (tmp_path / "checkpoints" / "toy").iterdir()]
    assert kept == ["10"]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of the learning rate
def test_update_that_overflows_is_not_saved(tmp_path):
    # Loss and gradient of step 10 are finite, the parameters after it are not.
    optimizer = OptimizerConfig(learning_rate=1e39, schedule="constant", warmup=0)
    stage = toy.stage(40, optimizer=optimizer, checkpoint_every=1, evaluate_every=100)
    with pytest.raises(ConfigError, match="step 1: .* is not finite; no checkpoint yet"):
        toy.run(tmp_path, stage)


def test_samples_are_drawn(tmp_path):
    drawn = []

    def sample(params, step):
        drawn.append((step, float(params["out"]["bias"][0])))
        Image.new("RGB", (3, 2), "red").save(tmp_path / "drawn.png")
        return tmp_path / "drawn.png"

    params = toy.run(tmp_path, toy.stage(10, sample_every=4), sample=sample)
    assert [step for step, _ in drawn] == [4, 8, 10]
    assert drawn[-1][1] == float(params["out"]["bias"][0])
    (file,) = (tmp_path / "tensorboard").glob("*/events*")
    assert file.read_bytes().count(b"samples") == 3 and b"PNG" in file.read_bytes()


def test_waiting_for_the_input_is_told(tmp_path):
    class Slow(toy.Stream):
        def __next__(self):
            time.sleep(0.05)
            return super().__next__()

    toy.run(tmp_path, toy.stage(10, log_every=5), batches=Slow())
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    # A busy machine makes steps longer, so the share smaller; the seconds stay.
    assert 0 < last["input_wait"] <= 1
    assert last["input_wait"] * last["seconds_per_step"] >= 0.03


def test_sigterm_saves_and_exits(uninterrupted, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(hosts, "say", said.append)  # capfd may lose what a thread writes

    def told():
        return [line for line in said if line.startswith("SIG")]

    class Terminated(toy.Stream):
        def __next__(self):
            if self.position == 16:
                os.kill(os.getpid(), signal.SIGTERM)
                deadline = time.monotonic() + 10
                while not told() and time.monotonic() < deadline:  # before a step ends
                    time.sleep(0.01)
                assert told()
            return super().__next__()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        toy.run(tmp_path, toy.stage(40), batches=Terminated())
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert told() == [f"SIGTERM: {STOPS}"] and signal.set_wakeup_fd(-1) == -1
    # Step 17 was given to the device with the signal, and is read after step 18 was.
    assert (tmp_path / "checkpoints" / "toy" / "18").is_dir()
    assert same(toy.run(tmp_path, toy.stage(40)), uninterrupted[1])
    assert lines(tmp_path) == lines(uninterrupted[0])


@pytest.mark.parametrize("step", [39, 40])
def test_a_signal_in_the_last_steps_stops_before_what_follows(uninterrupted, tmp_path, capfd, step):
    """Their flags were read, or will never be: the stage is whole, and nothing comes after it."""

    class Terminated(toy.Stream):
        def __next__(self):
            if self.position == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    with pytest.raises(SystemExit) as stopped:
        toy.run(tmp_path, toy.stage(40), batches=Terminated())
    assert stopped.value.code == 143
    assert "toy: stopped by SIGTERM at" in capfd.readouterr().err
    assert (tmp_path / "checkpoints" / "toy" / "40").is_dir()
    assert same(toy.run(tmp_path, toy.stage(40)), uninterrupted[1])


def test_a_signal_while_the_last_validation_runs_is_not_lost(tmp_path, capfd):
    def sample(params, step):
        if step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as stopped:
        toy.run(tmp_path, toy.stage(10, sample_every=10), sample=sample)
    assert stopped.value.code == 130
    assert "toy: stopped by SIGINT at its end, the same command" in capfd.readouterr().err


def test_keys(tmp_path):
    """Every step draws anew, every evaluation the same."""

    def draw(batch, key):
        return toy.draw(batch, key) | {"draw": jax.random.uniform(key, batch["y"].shape)}

    def means(params, constants, batch):
        return toy.means(params, constants, batch) | {"draw": batch["draw"].mean()}

    start = toy.loss.start | {"draw": jnp.float32(0)}
    loss = Objective(draw, means, lambda means, _: (means["output"], means), start)
    toy.run(tmp_path, toy.stage(20, log_every=1), loss=loss)
    found = lines(tmp_path)
    assert len({line["draw"] for line in found[1:]}) == 20
    assert len({line["validation_draw"] for line in found if "validation" in line}) == 1


def test_the_step_compiles_once(tmp_path):
    traced = []

    def means(params, constants, batch):
        traced.append(batch["x"].shape)
        return toy.means(params, constants, batch)

    toy.run(tmp_path, toy.stage(20), loss=replace(toy.loss, means=means))
    assert sorted(traced) == [(8, 4), (16, 4)]


@pytest.mark.parametrize(
    ("steps", "waits"),
    [
        (120, (0.05, 0.2)),
        pytest.param(
            4000, np.random.default_rng(0).uniform(0, 1.5, 20), marks=pytest.mark.slow, id="20"
        ),
    ],
)
def test_sigkill_at_any_moment(steps, waits, tmp_path):
    """Kills by the clock, anywhere in the run; it ends with the bits of a run without."""
    directory, stage = tmp_path / "killed", toy.stage(steps, checkpoint_every=5)
    command = [sys.executable, "-m", "tests.training.toy", str(directory), str(steps)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    metrics = directory / "metrics.jsonl"
    reached = []
    for wait in waits:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        written = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and not (
            metrics.exists() and metrics.stat().st_size not in (0, written)
        ):
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        reached.append(b"finished" in process.communicate()[0])
    assert sum(reached) < len(waits) - 1, "kills came too late: make the run longer"
    killed = toy.run(directory, stage)
    whole = toy.run(tmp_path / "whole", stage)
    assert same(killed, whole)
    assert lines(directory) == lines(tmp_path / "whole")


def test_mesh_of_several_devices(tmp_path):
    """Batches sharded over data and fsdp give one device's result (a process with four CPUs)."""
    program = (
        "import sys, jax, pathlib, numpy as np; from tests.training import toy;"
        "from d2m_jax.config import MeshConfig; from d2m_jax.sharding import make_mesh;"
        "params = toy.run(pathlib.Path(sys.argv[1]), toy.stage(10),"
        " mesh=make_mesh(MeshConfig(data=2, fsdp=2)));"
        "print(float(np.abs(params['out']['kernel']).sum()))"
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "4",
    }
    command = [sys.executable, "-c", program, str(tmp_path / "four")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    one = toy.run(tmp_path / "one", toy.stage(10))
    expected = float(jnp.abs(one["out"]["kernel"]).sum())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


def test_compiling_for_another_size_is_no_part_of_the_rate(tmp_path):
    """Every size of batches is a program of its own, whose compilation takes seconds."""

    class Sizes(toy.Stream):
        def __next__(self):
            batch = super().__next__()
            small = self.position in (5, 6, 9)
            return {name: a[:4] if small else a for name, a in batch.items()}

    def slow(params, constants, batch):
        if batch["x"].shape[0] == 4:
            time.sleep(0.5)  # while it is traced
        return toy.means(params, constants, batch)

    loss = replace(toy.loss, means=slow)
    toy.run(tmp_path, toy.stage(12, log_every=12, evaluate_every=0), loss=loss, batches=Sizes())
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["seconds_per_step"] < 0.1 and last["seconds"] < 0.5


def test_a_resume_holds_no_second_state(tmp_path, monkeypatch):
    """What is restored takes its places from shapes: no arrays lie there meanwhile."""
    asked = []
    restore = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda self, like: asked.append(like) or restore(self, like)
    )
    toy.run(tmp_path, toy.stage(2))
    toy.run(tmp_path, toy.stage(2))
    assert len(asked) == 2
    for leaf in jax.tree.leaves(asked):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
