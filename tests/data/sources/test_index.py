import io
import multiprocessing
import os
import pickle
import stat
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.data.sources import build, helpers, stores, tars
from d2m_jax.data.sources.index import Index, Part, Problems, Scanned, header, pack
from d2m_jax.data.sources.open import open_source
from tests.data.sources.making import encoded, members, tar


@pytest.fixture
def shards(tmp_path):
    for i in range(4):
        tar(tmp_path / f"{i}.tar", members([f"{i}{j}" for j in range(i + 1)]))
    return tmp_path


@pytest.fixture
def scanned(monkeypatch):
    """The names of the parts that are scanned."""
    names, true = [], tars.scan

    def scan(file):
        names.append(Path(file.path).name)
        return true(file)

    known = build._scanned
    monkeypatch.setattr(build, "_scanned", lambda files, _, pure: known(files, scan, False))
    return names


def index_of(folder):
    (path,) = folder.glob("*.d2m_jax_index")
    return path


def test_made_once_and_for_changed_shards_alone(shards, scanned, capsys):
    first = open_source(str(shards))
    assert sorted(scanned) == ["0.tar", "1.tar", "2.tar", "3.tar"]
    before = index_of(shards).stat()
    scanned.clear()
    assert open_source(str(shards)).fingerprint() == first.fingerprint()
    assert not scanned and index_of(shards).stat() == before

    tar(shards / "1.tar", members(["new", "newer", "newest"]))
    (shards / "3.tar").unlink()
    tar(shards / "4.tar", members(["40"]))
    capsys.readouterr()
    now = open_source(str(shards))
    assert sorted(scanned) == ["1.tar", "4.tar"]
    assert (
        f"{shards}: 1.tar has changed since the index was made; read again"
        in capsys.readouterr().err
    )
    assert now.fingerprint() != first.fingerprint()
    assert [now.key(i) for i in range(len(now))] == [
        "0.tar: 00",
        *(f"1.tar: {n}" for n in ("new", "newer", "newest")),
        *(f"2.tar: 2{j}" for j in range(3)),
        "4.tar: 40",
    ]
    assert [now[i].captions[0] for i in range(3)] == [
        "caption of 00",
        "caption of new",
        "caption of newer",
    ]
    fresh = open_source(str(shards), str(shards / "elsewhere"))
    assert fresh.fingerprint() == now.fingerprint()
    for name, column in fresh.index.columns.items():
        assert np.array_equal(column, now.index.columns[name])


def test_files_are_looked_up_once(shards, monkeypatch):
    """Many take a while."""
    looked, true = [], stores.listed
    monkeypatch.setattr(stores, "listed", lambda folder: (looked.append(folder), true(folder))[1])
    open_source(str(shards))
    open_source(str(shards))
    assert looked == [str(shards)] * 2


def test_a_touched_shard_is_read_again_and_is_the_same(shards, scanned):
    first = open_source(str(shards))
    os.utime(shards / "2.tar", ns=(0, 0))
    scanned.clear()
    assert open_source(str(shards)).fingerprint() == first.fingerprint()
    assert scanned == ["2.tar"]


def test_fingerprint_of_other_contents(shards):
    first = open_source(str(shards))
    tar(shards / "0.tar", [("00.jpg", encoded(9)), ("00.txt", b"caption of 00")])
    second = open_source(str(shards)).fingerprint()
    assert second != first.fingerprint()
    # Of the same sizes and names, written at another time.
    content = (shards / "0.tar").read_bytes()
    with tarfile.open(shards / "0.tar", "w") as out:
        for name, data in (("00.jpg", encoded(9)), ("00.txt", b"Caption of 00")):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1
            out.addfile(info, io.BytesIO(data))
    assert len(content) == (shards / "0.tar").stat().st_size
    assert open_source(str(shards)).fingerprint() != second


def test_sizes_are_mapped_and_pickles_are_small(shards):
    source = open_source(str(shards))
    assert isinstance(source.sizes().base, np.memmap)
    assert source.sizes().dtype == np.int32
    pickled = pickle.dumps(source)
    assert len(pickled) < 500
    copy = pickle.loads(pickled)
    assert copy.fingerprint() == source.fingerprint() and copy[5] == source[5]


def test_in_a_spawned_process(shards):
    source = open_source(str(shards))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(source.__getitem__, range(3)) == [source[i] for i in range(3)]


def test_a_worker_does_not_take_another_index(shards):
    pickled = pickle.dumps(open_source(str(shards)))
    tar(shards / "0.tar", members(["other"]))
    open_source(str(shards))
    with pytest.raises(
        ConfigError, match="was made anew, of other samples, since this run opened it"
    ):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d[:10], lambda d: d[:-64], lambda d: b"x" * 99]
)
def test_a_damaged_index_is_made_anew(shards, capsys, damage):
    whole = open_source(str(shards)).fingerprint()
    path = index_of(shards)
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    assert open_source(str(shards)).fingerprint() == whole
    assert "it is made anew" in capsys.readouterr().err


