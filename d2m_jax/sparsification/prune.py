"""Width pruning, the rival of the MoE: the best neurons stay, the others are gone."""

import numpy as np
from jaxtyping import Float, Int


def prune(
    ffn: dict, scores: Float[np.ndarray, "g m w"], width: int
) -> tuple[dict, Int[np.ndarray, "g m w"]]:
    """The FFNs of a stack [groups, blocks, …] with their `width` best neurons, in old order; and
    the order of all: these, then the others."""
    order = ranked(scores)
    parts = np.sort(order[..., :width], axis=-1), np.sort(order[..., width:], axis=-1)
    return take(ffn, parts[0]), np.concatenate(parts, axis=-1)


def ranked(scores: Float[np.ndarray, "*l w"]) -> np.ndarray:
    """Neurons from the highest score to the lowest, of equal ones the first first."""
    return np.argsort(-scores, axis=-1, kind="stable")


def take(ffn: dict, neurons: np.ndarray) -> dict:
    """The FFNs of a stack with these neurons [groups, blocks, w], in this order."""
    kernel, bias = ffn["in_layer"]["kernel"], ffn["in_layer"]["bias"]
    out = ffn["out_layer"]["kernel"]
    return {
        "in_layer": {
            "kernel": np.take_along_axis(kernel, neurons[..., None, :], axis=-1),
            "bias": np.take_along_axis(bias, neurons, axis=-1),
        },
        "out_layer": ffn["out_layer"]
        | {"kernel": np.take_along_axis(out, neurons[..., None], axis=-2)},
    }
