# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The MoE layer in a model of your own
#
# `d2m_jax.MoE` stands in the place of a feed-forward network: a shared expert reads every token,
# a gate picks a few of the normal experts for each. Here it learns a picture, and we look at
# which expert learned which part of it. Any runtime will do: CPU, GPU or TPU.

# %%
# Not on PyPI yet: for d2m_jax write a wheel's file, or git+ and the address of the repository.
# !python -c "import d2m_jax" 2> /dev/null || pip install -q d2m_jax

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx

import d2m_jax
from d2m_jax.config import MoEConfig

SIDE, DIM = 64, 32

# %% [markdown]
# The picture: colours as a function of the place, with edges that are hard to learn.

# %%
rows, columns = jnp.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
places = jnp.stack([rows, columns], axis=-1).reshape(1, -1, 2)  # one sample, a token per pixel
angle, radius = jnp.arctan2(rows, columns), jnp.hypot(rows, columns)
spiral = jnp.sign(jnp.sin(3 * angle + 9 * radius)) * (radius < 0.9)
picture = jnp.stack([spiral, rows, columns * spiral], axis=-1) / 2 + 0.5
colours = picture.reshape(1, -1, 3)


# %% [markdown]
# The model: two MoE layers between two linear ones. `moe(x)` takes `[batch, tokens, dim]` and
# gives the same and a report; `report.routing` says what shares of its choices each expert got,
# and `balance` makes of it the loss that keeps all of them in use.


# %%
class Painter(nnx.Module):
    def __init__(self, rngs):
        config = MoEConfig(experts=8, top_k=2)
        self.enter = nnx.Linear(2, DIM, rngs=rngs)
        self.layers = nnx.List(
            [d2m_jax.MoE(DIM, shared=DIM, expert=DIM, config=config, rngs=rngs) for _ in range(2)]
        )
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.leave = nnx.Linear(DIM, 3, rngs=rngs)

    def __call__(self, places):
        x, balance, chosen = 4 * self.enter(places), 0.0, []
        for moe in self.layers:
            y, report = moe(self.norm(x))
            routing = report.routing
            balance += d2m_jax.balance(routing.probability.mean(0), routing.load.mean(0))
            chosen.append(moe.gate(self.norm(x)).argmax(-1))  # the first choice of every token
            x = x + y
        return nnx.sigmoid(self.leave(x)), balance, chosen


model = Painter(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(1e-2, 200)), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    def loss(model):
        painted, balance, _ = model(places)
        return jnp.square(painted - colours).mean() + 0.003 * balance

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


losses = [step(model, optimizer).item() for _ in range(200)]
print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

# %% [markdown]
# What it painted, and which normal expert each pixel likes best in either layer: regions that
# nobody drew.

# %%
painted, _, chosen = nnx.jit(Painter.__call__)(model, places)
figure, axes = plt.subplots(1, 5, figsize=(15, 3.2))
axes[0].plot(losses)
axes[0].set(title="loss", yscale="log", xlabel="step")
axes[1].imshow(picture)
axes[1].set_title("the picture")
axes[2].imshow(painted.reshape(SIDE, SIDE, 3))
axes[2].set_title("painted")
for axis, experts, name in zip(axes[3:], chosen, ("first", "second"), strict=True):
    axis.imshow(experts.reshape(SIDE, SIDE), cmap="tab10", vmin=0, vmax=9)
    axis.set_title(f"experts of the {name} layer")
for axis in axes[1:]:
    axis.axis("off")
plt.show()

# %% [markdown]
# Without a gate there is `d2m_jax.grouped_matmul` alone: rows sorted by group, one matrix per
# group, by the kernel that suits the device.

# %%
rows_of_two_groups = jnp.ones((5, 3))
matrices = jnp.stack([jnp.ones((3, 4)), 2 * jnp.ones((3, 4))])
d2m_jax.grouped_matmul(rows_of_two_groups, matrices, jnp.array([2, 3]))
