"""A small task for the loop's tests: a two-layer regression with noise from the step's key."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from d2m_jax.config import OptimizerConfig, StageConfig
from d2m_jax.distillation.objective import Objective
from d2m_jax.training import train_stage
from tests.seed import generator


class Stream:
    """Batch n is a function of n alone."""

    def __init__(self, batch_size=8):
        self.batch_size, self.position = batch_size, 0

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng((1, self.position))
        self.position += 1
        x = rng.normal(size=(self.batch_size, 4)).astype(np.float32)
        return {"x": x, "y": np.sin(x.sum(1, keepdims=True))}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def initial():
    rng = generator()

    def linear(a, b):
        kernel = rng.normal(size=(a, b)).astype(np.float32) / np.sqrt(a)
        return {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(b)}

    return {"body": {0: linear(4, 16), 1: linear(16, 16)}, "out": linear(16, 1)}


def draw(batch, key, noise=0.01):
    return batch | {"y": batch["y"] + noise * jax.random.normal(key, batch["y"].shape)}


def means(params, constants, batch):
    x = batch["x"]
    for layer in params["body"].values():
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    y = x @ params["out"]["kernel"] + params["out"]["bias"]
    return {"output": jnp.square(constants["scale"] * y - batch["y"]).mean()}


def value(means, whole):
    return means["output"], {"output": means["output"], "mlp/entropy": jnp.ones(2)}


loss = Objective(draw, means, value, {"output": jnp.float32(0)})


def stage(steps=40, **changes):
    optimizer = changes.pop("optimizer", OptimizerConfig(warmup=4, ema=0.9))
    defaults = {"batch_size": 8, "log_every": 4, "evaluate_every": 10, "checkpoint_every": 10}
    return StageConfig(steps=steps, optimizer=optimizer, **(defaults | changes))


def run(directory, stage, params=None, loss=loss, batches=None, **others):
    validation = Stream(16)
    return train_stage(
        "toy",
        stage,
        loss=loss,
        params=params or initial(),
        constants={"scale": jnp.float32(1.5)},
        batches=batches or Stream(stage.batch_size),
        validation=[next(validation)],
        run_directory=directory,
        **others,
    )


if __name__ == "__main__":  # the process that test_loop.py kills
    run(Path(sys.argv[1]), stage(int(sys.argv[2]), checkpoint_every=5))
    print("finished")
