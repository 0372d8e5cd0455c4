r"""FLUX.1 [dev] to FLUX.1-MoE-S in the paper's three stages, at full size, on data that the teacher
makes of prompts.

    python convert_torch_weights.py black-forest-labs/FLUX.1-dev models/flux_dev
    python -m d2m_jax.data.generate models/flux_dev --prompts prompts.txt --output data/flux_dev \
        --guidance 1.5 5
    python train.py configs/flux_distill.py --plan --topology h200:8
    python train.py configs/flux_distill.py

Images of your own instead: data=ImagesConfig(sources={"pictures/": 1.0}), or a cache of them
(docs/data.md).
"""

from d2m_jax.config import (
    CacheConfig,
    GroupsConfig,
    MeshConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
)

SHARED = ("*.shared.*",)
ROUTED = ("*.experts.*", "*.gate.*", "*mlp.scale")
# Of both kinds the first stack stays outside groups.
GROUPED = ("double.1.*", "single.1.*")


# The scale of the normal experts starts at 0, and would need thousands of steps to open.
SCALE = {"*mlp.scale": 30.0}
# A batch of 64 in so many parts, one after the other: eight GPUs take an image each. 64 chips need
# 1, one GPU 64 (--stages.STAGE.optimizer.accumulate).
PARTS = 8


def stage(
    steps: int, train: tuple[str, ...], rates: dict[str, float] | None = None, **fields
) -> StageConfig:
    """A stage at the paper's batch size."""
    optimizer = OptimizerConfig(
        learning_rate=1e-4, warmup=500, ema=0.999, accumulate=PARTS, rates=rates or {}
    )
    return StageConfig(
        steps=steps,
        batch_size=64,
        train=train,
        optimizer=optimizer,
        dtype="bfloat16",
        evaluate_every=1000,
        checkpoint_every=500,
        sample_every=1000,
        **fields,
    )


def get_config() -> RunConfig:
    return RunConfig(
        name="flux_distill",
        teacher="models/flux_dev",
        data=CacheConfig(path="data/flux_dev"),
        timesteps="logit_normal",
        guidance=(1.5, 5.0),  # the student must hold for other guidance than 3.5
        sparsify=SparsifyConfig(
            moe=MoEConfig(),
            deal="rank",  # as the paper has it; docs/recipe.md compares
            gate="random",
            routed_scale=0.0,
            modulation_rank=64,
            tokens=65_536,
        ),
        stages={
            "shared": stage(10_000, SHARED, top_k=0),
            "moe": stage(20_000, ROUTED, SCALE),
            "mob": stage(
                20_000,
                GROUPED,
                groups=GroupsConfig(
                    keep_double=5,
                    double_blocks=2,
                    double_active=1,
                    keep_single=8,
                    single_blocks=2,
                    single_active=1,
                    router="random",  # fitted: where, says python evaluate.py blocks
                ),
            ),
        },
        mesh=MeshConfig(data=1, fsdp=-1),
        sampled_prompts=8,
        evaluate_prompts=8,
    )
