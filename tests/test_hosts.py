"""Real processes over loopback: how they start, agree, save and restore, and end when one fails.

What the processes do is in functions of this file, which `together` starts in each of them.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d2m_jax import hosts
from d2m_jax.config import ConfigError, FluxConfig, ModelConfig, StackConfig
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import fingerprint, names
from d2m_jax.training.checkpoint import Checkpoints
from d2m_jax.weights.directory import model_directory

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds after which processes that hang are killed; free cores need ten


@dataclass(frozen=True)
class Ended:
    """How a process ended: -9 for one that was killed."""

    code: int
    out: str
    err: str


def together(
    work: Callable, *arguments, processes: int, devices: int = 1, only: tuple[int, ...] = ()
) -> list[Ended]:
    """work(*arguments) in so many processes, of which `only` some are started, on CPU devices."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = (
        f"import faulthandler; faulthandler.dump_traceback_later({PATIENCE - 10});"
        f"from {work.__module__} import {work.__name__} as work; work(*{arguments!r})"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", command],
            cwd=ROOT,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(process),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in only or range(processes)
    ]
    end = time.monotonic() + PATIENCE
    ended = []
    for process in running:
        try:
            said = process.communicate(timeout=max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()
        ended.append(Ended(process.returncode, *said))
    return ended


def assert_all_ended_well(ended: list[Ended]) -> None:
    assert not any(each.code for each in ended), "\n".join(each.err for each in ended)


def whole(step: int) -> dict:
    """The arrays of a checkpoint, on the host; noise does not compress."""
    noise = np.random.default_rng(step).normal(size=(16, 640)).astype(np.float32)
    return {
        "kernel": noise,
        "half": {"kernel": noise[:, ::2].astype(jnp.bfloat16)},
        "step": np.int32(step),
    }


CUTS = {"kernel": (None, "x"), "half": {"kernel": ("x",)}, "step": ()}


def mesh_of(devices: list) -> Mesh:
    return Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))


def on_mesh(tree: dict, mesh: Mesh) -> dict:
    def put(array, cut):
        array, sharding = np.asarray(array), NamedSharding(mesh, PartitionSpec(*cut))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return jax.tree.map(put, tree, CUTS)


def assert_holds(tree: dict, step: int) -> None:
    """Every shard here is a part of what was saved."""
    expected = names(whole(step))
    for name, array in names(tree).items():
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected[name])[shard.index])


def restore(directory: str, step: int, mesh: Mesh) -> None:
    checkpoints = Checkpoints(Path(directory), {"seed": 0})
    restored = checkpoints.restore(on_mesh(whole(99), mesh))
    assert restored.step == step == checkpoints.latest_step()
    assert restored.progress == {"position": 10 * step}
    assert_holds(restored.state, step)
    checkpoints.close()


def save(directory: str, steps: tuple[int, ...], mesh: Mesh) -> None:
    checkpoints = Checkpoints(Path(directory), {"seed": 0})
    for step in steps:
        checkpoints.save(step, on_mesh(whole(step), mesh), {"position": 10 * step}, None)
    checkpoints.close()


# Small, and its kernels' last axis is cut by 2.
CONFIG = ModelConfig(
    transformer=FluxConfig(
        in_channels=12,
        vec_in_dim=8,
        context_in_dim=8,
        hidden_size=16,
        num_heads=1,
        axes_dim=(4, 6, 6),
        double=(),
        single=(StackConfig(2),),
    )
)


def parameters() -> dict:
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: random.normal(size=a.shape).astype(np.float32), abstract(CONFIG.transformer)
    )


# ---- in one process


def test_a_plain_machine_starts_alone(monkeypatch):
    """At once: without an environment that names others nothing is looked up."""

    def never(*_, **__):
        raise AssertionError("looked up")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(socket, "gethostbyname", never)
    begin = time.monotonic()
    hosts.start()
    # A pod, or the only task of a SLURM step, is no cluster either, and JAX is not asked.
    monkeypatch.setattr(jax.distributed, "initialize", never)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    hosts.start()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    hosts.start()
    assert time.monotonic() - begin < 1
    assert hosts.count() == 1 and hosts.first()
    assert hosts.gather("a") == ["a"] and hosts.by_first(lambda: "b") == "b"
    hosts.barrier("c")
    hosts.agree({"config": 1})


