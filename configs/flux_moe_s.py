"""FLUX.1-MoE-S of Dense2MoE: MoE-L in which a router leaves out 7 of 19 double and 15
of 38 single blocks, one of each pair. The paper does not say which
blocks its groups hold; these are ours: among one stack of blocks that always run and one of equal
groups, first blocks outside, a choice that meets the paper's figures.

    python evaluate.py account configs/flux_moe_s.py

takes seconds on a CPU. 8.745 B parameters, 3.215 B activated (the paper says 3.19),
26.79 TFLOPs as the paper counts them (it says 26.43).
"""

from d2m_jax.config import FluxConfig, StackConfig


def get_config() -> FluxConfig:
    return FluxConfig(
        double=(StackConfig(5, ffn="moe"), StackConfig(7, blocks=2, ffn="moe")),
        single=(StackConfig(8, ffn="moe"), StackConfig(15, blocks=2, ffn="moe")),
        modulation_rank=64,
    )
