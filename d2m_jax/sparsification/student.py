"""A student from its teacher, as SparsifyConfig says: experts or pruning, modulation."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import jax
import numpy as np
from jaxtyping import Float

from d2m_jax import hosts
from d2m_jax.config import (
    KINDS,
    FluxConfig,
    ModelConfig,
    SparsifyConfig,
    StackConfig,
    StageConfig,
    check,
)
from d2m_jax.keys import named_generator, named_key
from d2m_jax.models.blocks import FFNS
from d2m_jax.models.cut import MODULATION, blocks_left
from d2m_jax.sharding import whole
from d2m_jax.sparsification import importance
from d2m_jax.sparsification.deal import make_moe
from d2m_jax.sparsification.depth import shallower, without_blocks
from d2m_jax.sparsification.groups import align, aligned, shapes
from d2m_jax.sparsification.importance import Noisy
from d2m_jax.sparsification.modulation import low_rank
from d2m_jax.sparsification.prune import prune
from d2m_jax.sparsification.refit import refit


def make_student(
    teacher: ModelConfig,
    params: dict,
    sparsify: SparsifyConfig,
    batches: Iterable[dict],
    noisy: Noisy,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
    micro_batch: int | None = None,
) -> tuple[ModelConfig, dict, dict[str, np.ndarray]]:
    """The student, its parameters, which are on the host where new, and where they lie in the
    teacher (models/cut.py); equal seeds, equal students.

    Of `batches` the first `sparsify.batches` calibrate, one at a time and `micro_batch` samples of
    it together (None: all); `noisy(batch, key)` gives the arguments of Flux.embed and the true
    velocity, jitted once for all calls with the same function. Raises ConfigError where sizes do
    not fit.
    """
    student_config(teacher.transformer, sparsify)
    config, batches = teacher.transformer, iter(batches)
    config, params, cut = without_blocks(
        config, params, sparsify, batches, noisy, seed, micro_batch
    )
    if cut:
        left = {kind: blocks_left(config, cut, kind) for kind in KINDS}
        stay = "; ".join(f"{kind} {', '.join(map(str, of))}" for kind, of in left.items())
        say(f"blocks of the teacher that stay, chosen by {sparsify.depth_choice}: {stay}")
    student = student_config(config, sparsify)
    config, params = align(config, params, shapes(student))
    if not measures(sparsify):
        return replace(teacher, transformer=student), params, cut
    say(f"measures the teacher on {sparsify.batches} batches, to cut it")
    measured = importance.calibrate(
        config,
        params,
        batches,
        noisy,
        named_key(seed, "calibration"),
        sparsify.tokens,
        sparsify.text_share,
        wanted(sparsify),
        count=sparsify.batches,
        micro_batch=micro_batch,
    )
    scores = _scores(sparsify.shared, params, measured, seed)
    made = params | {kind: dict(params[kind]) for kind in KINDS}
    for kind, i, first, stack in student.named_stacks:
        if stack == getattr(config, kind)[i]:
            continue
        block = dict(params[kind][i]["block"])
        for name in FFNS[kind]:
            seen, weights = (
                tree[kind][i][name] if tree else None
                for tree in (measured.inputs, measured.weights)
            )
            tokens = _Tokens(scores[kind][i][name], seen, weights)
            generator = named_generator(seed, f"{kind}.{i}.{name}")
            ffn = jax.tree.map(whole, block[name])
            new = partial(_cut, ffn, tokens, student, stack, sparsify, generator)
            new = hosts.from_first(new)  # two machines might round two ways
            block[name] = new["ffn"]
            if "gain" in new:
                _add_bias(block, name, new["gain"])
            for n, neurons in enumerate(new["order"].reshape(-1, new["order"].shape[-1])):
                cut[f"{kind}.{first + n}.{name}"] = neurons
        made[kind][i] = {"block": block}
    if sparsify.method == "moe":
        say(
            f"cut into experts: neurons of the shared one chosen by {sparsify.shared}, the others"
            f" dealt by {sparsify.deal}, gates {sparsify.gate}, outputs refitted: {sparsify.refit}"
        )
    elif sparsify.method == "prune":
        say(
            f"pruned to {sparsify.mlp_ratio:g} × D neurons per FFN, chosen by {sparsify.shared},"
            f" outputs refitted: {sparsify.refit}"
        )

    if sparsify.modulation_rank is not None:
        rank = sparsify.modulation_rank
        student, made, cut[MODULATION], error = low_rank(student, made, measured.cond, rank)
        say(f"modulations on a shared basis of rank {rank}: relative error {error:.1e}")
    return replace(teacher, transformer=student), made, cut


@dataclass(frozen=True)
class _Tokens:
    """What calibration tells of a stack's FFNs."""

    scores: Float[np.ndarray, "g m w"]
    inputs: Float[np.ndarray, "g m t d"] | None
    weights: Float[np.ndarray, "g m t"] | None


