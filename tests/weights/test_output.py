"""Where something is to be written is tried before the work; nothing half-written stays."""

import errno
import os
import subprocess
import sys
import time

import pytest

from d2m_jax.config import ConfigError
from d2m_jax.weights import output


def test_what_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path, message in (
        (tmp_path / "file" / "x" / "y", f"y: cannot be written: {tmp_path}/file is a file"),
        ("/proc/nothing/x", "/proc/nothing/x: cannot be written .No such file"),
        (tmp_path / ("x" * 300), "cannot be written .File name too long"),
    ):
        with pytest.raises(ConfigError, match=message):
            output.check_writable(path)
    for path in (tmp_path / "a" / "b", tmp_path / "file", tmp_path):
        output.check_writable(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match="a: cannot be written .Permission denied"):
        output.check_writable(tmp_path / "a")


@pytest.fixture
def ended():
    """The numbers of two processes that have ended."""
    processes = [subprocess.Popen([sys.executable, "-c", ""]) for _ in range(2)]
    for process in processes:
        process.wait()
    return [process.pid for process in processes]


def test_what_a_killed_process_left_is_removed(tmp_path, ended):
    dead, elsewhere = ended
    old = time.time() - 2 * output.LEFT_OVER
    left = tmp_path / f".model.{dead}.new"
    (left / "params").mkdir(parents=True)
    mine = tmp_path / f".model.{os.getppid()}.new"  # of a process that lives
    other = tmp_path / f".other.{dead}.new"
    fresh = tmp_path / f".model.{elsewhere}.new"  # of another host, which still writes
    for path in (mine, other, fresh):
        path.mkdir()
    for path in (left / "params", left, mine, other):
        os.utime(path, (old, old))
    with output.new_directory(tmp_path / "model", lambda path: True, "folder"):
        assert not left.exists() and all(p.exists() for p in (mine, other, fresh))
    file = tmp_path / f".a.txt.{dead}.new"
    file.touch()
    os.utime(file, (old, old))
    with output.new_file(tmp_path / "a.txt") as new:
        new.write_text("x")
    assert not file.exists() and (tmp_path / "a.txt").read_text() == "x"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError(
            "RESOURCE_EXHAUSTED: Error writing …: [OS error 28: No space left on device]\n…"
        ),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, error):
    with pytest.raises(output.FullDisk) as told, output.full_disk(tmp_path / "run", "6 is kept"):
        raise error
    assert str(told.value) == f"{tmp_path}/run: the disk is full; 6 is kept"
