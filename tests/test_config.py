"""Configs to JSON and back, where a field may be one of several kinds."""

from dataclasses import replace

import pytest

from d2m_jax.config import (
    AutoencoderConfig,
    ConfigError,
    ModelConfig,
    PromptsConfig,
    WordsConfig,
    from_json,
    to_json,
)

FLUX = ModelConfig(text=PromptsConfig(), image=AutoencoderConfig(), shift=None)


@pytest.mark.parametrize("config", [ModelConfig(), FLUX, replace(FLUX, text=WordsConfig())])
def test_kinds_survive_json(config):
    assert from_json(ModelConfig, to_json(config)) == config


def test_json_without_a_kind_is_of_the_first():
    value = to_json(ModelConfig(text=WordsConfig(dim=3)))
    del value["text"]["kind"]
    assert from_json(ModelConfig, value).text == WordsConfig(dim=3)


def test_bad_kinds_are_told():
    value = to_json(ModelConfig())
    with pytest.raises(ConfigError, match=r"text.kind = 'poem': expected one of 'words', 'prompts"):
        from_json(ModelConfig, value | {"text": {"kind": "poem"}})
    with pytest.raises(ConfigError, match=r"ModelConfig.image: expected an object, found 3"):
        from_json(ModelConfig, value | {"image": 3})


def test_a_missing_field_is_told():
    value = to_json(ModelConfig())
    del value["transformer"]["single"][0]["groups"]
    with pytest.raises(ConfigError, match=r"^ModelConfig.transformer.single\[0\].groups: missing$"):
        from_json(ModelConfig, value)
    del value["transformer"]["single"][0]["blocks"]  # has a default
    value["transformer"]["single"][0]["groups"] = 2
    assert from_json(ModelConfig, value).transformer.single[0].blocks == 1


def test_grid_of_an_image():
    assert FLUX.grid() == (64, 64) and FLUX.grid(768, 1360) == (48, 85)
    assert ModelConfig().grid(8, 12) == (2, 3)
    with pytest.raises(ConfigError, match="image size 1000 × 1024: expected multiples of 16"):
        FLUX.grid(1000, 1024)
