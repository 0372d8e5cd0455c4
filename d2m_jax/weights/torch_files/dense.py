"""A sparse model as the dense one that it was cut from: its neurons back in their places."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from d2m_jax.config import FluxConfig, check
from d2m_jax.models.cut import Cut, dense_config, ffns
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import sizes
from d2m_jax.weights.keys import cut_keys, flux_keys, key_table
from d2m_jax.weights.keys.key_table import Parameter
from d2m_jax.weights.torch_files.torch_export import torch_tensors


def dense(
    where: Any, config: FluxConfig, params: Mapping[str, Parameter], cut: Cut
) -> tuple[FluxConfig, dict[str, Parameter]]:
    """The model with its FFNs put back together, all kernels as they are, and full modulations:
    for debugging. Gates, scales and routers of blocks are gone, so that every expert and every
    block would count once; what was pruned stays so.

    ConfigError for experts without an order of their neurons; `where` names the model.
    """
    absent = [name for name, stack in ffns(config) if stack.ffn == "moe" and name not in cut]
    check(
        not absent,
        f"{where}: {len(absent)} FFNs whose neurons' order was not kept, as older versions did not;"
        " expected a model that was cut since",
    )
    moe = {
        name: _among_themselves(cut[name][: config.ffn_width(stack)])
        for name, stack in ffns(config)
        if stack.ffn == "moe"
    }
    dtype = np.result_type(*(param.dtype for param in params.values()))
    mine = {name: param.astype(dtype) for name, param in params.items()}
    if config.modulation_rank is not None:
        basis = mine.pop("modulation_basis.kernel")
        for name in filter(cut_keys.FACTOR.fullmatch, list(mine)):
            mine[name] = _full(basis, mine[name])
    was = replace(config, modulation_rank=None)
    table, _ = cut_keys.keys("bfl", was, moe)
    whole = dense_config(was, moe)
    theirs = torch_tensors(table, mine)
    back = flux_keys.keys("bfl", whole)
    return whole, key_table.parameters(back, theirs, sizes(abstract(whole)), dtype, where)


def _among_themselves(neurons: np.ndarray) -> np.ndarray:
    """The places of neurons when those that were pruned are gone."""
    return np.argsort(np.argsort(neurons)).astype(neurons.dtype)


def _full(basis: Parameter, factor: Parameter) -> Parameter:
    """The matrix that a basis and a block's factor are."""

    def take(region: tuple[slice, ...]):
        rows = basis[region[-2], :].astype(np.float32)
        part = factor[(*region[:-2], slice(None), region[-1])].astype(np.float32)
        return (rows @ part).astype(factor.dtype)

    return Parameter((*factor.shape[:-2], basis.shape[0], factor.shape[-1]), factor.dtype, take)
