"""One run, whatever mesh and however many processes: the same losses, also when they change midway.

Losses agree to float32's rounding, in sums of another order: 1e-4 of their value, over 12 steps in
which a choice of experts that is nearly even may fall the other way.
"""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from d2m_jax import hosts
from d2m_jax.config import (
    CacheConfig,
    ImagesConfig,
    MeshConfig,
    ModelConfig,
    PixelsConfig,
    RunConfig,
    WordsConfig,
)
from d2m_jax.data import icons
from d2m_jax.data.cache import cache
from d2m_jax.data.pictograms import lexicon
from d2m_jax.training.run import run
from d2m_jax.weights.directory import model_directory
from tests.test_hosts import assert_all_ended_well, together
from tests.training import test_run as tiny

STEPS = 12


def scratch(mesh: MeshConfig) -> RunConfig:
    """A dense model from scratch."""
    model = ModelConfig(
        replace(tiny.TRANSFORMER, hidden_size=48, num_heads=4, axes_dim=(4, 4, 4)),
        WordsConfig(dim=32),
        PixelsConfig(32, 32, 8),
        sample_steps=2,
    )
    stage = replace(tiny.STAGE, steps=STEPS, evaluate_every=6, checkpoint_every=3, sample_every=0)
    return RunConfig(
        name="scratch",
        model=model,
        data=tiny.DATA,
        stages={"flow": stage},
        held_out_batches=1,
        mesh=mesh,
    )


def train(directory: str, sizes: tuple[int, ...], stop: int = 0, process: int = 0) -> None:
    """The run from scratch; before batch `stop` this process gets a SIGTERM."""
    batches = icons.batches

    def stopped(*arguments):
        source = batches(*arguments)

        class Stopped:
            position = 0
            get_state, set_state = source.get_state, source.set_state

            def __iter__(self):
                return self

            def __next__(self):
                self.position += 1
                if self.position == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return next(source)

        return Stopped()

    with hosts.joined():
        icons.batches = stopped if stop and jax.process_index() == process else batches
        run(scratch(MeshConfig(*sizes)), directory)


def mixture(teacher: str, mesh: MeshConfig) -> RunConfig:
    """A student from `teacher`, with experts and a Mixture of Blocks in one stage."""
    config = tiny.student(teacher, rivals={}, mesh=mesh)
    mob = replace(config.stages["mob"], train=("double.*", "single.*"))
    return replace(config, stages={"mob": mob})


def losses(directory: Path) -> dict[tuple, list[float]]:
    """What a run told, by stage and step."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kinds = ("loss", "gradient_norm", "validation")
    return {(line["stage"], line["step"]): [line.get(kind, 0) for kind in kinds] for line in lines}


def assert_same(directory: Path, expected: Path, tolerance: float = 1e-4) -> None:
    found, wanted = losses(directory), losses(expected)
    assert found.keys() == wanted.keys()
    for at, values in wanted.items():
        np.testing.assert_allclose(found[at], values, rtol=tolerance, err_msg=str(at))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Uninterrupted, on one device."""
    directory = tmp_path_factory.mktemp("alone")
    run(scratch(MeshConfig()), directory)
    return directory


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param([(1, 8, (1, 8, 1, 1), 3), (2, 2, (2, 1, 1, 2), 4)], id="mesh and processes"),
        pytest.param(
            [(2, 2, (1, 4, 1, 1), 3), (4, 1, (1, 4, 1, 1), 4)], id="four", marks=pytest.mark.slow
        ),
    ],
)
def test_processes_and_mesh_change_midway(alone, tmp_path, starts):
    """So many processes of so many devices, of which the last is asked to stop; in the end one."""
    for processes, devices, sizes, stop in starts:
        last = processes - 1  # it alone gets the signal, and all stop at one step
        ended = together(
            train, str(tmp_path), sizes, stop, last, processes=processes, devices=devices
        )
        codes = {each.code for each in ended}
        assert codes == {143}, "\n".join(each.err for each in ended)
    run(scratch(MeshConfig()), tmp_path)
    assert_same(tmp_path, alone)


def pictures(folder: Path) -> Path:
    """Captioned drawings of the embedded task, half of them cropped to another shape."""
    scenes = icons.prompts(tiny.DATA, PixelsConfig(32, 32, 8), 60)
    drawn = icons.render(scenes, lexicon(tiny.DATA.pictograms))
    folder.mkdir()
    for i, (scene, image) in enumerate(zip(scenes, drawn, strict=True)):
        Image.fromarray(image[:20] if i % 2 else image).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(scene.caption)
    return folder


def images(folder: str, mesh: MeshConfig) -> RunConfig:
    """A dense model of these drawings from scratch, in batches of two sizes."""
    data = ImagesConfig(
        sources={f"{folder}/images": 1.0}, resolutions=(32,), aspect_ratio=1.7, validation=12
    )
    return replace(scratch(mesh), data=data)


def of_cache(folder: str, mesh: MeshConfig) -> RunConfig:
    """A student of that model, on what is encoded."""
    data = CacheConfig(f"{folder}/cache", validation=12)
    return replace(mixture(f"{folder}/one/teacher/model", mesh), data=data)


def train_on_images(
    folder: str, name: str, sizes: tuple[int, ...], student: tuple[int, ...]
) -> None:
    """Both runs, the model's on a mesh of `sizes`, its student's on one of `student`. Every size of
    images has programs of its own: one is enough for the second run, in its cache."""
    with hosts.joined():
        run(images(folder, MeshConfig(*sizes)), f"{folder}/{name}/teacher")
        if name == "one":
            drawings = images(folder, MeshConfig())
            square = replace(drawings, data=replace(drawings.data, aspect_ratio=1.0))
            cache(square, Path(folder) / "cache")
        run(of_cache(folder, MeshConfig(*student)), f"{folder}/{name}/student")


def test_two_processes_train_and_distil_as_one(tmp_path):
    """Images in buckets, a cache, calibration, cut, grouping, a stage and its samples: on one
    device, and on eight in two processes, the student's experts and parameters spread over both."""
    pictures(tmp_path / "images")
    train_on_images(str(tmp_path), "one", (1, 1, 1, 1), (1, 1, 1, 1))
    work = train_on_images, str(tmp_path), "eight", (2, 2, 1, 2), (2, 2, 2, 1)
    assert_all_ended_well(together(*work, processes=2, devices=4))
    for model, tolerance in (("teacher", 1e-4), ("student", 1e-3)):
        assert_same(tmp_path / "eight" / model, tmp_path / "one" / model, tolerance)
    student = tmp_path / "eight" / "student"
    assert (student / "samples" / "mob_000002.png").is_file()
    assert model_directory.load_config(student / "model").transformer.single[1].mixes
