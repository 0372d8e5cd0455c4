"""Low-rank modulation: one basis for all blocks, a small factor and a bias for each.

See docs/method.md.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from d2m_jax.config import FluxConfig
from d2m_jax.sharding import whole

MODULATIONS = {"double": ("img_mod", "txt_mod"), "single": ("modulation",)}
COMPARED = 256  # calibration vectors that the error is measured on


def low_rank(
    config: FluxConfig, params: dict, cond: Float[np.ndarray, "n d"], rank: int
) -> tuple[FluxConfig, dict, float]:
    """The model with modulations of this rank, and their outputs' relative error on `cond`.

    The basis P [D, r] holds the first principal directions of `cond`. c W + b becomes
    (mean + (c − mean) P Pᵀ) W + b: a block's factor is Pᵀ W, and its bias takes up what P loses
    of the mean. Rank D loses nothing.
    """
    config = replace(config, modulation_rank=rank)
    cond = cond.astype(np.float64)
    mean = cond.mean(0)
    _, directions = np.linalg.eigh(np.cov(cond.T, bias=True))
    basis = directions[:, ::-1][:, :rank]
    rest = mean - basis @ (basis.T @ mean)
    compared = cond[:: -(-len(cond) // COMPARED)]
    lost = compared - mean - (compared - mean) @ basis @ basis.T

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
                    "kernel": basis.T.astype(np.float32) @ kernel,
                    "bias": bias + rest.astype(np.float32) @ kernel,
                }
                small = {part: value.astype(lin[part].dtype) for part, value in small.items()}
                stack["block"][name] = {"lin": small}
    params["modulation_basis"] = {"kernel": basis.astype(np.float32)}
    return config, params, float(np.sqrt(error / max(total, 1e-30)))
