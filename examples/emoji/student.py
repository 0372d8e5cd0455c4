"""The emoji teacher as a Mixture of Experts, beside the rival with as many neurons per token
(examples/emoji/README.md).

python train.py examples/emoji/student.py
"""

from d2m_jax.config import (
    LossConfig,
    OptimizerConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
    StudentConfig,
)
from examples.emoji.teacher import emoji, held_out

STEPS = 1000


def stage(rates: dict[str, float], balance: float = 0.0) -> StageConfig:
    return StageConfig(
        steps=STEPS,
        batch_size=64,
        train=("double.*", "single.*"),  # everything but the embedders and the last layer
        loss=LossConfig(feature=0.0, balance=balance),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=50, rates=rates),
        remat=False,
        log_every=20,
        evaluate_every=200,
        checkpoint_every=100,
        sample_every=500,
    )


def get_config() -> RunConfig:
    # The factors on the rates are those of configs/icons_moe_s.py.
    fitted = stage({"*.shared.*": 2.0, "*.experts.*": 4.0, "*.gate.*": 0.1}, balance=1e-3)
    return RunConfig(
        name="emoji_student",
        teacher="runs/emoji_teacher/model",
        data=emoji(),
        validation=held_out(),
        sparsify=SparsifyConfig(deal="clustered", gate="fitted"),
        stages={"moe": fitted},
        rivals={
            "pruned": StudentConfig(
                SparsifyConfig(method="prune", mlp_ratio=1.5), {"retrain": stage({"*mlp.*": 4.0})}
            )
        },
        sampled_prompts=24,
    )
