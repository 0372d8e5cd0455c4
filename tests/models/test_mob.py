"""Mixture of Blocks: what runs, what it gives, and how its router learns."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2m_jax import flow
from d2m_jax.config import StackConfig
from d2m_jax.models import mob
from d2m_jax.models.blocks import SingleStreamBlock
from d2m_jax.models.layers import rope
from d2m_jax.models.reports import Context
from d2m_jax.models.stack import Stack, over_axes
from tests.models import toy
from tests.seed import generator

BLOCKS, TEXT, GRID = 4, 4, (3, 5)
CHOICES = jnp.asarray([[0, 2], [1, 3], [0, 1]])
BATCH, DIM = len(CHOICES), toy.DENSE.hidden_size
IDS = jnp.concatenate([flow.text_ids(TEXT), flow.image_ids(*GRID)], axis=1)
PE = rope(IDS, toy.DENSE.axes_dim, toy.DENSE.theta)


def group(blocks=BLOCKS, ffn="dense"):
    """run_block, and the parameters of a group of single blocks."""

    def create(rngs):
        return SingleStreamBlock(toy.SPARSE, StackConfig(1, ffn=ffn), rngs=rngs)

    graph, state = nnx.split(nnx.eval_shape(lambda: over_axes(create, (blocks,), nnx.Rngs(0))))

    def run_block(params, streams, context):
        return nnx.merge(graph, params)(streams, context)

    return run_block, toy.random_like(state)


def entry(batch=BATCH):
    """Streams and global vectors, a batch of arrays."""
    rng = generator()
    shapes = (batch, TEXT + GRID[0] * GRID[1], DIM), (batch, DIM)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def context(vec, pe=PE):
    return Context(vec=vec, cond=jax.nn.silu(vec), pe=pe, text_tokens=TEXT)


def run(run_block, params, x, vec, chosen, weight, pe=PE):
    return mob.run_chosen(run_block, params, (x,), context(vec, pe), chosen, weight)


def plain(run_block, params, x, vec, chosen, weight):
    """Sample by sample in a Python loop: the blocks chosen by hand."""
    results = []
    for i, blocks in enumerate(chosen.tolist()):
        mine = x[i : i + 1]
        for j, block in enumerate(blocks):
            picked = jax.tree.map(lambda a, block=block: a[block], params)
            (new,), _ = run_block(picked, (mine,), context(vec[i : i + 1]))
            mine = mine + weight[i, j] * (new - mine)
        results.append(mine)
    return jnp.concatenate(results)


@pytest.fixture(scope="module")
def expected():
    """Output and gradients of the plain loop, all differentiable inputs included."""
    run_block, params = group()
    x, vec = entry()

    def loss(params, x, vec, weight):
        y = plain(run_block, params, x, vec, CHOICES, weight)
        return jnp.square(y - 1).mean(), y

    loss = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, y), gradients = loss(params, x, vec, jnp.ones(CHOICES.shape))
    return y, gradients


@pytest.mark.parametrize("parts", [1, 4])  # the whole batch, or sample by sample
def test_chosen_blocks_run_as_by_hand(parts, monkeypatch, expected):
    run_block, params = group()
    monkeypatch.setattr(mob, "PARTS", parts)
    x, vec = entry()

    def loss(params, x, vec, weight):
        (y,), _ = run(run_block, params, x, vec, CHOICES, weight)
        return jnp.square(y - 1).mean(), y

    loss = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, y), gradients = loss(params, x, vec, jnp.ones(CHOICES.shape))
    np.testing.assert_allclose(y, expected[0], atol=1e-4)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected[1]), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    # every block, and the weight of every choice, was reached
    assert all(
        jnp.abs(a).reshape(BLOCKS, -1).max(1).min() > 0 for a in jax.tree.leaves(gradients[0])
    )
    assert jnp.abs(gradients[3]).min() > 1e-5


def test_the_batch_never_changes_a_sample(expected):
    """Up to float rounding, for another batch is another program."""
    run_block, params = group()
    x, vec = entry()
    order = jnp.asarray([2, 0])
    call = jax.jit(lambda *a: run(run_block, *a)[0][0])
    y = call(params, x[order], vec[order], CHOICES[order], jnp.ones((2, 2)))
    np.testing.assert_allclose(y, expected[0][order], atol=1e-4)


def test_positions_may_differ_by_sample(expected):
    run_block, params = group()
    x, vec = entry()
    moved = rope(IDS + (jnp.arange(BATCH) == 1)[:, None, None] * IDS, (4, 6, 6), 10_000)
    call = jax.jit(lambda *a: run(run_block, *a)[0][0])
    y = call(params, x, vec, CHOICES, jnp.ones(CHOICES.shape), moved)
    difference = jnp.abs(y - expected[0]).max((1, 2))
    assert difference[1] > 1e-2 and difference[jnp.asarray([0, 2])].max() < 1e-4


@pytest.mark.parametrize("parts", [1, 4])
def test_reports_are_by_block_and_zero_where_skipped(parts, monkeypatch):
    monkeypatch.setattr(mob, "PARTS", parts)
    run_block, params = group(ffn="moe")
    x, vec = entry()
    call = jax.jit(lambda *a: run(run_block, *a)[1])
    routing = call(params, x, vec, CHOICES, jnp.ones(CHOICES.shape))["mlp"].routing
    assert routing.load.shape == (BLOCKS, BATCH, toy.SPARSE.moe.experts)
    ran = np.asarray(jax.nn.one_hot(CHOICES, BLOCKS).sum(1).T)
    np.testing.assert_allclose(routing.load.sum(-1), ran, atol=1e-6)
    np.testing.assert_allclose(routing.probability.sum(-1), ran, atol=1e-6)


@pytest.mark.parametrize(
    "blocks, chosen, parts",
    [
        (2, [[0, 1]], {0: 1, 1: 1}),
        (8, [[0, 1], [0, 7], [6, 7]], {0: 2, 1: 1, 6: 1, 7: 2}),  # parts of one sample
        (2, [[1]] * 8, {1: 4}),  # of two: all choose alike, nothing is computed in vain
        (2, [[0], [1]] * 4, {0: 2, 1: 2}),
        (2, [[0], [1], [1], [1], [1], [1], [0], [0]], {0: 2, 1: 3}),  # one sample too many
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_skipped_blocks_are_not_computed(blocks, chosen, parts, apart):
    """Every call of a block, counted while it runs."""
    run_block, params = group(blocks)
    batch, found = len(chosen), Counter()
    numbered = {"params": params, "number": jnp.arange(blocks)}
    if apart:
        numbered = tuple(jax.tree.map(lambda a, i=i: a[i], numbered) for i in range(blocks))

    def counting(numbered, streams, context):
        jax.debug.callback(lambda n: found.update([int(n)]), numbered["number"])
        assert streams[0].shape[0] == batch // min(4, batch)
        return run_block(numbered["params"], streams, context)

    x, vec = entry(batch)
    chosen = jnp.asarray(chosen)
    weight = jnp.ones(chosen.shape)
    y = jax.jit(lambda *a: run(counting, *a)[0][0])(numbered, x, vec, chosen, weight)
    jax.effects_barrier()
    assert found == parts
    np.testing.assert_allclose(y, plain(run_block, params, x, vec, chosen, weight), atol=1e-4)


def test_weight_is_exactly_1_and_its_gradient_reaches_the_router():
    logits = jnp.asarray([[0.1, 1.5, -0.3, 2.0], [3.0, 0.0, 0.2, 0.1]])
    probability, chosen, weight = mob.choose(logits, 2)
    np.testing.assert_array_equal(chosen, [[1, 3], [0, 2]])
    assert (weight == 1).all()
    np.testing.assert_allclose(probability, jax.nn.softmax(logits), rtol=1e-6)
    slope = jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    through = jax.grad(lambda logits: (slope * mob.choose(logits, 2)[2]).sum())(logits)

    def of_probability(logits):
        return (slope * jnp.take_along_axis(jax.nn.softmax(logits), chosen, 1)).sum()

    np.testing.assert_allclose(through, jax.grad(of_probability)(logits), rtol=1e-6)
    assert jnp.abs(through).max() > 0.1


@pytest.mark.parametrize("active", [1, 2, 4])
def test_adjacent_blocks_are_chosen_as_by_hand(active):
    """Every run of blocks tried: the one of the largest sum, which need not hold the two best."""
    logits = generator().normal(size=(20, BLOCKS)).astype(np.float32)
    logits[0] = [3.0, -3.0, 2.0, 1.0]
    probability, chosen, weight = jax.jit(mob.choose, static_argnums=(1, 2))(
        logits, active, "adjacent"
    )
    assert (weight == 1).all()
    runs = [list(range(i, i + active)) for i in range(BLOCKS - active + 1)]
    for i, mine in enumerate(logits.tolist()):
        sums = np.array([sum(mine[block] for block in run) for run in runs])
        assert chosen[i].tolist() == runs[sums.argmax()]
        of_runs = np.exp(sums) / np.exp(sums).sum()
        pairs = list(zip(of_runs, runs, strict=True))
        shares = [sum(q / active for q, run in pairs if j in run) for j in range(BLOCKS)]
        np.testing.assert_allclose(probability[i], shares, rtol=1e-5)
    if active == 2:
        assert chosen[0].tolist() == [2, 3]
    np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-5)
    slope = generator(1).normal(size=(20, active)).astype(np.float32)
    through = jax.grad(lambda x: (slope * mob.choose(x, active, "adjacent")[2]).sum())(logits)

    def of_best_run(logits):
        sums = jnp.stack([logits[:, run].sum(1) for run in runs], axis=1)
        best = jnp.take_along_axis(jax.nn.softmax(sums), sums.argmax(1)[:, None], 1)
        return (slope * best).sum()

    np.testing.assert_allclose(through, jax.grad(of_best_run)(logits), rtol=1e-4, atol=1e-6)
    assert active == BLOCKS or jnp.abs(through).max() > 0.1


def test_a_stack_runs_the_adjacent_blocks_that_its_config_asks_for():
    config = replace(toy.DENSE, mob_choice="adjacent")
    stack = Stack(SingleStreamBlock, config, StackConfig(1, 4, 2), rngs=nnx.Rngs(0))
    stack.router.vec.kernel[...] = jnp.zeros_like(stack.router.vec.kernel[...])
    stack.router.features.bias[...] = jnp.asarray([[3.0, -3.0, 2.0, 1.0]])
    x, vec = entry()
    for choice, expected in (("adjacent", [0, 0, 1, 1]), ("any", [1, 0, 1, 0])):
        stack.choice = choice
        used = stack((0 * x,), context(vec))[1].choice.used
        np.testing.assert_array_equal(used[0], [expected] * BATCH)


def test_a_chosen_block_s_output_passes_as_it_is():
    """Large inputs: x + 1·(y − x) would lose what y holds."""

    def run_block(params, streams, context):
        return (params["y"] + 0 * streams[0],), {}

    x = jnp.full((1, 19, DIM), 3e7)
    y = jnp.full((1, 19, DIM), 0.1)
    (result,), _ = run(run_block, {"y": y}, x, entry(1)[1], jnp.asarray([[0]]), jnp.ones((1, 1)))
    np.testing.assert_array_equal(result, y)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_router_is_that_of_the_paper(alpha):
    router = mob.BlockRouter(DIM, BLOCKS, alpha, rngs=nnx.Rngs(0))
    x, vec = entry()
    logits = router((x.astype(jnp.bfloat16),), vec.astype(jnp.bfloat16), TEXT)
    assert logits.dtype == jnp.float32
    x, vec = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, vec))
    pooled = [x[:, TEXT:].mean(1), x[:, :TEXT].mean(1)]
    pooled = [p / np.sqrt((p**2).mean(-1, keepdims=True) + 1e-6) for p in pooled]
    features = np.concatenate(pooled, axis=-1) @ np.asarray(router.features.kernel[...])
    expected = alpha * features + (1 - alpha) * vec @ np.asarray(router.vec.kernel[...])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    # a double block's streams are pooled alike
    streams = tuple(jnp.asarray(a, jnp.bfloat16) for a in (x[:, TEXT:], x[:, :TEXT]))
    vec = jnp.asarray(vec, jnp.bfloat16)
    np.testing.assert_allclose(router(streams, vec), logits, atol=1e-5)
    # a model without text: its mean is zero, not NaN
    image = router((streams[0],), vec)
    expected = router((streams[0], jnp.zeros_like(streams[1])), vec)
    np.testing.assert_allclose(image, expected, atol=1e-6)
