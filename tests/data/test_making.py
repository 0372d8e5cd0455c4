"""Many processes make one cache, and what they leave when one is killed or the disk is full.

What the processes do is in functions of this file, which `together` starts in each of them.
"""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from d2m_jax import hosts
from d2m_jax.config import ImagesConfig, RunConfig, StageConfig
from d2m_jax.data import cache, generate, making, records
from d2m_jax.models.flux import initialise
from d2m_jax.output import FullDisk
from d2m_jax.sampling.pipeline import Pipeline
from tests.data.test_generate import MODEL, PROMPTS
from tests.test_hosts import assert_all_ended_well, together

CAPTION = "red anchor"
BAD = "03.png"
# Bytes of a shard: of the images, and of what the teacher makes.
SMALL = {"encoded": 3_000, "generated": 5_000}


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == records.SUFFIX}


def pictures(folder: Path) -> Path:
    """Images of two shapes, one of which is cut off."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(18):
        shape = ((16, 24, 3), (20, 20, 3))[i % 2]
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(CAPTION)
    file = folder / BAD
    file.write_bytes(file.read_bytes()[:600])
    return folder


def encode(images: str, folder: Path) -> None:
    data = ImagesConfig(
        sources={images: 1.0}, resolutions=(16,), aspect_ratio=1.5, validation=2, max_bad=1
    )
    making.SHARD = SMALL["encoded"]
    run = RunConfig(name="made", model=MODEL, data=data, stages={"flow": StageConfig()})
    cache.cache(run, folder / "encoded")


def sample(folder: Path) -> None:
    making.SHARD = SMALL["generated"]
    pipe = Pipeline(MODEL, initialise(MODEL.transformer, 0))
    options = {"images_per_prompt": 4, "guidance": (1.0, 5.0), "trajectory": 1, "batch_size": 2}
    generate.generate(pipe, PROMPTS, folder / "generated", **options)


def make(images: str, folder: str) -> None:
    with hosts.joined():
        encode(images, Path(folder))
        sample(Path(folder))


def die_after_two_shards(images: str, folder: str) -> None:
    """What process 1 does; the other one notices."""
    hosts.LEAVING, hosts.NOTICED = 1, 3
    write, done = making.write_shard, []

    def write_or_die(*arguments):
        if len(done) == 2 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(write(*arguments))
        return done[-1]

    making.write_shard = write_or_die
    make(images, folder)


def test_processes_share_the_work(tmp_path):
    """Two of them, of which one is killed, and two again, end with the bytes of one alone."""
    images, both, alone = str(pictures(tmp_path / "images")), tmp_path / "both", tmp_path / "alone"
    first, second = together(die_after_two_shards, images, str(both), processes=2)
    assert second.code == -signal.SIGKILL and first.code != 0
    assert len(content(both / "encoded")) >= 2 and not (both / "generated").exists()
    ended = together(make, images, str(both), processes=2)
    assert_all_ended_well(ended)
    assert "shards are there already" in ended[0].err
    assert_all_ended_well(together(make, images, str(alone), processes=1))
    for what in SMALL:
        assert content(both / what) == content(alone / what)
        assert len(content(both / what)) > 5
        assert (both / what / records.FILE).read_text() == (alone / what / records.FILE).read_text()
    named = [file.read_text() for file in (both / "encoded").glob("left_out.*.txt")]
    assert len(named) == 1 and named[0].count("\n") == 1 and BAD in named[0]


class FillingDisk:
    """A writer on a disk that has room for so many bytes; says what ArrayRecord says."""

    room = 0
    writer = array_record_module.ArrayRecordWriter

    def __init__(self, *arguments):
        self.to = FillingDisk.writer(*arguments)

    def write(self, data):
        FillingDisk.room -= len(data)
        if FillingDisk.room < 0:
            raise RuntimeError("write() failed: No space left on device; at byte 1048576")
        self.to.write(data)

    def close(self):
        self.to.close()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "SHARD", making.SHARD)  # which is what encode sets
    images = str(pictures(tmp_path / "images"))
    encode(images, tmp_path / "whole")
    expected = content(tmp_path / "whole" / "encoded")
    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", FillingDisk)
    folder, counts = tmp_path / "part" / "encoded", []
    for FillingDisk.room in (2_000, 9_000):
        with pytest.raises(FullDisk) as told:
            encode(images, tmp_path / "part")
        assert str(told.value).startswith(f"{folder}")
        if counts:  # by then there is more than the beginning
            assert str(told.value) == f"{folder}: the disk is full; {making.KEPT}"
        counts.append(len(content(folder)))
        assert all(expected[name] == data for name, data in content(folder).items())
        assert not [f for f in folder.iterdir() if f.suffix == ".new"]
    assert 0 < counts[0] < counts[1] < len(expected)
    FillingDisk.room = 10**9
    encode(images, tmp_path / "part")
    assert content(folder) == expected
    (named,) = folder.glob("left_out.*.txt")
    assert named.read_text().count("\n") == 1 and BAD in named.read_text()
