"""LoRAs of the dense model in a student cut from it, and that student put back together: against
the dense model with the LoRA, cut by hand in the same order."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import convert_torch_weights
from d2m_jax import command_line
from d2m_jax.config import (
    ConfigError,
    GroupsConfig,
    ModelConfig,
    MoEConfig,
    SparsifyConfig,
    StackConfig,
)
from d2m_jax.models.cut import MODULATION, check_cut, composed
from d2m_jax.named_arrays import names
from d2m_jax.sparsification import make_student, regroup
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import safetensors
from tests.sparsification.conftest import CONFIG, batches, noisy
from tests.weights.lora.test_lora import pair, random

MOE = MoEConfig(experts=6)
CUT = SparsifyConfig(
    moe=MOE, shared="magnitude", deal="random", gate="random", batches=1, batch_size=8, tokens=32
)
CUTS = {
    "experts": replace(CUT, dense_single=(1,)),
    "rank": replace(CUT, modulation_rank=5),
    "refit": replace(CUT, refit="plain"),
    "pruned": replace(CUT, method="prune", modulation_rank=5),
}
SHALLOW = replace(CUT, method="none", depth_single=3, depth_choice="even")


def run(*arguments):
    return command_line.run(convert_torch_weights.main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The dense model as arrays and as a directory, and students of it by the name of their cut."""
    from d2m_jax.models.flux import initialise

    folder = tmp_path_factory.mktemp("dense")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.standard_normal(a.shape).astype(np.float32),
        initialise(CONFIG, 0),
    )
    teacher, cuts = ModelConfig(transformer=CONFIG), CUTS | {"shallow": SHALLOW}
    model_directory.save(folder / "teacher", teacher, params)

    @cache
    def student(name, groups):
        config, made, cut = make_student(teacher, params, cuts[name], batches(1), noisy, 0)
        if groups is not None:
            transformer, made = regroup(config.transformer, made, groups, 0)
            config = replace(config, transformer=transformer)
        there = folder / f"{name}{'' if groups is None else ' in groups'}"
        model_directory.save(there, config, made, cut=cut)
        return SimpleNamespace(path=there, config=config.transformer, params=made, cut=cut)

    def of(name, groups=None):
        return student(name, groups)

    return SimpleNamespace(path=folder / "teacher", params=params, student=of)


LORAS = {
    "bfl": {
        "double_blocks.1.img_mlp.0": (128, 32),
        "double_blocks.0.img_mlp.2": (32, 128),
        "double_blocks.0.txt_attn.qkv": (96, 32),
        "single_blocks.1.linear1": (224, 32),
        "single_blocks.2.linear1": (224, 32),
        "single_blocks.3.linear2": (32, 160),
        "single_blocks.3.modulation.lin": (96, 32),
        "double_blocks.1.txt_mod.lin": (192, 32),
        "final_layer.linear": (48, 32),
    },
    "diffusers": {
        "transformer_blocks.1.ff.net.0.proj": (128, 32),
        "transformer_blocks.1.ff_context.net.2": (32, 128),
        "single_transformer_blocks.0.proj_mlp": (128, 32),
        "single_transformer_blocks.3.proj_out": (32, 160),
        "single_transformer_blocks.2.norm.linear": (96, 32),
        "transformer_blocks.0.norm1.linear": (192, 32),
        "time_text_embed.timestep_embedder.linear_1": (32, 256),
    },
}


def written(file, layout, dora=()):
    """A LoRA with a difference of every weight and every bias."""
    tensors = {}
    for i, (name, (outputs, inputs)) in enumerate(LORAS[layout].items()):
        tensors |= pair(name, outputs, inputs, seed=i)[0]
        tensors[f"{name}.diff_b"] = random(outputs, seed=i)
        if name in dora:
            tensors[f"{name}.dora_scale"] = 1 + random(outputs, 1) ** 2
    safetensors.write(file, tensors)
    return file


