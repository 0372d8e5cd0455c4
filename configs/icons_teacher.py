"""The dense teacher that ships with the repository: text to scenes of coloured pictograms.

python train.py configs/icons_single.py
python train.py configs/icons_teacher.py

It starts with what the first of them learned of single pictograms.
"""

from typing import Literal

from d2m_jax.config import (
    FluxConfig,
    IconsConfig,
    ModelConfig,
    OptimizerConfig,
    PixelsConfig,
    RunConfig,
    StackConfig,
    StageConfig,
    WordsConfig,
)

STEPS, SETTLE = 4_000, 2_000  # at a constant rate, and while it falls to nothing
MODEL = ModelConfig(
    transformer=FluxConfig(
        in_channels=192,
        vec_in_dim=128,
        context_in_dim=128,
        hidden_size=256,
        num_heads=4,
        axes_dim=(16, 24, 24),
        guidance_embed=False,
        double=(StackConfig(1),),
        single=(StackConfig(6),),
        modulation_rank=64,
    ),
    text=WordsConfig(dim=128, length=6),
    image=PixelsConfig(height=32, width=32, patch=8),
    shift=3.0,
    sample_steps=28,
)


def stage(
    steps: int, batch_size: int, learning_rate: float, schedule: Literal["constant", "linear"]
) -> StageConfig:
    return StageConfig(
        steps=steps,
        batch_size=batch_size,
        optimizer=OptimizerConfig(learning_rate, schedule, warmup=200, ema=0.999),
        remat=False,
        log_every=20,
        evaluate_every=250,
        checkpoint_every=250,
        sample_every=500,
    )


def get_config() -> RunConfig:
    return RunConfig(
        name="icons_teacher",
        model=MODEL,
        start="runs/icons_single/model",
        data=IconsConfig(task="scenes", train_size=100_000_000),
        stages={
            "flow": stage(STEPS, 64, 1.5e-3, "constant"),
            "settle": stage(SETTLE, 64, 1.5e-3, "linear"),
        },
    )
