r"""Six students of FLUX.1 [dev], a thousand steps each, on the same batches: which way to go with
your data, before weeks are spent on it.

    python train.py configs/flux_trial.py --plan --topology h100:8 --rival moe
    python train.py configs/flux_trial.py

The main one is configs/flux_fitted.py, an MoE of which some blocks are left out; beside it are the
same without groups of blocks ("moe"), the paper's start of it ("papers"), and what has as many
activated parameters as these: pruned in width ("pruned") and in depth ("shallow"; of the main one
"mini"). docs/recipe.md says what to look at, and how the miniature ended.
"""

import dataclasses

from configs.flux_distill import stage
from configs.flux_fitted import BLOCKS, FITTED, LOSS
from configs.flux_fitted import get_config as get_fitted
from d2m_jax.config import RunConfig, SparsifyConfig, StageConfig, StudentConfig

STEPS = 1000
PRUNED = {"*mlp.*": 4.0}  # the rate of what was cut, as the demo has it


def shorten(stage: StageConfig) -> StageConfig:
    optimizer = dataclasses.replace(stage.optimizer, warmup=100, ema=0.0)
    return dataclasses.replace(stage, steps=STEPS, evaluate_every=100, optimizer=optimizer)


def get_config() -> RunConfig:
    fitted = get_fitted()
    cut = fitted.sparsify
    papers = dataclasses.replace(cut, deal="rank", gate="random")

    def student(sparsify: SparsifyConfig, rates: dict[str, float]) -> StudentConfig:
        return StudentConfig(sparsify, {"train": shorten(stage(STEPS, BLOCKS, rates, loss=LOSS))})

    def shallow(double: int, single: int) -> StudentConfig:
        # All that is left is whole: the plain rate.
        left = {"depth_double": double, "depth_single": single}
        return student(dataclasses.replace(cut, method="none", **left), {})

    return dataclasses.replace(
        fitted,
        name="flux_trial",
        stages={"joint": shorten(fitted.stages["joint"])},
        # The report holds experts against the first that is pruned, groups of blocks against the
        # first of fewer blocks.
        rivals={
            "pruned": student(dataclasses.replace(cut, method="prune"), PRUNED),
            "mini": shallow(7, 14),
            "shallow": shallow(11, 23),
            "moe": student(cut, FITTED),
            "papers": student(papers, FITTED | {"*.gate.*": 1.0}),
        },
    )
