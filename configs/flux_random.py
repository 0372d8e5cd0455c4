r"""configs/flux_distill.py in a few steps, on a FLUX whose weights are random: its files, commands
and stages, tried within minutes on any machine. What it draws is noise.

    python -m d2m_jax.weights.torch_files.random_flux flux_random
    python convert_torch_weights.py flux_random models/flux_random
    printf 'a red fox in the snow\ntwo blue cups\n' > prompts.txt
    python -m d2m_jax.data.generate models/flux_random --prompts prompts.txt \
        --output data/flux_random --images_per_prompt 20
    python train.py configs/flux_random.py
    python sample.py runs/flux_random/model --prompt "a red fox" --output samples
"""

import dataclasses

from configs.flux_distill import get_config as get_full
from d2m_jax.config import CacheConfig, MeshConfig, RunConfig, StageConfig


def shorten(stage: StageConfig) -> StageConfig:
    groups = stage.groups
    if groups is not None:  # three blocks of each kind, of which the first stays outside groups
        groups = dataclasses.replace(groups, keep_double=1, keep_single=1)
    return dataclasses.replace(
        stage,
        steps=8,
        batch_size=8,
        groups=groups,
        optimizer=dataclasses.replace(stage.optimizer, warmup=2, ema=0.0, accumulate=1),
        log_every=2,
        evaluate_every=4,
        checkpoint_every=4,
        sample_every=8 if groups is not None else 0,  # the last one
    )


def get_config() -> RunConfig:
    full = get_full()
    return dataclasses.replace(
        full,
        name="flux_random",
        teacher="models/flux_random",
        data=CacheConfig(path="data/flux_random", validation=8),
        sparsify=dataclasses.replace(
            full.sparsify, batches=2, batch_size=8, tokens=512, modulation_rank=16
        ),
        stages={name: shorten(stage) for name, stage in full.stages.items()},
        mesh=MeshConfig(),
        sweep_top_k=(),
        held_out_batches=1,
        quick_compilation=True,
    )
