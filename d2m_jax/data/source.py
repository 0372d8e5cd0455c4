"""The door to data: what `RunConfig.data` names, opened. Nothing above this folder, but for the
benchmark of a task, knows which data it has."""

from d2m_jax.config import DataConfig, IconsConfig, ImagesConfig, ModelConfig
from d2m_jax.data.cached import Cached
from d2m_jax.data.icons import Icons
from d2m_jax.data.protocol import Data


def open_data(config: DataConfig, model: ModelConfig) -> Data:
    """The data of a config, for what this model reads. ConfigError where it cannot have that."""
    if isinstance(config, IconsConfig):
        return Icons(config, model.image)
    if isinstance(config, ImagesConfig):
        raise TypeError("ImagesConfig: no such data")
    return Cached(config, model)
