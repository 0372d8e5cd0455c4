"""FLUX.1 [dev], dense, at full size: what the sparse presets are measured against.

    python evaluate.py account configs/flux_dev.py

takes seconds on a CPU. 11.901 B parameters; 66.07 TFLOPs as the paper counts them (it says 66.00).
"""

from d2m_jax.config import FluxConfig


def get_config() -> FluxConfig:
    return FluxConfig()
