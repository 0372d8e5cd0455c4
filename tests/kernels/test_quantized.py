"""int8 and fp8: errors of rounding alone, in the matrices that are meant, cut as they were."""

import logging
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwix import QArray

from d2m_jax.config import ConfigError, FluxConfig, StackConfig
from d2m_jax.kernels import grouped_matmul as gmm
from d2m_jax.kernels import target
from d2m_jax.kernels.quantized import KINDS, dot, plain, quantized
from d2m_jax.models import experts
from d2m_jax.models.blocks import ffn
from d2m_jax.models.flux import abstract, model_of
from d2m_jax.models.parameters import unstacked
from tests import own_process
from tests.half import needs_half
from tests.models import toy
from tests.seed import generator

MODELS = {
    "dense": toy.DENSE,
    "moe": toy.SPARSE,
    "mob": replace(toy.DENSE, single=(StackConfig(1, 3, 2, ffn="moe"),), moe=toy.SPARSE.moe),
}


HERE = ["int8", pytest.param("fp8", marks=needs_half)]


@pytest.fixture(params=HERE)
def kind(request):
    return request.param


def by_name(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda a: isinstance(a, QArray))
    return {jax.tree_util.keystr(p, simple=True, separator="."): a for p, a in leaves}


def draw(*shape, seed=0):
    numbers = generator(seed).normal(size=shape)
    return jnp.asarray(numbers * np.geomspace(0.1, 10, shape[-1]), jnp.float32)


def kernel(w, kind):
    return quantized({"a": {"block": {"qkv": {"kernel": w}}}}, kind)["a"]["block"]["qkv"]["kernel"]


def rounding(a, axis, kind):
    """How far at most rounding moves each number: half a step."""
    a = np.abs(np.asarray(a, np.float64))
    largest = a.max(axis, keepdims=True)
    if kind == "int8":
        return np.broadcast_to(largest / 127 / 2, a.shape)
    # three bits of mantissa, and below 2^-6 steps of 2^-9
    return np.maximum(a / 16, largest / 448 * 2**-10)


def test_a_product_errs_by_rounding_at_most(kind):
    x, w = draw(5, 7, 48), draw(48, 20, seed=1)
    y = dot(x, kernel(w, kind))
    true = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    # |(x + δx)(w + δw) − x w| <= δx |w| + |x| δw + δx δw, and float32's own rounding
    dx, dw = rounding(x, -1, kind), rounding(w, 0, kind)
    bound = dx @ np.abs(w) + np.abs(x) @ dw + dx @ dw + 1e-5 * np.abs(x) @ np.abs(w)
    assert y.dtype == jnp.float32 and (np.abs(y - true) <= bound).all()
    # as large as errors that are even within their steps: their squares are a third of the bound's
    mean = np.sqrt((dx**2 @ np.square(w) + np.square(x) @ dw**2) / 3)
    assert 0.3 < np.linalg.norm(y - true) / np.linalg.norm(mean) < 1.5


def test_the_largest_number_is_between_no_two_steps(kind):
    """Else the last bit of a float32, which differs between machines, would move it by a step."""
    w = draw(48, 400)
    up, down = kernel(w, kind), kernel(-w, kind)
    largest = {"int8": 127, "fp8": 448}[kind]
    np.testing.assert_array_equal(np.abs(up.qvalue.astype(jnp.float32)).max(0), largest)
    np.testing.assert_array_equal(up.qvalue.astype(jnp.float32), -down.qvalue.astype(jnp.float32))


