"""FLUX.1-MoE-M of Dense2MoE: MoE-L in which a router leaves out 4 of 19 double and 9
of 38 single blocks, one of each pair. The paper does not say which
blocks its groups hold; these are ours: among one stack of blocks that always run and one of equal
groups, first blocks outside, a choice that meets the paper's figures.

    python evaluate.py account configs/flux_moe_m.py

takes seconds on a CPU. 8.744 B parameters, 4.019 B activated (the paper says 4.0),
33.67 TFLOPs as the paper counts them (it does not say).
"""

from d2m_jax.config import FluxConfig, StackConfig


def get_config() -> FluxConfig:
    return FluxConfig(
        double=(StackConfig(11, ffn="moe"), StackConfig(4, blocks=2, ffn="moe")),
        single=(StackConfig(20, ffn="moe"), StackConfig(9, blocks=2, ffn="moe")),
        modulation_rank=64,
    )
