"""Weights on disk: the model directory, and torch's files."""

from d2m_jax import environment  # noqa: F401 (before what it looks for)

# isort: split
from d2m_jax.named_arrays import fingerprint, names
from d2m_jax.weights.directory.model_directory import load, load_config, save
from d2m_jax.weights.torch_files.torch_import import load_model

__all__ = ["fingerprint", "load", "load_config", "load_model", "names", "save"]
