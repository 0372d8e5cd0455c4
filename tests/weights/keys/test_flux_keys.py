"""The two layouts of FLUX.1: against diffusers, at full size, and what else is in the wild."""

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from d2m_jax.config import ConfigError, FluxConfig, MoEConfig, StackConfig
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import sizes
from d2m_jax.weights.keys import flux_keys, key_table, recognise
from tests.weights import toy


class Shape:
    """A tensor of which nothing but the shape is known."""

    dtype = np.dtype(ml_dtypes.bfloat16)

    def __init__(self, shape):
        self.shape = shape


def shapes(config):
    return sizes(abstract(config))


def tensors_of(layout, config):
    theirs = key_table.their_shapes(flux_keys.keys(layout, config), shapes(config))
    return {name: Shape(shape) for name, shape in theirs.items()}


DEV = FluxConfig()
MODELS = {
    "dev": DEV,
    "schnell": replace(DEV, guidance_embed=False),
    "lite": replace(DEV, double=(StackConfig(8),)),
    "mini": replace(DEV, double=(StackConfig(5),), single=(StackConfig(10),)),
    "pruned": replace(DEV, single=(StackConfig(38, mlp_ratio=1.5),)),
}


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("model", MODELS)
def test_full_size(layout, model):
    config = MODELS[model]
    tensors = tensors_of(layout, config)
    if model == "dev":
        assert len(tensors) == {"bfl": 780, "diffusers": 1160}[layout]
        assert sum(np.prod(t.shape) for t in tensors.values()) == 11_901_408_320
    assert flux_keys.config_of("file", layout, tensors) == config
    key_table.check_fit("file", flux_keys.keys(layout, config), tensors, shapes(config))


