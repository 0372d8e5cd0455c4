"""Mixture of Blocks alone: how many of six single blocks can stay out, all FFNs dense.

python train.py configs/icons_mob.py
"""

import dataclasses

from configs.icons_moe_s import get_config as get_demo
from configs.icons_moe_s import stage
from d2m_jax.config import GroupsConfig, LossConfig, RunConfig, SparsifyConfig, StudentConfig

STEPS = 400
DENSE = SparsifyConfig(dense_double=(0,), dense_single=(0, 1, 2, 3, 4, 5))
# Nothing was cut: the plain rate; but a router that is fitted is right from the start.
MIXED = {"rates": {"*.router.*": 0.1}, "loss": LossConfig(feature=0.0, block_balance=0.0)}
# Name → groups, of which one block each runs; the double block always does.
GROUPS = {
    "four_of_six": GroupsConfig(keep_double=1, keep_last_single=2, single_blocks=2),
    "three_of_six": GroupsConfig(keep_double=1, single_blocks=2),
    "two_of_six": GroupsConfig(keep_double=1, single_blocks=3),
}


def get_config() -> RunConfig:
    students = {
        name: StudentConfig(DENSE, {"mob": stage(STEPS, groups=groups, **MIXED)})
        for name, groups in GROUPS.items()
    }
    main = students.pop("four_of_six")
    return dataclasses.replace(
        get_demo(),
        name="four_of_six",
        sparsify=main.sparsify,
        stages=main.stages,
        rivals=students,
        sweep_top_k=(),
    )
