"""The door to data: what `RunConfig.data` names, opened. Nothing above this folder, but for the
benchmark of a task, knows which data it has."""

import math
from dataclasses import replace
from pathlib import Path

from d2m_jax.config import (
    CacheConfig,
    DataConfig,
    IconsConfig,
    ImagesConfig,
    ModelConfig,
    WordsConfig,
)
from d2m_jax.data.buckets import Size, bucket_sizes
from d2m_jax.data.cached import Cached, is_there, stored
from d2m_jax.data.icons import Icons
from d2m_jax.data.images import Images
from d2m_jax.data.protocol import Data


def open_data(config: DataConfig, model: ModelConfig) -> Data:
    """The data of a config, for what this model reads. ConfigError where it cannot have that."""
    if isinstance(config, IconsConfig):
        return Icons(config, model.image)
    if isinstance(config, ImagesConfig):
        return Images(config, model.image)
    return Cached(config, model)


def with_vocabulary(config: DataConfig, model: ModelConfig) -> ModelConfig:
    """The model, which knows the words of these data where it reads words and has none yet."""
    if not isinstance(model.text, WordsConfig) or model.text.vocabulary:
        return model
    vocabulary = open_data(config, model).vocabulary()
    return replace(model, text=replace(model.text, vocabulary=vocabulary))


def largest_size(config: DataConfig, model: ModelConfig) -> Size:
    """Height and width of the images that take the most memory, whether or not the data are there
    yet: a cache that is not is taken to hold images of the model's own size."""
    if isinstance(config, ImagesConfig):
        stride = model.image.stride
        sizes = bucket_sizes(max(config.resolutions), config.aspect_ratio, stride)
    elif isinstance(config, CacheConfig) and is_there(Path(config.path)):
        sizes = tuple(size for size, _ in stored(config, model).runs)
    else:
        return model.image.height, model.image.width
    return max(sizes, key=math.prod)
