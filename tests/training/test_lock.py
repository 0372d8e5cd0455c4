"""One run at a time in a run directory, whatever becomes of the one that has it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2m_jax.config import ConfigError
from d2m_jax.training import lock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from d2m_jax.training import lock

lock.BEAT = 0.1
with lock.held(sys.argv[1]):
    print("have it", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the directory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, cwd=ROOT)
    assert process.stdout.readline() == "have it\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_told_who_has_it(holder, tmp_path):
    told = f"run: in use by process {holder.pid} on .* since 20"
    with pytest.raises(ConfigError, match=told), lock.held(tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    start = time.monotonic()
    with lock.held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / lock.FILE).read_text())["process"] == os.getpid()
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert time.monotonic() - start < 5  # not lock.PATIENCE: a process that died here is known to
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_nothing_is_left_of_a_run_of_which_nothing_came(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path / "a" / "run"):
        _ = 1 / 0
    assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file"), lock.held(tmp_path / "file" / "run"):
        pass


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The lock file of a process of another host, and how to give it a heartbeat."""
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    file = tmp_path / lock.FILE
    who = {"host": "node7", "process": 123, "since": "2026-11-25 20:00:00", "machine": "other"}
    file.write_text(json.dumps(who))
    return file


def test_a_process_of_another_host_is_waited_for_while_it_may_live(elsewhere, tmp_path, capsys):
    start = time.monotonic()
    with lock.held(tmp_path):
        assert 0.5 < time.monotonic() - start < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "in use by process 123 on node7 since 2026-11-25 20:00:00, which last gave a sign of life"
        in line
    )


def test_one_that_died_long_ago_is_not_waited_for(elsewhere, tmp_path, capsys):
    long_ago = time.time() - 100
    os.utime(elsewhere, (long_ago, long_ago))
    with lock.held(tmp_path):
        pass
    assert capsys.readouterr().err == ""


def test_a_heartbeat_elsewhere_is_a_refusal(elsewhere, tmp_path, monkeypatch):
    def sleep(_):
        os.utime(elsewhere, (time.time() + 1, time.time() + 1))

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(ConfigError, match="in use by process 123 on node7"), lock.held(tmp_path):
        pass
    assert json.loads(elsewhere.read_text())["process"] == 123


def test_a_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with lock.held(tmp_path):
        before = (tmp_path / lock.FILE).stat().st_mtime_ns
        for _ in range(100):
            time.sleep(0.05)
            if (tmp_path / lock.FILE).stat().st_mtime_ns > before:
                break
        else:
            raise AssertionError("no heartbeat in five seconds")


@pytest.fixture
def no_flock(monkeypatch):
    def none(*_):
        raise OSError("not supported")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    monkeypatch.setattr(lock, "SETTLING", 0.1)


def fill_up(monkeypatch):
    """No byte more fits on the disk."""
    dump = json.dump

    def full(value, file):
        with Path("/dev/full").open("w") as device:
            os.dup2(device.fileno(), file.fileno())
        dump(value, file)

    def write(path, _):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.json, "dump", full)
    monkeypatch.setattr(Path, "write_text", write)


def refused_for_room(directory):
    told = "run: the disk is full; nothing was written$"
    with pytest.raises(ConfigError, match=told), lock.held(directory):
        pass


def test_a_full_disk_is_one_line_and_leaves_no_empty_lock(tmp_path, monkeypatch):
    fill_up(monkeypatch)
    refused_for_room(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()  # of a run that goes on
    refused_for_room(tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_without_flock(tmp_path, no_flock, monkeypatch):
    fill_up(monkeypatch)
    refused_for_room(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def here(file, process):
    who = json.loads(file.read_text()) | {"machine": lock.machine(), "process": process}
    file.write_text(json.dumps(who))


def test_without_flock_the_heartbeat_alone_tells(elsewhere, tmp_path, no_flock):
    """Of a process of this machine too, where it lives."""
    here(elsewhere, os.getppid())
    start = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - start > 0.5


def test_without_flock_a_process_that_died_here_is_known_to(elsewhere, tmp_path, no_flock):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here(elsewhere, ended.pid)
    start = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - start < 0.5


def test_without_flock_the_last_of_several_that_start_at_once_has_it(
    tmp_path, no_flock, monkeypatch
):
    other = {"host": "node7", "process": 123, "since": "2026-11-25 20:00:00", "machine": "other"}

    def sleep(_):  # the other has read the empty file too, and writes now
        (tmp_path / lock.FILE).write_text(json.dumps(other))

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(ConfigError, match="in use by process 123 on node7"), lock.held(tmp_path):
        pass
    assert json.loads((tmp_path / lock.FILE).read_text()) == other


def test_a_clock_that_is_ahead_costs_no_more_than_a_dead_process(elsewhere, tmp_path):
    os.utime(elsewhere, (time.time() + 1000, time.time() + 1000))
    start = time.monotonic()
    with lock.held(tmp_path):
        assert 0.5 < time.monotonic() - start < 10


def test_who_comes_while_the_one_before_leaves_tries_again(tmp_path, monkeypatch):
    opened, left = Path.open, []

    def leave(path, *arguments, **named):
        if path.name == lock.FILE and not left:
            left.append(path.parent.rmdir())
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", leave)
    with lock.held(tmp_path / "run"):
        assert left and (tmp_path / "run" / lock.FILE).exists()


def test_who_was_suspended_ends_where_another_took_over(holder, tmp_path):
    file = tmp_path / "run" / lock.FILE
    other = json.loads(file.read_text()) | {"host": "node7", "process": 123}
    new = tmp_path / "new"
    new.write_text(json.dumps(other))
    new.replace(file)
    assert holder.wait(20) == 2
    told = f"error: {tmp_path}/run: in use by process 123 on node7 since "
    assert holder.stderr.read().startswith(told)
    assert json.loads(file.read_text()) == other