def by_hand(found, config, cut):
    """What the arrays of a dense model are in a student's blocks: (name, block) → array."""
    arrays, found = {}, names(found)
    for kind, ffns in (("double", ("img_mlp", "txt_mlp")), ("single", ("mlp",))):
        stacks = getattr(config, kind)
        stack_of = [stack for stack in stacks for _ in range(stack.depth)]
        for b, stack in enumerate(stack_of):
            start = f"{kind}.0.block."
            block: dict = {n.removeprefix(start): a[b, 0] for n, a in found.items() if start in n}
            for name in ffns:
                order = cut.get(f"{kind}.{b}.{name}")
                if order is None:
                    continue
                into, bias, out = (
                    block.pop(f"{name}.{n}")
                    for n in ("in_layer.kernel", "in_layer.bias", "out_layer.kernel")
                )
                if stack.ffn == "dense":
                    kept, layer = order[: config.ffn_width(stack)], name
                else:
                    kept, layer = order[: config.shared_width(stack)], f"{name}.shared"
                    for i, e in enumerate(np.split(order[len(kept) :], config.moe.experts)):
                        start = f"{name}.experts"
                        block[f"{start}.in_kernel", i] = into[:, e]
                        block[f"{start}.in_bias", i] = bias[e]
                        block[f"{start}.out_kernel", i] = out[e]
                    if f"{name}.out_layer.bias" in block:
                        block[f"{layer}.out_layer.bias"] = block.pop(f"{name}.out_layer.bias")
                block[f"{layer}.in_layer.kernel"] = into[:, kept]
                block[f"{layer}.in_layer.bias"] = bias[kept]
                block[f"{layer}.out_layer.kernel"] = out[kept]
            if MODULATION in cut:
                for lin in [n.removesuffix(".kernel") for n in block if "lin.kernel" in n]:
                    kernel, through = block[f"{lin}.kernel"], cut[MODULATION]
                    block[f"{lin}.kernel"] = through[:-1] @ kernel
                    block[f"{lin}.bias"] = block[f"{lin}.bias"] + through[-1] @ kernel
            arrays |= {(kind, b, name): a for name, a in block.items()}
    rest = {n: a for n, a in found.items() if ".block." not in n}
    return arrays | {("", 0, name): a for name, a in rest.items()}


def in_blocks(params, config):
    """A student's arrays as by_hand gives them."""
    arrays = {}
    for path, a in names(params).items():
        if ".block." not in path:
            arrays["", 0, path] = a
            continue
        kind, number, _, name = path.split(".", 3)
        stacks = getattr(config, kind)
        first = sum(stack.depth for stack in stacks[: int(number)])
        for b, one in enumerate(np.asarray(a).reshape(-1, *a.shape[2:])):
            if ".experts." in name:
                arrays |= {(kind, first + b, (name, i)): e for i, e in enumerate(one)}
            else:
                arrays[kind, first + b, name] = one
    return arrays


@pytest.mark.parametrize("layout", LORAS)
@pytest.mark.parametrize("name", [*CUTS, "experts in groups"])
def test_a_lora_is_merged_as_if_before_the_cut(dense, tmp_path, name, layout):
    """All neurons, all modulations; after a refit it adds the same difference."""
    groups = GroupsConfig(keep_single=2, double_blocks=2) if "groups" in name else None
    student = dense.student(name.removesuffix(" in groups"), groups)
    pruned = name == "pruned"
    dora = () if pruned else ("double_blocks.0.img_mlp.2", "transformer_blocks.1.ff_context.net.2")
    file = written(tmp_path / "lora.safetensors", layout, () if name == "refit" else dora)
    for source in (dense.path, student.path):
        assert not run(source, tmp_path / source.name, "--lora", f"{file}:0.5")
    _, before = model_directory.load(student.path)
    config, after = model_directory.load(tmp_path / student.path.name)
    _, merged = model_directory.load(tmp_path / "teacher")
    old, new = (
        by_hand(dense.params, student.config, student.cut),
        by_hand(merged, student.config, student.cut),
    )
    before, after = (in_blocks(tree, config.transformer) for tree in (before, after))
    assert after.keys() >= new.keys()
    changed = 0
    for key, array in after.items():
        # gates, scales, routers and the basis are not the dense model's
        added = new[key] - old[key] if key in new else 0
        np.testing.assert_allclose(
            array - before[key], added, rtol=1e-5, atol=2e-5, err_msg=str(key)
        )
        changed += bool(np.abs(added).max() > 0.01)
    assert changed > 12
    written_cut = model_directory.load_cut(tmp_path / student.path.name, config.transformer)
    assert written_cut.keys() == student.cut.keys()  # a second LoRA can follow


