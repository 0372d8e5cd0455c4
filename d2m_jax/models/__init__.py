"""The networks, as Flax NNX modules: FLUX.1 dense and sparse, and its encoders."""
