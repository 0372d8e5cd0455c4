# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # From a dense model to a sparse one, in miniature
#
# A small text-to-image model that comes with the package is cut into experts and distilled, and
# we watch its pictures come back. The same functions do it to FLUX.1:
# `load_pipeline("black-forest-labs/FLUX.1-dev")`. Any runtime will do; a CPU takes a minute or
# two for what is here.

# %%
# Not on PyPI yet: for d2m_jax write a wheel's file, or git+ and the address of the repository.
# !python -c "import d2m_jax" 2> /dev/null || pip install -q d2m_jax

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
from IPython.display import display

import d2m_jax
from d2m_jax.config import SparsifyConfig

teacher = d2m_jax.load_pipeline("teachers/pictograms")
prompts = ["red anchor", "blue earth", "two green anchor"]
teacher(prompts, seed=1)

# %% [markdown]
# What the recipe that comes with the package says, made short. Neurons that fire together become
# experts, a gate is fitted to them, and none is lost: the student has the teacher's parameters
# and activates a part of them.

# %%
recipe = d2m_jax.load_config("icons_moe_s")
cut = replace(recipe.sparsify, batches=4, batch_size=32, tokens=2048)
student = d2m_jax.sparsify(teacher, recipe.data, cut)
print(d2m_jax.account(teacher), d2m_jax.account(student), sep="\n\n")
d2m_jax.compare(prompts, teacher, student, seed=1)  # the teacher's on the left, the same noise

# %% [markdown]
# Distillation: the student learns the teacher's velocity. The callback is called every so many
# steps.

# %%
seen = []


def watch(step, metrics, now):
    seen.append((step, metrics["validation"]))
    display(d2m_jax.compare(prompts, teacher, now, seed=1))


stage = replace(recipe.stages["joint"], batch_size=16)
student = d2m_jax.distill(
    student, teacher, recipe.data, stage, steps=60, every=30, callback=watch, validation_batches=1
)

# %%
plt.plot(*zip(*seen, strict=True), marker="o")
plt.xlabel("step")
plt.ylabel("validation")
plt.show()

# %% [markdown]
# Which experts does it choose? And how does it fare against the rival, a teacher pruned to the
# same activated width? Train both for longer, on equal batches, to see; the recipe has them
# (`recipe.rivals`).

# %%
print(d2m_jax.routing(student, prompts, steps=4))
narrow = SparsifyConfig(method="prune", batches=4, batch_size=32)
pruned = d2m_jax.sparsify(teacher, recipe.data, narrow)
d2m_jax.compare(prompts, teacher, student, pruned, seed=1)

# %% [markdown]
# `student.save("models/student")` keeps it; `d2m_jax.push_to_hub(student, "OWNER/NAME")`
# publishes it.
