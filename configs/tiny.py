"""Every stage in a few steps, for tests and first tries; its scores mean nothing.

Under two minutes on two cores, nearly all of them compilation.

python train.py configs/tiny.py
"""

import dataclasses

from configs.icons_moe_s import get_config as get_full_config
from d2m_jax.config import RunConfig, SparsifyConfig, StageConfig, StudentConfig


def shorten(stage: StageConfig) -> StageConfig:
    return dataclasses.replace(
        stage,
        steps=8,
        batch_size=16,
        log_every=2,
        evaluate_every=4,
        checkpoint_every=4,
        sample_every=0,
        optimizer=dataclasses.replace(stage.optimizer, warmup=2),
    )


def shorten_cut(sparsify: SparsifyConfig) -> SparsifyConfig:
    return dataclasses.replace(sparsify, batches=2, batch_size=16, tokens=256)


def get_config() -> RunConfig:
    full = get_full_config()
    paper, pruned = full.rivals["paper"], full.rivals["pruned"]
    stages = paper.stages | {"mob": full.stages["mob"]}
    retrain = {"retrain": shorten(pruned.stages["retrain"])}
    return dataclasses.replace(
        full,
        name="tiny",
        sparsify=shorten_cut(paper.sparsify),
        stages={name: shorten(stage) for name, stage in stages.items()},
        rivals={"pruned": StudentConfig(shorten_cut(pruned.sparsify), retrain)},
        evaluate_prompts=12,
        sweep_top_k=(),
        held_out_batches=1,
    )
