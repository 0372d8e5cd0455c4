"""How far a student is from its teacher before any training, by how it is cut.

    python benchmarks/cut.py --seeds 1

Error: E‖v_teacher − v_student‖² on noisy validation examples of the icons task.
Every way to cut, with both scores and all refits; the rival too. docs/recipe.md has the table.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import scenes
from timing import described

from d2m_jax.config import ModelConfig, SparsifyConfig
from d2m_jax.cores import use_cores
from d2m_jax.distillation.stages import noisy_inputs
from d2m_jax.models.flux import model_of
from d2m_jax.sparsification.student import make_student
from d2m_jax.weights.directory import model_directory

TEACHER, BATCHES = "teachers/pictograms", 4
CUTS = {
    "pruned": SparsifyConfig(method="prune"),
    "rank deal, random gate": SparsifyConfig(deal="rank", gate="random"),
    "clustered, fitted": SparsifyConfig(),
}
SCORES = ("taylor", "sensitivity")
REFITS = ("none", "bias", "plain", "weighted")


@partial(jax.jit, static_argnums=0)
def velocity(config: ModelConfig, params: dict, inputs: tuple) -> jax.Array:
    return model_of(config.transformer, params)(*inputs)


def main() -> None:
    options = described(__doc__)
    options.add_argument("--seeds", type=int, default=1)
    seeds = range(options.parse_args().seeds)
    use_cores()
    config, params = model_directory.load(TEACHER)
    noisy = partial(noisy_inputs, config, "uniform")
    judged = [
        noisy(batch, jax.random.key(i))[0]
        for i, batch in enumerate(scenes.batches(config, BATCHES, split="validation"))
    ]
    wanted = [velocity(config, params, inputs) for inputs in judged]
    size = jnp.mean(jnp.stack([jnp.square(a).mean() for a in wanted]))
    print(f"E‖v_teacher‖² = {size:.3f}; seeds: {len(seeds)}")
    print("cut".ljust(40), *(refit.ljust(10) for refit in REFITS))
    for name, cut in CUTS.items():
        for score in SCORES:
            found = {refit: [] for refit in REFITS}
            for seed in seeds:
                calibration = scenes.batches(config, cut.batches, seed)
                for refit in REFITS:
                    sparsify = replace(cut, shared=score, refit=refit)
                    student, made, _ = make_student(
                        config, params, sparsify, calibration, noisy, seed
                    )
                    errors = [
                        jnp.square(velocity(student, made, inputs) - v).mean()
                        for inputs, v in zip(judged, wanted, strict=True)
                    ]
                    found[refit].append(float(jnp.mean(jnp.stack(errors))))
            means = (f"{sum(e) / len(e):.3f}".ljust(10) for e in found.values())
            print(f"{name}, {score}".ljust(40), *means, flush=True)


if __name__ == "__main__":
    main()
