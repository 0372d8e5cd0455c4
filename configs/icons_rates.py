"""Which rates suit a pruned student and a fitted one: 600 steps of each (docs/decisions.md).

python train.py configs/icons_rates.py
"""

import dataclasses

from configs.icons_moe_s import get_config as get_demo
from configs.icons_moe_s import stage
from d2m_jax.config import LossConfig, RunConfig, StudentConfig

STEPS = 600


def fitted(shared: float, experts: float, gate: float, balance: float) -> dict:
    rates = {"*.shared.*": shared, "*.experts.*": experts, "*.gate.*": gate}
    loss = LossConfig(feature=0.0, balance=balance)
    return {"moe": stage(STEPS, rates=rates, loss=loss)}


def get_config() -> RunConfig:
    demo = get_demo()
    cut = demo.rivals["pruned"].sparsify
    pruned = {
        "pruned_1": stage(STEPS),
        "pruned_2": stage(STEPS, rates={"*mlp.*": 2.0}),
        "pruned_4": stage(STEPS, rates={"*mlp.*": 4.0}),
        "pruned_all_2": stage(STEPS, learning_rate=4e-3),
    }
    moe = {
        "fitted_1": fitted(1, 1, 1, 1e-2),
        "fitted_gate": fitted(1, 1, 0.1, 1e-3),
        "fitted_experts_2": fitted(1, 2, 0.1, 1e-3),
        "fitted_experts_4": fitted(1, 4, 0.1, 1e-3),
        "fitted_experts_4_gate_0.03": fitted(1, 4, 0.03, 1e-3),
        "fitted_shared_2_experts_8": fitted(2, 8, 0.1, 1e-3),
    }
    rivals = {name: StudentConfig(cut, {"retrain": s}) for name, s in pruned.items()}
    rivals |= {name: StudentConfig(demo.sparsify, stages) for name, stages in moe.items()}
    return dataclasses.replace(
        demo, name="fitted_shared_2_experts_4", rivals=rivals, stages=fitted(2, 4, 0.1, 1e-3)
    )
