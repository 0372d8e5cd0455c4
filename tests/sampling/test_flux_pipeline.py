"""A whole FluxPipeline against diffusers': prompts and latents in, pixels out, all in float32."""

import importlib.util
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from d2m_jax import flow
from d2m_jax.config import ConfigError, ModelConfig, PromptsConfig, from_json, to_json
from d2m_jax.sampling.noise import noise
from d2m_jax.sampling.pipeline import load_pipeline
from d2m_jax.tokenizers import Tokenizers
from d2m_jax.weights import convert
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import safetensors
from d2m_jax.weights.torch_files.diffusers_folder import model_config
from tests.models import toy
from tests.sampling.flux_oracle import tiny_pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402
from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # noqa: E402

CALCULATED = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
PROMPTS = ["red anchor left of blue earth", "blue earth and a red thing"]


@pytest.fixture(scope="module", params=["dev", "schnell"])
def both(request, tmp_path_factory):
    """Diffusers' pipeline, ours from its folder."""
    dev = request.param == "dev"
    theirs = tiny_pipeline(guidance=dev, dynamic=dev)
    folder = tmp_path_factory.mktemp(request.param) / "flux"
    theirs.save_pretrained(folder)
    return theirs, load_pipeline(folder)


def run(both, height, width, steps, latents=None, **options):
    theirs, ours = both
    tokens = (height // 4) * (width // 4)
    latents = np.array(noise(0, len(PROMPTS), tokens, 64)) if latents is None else latents
    expected = theirs(
        PROMPTS,
        height=height,
        width=width,
        num_inference_steps=steps,
        latents=torch.from_numpy(np.array(latents)),
        max_sequence_length=12,
        output_type="np",
        guidance_scale=options.get("guidance", 3.5),
        negative_prompt=options.get("negative_prompts"),
        true_cfg_scale=options.get("true_cfg", 1.0),
    ).images
    found = ours(
        PROMPTS,
        height=height,
        width=width,
        steps=steps,
        latents=latents,
        max_sequence_length=12,
        **options,
    )
    assert found.shape == expected.shape and expected.std() > 0.02
    return np.abs(found - expected).max()


def test_images_are_diffusers_images(both):
    """1e-4 in pixels of [0, 1]: float32 rounding through four steps and the decoder."""
    assert run(both, 16, 24, 4) <= 1e-4
    assert run(both, 32, 8, 3, guidance=1.5) <= 1e-4


def test_true_guidance_is_diffusers(both):
    negative = ["left", "of a blue anchor"]
    assert run(both, 16, 16, 3, negative_prompts=negative, true_cfg=2.5) <= 1e-4


def test_what_the_folder_says_is_what_the_pipeline_uses(both):
    theirs, ours = both
    dev = theirs.transformer.config.guidance_embeds
    assert ours.config.shift == (None if dev else 1.0)
    assert ours.config.sample_steps == (28 if dev else 4)
    assert ours.config.transformer.axes_dim == (8, 12, 12)


def test_a_transformer_alone_takes_the_encoders_of_a_pipeline(both, tmp_path):
    """Diffusers' folder, and a model directory made of it; a single file is told the same."""
    theirs, ours = both
    theirs.transformer.save_pretrained(tmp_path / "alone" / "transformer")
    convert.convert(tmp_path / "alone", tmp_path / "model")
    convert.convert(tmp_path / "alone", tmp_path / "file.sft", export="bfl")
    with pytest.raises(ConfigError, match="file.sft: .* with --encoders FLUXPIPELINE"):
        load_pipeline(tmp_path / "file.sft")
    folder = ours.config.encoders
    expected = ours(PROMPTS, height=16, width=16, steps=2)
    for bare in ("alone", "alone/transformer", "model"):
        with pytest.raises(ConfigError, match=f"{bare}: .* with --encoders FLUXPIPELINE"):
            load_pipeline(tmp_path / bare)
        found = load_pipeline(tmp_path / bare, encoders=folder)
        assert found.config.shift == ours.config.shift
        images = found(PROMPTS, height=16, width=16, steps=2)
        np.testing.assert_allclose(images, expected, atol=1e-5)  # float32 in another order
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_pipeline(tmp_path / "alone", encoders=tmp_path / "nothing")
    other = ModelConfig(replace(ours.config.transformer, context_in_dim=20), PromptsConfig())
    model_directory.save(tmp_path / "other", other, toy.params(other.transformer))
    with pytest.raises(ConfigError, match="text_encoder_2: gives 24 channels, expected .* 20"):
        load_pipeline(tmp_path / "other", encoders=folder)


def test_what_is_cut_off_a_prompt_is_told(both, capsys):
    _, ours = both
    small = {"height": 8, "width": 8, "steps": 1}
    long = " ".join(["red anchor"] * 20 + ["left of blue earth"])
    ours(["red", long, long], **small)
    clip = "prompts[1] is cut off, CLIP reads 77 tokens; lost: "
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(clip) and said.endswith(
        "blue earth' (and of 1 more); T5 reads all of it"
    )
    ours(["red", long], max_sequence_length=42, **small)
    of_clip, of_t5 = capsys.readouterr().err.splitlines()
    assert of_clip.startswith(clip) and "T5 reads" not in of_clip
    # 40 words, two of the last four, and the end of the text
    expected = "T5 reads 42 tokens; lost: 'of blue earth'; max_sequence_length can be up to 512"
    assert of_t5 == f"prompts[1] is cut off, {expected}"
    ours("red", negative_prompts=long, true_cfg=2.0, **small)
    assert capsys.readouterr().err.startswith("negative_prompts[0] is cut off, CLIP reads 77")
    ours(["red", ""], **small)
    assert capsys.readouterr().err == ""


def test_guidance_that_a_model_does_not_know_is_told(both, capsys):
    theirs, ours = both
    ours("red", height=8, width=8, steps=1, guidance=2.0)
    dev = theirs.transformer.config.guidance_embeds
    said = "guidance = 2.0: ignored, this model has no guidance embedding\n"
    assert capsys.readouterr().err == ("" if dev else said)


def edited(folder, target, file, **fields):
    """A copy of a pipeline's folder with other fields in one JSON file of it."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    value = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(value | fields))
    return target


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("scheduler/scheduler_config.json", "_class_name", "FlowMatchHeunDiscreteScheduler"),
        ("scheduler/scheduler_config.json", "use_karras_sigmas", True),
        ("scheduler/scheduler_config.json", "use_exponential_sigmas", True),
        ("scheduler/scheduler_config.json", "use_beta_sigmas", True),
        ("scheduler/scheduler_config.json", "invert_sigmas", True),
        ("scheduler/scheduler_config.json", "stochastic_sampling", True),
        ("scheduler/scheduler_config.json", "shift_terminal", 0.1),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 500),
        ("model_index.json", "_class_name", "StableDiffusion3Pipeline"),
    ],
)
def test_what_would_change_the_images_is_refused(both, tmp_path, file, field, value):
    folder = edited(both[1].config.encoders, tmp_path / "a", file, **{field: value})
    with pytest.raises(ConfigError, match=f"{file}: {field} = {value!r}, expected "):
        load_pipeline(folder)


def test_settings_of_schedulers(both, tmp_path):
    """A shift is honoured, one by length gives the times of diffusers' pipeline at every length,
    and what says nothing is as if absent."""
    file = "scheduler/scheduler_config.json"
    plain = {"use_dynamic_shifting": False, "use_karras_sigmas": None, "shift_terminal": 0}

    def read(**fields):
        folder = edited(both[1].config.encoders, tmp_path / "a", file, **plain | fields)
        return model_config(both[1].config.transformer, folder)

    def shift(**fields):
        return read(**fields).shift

    assert shift(shift=3.0) == 3.0 and shift(shift=2) == 2.0
    sloped = {"base_shift": 0.3, "max_shift": 1.6, "base_image_seq_len": 64}
    level = {"base_shift": math.log(3), "max_shift": math.log(3), "max_image_seq_len": 8192}
    for line in ({"shift": 3.0}, sloped, level):
        config = read(use_dynamic_shifting=True, **line)
        assert config.shift is None and from_json(ModelConfig, to_json(config)) == config
        theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **line)
        for tokens in (16, 256, 1000, 9000):
            mu = calculate_shift(tokens, *map(theirs.config.get, CALCULATED))
            theirs.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=mu)
            ours = flow.schedule(7, config.shift_at(tokens))
            np.testing.assert_allclose(ours, theirs.sigmas, rtol=1e-6)
    for line, message in (
        ({"base_shift": "1"}, "base_shift = '1': expected a number"),
        ({"max_shift": 1e4}, "max_shift = 10000.0: expected a number between -100 and 100"),
        ({"max_image_seq_len": 256}, "max_image_seq_len = 256: expected a whole number, at least"),
    ):
        with pytest.raises(ConfigError, match=f"scheduler_config.json: {message}"):
            shift(use_dynamic_shifting=True, **line)
    for bad in (0, -1.0, None, "3"):
        with pytest.raises(ConfigError, match="shift = .*, expected a number above 0"):
            shift(shift=bad)
    with pytest.raises(ConfigError, match="time_shift_type = 'linear', expected 'exponential'"):
        shift(use_dynamic_shifting=True, time_shift_type="linear")


def test_tokenizers_without_their_settings(both, tmp_path):
    """tokenizer.json alone pads and ends texts as the whole folder does; of an empty folder, and
    of a vocabulary that needs another package, one line tells."""
    ours = both[1]
    folder = tmp_path / "a"
    shutil.copytree(ours.config.encoders, folder)
    expected = Tokenizers(str(folder), ours.config.text).ids(PROMPTS)
    for part in ("tokenizer", "tokenizer_2"):
        for file in (folder / part).iterdir():
            if file.name != "tokenizer.json":
                file.unlink()
    found = Tokenizers(str(folder), ours.config.text).ids(PROMPTS)
    assert found.keys() == expected.keys()
    for name, ids in expected.items():
        np.testing.assert_array_equal(found[name], ids)
    (folder / "tokenizer_2" / "tokenizer.json").rename(folder / "tokenizer_2" / "spiece.model")
    if importlib.util.find_spec("sentencepiece") is None:
        with pytest.raises(ConfigError, match="tokenizer_2: spiece.model .* install sentencepiece"):
            Tokenizers(str(folder), ours.config.text).ids(PROMPTS)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer: expected a tokenizer .*, found none"):
        Tokenizers(str(folder), ours.config.text).ids(PROMPTS)


def test_encoders_under_wrapped_names(both, tmp_path, capsys):
    """As DDP and torch.compile leave them: read as without, and one line each says so."""
    folder, ours = tmp_path / "a", both[1]
    shutil.copytree(ours.config.encoders, folder)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        (file,) = (folder / part).glob("*.safetensors")
        tensors = {f"module._orig_mod.{n}": np.array(t) for n, t in safetensors.read(file).items()}
        safetensors.write(file, tensors)
    capsys.readouterr()
    found = load_pipeline(folder)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.endswith("names: _orig_mod.; module.") for line in said)
    expected = ours("red", height=8, width=8, steps=1)
    np.testing.assert_array_equal(found("red", height=8, width=8, steps=1), expected)


def test_json_with_a_byte_order_mark(both, tmp_path):
    """As editors on Windows save it: read as without."""
    folder = tmp_path / "a"
    shutil.copytree(both[1].config.encoders, folder)
    for file in (*folder.glob("*.json"), *folder.glob("*/*config.json")):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_pipeline(folder).config == replace(both[1].config, encoders=str(folder))


def test_a_part_that_is_missing_is_named(both, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(both[1].config.encoders, folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ConfigError, match="a: expected a folder vae in it, found none"):
        load_pipeline(folder)
