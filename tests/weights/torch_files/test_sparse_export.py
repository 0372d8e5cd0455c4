"""Models of every kind as torch programs: the same outputs, only the chosen work, and back."""

import importlib.util
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert_torch_weights
from d2m_jax import command_line
from d2m_jax.config import FluxConfig, ModelConfig, MoEConfig, PixelsConfig, StackConfig, to_json
from d2m_jax.models.flux import abstract, model_of
from d2m_jax.named_arrays import fingerprint, names, sizes
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import safetensors
from d2m_jax.weights.keys import key_table, sparse_keys
from d2m_jax.weights.torch_files import torch_export, torch_import
from tests.models import toy

torch = pytest.importorskip("torch")

SPARSE = toy.SPARSE
UNGUIDED = replace(SPARSE, guidance_embed=False)
MIXED = replace(
    SPARSE,
    double=(StackConfig(1, mlp_ratio=2.0), StackConfig(2, blocks=3, active=2, ffn="moe")),
    single=(StackConfig(1, blocks=4), StackConfig(1, blocks=5, active=2)),
    moe=replace(SPARSE.moe, router_input="unmodulated"),
    modulation_rank=3,
    mob_alpha=0.3,
)


def run(*arguments):
    return command_line.run(convert_torch_weights.main, [str(a) for a in arguments])


def exported(folder, config, dtype=torch.float32, **options):
    """Our parameters, and the torch model of their export, by the module file that it brings."""
    params = toy.params(config)
    torch_export.export_torch(folder, ModelConfig(config), names(params), **options)
    return params, program(folder).load(folder, dtype=dtype)


def program(folder):
    spec = importlib.util.spec_from_file_location("sparse_flux", folder / "sparse_flux.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(model, inputs, top_k=None):
    tensors = [None if a is None else torch.from_numpy(np.array(a)) for a in inputs]
    with torch.inference_mode():
        found = model(*tensors, top_k=top_k)
    assert found.dtype == torch.float32
    return found.numpy()


def ours(config, params, inputs, top_ks=(None,), dtype=jnp.float32):
    """JAX's outputs for each top_k, by one compiled program."""

    @jax.jit
    def outputs(params, inputs):
        model = model_of(config, params, dtype)
        return [model(*inputs, top_k=k) for k in top_ks]

    return [np.asarray(a) for a in outputs(params, inputs)]


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# float32 in both, sums in another order
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    "moe", [{"gate": "softmax"}, {"gate": "sigmoid"}, {}, {"trained_top_k": 1}], ids=str
)
def test_moe(moe, tmp_path):
    config = replace(UNGUIDED, moe=replace(SPARSE.moe, **moe))
    params, model = exported(tmp_path / "out", config)
    inputs, top_ks = toy.inputs(config), (None, 0, 1, 6)
    expected = ours(config, params, inputs, top_ks)
    for k, a in zip(top_ks, expected, strict=True):
        assert relative(call(model, inputs, k), a) <= TOLERANCE, k
    assert all(relative(a, expected[0]) > 0.01 for a in expected[1:])


@pytest.mark.parametrize("guidance", [True, False])
def test_dense(guidance, tmp_path):
    config = replace(toy.DENSE, guidance_embed=guidance)
    params, model = exported(tmp_path / "out", config)
    inputs = toy.inputs(config, batch=2)
    (expected,) = ours(config, params, inputs)
    assert relative(call(model, inputs), expected) <= TOLERANCE
    if guidance:
        with pytest.raises(ValueError, match="guidance embedding, found none"):
            call(model, inputs[:-1])


