# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Inside the routing
#
# A sparse model chooses. In each feed-forward layer a gate picks a few experts for every token, so
# for every patch of the image; and a router picks which blocks of a group run for a picture. Here
# we look at these choices while the model draws. Any runtime will do; a CPU takes half a minute.

# %%
# Not on PyPI yet: for d2m_jax write a wheel's file, or git+ and the address of the repository.
# !python -c "import d2m_jax" 2> /dev/null || pip install -q d2m_jax

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
from IPython.display import display

import d2m_jax
from d2m_jax.config import GroupsConfig
from d2m_jax.sparsification.groups import regroup

MODEL = ""  # a sparse model of yours: "runs/demo/model" after `make demo`

# %% [markdown]
# Without a model of yours we cut one: the small teacher that comes with the package, with 12 normal
# experts in the place of each feed-forward layer, of which each token gets 2. Its first two single
# blocks become a group of which one runs. Nothing is trained: that is quick, and pictures suffer.

# %%
teacher = d2m_jax.load_pipeline("teachers/pictograms")
if MODEL:
    student = d2m_jax.load_pipeline(MODEL)
else:
    recipe = d2m_jax.load_config("icons_moe_s")
    quick = {"batches": 1, "batch_size": 32, "tokens": 512, "shared": "magnitude"}
    cut = replace(recipe.sparsify, **quick)
    student = d2m_jax.sparsify(teacher, recipe.data, cut)
    groups = GroupsConfig(keep_double=1, keep_last_single=4, single_blocks=2, single_active=1)
    transformer, params = regroup(student.config.transformer, student.params, groups, seed=0)
    config = replace(student.config, transformer=transformer)
    student = d2m_jax.Pipeline(config, params, encoders=student.encoders)
student

# %% [markdown]
# `routing` draws and counts. Prompts come in groups that you name; here each is its own.

# %%
prompts = ["red anchor", "blue earth", "two green anchor", "red earth above blue anchor"]
seen = d2m_jax.routing(student, {prompt: prompt for prompt in prompts}, steps=8, bins=8, seed=1)
print(seen)

# %% [markdown]
# The lines say how much one knows of a choice who knows only the place of a token in the image,
# only the step, or only the prompt: 0 is nothing, 1 is all. "By chance" is the same with prompts
# dealt to the groups at random; with one prompt in each group, as here, the two are equal.
#
# ## Which expert is chosen where
#
# Each row is a prompt: first the picture (4 × 4 patches), then for every step, from noise to the
# finished picture, the expert that each patch chose first, one colour per expert. What you see: in
# the first steps most patches of a picture choose the same expert, for all of them are noise. In
# the last ones patches that hold a thing choose other experts than patches that are empty.

# %%
pictures = student(prompts, seed=1, steps=8)
layer = 2  # the second single block: seen.names.maps names all
maps = seen.sums["maps"][layer].argmax(-1)  # [step, prompt, rows, columns]
figure, axes = plt.subplots(len(prompts), 1 + len(maps), figsize=(12, 5.6))
for row, prompt in enumerate(prompts):
    axes[row, 0].imshow(pictures[row])
    axes[row, 0].set_title(prompt, fontsize=8)
    for step, experts in enumerate(maps[:, row]):
        axes[row, 1 + step].imshow(experts, cmap="tab20", vmin=0, vmax=19)
        axes[0, 1 + step].set_title(f"step {step + 1}", fontsize=8)
for axis in axes.flat:
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Which expert is chosen when
#
# All layers, one line per expert; bright is often, and 1 is as often as if all were chosen equally.
# What you see: some lines brighten from left to right and others fade, so these experts work when
# the picture is nearly done, or while it is noise. Without training some are chosen nearly always
# and others never; training has a loss against that.

# %%
drawn = seen.pictures()
display(drawn["experts"])

# %% [markdown]
# ## Which blocks run
#
# Of the last two blocks one runs for each picture in each step. What you see: which one depends on
# the prompt, and a little on the step. This router was never trained, so its choice means nothing
# yet; it is why some fields above are white: that block never ran for that prompt.

# %%
display(drawn["blocks"])

# %% [markdown]
# ## How much each block does
#
# How far a block moves the image's tokens and the text's, relative to their size, one curve per
# step. What you see: the first block does most by far, and no block does equally much in all steps.
# So it can pay to choose blocks anew in every step.

# %%
display(drawn["contributions"])

# %% [markdown]
# `d2m-evaluate routing MODEL --output FOLDER` does the same from the shell with any number of
# prompts, and leaves arrays, pictures and a summary.
