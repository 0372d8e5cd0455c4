"""A student from its teacher, as SparsifyConfig says: importance, experts or pruning, modulation (RECIPE.md)."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby, islice

import jax
import numpy as np

from d2m_jax.config import FluxConfig, ModelConfig, SparsifyConfig, StackConfig, check
from d2m_jax.sparsify import importance
from d2m_jax.sparsify.experts import make_moe
from d2m_jax.sparsify.groups import KINDS, align
from d2m_jax.sparsify.importance import FFNS, Noisy
from d2m_jax.sparsify.modulation import low_rank, modulation_inputs
from d2m_jax.sparsify.prune import prune


def make_student(
    teacher: ModelConfig,
    params: dict,
    sparsify: SparsifyConfig,
    batches: Iterable[dict],
    noisy: Noisy,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[ModelConfig, dict]:
    """The student and its parameters, on the host where they are new; the same seed gives the same student.

    Of `batches`, {"image", "words"} each, the first `sparsify.batches` calibrate; `noisy(batch, key)` gives the
    arguments of Flux.embed and the true velocity. Raises ConfigError where the sizes do not fit.
    """
    check(sparsify.batches >= 1, f"SparsifyConfig.batches = {sparsify.batches}: expected at least 1")
    check(sparsify.tokens >= 1, f"SparsifyConfig.tokens = {sparsify.tokens}: expected at least 1")
    config, params = _in_runs(teacher.transformer, params, sparsify)
    student = _student_config(config, sparsify)
    batches = list(islice(batches, sparsify.batches))
    check(len(batches) > 0, "calibration: expected at least one batch, found none")
    calibration = config, params, batches, noisy, jax.random.key(seed)

    if sparsify.shared == "taylor":
        scores = importance.taylor(*calibration)
    elif sparsify.shared == "magnitude":
        scores = importance.magnitude(params)
    else:
        scores = importance.random(params, _generator(seed, "scores"))
    say(f"importance of the FFN's neurons: {sparsify.shared}")

    inputs = None
    if sparsify.method == "moe" and (sparsify.deal == "clustered" or sparsify.gate == "fitted"):
        inputs = importance.ffn_inputs(*calibration, sparsify.tokens)
    made = dict(params)
    for kind in KINDS:
        made[kind] = dict(params[kind])
        for i, stack in enumerate(getattr(student, kind)):
            if stack == getattr(config, kind)[i]:
                continue
            block = dict(params[kind][i]["block"])
            for name in FFNS[kind]:
                ffn, mine = jax.tree.map(np.asarray, block[name]), scores[kind][i][name]
                if sparsify.method == "prune":
                    block[name] = prune(ffn, mine, student.ffn_width(stack))
                else:
                    seen = inputs and inputs[kind][i][name]
                    generator = _generator(seed, f"{kind}.{i}.{name}")
                    block[name] = make_moe(ffn, mine, seen, student, stack, sparsify, generator)
            made[kind][i] = {"block": block}
    if sparsify.method == "prune":
        say(f"FFNs pruned to {sparsify.mlp_ratio} of {_ratios(config)} times the width")
    else:
        moe = sparsify.moe
        say(f"FFNs to {moe.experts} experts, deal {sparsify.deal}, gate {sparsify.gate}")

    if sparsify.modulation_rank is not None:
        seen = modulation_inputs(*calibration)
        student, made, error = low_rank(student, made, seen, sparsify.modulation_rank)
        say(f"modulation of rank {sparsify.modulation_rank}: relative error {error:.1e}")
    return replace(teacher, transformer=student), made
