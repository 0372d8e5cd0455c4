"""FLUX.1-MoE-L of Dense2MoE: every FFN is 1S12E2A (one shared expert, twelve
normal ones, two of them per token), every block runs.

    python evaluate.py account configs/flux_moe_l.py

takes seconds on a CPU. 8.744 B parameters, 5.157 B activated (the paper says 5.15),
43.62 TFLOPs as the paper counts them (it says 43.42).
"""

from d2m_jax.config import FluxConfig, StackConfig


def get_config() -> FluxConfig:
    return FluxConfig(
        double=(StackConfig(19, ffn="moe"),),
        single=(StackConfig(38, ffn="moe"),),
        modulation_rank=64,
    )