def test_a_folder_for_indexes(shards, tmp_path):
    folder = tmp_path / "indexes" / "of all"
    sources = [open_source(f"{shards}/{p}", str(folder)) for p in ("*.tar", "0.tar", "{0..1}.tar")]
    assert [len(source) for source in sources] == [10, 1, 3]
    assert len(list(folder.glob("*.d2m_jax_index"))) == 3
    assert not list(shards.glob("*.d2m_jax_index"))


def test_a_folder_that_cannot_be_written_is_told_first(shards, scanned):
    (shards / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"cannot be written.*index = FOLDER in their config names another"
    ):
        open_source(str(shards), str(shards / "file" / "below"))
    assert not scanned


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(shards):
    shards.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            open_source(str(shards))
    finally:
        shards.chmod(stat.S_IRWXU)


def test_an_index_that_is_there_needs_no_permission(shards, monkeypatch):
    open_source(str(shards))
    monkeypatch.setattr(build, "_check_place", None)
    assert len(open_source(str(shards))) == 10


def test_two_at_once(shards, scanned, monkeypatch, capsys):
    """One makes it, the other waits and finds it. The lock is one of open files: of processes as of
    threads."""
    true, both = build._build, threading.Barrier(2)
    monkeypatch.setattr(build, "_check_place", lambda _: both.wait(10))
    monkeypatch.setattr(build, "_build", lambda *args: (time.sleep(0.2), true(*args)))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(open_source, [str(shards)] * 2)
    assert first.fingerprint() == second.fingerprint() and second[0] == first[0]
    assert len(scanned) == 4
    assert "another process makes it; waiting" in capsys.readouterr().err


def test_killed_while_it_writes_leaves_no_half_index(shards, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "aligned", killed)
        with pytest.raises(KeyboardInterrupt):
            open_source(str(shards))
    assert not list(shards.glob("*.d2m_jax_index")) and not list(shards.glob(".*new"))


def test_what_was_found_before_it_was_killed_is_kept(shards, monkeypatch, scanned):
    """Of long work a part is written now and then."""
    monkeypatch.setattr(build, "SAVED", -1.0)
    true = build._part_of

    def second_fails(file, base, found):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.path)
        return true(file, base, found)

    written = []
    with monkeypatch.context() as patch:
        patch.setattr(build, "_part_of", second_fails)
        with pytest.raises(KeyboardInterrupt):
            open_source(str(shards))
    scanned.clear()
    assert len(open_source(str(shards))) == 10
    assert len(scanned) == 2


def test_processes_give_what_threads_give(shards, monkeypatch, capfd):
    """Of a damaged tar too; in a script that is run anew by nobody."""
    broken = shards / "2.tar"
    broken.write_bytes(broken.read_bytes()[:1000])
    one = open_source(str(shards), str(shards / "one"))
    monkeypatch.setattr(build, "WORTH_PROCESSES", 0)
    monkeypatch.setattr(tars, "scan", None)  # this process does nothing
    monkeypatch.setattr(helpers, "scan", None)
    other = open_source(str(shards), str(shards / "other"))
    assert other.fingerprint() == one.fingerprint()
    assert other.index.parts == one.index.parts and other.index.parts[2].left_out > 0
    assert other[0] == one[0] and len(one) == 7


def test_a_helper_that_dies_is_replaced(shards, monkeypatch):
    """By this process."""
    one = open_source(str(shards), str(shards / "one"))
    monkeypatch.setattr(build, "WORTH_PROCESSES", 0)
    monkeypatch.setattr(helpers, "SERVE", "import sys; sys.stdin.readline(); sys.stdout.write('x')")
    assert open_source(str(shards), str(shards / "other")).fingerprint() == one.fingerprint()


def test_ten_million_open_in_a_second(tmp_path):
    """Of 2,000 shards; the columns are holes in the file, which take no disk."""
    parts, each = 2000, 5000
    ends, names = pack([b"%09d" % i for i in range(each)])
    one = Scanned(
        {
            "size": np.zeros((each, 2), np.int32),
            "block": np.zeros((each, 3), np.uint32),
            "bytes": np.zeros((each, 3), np.uint32),
            "name ends": ends,
        },
        {"name": names},
        Problems(),
    )
    known = [
        Part(f"{i:05d}.tar", 1, "1 1", each, {"name": len(names)}, "0" * 32, 0, ())
        for i in range(parts)
    ]
    start = header("tars", known, [one] * parts)
    rows = parts * each
    path = tmp_path / "big.index"
    with path.open("wb") as out:
        out.write(start)
        out.truncate(len(start) + rows * (8 + 12 + 12 + 4 + 9) + 5 * 64)
    began = time.perf_counter()
    index = Index(str(path))
    assert len(index) == rows and index.part(rows - 1) == parts - 1
    assert index.columns["size"][rows - 1].tolist() == [0, 0]
    assert time.perf_counter() - began < 1
    assert path.stat().st_size / rows < 46  # bytes per sample
    with pytest.raises(IndexError):
        index.part(rows)
