"""The autoencoder's tables against diffusers' own reading of BFL's names, and what is refused."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from d2m_jax.config import AutoencoderConfig, ConfigError
from d2m_jax.models.autoencoder import initialise
from d2m_jax.named_arrays import names
from d2m_jax.weights.keys.autoencoder_keys import (
    autoencoder_config,
    bfl_autoencoder_config,
    bfl_keys,
    diffusers_keys,
)
from d2m_jax.weights.keys.key_table import by_name, their_shapes, write
from tests.seed import generator

# Three levels of three widths and two blocks: no index can be taken for another.
CONFIG = AutoencoderConfig(block_out_channels=(32, 64, 96), layers_per_block=2, latent_channels=6)

# vae/config.json of FLUX.1
JSON = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def our_shapes(config):
    abstract = jax.eval_shape(partial(initialise, config, 0))
    return {name: a.shape for name, a in names(abstract).items()}


def shapes(config, table):
    return their_shapes(table, our_shapes(config))


def test_bfl_s_names_are_those_that_diffusers_converts():
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("torch")
    random = generator()
    params = {n: random.normal(size=s).astype(np.float32) for n, s in our_shapes(CONFIG).items()}

    def state(table):
        return {
            name: torch.from_numpy(write(by_name(table, "theirs")[name], params, shape, np.float32))
            for name, shape in shapes(CONFIG, table).items()
        }

    bfl, diffusers = state(bfl_keys(CONFIG)), state(diffusers_keys(CONFIG))
    converted = single_file.convert_ldm_vae_checkpoint(
        bfl, {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    )
    assert converted.keys() == diffusers.keys()
    for name, tensor in diffusers.items():
        assert torch.equal(converted[name], tensor), name


def test_full_size_has_the_published_tensors():
    config = AutoencoderConfig()
    bfl, diffusers = shapes(config, bfl_keys(config)), shapes(config, diffusers_keys(config))
    assert len(bfl) == len(diffusers) == 244
    assert bfl["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert bfl["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert bfl["encoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert diffusers["encoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)


@pytest.mark.parametrize("config", [CONFIG, AutoencoderConfig()])
def test_config_of_bfl_s_tensors(config):
    tensors = {n: SimpleNamespace(shape=s) for n, s in shapes(config, bfl_keys(config)).items()}
    assert bfl_autoencoder_config(tensors, "ae.safetensors") == config


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("", "quant_conv.weight", "found quant_conv.weight, expected none"),
        ("encoder.conv_out", "", "encoder.conv_out.weight is missing"),
        ("encoder.down.1", "", "encoder.down.1.block.0.conv2.weight is missing"),
        ("encoder.", "", "encoder.down.0.block.0.conv2.weight is missing"),
    ],
)
def test_bfl_s_tensors_that_are_refused(drop, add, message):
    tensors = {n: SimpleNamespace(shape=s) for n, s in shapes(CONFIG, bfl_keys(CONFIG)).items()}
    tensors = {n: t for n, t in tensors.items() if not drop or not n.startswith(drop)}
    if add:
        tensors[add] = SimpleNamespace(shape=(1, 1))
    with pytest.raises(ConfigError) as error:
        bfl_autoencoder_config(tensors, "ae.safetensors")
    assert str(error.value).startswith(f"ae.safetensors: {message}")
    assert "\n" not in str(error.value)


def test_config_of_diffusers():
    assert autoencoder_config(JSON, "vae/config.json") == AutoencoderConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_quant_conv": True}, "use_quant_conv = True, expected False"),
        ({"use_post_quant_conv": ...}, "use_post_quant_conv = True, expected False"),
        ({"shift_factor": None}, "shift_factor is missing"),
        ({"scaling_factor": ...}, "scaling_factor is missing"),
        ({"_class_name": "AutoencoderKLFlux2"}, "_class_name = 'AutoencoderKLFlux2', expected"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types = ['AttnUp"),
        ({"latents_std": [1.0]}, "latents_std = [1.0], expected None"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention = False, expected True"),
    ],
)
def test_variants_that_are_refused(change, message):
    value = {name: v for name, v in (JSON | change).items() if v is not ...}
    with pytest.raises(ConfigError) as error:
        autoencoder_config(value, "vae/config.json")
    assert str(error.value).startswith(f"vae/config.json: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": 128}, "block_out_channels: expected a list, found 128"),
        ({"block_out_channels": [128, 200]}, "(128, 200): expected multiples of"),
        ({"layers_per_block": "2"}, "layers_per_block = '2': expected a whole number"),
    ],
)
def test_values_that_are_damaged(change, message):
    with pytest.raises(ConfigError, match="vae/config.json|AutoencoderConfig") as error:
        autoencoder_config(JSON | change, "vae/config.json")
    assert message in str(error.value)
