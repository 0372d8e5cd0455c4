"""The paper's recipe on the embedded task, beside ours and the pruned rival, for as many steps.

    python train.py configs/icons_paper.py

Neurons are dealt by rank and gates start at random; the shared experts train alone, then the normal
experts and gates alone.
"""

import dataclasses

from configs.icons_moe_s import FITTED, PRUNED, TWELVE, stage
from configs.icons_moe_s import get_config as get_demo
from d2m_jax.config import LossConfig, RunConfig, SparsifyConfig, StudentConfig

STEPS = 300  # of every student, whatever its stages
SHARED = ("*.shared.*",)
ROUTED = ("*.experts.*", "*.gate.*", "*mlp.scale")


def get_config() -> RunConfig:
    demo = get_demo()
    shared = {"rates": {"*.shared.*": 2.0}, "loss": LossConfig()}
    # The scale starts at 0 and has far to go.
    routed = {"rates": {"*.experts.*": 4.0, "*mlp.scale": 30.0}, "loss": LossConfig()}
    fitted = {"rates": FITTED, "loss": LossConfig(feature=0.0, balance=1e-3)}
    pruned = demo.rivals["pruned"].sparsify
    return dataclasses.replace(
        demo,
        name="icons_paper",
        evaluate_prompts=600,
        sparsify=SparsifyConfig(deal="rank", gate="random", routed_scale=0.0),
        stages={
            "shared": stage(STEPS // 3, SHARED, top_k=0, **shared),
            "moe": stage(STEPS - STEPS // 3, ROUTED, **routed),
        },
        rivals={
            "pruned": StudentConfig(pruned, {"retrain": stage(STEPS, rates=PRUNED)}),
            "fitted": StudentConfig(TWELVE, {"moe": stage(STEPS, **fitted)}),
        },
    )
