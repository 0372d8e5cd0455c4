"""Every stage in a few steps, for tests and first tries; its scores mean nothing.

It takes minutes on two cores, nearly all of them compilation.

python train.py configs/tiny.py
"""

import dataclasses

from configs.icons_moe_s import get_config as get_full_config
from d2m_jax.config import RunConfig, SparsifyConfig, StageConfig, StudentConfig

STEPS = 8


def shorten(stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
    return {
        name: dataclasses.replace(
            stage, steps=STEPS, batch_size=16, log_every=2, evaluate_every=4, checkpoint_every=4,
            sample_every=8, optimizer=dataclasses.replace(stage.optimizer, warmup=2),
        )
        for name, stage in stages.items()
    }  # fmt: skip


def shorten_cut(sparsify: SparsifyConfig) -> SparsifyConfig:
    return dataclasses.replace(sparsify, batches=2, batch_size=16, tokens=256)


def get_config() -> RunConfig:
    full = get_full_config()
    return dataclasses.replace(
        full,
        name="tiny",
        sparsify=shorten_cut(full.sparsify),
        stages=shorten(full.stages),
        rivals={
            name: StudentConfig(shorten_cut(rival.sparsify), shorten(rival.stages))
            for name, rival in full.rivals.items()
        },
        evaluate_prompts=12,
        held_out_batches=1,
    )
