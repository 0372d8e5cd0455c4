"""The MoE FFN: both paths, gates, the run-time knob, independence of samples."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2m_jax.config import ConfigError, FluxConfig, MoEConfig, StackConfig
from d2m_jax.kernels import grouped_matmul
from d2m_jax.models import experts
from d2m_jax.models.blocks import ffn
from d2m_jax.models.reports import FFNReport
from tests.models import toy
from tests.seed import generator

N, DIM, BATCH, TOKENS = 6, 16, 3, 20
STACK = StackConfig(1, ffn="moe")
CONFIG = FluxConfig(hidden_size=DIM, num_heads=1, axes_dim=(4, 6, 6), moe=MoEConfig(experts=N))


def build(way="auto", **changes):
    """Parameters, and a function (params, x, unmodulated, vec, k) → output and report."""
    config = replace(CONFIG, moe=replace(CONFIG.moe, **changes))
    graph, state = nnx.split(nnx.eval_shape(lambda: ffn(config, STACK, rngs=nnx.Rngs(0))))

    def call(params, x, unmodulated, vec, k=None, each=None):
        context = toy.context(vec, top_k=k, top_k_each=each)
        with toy.computed_by(way):
            return nnx.merge(graph, params)(x, unmodulated, context)

    return toy.random_like(state, seed=1), jax.jit(call, static_argnums=4)


def inputs(batch=BATCH, seed=0):
    rng = generator(seed)
    shapes = (batch, TOKENS, DIM), (batch, TOKENS, DIM), (batch, DIM)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@pytest.fixture(scope="module")
def reference():
    return build(way="reference")


@pytest.fixture(scope="module")
def tiled():
    return build(way="tiled")


@pytest.mark.parametrize("k", [1, 2, 6])
def test_tiled_is_the_reference_forward_and_gradient(k):
    (params, fast), (_, plain) = build(way="tiled"), build(way="reference")
    x, unmodulated, vec = inputs()
    target = jnp.sin(x)

    def loss(call):
        def value(params, x):
            y, report = call(params, x, unmodulated, vec, k)
            return jnp.square(y - target).mean(), (y, report)

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))

    ((_, (y, report)), gradients), ((_, (y2, report2)), gradients2) = (
        loss(call)(params, x) for call in (fast, plain)
    )
    np.testing.assert_allclose(y, y2, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), report, report2)
    assert report.routing is not None
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(gradients2), strict=True
    ):
        # float32 sums of all tokens, in another order: 1e-6, and room for other ones
        np.testing.assert_allclose(a, b, atol=6e-6, err_msg=jax.tree_util.keystr(path))
    for path, a in jax.tree_util.tree_leaves_with_path(gradients[0]):
        assert float(jnp.abs(a).max()) > 1e-6, jax.tree_util.keystr(path)


def by_hand(params, x, weights):
    """Σ weights[token, i] · expert i(x) + shared expert, in NumPy and float64."""

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(params))
    x = np.asarray(x, np.float64)
    shared = p["shared"]["in_layer"], p["shared"]["out_layer"]
    y = gelu(x @ shared[0]["kernel"] + shared[0]["bias"]) @ shared[1]["kernel"] + shared[1]["bias"]
    for i in range(N):
        hidden = gelu(x @ p["experts"]["in_kernel"][i] + p["experts"]["in_bias"][i])
        y += p["scale"] * weights[..., i, None] * (hidden @ p["experts"]["out_kernel"][i])
    return y


def scores(params, x):
    gate = nnx.to_pure_dict(params)["gate"]
    return np.asarray(x, np.float64) @ np.asarray(gate["kernel"]) + np.asarray(gate["bias"])


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("gate", ["renormalised", "softmax", "sigmoid"])
def test_gate_kinds_by_hand(gate, k):
    """An expert weighs the same at every k: trained with 2, run with k."""
    params, call = build(gate=gate, way="reference")
    x, unmodulated, vec = inputs()
    y, report = call(params, x, unmodulated, vec, k)
    logits = scores(params, x)
    probability = softmax(logits)

    def best(k):
        return logits >= np.sort(logits, axis=-1)[..., -k][..., None]

    weights = {
        "renormalised": 2 * probability / (probability * best(2)).sum(-1, keepdims=True),
        "softmax": N * probability,
        "sigmoid": 2 / (1 + np.exp(-logits)),
    }[gate]
    np.testing.assert_allclose(y, by_hand(params, x, weights * best(k)), atol=2e-5)
    np.testing.assert_allclose(report.routing.load, best(k).mean(1) / k, atol=1e-6)
    np.testing.assert_allclose(report.routing.probability, probability.mean(1), atol=1e-6)
    np.testing.assert_allclose(report.routing.load.sum(-1), 1, atol=1e-6)


def test_trained_top_k_tells_the_weights_whatever_runs():
    params, call = build(top_k=3, trained_top_k=2)
    _, other = build(top_k=2)
    assert MoEConfig(top_k=2).running(3) == MoEConfig(top_k=3, trained_top_k=2)
    assert MoEConfig(top_k=2).running(3).running(1) == MoEConfig(top_k=1, trained_top_k=2)
    np.testing.assert_array_equal(
        call(params, *inputs())[0], other(params, *inputs(), 3)[0], strict=True
    )
    with pytest.raises(ConfigError, match=r"trained_top_k = 13: expected 1 to experts = 12"):
        MoEConfig(trained_top_k=13)


def test_a_gate_that_trains_with_one_expert_learns_straight_through():
    """Its choice weighs exactly 1, and its logit's gradient is that of its probability."""
    params, call = build(top_k=1, way="reference")
    x, unmodulated, vec = inputs()
    first = np.argmax(scores(params, x), -1)
    weights = np.eye(N)[first]
    np.testing.assert_allclose(
        call(params, x, unmodulated, vec)[0], by_hand(params, x, weights), atol=2e-5
    )

    def value(params):
        y, _ = call(params, x, unmodulated, vec)
        return (y * jnp.sin(x)).sum()

    found = jax.grad(value)(params)["gate"]["bias"][...]
    # d y / d weight is the expert's own output: what doubling the weight of the first adds
    once = by_hand(params, x, 0 * weights)
    added = ((by_hand(params, x, weights) - once) * np.sin(x)).sum(-1)
    p = softmax(scores(params, x))
    of_first = np.take_along_axis(p, first[..., None], -1)
    expected = (added[..., None] * of_first * (weights - p)).sum((0, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["reference", "tiled"])
def test_each_sample_has_its_own_top_k(way):
    """Beside each other with 0, 2 and 4 experts they are what each is alone; gradients too."""
    params, call = build(way=way)
    x, unmodulated, vec = inputs()
    each = [0, 2, 4]

    def together(params, x):
        y, report = call(params, x, unmodulated, vec, 4, jnp.asarray(each))
        return (y * jnp.sin(x)).sum(), (y, report)

    def apart(params, x):
        ys = [call(params, x[i : i + 1], x[:1], vec[:1], k)[0] for i, k in enumerate(each)]
        y = jnp.concatenate(ys)
        return (y * jnp.sin(x)).sum(), (y, None)

    (_, (y, report)), gradients = jax.value_and_grad(together, (0, 1), has_aux=True)(params, x)
    (_, (y2, _)), gradients2 = jax.value_and_grad(apart, (0, 1), has_aux=True)(params, x)
    np.testing.assert_allclose(y, y2, atol=2e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients2), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(report.routing.load.sum(-1), [0, 1, 1], atol=1e-6)


@pytest.mark.parametrize("gate", ["renormalised", "softmax", "sigmoid"])
def test_all_experts_with_a_uniform_gate_are_the_whole_ffn(gate):
    params, call = build(gate=gate)
    params["gate"]["kernel"][...] = jnp.zeros((DIM, N))
    params["gate"]["bias"][...] = jnp.full(N, 0.0 if gate == "sigmoid" else 0.7)
    x, unmodulated, vec = inputs()
    y, _ = call(params, x, unmodulated, vec, N)
    np.testing.assert_allclose(y, by_hand(params, x, np.ones((BATCH, TOKENS, N))), atol=2e-5)


def test_top_k_0_is_the_shared_expert(tiled):
    params, call = tiled
    x, unmodulated, vec = inputs()
    y, report = call(params, x, unmodulated, vec, 0)
    np.testing.assert_allclose(y, by_hand(params, x, np.zeros((BATCH, TOKENS, N))), atol=1e-5)
    assert report == FFNReport()


def test_top_k_is_a_knob_and_defaults_to_the_config_s(tiled):
    params, call = tiled
    outputs = [call(params, *inputs(), k)[0] for k in (None, 2, 3)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[1] - outputs[2]).max() > 0.01


@pytest.mark.parametrize("path", ["tiled", "reference"])
def test_the_batch_never_changes_a_sample(path, request):
    """Up to float rounding: a matmul of another size may sum in another order."""
    params, call = request.getfixturevalue(path)
    x, unmodulated, vec = inputs()
    whole, report = call(params, x, unmodulated, vec)
    # beside other neighbours, which all want one expert
    crowd = x.at[1:].set(x[1, 0])
    crowded, report2 = call(params, crowd, unmodulated, vec)
    alone, report3 = call(params, x[:1], unmodulated[:1], vec[:1])
    np.testing.assert_allclose(crowded[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(alone[0], whole[0], atol=1e-5)
    np.testing.assert_array_equal(report.routing.load[0], report2.routing.load[0])
    np.testing.assert_array_equal(report.routing.load[0], report3.routing.load[0])


def test_order_of_tokens_does_not_matter(tiled):
    params, call = tiled
    x, unmodulated, vec = inputs()
    order = generator(2).permutation(TOKENS)
    straight, _ = call(params, x, unmodulated, vec)
    shuffled, _ = call(params, x[:, order], unmodulated[:, order], vec)
    np.testing.assert_allclose(shuffled, straight[:, order], atol=1e-5)


def test_router_is_float32_in_half_precision():
    """Scores that differ by less than bfloat16 can tell still have an order."""
    params, call = build(way="reference")
    kernel = np.zeros((DIM, N), np.float32)
    kernel[0] = 1 + np.arange(N) / 2**12
    params["gate"]["kernel"][...], params["gate"]["bias"][...] = jnp.asarray(kernel), jnp.zeros(N)
    x, unmodulated, vec = inputs()
    x = jnp.abs(x).astype(jnp.bfloat16) + 1
    y, report = call(params, x, unmodulated.astype(jnp.bfloat16), vec, 1)
    assert y.dtype == jnp.bfloat16
    assert report.routing.load.dtype == report.routing.probability.dtype == jnp.float32
    np.testing.assert_array_equal(report.routing.load, [[0, 0, 0, 0, 0, 1]] * BATCH)


def test_router_input_unmodulated_reads_the_token_and_the_time():
    params, call = build(router_input="unmodulated", way="reference")
    x, unmodulated, vec = inputs()
    _, report = call(params, x, unmodulated, vec)
    gate = np.asarray(params["gate_cond"]["kernel"][...])
    cond = np.asarray(jax.nn.silu(vec)) @ gate
    probability = softmax(scores(params, unmodulated) + cond[:, None])
    np.testing.assert_allclose(report.routing.probability, probability.mean(1), atol=1e-5)
    # what the experts read does not move the router
    _, scaled = call(params, 10 * x, unmodulated, vec)
    np.testing.assert_array_equal(scaled.routing.load, report.routing.load)
    # at birth the time has no say
    config = replace(CONFIG, moe=MoEConfig(experts=N, router_input="unmodulated"))
    born = jax.jit(lambda: ffn(config, STACK, rngs=nnx.Rngs(0)).gate_cond.kernel[...])()
    assert born.shape == (DIM, N) and not born.any()


def test_auto_takes_the_sparse_path_for_many_tokens(monkeypatch):
    taken = []
    for name in ("reference_experts", "chosen_experts"):
        function = getattr(experts, name)

        def spy(*arguments, name=name, function=function):
            taken.append(name)
            return function(*arguments)

        monkeypatch.setattr(experts, name, spy)
    params, call = build(way="auto")
    for tokens, k in ((50, 2), (80, 2), (80, N)):
        x, vec = jnp.ones((1, tokens, DIM)), jnp.ones((1, DIM))
        jax.eval_shape(lambda x, v, k=k: call(params, x, x, v, k), x, vec)
    assert taken == ["reference_experts", "chosen_experts", "reference_experts"]


@pytest.mark.parametrize("chosen", [[0] * 9, [5] * 9, [5, 0, 5, 3, 0, 5, 1, 0, 5], [6, 0, 6, 2]])
def test_sort_gives_every_choice_a_row_of_its_expert(chosen):
    order, row, sizes = experts.sort(jnp.asarray(chosen)[:, None], N)
    np.testing.assert_array_equal(np.asarray(chosen)[order], np.sort(chosen))
    np.testing.assert_array_equal(np.asarray(order)[row[:, 0]], np.arange(len(chosen)))
    np.testing.assert_array_equal(sizes, np.bincount(chosen, minlength=N + 1)[:N])


@pytest.mark.parametrize("way", ["reference", "tiled", "megablox"])
def test_devices_with_some_of_the_experts_add_up(way, monkeypatch):
    """A choice of another device's expert adds exactly zero, to gradients too."""
    monkeypatch.setattr(grouped_matmul, "INTERPRET", True)  # megablox on a CPU
    monkeypatch.setattr(experts, "choose", lambda way: way)
    rng = generator()
    x = jnp.asarray(rng.normal(size=(2, 40, DIM)), jnp.float32)
    chosen = jnp.asarray(rng.integers(0, N, (2, 40, 2)), jnp.int32)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, (2, 40, 2)), jnp.float32)
    shapes = (N, DIM, 8), (N, 8), (N, 8, DIM)
    weights = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    @jax.jit
    def compute(x, chosen, weight, weights, dy):
        def run(x, weight, weights):
            return experts.run_experts(way, (x, chosen, weight), weights, among=N)

        y, back = jax.vjp(run, x, weight, weights)
        return y, *back(dy)

    dy = jnp.sin(x)
    whole = compute(x, chosen, weight, weights, dy)
    half = N // 2
    parts = []
    for first in (0, half):
        mine = jnp.where((chosen >= first) & (chosen < first + half), chosen - first, half)
        own = tuple(a[first : first + half] for a in weights)
        parts.append(compute(x, mine, weight, own, dy))
        # to the bit, per choice: the weight of another's expert has no gradient
        np.testing.assert_array_equal(parts[-1][2][np.asarray(mine) == half], 0)
        nothing = compute(x, jnp.full_like(mine, half), weight, own, dy)
        jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), nothing)
    for i, name in enumerate(("y", "dx", "dweight")):
        # float32 sums of many numbers of size 1 to 10, in another order
        np.testing.assert_allclose(parts[0][i] + parts[1][i], whole[i], atol=1e-4, err_msg=name)
    for a, b, c in zip(parts[0][3], parts[1][3], whole[3], strict=True):
        np.testing.assert_allclose(jnp.concatenate([a, b]), c, atol=1e-4)


def test_the_environment_asks_for_a_way(monkeypatch):
    for environment, way in (({}, "auto"), ({"D2M_JAX_EXPERTS": "tiled"}, "tiled")):
        monkeypatch.setattr(experts, "os", SimpleNamespace(environ=environment))
        assert experts.asked() == way
