"""The dense teacher that ships with the repository: text to scenes of coloured glyphs.

python train.py configs/icons_teacher.py
"""

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


def stage(steps: int, learning_rate: float) -> StageConfig:
    return StageConfig(
        steps=steps,
        batch_size=128,
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, warmup=200, ema=0.999, final_rate=0.01
        ),
        remat=False,
        log_every=50,
        evaluate_every=1000,
        checkpoint_every=500,
        sample_every=2000,
    )


def get_config() -> RunConfig:
    return RunConfig(
        name="icons_teacher",
        model=ModelConfig(
            transformer=FluxConfig(
                in_channels=108,
                vec_in_dim=128,
                context_in_dim=128,
                hidden_size=128,
                num_heads=4,
                axes_dim=(8, 12, 12),
                guidance_embed=False,
                double=(StackConfig(1),),
                single=(StackConfig(4),),
            ),
            text=WordsConfig(dim=128, length=6),
            image=PixelsConfig(height=24, width=24, patch=6),
            shift=3.0,
            sample_steps=28,
        ),
        data=IconsConfig(task="scenes", glyphs=512, train_size=100_000_000),
        stages={"flow": stage(20_000, 2e-3)},
    )
