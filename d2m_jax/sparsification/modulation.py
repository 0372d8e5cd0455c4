"""Low-rank modulation: one basis for all blocks, a small factor and a bias for each.

See docs/method.md.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from d2m_jax import hosts
from d2m_jax.config import FluxConfig
from d2m_jax.sharding import whole

MODULATIONS = {"double": ("img_mod", "txt_mod"), "single": ("modulation",)}
UNSEEN = 1e-4  # of the mean variance, what a direction has that calibration did not see
COMPARED = 256  # calibration vectors that the error is measured on


def low_rank(
    config: FluxConfig, params: dict, cond: Float[np.ndarray, "n d"], rank: int
) -> tuple[FluxConfig, dict, Float[np.ndarray, "r1 d"], float]:
    """The model with modulations of this rank, how factors and biases follow from W
    (models/cut.py), and their outputs' relative error on `cond`.

    c W + b of every block becomes (mean + (c − mean) P Q) W + b, P [D, r] for all blocks, Q W a
    block's factor; its bias takes up what is lost of the mean. With C the covariance of `cond` and
    M = Σ W Wᵀ over all blocks, P and Q lose least of the outputs, E ‖(c − mean)(1 − P Q) W‖²
    (reduced-rank regression): for U the first eigenvectors of C^½ M C^½, P = C^-½ U and
    Q = Uᵀ C^½. Principal directions of `cond` alone would not know what blocks read of it. Rank D
    loses nothing.
    """
    config = replace(config, modulation_rank=rank)
    cond = cond.astype(np.float64)
    mean = cond.mean(0)
    lins = [
        stack["block"][name]["lin"]
        for kind, names in MODULATIONS.items()
        for stack in params[kind].values()
        for name in names
    ]
    read = np.sum([_gram(whole(lin["kernel"])) for lin in lins], axis=0)
    # One process's: signs and directions of equal variance are what a machine makes of them.
    found = hosts.from_first(lambda: _regression(np.cov(cond.T, bias=True), read, rank))
    basis, back = found["basis"], found["back"]
    rest = mean - (mean @ basis) @ back
    compared = cond[:: -(-len(cond) // COMPARED)]
    lost = compared - mean - ((compared - mean) @ basis) @ back

    error = total = 0.0
    params = dict(params)
    for kind, names in MODULATIONS.items():
        params[kind] = {
            i: stack | {"block": dict(stack["block"])} for i, stack in params[kind].items()
        }
        for stack in params[kind].values():
            for name in names:
                lin = stack["block"][name]["lin"]
                kernel = whole(lin["kernel"]).astype(np.float32)
                bias = whole(lin["bias"]).astype(np.float32)
                error += np.square(lost.astype(np.float32) @ kernel).sum(dtype=np.float64)
                old = compared.astype(np.float32) @ kernel + bias[..., None, :]
                total += np.square(old).sum(dtype=np.float64)
                small = {
                    "kernel": back.astype(np.float32) @ kernel,
                    "bias": bias + rest.astype(np.float32) @ kernel,
                }
                small = {part: value.astype(lin[part].dtype) for part, value in small.items()}
                stack["block"][name] = {"lin": small}
    params["modulation_basis"] = {"kernel": basis.astype(np.float32)}
    of_whole = np.concatenate([back, rest[None]]).astype(np.float32)
    return config, params, of_whole, float(np.sqrt(error / max(total, 1e-30)))


def _gram(kernel: Float[np.ndarray, "g m d o"]) -> Float[np.ndarray, "d d"]:
    """Σ W Wᵀ of the blocks of a stack, one after the other: a stack of FLUX.1's is 14 GB."""
    total = np.zeros((kernel.shape[-2],) * 2)
    for layer in np.ndindex(kernel.shape[:2]):
        own = kernel[layer].astype(np.float32)
        total += own @ own.T
    return total


def _regression(
    covariance: Float[np.ndarray, "d d"], read: Float[np.ndarray, "d d"], rank: int
) -> dict[str, np.ndarray]:
    """P, "basis", and Q, "back", of `low_rank`. Directions that calibration never saw keep a little
    weight, so that the square root has an inverse."""
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(np.maximum(values, 0) + UNSEEN * max(values.mean(), 1e-30))
    half = (vectors * root) @ vectors.T
    _, directions = np.linalg.eigh(half @ read @ half)
    chosen = directions[:, ::-1][:, :rank]
    return {"basis": (vectors / root) @ (vectors.T @ chosen), "back": chosen.T @ half}