def _scores(by: str, params: dict, measured: importance.Calibration, seed: int) -> dict:
    """What every neuron is worth."""
    if by == "magnitude":
        return importance.magnitude(params)
    if by == "random":
        return importance.random(params, named_generator(seed, "scores"))
    return getattr(measured, by)


def _cut(
    ffn: dict,
    tokens: _Tokens,
    student: FluxConfig,
    stack: StackConfig,
    sparsify: SparsifyConfig,
    generator: np.random.Generator,
) -> dict:
    """`ffn`, the FFNs of one stack pruned or as experts, `gain`, what the bias of their output
    gains where they were fitted, and the `order` of their neurons."""
    scores, inputs = tokens.scores, tokens.inputs
    if sparsify.method == "prune":
        made, order = prune(ffn, scores, student.ffn_width(stack))
    else:
        made, order = make_moe(ffn, scores, inputs, student, stack, sparsify, generator)
    result = {"ffn": made, "order": order.astype(np.int32)}
    if sparsify.refit == "none":
        return result
    moe = student.moe if sparsify.method == "moe" else None
    assert inputs is not None  # `wanted` asked for them
    made, gain = refit(made, ffn, inputs, tokens.weights, moe, sparsify.refit == "bias")
    return result | {"ffn": made, "gain": gain}


def micro_batch(sparsify: SparsifyConfig, stages: Mapping[str, StageConfig]) -> int:
    """Samples whose activations calibration holds at a time: as many as the first of the stages
    that follow, or all where none follows."""
    size, first = sparsify.batch_size, next(iter(stages.values()), None)
    return math.gcd(size, first.batch_size // first.optimizer.accumulate if first else size)


def measures(sparsify: SparsifyConfig) -> bool:
    """Whether this cut calibrates."""
    return sparsify.method != "none" or sparsify.modulation_rank is not None


def wanted(sparsify: SparsifyConfig) -> tuple[str, ...]:
    """What this cut needs of importance.calibrate."""
    if sparsify.method == "none":
        return ()
    fitted = sparsify.deal == "clustered" or sparsify.gate == "fitted"
    needs = {
        "taylor": sparsify.shared == "taylor",
        "sensitivity": sparsify.shared == "sensitivity",
        "inputs": sparsify.refit != "none" or (sparsify.method == "moe" and fitted),
        "weights": sparsify.refit == "weighted",
    }
    return tuple(name for name, needed in needs.items() if needed)


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
    stay dense, or do not. Raises ConfigError where the sizes do not fit.

    Of the blocks that depth pruning leaves: SparsifyConfig.dense_double and dense_single count
    these.
    """
    config, runs = shallower(config, sparsify), {}
    for kind in KINDS:
        stacks, dense = getattr(config, kind), getattr(sparsify, f"dense_{kind}")
        depth = config.depth(kind)
        for stack in stacks:
            check(
                stack.ffn == "dense",
                f"teacher: expected dense FFNs in its {kind} blocks, found {stack}",
            )
        check(
            all(0 <= block < depth for block in dense),
            f"SparsifyConfig.dense_{kind} = {dense}: expected indices below {depth}, the {kind}"
            " blocks of the teacher that stay",
        )
        same = groupby(block in dense for block in range(depth))
        runs[kind] = [(len(list(run)), 1) for _, run in same]
    config = aligned(config, runs)
    bodies: dict[str, list[StackConfig]] = {kind: [] for kind in KINDS}
    rank = sparsify.modulation_rank
    check(
        rank is None or config.modulation_rank is None,
        f"SparsifyConfig.modulation_rank = {rank}: the teacher's modulations have rank"
        f" {config.modulation_rank} already, expected none",
    )
    check(
        sparsify.method != "moe"
        or sparsify.gate == "random"
        or sparsify.moe.router_input == "modulated",
        "SparsifyConfig.gate = fitted: calibration holds modulated inputs alone, expected"
        f" MoEConfig.router_input = modulated, found {sparsify.moe.router_input}",
    )
    check(
        sparsify.method != "moe"
        or sparsify.refit == "none"
        or sparsify.moe.router_input == "modulated",
        f"SparsifyConfig.refit = {sparsify.refit}: calibration holds modulated inputs alone,"
        f" expected MoEConfig.router_input = modulated, found {sparsify.moe.router_input}",
    )
    for kind, _, first, stack in config.named_stacks:
        body = bodies[kind]
        if sparsify.method == "none" or first in getattr(sparsify, f"dense_{kind}"):
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
    stacks = {kind: tuple(body) for kind, body in bodies.items()}
    student = replace(config, moe=sparsify.moe, **stacks)
    return student if rank is None else replace(student, modulation_rank=rank)
