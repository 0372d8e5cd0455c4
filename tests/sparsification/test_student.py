from dataclasses import replace

import jax
import numpy as np
import pytest

from d2m_jax.config import (
    ConfigError,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    SparsifyConfig,
    StageConfig,
)
from d2m_jax.models.flux import initialise
from d2m_jax.sparsification import align, make_student, shapes
from d2m_jax.sparsification.student import micro_batch

UNMODULATED = MoEConfig(router_input="unmodulated")
SMALL = SparsifyConfig(batches=3, batch_size=8, tokens=96)


def make(small, sparsify, seed=0, batches=None, micro_batch=None, **changes):
    teacher = ModelConfig(transformer=replace(small.config, **changes))
    lines = []
    made = make_student(
        teacher,
        small.params,
        sparsify,
        batches or small.batches(4),
        small.noisy,
        seed,
        lines.append,
        micro_batch,
    )
    assert lines
    return made[0].transformer, made[1]


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.shape == y.shape and (np.asarray(x) == np.asarray(y)).all() for x, y in pairs)


@pytest.mark.parametrize(
    "sparsify",
    [
        SMALL,
        replace(SMALL, deal="rank", gate="random", shared="magnitude"),
        replace(SMALL, shared="random", modulation_rank=5, gate="random", moe=UNMODULATED),
        replace(SMALL, method="prune"),
        replace(SMALL, shared="sensitivity", refit="weighted"),
        replace(SMALL, method="prune", shared="sensitivity", refit="bias"),
    ],
    ids=["fitted", "paper", "unmodulated", "pruned", "refit", "pruned, bias"],
)
def test_student_is_whole_and_the_seed_decides(small, sparsify):
    config, params = make(small, sparsify)
    wanted = jax.eval_shape(lambda: initialise(config, 0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
    assert np.isfinite(small.velocity(config, params)).all()
    assert same(params, make(small, sparsify)[1])
    if sparsify.method == "moe":
        assert not same(params, make(small, sparsify, seed=1)[1])


def test_micro_batches_cut_the_same_student(small):
    """To a place in a hundred, for neurons that are nearly equal may trade theirs."""
    cut = replace(SMALL, shared="sensitivity", deal="rank", gate="random")
    for sparsify in (cut, replace(cut, shared="taylor")):
        (_, whole), (_, parts) = (make(small, sparsify, micro_batch=size) for size in (None, 2))
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True)
        assert all(np.mean(np.asarray(a) == np.asarray(b)) > 0.99 for a, b in pairs)


def test_micro_batch_is_that_of_the_first_stage():
    def stage(size, parts):
        return StageConfig(batch_size=size, optimizer=OptimizerConfig(accumulate=parts))

    cut = SparsifyConfig(batch_size=48)
    assert micro_batch(cut, {"a": stage(64, 2), "b": stage(64, 64)}) == 16
    assert micro_batch(cut, {"a": stage(64, 64)}) == 1
    assert micro_batch(cut, {}) == 48


def test_dense_blocks_stay_and_the_rest_is_exact(small):
    """Every expert active under a zero gate is the teacher again, around its dense blocks."""
    moe = MoEConfig(top_k=12)
    sparsify = replace(SMALL, moe=moe, dense_double=(0,), dense_single=(1, 2))
    config, params = make(small, sparsify)
    assert [s.ffn for s in config.double] == ["dense", "moe"]
    assert [(s.ffn, s.groups) for s in config.single] == [("moe", 1), ("dense", 2), ("moe", 1)]
    for kind in ("double", "single"):
        for stack in params[kind].values():
            for part in stack["block"].values():
                if "gate" in part:
                    part["gate"] = jax.tree.map(np.zeros_like, part["gate"])
    dense = small.velocity(small.config, small.params)
    np.testing.assert_allclose(small.velocity(config, params), dense, atol=1e-5)
    teacher, _ = align(small.config, small.params, shapes(config))
    assert shapes(teacher) == shapes(config)


def test_pruned_student_is_the_teacher_without_its_worst_neurons(small):
    """Shared by magnitude, so that the neurons are known: the others are cut out there."""
    config, params = make(small, replace(SMALL, method="prune", shared="magnitude"))
    assert {s.mlp_ratio for s in config.stacks} == {1.5}
    cut = jax.tree.map(np.array, small.params)
    for kind, names in (("double", ("img_mlp", "txt_mlp")), ("single", ("mlp",))):
        for name in names:
            ffn = cut[kind][0]["block"][name]
            size = (
                np.abs(ffn["in_layer"]["kernel"]).sum(-2)
                + np.abs(ffn["in_layer"]["bias"])
                + np.abs(ffn["out_layer"]["kernel"]).sum(-1)
            )
            ffn["out_layer"]["kernel"][size < np.sort(size)[..., [-48]]] = 0
    expected = small.velocity(small.config, cut)
    assert np.abs(expected - small.velocity(small.config, small.params)).max() > 1e-2
    np.testing.assert_allclose(small.velocity(config, params), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["moe", "prune"])
def test_a_refit_student_is_nearer_its_teacher(small, method):
    """Its biases land where the model reads them: of single blocks, with the attention's."""
    wanted, errors = small.velocity(small.config, small.params), []
    for refit in ("none", "bias", "plain"):
        cut = replace(SMALL, method=method, refit=refit, shared="sensitivity", tokens=2000)
        config, params = make(small, replace(cut, batches=20), batches=small.batches(20))
        errors.append(float(np.square(small.velocity(config, params) - wanted).mean()))
    assert errors[0] > errors[1] > errors[2], errors


def test_routed_scale_starts_where_asked(small):
    _, params = make(small, replace(SMALL, routed_scale=0.25))
    assert (params["single"][0]["block"]["mlp"]["scale"] == 0.25).all()


@pytest.mark.parametrize(
    "sparsify, changes, message",
    [
        (replace(SMALL, dense_single=(4,)), {}, r"SparsifyConfig.dense_single = \(4,\)"),
        (replace(SMALL, method="prune", mlp_ratio=4.0), {}, "SparsifyConfig.mlp_ratio = 4.0"),
        (replace(SMALL, moe=MoEConfig(experts=7)), {}, "MoEConfig.experts = 7"),
        (replace(SMALL, modulation_rank=33), {}, "modulation_rank = 33"),
        (replace(SMALL, modulation_rank=4), {"modulation_rank": 8}, "rank = 4: the teacher"),
        (replace(SMALL, moe=UNMODULATED), {}, "SparsifyConfig.gate = fitted"),
        (replace(SMALL, moe=UNMODULATED, gate="random", refit="bias"), {}, "refit = bias: cal"),
    ],
)
def test_contradictions_are_told_before_any_work(small, sparsify, changes, message):
    def batches():
        raise AssertionError("calibration began")
        yield

    teacher = ModelConfig(transformer=replace(small.config, **changes))
    with pytest.raises(ConfigError, match=message) as error:
        make_student(teacher, small.params, sparsify, batches(), small.noisy, 0)
    assert "\n" not in str(error.value)


def test_a_sparse_teacher_is_refused(small):
    config, params = make(small, SMALL)
    with pytest.raises(ConfigError, match="expected dense FFNs"):
        make_student(
            ModelConfig(transformer=config), params, SMALL, small.batches(1), small.noisy, 0
        )
