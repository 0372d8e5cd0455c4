"""Configs: what they refuse, and to JSON and back."""

import math
from dataclasses import replace

import pytest

from d2m_jax.config import (
    ROOT,
    AutoencoderConfig,
    ConfigError,
    FluxConfig,
    IconsConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    RunConfig,
    SparsifyConfig,
    StackConfig,
    StageConfig,
    StudentConfig,
    WordsConfig,
    first_line,
    from_json,
    teacher_path,
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


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        (StageConfig, "steps", (0, -1)),
        (StageConfig, "batch_size", (0, -4)),
        (StageConfig, "log_every", (-1,)),
        (StageConfig, "checkpoint_every", (-1,)),
        (StageConfig, "top_k", (-1,)),
        (OptimizerConfig, "learning_rate", (-1e-3, math.nan, math.inf)),
        (OptimizerConfig, "accumulate", (0,)),
        (OptimizerConfig, "b2", (1.0, -0.1, math.nan)),
        (OptimizerConfig, "ema", (1.0, 2.0)),
        (LossConfig, "balance", (-1.0, math.nan)),
        (SparsifyConfig, "batches", (0,)),
        (SparsifyConfig, "mlp_ratio", (-1.0, math.nan)),
        (IconsConfig, "workers", (-1,)),
    ],
)
def test_numbers_that_can_only_fail_later(kind, field, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{kind.__name__}.{field} = {value}: expected"):
            kind(**{field: value})


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (StageConfig, {"train": "*.mlp.*"}, "train = '.*mlp.*': expected a tuple or list of st"),
        (StageConfig, {"train": ("*", 3)}, r"train.1. = 3: expected a string"),
        (StageConfig, {"steps": True}, "steps = True: expected a whole number"),
        (StageConfig, {"dtype": "bf16"}, "dtype = 'bf16': expected one of 'float32', 'bfloat16'"),
        (StageConfig, {"top_k": "2"}, "top_k = '2': expected a whole number or None"),
        (OptimizerConfig, {"rates": {"*": "4"}}, r"rates\['\*'\] = '4': expected a number"),
        (
            StudentConfig,
            {"stages": [StageConfig()]},
            "stages = .*: expected a dict of names",
        ),
        (ModelConfig, {"text": "x"}, "text = 'x': expected a WordsConfig or a PromptsConfig"),
    ],
)
def test_fields_of_another_type(kind, fields, message):
    with pytest.raises(ConfigError, match=f"^{kind.__name__}.{message}"):
        kind(**fields)


def test_lists_are_taken_as_tuples_and_whole_numbers_as_numbers():
    assert StageConfig(train=["a", "b"]) == StageConfig(train=("a", "b"))
    hash(SparsifyConfig(dense_double=[0, 2]))
    assert isinstance(OptimizerConfig(learning_rate=1).learning_rate, float)


def test_a_seed_is_none_that_jax_takes_for_another():
    def seeded(seed):
        return RunConfig("x", teacher="t", stages={"moe": StageConfig()}, seed=seed)

    most = 2**32 - 1
    assert seeded(most).seed == most
    for seed in (-1, most + 1, 2**64):
        message = f"^RunConfig.seed = {seed}: expected a whole number from 0 to {most}$"
        with pytest.raises(ConfigError, match=message):
            seeded(seed)


def test_names_of_stages():
    stage = StageConfig()

    def refused(message, **fields):
        with pytest.raises(ConfigError, match=message):
            RunConfig("x", teacher="t", **({"stages": {"moe": stage}} | fields))

    for name in ("start", "..", "a/b", "", ".a"):
        refused(rf"RunConfig.stages.{name}: expected letters", stages={name: stage})
        refused(rf"RunConfig.rivals.{name}: expected letters", rivals={name: StudentConfig()})
    refused("RunConfig.keep_checkpoints = 0: expected a whole number", keep_checkpoints=0)


def test_a_teacher_is_found_from_the_shell_and_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert teacher_path("teachers/pictograms") == ROOT / "teachers/pictograms"
    (tmp_path / "teachers" / "pictograms").mkdir(parents=True)
    assert teacher_path("teachers/pictograms") == tmp_path / "teachers/pictograms"
    with pytest.raises(ConfigError, match=f"^teacher = a/b: found nothing in {tmp_path} nor in"):
        teacher_path("a/b")
    near = r"nor in [^;]*, did you mean pictograms\?; expected"
    with pytest.raises(ConfigError, match=near):
        teacher_path("teachers/pictogram")


def test_grid_of_an_image():
    assert FLUX.grid() == (64, 64) and FLUX.grid(768, 1360) == (48, 85)
    assert ModelConfig().grid(8, 12) == (2, 3)
    with pytest.raises(ConfigError, match="image size 1000 × 1024: expected multiples of 16"):
        FLUX.grid(1000, 1024)


def test_a_field_that_no_longer_means_anything_is_read_past():
    config = ModelConfig()
    value = to_json(config)
    value["transformer"]["moe"]["implementation"] = "triton"
    assert from_json(ModelConfig, value) == config


def test_first_line_of_an_error():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError("  ")) == "ValueError"
    assert first_line(ValueError("x" * 500)) == "x" * 160
    assert first_line(ValueError("x" * 500), None) == "x" * 500


def test_stacks_by_name():
    a, b, c = (StackConfig(groups=n) for n in (1, 2, 3))
    config = FluxConfig(double=(a, b), single=(c,))
    assert config.named_stacks == [("double", 0, 0, a), ("double", 1, 1, b), ("single", 0, 0, c)]
    assert config.depth("double") == 3 and config.depth("single") == 3
