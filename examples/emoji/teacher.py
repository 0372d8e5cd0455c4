"""A dense model of emoji in two styles, from scratch, at 32 and 64 pixels (README.md beside it).

python train.py examples/emoji/teacher.py
"""

from d2m_jax.config import (
    FluxConfig,
    ImagesConfig,
    ModelConfig,
    OptimizerConfig,
    PixelsConfig,
    RunConfig,
    StackConfig,
    StageConfig,
    WordsConfig,
)

PROMPTS = "examples/emoji/prompts.txt"


def emoji(**fields) -> ImagesConfig:
    """The drawings that train. Those of 64 pixels, four times the tokens, are one batch in 11."""
    return ImagesConfig(
        sources={"data/emoji/32": 1.0, "data/emoji/64": 0.1},
        resolutions=(32, 64),
        aspect_ratio=1.0,
        prompts=PROMPTS,
        **fields,
    )


def held_out() -> ImagesConfig:
    """Pairs of style and object that never train."""
    return ImagesConfig(
        sources={"data/emoji/held_out/32": 1.0},
        resolutions=(32,),
        aspect_ratio=1.0,
        prompts=PROMPTS,
    )


def get_config() -> RunConfig:
    return RunConfig(
        name="emoji_teacher",
        model=ModelConfig(
            transformer=FluxConfig(
                in_channels=192,
                vec_in_dim=256,
                context_in_dim=256,
                hidden_size=256,
                num_heads=4,
                axes_dim=(8, 28, 28),
                guidance_embed=False,
                double=(StackConfig(1),),
                single=(StackConfig(4),),
            ),
            text=WordsConfig(dim=256, length=9),
            image=PixelsConfig(height=32, width=32, patch=8),
            shift=3.0,
            sample_steps=28,
        ),
        data=emoji(caption_dropout=0.1),  # for --true_cfg
        stages={
            "flow": StageConfig(
                steps=6_000,
                batch_size=64,
                optimizer=OptimizerConfig(
                    learning_rate=1e-3, warmup=200, ema=0.999, final_rate=0.01
                ),
                remat=False,
                log_every=50,
                evaluate_every=500,
                checkpoint_every=250,
                sample_every=1000,
            )
        },
        sampled_prompts=24,
    )