def test_mixed_stacks(tmp_path):
    """Pruned, MoE and MoB stacks side by side, on low-rank modulations, in shards; and bfloat16."""
    params, model = exported(tmp_path / "out", MIXED, shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    inputs = toy.inputs(MIXED, batch=6)
    # positions of its own for every sample
    inputs = inputs[0], jnp.arange(6.0)[:, None, None] + inputs[1], *inputs[2:]
    inputs = *inputs[:3], jnp.repeat(inputs[3], 6, axis=0), *inputs[4:]
    ran = {name: set() for name in ("double", "single")}
    for name, router in model.named_modules():
        if name.endswith(("routers.1", "routers.4")):
            router.register_forward_hook(
                lambda _, __, out, kind=name[:6]: ran[kind].update(
                    map(tuple, out.sort(1)[0].tolist())
                )
            )
    (expected,) = ours(MIXED, params, inputs)
    assert relative(call(model, inputs), expected) <= TOLERANCE
    assert all(len(choices) > 1 for choices in ran.values()), ran

    half = program(tmp_path / "out").load(tmp_path / "out", dtype=torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert kinds["double_blocks.1.img_mlp.experts.0.0.weight"] == torch.bfloat16
    exact = ("double_blocks.1.img_mlp.gate.weight", "single_routers.4.vec.weight")
    exact += ("time_in.in_layer.bias", "single_blocks.0.norm.key_norm.scale")
    assert {kinds[name] for name in exact} == {torch.float32}
    assert np.isfinite(call(half, inputs)).all()


def test_adjacent_blocks(tmp_path):
    config = replace(UNGUIDED, single=(StackConfig(2, blocks=4, active=2),), mob_choice="adjacent")
    params, model = exported(tmp_path / "out", config)
    ran = []
    for router in model.single_routers.values():
        router.register_forward_hook(lambda _, __, out: ran.extend(out.tolist()))
    inputs = toy.inputs(config, batch=6)
    (expected,) = ours(config, params, inputs)
    assert relative(call(model, inputs), expected) <= TOLERANCE
    assert len({tuple(run) for run in ran}) > 1 and all(b == a + 1 for a, b in ran)
    (others,) = ours(replace(config, mob_choice="any"), params, inputs)
    assert relative(others, expected) > 0.01


def test_bfloat16(tmp_path):
    """Weights that bfloat16 holds: what differs from JAX is the rounding of activations."""
    config = replace(UNGUIDED, double=(StackConfig(1),))
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), toy.params(config))
    torch_export.export_torch(tmp_path / "out", ModelConfig(config), names(params))
    model = program(tmp_path / "out").load(tmp_path / "out")
    assert model.img_in.weight.dtype == torch.bfloat16
    inputs = toy.inputs(config)
    # top_k = n: a rounding never changes what runs
    (expected,) = ours(config, params, inputs, top_ks=(6,), dtype=jnp.bfloat16)
    # (0.012, and four times that for other orders of sums)
    assert relative(call(model, inputs, 6), expected) < 0.05


def test_only_chosen_work(tmp_path):
    """Experts see the tokens that chose them, blocks the samples; no more."""
    _, model = exported(tmp_path / "out", MIXED)
    inputs = toy.inputs(MIXED, batch=5)
    expert, mixing = r"double_blocks\.[1-6]\.img_mlp\.experts\.\d+", r"double_blocks\.[1-6]"
    tokens, samples, doubles = [], [], []
    for name, module in model.named_modules():
        if re.fullmatch(expert, name):
            module.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[0]))
        if re.fullmatch(mixing, name):
            module.register_forward_hook(lambda _, args, __: doubles.append(args[0][0].shape[0]))
        if re.fullmatch(r"single_blocks\.[4-8]", name):
            module.register_forward_hook(lambda _, args, __: samples.append(args[0][0].shape[0]))
    for k in (1, 3, 0):
        for counts in (tokens, doubles, samples):
            counts.clear()
        call(model, inputs, k)
        assert sum(doubles) == 2 * 2 * 5 and sum(samples) == 2 * 5
        assert sum(tokens) == k * sum(doubles) * inputs[0].shape[1]


