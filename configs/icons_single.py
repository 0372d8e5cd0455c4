"""The quick task: a small dense teacher for one glyph in the middle of a small canvas, in minutes.

python train.py configs/icons_single.py
"""

import dataclasses

from configs.icons_teacher import get_config as get_scenes_config
from d2m_jax.config import IconsConfig, PixelsConfig, RunConfig, WordsConfig

STEPS = 4000


def get_config() -> RunConfig:
    scenes = get_scenes_config()
    flow = scenes.stages["flow"]
    return dataclasses.replace(
        scenes,
        name="icons_single",
        model=dataclasses.replace(
            scenes.model,
            text=WordsConfig(dim=128, length=2),
            image=PixelsConfig(height=12, width=12, patch=6),
        ),
        data=IconsConfig(task="single", glyphs=512),
        stages={
            "flow": dataclasses.replace(
                flow, steps=STEPS, evaluate_every=500, checkpoint_every=500, sample_every=1000
            )
        },
    )
