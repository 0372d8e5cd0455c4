"""Every stage in a few steps, for tests and first tries; its scores and times mean nothing.

Nearly all of its time is compilation, so programs are compiled without optimisations, and each
stage trains what the paper trains in it and nothing else: the rival its FFNs, as the shared experts
are, and the Mixture of Blocks its one group.

python train.py configs/tiny.py
"""

import dataclasses

from configs.icons_moe_s import GROUPS as DEMOS
from configs.icons_moe_s import get_config as get_demo
from configs.icons_paper import get_config as get_paper
from d2m_jax.config import RunConfig, SparsifyConfig, StageConfig, StudentConfig

FFNS = ("*mlp.*",)
GROUPS = ("single.0.*",)  # before the blocks that always run


FITTED = dataclasses.replace(DEMOS, batches=2)


def shorten(stage: StageConfig, train: tuple[str, ...]) -> StageConfig:
    return dataclasses.replace(
        stage,
        train=train,
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
    demo, paper = get_demo(), get_paper()
    pruned = demo.rivals["pruned"]
    stages = {name: shorten(stage, stage.train) for name, stage in paper.stages.items()}
    stages["mob"] = shorten(demo.stages["joint"], GROUPS)
    stages["mob"] = dataclasses.replace(stages["mob"], groups=FITTED)
    retrain = {"retrain": shorten(pruned.stages["retrain"], FFNS)}
    return dataclasses.replace(
        demo,
        name="tiny",
        sparsify=shorten_cut(paper.sparsify),
        stages=stages,
        rivals={"pruned": StudentConfig(shorten_cut(pruned.sparsify), retrain)},
        evaluate_prompts=12,
        sweep_top_k=(),
        held_out_batches=1,
        quick_compilation=True,
    )