def test_what_jax_says_and_holds_is_known_still():
    """Private or without a promise: where this fails, hosts.py has to follow a newer JAX."""
    with pytest.raises(RuntimeError, match=hosts.TOO_LATE):
        jax.devices()
        jax.distributed.initialize("localhost:1", 1, 0)
    alone = "import jax; jax.distributed.initialize()"
    told = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True)
    assert told.returncode and f"ValueError: coordinator_address {hosts.UNDEFINED}" in told.stderr
    held = {"client", "service", "coordinator_address", "process_id", "num_processes"}
    assert held <= set(dir(hosts._jax()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "process: expected with coordinator and processes"),
        ((None, 2, 0), "coordinator: expected with processes and process"),
        (("host", 2, 0), "coordinator = 'host': expected HOST:PORT"),
        (("host:1", 0, 0), "processes = 0: expected at least 1"),
        (("host:1", 2, 2), "process = 2: expected 0 to 1"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        hosts.start(*arguments)


def test_environment_that_cannot_be(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES = 'two': expected a number"):
        hosts.start()


def other_meshes(directory):
    """8 devices, then 4, then 1."""
    save(f"{directory}/run", (1,), mesh_of(jax.devices()))
    restore(f"{directory}/run", 1, mesh_of(jax.devices()[:4]))
    save(f"{directory}/run", (2,), mesh_of(jax.devices()[:4]))
    restore(f"{directory}/run", 2, mesh_of(jax.devices()[:1]))
    restore(f"{directory}/run", 2, mesh_of(jax.devices()))


def test_a_checkpoint_fits_other_meshes(tmp_path):
    assert_all_ended_well(together(other_meshes, str(tmp_path), processes=1, devices=8))


# ---- in several


def two_processes(directory, expected):
    with hosts.joined():
        assert jax.process_count() == 2 and jax.device_count() == 4
        hosts.agree({"config": {"steps": 100}})
        me = jax.process_index()
        assert hosts.gather(me) == [0, 1]
        assert hosts.by_first(lambda: 5 + me) == 5
        assert hosts.by_first(lambda: hosts.gather(hosts.count())) == [1]  # waits for nobody
        with pytest.raises(ConfigError, match="only process 0 looks"):
            hosts.by_first(lambda: (_ for _ in ()).throw(ConfigError("only process 0 looks")))

        mesh = mesh_of(jax.devices())
        assert int(jnp.max(hosts.flags(mesh, 0))) == 0
        assert int(jnp.max(hosts.flags(mesh, signal.SIGTERM * me))) == signal.SIGTERM

        state = on_mesh(whole(1), mesh)
        assert fingerprint(state) == expected
        state["half"]["kernel"] = state["half"]["kernel"].at[11, 3].set(jnp.nan)
        with pytest.raises(FloatingPointError, match="half.kernel is not finite"):
            fingerprint(state)

        restore(f"{directory}/alone", 1, mesh)
        save(f"{directory}/run", (1, 2), mesh)

        def cut(name, shape):
            even = bool(shape) and shape[-1] % 4 == 0
            return NamedSharding(
                mesh, PartitionSpec(*[None] * (len(shape) - 1), "x") if even else PartitionSpec()
            )

        config, params = model_directory.load(f"{directory}/model", sharding=cut)
        assert not params["img_in"]["kernel"].is_fully_addressable
        model_directory.save(f"{directory}/by_two", config, params)
        with pytest.raises(ConfigError, match="exists; expected a free name"):
            model_directory.save(directory, config, params)
        # What every process has whole, the first writes.
        model_directory.save(f"{directory}/by_first", config, parameters())


def four_processes(directory):
    with hosts.joined():
        restore(f"{directory}/run", 1, mesh_of(jax.devices()))


def test_processes_save_and_restore(tmp_path):
    """1 process → 2 → 4 → 1: the newest checkpoint is damaged before the 4 start."""
    params = parameters()
    save(str(tmp_path / "alone"), (1,), mesh_of(jax.devices()[:1]))
    model_directory.save(tmp_path / "model", CONFIG, params)
    assert_all_ended_well(
        together(two_processes, str(tmp_path), fingerprint(whole(1)), processes=2, devices=2)
    )
    for name in ("by_two", "by_first"):
        config, loaded = model_directory.load(tmp_path / name)
        assert config == CONFIG and fingerprint(loaded) == fingerprint(params)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone",
        "by_first",
        "by_two",
        "model",
        "run",
    ]

    files = [file for file in (tmp_path / "run" / "2" / "state").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)  # not all of the 4 need the other half
    ended = together(four_processes, str(tmp_path), processes=4)
    assert_all_ended_well(ended)
    told = "".join(each.err for each in ended)
    assert told.count("moved to damaged_2; going back to step 1") == 1, told
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "damaged_2"]
    restore(str(tmp_path / "run"), 1, mesh_of(jax.devices()[:1]))


def differing(command_line_code):
    from d2m_jax import command_line

    def main(_):
        with hosts.joined():
            process = int(os.environ["JAX_PROCESS_ID"])
            hosts.agree({"config": {"stages": {"moe": {"steps": 100 + process}}}})

    sys.exit(command_line.run(main, []))


def test_processes_that_differ():
    ended = together(differing, 0, processes=2)
    for each in ended:
        assert each.code == 2, each
        assert each.err.count("\n") == 1, each.err
        assert (
            "processes differ: config.stages.moe.steps is 100 on process 0 and 101 on process 1"
            in each.err
        )


def too_few(directory, started):
    """Joins once all that were started are awake, however busy the machine is."""
    (Path(directory) / os.environ["JAX_PROCESS_ID"]).touch()
    while len(list(Path(directory).iterdir())) < started:
        time.sleep(0.05)
    with hosts.joined(timeout=5):
        raise AssertionError("started")


def test_a_missing_process(tmp_path):
    """One line, exit code 2, within the timeout: neither a wait for ever nor a trace of C++."""
    first, second = together(too_few, str(tmp_path), 2, processes=3, only=(0, 1))
    assert first.code == second.code == 2
    assert first.err.count("\n") == second.err.count("\n") == 1, first.err + second.err
    assert "2 of 3 processes came to 127.0.0.1:" in first.err and "within 5 s" in first.err
    assert "process 1 waited 5 s at 127.0.0.1:" in second.err
    (alone,) = together(too_few, str(tmp_path), 2, processes=2, only=(1,))
    assert alone.code == 2 and "process 0 is not there" in alone.err


def one_fails(how):
    hosts.LEAVING, hosts.NOTICED = 1, 3
    with hosts.joined():
        mesh = mesh_of(jax.devices())
        total = jax.jit(jnp.sum)
        assert int(total(hosts.flags(mesh, 1))) == 2
        if jax.process_index() == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConfigError("no data here")
        if how == "killed":
            total(hosts.flags(mesh, 1)).block_until_ready()
        else:
            hosts.barrier("never")


@pytest.mark.parametrize("how", ["killed", "refuses"])
def test_a_process_that_fails_ends_the_others(how):
    begin = time.monotonic()
    first, second = together(one_fails, how, processes=2)
    assert time.monotonic() - begin < PATIENCE / 2
    assert second.code == (-signal.SIGKILL if how == "killed" else 2)
    assert how == "killed" or second.err == "error: no data here\n"
    assert first.code not in (0, 2) and ("by peer" in first.err or "another task died" in first.err)


def told_to_stop():
    with hosts.joined():
        raise SystemExit(143)


def test_processes_end_alike():
    """The exit code of a stop is that of all: schedulers then start all again."""
    assert [each.code for each in together(told_to_stop, processes=2)] == [143, 143]
