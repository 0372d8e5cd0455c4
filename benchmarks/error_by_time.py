"""When a student is wrong: its error by time, of 0 (data) to 1 (noise).

    python benchmarks/error_by_time.py runs/demo/rivals/moe/models/moe

Error: mean (v_teacher − v_student)² at t = 1/16, 3/16 … 15/16, on validation examples of the icons
task; the last column is their mean.
"""

from functools import partial

import jax
import jax.numpy as jnp
import scenes
from timing import described

from d2m_jax.config import StageConfig
from d2m_jax.distillation.fixed_times import OFFSETS, TIMES, drawn, error_sums
from d2m_jax.weights.directory import model_directory

TEACHER, BATCHES = "teachers/pictograms", 8
OFFSET = OFFSETS["half_eighths"]
STAGE = StageConfig(dtype="float32")


def main() -> None:
    options = described(__doc__)
    options.add_argument("models", nargs="+", help="students of the teacher that ships")
    models = options.parse_args().models
    teacher, constants = model_directory.load(TEACHER)
    batches = [
        drawn(teacher, batch, jax.random.key(i), jnp.int32(0), jnp.float32(OFFSET))
        for i, batch in enumerate(scenes.batches(teacher, BATCHES, split="validation"))
    ]
    print("t".ljust(60), *(f"{(i + OFFSET) / TIMES:<7.4f}" for i in range(TIMES)), "mean")
    for path in models:
        student, params = model_directory.load(path)
        sums = jax.jit(partial(error_sums, student, STAGE, teacher))
        parts = [sums(params, constants, batch) for batch in batches]
        error = sum(p["distillation"] for p in parts) / sum(p["count"] for p in parts)
        columns = [f"{e:<7.4f}" for e in error] + [f"{error.mean():.4f}"]
        print(path[-60:].ljust(60), *columns, flush=True)


if __name__ == "__main__":
    main()
