"""The denoising loop: Euler steps along the flow, all in one compiled loop."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d2m_jax import flow
from d2m_jax.models.flux import Flux, known_of
from d2m_jax.models.reports import Body, Known

Text = tuple[Float[Array, "b l e"], Float[Array, "b v"]]  # token features and pooled vector


def denoise(
    model: Flux,
    noise: Float[Array, "b n c"],
    text: Text,
    grid: tuple[int, int],
    times: Float[Array | np.ndarray, " s"],
    guidance: float | Float[Array, "*b"],
    top_k: Sequence[int | None] = (None,),
    negative: Text | None = None,
    true_cfg: float | Float[Array, ""] = 1.0,
    reuse: int = 1,
    steps: int | Int[Array, ""] | None = None,
    span: tuple[int | Int[Array, ""], int | Int[Array, ""]] | None = None,
) -> Float[Array, "b n c"]:
    """From noise at times[0] to data at times[steps]: x += (t_next − t)·v, in float32.

    `grid`: rows, columns. `guidance` is one number, or one for each sample. `steps` are taken
    (None: all), with times beyond them left out: so one program serves many numbers of steps. With
    `span` only those from its first number up to its second are taken, the first a multiple of
    `reuse`, and `noise` is what those before left.

    The entries of `top_k` serve equal shares of the steps, in order. With a `negative` text the
    velocity is v_negative + true_cfg · (v − v_negative): classifier-free guidance, at twice the
    cost. What the normal experts add is computed in every `reuse`-th step and added again in those
    between.
    """
    batch, steps = noise.shape[0], len(times) - 1 if steps is None else steps
    if negative is not None:
        text = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), text, negative)
    txt, y = text
    img_ids, txt_ids = flow.image_ids(*grid), flow.text_ids(txt.shape[1])
    strength = jnp.broadcast_to(guidance, len(txt))

    def velocity(
        k: int | None,
        fresh: bool,
        x: Float[Array, "b n c"],
        t: Float[Array, ""],
        modulations: Body[Known],
        routed: Body[Known] | None,
    ):
        if negative is not None:
            x = jnp.concatenate([x, x])
        inputs = x, img_ids, txt, txt_ids, jnp.full(len(x), t), y, strength, k
        start = model.embed(*inputs, keep_routed=reuse > 1)
        v, report = model.run(*start, modulations, *([] if fresh or routed is None else [routed]))
        if negative is not None:
            v = v[batch:] + true_cfg * (v[:batch] - v[batch:])
        return v, known_of(report) if reuse > 1 else None

    # Modulations depend on the time alone: their weights, a quarter of FLUX.1's, are read once.
    times = jnp.asarray(times)
    conditions = jax.vmap(lambda t: model.condition(jnp.full(len(txt), t), y, strength)[1])
    modulations = model.modulations(conditions(times[:-1]))

    # A branch for each number of experts and, last, one that adds what they added before.
    kinds = sorted(set(top_k), key=str)
    branches = [partial(velocity, k, True) for k in kinds]
    if reuse > 1:
        branches.append(partial(velocity, kinds[0], False))
    branch_of = jnp.array([kinds.index(k) for k in top_k])

    def step(i: Int[Array, ""], carry: tuple[Array, Body[Known] | None]):
        x, routed = carry
        branch = branch_of[i * len(top_k) // steps]
        if reuse > 1:
            branch = jnp.where(i % reuse == 0, branch, len(kinds))
        t, t_next = times[i], times[i + 1]
        now = jax.tree.map(lambda a: a[i], modulations)
        v, routed = jax.lax.switch(branch, branches, x, t, now, routed)
        return x + (t_next - t) * v, routed

    routed = None
    if reuse > 1:
        first = jax.tree.map(lambda a: a[0], modulations)
        shapes = jax.eval_shape(branches[0], noise, times[0], first, None)[1]
        routed = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    first, last = (0, steps) if span is None else span
    return jax.lax.fori_loop(first, last, step, (noise, routed))[0]
