"""What the emoji teacher, the pruned rival and the Mixture of Experts draw, side by side.

    python examples/emoji/grid.py

It writes emoji.png; README.md beside it has the runs that come before.
"""

import argparse
from pathlib import Path

from PIL import Image

import d2m_jax

RUNS = "runs/emoji_teacher", "runs/emoji_student/rivals/pruned", "runs/emoji_student"

if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    prompts = Path("examples/emoji/prompts.txt").read_text().splitlines()
    models = [d2m_jax.load_pipeline(f"{run}/model") for run in RUNS]
    picture = d2m_jax.compare(prompts, *models, true_cfg=3, negative_prompts="")
    twice = 2 * picture.width, 2 * picture.height
    picture.resize(twice, Image.Resampling.NEAREST).save("emoji.png")
