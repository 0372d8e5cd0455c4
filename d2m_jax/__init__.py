"""Dense2MoE in JAX: from a dense diffusion transformer to a sparse one, and what that bought."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Names handed on when they are asked for, so that importing the package costs nothing."""
    if name == "load_pipeline":
        from d2m_jax.sampling.pipeline import load_pipeline

        return load_pipeline
    if name == "load_model":
        from d2m_jax.weights.torch_import import load_model

        return load_model
    raise AttributeError(f"module 'd2m_jax' has no attribute {name!r}")