@pytest.mark.parametrize("name", CUTS)
def test_put_back_together(dense, tmp_path, name):
    """Without training and without a fit the dense model to the bit; modulations of low rank as
    the student computes them."""
    student = dense.student(name)
    assert not run(student.path, tmp_path / "dense", "--dense")
    config, params = model_directory.load(tmp_path / "dense")
    assert {(s.ffn, s.mixes) for s in config.transformer.stacks} == {("dense", False)}
    assert config.transformer.modulation_rank is None
    found = in_blocks(params, config.transformer)
    expected = in_blocks(dense.params, CONFIG)
    basis = names(student.params).get("modulation_basis.kernel")
    mine = in_blocks(student.params, student.config)
    assert found.keys() == expected.keys()
    for key, array in found.items():
        if basis is not None and ".lin." in key[2]:
            factor = mine[key]
            wanted = basis @ factor if "kernel" in key[2] else factor
            np.testing.assert_allclose(array, wanted, atol=1e-5, err_msg=str(key))
        elif name == "pruned" and "mlp." in key[2]:
            np.testing.assert_array_equal(array, mine[key], str(key))
        elif name != "refit" or "out" not in key[2]:
            np.testing.assert_array_equal(array, expected[key], str(key))
    if name == "experts":
        assert not run(student.path, tmp_path / "a.safetensors", "--dense", "--export", "bfl")
        assert not run(tmp_path / "a.safetensors", tmp_path / "again")
        again = in_blocks(model_directory.load(tmp_path / "again")[1], CONFIG)
        for key, array in again.items():
            np.testing.assert_array_equal(array, expected[key], str(key))


def test_experts_of_a_pruned_teacher_are_put_back_among_what_it_had(dense, tmp_path):
    """64 of 128 neurons: 32 are shared, 8 in each of four experts."""
    prune = replace(CUT, method="prune", mlp_ratio=2.0)
    pruned, params, first = make_student(
        ModelConfig(transformer=CONFIG), dense.params, prune, batches(1), noisy, 0
    )
    moe = replace(CUT, moe=MoEConfig(experts=4))
    config, made, then = make_student(pruned, params, moe, batches(1), noisy, 0)
    cut = composed(first, then, config.transformer)
    model_directory.save(tmp_path / "student", config, made, cut=cut)
    kept = model_directory.load_cut(tmp_path / "student", config.transformer)
    assert not run(tmp_path / "student", tmp_path / "dense", "--dense")
    whole, found = model_directory.load(tmp_path / "dense")
    assert [s.mlp_ratio for s in whole.transformer.stacks] == [2.0, 2.0]
    found, before = (names(tree) for tree in (found, dense.params))
    for name in ("double.0.block.img_mlp", "double.0.block.txt_mlp", "single.0.block.mlp"):
        for block in range(2):
            start = name.split(".")
            order = kept[f"{start[0]}.{block}.{start[-1]}"]
            assert order.size == 128
            into = before[f"{name}.in_layer.kernel"][block, 0][:, np.sort(order[:64])]
            np.testing.assert_array_equal(found[f"{name}.in_layer.kernel"][block, 0], into)


