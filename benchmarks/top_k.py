"""A student with other numbers of experts per token than it trained with: its error by k.

    python benchmarks/top_k.py runs/demo/rivals/moe/models/moe

Error: E‖v_teacher − v_student‖² on noisy validation examples of the icons task. Beside the weights
of models/moe.py, those that add up to k at every k, as they were until 2026-11-26.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import scenes
from timing import described

from d2m_jax.config import ModelConfig, MoEConfig
from d2m_jax.distillation.stages import noisy_inputs
from d2m_jax.models.flux import model_of
from d2m_jax.weights.directory import model_directory

TEACHER, TOP_KS, BATCHES = "teachers/pictograms", (0, 1, 2, 4, 8, 12), 4


@partial(jax.jit, static_argnums=0)
def velocity(config: ModelConfig, params: dict, inputs: tuple) -> jax.Array:
    return model_of(config.transformer, params)(*inputs)


def with_moe(config: ModelConfig, moe: MoEConfig) -> ModelConfig:
    return replace(config, transformer=replace(config.transformer, moe=moe))


def main() -> None:
    options = described(__doc__)
    options.add_argument("models", nargs="+", help="students of the teacher that ships")
    models = options.parse_args().models
    teacher, params = model_directory.load(TEACHER)
    inputs, targets = [], []
    for i, batch in enumerate(scenes.batches(teacher, BATCHES, split="validation")):
        noisy, _ = noisy_inputs(teacher, "uniform", batch, jax.random.key(i))
        inputs.append(noisy)
        targets.append(velocity(teacher, params, noisy))
    print("model, weights".ljust(50), *(f"k = {k:<5}" for k in TOP_KS))
    for path in models:
        student, params = model_directory.load(path)
        moe = student.transformer.moe
        for name, rule in (
            ("as trained", moe.running),
            ("add up to k", lambda k, moe=moe: replace(moe, top_k=k, trained_top_k=max(1, k))),
        ):
            errors = []
            for k in TOP_KS:
                config = with_moe(student, rule(k))
                found = [velocity(config, params, noisy) for noisy in inputs]
                pairs = zip(found, targets, strict=True)
                errors.append(jnp.mean(jnp.stack([jnp.square(a - b).mean() for a, b in pairs])))
            print(f"{path}, {name}".ljust(50), *(f"{error:<9.4f}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
