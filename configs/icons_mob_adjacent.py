"""Mixture of Blocks alone with κ = 2 of 4 single blocks: any two, and two that follow one another.

python train.py configs/icons_mob_adjacent.py
"""

import dataclasses

from configs.icons_mob import DENSE, MIXED
from configs.icons_moe_s import STEPS, stage
from configs.icons_moe_s import get_config as get_demo
from d2m_jax.config import GroupsConfig, RunConfig, StudentConfig

ANY = GroupsConfig(keep_double=1, keep_last_single=2, single_blocks=4, single_active=2)
ADJACENT = dataclasses.replace(ANY, choice="adjacent")


def get_config() -> RunConfig:
    return dataclasses.replace(
        get_demo(),
        name="adjacent",
        sparsify=DENSE,
        stages={"mob": stage(STEPS, groups=ADJACENT, **MIXED)},
        rivals={"any": StudentConfig(DENSE, {"mob": stage(STEPS, groups=ANY, **MIXED)})},
        sweep_top_k=(),
    )
