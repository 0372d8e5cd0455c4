"""Everything a run needs, as frozen dataclasses: their checks and their JSON form."""

from d2m_jax.config.data import CacheConfig, DataConfig, IconsConfig, ImagesConfig
from d2m_jax.config.errors import SHOWN, ConfigError, at_path, check, first_line, listed, suggestion
from d2m_jax.config.json_form import differences, from_json, to_json
from d2m_jax.config.models import (
    KINDS,
    AutoencoderConfig,
    CLIPConfig,
    FluxConfig,
    ModelConfig,
    MoEConfig,
    PixelsConfig,
    PromptsConfig,
    StackConfig,
    T5Config,
    WordsConfig,
)
from d2m_jax.config.paths import ROOT, teacher_path
from d2m_jax.config.runs import (
    GroupsConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
    StudentConfig,
    Timesteps,
)

__all__ = [
    "KINDS",
    "ROOT",
    "SHOWN",
    "AutoencoderConfig",
    "CLIPConfig",
    "CacheConfig",
    "ConfigError",
    "DataConfig",
    "FluxConfig",
    "GroupsConfig",
    "IconsConfig",
    "ImagesConfig",
    "LossConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PixelsConfig",
    "PromptsConfig",
    "RunConfig",
    "SparsifyConfig",
    "StackConfig",
    "StageConfig",
    "StudentConfig",
    "T5Config",
    "Timesteps",
    "WordsConfig",
    "at_path",
    "check",
    "differences",
    "first_line",
    "from_json",
    "listed",
    "suggestion",
    "teacher_path",
    "to_json",
]