def test_activations_keep_their_type(kind):
    x, w = draw(6, 16).astype(jnp.bfloat16), kernel(draw(16, 8).astype(jnp.bfloat16), kind)
    assert w.qvalue.dtype == KINDS[kind] and w.scale.dtype == jnp.float32
    assert dot(x, w).dtype == jnp.bfloat16
    # only the result is rounded to bfloat16, by half a step at most; float32's own comes before it
    wide = dot(x.astype(jnp.float32), w)
    np.testing.assert_allclose(dot(x, w).astype(jnp.float32), wide, rtol=2**-8 + 2**-18)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_quantised(name):
    params = toy.params(MODELS[name])
    small = by_name(quantized(params, "int8"))
    ffn = {"in_layer.kernel", "out_layer.kernel"}
    moe = {f"shared.{n}" for n in ffn} | {"experts.in_kernel", "experts.out_kernel"}
    double, single = {"dense": (ffn, ffn), "mob": (ffn, moe)}.get(name, (moe, moe))
    expected = {
        f"double.0.block.{s}_attn.{n}.kernel" for s in ("img", "txt") for n in ("qkv", "proj")
    }
    expected |= {f"double.0.block.{s}_mlp.{n}" for s in ("img", "txt") for n in double}
    expected |= {f"single.0.block.{n}.kernel" for n in ("qkv", "attn_out")}
    expected |= {f"single.0.block.mlp.{n}" for n in single}
    assert {n for n, a in small.items() if isinstance(a, QArray)} == expected
    for n, a in by_name(params).items():
        if n in expected:
            assert small[n].scale.shape == (*a.shape[:-2], 1, a.shape[-1])
        else:
            assert small[n] is a, n


def test_a_block_of_a_stack_is_that_block_quantised(kind):
    params = toy.params(MODELS["mob"])["single"][0]
    stacked = quantized({"single": {"0": params}}, kind)
    alone = quantized({"single": {"0": jax.tree.map(lambda a: a[0, 1], params)}}, kind)
    part = jax.tree.map(lambda a: a[0, 1], stacked)
    jax.tree.map(np.testing.assert_array_equal, part, alone)


@pytest.mark.parametrize(("name", "way"), [("dense", "auto"), ("moe", "tiled"), ("mob", "auto")])
def test_a_model_is_near(name, way, kind, monkeypatch):
    config, inputs = MODELS[name], toy.inputs(MODELS[name])
    monkeypatch.setattr(experts, "asked", lambda: way)
    params = toy.params(config)
    run = jax.jit(lambda params: model_of(config, params)(*inputs))
    true = run(params)
    # Random weights, where the router's choices are often close: 0.04 and 0.10 of other seeds, and
    # three times that. Without scales it would be 1.
    small = quantized(params, kind)
    together, apart = run(small), run(unstacked(small))
    error = jnp.linalg.norm(together - true) / jnp.linalg.norm(true)
    assert 1e-3 < error < {"int8": 0.12, "fp8": 0.3}[kind]
    # Blocks apart are the same numbers in another program, which may round them to other steps: no
    # further from each other than from what is exact.
    assert jnp.linalg.norm(apart - together) < 2 * jnp.linalg.norm(together - true)


def test_routing_is_as_it_was(kind):
    """The gate stays float32; masked and sorted experts give the same."""
    config = toy.SPARSE
    graph, state = nnx.split(ffn(config, StackConfig(1, ffn="moe"), rngs=nnx.Rngs(0)))
    params = toy.random_like(nnx.to_pure_dict(state))
    x = draw(2, 9, config.hidden_size)
    results = []
    for way, wanted in (("reference", None), ("reference", kind), ("tiled", kind)):
        mine = {"a": {"block": params}}
        mine = mine if wanted is None else quantized(mine, wanted)
        nnx.replace_by_pure_dict(state, mine["a"]["block"])
        module = nnx.merge(graph, state)
        call = jax.jit(lambda x, module=module: module(x, x, toy.context(x[:, 0])))
        with toy.computed_by(way):
            results.append(call(x))
    (y, report), (masked, report_masked), (tiled, _) = results
    routing, routing_masked = report.routing, report_masked.routing
    np.testing.assert_array_equal(routing.load, routing_masked.load)
    # of two programs: float32's rounding
    np.testing.assert_allclose(routing.probability, routing_masked.probability, rtol=1e-5)
    assert 1e-3 < jnp.linalg.norm(masked - y) / jnp.linalg.norm(y) < 0.1
    # The same rounded numbers, summed in another order: but for one that this moves over the edge
    # between two steps, of which a token has one in a hundred.
    error = jnp.abs(masked - tiled).max(-1) / jnp.abs(y).max()
    assert (error < 128 * 2**-24).mean() > 0.75 and error.max() < 0.1


