"""Weights on disk: the model directory."""

from d2m_jax.weights.model_directory import load, load_config, load_model, save
from d2m_jax.weights.named_arrays import fingerprint, names

__all__ = ["fingerprint", "load", "load_config", "load_model", "names", "save"]
