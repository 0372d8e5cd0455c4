"""A student from its teacher, as SparsifyConfig says: experts or pruning, modulation."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby, islice

import jax
import numpy as np
from jaxtyping import Float

from d2m_jax.config import KINDS, FluxConfig, ModelConfig, SparsifyConfig, check
from d2m_jax.keys import named_generator, named_key
from d2m_jax.models.blocks import FFNS
from d2m_jax.sharding import whole
from d2m_jax.sparsify import importance, sensitivity
from d2m_jax.sparsify.experts import make_moe
from d2m_jax.sparsify.groups import align, aligned, shapes
from d2m_jax.sparsify.importance import Noisy
from d2m_jax.sparsify.modulation import low_rank
from d2m_jax.sparsify.prune import prune
from d2m_jax.sparsify.refit import refit


def make_student(
    teacher: ModelConfig,
    params: dict,
    sparsify: SparsifyConfig,
    batches: Iterable[dict],
    noisy: Noisy,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[ModelConfig, dict]:
    """The student and its parameters, which are on the host where new; equal seeds, equal students.

    Of `batches` the first `sparsify.batches` calibrate; `noisy(batch, key)` gives the arguments of
    Flux.embed and the true velocity, jitted once for all calls with the same function. Raises
    ConfigError where sizes do not fit.
    """
    student = student_config(teacher.transformer, sparsify)
    config, params = align(teacher.transformer, params, shapes(student))
    batches = list(islice(batches, sparsify.batches))
    check(len(batches) > 0, "calibration: expected at least one batch, found none")
    key = named_key(seed, "calibration")
    want = wanted(sparsify)
    measured = importance.calibrate(
        config, params, batches, noisy, key, sparsify.tokens, sparsify.text_share, want
    )
    say(f"calibrated on {len(batches)} batches")

    if sparsify.shared == "taylor":
        scores = measured.taylor
    elif sparsify.shared == "sensitivity":
        scores = {}  # of each FFN when its turn comes
    elif sparsify.shared == "magnitude":
        scores = importance.magnitude(params)
    else:
        scores = importance.random(params, named_generator(seed, "scores"))
    made = dict(params)
    for kind in KINDS:
        made[kind] = dict(params[kind])
        for i, stack in enumerate(getattr(student, kind)):
            if stack == getattr(config, kind)[i]:
                continue
            block = dict(params[kind][i]["block"])
            for name in FFNS[kind]:
                ffn, moe = jax.tree.map(whole, block[name]), None
                seen = measured.inputs[kind][i][name]
                if sparsify.shared == "sensitivity":
                    mine = sensitivity.scores(ffn, seen, measured.sensitivity[kind][i][name])
                else:
                    mine = scores[kind][i][name]
                if sparsify.method == "prune":
                    block[name] = prune(ffn, mine, student.ffn_width(stack))
                else:
                    moe, generator = student.moe, named_generator(seed, f"{kind}.{i}.{name}")
                    block[name] = make_moe(ffn, mine, seen, student, stack, sparsify, generator)
                if sparsify.refit != "none":
                    weighed = sparsify.refit == "weighted"
                    weights = measured.sensitivity[kind][i][name] if weighed else None
                    alone = sparsify.refit == "bias"
                    block[name], gain = refit(block[name], ffn, seen, weights, moe, alone)
                    _add_bias(block, name, gain)
            made[kind][i] = {"block": block}
    if sparsify.method == "moe":
        said = f"experts: shared {sparsify.shared}, deal {sparsify.deal}, gate {sparsify.gate}"
        say(f"{said}, refit {sparsify.refit}")
    else:
        say(f"pruned to {sparsify.mlp_ratio}, by {sparsify.shared}, refit {sparsify.refit}")

    if sparsify.modulation_rank is not None:
        rank = sparsify.modulation_rank
        student, made, error = low_rank(student, made, measured.cond, rank)
        say(f"modulation of rank {rank}: relative error {error:.1e}")
    return replace(teacher, transformer=student), made


def wanted(sparsify: SparsifyConfig) -> tuple[str, ...]:
    """What this cut needs of importance.calibrate."""
    taylor = ("taylor",) if sparsify.shared == "taylor" else ()
    sensitive = sparsify.shared == "sensitivity" or sparsify.refit == "weighted"
    return taylor + (("sensitivity",) if sensitive else ())


def _add_bias(block: dict, name: str, gain: Float[np.ndarray, "g m d"]) -> None:
    """What an FFN's output bias gains; a single block's is that of its attention."""
    if "out_layer" in block[name]:
        place = block[name]["out_layer"]
    else:
        place = block[name]["shared"]["out_layer"]
    if "bias" not in place:
        place = block["attn_out"] = dict(block["attn_out"])
    bias = whole(place["bias"])
    place["bias"] = (bias.astype(np.float32) + gain).astype(bias.dtype)


def student_config(config: FluxConfig, sparsify: SparsifyConfig) -> FluxConfig:
    """The student's transformer, from the dense teacher's, in one stack per run of blocks that
    stay dense, or do not. Raises ConfigError where the sizes do not fit."""
    runs = {}
    for kind in KINDS:
        stacks, dense = getattr(config, kind), getattr(sparsify, f"dense_{kind}")
        depth = sum(stack.depth for stack in stacks)
        for stack in stacks:
            check(
                stack.ffn == "dense",
                f"teacher: expected dense FFNs in its {kind} blocks, found {stack}",
            )
        check(
            all(0 <= block < depth for block in dense),
            f"SparsifyConfig.dense_{kind} = {dense}: expected indices below {depth}, the teacher's"
            f" {kind} blocks",
        )
        same = groupby(block in dense for block in range(depth))
        runs[kind] = [(len(list(run)), 1) for _, run in same]
    config = aligned(config, runs)
    bodies, rank = {}, sparsify.modulation_rank
    check(
        rank is None or config.modulation_rank is None,
        f"SparsifyConfig.modulation_rank = {rank}: the teacher's modulations have rank"
        f" {config.modulation_rank} already, expected none",
    )
    check(
        sparsify.method == "prune"
        or sparsify.gate == "random"
        or sparsify.moe.router_input == "modulated",
        "SparsifyConfig.gate = fitted: calibration holds modulated inputs alone, expected"
        f" MoEConfig.router_input = modulated, found {sparsify.moe.router_input}",
    )
    check(
        sparsify.method == "prune"
        or sparsify.refit == "none"
        or sparsify.moe.router_input == "modulated",
        f"SparsifyConfig.refit = {sparsify.refit}: calibration holds modulated inputs alone,"
        f" expected MoEConfig.router_input = modulated, found {sparsify.moe.router_input}",
    )
    for kind in KINDS:
        start, body = 0, []
        for stack in getattr(config, kind):
            if start in getattr(sparsify, f"dense_{kind}"):
                body.append(stack)
            elif sparsify.method == "moe":
                body.append(replace(stack, ffn="moe"))
            else:
                check(
                    0 < sparsify.mlp_ratio < stack.mlp_ratio,
                    f"SparsifyConfig.mlp_ratio = {sparsify.mlp_ratio}: expected more than 0 and"
                    f" less than the teacher's {stack.mlp_ratio}",
                )
                body.append(replace(stack, mlp_ratio=sparsify.mlp_ratio))
            start += stack.depth
        bodies[kind] = tuple(body)
    student = replace(config, moe=sparsify.moe, **bodies)
    return student if rank is None else replace(student, modulation_rank=rank)
