from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.data.sources import stores
from d2m_jax.data.sources.any_source import BadSample
from d2m_jax.data.sources.open import braces, open_source
from tests.data.sources.making import encoded, members, tar


def keys(source):
    return [source.key(i) for i in range(len(source))]


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty store of fsspec's, and a home for copies of indexes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def put(store, path, content):
    with store.open(path, "wb") as out:
        out.write(content)


@pytest.fixture
def shards(tmp_path):
    """Four tars in two folders."""
    folder = tmp_path / "shards"
    for name in ("a/00", "a/01", "b/02", "b/10"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tar(folder / f"{name}.tar", members([f"{name[2:]}x", f"{name[2:]}y"]))
    return folder


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a", ["00", "01"]),
        ("", ["a/00", "a/01", "b/02", "b/10"]),
        ("a/00.tar", ["00"]),
        ("a/*.tar", ["00", "01"]),
        ("a/0[1-9].tar", ["01"]),
        ("**/*.tar", ["a/00", "a/01", "b/02", "b/10"]),
        ("{a,b}/*.tar", ["a/00", "a/01", "b/02", "b/10"]),
        ("a/{00..01}.tar", ["00", "01"]),
        ("b/{2..10..8}.tar", None),
        ("{b/02,a/00}.tar", ["a/00", "b/02"]),
        ("a/{00,00}.tar", ["00"]),
        ("a/0{0..2}.tar", None),
        ("c/*.tar", None),
        ("c", None),
    ],
)
def test_patterns(shards, memory, pattern, names):
    """The same on disk and in a store."""
    for path in shards.rglob("*.tar"):
        put(memory, f"/shards/{path.relative_to(shards)}", path.read_bytes())
    for root in (str(shards), "memory://shards"):
        if names is None:
            with pytest.raises(ConfigError, match="expected .tar, .parquet or .array_record files"):
                open_source(f"{root}/{pattern}")
        else:
            source = open_source(f"{root}/{pattern}")
            found = sorted({key.split(".tar: ")[0] for key in keys(source)})
            assert found == names and len(source) == 2 * len(names)
            assert source[0].captions[0].startswith("caption of ")


def test_braces():
    assert list(braces("a{08..11}b")) == ["a08b", "a09b", "a10b", "a11b"]
    assert list(braces("{1..10}")) == [str(i) for i in range(1, 11)]
    assert list(braces("{x,y}{0..1}")) == ["x0", "x1", "y0", "y1"]
    assert list(braces("plain")) == ["plain"]


def test_a_name_with_braces_and_brackets_is_itself(tmp_path):
    path = tar(tmp_path / "a{0..1}[x].tar", members(["1"]))
    assert len(open_source(str(path))) == 1


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    tar(tmp_path / "a.tar", members(["1"]))
    (tmp_path / "loose.jpg").write_bytes(encoded())
    with pytest.raises(ConfigError, match="found tars and images; expected one kind"):
        open_source(str(tmp_path))
    assert len(open_source(f"{tmp_path}/*.tar")) == 1
    with pytest.raises(ConfigError, match=r"loose.jpg.*expected .tar"):
        open_source(f"{tmp_path}/*.*")


@pytest.mark.parametrize("name", [None, "a.zip", "a.tar.gz", ".hidden.jpg"])
def test_a_folder_of_something_else(tmp_path, name):
    if name:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="found .*; expected .tar, .parquet"):
        open_source(str(tmp_path))


def test_many_threads_read_one_source(shards, monkeypatch):
    """With fewer open files than there are shards."""
    monkeypatch.setattr(stores, "OPEN", 1)
    source = open_source(str(shards))
    expected = [source[i] for i in range(len(source))]

    def read(seed):
        order = np.random.default_rng(seed).integers(0, len(source), 200)
        return all(source[int(i)] == expected[i] for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [True] * 8


class Failing:
    """A store that fails a number of times before each answer."""

    def __init__(self, store, times, error):
        self.store, self.times, self.error, self.left = store, times, error, times

    def invalidate_cache(self):
        pass

    def __getattr__(self, name):
        call = getattr(self.store, name)

        def sometimes(*args, **more):
            if self.left:
                self.left -= 1
                raise self.error
            self.left = self.times
            return call(*args, **more)

        return sometimes


@pytest.fixture
def remote(memory, tmp_path, monkeypatch):
    """A source in a store; how often, and with which error, the store fails can be told."""
    put(memory, "/d/a.tar", tar(tmp_path / "a.tar", members(["1", "2"])).read_bytes())
    pauses = []
    monkeypatch.setattr(stores.time, "sleep", pauses.append)

    def fail(times, error=None):
        store = Failing(memory, times, error or OSError("503 Slow down"))
        monkeypatch.setattr(stores, "store", lambda url: store)
        for module in ("build",):
            monkeypatch.setattr(f"d2m_jax.data.sources.{module}.store", lambda url: store)

    fail.pauses = pauses
    return fail


def test_a_store_that_fails_for_a_while_is_asked_again(remote, capsys):
    remote(3)
    source = open_source("memory://d/*.tar")
    assert source[1].captions == ("caption of 2",)
    said = capsys.readouterr().err
    assert "memory://d/a.tar: OSError: 503 Slow down; trying again for 300 s at most" in said
    first = remote.pauses[:3]
    assert all(low / 2 <= pause <= low for low, pause in zip((0.5, 1, 2), first, strict=True))


def test_a_store_that_fails_for_good_ends_it(remote, monkeypatch):
    remote(0)
    source = open_source("memory://d/*.tar")
    remote(10**9, ConnectionError("reset by peer"))
    now = iter(range(0, 10**6, 20))
    monkeypatch.setattr(stores.time, "monotonic", lambda: next(now))
    with pytest.raises(ConfigError, match=r"a.tar: ConnectionError: reset .* has failed for \d+ s"):
        source[0]
    assert max(remote.pauses) <= stores.LONGEST_WAIT


def test_what_is_not_there_is_not_asked_for_again(remote):
    remote(10**9, FileNotFoundError("gone"))
    with pytest.raises(ConfigError, match="memory://d/a.tar: not found"):
        open_source("memory://d/a.tar")
    assert not remote.pauses


def test_an_object_that_was_replaced(memory, tmp_path):
    put(memory, "/d/a.tar", tar(tmp_path / "a.tar", members(["1", "2"])).read_bytes())
    open_source("memory://d")
    put(memory, "/d/a.tar", tar(tmp_path / "a.tar", members(["3"])).read_bytes())
    source = open_source("memory://d")
    assert keys(source) == ["a.tar: 3"]
    put(memory, "/d/a.tar", b"")
    with pytest.raises(BadSample, match="a.tar: 3: .*has 0 bytes, had 10240 when it was indexed"):
        source[0]


def test_an_index_lies_in_the_store_for_other_machines(memory, tmp_path, monkeypatch, capsys):
    put(memory, "/d/a.tar", tar(tmp_path / "a.tar", members(["1", "2"])).read_bytes())
    first = open_source("memory://d")
    assert len(memory.glob("/d/*.d2m_jax_index")) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another machine"))
    monkeypatch.setattr("d2m_jax.data.sources.tars.scan", None)  # nobody indexes again
    second = open_source("memory://d")
    assert second.fingerprint() == first.fingerprint() and second[0] == first[0]
    here = tmp_path / "of another machine" / "d2m_jax"
    assert str(second.index.path).startswith(str(here))


def test_a_protocol_that_nobody_knows():
    with pytest.raises(ConfigError, match="nonsense://x: cannot be opened: Protocol not known"):
        open_source("nonsense://x")
