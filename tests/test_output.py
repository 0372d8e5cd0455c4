"""Where something is to be written is tried before the work; nothing half-written stays."""

import errno
import os
import subprocess
import sys
import time

import pytest

from d2m_jax import output, progress
from d2m_jax.config import ConfigError


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


def test_sizes_are_told_in_the_unit_that_fits():
    assert [progress.size(n) for n in (12, 3_400_000, 23.8e9)] == [
        "12 bytes",
        "3.4 MB",
        "23.8 GB",
    ]
    assert progress.told(6e8, 3e9, 2e8) == "0.6 of 3.0 GB, 0.20 GB/s, 0:12 left"
    assert progress.told(3, 28, 0.5, "steps") == "3 of 28 steps, 0.50 steps/s, 0:50 left"


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_is_there_is_replaced_on_demand_only(tmp_path):
    model = tmp_path / "model"
    model.mkdir()  # has nothing to lose
    for overwrite in (False, True):
        with output.new_directory(model, lambda path: True, "folder", overwrite) as new:
            (new / "a").write_text(str(overwrite))
        with (
            pytest.raises(ConfigError, match="model: exists; expected a free name, or --overwrite"),
            output.new_directory(model, lambda path: True, "folder"),
        ):
            pass
        assert (model / "a").read_text() == str(overwrite)


def test_what_a_killed_process_left_is_removed(tmp_path, dead):
    here, old = output.machine(), time.time() - 2 * output.LEFT_OVER
    killed = tmp_path / f".model.{here}.{dead}.new"
    (killed / "params").mkdir(parents=True)
    elsewhere = tmp_path / f".model.0123abcd.{dead}.new"
    alive = tmp_path / f".model.{here}.{os.getppid()}.new"
    other = tmp_path / f".other.{here}.{dead}.new"
    writes = tmp_path / f".model.0123abcd.{os.getppid()}.new"  # on another machine, still
    for path in (elsewhere, alive, other, writes):
        path.mkdir()
    for path in (elsewhere, alive, other):
        os.utime(path, (old, old))
    with output.new_directory(tmp_path / "model", lambda path: True, "folder"):
        assert not killed.exists() and not elsewhere.exists()
        assert all(path.exists() for path in (alive, other, writes))
    file = tmp_path / f".a.txt.{here}.{dead}.new"
    file.touch()
    with output.new_file(tmp_path / "a.txt") as new:
        new.write_text("x")
    assert not file.exists() and (tmp_path / "a.txt").read_text() == "x"


def test_killed_between_two_renamings_the_earlier_folder_comes_back(tmp_path, dead):
    model, old = tmp_path / "model", tmp_path / f".model.{output.machine()}.{dead}.old"
    (old / "params").mkdir(parents=True)
    replaced = output.new_directory(model, lambda path: True, "folder", overwrite=True)
    with pytest.raises(ZeroDivisionError), replaced:
        assert (model / "params").exists() and not old.exists()
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    old.mkdir()  # killed after both: it has been replaced
    with output.new_directory(model, lambda path: True, "folder", overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_of_a_link_what_it_points_to_is_replaced(tmp_path, dead):
    link, model = tmp_path / "model", tmp_path / "large" / "model"
    model.mkdir(parents=True)
    (model / "a").write_text("old")
    link.symlink_to(model)

    def refused():
        refusal = output.new_directory(link, lambda path: True, "folder")
        with pytest.raises(ConfigError, match=f"^{link}: exists; expected a free name"), refusal:
            pass

    refused()
    for text in ("new", "newer"):
        with output.new_directory(link, lambda path: True, "folder", overwrite=True) as new:
            (new / "a").write_text(text)
        assert link.is_symlink() and (model / "a").read_text() == text
        assert [p.name for p in model.parent.iterdir()] == ["model"]
    model.rename(model.with_name(f".model.{output.machine()}.{dead}.old"))  # killed between the two
    refused()
    assert (model / "a").read_text() == "newer"


def test_a_link_that_was_left_over_is_removed_and_not_followed(tmp_path, dead):
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "a").touch()
    (tmp_path / "model").mkdir()
    left = tmp_path / f".model.{output.machine()}.{dead}.old"
    left.symlink_to(tmp_path / "large")
    with output.new_directory(tmp_path / "model", lambda path: True, "folder"):
        pass
    assert not left.is_symlink() and (tmp_path / "large" / "a").exists()


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
