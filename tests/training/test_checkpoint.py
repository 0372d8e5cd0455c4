"""Checkpoints: what is kept, damage of every kind, run directories of another config."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import hosts
from d2m_jax.config import (
    ConfigError,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
)
from d2m_jax.output import machine
from d2m_jax.training.checkpoint import Checkpoints, open_run
from tests.training import toy


def state(step):
    # Random numbers do not compress, so that a flipped bit passes Orbax by unseen.
    noise = np.random.default_rng(step).normal(size=(64, 64))
    return {"a": {0: jnp.arange(5.0) + step}, "b": jnp.asarray(noise, jnp.bfloat16)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "stage"
    checkpoints = Checkpoints(directory, {"seed": 0})
    for step in (1, 2):
        checkpoints.save(step, state(step), {"position": 10 * step}, validation=1.0 / step)
    checkpoints.close()
    return directory


def restore(directory, identity=None):
    checkpoints = Checkpoints(directory, identity or {"seed": 0})
    restored = checkpoints.restore(state(1))
    checkpoints.close()
    return restored


def assert_whole(restored):
    assert restored.progress == {"position": 10 * restored.step}
    expected = state(restored.step)
    assert restored.state["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(restored.state["a"][0], expected["a"][0])
    np.testing.assert_array_equal(restored.state["b"], expected["b"])


def test_round_trip(saved):
    restored = restore(saved)
    assert restored.step == 2
    assert_whole(restored)


def files(saved):
    return sorted(path.relative_to(saved) for path in (saved / "2").rglob("*") if path.is_file())


def delete(file):
    file.unlink()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(file):
    file.write_bytes(np.random.default_rng(0).bytes(max(file.stat().st_size, 1)))


def flip(file):
    content = bytearray(file.read_bytes() or b"\0")
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [delete, truncate, garble, flip])
def test_damage_to_any_file(saved, tmp_path, damage, capfd):
    """Either the file does not matter, or the checkpoint before takes over: never other numbers."""
    fallen_back = 0
    for file in files(saved):
        directory = tmp_path / damage.__name__ / str(file).replace("/", "_")
        shutil.copytree(saved, directory)
        damage(directory / file)
        restored = restore(directory)
        assert_whole(restored)
        told = [line for line in capfd.readouterr().err.splitlines() if "is damaged" in line]
        assert len(told) == (restored.step == 1), (file, told)
        if restored.step == 1:
            fallen_back += 1
            assert told[0].endswith("going back to step 1")
            assert (directory / "damaged_2").is_dir()
    assert fallen_back >= 3


def test_half_written_is_passed_over(saved, tmp_path):
    """What a kill leaves of a checkpoint that was being written is no checkpoint."""
    directory = tmp_path / "stage"
    shutil.copytree(saved, directory)
    half = directory / "3.orbax-checkpoint-tmp"
    shutil.copytree(directory / "2" / "state", half / "state")
    assert restore(directory).step == 2


def test_all_damaged_starts_again(saved, tmp_path, capfd):
    directory = tmp_path / "stage"
    shutil.copytree(saved, directory)
    for step in (1, 2):
        delete(directory / str(step) / "run" / "metadata")
    assert restore(directory) is None
    assert "going back to the start of the stage" in capfd.readouterr().err


def test_damaged_newest_checkpoint_ends_the_same(tmp_path, capfd):
    expected = toy.run(tmp_path, toy.stage(20))
    truncate(tmp_path / "checkpoints" / "toy" / "20" / "state" / "manifest.ocdbt")
    params = toy.run(tmp_path, toy.stage(20))
    np.testing.assert_array_equal(params["out"]["kernel"], expected["out"]["kernel"])
    assert "going back to step 10" in capfd.readouterr().err
    assert toy.run(tmp_path, toy.stage(20)) is not None  # step 20 is there again
    assert "damaged" not in capfd.readouterr().err


def test_last_and_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "stage", {}, keep=2)
    for step, validation in enumerate([0.5, 0.1, 0.4, None, 0.3, 0.2], start=1):
        checkpoints.save(step, {"a": jnp.ones(3)}, {}, validation)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["2", "5", "6"]


def test_another_identity_is_refused_and_nothing_moved(saved):
    with pytest.raises(ConfigError, match="seed is 0 there and 1 here"):
        restore(saved, {"seed": 1})
    assert restore(saved).step == 2


def test_not_finite_is_not_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    with pytest.raises(FloatingPointError, match="a.0 is not finite"):
        checkpoints.save(1, {"a": [jnp.array([1.0, jnp.nan])]}, {}, None)
    assert checkpoints.latest_step() is None
    checkpoints.close()


def run_config(**changes):
    optimizer = OptimizerConfig(accumulate=changes.pop("accumulate", 1))
    stage = StageConfig(steps=changes.pop("steps", 100), optimizer=optimizer)
    return RunConfig(name="run", model=ModelConfig(), stages={"dense": stage}, **changes)


def test_run_directory_of_another_config(tmp_path):
    directory = open_run(tmp_path / "run", run_config(steps=50))
    assert json.loads((directory / "config.json").read_text())["stages"]["dense"]["steps"] == 50
    # nothing was made yet: a config that was mended takes its place
    open_run(tmp_path / "run", run_config())
    before = (directory / "config.json").read_text()
    assert json.loads(before)["stages"]["dense"]["steps"] == 100
    (directory / "models").mkdir()
    open_run(directory, run_config(mesh=MeshConfig(data=1), keep_checkpoints=5, accumulate=2))
    before = (directory / "config.json").read_text()
    with pytest.raises(ConfigError, match="stages.dense.steps is 100 there and 200 here") as error:
        open_run(directory, run_config(steps=200))
    assert "\n" not in str(error.value) and (directory / "config.json").read_text() == before


def test_a_run_directory_that_not_all_processes_see(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "gather", lambda value: [value, False])
    with pytest.raises(ConfigError, match="run: process 1 does not see what process 0 writes"):
        open_run(tmp_path / "run", run_config())


def test_a_folder_of_other_things(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match="holds other things .notes.txt., expected a new direct"):
        open_run(tmp_path, run_config())
    assert not (tmp_path / "config.json").exists()


def test_what_a_killed_process_left_is_not_another_s(tmp_path):
    (tmp_path / f".config.json.{machine()}.999999999.new").write_text('{"name": ')
    (tmp_path / ".config.json.elsewhere.7.new").write_text("")  # of a process that may still live
    open_run(tmp_path, run_config())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".config.json.elsewhere.7.new",
        "config.json",
    ]


def test_damaged_run_config(tmp_path):
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(ConfigError, match="config.json: damaged, expected JSON"):
        open_run(tmp_path, run_config())


def test_a_folder_of_something_else_keeps_its_config(tmp_path):
    config = '{"transformer": {}, "text": {"kind": "words"}}\n'
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="config.json.* not the config of a run; expected a new"):
        open_run(tmp_path, run_config())
    assert (tmp_path / "config.json").read_text() == config
