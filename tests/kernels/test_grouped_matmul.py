"""The ways of the grouped matmul against the plain reference and a loop, forward and gradient."""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2m_jax.config import ConfigError
from d2m_jax.kernels import grouped_matmul as gmm
from d2m_jax.kernels import target, tuning
from tests.seed import generator

GROUPS, ROWS, D, F = 4, 300, 6, 5
SIZES = {
    "even": (75, 75, 75, 75),
    "skewed": (200, 1, 90, 9),
    "empty groups": (0, 150, 0, 130),
    "one has everything": (0, 0, 300, 0),
    "most rows have no group": (10, 0, 3, 20),
    "nothing": (0, 0, 0, 0),
}


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """TPU kernels run on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gmm, "INTERPRET", True)
        # Any tokamax kernel is called in the same way; XLA's runs here.
        way = replace(gmm._of_tokamax("cpu", "xla", "xla"), tokamax=())
        patch.setitem(gmm.WAYS, "tokamax", way)
        yield


def draw(rows=ROWS, dim=D, width=F):
    rng = generator()
    shapes = (rows, dim), (GROUPS, dim, width), (rows, width)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def forward_and_gradients(function):
    """(x, w, dy, sizes) → y, dx, dw as one compiled program."""

    @jax.jit
    def compute(x, w, dy, sizes):
        y, back = jax.vjp(lambda x, w: function(x, w, sizes), x, w)
        return y, *back(dy)

    return compute


@pytest.fixture(scope="module", params=["megablox", "tokamax"])
def way(request):
    if request.param == "tokamax":
        pytest.importorskip("tokamax", exc_type=Exception)
    return request.param


@pytest.fixture(scope="module")
def functions(way):
    fast = partial(gmm.grouped_matmul, way=way)
    return forward_and_gradients(lambda *a: fast(*a)), forward_and_gradients(gmm.reference)


def loop(x, w, sizes):
    """Row by row, in NumPy; rows of no group are zero."""
    group = np.repeat(np.arange(GROUPS), sizes)
    y = np.zeros((len(x), w.shape[-1]))
    for row, g in enumerate(group):
        y[row] = x[row] @ w[g]
    return y


def compare(functions, sizes):
    x, w, dy = draw()
    fast, plain = (f(x, w, dy, jnp.asarray(sizes, jnp.int32)) for f in functions)
    for name, a, b in zip(("y", "dx", "dw"), fast, plain, strict=True):
        # float32 sums of up to 300 products in another order
        np.testing.assert_allclose(a, b, atol=5e-5, err_msg=name)
    np.testing.assert_allclose(fast[0], loop(np.asarray(x), np.asarray(w), sizes), atol=5e-5)
    used = sum(sizes)
    for a in fast[:2]:  # to the bit: what has no group adds nothing
        np.testing.assert_array_equal(a[used:], 0)
    for g, size in enumerate(sizes):
        assert size or not np.any(fast[2][g]), f"group {g} is empty and has a gradient"


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_way_is_the_reference_and_the_loop(functions, sizes):
    compare(functions, sizes)


def test_any_split(functions):
    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
    def check(ends):
        sizes = np.diff(np.sort([0, *ends]))
        compare(functions, tuple(int(size) for size in sizes))

    check()


def test_under_vmap_it_is_a_loop():
    """As in a Mixture of Blocks, whose samples run side by side."""
    x, w, dy = (jnp.stack([a, a + 1]) for a in draw())
    sizes = jnp.asarray([SIZES["skewed"], SIZES["empty groups"]], jnp.int32)
    compute = forward_and_gradients(partial(gmm.grouped_matmul, way="megablox"))
    together = jax.vmap(compute)(x, w, dy, sizes)
    for i in range(2):
        for a, b in zip(together, compute(x[i], w[i], dy[i], sizes[i]), strict=True):
            np.testing.assert_allclose(a[i], b, atol=5e-5)


def test_auto_is_the_best_that_is_there(monkeypatch, caplog):
    assert gmm.choose("auto") == "tiled"
    monkeypatch.setattr(gmm, "target", lambda: "tpu")
    assert gmm.choose("auto") == "megablox"
    monkeypatch.setattr(gmm, "target", lambda: "gpu")
    target.log_once.cache_clear()
    assert [gmm.choose("auto") for _ in range(3)] == ["tiled"] * 3
    (line,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert "triton needs a GPU" in line and "tiles in plain XLA" in line
    assert "\n" not in line


def test_without_tokamax_the_line_says_so(monkeypatch):
    monkeypatch.setattr(gmm, "gpu_lacks", lambda: "")
    monkeypatch.setitem(sys.modules, "tokamax", None)
    gmm._tokamax_lacks.cache_clear()
    lack = gmm.lacks("triton", "gpu")
    gmm._tokamax_lacks.cache_clear()
    assert lack.startswith("needs tokamax with its kernel triton (ModuleNotFoundError")


@pytest.mark.parametrize("name", ["megablox", "triton", "mosaic_gpu", "mosaic_tpu"])
def test_a_forced_way_that_cannot_work_says_what_can(name):
    device = "gpu" if name in ("triton", "mosaic_gpu") else "tpu"
    with pytest.raises(ConfigError) as error:
        gmm.choose(name)
    assert str(error.value) == (
        f"D2M_JAX_EXPERTS = {name}: is for {device}, found cpu; here work auto,"
        " reference, tiled, tokamax"  # which this file added
    )


def test_forced_ways_that_work():
    assert [gmm.choose(name) for name in ("reference", "tiled")] == ["reference", "tiled"]


def test_tile_sizes_are_tuned_once_and_kept(monkeypatch, tmp_path):
    tokamax = pytest.importorskip("tokamax", exc_type=Exception)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._read.cache_clear()
    counted = []
    autotune = tokamax.autotune

    def count(lowered):
        counted.append(autotune(lowered, progress_bar=False))
        return counted[-1]

    monkeypatch.setattr(tokamax, "autotune", count)
    x, w, _ = draw(128, 128, 128)
    program = jax.jit(partial(gmm.grouped_matmul, way="tokamax"))
    sizes = jnp.asarray([128, 0, 0, 0], jnp.int32)
    file = tuning.tune(program.lower(x, w, sizes))
    assert file.parent == tmp_path / "d2m_jax" and "cpu" in file.name
    jax.clear_caches()
    assert tuning.tune(program.lower(x, w, sizes)) == file
    assert [len(result.data) for result in counted] == [1, 0]
    tuning._read.cache_clear()
