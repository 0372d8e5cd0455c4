"""The denoising loop: Euler steps along the flow, all in one scan."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from d2m_jax import flow
from d2m_jax.models.flux import Flux


def denoise(
    model: Flux,
    noise: Float[Array, "b n c"],
    txt: Float[Array, "b l e"],
    y: Float[Array, "b v"],
    grid: tuple[int, int],
    times: Float[Array, " s"],
    guidance: float | Float[Array, ""],
    top_k: int | None = None,
) -> Float[Array, "b n c"]:
    """From noise at times[0] to data at times[-1]: x += (t_next − t)·v, in float32. `grid`: rows,
    columns."""
    batch = noise.shape[0]
    img_ids, txt_ids = flow.image_ids(*grid), flow.text_ids(txt.shape[1])
    strength = jnp.full(batch, guidance) if model.config.guidance_embed else None

    def step(x, pair):
        t, t_next = pair
        v = model(x, img_ids, txt, txt_ids, jnp.full(batch, t), y, strength, top_k)
        return x + (t_next - t) * v, None

    return jax.lax.scan(step, noise, (times[:-1], times[1:]))[0]
