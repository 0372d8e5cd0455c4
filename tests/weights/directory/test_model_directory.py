"""The model directory: round trips, storage as bf16, damage, and writes that fail."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import d2m_jax
from d2m_jax.config import ConfigError, FluxConfig, ModelConfig, MoEConfig, StackConfig
from d2m_jax.models.flux import Flux
from d2m_jax.named_arrays import fingerprint, names
from d2m_jax.weights.directory import model_directory
from tests.models import toy

CONFIG = ModelConfig(
    transformer=FluxConfig(
        in_channels=12,
        vec_in_dim=8,
        context_in_dim=8,
        hidden_size=32,
        num_heads=2,
        axes_dim=(4, 6, 6),
        guidance_embed=False,
        double=(StackConfig(1),),
        single=(StackConfig(1), StackConfig(1, blocks=2, ffn="moe")),
        moe=MoEConfig(experts=4),
    )
)


@pytest.fixture(scope="module")
def params():
    return toy.params(CONFIG.transformer)


@pytest.fixture
def path(params, tmp_path):
    model_directory.save(tmp_path / "model", CONFIG, params)
    return tmp_path / "model"


def test_round_trip(path, params):
    config, loaded = model_directory.load(path)
    assert config == CONFIG and jax.tree.structure(loaded) == jax.tree.structure(params)
    assert fingerprint(loaded) == fingerprint(params)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model"]


def test_bf16_storage(params, tmp_path):
    path = tmp_path / "model"
    model_directory.save(path, CONFIG, params, dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert fingerprint(model_directory.load(path)[1]) == fingerprint(rounded)
    stored = model_directory.load(path, dtype=None)[1]
    assert {a.dtype for a in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}


def test_saving_says_nothing(path, params, caplog):
    model_directory.save(path.parent / "again", CONFIG, params)
    assert not caplog.records


def test_load_model(path, params):
    model = d2m_jax.load_model(path)
    assert isinstance(model, Flux) and model.config == CONFIG.transformer
    np.testing.assert_array_equal(model.img_in.kernel[...], params["img_in"]["kernel"])


def test_replaced_whole(path, params):
    other = jax.tree.map(lambda a: a + 1, params)
    with pytest.raises(ConfigError, match="model: exists; expected a free name, or --overwrite"):
        model_directory.save(path, CONFIG, other)
    assert fingerprint(model_directory.load(path)[1]) == fingerprint(params)
    model_directory.save(path, CONFIG, other, overwrite=True)
    assert fingerprint(model_directory.load(path)[1]) == fingerprint(other)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model"]


def test_a_run_is_no_model(tmp_path):
    run = tmp_path / "run"
    loads = (model_directory.load_config, d2m_jax.load_model, d2m_jax.load_pipeline)
    for made, found in {
        "rivals": "it has no model of its own yet",
        "models/start": f"its newest model is {run}/models/start",
    }.items():
        (run / made).mkdir(parents=True)
        for load, given in itertools.product(loads, (run, run / "model")):
            with pytest.raises(ConfigError, match=f"run: a run that has not ended; {found}$"):
                load(given)
    (run / "model").mkdir()
    with pytest.raises(ConfigError, match=f"run: a run; its model is {run}/model$"):
        d2m_jax.load_model(run)


def test_types_by_their_names(path):
    for name in ("bf16", "bfloat16", jnp.bfloat16):
        assert d2m_jax.load_model(path, name).dtype == jnp.bfloat16
        assert d2m_jax.load_pipeline(path, name).encoders.dtype == jnp.bfloat16
    for load in (d2m_jax.load_model, d2m_jax.load_pipeline):
        with pytest.raises(ConfigError, match="dtype = 'b16': expected bfloat16 or float32"):
            load(path, "b16")
        with pytest.raises(ConfigError, match="dtype = 'int8': expected bfloat16 or float32"):
            load(path, "int8")


def test_home(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    assert d2m_jax.load_model("~/model").config == CONFIG.transformer
    assert d2m_jax.load_pipeline("~/model").config == CONFIG


def test_failed_write_loses_nothing(path, params):
    bad = params | {"img_in": {"kernel": jnp.full(3, jnp.nan)}}
    with pytest.raises(FloatingPointError):
        model_directory.save(path, CONFIG, bad, overwrite=True)
    assert fingerprint(model_directory.load(path)[1]) == fingerprint(params)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model"]


def test_failed_rename_loses_nothing(path, params, monkeypatch):
    rename = type(path).rename

    def fail(self, target):
        if self.name.endswith(".new"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        model_directory.save(path, CONFIG, jax.tree.map(lambda a: a + 1, params), overwrite=True)
    assert fingerprint(model_directory.load(path)[1]) == fingerprint(params)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model"]


def test_something_else_is_not_replaced(params, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no model directory"):
        model_directory.save(tmp_path, CONFIG, params, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def refused(path, message):
    with pytest.raises(ConfigError, match=message) as error:
        model_directory.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_byte_order_mark_is_read_past(path):
    file = path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert model_directory.load_config(path) == CONFIG


def test_missing(path):
    refused(path.parent / "nothing", "found no such directory")
    other = path.parent / "diffusers"
    (other / "transformer").mkdir(parents=True)
    message = f"python convert_torch_weights.py {other} OUTPUT"
    refused(other, f"found a FluxPipeline of diffusers; make one of it with: {message}")
    (other / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    refused(other, "found a folder of diffusers; make")
    refused(other / "config.json", "config.json: text, .*; expected a model directory")
    (other / "flux.safetensors").write_bytes(b"")
    refused(other / "flux.safetensors", "found a file; make one of it with")
    refused(path.parent, "found no config.json in it; convert_torch_weights.py makes one of torch")
    (path / "params").rename(path.parent / "elsewhere")
    refused(path, "expected params/")


def test_damaged_config(path):
    content = (path / "config.json").read_text()
    (path / "config.json").write_text(content[: len(content) // 2])
    refused(path, "config.json: damaged, expected JSON")
    (path / "config.json").write_text(content.replace('"shift"', '"shft"'))
    refused(path, r"config.json.shft: unknown field, did you mean shift\?")


@pytest.mark.parametrize("way", ["delete", "truncate", "garble", "flip"])
def test_damaged_params(path, params, way):
    """Whatever happens to a file: an error of one line, or the very same numbers; never others."""
    refusals = 0
    for file in sorted(f for f in (path / "params").rglob("*") if f.is_file()):
        content = file.read_bytes()
        half = len(content) // 2
        damaged = {
            "delete": None,
            "truncate": content[:half],
            "garble": np.random.default_rng(0).bytes(len(content)),
            "flip": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
            if content
            else b"x",
        }[way]
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        try:
            assert fingerprint(model_directory.load(path)[1]) == fingerprint(params), file
        except ConfigError as error:
            refusals += 1
            assert "\n" not in str(error) and str(path) in str(error)
        file.write_bytes(content)
    assert refusals >= 2
    assert fingerprint(model_directory.load(path)[1]) == fingerprint(params)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"in_channels": 12', '"in_channels": 16', r"bias is \(12,\), expected \(16,\) \(and 2"),
        ('"guidance_embed": false', '"guidance_embed": true', "guidance_in.* is missing, expected"),
    ],
)
def test_params_that_do_not_fit(path, old, new, message):
    content = (path / "config.json").read_text()
    assert old in content
    (path / "config.json").write_text(content.replace(old, new))
    refused(path, message)


def test_names(params):
    assert "single.1.block.mlp.experts.in_kernel" in names(params)
    assert json.dumps(list(names(params)))
