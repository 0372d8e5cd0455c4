"""The door to data: what `RunConfig.data` names, opened. Nothing above this folder, but for the
benchmark of a task, knows which data it has."""

from d2m_jax.config import IconsConfig
from d2m_jax.data.icons import Icons
from d2m_jax.data.protocol import Canvas, Data


def open_data(config: IconsConfig, image: Canvas) -> Data:
    """The data of a config, for images of this size. ConfigError where it cannot have that."""
    return Icons(config, image)
