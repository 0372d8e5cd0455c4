"""FLUX.1's autoencoder (diffusers' AutoencoderKL): images to latents of an eighth of the size and
back, channels last.

Latents are in the transformer's units everywhere: (z − shift_factor) · scaling_factor of what the
encoder gives.
"""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from d2m_jax.config import AutoencoderConfig, check
from d2m_jax.models import parameters
from d2m_jax.models.layers import Linear

QUERIES = 1024  # of the mid attention at once: its weights on 1024² pixels are 64 MiB an image


class Conv(nnx.Module):
    """A 3 × 3 convolution in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "b h w i"], stride: int = 1, padding: tuple = (1, 1)):
        """`padding` is before and after, of both sides."""
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (stride, stride),
            (padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """Norm over the image and groups of channels, eps 1e-6, in float32 with the two-pass
    variance."""

    def __init__(self, groups: int, dim: int):
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.groups = groups

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = x.astype(jnp.float32)
        y = y - self._mean(y)
        y = y * jax.lax.rsqrt(self._mean(jnp.square(y)) + 1e-6)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)

    def _mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
        # The image first: groups of few channels as an axis of the large array fill a TPU's memory
        # with padding.
        channels = x.mean((1, 2), keepdims=True)
        groups = channels.reshape(*channels.shape[:3], self.groups, -1).mean(-1)
        return groups.repeat(x.shape[-1] // self.groups, axis=-1)


class ResnetBlock2D(nnx.Module):
    """x + conv(swish(norm(·))) twice; a 1 × 1 convolution brings x to another width."""

    def __init__(self, groups: int, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(groups, inputs)
        self.conv1 = Conv(inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(groups, outputs)
        self.conv2 = Conv(outputs, outputs, rngs=rngs)
        self.conv_shortcut = None if inputs == outputs else Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """x + attention among all places of the image, with one head.

    Queries go in blocks of QUERIES, forward and backward, so that the weights of all of them (1 GiB
    an image of 1024² pixels) are never there at once; cuDNN's kernel takes no head this wide.
    """

    def __init__(self, groups: int, dim: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(groups, dim)
        self.to_q = Linear(dim, dim, rngs=rngs)
        self.to_k = Linear(dim, dim, rngs=rngs)
        self.to_v = Linear(dim, dim, rngs=rngs)
        self.to_out = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)

        @jax.checkpoint
        def attend(q: Float[Array, "b c"]):  # one place of each image, [b, c]
            logits = jnp.einsum("bc,bnc->bn", q, k, preferred_element_type=jnp.float32)
            weight = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
            return jnp.einsum("bn,bnc->bc", weight.astype(v.dtype), v)

        y = jax.lax.map(attend, q.swapaxes(0, 1), batch_size=QUERIES).swapaxes(0, 1)
        return x + self.to_out(y).reshape(x.shape)


class MidBlock(nnx.Module):
    """A resnet block, the attention, another resnet block (diffusers' UNetMidBlock2D)."""

    def __init__(self, groups: int, dim: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock2D(groups, dim, dim, rngs=rngs) for _ in range(2)])
        self.attention = Attention(groups, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnets[1](self.attention(self.resnets[0](x)))


class Level(nnx.Module):
    """Resnet blocks at one size and the step to the next size, which the last level lacks
    (diffusers' DownEncoderBlock2D and UpDecoderBlock2D)."""

    def __init__(self, groups: int, widths: list[int], *, last: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            [ResnetBlock2D(groups, *pair, rngs=rngs) for pair in pairwise(widths)]
        )
        self.resample = None if last else Conv(widths[-1], widths[-1], rngs=rngs)

    def down(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Blocks, then half the size: one row and column of zeros come after, none before."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.resample is None else self.resample(x, stride=2, padding=(0, 1))

    def up(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Blocks, then every pixel doubled and a convolution."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.resample is None else self.resample(x.repeat(2, axis=1).repeat(2, axis=2))


def levels(groups: int, widths: tuple[int, ...], blocks: int, *, rngs: nnx.Rngs) -> list[Level]:
    """The levels of an encoder or decoder, `blocks` resnet blocks each."""
    pairs = list(pairwise((widths[0], *widths)))
    return [
        Level(groups, [before] + blocks * [width], last=i == len(pairs) - 1, rngs=rngs)
        for i, (before, width) in enumerate(pairs)
    ]


class Encoder(nnx.Module):
    """Images to moments: mean and log variance side by side."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        groups, widths = config.norm_num_groups, config.block_out_channels
        self.conv_in = Conv(3, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(levels(groups, widths, config.layers_per_block, rngs=rngs))
        self.mid_block = MidBlock(groups, widths[-1], rngs=rngs)
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level.down(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents, in the encoder's units, to images."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        groups, widths = config.norm_num_groups, config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0], rngs=rngs)
        self.mid_block = MidBlock(groups, widths[0], rngs=rngs)
        self.up_blocks = nnx.List(levels(groups, widths, config.layers_per_block + 1, rngs=rngs))
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Conv(widths[-1], 3, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level.up(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Autoencoder(nnx.Module):
    """Encoder and decoder. `dtype` is that of activations; parameters keep theirs, and what comes
    out is float32.

    Latents go in and out in the transformer's units, (z − shift_factor) · scaling_factor; sides of
    images are 8 times theirs (2^(levels − 1) in general).
    """

    def __init__(
        self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(
        self, images: Float[Array, "b H W 3"], key: Array | None = None
    ) -> Float[Array, "b h w c"]:
        """Latents of images in [−1, 1]: the distribution's mean, or with a key a draw from it."""
        mean, std = self.mean_and_std(images)
        return mean if key is None else mean + std * jax.random.normal(key, mean.shape)

    def mean_and_std(
        self, images: Float[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and standard deviation of the latents of images in [−1, 1]."""
        mean, log_variance = self.moments(images)
        std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        scale = self.config.scaling_factor
        return (mean - self.config.shift_factor) * scale, std * scale

    def moments(
        self, images: Float[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance as the encoder gives them, neither shifted nor scaled: what a cache
        holds, for every reading is then a new draw."""
        moments = self.encoder(images.astype(self.dtype)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, log_variance

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Images of latents, in [−1, 1] but for overshoots, which are not clipped."""
        z = latents.astype(jnp.float32) / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(z.astype(self.dtype)).astype(jnp.float32)

    def decode_tiled(
        self, latents: Float[Array, "b h w c"], tile: int = 128
    ) -> Float[Array, "b H W 3"]:
        """`decode` in square tiles of `tile` latents a side: memory of one tile whatever the image.

        Neighbours overlap by a quarter or more and are blended linearly there, as in diffusers'
        tiled_decode; but its last tiles are cut where the image ends, ours are moved inwards, so
        that all are equal and run in one compiled loop.
        """
        check(tile >= 4, f"tile = {tile}: expected at least 4 latents a side")
        factor = self.config.stride // 2  # pixels per latent
        batch, *sides, channels = latents.shape
        (rows, row_shares), (columns, column_shares) = (tiles_of(n, tile, factor) for n in sides)
        tile_sides = [min(n, tile) for n in sides]

        def add(image: Float[Array, "b H W 3"], place: tuple):
            row, column, row_share, column_share = place
            part = jax.lax.dynamic_slice(
                latents, (0, row, column, 0), (batch, *tile_sides, channels)
            )
            part = self.decode(part) * row_share[:, None, None] * column_share[:, None]
            start = 0, row * factor, column * factor, 0
            part += jax.lax.dynamic_slice(image, start, part.shape)
            return jax.lax.dynamic_update_slice(image, part, start), None

        i, j = (index.ravel() for index in np.indices((len(rows), len(columns))))
        places = rows[i], columns[j], row_shares[i], column_shares[j]
        image = jnp.zeros((batch, *(n * factor for n in sides), 3))
        return jax.lax.scan(add, image, places)[0]


def tiles_of(
    length: int, tile: int, factor: int
) -> tuple[np.ndarray, Float[np.ndarray, "tiles pixels"]]:
    """Where the tiles of one side start, evenly, and the share of each tile in its pixels.

    Shares rise and fall linearly over a quarter of a tile and sum to 1 in every pixel; a latent is
    `factor` pixels.
    """
    overlap = tile // 4
    count = 1 + max(0, -(-(length - tile) // (tile - overlap)))
    tile = min(length, tile)
    starts = np.linspace(0, length - tile, count).round().astype(np.int32)
    pixel = np.arange(tile * factor)
    rise = np.minimum(1, pixel / (overlap * factor))
    fall = np.minimum(1, (tile * factor - pixel) / (overlap * factor))
    weight = np.ones((count, tile * factor))
    weight[1:] *= rise
    weight[:-1] *= fall
    places = starts[:, None] * factor + pixel
    total = np.bincount(places.ravel(), weight.ravel())
    return starts, (weight / total[places]).astype(np.float32)


# (config, seed) → fresh parameters; (config) → their shapes; (config, params, dtype) → the model
initialise = partial(parameters.initialise, Autoencoder)
abstract = partial(parameters.abstract, Autoencoder)
model_of = partial(parameters.model_of, Autoencoder)