def test_there_and_back(tmp_path, capfd):
    """By the script: bits and config survive, and dense layouts refuse the model."""
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), toy.params(MIXED))
    config = ModelConfig(MIXED, image=PixelsConfig(12, 20), shift=2.5)
    model_directory.save(tmp_path / "model", config, params)
    for _ in range(2):  # an export may be replaced, used or not
        to = tmp_path / "torch", "--export", "torch", "--overwrite"
        assert run(tmp_path / "model", *to) == 0
        program(tmp_path / "torch").load(tmp_path / "torch")
        (tmp_path / "torch" / "__pycache__").mkdir(exist_ok=True)  # as an import leaves it
    assert json.loads((tmp_path / "torch/config.json").read_text()) == to_json(config)
    assert run(tmp_path / "torch", tmp_path / "back") == 0
    found_config, found = model_directory.load(tmp_path / "back", dtype=None)
    assert found_config == config and fingerprint(found) == fingerprint(params)
    assert torch_import.open_source(tmp_path / "torch").layout == "torch"
    capfd.readouterr()
    for layout in ("bfl", "diffusers"):
        target = tmp_path / ("bfl.safetensors" if layout == "bfl" else layout)
        assert run(tmp_path / "model", target, "--export", layout) == 2
        error = capfd.readouterr().err
        assert (
            error.count("\n") == 1
            and "found a sparse model; to export it use --export torch" in error
        )
        assert not target.exists()
    (tmp_path / "torch" / "mine.txt").write_text("mine")
    assert run(tmp_path / "model", *to) == 2
    assert "exists and is no folder of --export torch" in capfd.readouterr().err


def test_damaged_export_is_refused(tmp_path):
    exported(tmp_path / "out", SPARSE)
    file = tmp_path / "out" / "model.safetensors"
    tensors = dict(safetensors.read(file))
    tensors["single_blocks.0.mlp.experts.9.0.bias"] = tensors.pop(
        "single_blocks.0.mlp.experts.2.0.bias"
    )
    safetensors.write(file, tensors)
    with pytest.raises(ValueError, match=r"1 missing: .*experts.2.0.bias; 1 unknown: .*experts.9"):
        torch_import.load_model(tmp_path / "out")
    with pytest.raises(RuntimeError, match="experts.2.0.bias"):
        program(tmp_path / "out").load(tmp_path / "out")


def test_keys_are_documented(tmp_path):
    exported(tmp_path / "out", MIXED)
    text = (tmp_path / "out" / "KEYS.md").read_text()
    assert "- double: 2 times 2 of 3 blocks run; moe FFN" in text
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    rows = [row for row in rows if len(row) == 5][2:]
    tensors = safetensors.read(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        fits = []
        for pattern, blocks, shape, dtype, meaning in rows:
            number = r"(?P<block>\d+)"
            known = re.escape(pattern).replace(r"\{img,txt\}", "(img|txt)")
            known = known.replace(r"\{block\}", number).replace(r"\{first\ block\}", number)
            found = re.fullmatch(known.replace(r"\{expert\}", r"\d+"), name)
            spans = [tuple(map(int, span.split("-"))) for span in filter(None, blocks.split(", "))]
            numbers = {n for a, *b in spans for n in range(a, (b or [a])[0] + 1)}
            if found and (not numbers or int(found["block"]) in numbers):
                fits.append(meaning)
                sizes = [] if shape == "one number" else [int(n) for n in shape.split(" × ")]
                assert sizes == list(tensor.shape) and dtype == "float32", name
        assert len(fits) == 1 and fits[0], (name, fits)
    assert len(rows) < len(tensors) / 5


def test_full_size():
    """Names and shapes of a sparse FLUX.1 [dev] are those that the module has."""
    config = FluxConfig(
        double=(StackConfig(1, ffn="moe"), StackConfig(9, blocks=2, ffn="moe", active=1)),
        single=(StackConfig(2, ffn="moe"), StackConfig(12, blocks=3, ffn="moe", active=1)),
        moe=MoEConfig(router_input="unmodulated"),
        modulation_rank=256,
    )
    text = json.dumps(to_json(config))
    module = program(torch_export.MODULE.parent)
    with torch.device("meta"):
        model = module.Flux(json.loads(text, object_hook=lambda d: SimpleNamespace(**d)))
    shapes = sizes(abstract(config))
    expected = key_table.their_shapes(sparse_keys.keys(config), shapes)
    assert {name: tuple(a.shape) for name, a in model.state_dict().items()} == expected
    total = sum(np.prod(shape, dtype=np.int64) for shape in shapes.values())
    assert sum(a.numel() for a in model.parameters()) == total
