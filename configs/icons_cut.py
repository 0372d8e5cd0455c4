"""What a better cut is worth after training: the demo's students, cut in four ways.

    python train.py configs/icons_cut.py --run_dir runs/cut

`validation` in the metrics of each is E‖v_teacher − v_student‖² after 0, 100, 200 … steps (of a
student with balance, `validation_output`); docs/recipe.md has the table.
"""

import dataclasses

from configs.icons_moe_s import FITTED, PRUNED, TWELVE, stage
from configs.icons_moe_s import get_config as get_demo
from d2m_jax.config import LossConfig, RunConfig, StageConfig, StudentConfig

STEPS = 300
SCORE, FIT = {"shared": "sensitivity"}, {"refit": "weighted"}
# Name → what is changed of the demo's cut, and the rate.
CUTS = {
    "taylor": ({}, 2e-3),
    "score": (SCORE, 2e-3),
    "fit": (FIT, 2e-3),
    "both": (SCORE | FIT, 2e-3),
    "both_1e-3": (SCORE | FIT, 1e-3),
    "both_5e-4": (SCORE | FIT, 5e-4),
}


def trained(steps: int, **fields) -> StageConfig:
    return dataclasses.replace(stage(steps, **fields), evaluate_every=100, sample_every=0)


def get_config() -> RunConfig:
    demo = get_demo()
    balance = {"rates": FITTED, "loss": LossConfig(feature=0.0, balance=1e-3)}
    plain = {
        "pruned": (demo.rivals["pruned"].sparsify, {"rates": PRUNED}),
        "fitted": (TWELVE, balance),
    }
    students = {}
    for name, (cut, fields) in plain.items():
        for how, (changes, rate) in CUTS.items():
            stages = {"retrain": trained(STEPS, learning_rate=rate, **fields)}
            students[f"{name}_{how}"] = StudentConfig(dataclasses.replace(cut, **changes), stages)
    main = students.pop("fitted_both")
    return dataclasses.replace(
        demo,
        name="fitted_both",
        sparsify=main.sparsify,
        stages=main.stages,
        rivals=students,
        sweep_top_k=(),
        evaluate_prompts=12,
    )
