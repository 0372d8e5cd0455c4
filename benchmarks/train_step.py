"""A training step of each stage of configs/flux_distill.py: speed, utilisation, memory.

    python benchmarks/train_step.py --output train_step.json

On a GPU full FLUX.1 [dev] and a batch of 1, on a CPU a small model in float32. Teacher and student
are random arrays, stored and shared as a run has them, batches are encoded already; every step
works on the state that the last one left. Utilisation counts the model's FLOPs (teacher's forward,
student's forward and backward) over those of a large matmul, and not what rematerialisation adds.
Memory is what the compiled program says it needs: arguments, results and temporaries.
"""

import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from models import config_of
from timing import finish, limits, measure, on_cpu, parser, table, usual_dtype

from d2m_jax.command_line import load_config
from d2m_jax.config import (
    KINDS,
    ROOT,
    AutoencoderConfig,
    GroupsConfig,
    ModelConfig,
    PromptsConfig,
)
from d2m_jax.planning.programs import Lowered, lower
from d2m_jax.sharding import make_mesh


def teacher(options) -> ModelConfig:
    """FLUX.1 [dev], or one of its shape but smaller."""
    transformer = config_of("flux_dev", options.dim, options.divide)
    text, image = PromptsConfig(length=options.text_tokens), AutoencoderConfig()
    image = replace(image, height=options.pixels, width=options.pixels)
    return ModelConfig(transformer, text, image, shift=None)


def groups(model: ModelConfig) -> GroupsConfig:
    """MoE-S's share of groups of two: 7 of 19 double blocks skipped, 15 of 38 single ones. Blocks
    of both kinds must be left outside, as the stage's name patterns say: three double ones do."""
    doubles, singles = map(model.transformer.depth, KINDS)
    pairs, single_pairs = round(doubles * 7 / 19), round(singles * 15 / 38)
    keep = {"keep_double": doubles - 2 * pairs, "keep_single": singles - 2 * single_pairs}
    return GroupsConfig(double_blocks=2, single_blocks=2, **keep)


def arguments(stage: Lowered, compiled) -> list:
    """Random arrays for the step: parameters and batch of a usual size, optimizer states zero."""

    def draw(path, info, sharding):
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(info.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), sharding)
        if "optimizer" in name or not jnp.issubdtype(info.dtype, jnp.floating):
            value = np.zeros(info.shape, info.dtype)
            return jax.device_put(value, sharding)
        spread = info.shape[-2] ** -0.5 if "kernel" in name else 0.1
        make = jax.jit(
            lambda key: (spread * jax.random.normal(key, info.shape)).astype(info.dtype),
            out_shardings=sharding,
        )
        return make(jax.random.key(zlib.crc32(name.encode())))

    infos, shardings = stage.program.args_info[0], compiled.input_shardings[0]
    return list(jax.tree_util.tree_map_with_path(draw, infos, shardings))


def compare(options, peak: float):
    """One row per stage."""
    model = teacher(options)
    config = load_config(ROOT / "configs" / "flux_distill.py")
    stages = {}
    for name, stage in config.stages.items():
        shape = groups(model) if stage.groups else None
        stages[name] = replace(
            stage,
            batch_size=options.batch,
            dtype=usual_dtype().name,
            groups=shape,
            optimizer=replace(stage.optimizer, accumulate=1),
        )
    mesh = make_mesh(config.mesh)
    tokens = options.batch * ((options.pixels // 16) ** 2 + options.text_tokens)
    for stage in lower(replace(config, stages=stages), model, mesh):
        compiled = stage.program.compile()
        state, *rest = arguments(stage, compiled)

        def step(compiled=compiled, rest=rest):
            nonlocal state
            state, metrics = compiled(state, *rest)
            return metrics

        taken = measure({stage.stage: step}, options.rounds)[stage.stage]
        memory = compiled.memory_analysis()
        needs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needs += memory.output_size_in_bytes - memory.alias_size_in_bytes
        yield {
            "stage": stage.stage,
            "batch": options.batch,
            "tokens": tokens // options.batch,
            "ms": 1e3 * taken.median,
            "low": 1e3 * taken.low,
            "high": 1e3 * taken.high,
            "tokens/s": tokens / taken.median,
            "TFLOP": stage.flops / 1e12,
            "utilisation": stage.flops / taken.median / (peak * mesh.size),
            "memory, GB": needs / 1e9,
        }
        del state, rest, compiled


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--dim", type=int, default=512 if on_cpu() else 3072)
    options.add_argument("--divide", type=int, default=6 if on_cpu() else 1, help="the depth")
    options.add_argument("--pixels", type=int, default=256 if on_cpu() else 1024, help="of a side")
    options.add_argument("--text_tokens", type=int, default=64 if on_cpu() else 512)
    options.add_argument("--batch", type=int, default=1)
    options = options.parse_args()
    peak = limits()
    columns = {"stage": "<7", "batch": "5d", "tokens": "6d", "ms": "9.1f", "low": "9.1f"}
    columns |= {"high": "9.1f", "tokens/s": "9.0f", "TFLOP": "7.3f", "utilisation": "10.2f"}
    rows = compare(options, peak["matmul, FLOP/s"])
    finish(options, table(columns | {"memory, GB": "9.2f"}, rows), limits=peak)


if __name__ == "__main__":
    main()