def test_diffusers_agrees_on_bfl():
    """BFL's names through diffusers' own translation are what we call diffusers' names."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    config = toy.config()
    bfl = toy.random_state("bfl", config)
    table = flux_keys.keys("bfl", config)
    params = key_table.parameters(table, bfl, shapes(config), np.float32)
    theirs = toy.to_diffusers({n: torch.from_numpy(a) for n, a in bfl.items()})
    table = key_table.by_name(flux_keys.keys("diffusers", config), "theirs")
    assert theirs.keys() == table.keys()
    for name, tensor in theirs.items():
        mine = key_table.write(table[name], params, tensor.shape, np.float32)
        np.testing.assert_array_equal(mine, tensor.numpy(), name)


def test_sparse_models_are_refused():
    config = toy.config()
    for sparse in (
        replace(config, double=(StackConfig(1, ffn="moe"),), moe=MoEConfig(experts=4)),
        replace(config, single=(StackConfig(1, blocks=2),)),
        replace(config, modulation_rank=4),
    ):
        with pytest.raises(ConfigError, match="a sparse model"):
            flux_keys.keys("bfl", sparse)


def test_regrouped_blocks_keep_their_numbers():
    config = replace(toy.config(), double=(), single=(StackConfig(1), StackConfig(2, 2, 2)))
    last = [e for e in flux_keys.keys("bfl", config) if e.theirs.startswith("single_blocks.4.")]
    assert {e.index for e in last} == {(1, 1)} and {e.ours[:9] for e in last} == {"single.1."}


def test_other_heads():
    for head, axes in ((128, (16, 56, 56)), (64, (8, 28, 28)), (16, (4, 6, 6)), (8, (4, 2, 2))):
        config = replace(toy.config(), hidden_size=2 * head, axes_dim=axes)
        assert flux_keys.config_of("file", "bfl", tensors_of("bfl", config)) == config


def test_variants_are_refused():
    for channels, name in ((384, "FLUX.1 Fill"), (128, "FLUX.1 Depth or Canny"), (70, "a FLUX.1")):
        tensors = tensors_of("bfl", DEV) | {"img_in.weight": Shape((3072, channels))}
        with pytest.raises(ConfigError, match=f"file: {name}.*reads {channels} channels"):
            flux_keys.config_of("file", "bfl", tensors)


def test_block_numbers_that_cannot_be():
    tensors = tensors_of("bfl", toy.config())
    tensors["double_blocks.99999999.img_mod.lin.bias"] = Shape((3,))
    with pytest.raises(ConfigError, match="holds double_blocks.99999999 and only 3"):
        flux_keys.config_of("file", "bfl", tensors)


def test_misfits_are_all_listed():
    config = toy.config()
    tensors = tensors_of("bfl", config)
    tensors["txt_in.bais"] = tensors.pop("txt_in.bias")
    del tensors["double_blocks.0.img_mlp.2.weight"]
    tensors["double_blocks.1.txt_mod.lin.weight"] = Shape((192, 31))
    tensors["extra"] = Shape((1,))
    with pytest.raises(ConfigError) as error:
        key_table.check_fit("file", flux_keys.keys("bfl", config), tensors, shapes(config))
    assert str(error.value) == (
        "file: tensors do not fit this model; 2 missing: txt_in.bias;"
        " double_blocks.0.img_mlp.2.weight; 1 misshapen: double_blocks.1.txt_mod.lin.weight is"
        " [192, 31], expected [192, 32]; 2 unknown: txt_in.bais, did you mean txt_in.bias?; extra"
    )


def test_missing_before_the_config_is_known():
    tensors = tensors_of("diffusers", toy.config())
    for name in ("x_embedder.weight", "transformer_blocks.0.attn.norm_q.weight"):
        del tensors[name]
    with pytest.raises(ConfigError, match=r"2 tensors missing or misshapen: x_emb.*norm_q.weight"):
        flux_keys.config_of("file", "diffusers", tensors)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefixes_and_all_in_one(prefix, capfd):
    tensors = tensors_of("bfl", toy.config())
    wild = {prefix + n.replace("_norm.scale", "_norm.weight"): t for n, t in tensors.items()}
    if prefix:
        wild |= {
            "vae.decoder.conv_in.weight": Shape((1,)),
            "text_encoders.t5xxl.transformer.shared.weight": Shape((2,)),
            "text_encoders.clip_l.transformer.text_model.embeddings": Shape((3,)),
        }
    layout, found = recognise.transformer("file", wild)
    assert layout == "bfl" and found == tensors
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize(
    "start",
    [
        "module.",
        "_orig_mod.",
        "net.",
        "ema_model.",
        "model.",
        "transformer.",
        "state_dict.",
        "unet.",
        "module.model._orig_mod.",
        "state_dict.model.diffusion_model.",
        "what.ever.",
        "0.",
        "module.0.",
    ],
)
def test_starts_of_wrappers(layout, start, capfd):
    tensors = tensors_of(layout, toy.config())
    marks = {f"{start}__index_timestep_zero__": Shape(())}
    wild = {start + name: tensor for name, tensor in tensors.items()} | marks
    wild |= {"optimizer.state.0.step": Shape(()), "vae.decoder.norm_out.weight": Shape((4,))}
    expected = tensors | {"__index_timestep_zero__": wild[f"{start}__index_timestep_zero__"]}
    outside = start.replace("module.", "").replace("_orig_mod.", "")
    if not outside:
        expected["optimizer.state.0.step"] = wild["optimizer.state.0.step"]
    assert recognise.transformer("file", wild) == (layout, expected)
    said = capfd.readouterr().err.splitlines()
    assert said[0] == f"file: read without what a tool put into its names: {start}"
    beside = f"file: ignored 1 tensors beside {outside}…: optimizer.state.0.step"
    assert said[1:] == ([beside] if outside else [])


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_wrappers_inside_names(layout, capfd):
    tensors = tensors_of(layout, toy.config())
    wild = {}
    for name, tensor in tensors.items():
        name = re.sub(
            r"(_blocks\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name
        )
        wild["model._fsdp_wrapped_module." + name] = tensor
    assert recognise.transformer("file", wild) == (layout, tensors)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.endswith(
        " model._fsdp_wrapped_module.; _fsdp_wrapped_module.; _checkpoint_wrapped_module.\n"
    )


def test_two_models_in_one_file():
    tensors = tensors_of("bfl", toy.config())
    for one, other in (("model.", "ema."), ("", "ema_model."), ("net.", "model.diffusion_model.")):
        both = {start + name: t for start in (one, other) for name, t in tensors.items()}
        message = f"file: holds more than one .*{one}img_in.weight and {other}img_in.weight"
        with pytest.raises(ConfigError, match=message):
            recognise.transformer("file", both)
    some = {("" if "blocks" in name else "model.") + name: t for name, t in tensors.items()}
    with pytest.raises(ConfigError, match="parts of one under several names .model.img_in.weight"):
        recognise.transformer("file", some)
    twice = tensors | {f"_orig_mod.{name}": t for name, t in tensors.items()}
    message = "img_in.weight twice, as img_in.weight and as _orig_mod.img_in.weight"
    with pytest.raises(ConfigError, match=message):
        recognise.transformer("file", twice)


@pytest.mark.parametrize(
    ("name", "start", "rest"),
    [
        ("img_in.weight", "", "img_in.weight"),
        ("a.b._orig_mod.img_in.weight", "a.b._orig_mod.", "img_in.weight"),
        ("x.single_transformer_blocks.0.proj_out.bias", "x.", None),
        ("model.double_blocks.3._orig_mod.img_attn.qkv", "model.", "double_blocks.3.img_attn.qkv"),
        # of U-Nets and autoencoders: no transformer's name
        ("input_blocks.4.1.transformer_blocks.0.attn1", "", None),
        ("decoder.up.0.block.1.conv1.weight", "", None),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "", None),
    ],
)
def test_unwrapped(name, start, rest):
    assert recognise.unwrapped(name) == (start, rest or name.removeprefix(start))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_stream_modulation_img.lin.weight", "double_blocks.0.img_mlp.0.weight"], "FLUX.2"),
        (["double_stream_modulation_img.linear.weight", "transformer_blocks.0.x"], "FLUX.2"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["pos_embed.proj.weight", "transformer_blocks.0.attn.to_q.weight"], "Stable Diffusion 3"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA .* --lora"),
        (["lora_unet_double_blocks_0_img_mlp_0.alpha"], "a LoRA .* --lora"),
        (["diffusion_model.double_blocks.0.img_mlp.0.lora_down.weight"], "a LoRA .* --lora"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a U-Net"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.a"], "a ControlNet"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
        (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "a CLIP text encoder"),
        (["decoder.conv_in.weight"], "an autoencoder"),
        (["distilled_guidance_layer.norms.0.scale", "double_blocks.0.a"], "Chroma"),
        (["transformer_blocks.0.attn.to_q.qweight"], "quantised by GPTQ"),
        (["a", "b"], "found a, b"),
        ([], "found no tensors"),
    ],
)
def test_other_models_are_refused_by_name(names, message):
    with pytest.raises(ConfigError, match=f"file: .*{message}"):
        recognise.transformer("file", {name: Shape((1,)) for name in names})
