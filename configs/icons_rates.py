"""Which rates suit a pruned student and a fitted one: 200 steps of each (docs/decisions.md).

python train.py configs/icons_rates.py
"""

import dataclasses

from configs.icons_moe_s import FITTED, PRUNED, STEPS, TWELVE, stage
from configs.icons_moe_s import get_config as get_demo
from d2m_jax.config import LossConfig, RunConfig, StageConfig, StudentConfig

LOSS = LossConfig(feature=0.0, balance=1e-3)
WIDER = {"*.shared.*": 2.0, "*.experts.*": 8.0, "*.gate.*": 0.1}
# Name → factors, rate, warm-up. The first of either kind are the demo's.
PRUNINGS = {
    "pruned": (PRUNED, 2e-3, 50),
    "pruned_warmup_20": (PRUNED, 2e-3, 20),
    "pruned_3e-3": (PRUNED, 3e-3, 20),
    "pruned_4e-3": (PRUNED, 4e-3, 20),
    "pruned_4e-3_ffns_2": ({"*mlp.*": 2.0}, 4e-3, 20),
}
EXPERTS = {
    "fitted": (FITTED, 2e-3, 50),
    "fitted_warmup_20": (FITTED, 2e-3, 20),
    "fitted_4e-3": (FITTED, 4e-3, 20),
    "fitted_experts_8": (WIDER, 2e-3, 50),
}


def tried(rates: dict, rate: float, warmup: int, **fields) -> StageConfig:
    made = stage(STEPS, learning_rate=rate, rates=rates, **fields)
    return dataclasses.replace(made, optimizer=dataclasses.replace(made.optimizer, warmup=warmup))


def get_config() -> RunConfig:
    demo = get_demo()
    cut = demo.rivals["pruned"].sparsify
    students = {n: StudentConfig(cut, {"retrain": tried(*p)}) for n, p in PRUNINGS.items()}
    students |= {
        name: StudentConfig(TWELVE, {"moe": tried(*how, loss=LOSS)})
        for name, how in EXPERTS.items()
    }
    main = students.pop("fitted")
    return dataclasses.replace(
        demo,
        name="fitted",
        sparsify=TWELVE,
        stages=main.stages,
        rivals=students,
        evaluate_prompts=60,
        sweep_top_k=(),
    )
