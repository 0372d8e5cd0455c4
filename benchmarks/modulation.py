"""How much low-rank modulations lose, by rank: error of the outputs on vectors that are held out.

    python benchmarks/modulation.py

Relative, root mean square over all blocks: of the basis of sparsification/modulation.py, and of
principal directions of the inputs alone, which knew nothing of the blocks' matrices (as it was
until 2026-11-26).
On the icons teacher, and on random matrices of fewer blocks at a width of 512 whose inputs have a
spectrum that falls like 1 / i.
"""

from functools import partial

import jax
import numpy as np
import scenes
from timing import described

from d2m_jax.config import FluxConfig
from d2m_jax.distillation.stages import noisy_inputs
from d2m_jax.models.flux import model_of
from d2m_jax.sparsification.modulation import MODULATIONS, low_rank
from d2m_jax.weights.directory import model_directory

RANKS = (2, 4, 8, 16, 32, 64)


def kernels(params: dict) -> np.ndarray:
    """All modulations side by side, [D, outputs]."""
    found = [
        np.asarray(stack["block"][name]["lin"]["kernel"], np.float64)
        for kind, names in MODULATIONS.items()
        for stack in params[kind].values()
        for name in names
    ]
    return np.concatenate([a for own in found for a in own.reshape(-1, *own.shape[-2:])], axis=1)


def errors(config: FluxConfig, params: dict, seen: np.ndarray, held_out: np.ndarray) -> None:
    """Print both errors by rank."""
    old = kernels(params)
    rest = held_out - seen.mean(0)
    _, directions = np.linalg.eigh(np.cov(seen.T.astype(np.float64), bias=True))
    size = np.linalg.norm(held_out @ old)
    for rank in RANKS:
        _, made, *_ = low_rank(config, params, seen, rank)
        mine = rest @ np.asarray(made["modulation_basis"]["kernel"], np.float64) @ kernels(made)
        basis = directions[:, ::-1][:, :rank]
        plain = rest @ basis @ basis.T @ old
        found = [np.linalg.norm(rest @ old - a) / size for a in (mine, plain)]
        print(f"rank {rank:3}: {found[0]:.2e} by outputs, {found[1]:.2e} by inputs", flush=True)


def main() -> None:
    described(__doc__).parse_args()
    config, params = model_directory.load("teachers/pictograms")

    @partial(jax.jit, static_argnums=2)
    def cond(batch: dict, key: jax.Array, config: object) -> jax.Array:
        inputs, _ = noisy_inputs(config, "uniform", batch, key)
        return jax.nn.silu(model_of(config.transformer, params).embed(*inputs)[1].vec)

    found = [
        np.asarray(cond(batch, jax.random.key(i), config))
        for i, batch in enumerate(scenes.batches(config, 24))
    ]
    print("icons teacher")
    host = jax.tree.map(np.asarray, params)
    errors(config.transformer, host, np.concatenate(found[:16]), np.concatenate(found[16:]))

    print("random, D = 512")
    rng, dim = np.random.default_rng(0), 512
    turn, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    vectors = rng.standard_normal((1536, dim)) / np.arange(1, dim + 1) @ turn

    def lin(groups: int, chunks: int) -> dict:
        # A block reads some directions much more than others.
        kernel = rng.standard_normal((groups, 1, dim, chunks * dim)) / dim**0.5
        kernel *= np.exp(rng.standard_normal((groups, 1, dim, 1)))
        return {"lin": {"kernel": kernel, "bias": np.zeros((groups, 1, chunks * dim))}}

    double = {0: {"block": {name: lin(2, 6) for name in MODULATIONS["double"]}}}
    made = {"double": double, "single": {0: {"block": {"modulation": lin(4, 3)}}}}
    errors(FluxConfig(), made, vectors[:1024], vectors[1024:])


if __name__ == "__main__":
    main()
