"""Dense2MoE in JAX: from a dense diffusion transformer to a sparse one, and what that bought."""

__version__ = "0.1.0"
