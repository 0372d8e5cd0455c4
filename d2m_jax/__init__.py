"""Dense2MoE in JAX: from a dense diffusion transformer to a sparse one, and what that bought.

    pipe = d2m_jax.load_pipeline("teachers/pictograms")  # a model directory, a FluxPipeline's
    images = pipe("two green anchor", seed=1)  # float32 [b, h, w, 3] in [0, 1]; images.pil: PIL's
    model = d2m_jax.load_model("flux1-dev.safetensors")  # the transformer alone
    d2m_jax.push_to_hub("runs/flux", "OWNER/NAME")  # with a card that tells what it is

The scripts train.py, convert_torch_weights.py, sample.py and evaluate.py do the rest.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "load_pipeline", "push_to_hub"]


def __getattr__(name: str):
    """Names handed on when they are asked for, so that importing the package costs nothing."""
    if name == "load_pipeline":
        from d2m_jax.sampling.pipeline import load_pipeline

        return load_pipeline
    if name == "load_model":
        from d2m_jax.weights.torch_files.torch_import import load_model

        return load_model
    if name == "push_to_hub":
        from d2m_jax.publish import push_to_hub

        return push_to_hub
    from d2m_jax.config import suggestion

    near = suggestion(name, __dir__())
    raise AttributeError(f"module 'd2m_jax' has no attribute {name!r}{near}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