@pytest.mark.parametrize("way", ["megablox", "tokamax"])
def test_grouped(way, kind, monkeypatch, caplog):
    monkeypatch.setattr(gmm, "INTERPRET", True)
    if way == "tokamax":  # its kernels for GPUs and TPUs take the same arguments as XLA's
        pytest.importorskip("tokamax", exc_type=Exception)
        like = replace(gmm._of_tokamax("cpu", "xla", "xla"), tokamax=())
        monkeypatch.setitem(gmm.WAYS, "tokamax", like)
    target.log_once.cache_clear()
    x, w, sizes = draw(40, 16), kernel(draw(3, 16, 8, seed=1), kind), (20, 0, 13)
    product = partial(gmm.grouped_matmul, way=way)
    y = jax.jit(product)(x, w, jnp.asarray(sizes, jnp.int32))
    multiply = dot
    if way == "megablox":
        assert "megablox takes none" in caplog.text

        def multiply(x, w):
            return x @ plain(w, x.dtype)

    start = 0
    for i, size in enumerate(sizes):
        if size == 0:
            continue
        group = slice(start, start + size)
        expected = multiply(x[group], jax.tree.map(lambda a, i=i: a[i], w))
        # float32 sums in another order
        np.testing.assert_allclose(y[group], expected, atol=1e-4)
        start += size
    np.testing.assert_array_equal(y[start:], 0)


def test_unknown_kinds_and_devices_without_fp8(caplog):
    with pytest.raises(ConfigError) as error:
        quantized({}, "int4")
    assert str(error.value) == "quantize = int4: expected int8 or fp8, or None"
    target.log_once.cache_clear()
    quantized({}, "int8")
    assert not caplog.records
    quantized({}, "fp8")
    quantized({}, "fp8")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "saves memory but no time" in record.message


def test_originals_are_released():
    params = toy.params(toy.DENSE)["single"][0]
    small = by_name(quantized({"single": {"0": params}}, "int8", release=True))
    for name, a in by_name({"single": {"0": params}}).items():
        assert a.is_deleted() == isinstance(small[name], QArray), name


def test_bytes_of_full_flux(kind):
    """All but the modulations, which are 3.2 of its 11.9 billion parameters, take half of bf16."""
    params = abstract(FluxConfig())
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)
    small = jax.eval_shape(partial(quantized, kind=kind), params)

    def size(tree):
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))

    def mean_of(name):
        return size(by_name(small)[name]) / size(by_name(params)[name])

    assert size(params) == pytest.approx(23.8e9, rel=0.01)
    assert size(small) == pytest.approx(15.2e9, rel=0.02)
    assert mean_of("single.0.block.qkv.kernel") == pytest.approx(0.5, abs=0.002)


START = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
import qwix
from dataclasses import replace
from flax import nnx
from d2m_jax.config import MeshConfig, StackConfig
from d2m_jax.kernels import grouped_matmul as gmm
from d2m_jax.kernels.quantized import QArray, quantized
from d2m_jax.models.flux import model_of
from d2m_jax.models.blocks import ffn
from d2m_jax.sharding import make_mesh, put_batch, put_parameters, whole
from tests.models import toy
from tests.seed import generator
"""

LAYER = """
def rows(x, w, sizes, transpose):
    return qwix.ragged_dot(x, w, sizes)

