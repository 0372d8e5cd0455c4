# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Convert a FLUX, and draw with it
#
# FLUX.1 is published for PyTorch. One command makes of it a model directory, which everything
# here reads. These are the commands for the real ones. Each downloads 34 GB and writes as much
# again; docs/sample.md says how much memory drawing needs.
#
# ```sh
# d2m-convert black-forest-labs/FLUX.1-schnell models/flux_schnell
# d2m-sample models/flux_schnell --prompt "a red fox in the snow" --output samples
#
# hf auth login     # FLUX.1 [dev]: accept its licence on its page first
# d2m-convert black-forest-labs/FLUX.1-dev models/flux_dev
# d2m-sample models/flux_dev --prompt "a red fox in the snow" --guidance 3.5 --output samples
# ```
#
# So that you can try them anywhere, also without a network, this notebook uses a tiny FLUX whose
# weights are random. It has all parts of [schnell] (two text encoders, transformer, autoencoder)
# and the same files, but it has learned nothing: its pictures are colourful noise. To use the real
# one, write its name in the cell below. Any runtime will do for the tiny one.

# %%
# Not on PyPI yet: for d2m_jax write a wheel's file, or git+ and the address of the repository.
# !python -c "import d2m_jax" 2> /dev/null || pip install -q d2m_jax

# %%
from pathlib import Path
from tempfile import mkdtemp

import d2m_jax
from d2m_jax.weights.torch_files.random_flux import random_flux

FLUX = ""  # "black-forest-labs/FLUX.1-schnell" downloads 34 GB

folder = Path(mkdtemp())
source = FLUX or random_flux(folder / "random")
model = folder / "flux"
print(source)

# %% [markdown]
# The source is a folder as diffusers saves it. Now it becomes a model directory, by the command
# that converts the real one. A single file of BFL or ComfyUI works as well; then `--encoders` says
# where the text encoders and the autoencoder are.

# %%
# !d2m-convert {source} {model}

# %% [markdown]
# Drawing, from Python. What comes back is an array `[prompt, height, width, 3]` of numbers from 0
# to 1, which a notebook shows; `images.pil` are pictures to save. The same seed gives the same
# pictures.

# %%
pipe = d2m_jax.load_pipeline(model)
prompts = ["a red fox in the snow", "an old lighthouse at night"]
images = pipe(prompts, seed=1)
images.pil[0].save(folder / "fox.png")
print(pipe, images.shape)
images

# %% [markdown]
# Size, number of steps and more are options, in Python and of `d2m-sample` alike.

# %%
pipe(prompts, seed=1, height=32, width=96, steps=8)

# %% [markdown]
# What one picture costs: parameters, and the multiplications and additions of one step. The second
# table is FLUX.1 [dev] at full size, counted from its config; nothing is loaded for that.

# %%
print(d2m_jax.account(pipe), d2m_jax.account("flux_dev"), sep="\n\n")

# %% [markdown]
# And back, for diffusers (`diffusers.FluxPipeline.from_pretrained("exported")`), where you like:
#
# ```sh
# d2m-convert models/flux_schnell exported --export diffusers
# ```
#
# `2_sparsify_and_distil` makes a dense model sparse; it takes a small one that has learned
# something, so that there is something to see.
