"""Shards of a cache, more of them than a process may have open files."""

import contextlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.data import records
from d2m_jax.data.records import Record, Shards
from d2m_jax.data.sources import stores
from d2m_jax.data.sources.open import open_source
from tests.data.sources.making import members, tar
from tests.data.sources.test_array_records import samples, write

resource = pytest.importorskip("resource")
COUNT = 60  # shards


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    made = [folder / records.shard_name((8, 8), number) for number in range(COUNT)]
    for number, file in enumerate(made):
        records.write_shard(file, (Record({"at": [number, i]}, {}) for i in range(1 + number % 3)))
    return made


@contextlib.contextmanager
def descriptors(free):
    """So many files more can be opened inside."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(place.name) for place in Path("/dev/fd").iterdir())
    filled = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while filled[-1] < highest:  # the lowest number that is free
            filled.append(os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (filled[-1] + 1 + free, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for number in filled:
            os.close(number)


def test_more_shards_than_open_files(files, monkeypatch):
    monkeypatch.setattr(stores, "OPEN", 4)
    expected = [[number, i] for number in range(COUNT) for i in range(1 + number % 3)]
    with descriptors(free=30):
        shards = Shards(files)
        assert [shards[i].facts["at"] for i in range(len(shards))] == expected

        def read(seed):
            order = np.random.default_rng(seed).integers(0, len(shards), 200).tolist()
            return all(shards[i].facts["at"] == expected[i] for i in order)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(read, range(8))) == [True] * 8
    other = pickle.loads(pickle.dumps(shards))
    assert len(other) == len(expected) and other[7].facts["at"] == expected[7]


def test_too_many_open_files_are_no_fault_of_a_sample(files, tmp_path):
    for name in ("tar", "records"):
        (tmp_path / name).mkdir()
    tar(tmp_path / "tar/a.tar", members(["1"]))
    write(tmp_path / "records/a.array_record", samples(1))
    sources = [Shards(files)]
    for name in ("tar", "records"):
        sources.append(pickle.loads(pickle.dumps(open_source(str(tmp_path / name)))))
    for source in sources:
        with (
            descriptors(free=0),
            pytest.raises(ConfigError, match=r"\(Too many open files.*ulimit"),
        ):
            source[0]
        assert source[0]


def test_a_file_that_is_no_shard_is_named(files, tmp_path):
    file = tmp_path / "8x8-00000.array_record"
    file.write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(ConfigError, match=f"{file}: is no ArrayRecord file, or is cut off; expec"):
        Shards([*files[:2], file])
