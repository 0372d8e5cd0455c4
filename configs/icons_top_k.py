"""One student for every number of experts per token: k fixed, and k drawn for every sample.

python train.py configs/icons_top_k.py --run_dir runs/top_k
python benchmarks/top_k.py runs/top_k/models/moe runs/top_k/rivals/fixed/models/moe
"""

import dataclasses

from configs.icons_moe_s import FITTED, TWELVE, stage
from configs.icons_moe_s import get_config as get_demo
from d2m_jax.config import LossConfig, RunConfig, StudentConfig

STEPS = 600


def get_config() -> RunConfig:
    demo = get_demo()
    fixed = stage(STEPS, rates=FITTED, loss=LossConfig(feature=0.0, balance=1e-3))
    random = dataclasses.replace(fixed, random_top_k=(0, 1, 2, 4, 8, 12))
    return dataclasses.replace(
        demo,
        name="random",
        sparsify=TWELVE,
        stages={"moe": random},
        rivals={"fixed": StudentConfig(TWELVE, {"moe": fixed})},
        sweep_top_k=(),
        evaluate_prompts=12,
    )