gmm.WAYS["sorted"] = gmm.Way("cpu", rows, None, quantized=True)
graph, state = nnx.split(ffn(toy.SPARSE, StackConfig(1, ffn="moe"), rngs=nnx.Rngs(0)))
params = toy.random_like(nnx.to_pure_dict(state))
# Experts crowded in some samples alone, so that devices have other numbers of tiles left over.
x = generator().normal(size=(8, 40, 32)) + generator(1).normal(size=(8, 1, 32))
x = x.astype("f")

def run(way, params, x):
    nnx.replace_by_pure_dict(state, params)
    module = nnx.merge(graph, state)
    with toy.computed_by(way):
        return module(x, x, toy.context(x[:, 0]))[0]

small = quantized({"a": {"block": params}}, sys.argv[1])["a"]["block"]
for way in ("reference", "tiled", "sorted"):
    program = jax.jit(run, static_argnums=0)
    alone = np.asarray(program(way, small, x))
    for sizes in ((1, 2, 2, 2), (2, 1, 1, 4)):
        mesh = make_mesh(MeshConfig(*sizes))
        with jax.set_mesh(mesh):
            together = program(way, put_parameters(mesh, small), put_batch(mesh, x))
        error = np.abs(whole(together) - alone).max(-1) / np.abs(alone).max()
        # Sums of up to 128 products in float32, in another order. That moves a number over the edge
        # between two steps in at most 1 of 1000: of a token's 200, not in most tokens. (One scale
        # per device: no token is the same.) Such a one is one step off.
        same = (error < 128 * 2**-24).mean()
        assert same > 0.75 and error.max() < 0.1, (way, sizes, same, error.max())
print("equal")
"""

MODEL = """
config = replace(toy.DENSE, single=(StackConfig(1, ffn="moe"),), moe=toy.SPARSE.moe)
params = toy.params(config)
img, img_ids, txt, txt_ids, *rest = toy.inputs(config, batch=4)
arrays = jax.tree.map(np.asarray, (img, txt, *rest))

@jax.jit
def run(params, arrays):
    img, txt, *rest = arrays
    with toy.computed_by("tiled"):
        return model_of(config, params)(img, img_ids, txt, txt_ids, *rest)

def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, QArray))

mesh = make_mesh(MeshConfig(1, 2, 2, 2))
placed = put_parameters(mesh, params)
small = quantized(placed, "int8")
for a, b in zip(leaves(placed), leaves(small), strict=True):
    if isinstance(b, QArray):
        assert not a.sharding.is_fully_replicated
        assert b.qvalue.sharding.is_equivalent_to(a.sharding, a.ndim), (a.sharding, b)
small = put_parameters(mesh, small)  # as Pipeline does with those of load_pipeline
for a, b in zip(leaves(placed), leaves(small), strict=True):
    if isinstance(b, QArray):
        assert b.qvalue.sharding.is_equivalent_to(a.sharding, a.ndim), (a.sharding, b)
with jax.set_mesh(mesh):
    compiled = run.lower(small, put_batch(mesh, arrays)).compile()
    together = whole(compiled(small, put_batch(mesh, arrays)))
sent = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
assert any("= s8[" in line for line in sent), sent
assert not any(f"= f32[{shape}" in line for shape in ("32,96", "32,3,") for line in sent), sent

# A number that another order of sums moves by a step moves others in the blocks after it, and may
# turn a choice of experts: errors up to those of quantisation itself, in half of the samples.
def error(a, b):
    return np.median(np.linalg.norm(a - b, axis=(1, 2)) / np.linalg.norm(b, axis=(1, 2)))

alone = np.asarray(run(quantized(params, "int8"), arrays))
assert error(together, alone) < 2 * error(alone, run(params, arrays))
print("equal")
"""


def test_on_a_mesh_a_layer_is_as_on_one_device(kind):
    own_process.assert_equal(START + LAYER, kind, timeout=600)


def test_on_a_mesh_a_model_is_as_on_one_device():
    own_process.assert_equal(START + MODEL, timeout=600)