def test_torch_exports_carry_the_cut(dense, tmp_path):
    student = dense.student("experts")
    assert not run(student.path, tmp_path / "torch", "--export", "torch")
    assert not run(tmp_path / "torch", tmp_path / "back")
    cut = model_directory.load_cut(tmp_path / "back", student.config)
    assert cut.keys() == student.cut.keys()
    assert all((cut[name] == student.cut[name]).all() for name in cut)
    assert not run(tmp_path / "torch", tmp_path / "back", "--overwrite")


def test_what_cannot_be_merged(dense, tmp_path, capfd):
    student = dense.student("pruned")
    file = written(tmp_path / "a.safetensors", "bfl", ("double_blocks.0.img_mlp.2",))
    assert run(student.path, tmp_path / "new", "--lora", file)
    assert "DoRA or whole tensors of double_blocks.0.img_mlp.2.weight" in capfd.readouterr().err
    student = dense.student("shallow")
    assert run(student.path, tmp_path / "new", "--lora", file)
    assert "fewer blocks than a LoRA counts" in capfd.readouterr().err
    # of an older directory nobody knows the order
    student = dense.student("experts")
    model_directory.save(tmp_path / "old", ModelConfig(student.config), student.params)
    assert run(tmp_path / "old", tmp_path / "new", "--lora", file)
    assert "does not say where its neurons went" in capfd.readouterr().err
    assert run(tmp_path / "old", tmp_path / "new", "--dense")
    assert "FFNs whose neurons' order was not kept" in capfd.readouterr().err


def test_a_cut_is_checked(dense):
    student = dense.student("rank")
    check_cut("x", student.config, student.cut)
    order = student.cut["double.0.img_mlp"]
    for name, array, message in (
        ("double.0.img_mlp", np.zeros_like(order), "double.0.img_mlp is no order of the neurons"),
        ("double.0.img_mlp", order[:-1], "is no order"),
        ("double.7.img_mlp", order, "x: double.7.img_mlp, expected names"),
        (MODULATION, student.cut[MODULATION][:-1], r"is \[5, 32\], expected \[6, 32\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_cut("x", student.config, student.cut | {name: array})


def test_a_teacher_that_was_cut_itself():
    """Places are those in the dense model: 5 of whose 8 neurons the teacher has."""
    first = {
        "single.0.mlp": np.array([7, 1, 4, 0, 2, 3, 5, 6], np.int32),
        MODULATION: np.zeros((6, 32), np.float32),
    }
    found = composed(first, {"single.0.mlp": np.array([2, 0, 4, 3, 1], np.int32)}, CONFIG)
    assert found["single.0.mlp"].tolist() == [4, 7, 2, 0, 1, 3, 5, 6]
    assert found[MODULATION] is first[MODULATION]


def test_a_teacher_that_lost_blocks_itself():
    """It has blocks 1, 2, 4 and 5 of six, its student the first and the last two of these."""
    orders = {f"single.{i}.mlp": np.roll(np.arange(8, dtype=np.int32), i) for i in range(4)}
    first = orders | {"single.blocks": np.array([1, 2, 4, 5, 0, 3], np.int32)}
    then = {
        "single.blocks": np.array([0, 2, 3, 1], np.int32),
        "single.1.mlp": np.array([1, 0, 2, 3, 4, 5, 6, 7], np.int32),
    }
    config = replace(CONFIG, single=(StackConfig(3),))
    found = composed(first, then, config)
    assert found["single.blocks"].tolist() == [1, 4, 5, 2, 0, 3]
    assert found["single.0.mlp"] is first["single.0.mlp"]
    assert found["single.1.mlp"].tolist() == [7, 6, 0, 1, 2, 3, 4, 5]
    assert found["single.2.mlp"] is first["single.3.mlp"] and "single.3.mlp" not in found
    check_cut("x", config, {"single.blocks": found["single.blocks"]})
    with pytest.raises(ConfigError, match="x: single.blocks is no order of blocks of which"):
        check_cut("x", config, {"single.blocks": np.array([0, 1], np.int32)})
