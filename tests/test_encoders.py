"""Encoders over several devices: each has its own images and captions, not a part of them all."""

from tests import own_process

SHARED_OUT = r"""
import jax
jax.config.update("jax_num_cpu_devices", 4)
from functools import partial
import numpy as np
from d2m_jax import encoders
from d2m_jax.config import (
    AutoencoderConfig, CLIPConfig, FluxConfig, MeshConfig, ModelConfig, PromptsConfig, StackConfig,
    T5Config,
)
from d2m_jax.models import autoencoder, clip, t5
from d2m_jax.sharding import batch_sharding, make_mesh, over_all_devices

image = AutoencoderConfig(
    height=64, width=64, block_out_channels=(8, 16, 32), layers_per_block=1, norm_num_groups=4
)
text = PromptsConfig(
    T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4),
    CLIPConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    ),
    length=64,
)
body = FluxConfig(
    in_channels=64, vec_in_dim=32, context_in_dim=32, hidden_size=16, num_heads=1,
    axes_dim=(4, 6, 6), guidance_embed=False, double=(StackConfig(1),), single=(StackConfig(1),),
)
model = ModelConfig(body, text, image, encoders="somewhere")
params = {
    "autoencoder": autoencoder.initialise(image, 0),
    "t5": t5.initialise(text.t5, 1), "clip": clip.initialise(text.clip, 2),
}

def placed(model, part, place):
    return jax.tree.map(lambda a: jax.device_put(a, place("", a.shape)), params[part])

encoders.load_encoder = placed
encoders.PIXELS = 64 * 64  # an image at a time
rng = np.random.default_rng(0)
pixels = rng.integers(0, 256, (4, 64, 64, 3), np.uint8)
ids = {"t5": rng.integers(0, 40, (4, 64)), "clip": rng.integers(0, 40, (4, 12))}
latents = rng.normal(size=(4, 64, 64)).astype(np.float32)

needed = {}

def recorded(name, program):
    def run(*arguments):
        needed[name] = program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        return program(*arguments)
    return run

for name in ("encoding_captions", "encoding_images", "_moments", "decoding"):
    setattr(encoders, name, recorded(name, getattr(encoders, name)))

def all_of(devices, count):
    mesh = make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])
    mine = encoders.Encoders(model, "float32", mesh, load=False)
    put = partial(jax.tree.map, lambda a: jax.device_put(a[:count], batch_sharding(mesh)))
    found = (
        mine.text(put(ids)), mine.latents(put(pixels)), mine.moments(put(pixels)),
        mine.images(put(latents), 64, 64),
    )
    return found, dict(needed)

(alone, in_turns), (_, of_one), (together, of_four) = all_of(1, 4), all_of(1, 1), all_of(4, 4)
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
    # Float32's rounding: convolutions of one image and of four need not sum in one order.
    np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(np.asarray(a)).max())
for name, one in of_one.items():
    print(name, of_four[name] / one, in_turns[name] / one)
"""


def test_each_device_has_its_own_images_and_captions():
    """Four on four devices need what one on one device needs, and give what four on one give, of
    which images are encoded and decoded in turns.

    Parameters are stored cut over all devices. Left to itself XLA computes an autoencoder cut in
    the same way: all 64 images of a pod's batch on every chip, 65 GiB of activations."""
    done = own_process.run(SHARED_OUT, timeout=300)
    lines = [line.split() for line in done.stdout.splitlines()]
    more = {name: [float(ratio) for ratio in ratios] for name, *ratios in lines}
    programs = {"encoding_captions", "encoding_images", "_moments", "decoding"}
    assert more.keys() == programs, done.stderr[-2000:]
    # A little is for parameters that are put together, which of this autoencoder are much.
    assert all(on_four < 1.6 for on_four, _ in more.values()), more
    assert all(more[name][1] < 1.5 for name in programs - {"encoding_captions"}), more
