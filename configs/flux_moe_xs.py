"""FLUX.1-MoE-XS of Dense2MoE: MoE-L in which a router leaves out 7 of 19 double blocks,
one of each pair, and 24 of 38 single ones, two of each three. The paper does not say which
blocks its groups hold; these are ours: among one stack of blocks that always run and one of equal
groups, first blocks outside, a choice that meets the paper's figures.

    python evaluate.py account configs/flux_moe_xs.py

takes seconds on a CPU. 8.745 B parameters, 2.614 B activated (the paper says 2.64),
19.90 TFLOPs as the paper counts them (it says 20.26).
"""

from d2m_jax.config import FluxConfig, StackConfig


def get_config() -> FluxConfig:
    return FluxConfig(
        double=(StackConfig(5, ffn="moe"), StackConfig(7, blocks=2, ffn="moe")),
        single=(StackConfig(2, ffn="moe"), StackConfig(12, blocks=3, ffn="moe")),
        modulation_rank=64,
    )
