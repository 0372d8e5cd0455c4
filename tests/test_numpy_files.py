import gc
import io
import sys
import threading

import numpy as np
import pytest

from d2m_jax import numpy_files


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_what_is_read_is_what_was_saved(tmp_path):
    array = np.asfortranarray(np.arange(6, dtype=np.uint16).reshape(2, 3))
    start = io.BytesIO(npy(array))
    assert numpy_files.header(start) == ((2, 3), True, np.dtype(np.uint16))
    assert start.read() == array.tobytes(order="F")
    np.testing.assert_array_equal(numpy_files.load(io.BytesIO(npy(array))), array)
    np.savez(tmp_path / "two.npz", a=array, b=array[0])
    found = numpy_files.load_all(tmp_path / "two.npz")
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"], array[0])


@pytest.fixture
def threads_change_often():
    """The garbage collector runs Python's code, and threads change within it."""
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(5, 5, 5)
    sys.setswitchinterval(1e-6)
    yield
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)


class Cycle:
    def __init__(self):
        self.own = self

    def __del__(self):
        sum(range(50))


@pytest.mark.parametrize("read", [numpy_files.header, numpy_files.load])
def test_many_threads_read_at_once(read, threads_change_often):
    data, errors = npy(np.zeros((6, 8), np.uint16)), []

    def work():
        try:
            for _ in range(1000):
                Cycle()
                read(io.BytesIO(data))
        except SystemError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
