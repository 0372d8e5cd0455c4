"""The denoising loop: Euler steps along the flow, all in one scan."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d2m_jax import flow
from d2m_jax.models.flux import Flux

Text = tuple[Float[Array, "b l e"], Float[Array, "b v"]]  # token features and pooled vector


def denoise(
    model: Flux,
    noise: Float[Array, "b n c"],
    text: Text,
    grid: tuple[int, int],
    times: Float[Array | np.ndarray, " s"],
    guidance: float | Float[Array, ""],
    top_k: Sequence[int | None] = (None,),
    negative: Text | None = None,
    true_cfg: float | Float[Array, ""] = 1.0,
) -> Float[Array, "b n c"]:
    """From noise at times[0] to data at times[-1]: x += (t_next − t)·v, in float32. `grid`: rows,
    columns.

    The entries of `top_k` serve equal shares of the steps, in order. With a `negative` text the
    velocity is v_negative + true_cfg · (v − v_negative): classifier-free guidance, at twice the
    cost.
    """
    batch, steps = noise.shape[0], len(times) - 1
    if negative is not None:
        text = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), text, negative)
    txt, y = text
    img_ids, txt_ids = flow.image_ids(*grid), flow.text_ids(txt.shape[1])
    strength = jnp.full(len(txt), guidance) if model.config.guidance_embed else None

    def velocity(k, x, t):
        if negative is not None:
            x = jnp.concatenate([x, x])
        v = model(x, img_ids, txt, txt_ids, jnp.full(len(x), t), y, strength, k)
        return v if negative is None else v[batch:] + true_cfg * (v[:batch] - v[batch:])

    kinds = sorted(set(top_k), key=str)
    share = np.arange(steps) * len(top_k) // steps
    which = np.array([kinds.index(top_k[i]) for i in share], np.int32)
    branches = [lambda x, t, k=k: velocity(k, x, t) for k in kinds]

    def step(x, now):
        t, t_next, i = now
        return x + (t_next - t) * jax.lax.switch(i, branches, x, t), None

    return jax.lax.scan(step, noise, (times[:-1], times[1:], which))[0]
