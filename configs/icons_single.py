"""The shipped teacher's first lesson: one pictogram on a canvas of its own, a third of the tokens.

python train.py configs/icons_single.py

What it learns here of the pictograms it need not learn from scenes (configs/icons_teacher.py).
"""

import dataclasses

from configs.icons_teacher import MODEL, stage
from d2m_jax.config import IconsConfig, PixelsConfig, RunConfig, WordsConfig

STEPS = 2_500


def get_config() -> RunConfig:
    return RunConfig(
        name="icons_single",
        model=dataclasses.replace(
            MODEL,
            text=WordsConfig(dim=128, length=2),
            image=PixelsConfig(height=16, width=16, patch=8),
        ),
        data=IconsConfig(task="single", train_size=100_000_000),
        # The rate stays: the average of the weights goes on in scenes.
        stages={"flow": stage(STEPS, 128, 2e-3, "constant")},
    )
